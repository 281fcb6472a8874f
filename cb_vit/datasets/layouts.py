"""What a root of images holds: class folders in splits, or class folders alone; and what people give in its place."""
from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from cb_vit.config import ConfigError
from cb_vit.datasets.contents import describe_left_out
from cb_vit.datasets.labels import in_order
from cb_vit.datasets.listing import EXTENSIONS, Part, hold_out, images_in, place_of
from cb_vit.texts import first_few

EXPECTED = ("expected ROOT/train/<class>/*.jpg (also png, webp, bmp, tif, gif) and ROOT/val/<class>/…, one folder a "
            "class; or with holdout=0.1 ROOT/<class>/…")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # as people call them
THREADS = 16
TRAIN, HELD_OUT, ALL = "train", "val", "all"
TO_EVALUATE = {"val", "valid", "validation"}
Parts = tuple[tuple[str, ...], dict[str, Part]]


@runtime_checkable
class Layout(Protocol):
    """How images, splits and classes lie under a root.

    Attributes:
        splits: names of the splits that there are.
    """

    splits: Sequence[str]

    def find(self, names: Sequence[str]) -> Parts:
        """The names of the classes, and what there is of some of the splits.

        Args:
            names: the splits that are needed.

        Raises:
            ConfigError: the root is of another layout, or a class is unknown.
            OSError: a folder cannot be read.
        """

    def missing(self, error: ConfigError) -> ConfigError:
        """What is said of a split that there is not; `error` is what is said whatever the layout."""


class ClassFolders:
    """A folder for each class in a folder for each split.

    Args:
        root: the folder that holds the splits.
        splits: their names.
        path: where the block of the data stands, for errors.
    """

    def __init__(self, root: str, splits: Sequence[str], path: str):
        self.root, self.splits, self.path = root, splits, path

    def find(self, names: Sequence[str]) -> Parts:
        """See `Layout`."""
        classes = _classes(self.root, self.splits, names, self.path)
        return classes, {name: _scan(os.path.join(self.root, name), classes, self.path) for name in names}

    def missing(self, error: ConfigError) -> ConfigError:
        """See `Layout`."""
        if cause := _other_layout(self.root, self.splits):
            return ConfigError(f"{self.path}.root", f"{cause}: {error.message}; {EXPECTED}")
        return ConfigError(error.path, f"{error.message} (the folders in {self.root}; {EXPECTED})")


class Whole(ClassFolders):
    """A folder for each class, and one split of them all, `ALL`.

    Args:
        root: the folder that holds those of the classes.
        path: where the block of the data stands, for errors.
    """

    def __init__(self, root: str, path: str):
        parent, self.name = os.path.split(root)
        super().__init__(parent, [self.name], path)
        self.splits = [ALL]

    def find(self, names: Sequence[str]) -> Parts:
        """See `Layout`."""
        classes, parts = ClassFolders(self.root, [self.name], self.path).find([self.name])
        return classes, {ALL: parts[self.name]}

    def missing(self, error: ConfigError) -> ConfigError:
        """See `Layout`."""
        return ConfigError(error.path, f"{error.message} (with whole=True there is this one alone)")


class HeldOut:
    """Another layout, of which a split is taken for "train", and part of it held out as "val"; its others stay.

    Args:
        layout: the other layout.
        split: its split.
        share: share of each class to hold out, above 0 and below 1.
        seed: seed of what is held out.
    """

    def __init__(self, layout: Layout, split: str, share: float, seed: int):
        self.layout, self.split, self.share, self.seed = layout, split, share, seed
        self.splits = [TRAIN, HELD_OUT, *(name for name in layout.splits if name != split)]

    def find(self, names: Sequence[str]) -> Parts:
        """See `Layout`."""
        made = [name for name in names if name in (TRAIN, HELD_OUT)]
        classes, parts = self.layout.find([self.split] * bool(made) + [name for name in names if name not in made])
        if made:
            part = parts.pop(self.split)
            files = dict(zip((TRAIN, HELD_OUT), hold_out(part.files, self.share, self.seed), strict=True))
            parts |= {name: part._replace(files=files[name], left_out=part.left_out if name == made[0] else {})
                      for name in made}
        return classes, {name: parts[name] for name in names}

    def missing(self, error: ConfigError) -> ConfigError:
        """See `Layout`."""
        return ConfigError(error.path, f"{error.message} (with those that holdout makes)")


