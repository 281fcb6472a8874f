"""What a sweep is: a grid of values, an ordinary run for each of its cells, and `sweep.json`, which says so."""
from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cb_vit import io
from cb_vit.config import ConfigError, parse
from cb_vit.texts import parse_json

SWEEP = "sweep.json"
LOG = "sweep.log"  # in the folder of a cell: what its run has said
FORMAT = 1
LONGEST = 40  # characters of a value in the name of a folder
MOST_BYTES = 200  # of the name of a folder; file systems take 255
NAME = re.compile(r"\w[\w.]*")
PAIRS = {"(": ")", "[": "]", "{": "}", "'": "'", '"': '"'}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        grid: value of each name of the grid, as it was typed.
        config: the whole config of the run, as it was checked.
    """

    grid: dict[str, str]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `sweep.json` says.

    Attributes:
        format: version of the file.
        config: what was given as `--config`.
        settings: what the command line says of settings that all cells share: pairs (dotted name, text).
        grid: values of each name of the grid.
        cells: the runs, by the names of their folders.
        metric: name of the metric that was chosen before the first run began; None: none was.
        baseline: the arm that the others are to be compared with, as in "context=none"; None: none was chosen.
    """

    format: int
    config: str
    settings: tuple[tuple[str, str | None], ...]
    grid: dict[str, tuple[str, ...]]
    cells: dict[str, Cell]
    metric: str | None = None
    baseline: str | None = None

    def __post_init__(self):
        if self.format != FORMAT:
            raise ConfigError("format", f"is {self.format}, and this version of cb_vit knows {FORMAT}; update it")
        if odd := next((name for name in self.grid if not NAME.fullmatch(name)), None):  # it becomes part of a path
            raise ConfigError("grid", f"{odd!r} is no name of an argument or a setting")
        for name, cell in self.cells.items():
            if list(cell.grid) != list(self.grid):
                raise ConfigError(f"cells.{name}", f"should have values of {', '.join(self.grid)}")
            if name != cell_name(cell.grid):  # it becomes a path
                raise ConfigError(f"cells.{name}", f"should be called {cell_name(cell.grid)}")


def read_sweep(folder: str | os.PathLike, field: str) -> Sweep | None:
    """What a folder says of the sweep in it; None: it is the folder of none.

    Args:
        folder: the sweep's folder, local or in a bucket.
        field: where it was given, for errors.

    Raises:
        ConfigError: `sweep.json` is nothing that a sweep has written; raised at `field`.
        Failure: the file cannot be read.
    """
    path = io.as_path(folder) / SWEEP
    if (data := io.read(path)) is None:
        return None
    try:
        return parse(Sweep, parse_json(data, encodable=True), SWEEP)
    except ValueError as error:  # a ConfigError is one
        raise ConfigError(field, f"{path} is nothing that a sweep has written ({error}); move it away") from None


def split_values(text: str) -> list[str]:
    """The parts of a list with commas between them; a comma in brackets or in quotes is no end of a part."""
    parts, open_, part = [], [], ""
    for letter in text:
        if open_ and letter == open_[-1]:
            open_.pop()
        elif letter in PAIRS and not (open_ and open_[-1] in "'\""):
            open_.append(PAIRS[letter])
        if letter == "," and not open_:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()]


def cells_of(grid: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """The values of each cell of a grid; the name that comes last changes first."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def cell_name(values: Mapping[str, str]) -> str:
    """The name of a cell's folder, such as "variant=S-16,seed=0": safe in every file system and shell."""
    return ",".join(f"{name}={_safe(value)}" for name, value in values.items())


def _safe(value: str) -> str:
    short = re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII)
    if len(short) <= LONGEST:
        return short
    return f"{short[:LONGEST // 2]}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
