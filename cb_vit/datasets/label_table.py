"""Files that say which class an image is of: a line for each, of its file, its class and perhaps its split.

Columns are apart by tabs, commas or semicolons (as CSV quotes them), or else by spaces, where the last word is the
class. The first line may name them; without names they are file, class and split, in this order.
"""
from __future__ import annotations

import codecs
import csv
import io
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from cb_vit.config import ConfigError, bare_name
from cb_vit.datasets.contents import DataError
from cb_vit.datasets.listing import EXTENSIONS
from cb_vit.io import open_regular

# How columns are called, without case and signs; an id counts where there is no file.
FILES = ({f"{what}{form}" for what in ("file", "img", "image") for form in ("name", "names", "path", "paths", "file")}
         | {"file", "files", "path", "paths"})
IDS = {"id", "imageid", "imgid", "image", "images", "img", "name"}
CLASSES = {"label", "labels", "labelname", "class", "classes", "classname", "category", "categories", "categoryname",
           "target", "targets", "wnid", "predictionstring"}
SPLITS = {"split", "splits", "set", "subset", "dataset", "partition"}
WNID = re.compile(r"n\d{8}")
ILSVRC_VAL = 50_000  # images, ILSVRC2012_val_00000001 and so on
A_LINE = "a line is a file and its class"


class Row(NamedTuple):
    """What a line says; `split` is None where no column does."""

    line: int
    file: str
    label: str
    split: str | None


class Keys(NamedTuple):
    """Names of the columns; None: those that are known."""

    image_key: str | None = None
    label_key: str | None = None
    split_key: str | None = None


class Columns(NamedTuple):
    """Places of the columns.

    Attributes:
        file: that of the file.
        label: that of the class.
        split: that of the split; None: there is none.
        count: number of all columns.
        prediction: whether the class is the first word of Kaggle's PredictionString.
    """

    file: int
    label: int
    split: int | None
    count: int
    prediction: bool = False


def read_rows(path: str, keys: Keys, block: str) -> list[Row]:
    """The rows of a file.

    Args:
        path: path of the file.
        keys: names of the columns to use.
        block: where the block of the data stands, for errors.

    Raises:
        ConfigError: under `block`: there are no such columns, or it is not clear which are meant.
        DataError: a line cannot be right; names it.
        OSError: the file cannot be read.
    """
    lines = list(_cells(_text(path), path))
    if not lines:
        raise DataError(f"{path}: is empty; {A_LINE}")
    if columns := _named_columns(lines[0][1], keys, path, block):
        lines = lines[1:]
    else:
        lines = list(_of_ilsvrc(lines, path)) if len(lines[0][1]) == 1 else lines
        columns = _unnamed_columns(*lines[0], path)
    rows = [_row(line, cells, columns, path) for line, cells in lines]
    if not rows:
        raise DataError(f"{path}: has no line after the names of its columns; {A_LINE}")
    _check_unique(rows, path)
    return rows


def _text(path: str) -> str:
    with open_regular(path) as file:
        data = file.read()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
        where = text.find("\0")
    except UnicodeDecodeError as error:
        text, where = data.decode("latin-1"), error.start
    if where >= 0:
        line = text.count("\n", 0, where) + 1
        raise DataError(f"{path}: line {line}: is no text in UTF-8; save the file as text in UTF-8")
    return text


