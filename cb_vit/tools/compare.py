"""Runs of several seeds against each other: means, paired differences with intervals, and a test.

    cb-vit compare sweeps/digits --metric=val/prec@1 --baseline=context=none
    cb-vit compare runs/none_* runs/cb_* --metric=val/prec@1 --baseline=context=none --csv=table.csv --latex=table.tex

DIR is the folder of a run or of a sweep. Runs that differ in their seeds alone are one arm, and arms are compared by
pairs of the same seed, at the last step of each run. One metric is tested: the one that the sweep has named before it
began, or that --metric names; docs/comparing.md says what the numbers mean.
"""
from __future__ import annotations

import argparse
import sys

from cb_vit import io
from cb_vit.analysis import comparison_tables as tables
from cb_vit.analysis.comparison import compare
from cb_vit.config import ConfigError
from cb_vit.tools import cli


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("DIR", nargs="+", help="Folders of runs and of sweeps.")
    add_arguments(parser)
    parser.add_argument("--csv", metavar="FILE", help="Write the tables there as well, as CSV.")
    parser.add_argument("--latex", metavar="FILE", help="Write the table there as well, for LaTeX with booktabs.")
    parser.add_argument("--overwrite", action="store_true", help="Replace these files if they are there.")


def add_arguments(parser: cli.Parser) -> None:
    """What says how runs are compared."""
    parser.add_argument("--metric", metavar="NAME", help="The metric that is tested, chosen before the runs were seen. "
                                                         "[the one that the sweep names]")
    parser.add_argument("--baseline", metavar="NAME=VALUE", help="The arm that the others are compared with. [the one "
                                                                 "that the sweep names]")
    parser.add_argument("--better", type=cli.one_of("higher", "lower"), metavar="higher|lower",
                        help="What is better. [as the metric's name says]")
    parser.add_argument("--level", type=cli.share, default=0.95, help="Level of the intervals. [0.95]")
    parser.add_argument("--allow_missing", action="store_true",
                        help="Leave out what is not finished, not there for all seeds, or no number.")


def main(args: argparse.Namespace) -> None:
    """Compare, print and write."""
    outputs = {flag: path for flag, path in (("--csv", args.csv), ("--latex", args.latex)) if path is not None}
    if len(set(map(io.as_path, outputs.values()))) < len(outputs):
        raise ConfigError("--latex", f"{args.latex} is the file of --csv; choose another name")
    for flag, path in outputs.items():
        cli.check_output(path, args.overwrite, flag)
    found = compare(*args.DIR, metric=args.metric, baseline=args.baseline, better=args.better, level=args.level,
                    allow_missing=args.allow_missing)
    cli.show(*tables.lines(found))
    for flag, path in outputs.items():
        with io.writing(path):
            io.write_atomic(path, (tables.as_csv if flag == "--csv" else tables.as_latex)(found))
        cli.show(f"wrote  {path}")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
