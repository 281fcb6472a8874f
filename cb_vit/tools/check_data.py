"""Look at every image of a config's data once: broken, tiny, there twice, odd.

    cb-vit check-data --config=folder:root=flowers
    cb-vit check-data --config=folder:root=flowers --output=found.csv
    cb-vit check-data --workdir=runs/flowers

Training data and that of all evaluators are decoded as training would, and compared by their pixels: what is trained on
and evaluated on too is named. Nothing is changed. The exit status is 1 where something is broken, under two classes, or
in two sets of data.
"""
from __future__ import annotations

import argparse
import csv
import io as std_io
import sys
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from cb_vit import datasets, io
from cb_vit.analysis.survey import KINDS, Finding, Survey, Surveyor
from cb_vit.config import Failure
from cb_vit.datasets.contents import describe
from cb_vit.monitor.timing import speed_text
from cb_vit.pp.ops_image import Decode
from cb_vit.prediction import ahead
from cb_vit.settings import Settings, check
from cb_vit.tools import cli

GRAVE = {"broken": "broken", "leaked": "in two sets", "contradiction": "under two classes"}
SHOWN = 10  # findings of a kind, without --all


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_config("Not given: the config of the run.")
    parser.add_argument("--workdir", help="Folder of a run, whose config is taken.")
    parser.add_argument("--all", action="store_true", help=f"Every finding, not the first {SHOWN} of a kind.")
    parser.add_argument("--output", metavar="FILE.csv", help="Write all findings: kind, data, class, example, what.")
    parser.add_argument("--overwrite", action="store_true", help="Replace that file if it is there.")
    parser.add_argument("--smallest", type=cli.at_least_one, metavar="PIXELS",
                        help="Shorter side below which an image is tiny; otherwise half of what the model sees.")


def main(args: argparse.Namespace) -> None:
    """Print what is found."""
    if args.output:
        cli.check_output(args.output, args.overwrite)
    settings = check(cli.config_of(args, args.workdir))
    begin, survey = time.monotonic(), Survey()
    surveyors = list(_surveyors(settings, args.smallest))
    for surveyor in surveyors:
        cli.show(*describe(surveyor.data, surveyor.source))
    with tqdm(total=sum(len(surveyor.source) for surveyor in surveyors), unit="img", disable=None, leave=False) as bar:
        for surveyor in surveyors:
            threads = settings.input.num_threads
            for look in ahead(surveyor, range(len(surveyor.source)), threads, 4 * threads):
                survey.add(look)
                bar.update()
        count = bar.total
    cli.show("", *survey.summary(), *_report(survey.findings, args.all))
    if args.output:
        with io.writing(io.as_path(args.output)):
            io.write_atomic(io.as_path(args.output), as_csv(survey.findings))
        cli.show(f"written to {args.output}: {len(survey.findings):,} findings")
    cli.show(f"{count:,} images, {speed_text(count / (time.monotonic() - begin))}")
    kinds = {finding.kind for finding in survey.findings}
    if grave := [words for kind, words in GRAVE.items() if kind in kinds]:
        raise Failure(f"the data has images that are {' and '.join(grave)}; mend them, or leave them out")


def _surveyors(settings: Settings, smallest: int | None) -> Iterator[Surveyor]:
    """One for each set of data, however many evaluators share it."""
    loaders = {"config.input.data": (settings.input.data, settings.input.pp)}
    loaders |= {f"config.evals.{name}.{field}": (data, block.pp_fn) for name, block in settings.evals.items()
                for field, data in {"data": block.data, **block.further}.items()}
    seen = []
    optional = tuple(f"config.evals.{name}." for name, block in settings.evals.items() if block.optional)
    for name, (data, pp) in loaders.items():
        if data not in seen:
            seen.append(data)
            try:
                source = datasets.open_source(data, name)
            except datasets.Absent as error:
                if not name.startswith(optional):
                    raise
                cli.show(f"left out, as it is optional: {error}")
                continue
            exif = any(isinstance(op, Decode) and op.exif for _, op in pp.host_ops)
            least = smallest or (min(pp.image_size) // 2 if pp.image_size else 1)
            yield Surveyor(name, source, exif, least)


def _report(findings: Sequence[Finding], whole: bool) -> Iterator[str]:
    for kind, meaning in KINDS.items():
        if found := [finding for finding in findings if finding.kind == kind]:
            shown = found if whole else found[:SHOWN]
            yield from ("", f"{kind}: {len(found):,}, {meaning}")
            yield from (f"  {finding.where} ({finding.label}): {finding.what}" for finding in shown)
            if len(shown) < len(found):
                yield f"  and {len(found) - len(shown):,} more; --all or --output=FILE.csv has them"
    if not findings:
        yield "nothing is broken, tiny, there twice or odd"


def as_csv(findings: Sequence[Finding]) -> bytes:
    """The findings as a table."""
    text = std_io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["kind", "data", "class", "example", "what"])
    table.writerows([f.kind, f.data, f.label, f.where, f.what] for f in findings)
    return text.getvalue().encode("utf-8", "backslashreplace")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
