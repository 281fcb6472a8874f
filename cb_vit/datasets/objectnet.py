"""ObjectNet (Barbu et al., 2019): its images that are of classes of ImageNet, each of one or of several.

The folders are called by the set's own classes, of which 113 are in ImageNet; `objectnet.txt` has the published map. As
in the set's own evaluation (https://github.com/abarbu/objectnet-template-pytorch) the red border of two pixels is cut
off, and a prediction among all 1 000 classes is right if it is one that the image's folder may be called.
"""
from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import io
from collections.abc import Mapping
from typing import Annotated, Any, SupportsIndex

import numpy as np
from PIL import Image

from cb_vit import retry
from cb_vit.config import ConfigError, Read, parse
from cb_vit.datasets import labels
from cb_vit.datasets.contents import Contents, DataError, contents_of, fingerprint
from cb_vit.datasets.core import Source, SourceConfig, check_source
from cb_vit.datasets.core import open_source as open_block
from cb_vit.datasets.rare_classes import labels_of

BORDER = 2  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectNetConfig(SourceConfig):
    """The images of ObjectNet that are of classes of ImageNet: "objectnet".

    Attributes:
        images: block of the images, classed by the folders of the set.
    """

    images: Annotated[SourceConfig, Read(Any, check_source)]
    split: str = "all"

    def __post_init__(self):
        super().__post_init__()
        if self.split != "all" or self.labels != "name":
            raise ConfigError("split", "is said by the block images, and labels are ImageNet's; leave them out here")


def check(block: Mapping[str, Any], path: str) -> ObjectNetConfig:
    """The block as a checked `ObjectNetConfig`."""
    return parse(ObjectNetConfig, block, path)


def open_source(config: ObjectNetConfig, path: str) -> ObjectNetSource:
    """Open the images.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        Absent: there are none.
        ConfigError: not one is in a folder that ObjectNet has for a class of ImageNet.
    """
    source = ObjectNetSource(open_block(config.images, f"{path}.images"))
    if not len(source):
        raise ConfigError(f"{path}.images", "not one of its folders is called as ObjectNet's of a class of ImageNet, "
                                            "alarm_clock, backpack, …; give the folder objectnet-1.0/images")
    return source


@functools.cache
def table() -> dict[str, tuple[str, ...]]:
    """The WordNet ids that each of ObjectNet's folders may be called; those of no class of ImageNet are left out."""
    text = importlib.resources.files(__package__).joinpath("objectnet.txt").read_text(encoding="utf-8")
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {folder: tuple(wnids) for folder, *wnids in rows}


class ObjectNetSource:
    """A `core.Source` whose "label" is int32 [k], padded with -1, and whose images have lost their border.

    Args:
        images: the source of the images, whose classes are the set's folders.
    """

    def __init__(self, images: Source):
        self.images, self.class_names = images, labels.wnids()
        self.num_classes = len(self.class_names)
        place = {wnid: number for number, wnid in enumerate(self.class_names)}
        found = [[place[wnid] for wnid in table().get(name, ())] for name in images.class_names or ()]
        self._labels = np.full((len(found), max(map(len, table().values()))), -1, np.int32)
        for row, classes in zip(self._labels, found, strict=True):
            row[:len(classes)] = classes
        self._chosen = np.flatnonzero(self._labels[labels_of(images, False), 0] >= 0) if found else np.zeros(0, int)
        self.contents = Contents(fingerprint((contents_of(images).fingerprint, self._labels.tobytes())))

    def __len__(self) -> int:
        return len(self._chosen)

    def all_labels(self, skip_errors: bool) -> np.ndarray:
        """Refused: see `rare_classes.labels_of`, which is of one label an example."""
        raise DataError("ObjectNet has several labels an image, and one is asked for")

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        example = self.images[int(self._chosen[index])]
        try:
            with Image.open(io.BytesIO(example["image"]), formats=("PNG", "JPEG")) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's readers raise whatever they stumble over in damaged bytes
            raise DataError(f"{example['id']}: cannot be decoded: {retry.reason(error)}") from error
        inner = pixels[BORDER:-BORDER, BORDER:-BORDER]
        if not inner.size:
            raise DataError(f"{example['id']}: is all border, {pixels.shape[0]}×{pixels.shape[1]} pixels")
        return {**example, "image": inner, "label": self._labels[example["label"]]}
