"""The lines of `metrics.jsonl`, what they say of each metric, and what becomes of them when a run begins again."""
from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cb_vit import io
from cb_vit.config import ConfigError
from cb_vit.texts import parse_json

logger = logging.getLogger(__name__)
EMA = "ema/"  # stands before the names of metrics of the averaged parameters
BEGIN = b'{"step": '  # of every record
MOST_STEPS = 2**53  # the whole numbers that a float64, and so a picture's axis, tells apart
Line = tuple[bytes, dict[str, Any] | None]
Series = tuple[np.ndarray, np.ndarray]  # steps in their order, values


class History:
    """The values of each metric by step; where a step has several of one metric, the last counts.

    Args:
        values: values by metric and step.
    """

    def __init__(self, values: Mapping[str, Mapping[int, float]] | None = None):
        self._values = {name: dict(at) for name, at in (values or {}).items()}

    @classmethod
    def of(cls, lines: Iterable[Line]) -> History:
        """What the records among these lines say."""
        history = cls()
        for _, record in lines:
            if record:
                history.add(record["step"], {name: value for name, value in record.items() if name != "step"})
        return history

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take in what was recorded at `step`."""
        for name, value in scalars.items():
            self._values.setdefault(name, {})[int(step)] = value

    def at(self, step: int) -> set[str]:
        """Names of the metrics that have a value at `step`."""
        return {name for name, values in self._values.items() if step in values}

    def highest(self, name: str) -> float | None:
        """The highest finite value of a metric; None: it has none."""
        return max(filter(math.isfinite, self._values.get(name, {}).values()), default=None)

    def copy(self) -> History:
        """The same values, on which another thread may work."""
        return History(self._values)

    def series(self) -> dict[str, Series]:
        """Steps and values of each metric."""
        return {name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)], float))
                for name, values in self._values.items()}


def read(workdir: str | os.PathLike, field: str) -> History:
    """What a run has recorded so far, as its `metrics.jsonl` says; the run may be going on.

    Args:
        workdir: the run's folder, local or in a bucket.
        field: where the folder was given, for errors.

    Raises:
        ConfigError: there is no record of a run there; raised at `field`.
        Failure: the file cannot be read.
    """
    path = io.as_path(workdir) / "metrics.jsonl"
    content = io.read(path)
    if content is None:
        raise ConfigError(field, f"{path} does not exist; give the workdir of a run")
    lines = _parse(content)
    if not any(record for _, record in lines):
        found = f" ({lines[0][0].rstrip()!r:.60})" if lines else ""
        raise ConfigError(field, f"{path} holds no record of a run{found}; give the workdir of one that has logged a "
                                 "step")
    _warn_of_others(lines, path)
    return History.of(lines)


def reopen(path: os.PathLike, resume_step: int | None) -> list[Line]:
    """Bring the file to where a run goes on from.

    A torn last line and all records of later steps are dropped: the run makes them up. Lines that are no records are
    somebody's, and stay as they are.

    Args:
        path: the file `metrics.jsonl`; it need not be there.
        resume_step: the step the run goes on from. None: it begins anew, and what an earlier one has recorded is kept
            beside the file, as `metrics.1.jsonl` and so on.

    Returns:
        The lines that are there now, each with its record (null as NaN), or with None where it is no record.

    Raises:
        ConfigError: not one line is a record, so the file is somebody's.
        Failure: the file cannot be read.
    """
    old = io.read(path) or b""
    lines = _parse(old)
    if lines and not any(record for _, record in lines):
        raise ConfigError("workdir", f"{path} holds no record of a run ({lines[0][0].rstrip()!r:.60}); move it away")
    _warn_of_others(lines, path)
    if resume_step is None:
        # A checkpoint may have been lost, its records need not be.
        if any(record for _, record in lines):
            _keep_aside(path)
            old = b""
        lines = []
    kept = [(line, record) for line, record in lines if record is None or record["step"] <= resume_step]
    if dropped := len(lines) - len(kept):
        logger.warning("%s: dropped %d records of steps after %d", path, dropped, resume_step)
    content = b"".join(line for line, _ in kept)
    # Whole or not at all: a crash in the middle of shortening it would lose records.
    if content != old:
        io.write_atomic(path, content)
    return kept


def _keep_aside(path: os.PathLike) -> None:
    names = (f"{path.stem}.{i}{path.suffix}" for i in itertools.count(1))
    aside = next(other for other in map(path.parent.__truediv__, names) if not io.exists(other))
    logger.warning("no checkpoint to go on from, so this run begins anew; what an earlier one has recorded in %s is "
                   "kept as %s", path, aside)
    path.rename(aside)


def _parse(content: bytes) -> list[Line]:
    *lines, last = content.split(b"\n")
    if last and not _torn(last):
        lines.append(last)
    return [(line + b"\n", _parse_record(line)) for line in lines]


def _warn_of_others(lines: Iterable[Line], path: os.PathLike) -> None:
    for number, (line, record) in enumerate(lines, 1):
        if record is None:
            logger.warning("%s:%d is not a record, and is left as it is: %.80r", path, number, line)


def _torn(line: bytes) -> bool:
    """Whether an unfinished line may be what a kill, or the power, has left of a record."""
    # Some file systems leave zeros where data had not reached the disk before the power went.
    line = line.rstrip(b"\0")
    try:
        parse_json(line)
    except ValueError:
        return line.startswith(BEGIN) or BEGIN.startswith(line)
    return False


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
        # `type`, since True is an int to `isinstance`.
        if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= MOST_STEPS:
            return None
        if not all(v is None or isinstance(v, int | float) and math.isfinite(v) for v in record.values()):
            return None
    except (ValueError, OverflowError):
        return None
    return {name: math.nan if value is None else value for name, value in record.items()}
