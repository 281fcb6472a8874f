"""What `cb-vit eval` leaves behind: its metrics as a table, and those of a suite in the columns of timm's."""
from __future__ import annotations

import csv
import dataclasses
import io as std_io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cb_vit import io
from cb_vit.config import ConfigError
from cb_vit.evaluators.mistakes import table
from cb_vit.pp.builder import Preprocess
from cb_vit.pp.ops_image import CentralCrop, Resize, ResizeSmall
from cb_vit.records import EMA

METRICS = ("evaluator", "type", "metric", "value")
# The columns of `results-imagenet.csv` of https://github.com/huggingface/pytorch-image-models/tree/main/results.
TIMM = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
CLASSIFICATION = "classification"
CORRUPTED = {"error": "mean error", "mce": "mCE", "relative_mce": "relative mCE"}  # of evaluators of corruptions


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluator found.

    Attributes:
        name: name of its block.
        evaluator: the evaluator.
        values: its metrics, by their full names.
    """

    name: str
    evaluator: Any
    values: Mapping[str, float]

    @property
    def kind(self) -> str:
        """Its type."""
        return self.evaluator.config.type

    def percent(self, metric: str, average: bool) -> float | None:
        """A share as a percentage, of the parameters or of their average; None: it was not measured."""
        value = self.values.get(f"{EMA * average}{self.evaluator.config.prefix}{metric}")
        return None if value is None else 100 * value


def metrics(results: Sequence[Result]) -> str:
    """`metrics.csv`: one row a metric."""
    return table(METRICS, ((result.name, result.kind, metric, repr(float(value))) for result in results
                           for metric, value in result.values.items()))


def summary(results: Sequence[Result], absent: Mapping[str, str]) -> Iterator[str]:
    """One table of accuracies, in lines to print.

    Args:
        results: what evaluators found.
        absent: why others were left out, by the names of their blocks.
    """
    rows = [(f"{EMA * average}{result.name}", *(_cell(result.percent(name, average)) for name in ("prec@1", "prec@5")),
             f"{result.evaluator.counted:,}") for result in results if result.kind == CLASSIFICATION
            for average in (False, True) if result.percent("prec@1", average) is not None]
    if not rows and not absent:
        return
    names = [*(row[0] for row in rows), *absent, *(result.name for result in results)]
    width = max(map(len, ["data set", *names])) + 2
    yield f"{'data set':<{width}}{'top-1 %':>9}{'top-5 %':>9}{'images':>10}"
    for name, top1, top5, images in rows:
        yield f"{name:<{width}}{top1:>9}{top5:>9}{images:>10}"
    for result in results:
        shares = [f"{label} {share:.2f}" for metric, label in CORRUPTED.items()
                  if (share := result.percent(metric, False)) is not None]
        if shares and result.kind != CLASSIFICATION:
            yield f"{result.name:<{width}}in %: {', '.join(shares)}"
    for name, why in absent.items():
        yield f"{name:<{width}}left out: {why}"


def _cell(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def model_name(path: str) -> str:
    """What a model is called in a table: the hub's name, or the path of a file or run as it was given."""
    found = re.fullmatch(r"hf://[^/]+/(.+)", path)
    return found[1] if found else path.rstrip("/")


def timm_rows(result: Result, name: str, params: int) -> Iterator[tuple[str, ...]]:
    """The rows of a result in timm's columns, those of an average under a name of their own.

    Args:
        result: what an evaluator of accuracy found.
        name: what the model is called.
        params: number of its parameters.
    """
    shown = _image(result.evaluator.config.pp_fn, result.evaluator.image_size)
    for average in (False, True):
        if (top1 := result.percent("prec@1", average)) is None:
            continue
        top5 = result.percent("prec@5", average)
        errors = [text for share in (top1, top5)
                  for text in (("", "") if share is None else (f"{share:.3f}", f"{100 - share:.3f}"))]
        yield (f"{name} ({EMA.rstrip('/')})" if average else name, shown[0], *errors, f"{params / 1e6:.2f}", *shown[1:])


def _image(preprocess: Preprocess, size: tuple[int, int]) -> tuple[str, str, str]:
    """Size of the images, the share of the resized image that is kept, and the filter, as timm writes them."""
    ops = [op for _, op in preprocess.host_ops]
    resize = next((op for op in ops if isinstance(op, Resize | ResizeSmall)), None)
    crop = next((op for op in ops if isinstance(op, CentralCrop)), None)
    share = 1.0
    if resize is not None and crop is not None:
        whole = resize.smaller_size if isinstance(resize, ResizeSmall) else resize.size
        share = _crop_share(_shorter(crop.size), _shorter(whole))
    return str(max(size)), f"{share:.3f}", resize.method if resize else ""


def _crop_share(crop: int, whole: int) -> float:
    """The roundest share of which timm's rule, floor(crop / share), makes the size before the crop."""
    shares = (round(crop / whole, digits) for digits in (1, 2, 3))
    return next((share for share in shares if share and math.floor(crop / share) == whole), crop / whole)


def _shorter(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else min(size)


def read_rows(path: Any) -> list[list[str]]:
    """The rows of a table of results that may be there already; none where it is not.

    Raises:
        ConfigError: at "--output": the file is another table.
    """
    content = io.read(path)
    try:
        rows = list(csv.reader(std_io.StringIO((content or b"").decode())))
    except (UnicodeDecodeError, csv.Error) as error:
        rows = [[f"({error})"]]
    if rows and (tuple(rows[0]) != TIMM or any(len(row) != len(TIMM) for row in rows)):
        raise ConfigError("--output", f"{path} is another table: it begins with {','.join(rows[0])[:80]!r}, and not "
                                      f"all its rows are {','.join(TIMM)}; move it away")
    return rows[1:]


def file_name(block: str) -> str:
    """What the table of a block is called, as timm's are."""
    return f"results-{block}.csv"


def with_rows(path: Any, rows: Sequence[Sequence[str]]) -> str:
    """The table at `path` with these rows: in the place of those of the same models, or at its end."""
    new = {row[0]: list(row) for row in rows}
    kept = [new.pop(row[0], row) for row in read_rows(path)]
    return table(TIMM, [*kept, *new.values()])
