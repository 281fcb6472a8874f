"""ImageNet-ReaL: the images of ImageNet's val, each with all the labels that people found right (arXiv 2006.07159).

The labels are `real.json` of https://github.com/google-research/reassessed-imagenet: a list of 50 000 lists of classes,
0 … 999, in the order of the names of the images, ILSVRC2012_val_00000001 and so on; some are empty.
"""
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, SupportsIndex

import numpy as np

from cb_vit import retry
from cb_vit.config import ConfigError, Read, parse
from cb_vit.datasets import labels
from cb_vit.datasets.contents import Absent, Contents, DataError, contents_of, fingerprint
from cb_vit.datasets.core import Source, SourceConfig, check_source
from cb_vit.datasets.core import open_source as open_block
from cb_vit.io import as_path, exists, open_regular
from cb_vit.texts import parse_json

NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealConfig(SourceConfig):
    """ImageNet's val with several labels an image: "real".

    Attributes:
        images: block of the images, whose ids are their names, ILSVRC2012_val_00000001 and so on.
        labels_file: path of real.json.
    """

    images: Annotated[SourceConfig, Read(Any, check_source)]
    labels_file: str
    split: str = "all"

    def __post_init__(self):
        super().__post_init__()
        if self.split != "all" or self.labels != "name":
            raise ConfigError("split", "is said by the block images, and labels are ImageNet's; leave them out here")


def check(block: Mapping[str, Any], path: str) -> RealConfig:
    """The block as a checked `RealConfig`."""
    return parse(RealConfig, block, path)


def open_source(config: RealConfig, path: str) -> RealSource:
    """Open the images and read the labels.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        Absent: there are no images, or no labels.
        DataError: the labels are no lists of classes.
    """
    file = as_path(config.labels_file)
    if not exists(file):
        raise Absent(f"{path}.labels_file", f"there is no file {file}; real.json of google-research/"
                                            "reassessed-imagenet is to lie there")
    images = open_block(config.images, f"{path}.images")
    try:
        with open_regular(file) as handle:
            found = parse_json(handle.read())
        sets = [_classes(entry) for entry in found]
    except (*retry.PARSING, OSError) as error:
        raise DataError(f"{file}: should be a list of lists of classes, 0 … 999, one for each image of ImageNet's "
                        f"val: {error}") from None
    return RealSource(images, sets)


def _classes(entry: Any) -> list[int]:
    if not isinstance(entry, list) or not all(type(item) is int and 0 <= item < len(labels.wnids()) for item in entry):
        raise ValueError(f"{entry!r:.60} is no list of classes")
    return entry


class RealSource:
    """A `core.Source` whose "label" is int32 [k], padded with -1.

    Args:
        images: the source of the images.
        sets: the classes of each image of val, in the order of their numbers.
    """

    def __init__(self, images: Source, sets: Sequence[Sequence[int]]):
        self.images, self.class_names = images, labels.wnids()
        self.num_classes = len(self.class_names)
        self._labels = np.full((len(sets), max(1, *map(len, sets))), -1, np.int32)
        for row, classes in zip(self._labels, sets, strict=True):
            row[:len(classes)] = classes
        self.contents = Contents(fingerprint((contents_of(images).fingerprint, self._labels.tobytes())))

    def __len__(self) -> int:
        return len(self.images)

    def all_labels(self, skip_errors: bool) -> np.ndarray:
        """Refused: see `rare_classes.labels_of`, which is of one label an example."""
        raise DataError("ImageNet-ReaL has several labels an image, and one is asked for; use the labels of ImageNet")

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        example = self.images[index]
        named = NUMBER.search(os.path.basename(example["id"]))
        if not named or not 1 <= int(named[1]) <= len(self._labels):
            raise DataError(f"{example['id']}: is not called as an image of ImageNet's val, ILSVRC2012_val_00000001 to "
                            f"{len(self._labels):08d}; its labels in real.json go by that")
        return {**example, "label": self._labels[int(named[1]) - 1]}
