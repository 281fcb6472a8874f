"""From a command line to the cells of a sweep: every one checked before any begins, and what they share kept."""
from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cb_vit import io
from cb_vit import workdir as workdir_lib
from cb_vit.analysis.sweeps import (
    FORMAT,
    MOST_BYTES,
    NAME,
    SWEEP,
    Cell,
    Sweep,
    cell_name,
    cells_of,
    read_sweep,
    split_values,
)
from cb_vit.config import ConfigError, duration_keys, suggest
from cb_vit.evaluators.classification import METRICS
from cb_vit.overrides import lay_over
from cb_vit.records import EMA
from cb_vit.settings import Settings, check
from cb_vit.texts import first_few
from cb_vit.tools import config_files

WAIT = 30  # seconds for another process that writes the sweep down, which takes it a moment
Grid = Mapping[str, tuple[str, ...]]


def read_grid(given: Sequence[str], overrides: Sequence[tuple[str, str | None]], config: str) -> Grid:
    """The values of each name, as `--grid` gives them.

    Args:
        given: texts such as "context=none,cb".
        overrides: what the command line says of settings that all cells share.
        config: what was given as `--config`.

    Raises:
        ConfigError: a text is no such list, or says what is said already; raised at "--grid".
    """
    grid: dict[str, tuple[str, ...]] = {}
    shared = {name for name, _ in overrides} | {
        part.partition("=")[0].strip() for part in config.partition(":")[2].split(",")}
    for text in given:
        name, equals, values = (part.strip() for part in text.partition("="))
        listed = tuple(split_values(values)) if values else ()
        if not equals or not NAME.fullmatch(name):
            raise ConfigError("--grid", f"cannot read {text!r}; write a name and its values, such as context=none,cb")
        if name.startswith("config."):
            raise ConfigError("--grid", f"{text!r}: settings stand here without config.; write "
                                        f"{name.removeprefix('config.')}={values}")
        if name in grid:
            raise ConfigError("--grid", f"{name} is given twice; put all its values into one")
        if name in shared:
            raise ConfigError("--grid", f"{name} is set for all cells as well; keep one of the two")
        if not all(listed) or not listed:
            raise ConfigError("--grid", f"{text!r} has an empty value; write values with commas between them")
        if len(set(listed)) < len(listed):
            twice = next(value for value in listed if listed.count(value) > 1)
            raise ConfigError("--grid", f"{name}={twice} is given twice")
        grid[name] = listed
    if not grid:
        raise ConfigError("--grid", "not given; for example --grid context=none,cb --grid seed=0,1,2")
    return grid


