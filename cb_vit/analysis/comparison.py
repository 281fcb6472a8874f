"""Runs against each other: arms that differ in something, paired by seed, by one metric that was chosen beforehand."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cb_vit.analysis import statistics
from cb_vit.analysis.arms import Arm, check_data, group, is_score
from cb_vit.analysis.runs import Found, find_runs
from cb_vit.analysis.sweeps import split_values
from cb_vit.config import ConfigError, suggest
from cb_vit.texts import first_few

FIELD = "DIR"  # where the folders are given, for errors
LEFT_OUT = "a comparison without runs that failed may flatter the arm they failed in"


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the runs of one arm have come to by one metric.

    Attributes:
        arm: name of the arm.
        seeds: seeds of the runs, ascending.
        values: the metric at the last step of each run, in the order of `seeds`.
    """

    arm: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs; NaN where there is none."""
        return float(np.mean(self.values)) if self.values else float("nan")

    @property
    def std(self) -> float | None:
        """Standard deviation of one run (n - 1); None where there are not two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against its baseline, by one metric.

    Attributes:
        arm: name of the arm.
        baseline: name of the arm it is compared with.
        factors: names of what the two differ in.
        seeds: seeds that both have, ascending: the pairs.
        values: arm minus baseline of each pair.
        level: share of such intervals that hold the true mean difference.
        tested: whether it is of the metric that is tested; there is no p of others.
        tests: number of differences that are tested together.
        p_holm: `p`, adjusted for the number of tests; None where there is no p.
    """

    arm: str
    baseline: str
    factors: tuple[str, ...]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    level: float
    tested: bool
    tests: int = 1
    p_holm: float | None = None

    @property
    def mean(self) -> float:
        """Mean over the pairs; NaN where there is none."""
        return float(np.mean(self.values)) if self.values else float("nan")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The t interval of the mean; None where there are not two pairs."""
        return statistics.t_interval(np.array(self.values), self.level) if len(self.values) > 1 else None

    @property
    def p(self) -> float | None:
        """Two-sided p of the permutation test by flips of signs; None where there is no test, or not two pairs."""
        return statistics.sign_flip_p(np.array(self.values)) if self.tested and len(self.values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Result:
    """Arms and their differences by one metric.

    Attributes:
        metric: name of the metric.
        scores: what each arm has come to.
        differences: each arm against its baseline.
    """

    metric: str
    scores: tuple[Scores, ...]
    differences: tuple[Difference, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
        primary: the metric that is tested.
        higher_is_better: whether it is better where it is higher.
        chosen: how the metric came to be the one that is tested: "sweep", by the sweep before its first run; "given",
            by the caller; "only", as there is no other; "against", by the caller, where the sweep had named another.
        level: level of each interval.
        baselines: names of the arms that others are compared with.
        exploratory: the same of all other metrics, without tests.
        notes: what is to be known of the runs, in sentences.
        arms: the arms and their runs.
    """

    primary: Result
    higher_is_better: bool
    chosen: str
    level: float
    baselines: tuple[str, ...]
    exploratory: tuple[Result, ...]
    notes: tuple[str, ...]
    arms: tuple[Arm, ...]


def compare(
    *folders: str | os.PathLike, metric: str | None = None, baseline: str | None = None, better: str | None = None,
    level: float = 0.95, allow_missing: bool = False,
) -> Comparison:
    """Compare runs by their metrics at their last steps: nothing is written.

    Args:
        *folders: folders of runs and of sweeps.
        metric: name of the metric that is tested, chosen before the runs were seen; None: the one that the sweep names,
            or the only one there is.
        baseline: the arm that the others are compared with, as in "context=none"; where it leaves several, each arm is
            compared with the one that is like it in all else. None: the one that the sweep names, if it does.
        better: "higher" or "lower"; None: as the metric's name says.
        level: level of the intervals, in (0, 1).
        allow_missing: whether runs that are not finished, seeds that not all arms have and values that are no numbers
            may be left out.

    Raises:
        ConfigError: the runs cannot be compared so; names the argument and the way out.
        Failure: a file cannot be read.
    """
    if not 0 < level < 1:
        raise ConfigError("--level", f"is a share in (0, 1), got {level}; write 0.95 for 95 %")
    found = find_runs(folders, FIELD)
    return compare_found(found, metric, baseline, better, level, allow_missing)


def compare_found(found: Found, metric: str | None = None, baseline: str | None = None, better: str | None = None,
                  level: float = 0.95, allow_missing: bool = False) -> Comparison:
    """As `compare`, of runs that are read already."""
    arms = group(found, FIELD)
    notes = list(check_data(found.runs, FIELD))
    metric, chosen = _choose(found, metric)
    better_known = is_score(metric) if better is None else better == "higher"
    problems = list(_missing(arms, metric))
    if problems and not allow_missing:
        raise ConfigError(FIELD, f"{first_few(problems, 3)}; finish what is not, or leave it out with --allow_missing")
    notes += [f"left out: {problem}; {LEFT_OUT}" for problem in problems]
    baseline = baseline or next((sweep.baseline for sweep in found.sweeps.values() if sweep.baseline), None)
    pairs = _pairs(arms, baseline, _settled(found)) if baseline else []
    primary = _result(metric, arms, pairs, level, tested=True)
    others, partly = [], []
    finished = [run for run in found.runs if run.finished]
    for name in _metrics(found):
        if name != metric:
            (others if all(_finite(run.final(name)) for run in finished) else partly).append(name)
    if partly:
        notes.append(f"not all finished runs have {first_few(partly)} at the last step; left out")
    return Comparison(
        primary, better_known, chosen, level, tuple(dict.fromkeys(base.name for _, base in pairs)),
        tuple(_result(name, arms, pairs, level, tested=False) for name in others), tuple(notes), tuple(arms))


def _metrics(found: Found) -> list[str]:
    return list(dict.fromkeys(name for run in found.runs for name in run.measured()))


def _choose(found: Found, metric: str | None) -> tuple[str, str]:
    """The metric that is tested, and how it came to be that."""
    known = _metrics(found)
    named = dict.fromkeys(sweep.metric for sweep in found.sweeps.values() if sweep.metric)
    if len(named) > 1 and metric is None:
        raise ConfigError("--metric", f"the sweeps name {' and '.join(named)}; give the one to test")
    if metric is not None:
        if metric not in known:
            raise ConfigError("--metric", f"no evaluator has measured {metric!r} at the last step of a run"
                                          f"{suggest(metric, known)} there are {first_few(known, 30) or 'none'}")
        return metric, "given" if not named else "sweep" if metric in named else "against"
    if named:
        return next(iter(named)), "sweep"
    if len(known) == 1:
        return known[0], "only"
    raise ConfigError("--metric", "not given, and the sweep has named none; choose the one that matters, before "
                                  f"looking: {first_few(known, 30) or 'no run has come to its last step yet'}")


def _missing(arms: Sequence[Arm], metric: str) -> Iterator[str]:
    """What keeps runs from being compared, in words: one run, or one seed of an arm, each."""
    seeds = sorted({seed for arm in arms for seed in arm.runs})
    for arm in arms:
        for seed in seeds:
            if (run := arm.runs.get(seed)) is None:
                yield f"{arm.name} has no run of seed {seed}"
            elif not run.finished:
                yield f"{run.name} is not finished ({run.standing()})"
            elif (value := run.final(metric)) is None:
                yield f"{run.name} has no {metric} at its last step"
            elif not _finite(value):
                yield f"{metric} of {run.name} is no number at its last step"


def _scores(metric: str, arm: Arm) -> Scores:
    found = {seed: value for seed, run in arm.runs.items() if run.finished and _finite(value := run.final(metric))}
    return Scores(arm.name, tuple(found), tuple(found.values()))


def _result(metric: str, arms: Sequence[Arm], pairs: Sequence[tuple[Arm, Arm]], level: float, tested: bool) -> Result:
    scores = {arm.name: _scores(metric, arm) for arm in arms}
    differences = []
    for arm, base in pairs:
        here, there = (dict(zip(scores[one.name].seeds, scores[one.name].values, strict=True)) for one in (arm, base))
        seeds = tuple(sorted(here.keys() & there.keys()))
        factors = tuple(name for name, value in arm.factors.items() if base.factors[name] != value)
        differences.append(Difference(arm.name, base.name, factors, seeds,
                                      tuple(here[seed] - there[seed] for seed in seeds), level, tested))
    ps = [difference.p for difference in differences]
    with_p = [index for index, p in enumerate(ps) if p is not None]
    for index, adjusted in zip(with_p, statistics.holm([ps[index] for index in with_p]), strict=True):
        differences[index] = dataclasses.replace(differences[index], p_holm=adjusted, tests=len(with_p))
    return Result(metric, tuple(scores.values()), tuple(differences))


def _settled(found: Found) -> dict[str, str]:
    """Names of the grid that have one value in all runs, and so tell no arms apart, with that value."""
    values = {axis: {run.grid[axis] for run in found.runs} for axis in found.axes if axis != "seed"}
    return {axis: next(iter(found)) for axis, found in values.items() if len(found) == 1}


def _pairs(arms: Sequence[Arm], baseline: str, settled: Mapping[str, str]) -> list[tuple[Arm, Arm]]:
    """Each arm with the arm that it is compared with."""
    wanted = _read_baseline(arms, baseline, settled)
    bases = [arm for arm in arms if all(arm.factors[name] == value for name, value in wanted.items())]
    if not bases:
        raise ConfigError("--baseline", f"no arm is {baseline!r}; there are "
                                        f"{first_few([arm.name for arm in arms], 12)}")
    if len(bases) == 1:
        return [(arm, bases[0]) for arm in arms if arm is not bases[0]]
    pairs = []
    for arm in arms:
        rest = {name: value for name, value in arm.factors.items() if name not in wanted}
        base = next((base for base in bases if rest.items() <= base.factors.items()), None)
        if base is None:
            raise ConfigError("--baseline", f"{baseline!r} leaves several arms, and none of them is like {arm.name} in "
                                            "all else; say more of it")
        if base is not arm:
            pairs.append((arm, base))
    return pairs


def _read_baseline(arms: Sequence[Arm], baseline: str, settled: Mapping[str, str]) -> Mapping[str, str]:
    """The factors that "context=none,lr=0.1" names, by the whole names of them."""
    factors, wanted = list(arms[0].factors), {}
    for part in split_values(baseline):
        name, equals, value = part.partition("=")
        if equals and settled.get(name) == value:  # so all arms are
            continue
        matching = [factor for factor in factors if factor == name or factor.endswith(f".{name}")]
        if not equals or len(matching) != 1:
            raise ConfigError("--baseline", f"cannot read {part!r}; the arms are "
                                            f"{first_few([arm.name for arm in arms], 12)}, for example --baseline="
                                            f"{next(iter(arms[0].factors.items()), ('context', 'none'))[0]}=…")
        wanted[matching[0]] = value
    return wanted


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
