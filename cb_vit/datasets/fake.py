"""Made-up images that can be learned: for tests, for timing, and to try a config without data.

Example i of a split is a pure function of (split, i): its class is i modulo the number of classes, its picture the
class's pattern of 4×4 coloured tiles plus noise. All bytes come straight from the Philox counter generator, whose
output is fixed across versions of NumPy.
"""
from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.config import ConfigError, parse
from cb_vit.datasets.contents import Contents, fingerprint
from cb_vit.datasets.core import SourceConfig, Spans, select

SPLITS = ("train", "validation", "test")
TILES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeConfig(SourceConfig):
    """Made-up data, called "fake"; of the splits "train", "validation" and "test", which are of the same size.

    Attributes:
        num_examples: number of examples in each split.
        image_size: height and width of the images in pixels.
        num_classes: number of classes.
        encoded: whether images come as JPEG files, as those of real data sets do, instead of pixels.
        broken: numbers of examples whose bytes do not decode, in every split; to try `config.input.skip_errors`.
    """

    num_examples: int = 1024
    image_size: int = 32
    num_classes: int = 10
    encoded: bool = False
    broken: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for field in ("num_examples", "image_size", "num_classes"):
            if getattr(self, field) < 1:
                raise ConfigError(field, f"must be 1 or more, got {getattr(self, field)}")
        for number in self.broken:
            if not 0 <= number < self.num_examples:
                raise ConfigError("broken", f"{number} is outside 0 … {self.num_examples - 1}")


def check(block: Mapping[str, Any], path: str) -> FakeConfig:
    """The block as a checked `FakeConfig`."""
    return parse(FakeConfig, block, path)


def open_source(config: FakeConfig, path: str) -> FakeSource:
    """The source of the examples that the split names.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        ConfigError: under `path`: the split is unknown or selects nothing.
    """
    return FakeSource(config, select(config.split, {split: [config.num_examples] for split in SPLITS}, f"{path}.split"))


class FakeSource:
    """A `core.Source` of made-up images, uint8 [image_size, image_size, 3] or JPEG bytes.

    Args:
        config: the checked block.
        spans: the examples to take, of each split.
    """

    class_names = None

    def __init__(self, config: FakeConfig, spans: Spans):
        self.config, self.spans, self.num_classes = config, spans, config.num_classes
        self.contents = Contents(fingerprint([config]))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        span, number = self.spans.locate(index)
        split = self.spans.spans[span].name
        label, name = number % self.num_classes, f"{split}#{number}"
        if number in self.config.broken:
            return {"image": b"\xff\xd8\xff broken on purpose", "label": label, "id": name}
        size = self.config.image_size
        image = _pattern(label, size) + _bytes(1 + SPLITS.index(split), number, size * size * 3).reshape(size, size, 3)
        return {"image": _jpeg(image) if self.config.encoded else image, "label": label, "id": name}


def _bytes(stream: int, number: int, count: int) -> np.ndarray:
    """uint8 [count], 0 … 127, a pure function of stream and number."""
    # Keyed, not seeded: a key is the number itself, so that examples need no seeds that are drawn one after the other.
    words = np.random.Philox(key=np.array([stream, number], np.uint64)).random_raw(-(-count // 8))
    # In one byte order, so that machines of both kinds give the same images; halved, so that pattern and noise add up
    # without overflow.
    return words.astype("<u8", copy=False).view(np.uint8)[:count] >> 1


@functools.lru_cache(maxsize=1024)
def _pattern(label: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3], 0 … 127: the class's tiles, the same in every split."""
    tile = np.arange(size) * TILES // size
    return _bytes(0, label, TILES * TILES * 3).reshape(TILES, TILES, 3)[np.ix_(tile, tile)]


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
