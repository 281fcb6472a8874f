"""The files of a split: how they are found in a folder, in which order they stand, which are held out."""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cb_vit.datasets.contents import fingerprint

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
File = tuple[bytes, int, bytes, int]  # its place in the order, its class, name and size


class Part(NamedTuple):
    """What was found of a split.

    Attributes:
        folder: absolute path of the folder that its files are in.
        in_classes: whether each file is in a folder that is called as its class, there.
        files: the files, in the order that examples have.
        left_out: number of entries that are no examples, by extension or by another reason.
    """

    folder: str
    in_classes: bool
    files: list[File]
    left_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a split in three arrays: a million paths as Python strings would take 150 MB in every worker.

    Attributes:
        folder: absolute path of the folder that the files are in.
        in_classes: whether each file is in a folder that is called as its class, there.
        names: file names below these folders, in file-system encoding, end to end.
        ends: place in `names` where each name ends, int64 [n].
        labels: class of each file, int32 [n].
        empty: numbers of the files that hold nothing, which are examples that cannot be decoded, int64 [m].
        fingerprint: hash of the names and sizes of the files.
        left_out: number of entries of the folders that are no examples, by extension or by another reason.
    """

    folder: str
    in_classes: bool
    names: bytes
    ends: np.ndarray
    labels: np.ndarray
    empty: np.ndarray
    fingerprint: str
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ends)

    def locate(self, index: int, classes: tuple[str, ...]) -> tuple[str, int]:
        """`(path, label)` of a file.

        Args:
            index: number of the file.
            classes: names of the classes.
        """
        start, label = int(self.ends[index - 1]) if index else 0, int(self.labels[index])
        name = os.fsdecode(self.names[start:int(self.ends[index])])
        return os.path.join(self.folder, *([classes[label]] if self.in_classes else []), name), label

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


def listing_of(part: Part, classes: tuple[str, ...]) -> Listing:
    """A part as it is kept.

    Args:
        part: what was found.
        classes: names of the classes.
    """
    files = part.files
    lengths = np.fromiter((len(file) for _, _, file, _ in files), np.int64, len(files))
    labels = np.fromiter((label for _, label, _, _ in files), np.int32, len(files))
    empty = np.flatnonzero(np.fromiter((not size for _, _, _, size in files), bool, len(files)))
    known = (part for _, label, file, size in files for part in (classes[label], file, size))
    return Listing(part.folder, part.in_classes, b"".join(file for _, _, file, _ in files), np.cumsum(lengths), labels,
                   empty, fingerprint(known), part.left_out)


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


def place_of(name: str, file: bytes) -> bytes:
    """Where a file stands in the order: mixed, so that the first part of a split holds all classes, and fixed."""
    return hashlib.blake2b(os.fsencode(name) + b"/" + file, digest_size=8).digest()


def images_in(folder: str) -> tuple[list[tuple[bytes, int]], collections.Counter[str]]:
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
