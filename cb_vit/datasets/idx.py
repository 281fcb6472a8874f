"""MNIST, Fashion-MNIST and their kin, in the four files they are published as.

The format is that of http://yann.lecun.com/exdb/mnist: four bytes (0, 0, 8 for unsigned bytes, number of axes), each
axis as a big-endian 32-bit number, then the bytes themselves; gzipped or not.
"""
from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.config import parse
from cb_vit.datasets.contents import Absent, Contents, DataError, fingerprint, no_folder
from cb_vit.datasets.core import SourceConfig, Spans, select, splits_of
from cb_vit.io import open_regular

SPLITS = {"train": "train", "test": "t10k"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdxConfig(SourceConfig):
    """Files such as `train-images-idx3-ubyte.gz`: "idx", of the splits "train" and "test".

    Attributes:
        root: the folder with the four files.
    """

    root: str


def check(block: Mapping[str, Any], path: str) -> IdxConfig:
    """The block as a checked `IdxConfig`."""
    return parse(IdxConfig, block, path)


def open_source(config: IdxConfig, path: str) -> IdxSource:
    """Read the files of the split.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        ConfigError: under `path`: there is no such folder, file or split.
        DataError: a file is not of the format, or not whole.
    """
    root = os.path.abspath(os.path.expanduser(config.root))
    if not os.path.isdir(root):
        raise no_folder(root, f"{path}.root", "it should hold train-images-idx3-ubyte.gz and its kin")
    images, labels = {}, {}
    for split in splits_of(config.split, SPLITS, f"{path}.split"):
        images[split] = _read(root, f"{SPLITS[split]}-images-idx3-ubyte", 3, f"{path}.root")
        labels[split] = _read(root, f"{SPLITS[split]}-labels-idx1-ubyte", 1, f"{path}.root")
        if len(images[split]) != len(labels[split]):
            raise DataError(f"{root}: {len(images[split])} images and {len(labels[split])} labels in {split}")
    spans = select(config.split, {split: [len(array)] for split, array in labels.items()}, f"{path}.split")
    return IdxSource(root, images, labels, spans)


class IdxSource:
    """A `core.Source` of grey images, uint8 [h, w, 3] with three equal channels; held in memory.

    Args:
        root: the folder of the files, for messages.
        images: the images of each split, uint8 [n h w].
        labels: the labels of each split, uint8 [n].
        spans: the examples to take, of each split.
    """

    class_names = None

    def __init__(self, root: str, images: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], spans: Spans):
        self.root, self.images, self.labels, self.spans = root, images, labels, spans
        self.num_classes = 1 + max(int(array.max()) for array in labels.values())
        counts = sum(np.bincount(labels[name][start:stop], minlength=self.num_classes)
                     for name, start, stop in spans.spans)
        # The bytes themselves: they are in memory, and the same set comes gzipped and plain.
        parts = (part for name in images for part in (name, images[name].tobytes(), labels[name].tobytes()))
        self.contents = Contents(fingerprint(parts), counts)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        span, number = self.spans.locate(index)
        split = self.spans.spans[span].name
        image = np.repeat(self.images[split][number, :, :, None], 3, axis=2)
        return {"image": image, "label": int(self.labels[split][number]), "id": f"{self.root} {split}#{number}"}


def _read(root: str, name: str, axes: int, path: str) -> np.ndarray:
    """The array in a file, plain or gzipped."""
    file = os.path.join(root, name)
    found = next((candidate for candidate in (file, f"{file}.gz") if os.path.exists(candidate)), None)
    if found is None:
        raise Absent(path, f"neither {name} nor {name}.gz is in {root}")
    try:
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(open_regular(found))
            if found.endswith(".gz"):
                handle = stack.enter_context(gzip.open(handle))
            header = handle.read(4 + 4 * axes)
            if header[:4] != bytes([0, 0, 8, axes]) or len(header) < 4 + 4 * axes:
                raise DataError(f"{found}: begins with {header[:4]!r}, not as an idx file of {axes}-dimensional bytes")
            shape = tuple(np.frombuffer(header, ">u4", axes, 4).tolist())
            size = math.prod(shape)
            # No more than the header declares and one byte, which tells that there is more; and never what a damaged
            # header may declare.
            data = handle.read(min(size, 2**31) + 1)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises them all for damaged files
        raise DataError(f"{found}: {error}") from error
    if len(data) != size or not size:
        raise DataError(f"{found}: should hold {shape}, that is {size} bytes, and holds "
                        f"{'more' if len(data) > size else len(data)}; copy it anew")
    return np.frombuffer(data, np.uint8).reshape(shape)
