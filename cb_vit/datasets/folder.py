"""Images in folders: `ROOT/train/<class>/*.jpg`, `ROOT/val/<class>/*.jpg` and so on, or `ROOT/<class>/*.jpg`.

Every folder directly under ROOT is a split, every folder in a split a class. Classes are numbered in the sorted
order of their names in `train` (in all splits together where there is no `train`), the same for every split; names
that are all whole numbers are sorted as numbers. Where `holdout` says how much, part of every class is held out as
"val", from a root that holds the classes themselves, or from a `train` that stands alone.
"""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.config import ConfigError, parse
from cb_vit.datasets.contents import Contents, DataError, describe_left_out, fingerprint
from cb_vit.datasets.core import SourceConfig, Spans, select, splits_of
from cb_vit.datasets.labels import are_numbers
from cb_vit.io import is_local, open_regular
from cb_vit.texts import first_few

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
LAYOUT = "expected ROOT/train/<class>/*.jpg (also png, webp, bmp, tif, gif) and ROOT/val/<class>/…, one folder a class"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # as people call them
THREADS = 16
TRAIN, HELD_OUT = "train", "val"
File = tuple[bytes, int, bytes, int]  # its place in the order, its class, name and size


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """Image folders: "folder"; the splits are called as the folders are.

    Attributes:
        root: the folder that holds the splits, or with `holdout` the classes; local or mounted.
        holdout: share of the images of each class that "val" is to have, where there is no folder to evaluate on; which
            they are is a function of their names and `holdout_seed`. None: every split is a folder.
        holdout_seed: seed of which they are.
    """

    root: str
    holdout: float | None = None
    holdout_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ConfigError("holdout", f"is a share of the images, above 0 and below 1, got {self.holdout}")
        if not is_local(self.root):
            raise ConfigError("root", f"image folders are read from a local or mounted disk, got {self.root!r}")


def check(block: Mapping[str, Any], path: str) -> FolderConfig:
    """The block as a checked `FolderConfig`."""
    return parse(FolderConfig, block, path)


def open_source(config: FolderConfig, path: str) -> FolderSource:
    """List the folders that the split needs.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        ConfigError: under `path`: there is no such folder, it has another layout, or a split or class is unknown.
        DataError: a folder cannot be read.
    """
    root = os.path.abspath(os.path.expanduser(config.root))
    if not os.path.isdir(root):
        raise ConfigError(f"{path}.root", f"{root} is no folder; {LAYOUT}")
    try:
        return _open(root, config, path)
    except OSError as error:
        raise DataError(f"{error.filename or root}: {error.strerror or error}") from None


def _open(root: str, config: FolderConfig, path: str) -> FolderSource:
    split, folders = config.split, _folders(root)
    held_out = _to_hold_out(root, folders, path) if config.holdout else None
    splits = [TRAIN, HELD_OUT] if held_out is not None else folders
    try:
        names = splits_of(split, splits, f"{path}.split") if splits else ()
    except ConfigError as error:
        if cause := _other_layout(root, splits):
            raise ConfigError(f"{path}.root", f"{cause}: {error.message}; {LAYOUT}") from None
        raise ConfigError(error.path, f"{error.message} (the folders in {root}; {LAYOUT})") from None
    if held_out is None:
        classes = _classes(root, splits, names, path)
        places = {name: os.path.join(root, name) for name in names}
        listings = {name: _listing(*_scan(place, classes, path), classes) for name, place in places.items()}
    else:
        classes = _classes(os.path.dirname(held_out), [os.path.basename(held_out)], (), path)
        files, left_out = _scan(held_out, classes, path)
        places = dict.fromkeys(names, held_out)
        parts = dict(zip(splits, hold_out(files, config.holdout, config.holdout_seed), strict=True))
        listings = {name: _listing(parts[name], left_out if name == names[0] else {}, classes) for name in names}
    spans = select(split, {name: [len(listing)] for name, listing in listings.items()}, f"{path}.split")
    rule = held_out and {"share": config.holdout, "seed": config.holdout_seed}
    return FolderSource(classes, places, listings, spans, rule)


