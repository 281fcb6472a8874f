"""The curves of several runs over each other, as a picture and as a table.

    cb-vit curves runs/digits runs/digits_plain
    cb-vit curves runs/seed* --output=seeds.png --metrics='val/.*|lr'

RUN is the workdir of a run, local or gs://, which may be going on. Beside the picture lies what it shows as CSV, of the
same name: run, step, metric, value.
"""
from __future__ import annotations

import argparse
import csv
import io as text_io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cb_vit import io, records
from cb_vit.config import ConfigError
from cb_vit.monitor.overlay import DRAWN, draw_overlay
from cb_vit.records import Series
from cb_vit.texts import first_few, printable, short_names
from cb_vit.tools import cli

MOST = 24  # panels in a picture
Run = Mapping[str, Series]


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("RUN", nargs="+", help="Workdirs of the runs.")
    parser.add_argument("--output", default="curves.png", help="The picture, a PNG. [curves.png]")
    parser.add_argument("--metrics", default=DRAWN, metavar="REGEX",
                        help="Which metrics are drawn, by their whole names. [training loss, losses and top-1 "
                             "accuracies of evaluators, images a second]")
    parser.add_argument("--overwrite", action="store_true", help="Replace the picture and the CSV if they are there.")


def main(args: argparse.Namespace) -> None:
    """Draw, write, and say how the runs stand."""
    outputs = _outputs(args.output, args.overwrite)
    runs = read_runs(args.RUN)
    metrics = pick_metrics(runs, args.metrics)
    contents = draw_overlay(runs, metrics), as_csv(runs, metrics).encode()
    for path, content in zip(outputs, contents, strict=True):
        with io.writing(path):
            io.write_atomic(path, content)
    cli.show(*table(runs), f"wrote  {', '.join(outputs)}: {first_few(metrics)}")


def read_runs(paths: Sequence[str]) -> dict[str, Run]:
    """What the runs have recorded, by short names that tell them apart.

    Raises:
        ConfigError: a path is no run's, or two are the same; raised at "RUN".
        Failure: a file cannot be read.
    """
    places: dict[str, str] = {}
    for path in paths:
        io.check_address(path, "RUN")
        place = os.path.realpath(os.path.expanduser(path)) if io.is_local(path) else path.rstrip("/")
        if place in places:
            raise ConfigError("RUN", f"{path} and {places[place]} are the same run; give it once")
        places[place] = path
    names = short_names(list(places))
    return {name: records.read(path, "RUN").series() for name, path in zip(names, places.values(), strict=True)}


def pick_metrics(runs: Mapping[str, Run], pattern: str) -> list[str]:
    """Names of the metrics that are drawn, in the order in which the runs record them.

    Raises:
        ConfigError: the pattern is none, or matches nothing, or too much; raised at "--metrics".
    """
    known = list(dict.fromkeys(name for run in runs.values() for name in run))
    try:
        picked = [name for name in known if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError("--metrics", f"{pattern!r} is no regular expression: {error}") from None
    if not picked:
        raise ConfigError("--metrics", f"{pattern!r} is the whole name of no metric; there are {first_few(known, 30)}")
    if len(picked) > MOST:
        raise ConfigError("--metrics", f"{pattern!r} matches {len(picked)} metrics, and a picture has room for {MOST}; "
                                       "choose fewer")
    return picked


def as_csv(runs: Mapping[str, Run], metrics: Sequence[str]) -> str:
    """What is drawn, a line for each value; one that is not finite is empty."""
    file = text_io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "step", "metric", "value"])
    for name, run in runs.items():
        for metric in metrics:
            for step, value in zip(*(column.tolist() for column in run.get(metric, ())), strict=True):
                writer.writerow([printable(name), step, printable(metric), value if np.isfinite(value) else ""])
    return file.getvalue()


def table(runs: Mapping[str, Run]) -> Iterator[str]:
    """A line for each accuracy of each run: run and steps, then its best value, at which step, and its last one."""
    rows = [("run", "steps", "accuracy", "best", "at step", "last")]
    for name, run in runs.items():
        steps = max((steps[-1] for steps, _ in run.values()), default=0)
        accuracies = [metric for metric in run if re.fullmatch(r"(.*/)?prec@\d+", metric)]
        found = [(metric, *_best_and_last(*run[metric])) for metric in accuracies] or [("none yet", "", "", "")]
        rows += [(*((name, f"{steps:,}") if number == 0 else ("", "")), *row) for number, row in enumerate(found)]
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, steps, metric, *numbers = (
            f"{cell:<{width}}" if at in (0, 2) else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join([name, steps, metric, *numbers]).rstrip()


def _best_and_last(steps: np.ndarray, values: np.ndarray) -> tuple[str, str, str]:
    if not np.isfinite(values).any():
        return "nan", "", "nan"
    best = np.nanargmax(values)
    return f"{values[best]:.4f}", f"{steps[best]:,}", f"{values[-1]:.4f}"


def _outputs(picture: str, overwrite: bool) -> tuple[str, str]:
    """The paths of the picture and of the CSV, both of which may be written.

    Raises:
        ConfigError: one may not; raised at "--output".
    """
    stem, extension = os.path.splitext(picture)
    if extension.lower() != ".png":
        raise ConfigError("--output", f"{picture}: expected a name that ends in .png")
    outputs = picture, f"{stem}.csv"
    for path in outputs:
        cli.check_output(path, overwrite)
    return outputs


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
