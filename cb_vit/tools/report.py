"""One page on some runs: comparison, curves, attention, robustness, calibration, mistakes, and how all was made.

    cb-vit report runs/digits
    cb-vit report sweeps/digits --metric=val/prec@1 --baseline=context=none
    cb-vit report runs/a runs/b --out=both.html

RUN is the folder of a run or of a sweep. The page is one HTML file without scripts, whose pictures are in it; it asks
nothing of any network. What it shows is what lies below the runs: density.csv, reliability.csv, metrics.csv, the
pictures of the evaluator `mistakes` and those that `cb-vit predict --weights=RUN --attention=RUN/attention` draws.
"""
from __future__ import annotations

import argparse
import os
import sys

from cb_vit import io
from cb_vit.analysis.page import GENERATOR
from cb_vit.analysis.report import write_page
from cb_vit.config import ConfigError
from cb_vit.tools import cli, compare

PAGE = "report.html"


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("RUN", nargs="+", help="Folders of runs and of sweeps.")
    parser.add_argument("--out", metavar="FILE", help=f"The page. [{PAGE} in the folder, if there is one; a report "
                                                      "that is there is replaced]")
    compare.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace FILE if it is there.")


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    path = _place(args)
    page = write_page(args.RUN, metric=args.metric, baseline=args.baseline, better=args.better, level=args.level,
                      allow_missing=args.allow_missing)
    with io.writing(path):
        io.write_atomic(path, page)
    cli.show(f"wrote  {path}: {len(page.encode()) / 2**20:.1f} MiB")


def _place(args: argparse.Namespace) -> str:
    """The path of the page, which may be written.

    Raises:
        ConfigError: it may not; raised at "--out".
    """
    if args.out is not None:
        if not args.out.lower().endswith((".html", ".htm")):
            raise ConfigError("--out", f"{args.out}: expected a name that ends in .html")
        cli.check_output(args.out, args.overwrite, "--out")
        return args.out
    if len(args.RUN) > 1:
        raise ConfigError("--out", "not given, and there are several folders; for example --out=report.html")
    path = os.path.join(args.RUN[0], PAGE)
    io.check_address(path, "RUN")
    if io.is_local(path) and io.kind(args.RUN[0]) != io.FOLDER:
        raise ConfigError("RUN", f"{args.RUN[0]} is no folder; give that of a run or of a sweep")
    ours = io.is_taken(path) and GENERATOR.encode() in (io.read(path) or b"")[:1000]
    cli.check_output(path, args.overwrite or ours, "--out")
    return path


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
