"""The files below a run's folder that a report shows, whoever wrote them: found by name, and read with care."""
from __future__ import annotations

import csv
import dataclasses
import io as text_io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from cb_vit import io
from cb_vit.analysis.arms import Arm
from cb_vit.analysis.runs import Found, Run
from cb_vit.config import Failure
from cb_vit.records import EMA
from cb_vit.workdir import CONTENTS

DEEPEST = 4  # folders below that of a run
LARGEST = 32 * 2**20  # bytes of a table
LINE = 4096  # bytes of the first line of a log, at most
SCORES = ("evaluator", "type", "metric", "value")  # columns of `metrics.csv`


def below(folder: epath.Path, name: str, depth: int = DEEPEST) -> Iterator[epath.Path]:
    """Files below a folder that match a regular expression, by their order; not in what a run keeps for itself.

    Nor in links, which may lead out of the run, and not what is of the average of its parameters.

    Args:
        folder: a run's folder, or one in it.
        name: regular expression of the whole name of a file.
        depth: number of folders below that are looked into.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Failure(f"{folder} cannot be read: {error.strerror}") from None
    for path in entries:
        if path.is_dir():
            kept = path.name in CONTENTS or path.name == EMA.rstrip("/") or path.name.startswith(".")
            if depth and not kept and not os.path.islink(path):
                yield from below(path, name, depth - 1)
        elif re.fullmatch(name, path.name):
            yield path


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        found: the runs and sweeps.
        arms: the runs by what they differ in but their seeds; each alone where they cannot be told apart so.
        missing: what is not there, in words; sections add to it.
    """

    found: Found
    arms: Sequence[Arm]
    missing: list[str]

    def name(self, arm: Arm) -> str:
        """What an arm is called on the page."""
        return arm.name if arm.factors else next(iter(arm.runs.values())).name if len(arm.runs) == 1 else arm.name


def first_line(path: epath.Path) -> str:
    """The first line of a file; empty where there is none."""
    if not io.exists(path):
        return ""
    try:
        with io.open_regular(path) as file:
            return file.read(LINE).decode(errors="replace").partition("\n")[0]
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: epath.Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is no text, or too long.
        Failure: it cannot be read.
    """
    content = io.read(path) or b""
    if len(content) > LARGEST:
        raise ValueError(f"is larger than {LARGEST >> 20} MiB")
    return content.decode()


def read_table(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV, by the names of its columns.

    Raises:
        ValueError: it has other columns, or rows of another length.
    """
    try:
        rows = list(csv.reader(text_io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"is no CSV ({error})") from None
    if not rows or tuple(rows[0]) != tuple(columns):
        raise ValueError(f"has the columns {','.join(rows[0]) if rows else '(none)'!r:.80}, not {','.join(columns)}")
    return [dict(zip(columns, row, strict=True)) for row in rows[1:]]


def scores_of(run: Run, kind: str, problems: list[str]) -> dict[str, float]:
    """The metrics of a run's evaluators of one kind, by their names.

    Those at its last step as it has recorded them, and those in `metrics.csv` files below, which count before.

    Args:
        run: the run.
        kind: kind of the evaluators, as in `config.evals.NAME.type`.
        problems: list to which it is added what could not be read, in words.
    """
    prefixes = tuple(prefix for type_, prefix in run.evaluators.values() if type_ == kind)
    found = {name: run.final(name) for name in run.measured() if prefixes and name.startswith(prefixes)}
    for path in below(run.folder, r"metrics\.csv"):
        try:
            rows = read_table(read_text(path), SCORES)
            found |= {row["metric"]: float(row["value"] or "nan") for row in rows if row["type"] == kind}
        except ValueError as error:
            problems.append(f"{path} is left out: it {error}")
    return {name: value for name, value in found.items() if not name.startswith(EMA) and math.isfinite(value)}


def mean_scores(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the runs, where all have it."""
    runs = [run for run in runs if run]
    names = [name for name in (runs[0] if runs else ()) if all(name in run for run in runs)]
    return {name: sum(run[name] for run in runs) / len(runs) for name in names}


def pick(scores: Mapping[str, float], pattern: str) -> dict[str, float]:
    """The metrics whose names end as a regular expression says, by what its first group holds."""
    return {match[1]: value for name, value in scores.items() if (match := re.search(f"(?:^|/){pattern}$", name))}