@dataclasses.dataclass(frozen=True)
class Plan:
    """How cells come to their configs.

    Attributes:
        config: what was given as `--config`.
        overrides: what the command line says of settings that all cells share.
        grid: values of each name.
    """

    config: str
    overrides: Sequence[tuple[str, str | None]]
    grid: Grid

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The names that are arguments of the config file; the others are settings.

        Raises:
            ConfigError: the config cannot be loaded.
        """
        names = [name for name in self.grid if "." not in name]
        fields = {key for field in dataclasses.fields(Settings) for key in (field.name, *duration_keys(field.name))}
        while names:
            try:
                config_files.get_config(self._given({name: self.grid[name][0] for name in names}))
                break
            except ConfigError as error:
                # As `configs/common.py` says it; a file with other words is asked without what is a setting anyhow.
                refused = re.match(r"argument '(\w+)' in .*: this file takes (.*)", error.message)
                without = [name for name in names if name not in fields]
                if refused and refused[1] in names:
                    names.remove(name := refused[1])
                    if name not in fields:
                        near = suggest(name, [*refused[2].split(", "), *fields])
                        raise ConfigError("--grid", f"{name} is neither an argument of the config file, which takes "
                                                    f"{refused[2]}, nor a setting{near.rstrip(';')}") from None
                elif "get_config() takes 0 positional arguments" in error.message and ":" not in self.config:
                    names = []
                elif len(without) < len(names):
                    names = without
                else:
                    raise
        return frozenset(names)

    def _given(self, values: Mapping[str, str]) -> str:
        """`--config` with these arguments as well."""
        name, _, arg = self.config.partition(":")
        listed = ",".join(filter(None, [arg, *(f"{key}={value}" for key, value in values.items())]))
        return f"{name}:{listed}" if listed else name

    def _split(self, values: Mapping[str, str]) -> tuple[str, list[tuple[str, str | None]]]:
        """`--config` and settings of a cell."""
        given = self._given({name: value for name, value in values.items() if name in self.arguments})
        return given, [*self.overrides, *((n, value) for n, value in values.items() if n not in self.arguments)]

    def words(self, values: Mapping[str, str]) -> list[str]:
        """What the command line of a cell's run says, but for its workdir."""
        given, settings = self._split(values)
        return [f"--config={given}", *(f"--config.{n}" + ("" if text is None else f"={text}") for n, text in settings)]

    def settings(self, values: Mapping[str, str]) -> Settings:
        """The checked settings of a cell.

        Raises:
            ConfigError: they cannot work; names the cell as well.
        """
        given, settings = self._split(values)
        try:
            return check(lay_over(config_files.get_config(given), settings))
        except ConfigError as error:
            raise ConfigError(error.path, f"{error.message} (in the cell {cell_name(values)})") from None

    def sweep(self, metric: str | None, baseline: str | None) -> Sweep:
        """The sweep that is asked for, all of its cells checked.

        Raises:
            ConfigError: a cell cannot work, or two are the same; or there is no such metric or baseline.
        """
        cells: dict[str, Cell] = {}
        owners: dict[str, str] = {}
        for values in cells_of(self.grid):
            name, settings = cell_name(values), self.settings(values)
            if len(name) > MOST_BYTES:
                raise ConfigError("--grid", f"{name:.60}… is too long for the name of a folder; sweep over fewer names,"
                                            " or make the values arguments of a config file of your own")
            cell = Cell(values, as_json(settings.raw))
            for key, what in ((name.casefold(), "would have the same folder"),
                              (json.dumps(workdir_lib.flatten(cell.config), sort_keys=True), "are the same run")):
                if (other := owners.setdefault(key, name)) is not name:
                    raise ConfigError("--grid", f"the cells {other} and {name} {what}; leave one out")
            if metric is not None:
                _check_metric(metric, settings)
            cells[name] = cell
        if baseline is not None:
            _check_baseline(baseline, self.grid)
        return Sweep(FORMAT, self.config, tuple(self.overrides), dict(self.grid), cells, metric, baseline)

    def merged(self, workdir: str | os.PathLike, sweep: Sweep) -> Sweep:
        """The sweep in `workdir` with the cells of this one.

        Raises:
            ConfigError: the two are not of one kind: what all cells share differs, or the metric comes too late.
        """
        if (old := read_sweep(workdir, "--workdir")) is None:
            return sweep
        way_out = "set it back, or use another workdir"
        if list(old.grid) != list(sweep.grid):
            raise ConfigError("--grid", f"the sweep in {workdir} is over {', '.join(old.grid)}, not over "
                                        f"{', '.join(sweep.grid)}; {way_out}")
        for name, cell in old.cells.items():
            now = sweep.cells.get(name) or Cell(cell.grid, as_json(self.settings(cell.grid).raw))
            if changed := workdir_lib.changes(cell.config, now.config):
                raise ConfigError("--workdir", f"the sweep in {workdir} began with other settings: "
                                               f"{first_few(changed)} (in the cell {name}); {way_out}")
        for flag in ("metric", "baseline"):
            was, now = getattr(old, flag), getattr(sweep, flag)
            if now is not None and was != now and _begun(workdir, old):
                raise ConfigError(f"--{flag}", f"{now} is named too late: the sweep in {workdir} began with "
                                               f"{was or 'none'}; leave it out, and give it to cb-vit compare")
        grid = {name: tuple(dict.fromkeys((*old.grid[name], *values))) for name, values in sweep.grid.items()}
        return dataclasses.replace(sweep, settings=old.settings, grid=grid, cells={**old.cells, **sweep.cells},
                                   metric=sweep.metric or old.metric, baseline=sweep.baseline or old.baseline)

    def record(self, workdir: str | os.PathLike, sweep: Sweep) -> Sweep:
        """Write the sweep down, beside what is there already, and return it.

        Raises:
            ConfigError: as for `merged`; or the folder cannot be written.
            CannotWrite: the storage fails.
        """
        workdir_lib.check_writable(workdir)
        path, patience = io.as_path(workdir) / SWEEP, time.monotonic() + WAIT
        while True:
            try:
                with workdir_lib.lock(workdir):  # two processes may add to it at the same time
                    sweep = self.merged(workdir, sweep)
                    with io.writing(path):
                        io.write_atomic(path, json.dumps(dataclasses.asdict(sweep), indent=2) + "\n")
                    return sweep
            except workdir_lib.Locked:
                if time.monotonic() > patience:
                    raise
            time.sleep(0.1)


def _check_metric(metric: str, settings: Settings) -> None:
    prefixes = [f"{name}/" if block.prefix is None else block.prefix for name, block in settings.evals.items()]
    known = [*prefixes, *(f"{EMA}{prefix}" for prefix in prefixes if settings.ema)]
    if not metric.startswith(tuple(known)) or metric in known:
        raise ConfigError("--metric", f"{metric!r} is of no evaluator; names of their metrics begin with "
                                      f"{', '.join(map(repr, known)) or '(config.evals is empty)'}")
    scored = [prefix for prefix, block in zip(prefixes, settings.evals.values(), strict=True)
              if block.type == "classification"]
    prefix = next((prefix for prefix in scored if metric.removeprefix(EMA).startswith(prefix)), None)
    if prefix is not None and (name := metric.removeprefix(EMA).removeprefix(prefix)) not in METRICS:
        raise ConfigError("--metric", f"{metric!r}: this evaluator has no {name!r}{suggest(name, METRICS)} It has "
                                      f"{', '.join(METRICS)}")


def _check_baseline(baseline: str, grid: Grid) -> None:
    for part in split_values(baseline):
        name, _, value = part.partition("=")
        if name not in grid or name == "seed":
            raise ConfigError("--baseline", f"{part!r}: {name} is no name of the grid{suggest(name, grid)} write "
                                            "NAME=VALUE, such as context=none")
        if value not in grid[name]:
            raise ConfigError("--baseline", f"{part!r} is no cell of the grid{suggest(value, grid[name])} {name} is "
                                            f"one of {', '.join(grid[name])}")


def _begun(workdir: str | os.PathLike, sweep: Sweep) -> bool:
    """Whether a run of the sweep has recorded anything, by which a metric could have been chosen."""
    return any(io.read(io.as_path(workdir) / name / "metrics.jsonl") for name in sweep.cells)


def as_json(value: Any) -> Any:
    """A value as it is once it was written as JSON and read again."""
    return json.loads(json.dumps(value))
