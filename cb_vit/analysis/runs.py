"""Folders of runs and of sweeps as they lie there: what each run was, how far it came, and what it has measured."""
from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
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