def class_folders(root: str, share: float | None, seed: int, path: str) -> Layout:
    """The layout of class folders under a root.

    Args:
        root: the folder.
        share: share of each class to hold out where there is no split to evaluate on; None: every split is a folder.
        seed: seed of what is held out.
        path: where the block of the data stands, for errors.

    Raises:
        ConfigError: splits and classes lie side by side; raised at `path`.
    """
    folders = folders_in(root)
    held_out = _to_hold_out(root, folders, path) if share else None
    if held_out is None:
        return ClassFolders(root, folders, path)
    parent, name = os.path.split(held_out)
    return HeldOut(ClassFolders(parent, [name] if parent != root else folders, path), name, share, seed)


def _to_hold_out(root: str, folders: list[str], path: str) -> str | None:
    """The folder whose classes part is held out of; None: there is a split to evaluate on.

    Raises:
        ConfigError: splits and classes lie side by side; raised at `path`.
    """
    splits = [name for name in folders if name in SPLITS and not holds_images(os.path.join(root, name))]
    classes = [name for name in folders if holds_images(os.path.join(root, name))]
    if splits and classes:
        raise ConfigError(f"{path}.root", f"{root} holds splits ({first_few(splits, 3)}) and folders of images "
                                          f"({first_few(classes, 3)}); {EXPECTED}")
    if classes:
        return root
    return os.path.join(root, TRAIN) if TRAIN in folders and not TO_EVALUATE.intersection(folders) else None


def _classes(root: str, splits: Sequence[str], names: Sequence[str], path: str) -> tuple[str, ...]:
    found = {split: folders_in(os.path.join(root, split)) for split in splits}
    # By `train` alone: a class that only a test split has would make the head wider than what is learned.
    given_by = ["train"] if "train" in found else splits
    classes = in_order({name for split in given_by for name in found[split]})
    if not classes:
        where = os.path.join(root, "train") if "train" in found else root
        beside = ", where images lie without one; a labels_file can tell their classes" if holds_images(where) else ""
        raise ConfigError(f"{path}.root", f"no class folders in {where}{beside}; {EXPECTED}")
    for split in names:
        if unknown := [name for name in found[split] if name not in classes]:
            raise ConfigError(f"{path}.root", f"class {unknown[0]!r} of {os.path.join(root, split)} is not in "
                                              f"{os.path.join(root, 'train')}, which gives the classes")
    return classes


def _scan(folder: str, classes: tuple[str, ...], path: str) -> Part:
    """All images of the class folders, in the order that examples have, and what else is there."""
    with ThreadPoolExecutor(THREADS) as pool:  # on network disks the time goes into waiting
        found = list(pool.map(lambda name: images_in(os.path.join(folder, name)), classes))
    files = sorted((place_of(name, file), label, file, size)
                   for label, (name, (of_class, _)) in enumerate(zip(classes, found, strict=True))
                   for file, size in of_class)
    left_out = sum((left for _, left in found), _beside(folder))
    if not files:
        raise ConfigError(f"{path}.root", f"no images in the class folders of {folder}; {EXPECTED}" +
                          describe_left_out(left_out))
    return Part(folder, True, files, left_out)


def _beside(folder: str) -> collections.Counter[str]:
    """The files of a split that are in no class folder."""
    with os.scandir(folder) as entries:
        count = sum(not entry.is_dir() and entry.name[0] != "." for entry in entries)
    return collections.Counter({"outside of class folders": count} if count else {})


def _other_layout(root: str, folders: Sequence[str]) -> str | None:
    """What people give in place of the folder of the splits, told from what it holds; None: nothing known."""
    parent, name = os.path.split(root)
    if any(holds_images(os.path.join(root, folder)) for folder in folders):
        shown = first_few(folders, 3)
        if name.lower() in SPLITS:
            return f"{root} is a split itself, with the classes {shown}; give root={parent}"
        return (f"{root} holds the classes themselves ({shown}), and no splits; with holdout=0.1 the splits are train "
                "and val, a tenth of each class")
    deeper = [folder for folder in folders if SPLITS.intersection(folders_in(os.path.join(root, folder)))]
    return f"the splits are one folder deeper; give root={os.path.join(root, deeper[0])}" if deeper else None


def holds_images(folder: str) -> bool:
    """Whether images lie in a folder itself."""
    with os.scandir(folder) as entries:
        # The first thousand entries tell; a folder may hold millions.
        return any(entry.name.lower().endswith(EXTENSIONS) for entry in itertools.islice(entries, 1000))


def folders_in(folder: str) -> list[str]:
    """The folders in a folder, sorted; without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
