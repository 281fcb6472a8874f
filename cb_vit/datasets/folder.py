"""Images in folders: `ROOT/train/<class>/*.jpg`, `ROOT/val/<class>/*.jpg` and so on, or `ROOT/<class>/*.jpg`.

Every folder directly under ROOT is a split, every folder in a split a class. Classes are numbered in the sorted
order of their names in `train` (in all splits together where there is no `train`), the same for every split; names
that are all whole numbers are sorted as numbers. With `whole` ROOT holds the classes themselves, and there is one
split, "all". Where `holdout` says how much, part of every class is held out as
"val", from a root that holds the classes themselves, or from a `train` beside which no split is called so. A
`labels_file` tells the classes of images that lie in other folders, and ImageNet is also read as Kaggle gives it.
"""
from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.config import ConfigError, parse
from cb_vit.datasets.contents import Contents, DataError, fingerprint, no_folder
from cb_vit.datasets.core import SourceConfig, Spans, select, splits_of
from cb_vit.datasets.ilsvrc import Kaggle, find_splits, has_flat_val
from cb_vit.datasets.label_table import Keys
from cb_vit.datasets.labelled import labelled
from cb_vit.datasets.layouts import EXPECTED, HeldOut, Layout, Whole, class_folders
from cb_vit.datasets.listing import Listing, listing_of
from cb_vit.io import is_local, open_regular


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """Image folders: "folder"; the splits are called as the folders are.

    Attributes:
        root: the folder that holds the splits, or with `holdout` the classes; local or mounted.
        whole: whether the root holds the folders of the classes itself, and all images are one split, "all".
        holdout: share of the images of each class that "val" is to have, where there is no folder to evaluate on; which
            they are is a function of their names and `holdout_seed`. None: every split is a folder.
        holdout_seed: seed of which they are.
        labels_file: path of a file that tells the class of each image, absolute or relative to `root`; "{split}" in its
            name stands for every split; None: the folders tell it.
        image_key: name of the column of that file that holds the images; None: it is known, or the first.
        label_key: name of the column that holds the classes; None: it is known, or the second.
        split_key: name of the column that holds the splits; None: it is known, or the third, or there is none.
    """

    root: str
    whole: bool = False
    holdout: float | None = None
    holdout_seed: int = 0
    labels_file: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    split_key: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for key in ("image_key", "label_key", "split_key"):
            if getattr(self, key) and not self.labels_file:
                raise ConfigError(key, "names a column of labels_file, and there is none; set labels_file")
        if self.whole and (self.holdout is not None or self.labels_file):
            raise ConfigError("whole", "makes one split of the folders of classes; leave out holdout and labels_file")
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
        raise no_folder(root, f"{path}.root", EXPECTED)
    try:
        return _open(root, config, path)
    except OSError as error:
        raise DataError(f"{error.filename or root}: {error.strerror or error}") from None


def _open(root: str, config: FolderConfig, path: str) -> FolderSource:
    layout = _layout(root, config, path)
    try:
        names = splits_of(config.split, layout.splits, f"{path}.split") if layout.splits else ()
    except ConfigError as error:
        raise layout.missing(error) from None
    classes, parts = layout.find(names)
    listings = {name: listing_of(part, classes) for name, part in parts.items()}
    spans = select(config.split, {name: [len(listing)] for name, listing in listings.items()}, f"{path}.split")
    rule = {"share": layout.share, "seed": layout.seed} if isinstance(layout, HeldOut) else None
    return FolderSource(classes, listings, spans, rule)


def _layout(root: str, config: FolderConfig, path: str) -> Layout:
    hold_out = config.holdout, config.holdout_seed
    if config.labels_file:
        keys = Keys(config.image_key, config.label_key, config.split_key)
        return labelled(root, config.labels_file, keys, *hold_out, path)
    if config.whole:
        return Whole(root, path)
    root = find_splits(root)
    return Kaggle(root, path) if has_flat_val(root) else class_folders(root, *hold_out, path)


class FolderSource:
    """A `core.Source` over image files, which come as they are stored.

    Args:
        class_names: names of the classes, in the order of their numbers.
        listings: the files of each split, by the split's name.
        spans: the examples to take, of each split.
        held_out: share and seed of what was held out of the folder; None: nothing was.
    """

    def __init__(self, class_names: tuple[str, ...], listings: dict[str, Listing], spans: Spans,
                 held_out: Mapping[str, float] | None):
        self.class_names, self.listings, self.spans = class_names, listings, spans
        self.num_classes = len(class_names)
        self.contents = Contents(
            fingerprint((name, listing.fingerprint) for name, listing in listings.items()),
            sum(listings[name].count(start, stop, self.num_classes) for name, start, stop in spans.spans),
            sum((collections.Counter(listing.left_out) for listing in listings.values()), collections.Counter()),
            sum(len(listing.empty) for listing in listings.values()), held_out)

    def __len__(self) -> int:
        return len(self.spans)

    def all_labels(self, skip_errors: bool) -> np.ndarray:
        """See `rare_classes.labels_of`; no image is read for it."""
        return np.concatenate([self.listings[name].labels[start:stop] for name, start, stop in self.spans.spans]
                              ).astype(np.int64)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        span, number = self.spans.locate(index)
        file, label = self.listings[self.spans.spans[span].name].locate(number, self.class_names)
        try:
            with open_regular(file) as handle:
                return {"image": handle.read(), "label": label, "id": file}
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from error
