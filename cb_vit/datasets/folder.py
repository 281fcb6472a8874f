"""Images in folders: `ROOT/train/<class>/*.jpg`, `ROOT/val/<class>/*.jpg` and so on.

Every folder directly under ROOT is a split, every folder in a split a class. Classes are numbered in the sorted
order of their names in `train` (in all splits together where there is no `train`), the same for every split.
"""
from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.config import ConfigError, parse
from cb_vit.datasets.core import DataError, Spans, check_split, select, splits_of
from cb_vit.io import is_local

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LAYOUT = "expected ROOT/train/<class>/*.jpg (also jpeg, png, webp, bmp) and ROOT/val/<class>/…, one folder a class"
THREADS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Image folders.

    Attributes:
        name: "folder".
        root: the folder that holds the splits; local or mounted.
        split: "train", "train[:90%]", "val" …, by the names of the folders.
    """

    name: str
    root: str
    split: str

    def __post_init__(self):
        if not is_local(self.root):
            raise ConfigError("root", f"image folders are read from a local or mounted disk, got {self.root!r}")
        check_split(self.split)


def check(block: Mapping[str, Any], path: str) -> FolderConfig:
    """The block as a checked `FolderConfig`."""
    return parse(FolderConfig, block, path)


def open_source(config: FolderConfig, path: str) -> FolderSource:
    """List the folders that the split needs.

    Raises:
        ConfigError: under `path`: no such folder, not the expected layout, unknown split, unknown class.
    """
    root = os.path.abspath(os.path.expanduser(config.root))
    if not os.path.isdir(root):
        raise ConfigError(f"{path}.root", f"{root} is no folder; {LAYOUT}")
    splits = _folders(root)
    try:
        names = splits_of(config.split, splits, f"{path}.split") if splits else ()
    except ConfigError as error:
        raise ConfigError(error.path, f"{error.message} (the folders in {root}; {LAYOUT})") from None
    classes = _classes(root, splits, names, path)
    listings = {name: _list_split(root, name, classes, path) for name in names}
    spans = select(config.split, {name: [len(listing)] for name, listing in listings.items()}, f"{path}.split")
    return FolderSource(root, classes, listings, spans)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a split in three arrays: a million paths as Python strings would take 150 MB in every worker.

    Attributes:
        names: file names without folders, in file-system encoding, end to end.
        ends: int64 [n], where each name ends in `names`.
        labels: int32 [n], the class of each.
    """

    names: bytes
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """`(file name, label)`."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start:int(self.ends[index])]), int(self.labels[index])


class FolderSource:
    """A `core.Source` over image files, which come as they are stored.

    Args:
        root: absolute path.
        class_names: names of the class folders.
        listings: for each split its files.
        spans: which examples of which split.
    """

    def __init__(self, root: str, class_names: tuple[str, ...], listings: dict[str, Listing], spans: Spans):
        self.root, self.class_names, self.listings, self.spans = root, class_names, listings, spans
        self.num_classes = len(class_names)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        span, number = self.spans.locate(index)
        split = self.spans.spans[span].name
        name, label = self.listings[split][number]
        file = os.path.join(self.root, split, self.class_names[label], name)
        try:
            with open(file, "rb") as handle:
                return {"image": handle.read(), "label": label, "id": file}
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from error


def _classes(root: str, splits: list[str], names: tuple[str, ...], path: str) -> tuple[str, ...]:
    found = {split: _folders(os.path.join(root, split)) for split in splits}
    given_by = ["train"] if "train" in found else splits
    classes = tuple(sorted({name for split in given_by for name in found[split]}))
    if not classes:
        where = os.path.join(root, "train") if "train" in found else root
        raise ConfigError(f"{path}.root", f"no class folders in {where}; {LAYOUT}")
    for split in names:
        if unknown := [name for name in found[split] if name not in classes]:
            raise ConfigError(f"{path}.root", f"class {unknown[0]!r} of {os.path.join(root, split)} is not in "
                                              f"{os.path.join(root, 'train')}, which gives the classes")
    return classes


def _list_split(root: str, split: str, classes: tuple[str, ...], path: str) -> Listing:
    folder = os.path.join(root, split)
    with ThreadPoolExecutor(THREADS) as pool:  # on network disks the time goes into waiting
        listed = list(pool.map(lambda name: _files(os.path.join(folder, name)), classes))
    files = [(_place(name, file), label, file)
             for label, (name, of_class) in enumerate(zip(classes, listed, strict=True)) for file in of_class]
    if not files:
        raise ConfigError(f"{path}.root", f"no images in the class folders of {folder}; {LAYOUT}")
    files.sort()
    sizes = np.fromiter((len(file) for _, _, file in files), np.int64, len(files))
    labels = np.fromiter((label for _, label, _ in files), np.int32, len(files))
    return Listing(b"".join(file for _, _, file in files), np.cumsum(sizes), labels)


def _place(name: str, file: bytes) -> bytes:
    """Where a file stands in the order: mixed, so that the first part of a split holds all classes, and fixed."""
    return hashlib.blake2b(os.fsencode(name) + b"/" + file, digest_size=8).digest()


def _files(folder: str) -> list[bytes]:
    try:
        with os.scandir(folder) as entries:
            return [os.fsencode(entry.name) for entry in entries
                    if entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != "." and entry.is_file()]
    except FileNotFoundError:  # this split lacks the class
        return []


def _folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