def _to_hold_out(root: str, folders: list[str], path: str) -> str | None:
    """The folder whose classes part is held out of; None: there is a split to evaluate on.

    Raises:
        ConfigError: splits and classes lie side by side; raised at `path`.
    """
    splits = [name for name in folders if name in SPLITS and not _holds_images(os.path.join(root, name))]
    classes = [name for name in folders if _holds_images(os.path.join(root, name))]
    if splits and classes:
        raise ConfigError(f"{path}.root", f"{root} holds splits ({first_few(splits, 3)}) and folders of images "
                                          f"({first_few(classes, 3)}); {LAYOUT}")
    if classes:
        return root
    return os.path.join(root, TRAIN) if folders == [TRAIN] else None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a split in three arrays: a million paths as Python strings would take 150 MB in every worker.

    Attributes:
        names: file names without folders, in file-system encoding, end to end.
        ends: place in `names` where each name ends, int64 [n].
        labels: class of each file, int32 [n].
        empty: numbers of the files that hold nothing, which are examples that cannot be decoded, int64 [m].
        fingerprint: hash of the names and sizes of the files.
        left_out: number of entries of the folders that are no examples, by extension or by another reason.
    """

    names: bytes
    ends: np.ndarray
    labels: np.ndarray
    empty: np.ndarray
    fingerprint: str
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """`(file name, label)`."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start:int(self.ends[index])]), int(self.labels[index])

    def count(self, start: int, stop: int, classes: int) -> np.ndarray:
        """How many of a range of files are of each class and hold something, int64 [classes].

        Args:
            start: number of the first file.
            stop: number of the first file after the last.
            classes: number of classes.
        """
        empty = self.empty[(self.empty >= start) & (self.empty < stop)]
        return np.bincount(self.labels[start:stop], minlength=classes) - np.bincount(
            self.labels[empty], minlength=classes)


class FolderSource:
    """A `core.Source` over image files, which come as they are stored.

    Args:
        class_names: names of the class folders, in the order of their numbers.
        places: absolute path of the folder that holds the classes, of each split by its name.
        listings: the files of each split, by the split's name.
        spans: the examples to take, of each split.
        held_out: share and seed of what was held out of the folder; None: nothing was.
    """

    def __init__(self, class_names: tuple[str, ...], places: dict[str, str], listings: dict[str, Listing], spans: Spans,
                 held_out: Mapping[str, float] | None):
        self.class_names, self.places, self.listings, self.spans = class_names, places, listings, spans
        self.num_classes = len(class_names)
        self.contents = Contents(
            fingerprint((name, listing.fingerprint) for name, listing in listings.items()),
            sum(listings[name].count(start, stop, self.num_classes) for name, start, stop in spans.spans),
            sum((collections.Counter(listing.left_out) for listing in listings.values()), collections.Counter()),
            sum(len(listing.empty) for listing in listings.values()), held_out)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        span, number = self.spans.locate(index)
        split = self.spans.spans[span].name
        name, label = self.listings[split][number]
        file = os.path.join(self.places[split], self.class_names[label], name)
        try:
            with open_regular(file) as handle:
                return {"image": handle.read(), "label": label, "id": file}
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from error


def _classes(root: str, splits: list[str], names: tuple[str, ...], path: str) -> tuple[str, ...]:
    found = {split: _folders(os.path.join(root, split)) for split in splits}
    # By `train` alone: a class that only a test split has would make the head wider than what is learned.
    given_by = ["train"] if "train" in found else splits
    classes = {name for split in given_by for name in found[split]}
    classes = tuple(sorted(classes, key=int if are_numbers(classes) else None))
    if not classes:
        where = os.path.join(root, "train") if "train" in found else root
        beside = ", where images lie without one" if _holds_images(where) else ""
        raise ConfigError(f"{path}.root", f"no class folders in {where}{beside}; {LAYOUT}")
    for split in names:
        if unknown := [name for name in found[split] if name not in classes]:
            raise ConfigError(f"{path}.root", f"class {unknown[0]!r} of {os.path.join(root, split)} is not in "
                                              f"{os.path.join(root, 'train')}, which gives the classes")
    return classes


def _scan(folder: str, classes: tuple[str, ...], path: str) -> tuple[list[File], collections.Counter[str]]:
    """All images of the class folders, in the order that examples have, and what else is there."""
    with ThreadPoolExecutor(THREADS) as pool:  # on network disks the time goes into waiting
        found = list(pool.map(lambda name: _files(os.path.join(folder, name)), classes))
    files = sorted((_place(name, file), label, file, size)
                   for label, (name, (of_class, _)) in enumerate(zip(classes, found, strict=True))
                   for file, size in of_class)
    left_out = sum((left for _, left in found), _beside(folder))
    if not files:
        raise ConfigError(f"{path}.root", f"no images in the class folders of {folder}; {LAYOUT}" +
                          describe_left_out(left_out))
    return files, left_out


