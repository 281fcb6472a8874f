"""Folders of runs and of sweeps as they lie there: what each run was, how far it came, and what it has measured."""
from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from cb_vit import io, records, workdir
from cb_vit.analysis.sweeps import SWEEP, Sweep, read_sweep
from cb_vit.config import ConfigError
from cb_vit.records import EMA, Series
from cb_vit.texts import first_few, short_names

# Settings that change what is written, or how fast, and not what is learned; where the data is does not say what it is.
NO_EFFECT = re.compile(
    r"seed|plot|tensorboard|(wandb|profile)(\..*)?|(log_training|ckpt|keep_ckpt)_\w+|keep_last|keep_best(\..*)?|"
    r"(input|evals\.[^.]+)\.(num_workers|num_threads|prefetch|data\.data_dir|data\.root)|evals\.[^.]+\.(log_\w+|"
    r"batch_size)")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as its folder says.

    Attributes:
        folder: the run's folder, local or in a bucket; that of a cell which has not begun need not be there.
        name: short name that tells it from the others.
        config: the config it was last started with.
        notes: content of `run.json`; empty where the run has not come to its first step.
        history: steps and values of each metric recorded.
        grid: value of each name of the grid of its sweep, as typed; None: the run is of no sweep.
    """

    folder: epath.Path
    name: str
    config: Mapping[str, Any]
    notes: Mapping[str, Any]
    history: Mapping[str, Series]
    grid: Mapping[str, str] | None = None

    @property
    def seed(self) -> int | None:
        """The run's seed; None where the config is none of ours."""
        return seed if type(seed := self.config.get("seed")) is int else None

    @property
    def total_steps(self) -> int | None:
        """Length of the run in steps; None: not known yet."""
        return total if type(total := self.notes.get("total_steps")) is int else None

    @functools.cached_property
    def step(self) -> int:
        """The last step that something is recorded of; 0: nothing is."""
        return max((int(steps[-1]) for steps, _ in self.history.values() if len(steps)), default=0)

    @functools.cached_property
    def evaluators(self) -> dict[str, tuple[str, str]]:
        """(kind, beginning of the names of its metrics) of each evaluator, by its name."""
        blocks = self.config.get("evals")
        blocks = {name: block for name, block in blocks.items() if isinstance(block, Mapping)} if isinstance(
            blocks, Mapping) else {}
        return {name: (str(block.get("type")), f"{name}/" if block.get("prefix") is None else str(block["prefix"]))
                for name, block in blocks.items()}

    @property
    def finished(self) -> bool:
        """Whether the run has come to its last step, and all its evaluators have had their turn there."""
        last = [name for name in self.history if self.final(name) is not None]
        return bool(last) and all(any(name.startswith(prefix) for name in last)
                                  for _, prefix in self.evaluators.values())

    def final(self, metric: str) -> float | None:
        """The value of a metric at the run's last step, which may be NaN; None: it has none there."""
        steps, values = self.history.get(metric, ((), ()))
        return float(values[-1]) if len(steps) and steps[-1] == self.total_steps else None

    def measured(self) -> list[str]:
        """Names of the metrics of its evaluators at its last step."""
        prefixes = tuple(prefix for _, prefix in self.evaluators.values())
        return [name for name in self.history
                if self.final(name) is not None and name.removeprefix(EMA).startswith(prefixes)]

    def data(self, name: str) -> tuple[Any, Any] | None:
        """(number of examples, fingerprint) of a source: "train", or the name of an evaluator; None: not recorded."""
        found = self.notes.get("data")
        found = found.get(name) if isinstance(found, Mapping) else None
        return (found.get("examples"), found.get("fingerprint")) if isinstance(found, Mapping) else None

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What makes the run what it is, but for its seed: settings by their dotted names, and its data."""
        found = {name: value for name, value in workdir.flatten(self.config).items() if not NO_EFFECT.fullmatch(name)}
        if data := self.data("train"):
            found["input.data.fingerprint"] = list(data)
        return found

    def standing(self) -> str:
        """How far the run is, in words."""
        if not self.step:
            return "not a step is recorded"
        total = "?" if self.total_steps is None else f"{self.total_steps:,}"
        if self.step == self.total_steps and not self.finished:
            return f"at its last step, {total}, but not evaluated there"
        return f"at step {self.step:,} of {total}"


@dataclasses.dataclass(frozen=True)
class Found:
    """What some folders hold.

    Attributes:
        runs: all runs, those of sweeps too.
        sweeps: the sweeps by their folders, as given.
    """

    runs: tuple[Run, ...]
    sweeps: Mapping[str, Sweep]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the grid of the one sweep that all runs are of; none where they are not of one."""
        return tuple(next(iter(self.sweeps.values())).grid) if len(self.sweeps) == 1 and all(
            run.grid is not None for run in self.runs) else ()


def find_runs(folders: Sequence[str | os.PathLike], field: str) -> Found:
    """The runs in some folders, each that of a run or of a sweep.

    Args:
        folders: the folders, local or in a bucket.
        field: where they were given, for errors.

    Raises:
        ConfigError: a folder is neither, or two hold the same run; raised at `field`.
        Failure: a file cannot be read.
    """
    cells: list[tuple[str, epath.Path, Sweep | None, str]] = []
    sweeps = {}
    for folder in map(os.fspath, folders):
        io.check_address(folder, field)
        if sweep := read_sweep(folder, field):
            sweeps[folder] = sweep
            cells += [(f"{folder.rstrip('/')}/{name}", io.as_path(folder) / name, sweep, name) for name in sweep.cells]
        else:
            cells.append((folder, io.as_path(folder), None, ""))
    places: dict[str, str] = {}
    for given, path, *_ in cells:
        place = os.path.realpath(path) if io.is_local(path) else os.fspath(path).rstrip("/")
        if place in places:
            raise ConfigError(field, f"{given} and {places[place]} are the same run; give it once")
        places[place] = given
    names = short_names(list(places))
    return Found(tuple(_read(name, path, sweep, cell, field)
                       for name, (_, path, sweep, cell) in zip(names, cells, strict=True)), sweeps)


def _read(name: str, folder: epath.Path, sweep: Sweep | None, cell: str, field: str) -> Run:
    config = workdir.read_config(folder)
    if sweep:
        planned = sweep.cells[cell].config
        if changed := workdir.changes(planned, planned if config is None else config):
            raise ConfigError(field, f"{folder} was trained with another config than its sweep says: "
                                     f"{first_few(changed)}; move it out of the sweep")
        config = planned
    elif config is None:
        raise ConfigError(field, f"{folder} has neither a config.json, as runs do, nor a {SWEEP}, as sweeps do")
    return read_run(name, folder, config, field, sweep and sweep.cells[cell].grid)


def read_run(name: str, folder: epath.Path, config: Mapping[str, Any], field: str,
             grid: Mapping[str, str] | None = None) -> Run:
    """A run whose config is known; it may have recorded nothing yet.

    Args:
        name, folder, config, grid: as the attributes of `Run`.
        field: where the folder was given, for errors.

    Raises:
        ConfigError: a file is nothing that a run has written.
        Failure: a file cannot be read.
    """
    notes = workdir.read_run(folder) or {}
    content = io.read(folder / "metrics.jsonl") or b""
    history = records.read(folder, field).series() if content.strip() else {}
    return Run(folder, name, config, notes, history, grid)


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


def finite(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)
