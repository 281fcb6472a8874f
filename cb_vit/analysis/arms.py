"""Runs in arms, which differ in something and hold one run a seed; and whether what they measured can be compared."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cb_vit.analysis.runs import Found, Run
from cb_vit.config import ConfigError
from cb_vit.texts import short_names


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds alone.

    Attributes:
        factors: what tells this arm from the others: value by name.
        runs: its runs by seed.
    """

    factors: Mapping[str, str]
    runs: Mapping[int, Run]

    @property
    def name(self) -> str:
        """What the arm is called: the factors and their values."""
        return ", ".join(f"{name}={value}" for name, value in self.factors.items()) or "all runs"


def group(found: Found, field: str) -> list[Arm]:
    """The arms of some runs: of one sweep by the names of its grid, of others by the settings that differ.

    Raises:
        ConfigError: a run has no seed, or two of an arm have the same; raised at `field`.
    """
    keys = _by_grid(found) if found.axes else _by_settings(found.runs)
    arms: dict[tuple[tuple[str, str], ...], dict[int, Run]] = {}
    for run, factors in zip(found.runs, keys, strict=True):
        if run.seed is None:
            raise ConfigError(field, f"{run.folder}/config.json has no seed, so its run cannot be paired with others")
        others = arms.setdefault(tuple(factors.items()), {})
        if other := others.get(run.seed):
            raise ConfigError(field, f"{run.folder} and {other.folder} have the same settings and seed {run.seed}; "
                                     "give one of them")
        others[run.seed] = run
    return [Arm(dict(factors), dict(sorted(runs.items()))) for factors, runs in arms.items()]


def _by_grid(found: Found) -> list[dict[str, str]]:
    differing = [axis for axis in found.axes
                 if axis != "seed" and len({run.grid.get(axis) for run in found.runs}) > 1]
    return [{axis: run.grid[axis] for axis in differing} for run in found.runs]


def _by_settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if any(_text(run, name) != _text(runs[0], name) for run in runs)]
    short = dict(zip(differing, _ends(differing), strict=True))
    return [{short[name]: _text(run, name) for name in differing} for run in runs]


def _text(run: Run, name: str) -> str:
    value = run.settings.get(name, "(not set)")
    return value if isinstance(value, str) else repr(value)


def _ends(names: Sequence[str]) -> list[str]:
    """The ends of some dotted names that tell them apart."""
    return [end.replace("/", ".") for end in short_names([name.replace("/", "|").replace(".", "/") for name in names])]


def check_data(runs: Sequence[Run], field: str) -> Iterator[str]:
    """Refuse runs that were not evaluated on the same data, whose metrics say nothing of each other.

    Yields:
        What could not be compared, in words.

    Raises:
        ConfigError: two runs have evaluated on other data under one name; raised at `field`.
    """
    for name in dict.fromkeys(name for run in runs for name in run.evaluators):
        known = [(run, data) for run in runs if (data := run.data(name))]
        for run, data in known[1:]:
            first, was = known[0]
            if data != was:
                raise ConfigError(field, f"{run.name} and {first.name} were not evaluated on the same data: {name!r} "
                                         f"has {_data_text(data)} in the one and {_data_text(was)} in the other")
        if any(data[1] is None for _, data in known):
            yield f"the data of {name!r} has no fingerprint: that it is the same rests on its number of examples"


def _data_text(data: tuple[Any, Any]) -> str:
    examples, fingerprint = data
    count = f"{examples:,}" if isinstance(examples, int) else repr(examples)
    return f"{count} examples" + (f" of fingerprint {fingerprint!s:.8}" if fingerprint else "")


def is_score(name: str) -> bool:
    """Whether a higher value of a metric is better.

    Raises:
        ConfigError: the name does not tell; raised at "--better".
    """
    last = name.rpartition("/")[2]
    for pattern, higher in ((r"prec@\d+|.*acc(uracy)?|auroc|map|.*_agreement", True),
                            (r".*loss|.*error|(relative_)?mce|ece(_\w+)?|nll|brier|perplexity", False)):
        if re.fullmatch(pattern, last):
            return higher
    raise ConfigError("--better", f"not given, and the name of {name!r} does not tell; give --better=higher or "
                                  "--better=lower")