def hold_out(files: list[File], share: float, seed: int) -> tuple[list[File], list[File]]:
    """Files to train on, and files held out; both in the order in which they were given.

    Of the n files of a class round(share · n) are held out, at least one and not all of them (of a single file, none):
    those that come first by a hash of the seed and of their place, and so of their names alone. A file that comes or
    goes moves hardly any other.

    Args:
        files: the files of all classes.
        share: share of each class to hold out, above 0 and below 1.
        seed: seed of which they are.
    """
    by_class = collections.defaultdict(list)
    for place, label, *_ in files:
        by_class[label].append((hashlib.blake2b(b"%d/" % seed + place, digest_size=8).digest(), place))
    held = set()
    for places in by_class.values():
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        held.update(place for _, place in sorted(places)[:count])
    return [file for file in files if file[0] not in held], [file for file in files if file[0] in held]


def _listing(files: list[File], left_out: Mapping[str, int], classes: tuple[str, ...]) -> Listing:
    lengths = np.fromiter((len(file) for _, _, file, _ in files), np.int64, len(files))
    labels = np.fromiter((label for _, label, _, _ in files), np.int32, len(files))
    empty = np.flatnonzero(np.fromiter((not size for _, _, _, size in files), bool, len(files)))
    known = (part for _, label, file, size in files for part in (classes[label], file, size))
    return Listing(b"".join(file for _, _, file, _ in files), np.cumsum(lengths), labels, empty, fingerprint(known),
                   left_out)


def _place(name: str, file: bytes) -> bytes:
    """Where a file stands in the order: mixed, so that the first part of a split holds all classes, and fixed."""
    return hashlib.blake2b(os.fsencode(name) + b"/" + file, digest_size=8).digest()


def _files(folder: str) -> tuple[list[tuple[bytes, int]], collections.Counter[str]]:
    """Name and size of each image in a folder, and what else is there; nothing where a split lacks the class."""
    images, left_out = [], collections.Counter()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if reason := _unfit(entry):
                    left_out[reason] += 1
                else:
                    # As bytes: a name need not be valid UTF-8.
                    images.append((os.fsencode(entry.name), entry.stat().st_size))
    except FileNotFoundError:
        pass
    return images, left_out


def _unfit(entry: os.DirEntry) -> str | None:
    """Why an entry of a class folder is no image; None: it is one, by its name."""
    if entry.name[0] == ".":
        return "hidden"
    if entry.is_dir():
        return "deeper folders"
    if not entry.name.lower().endswith(EXTENSIONS):
        return os.path.splitext(entry.name)[1].lower() or "without extension"
    if not entry.is_file():
        return "broken links" if entry.is_symlink() else "no files"
    return None


def _beside(folder: str) -> collections.Counter[str]:
    """The files of a split that are in no class folder."""
    with os.scandir(folder) as entries:
        count = sum(not entry.is_dir() and entry.name[0] != "." for entry in entries)
    return collections.Counter({"outside of class folders": count} if count else {})


def _other_layout(root: str, folders: list[str]) -> str | None:
    """What people give in place of the folder of the splits, told from what it holds; None: nothing known."""
    parent, name = os.path.split(root)
    if any(_holds_images(os.path.join(root, folder)) for folder in folders):
        shown = first_few(folders, 3)
        if name.lower() in SPLITS:
            return f"{root} is a split itself, with the classes {shown}; give root={parent}"
        return (f"{root} holds the classes themselves ({shown}), and no splits; with holdout=0.1 the splits are train "
                "and val, a tenth of each class")
    deeper = [folder for folder in folders if SPLITS.intersection(_folders(os.path.join(root, folder)))]
    return f"the splits are one folder deeper; give root={os.path.join(root, deeper[0])}" if deeper else None


def _holds_images(folder: str) -> bool:
    with os.scandir(folder) as entries:
        # The first thousand entries tell; a folder may hold millions.
        return any(entry.name.lower().endswith(EXTENSIONS) for entry in itertools.islice(entries, 1000))


def _folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