def _cells(text: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of each line that is not empty."""
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    delimiter = next((mark for mark in "\t,;" if mark in first.strip()), None)
    if delimiter is None:
        for number, line in enumerate(io.StringIO(text, newline=None), 1):
            if line.strip():
                yield number, line.strip().rsplit(None, 1)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; a quote that opens must close") from None


def _named_columns(first: Sequence[str], keys: Keys, path: str, block: str) -> Columns | None:
    """The columns that the first line names; None: it is a row like others."""
    names = [bare_name(cell) for cell in first]
    of_files = FILES if FILES.intersection(names) else IDS
    if not any(keys) and (not of_files.intersection(names) or any(cell.lower().endswith(EXTENSIONS) for cell in first)):
        return None

    def find(setting: str, known: set[str]) -> int | None:
        """The place of the column that a setting asks for, or of the one that is known."""
        key, there = getattr(keys, setting), f"{path} has the columns {', '.join(first)}"
        places = [i for i, name in enumerate(names) if (first[i] == key if key else name in known)]
        if len(places) > 1 or (key and not places):
            fault = f"{len(places)} columns may be meant" if places else f"no column {key!r}"
            raise ConfigError(f"{block}.{setting}", f"{fault}; {there}; set {setting} to one of them")
        return places[0] if places else None

    file, label, split = find("image_key", of_files), find("label_key", CLASSES), find("split_key", SPLITS)
    others = [i for i in range(len(names)) if i not in (file, split) and names[i]]
    if label is None and len(others) == 1 and file is not None:
        label = others[0]  # nothing else is left to be the class
    for setting, place, what in (("image_key", file, "the file"), ("label_key", label, "the class")):
        if place is None:
            raise ConfigError(f"{block}.{setting}", f"which column is {what}? {path} has {', '.join(first)}; set "
                                                    f"{setting} to one of them")
    return Columns(file, label, split, len(first), names[label] == "predictionstring")


def _unnamed_columns(line: int, cells: Sequence[str], path: str) -> Columns:
    if len(cells) > 3:
        raise DataError(f"{path}: line {line}: {len(cells)} columns without names that are known; name them in a first "
                        "line such as file,label,split, or set image_key and label_key")
    return Columns(0, 1, 2 if len(cells) == 3 else None, len(cells))


def _row(line: int, cells: Sequence[str], columns: Columns, path: str) -> Row:
    if len(cells) != columns.count:
        raise DataError(f"{path}: line {line}: has {len(cells)} columns, and the first line {columns.count}")
    file, label = cells[columns.file], cells[columns.label]
    split = None if columns.split is None else cells[columns.split]
    if not file or not label or split == "":
        what = "file" if not file else "class" if not label else "split"
        raise DataError(f"{path}: line {line}: no {what}; {A_LINE}")
    if columns.prediction:
        label = label.split()[0]
        if not WNID.fullmatch(label):
            raise DataError(f"{path}: line {line}: PredictionString begins with {label!r}, where ImageNet has a class "
                            "such as n01440764")
    if label[0] == "-" and label[1:].isdecimal():
        raise DataError(f"{path}: line {line}: {label} is no class; take out the lines of images without a label")
    return Row(line, _inside(file, line, path), label, split)


def _inside(file: str, line: int, path: str) -> str:
    """The path of a file, which stays under the root."""
    if file.startswith("/") or ".." in file.split("/") or "\\" in file:
        raise DataError(f"{path}: line {line}: {file!r} is no path below the root; write it relative to the root, with "
                        "/ and without ..")
    return posixpath.normpath(file)


def _of_ilsvrc(lines: Sequence[tuple[int, list[str]]], path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a list of classes alone, which is ImageNet's where it has a WordNet number for each image of its val."""
    if len(lines) != ILSVRC_VAL or not all(WNID.fullmatch(cells[0]) for _, cells in lines):
        numbers = all(cells[0].isdecimal() for _, cells in lines)
        devkit = ("; numbers alone, as in ILSVRC2012_validation_ground_truth.txt, count ImageNet's classes in an order "
                  "of their own: give LOC_val_solution.csv, or WordNet's numbers of all 50,000 images")
        raise DataError(f"{path}: line {lines[0][0]}: has one column, {lines[0][1][0]!r}; {A_LINE}{devkit * numbers}")
    return ((line, [f"ILSVRC2012_val_{number:08d}", cells[0]]) for number, (line, cells) in enumerate(lines, 1))


def _check_unique(rows: Iterable[Row], path: str) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        if (first := lines.setdefault(row.file, row.line)) != row.line:
            raise DataError(f"{path}: line {row.line}: {row.file!r} stands in line {first} already; take one out")
