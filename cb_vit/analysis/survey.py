"""Every image of a data set looked at once: what is broken, tiny, there twice, or other than people think."""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

from cb_vit.datasets import Source
from cb_vit.datasets.contents import class_name
from cb_vit.pp.images import as_pil, decode_image, is_encoded, to_channels

KINDS = {  # of findings, and what is said of each
    "broken": "cannot be read; see skip_errors",
    "leaked": "the same pixels in two sets of data: accuracy would be measured on what was trained on",
    "contradiction": "the same pixels under two classes",
    "duplicate": "the same pixels twice in a class",
    "tiny": "far smaller than what the model sees",
    "odd": "other than one might think"}
SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",),
            "GIF": (".gif",), "BMP": (".bmp",), "WEBP": (".webp",), "TIFF": (".tif", ".tiff")}
KNOWN = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
NO_LABEL = "no label"
NARROW = 4  # times as long as wide, from which a crop hardly shows what is there


@dataclasses.dataclass(frozen=True)
class Look:
    """What one example is.

    Attributes:
        data: what the set of data is called.
        where: the example's own name.
        label: name of its class, or of those that it may be of.
        size: (height, width) in pixels; None: it is broken.
        pixels: hash of the pixels; None: it is broken.
        findings: (kind, words) of what there is to say of it by itself.
    """

    data: str
    where: str
    label: str
    size: tuple[int, int] | None
    pixels: bytes | None
    findings: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know of an example: `kind` is one of `KINDS`, the rest as in `Look`, and `what` in words."""

    kind: str
    data: str
    label: str
    where: str
    what: str


@dataclasses.dataclass(frozen=True)
class Surveyor:
    """Looks at the examples of a source; may be called from several threads.

    Args:
        data: what the set of data is called.
        source: the source of the examples.
        exif: whether images will be turned as their EXIF orientation says.
        smallest: shorter side in pixels below which an image is tiny.
    """

    data: str
    source: Source
    exif: bool
    smallest: int

    def __call__(self, index: int) -> Look:
        """What example `index` is."""
        where, label = f"example {index}", ""
        try:
            example = self.source[index]
            where = example["id"]
            numbers = [number for number in np.atleast_1d(example["label"]).tolist() if number >= 0]
            label = " or ".join(class_name(self.source.class_names, number) for number in numbers) or NO_LABEL
            image = example["image"]
            image = decode_image(image) if is_encoded(image) else as_pil(image)
            findings = tuple(self._findings(image, where))
            pixels = np.asarray(to_channels(image, 3))
        except Exception as error:  # readers of files raise whatever they stumble over in damaged bytes
            words = " ".join(str(error).split()) or type(error).__name__
            return Look(self.data, where, label, None, None, (("broken", words.removeprefix(f"{where}: ")),))
        digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
        return Look(self.data, where, label, pixels.shape[:2], digest, findings)

    def _findings(self, image: Image.Image, where: str) -> Iterator[tuple[str, str]]:
        width, height = image.size
        if min(image.size) < self.smallest:
            yield "tiny", f"{width}×{height} pixels"
        if max(image.size) > NARROW * min(image.size):
            yield "odd", f"{width}×{height} pixels: a crop shows little of it"
        suffix = os.path.splitext(where)[1].lower()
        if suffix in KNOWN and image.format and suffix not in SUFFIXES[image.format]:
            yield "odd", f"is called {suffix} and is a {image.format}, and read as such"
        if image.format and getattr(image, "is_animated", False) and image.format != "MPO":
            yield "odd", f"holds {image.n_frames} pictures, of which the first is taken"
        if not self.exif and (turn := image.getexif().get(ExifTags.Base.Orientation, 1)) in range(2, 9):
            yield "odd", f"is stored turned (EXIF orientation {turn}), and taken so; decode(exif=True) turns it"
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            yield "odd", "has transparent parts, whose hidden colours are taken"
        if image.mode.startswith(("I", "F")):
            yield "odd", "has more than 8 bits a channel, of which the high ones are taken"
        elif all(low == high for low, high in np.atleast_2d(image.getextrema())):
            yield "odd", "is of one colour"


class Survey:
    """What is found in several sets of data, put together look by look."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.sizes: dict[str, collections.Counter[tuple[int, int]]] = {}
        self._seen: dict[bytes, tuple[str, str, str]] = {}

    def add(self, look: Look) -> None:
        """Take in what one example is."""
        for kind, what in (*look.findings, *self._again(look)):
            self.findings.append(Finding(kind, look.data, look.label, look.where, what))
        sizes = self.sizes.setdefault(look.data, collections.Counter())
        if look.size:
            sizes[look.size] += 1

    def _again(self, look: Look) -> Iterator[tuple[str, str]]:
        """Whether the pixels of an example were there before, and where."""
        if look.pixels is None:
            return
        here = look.data, look.label, look.where
        data, label, where = self._seen.setdefault(look.pixels, here)
        if (data, where) == here[::2]:
            return
        if label != look.label and NO_LABEL not in (label, look.label):
            yield "contradiction", f"the same pixels as {where} of class {label}"
        if data != look.data:
            yield "leaked", f"the same pixels as {where} of {data}"
        elif label == look.label or NO_LABEL in (label, look.label):
            yield "duplicate", f"the same pixels as {where}"

    def summary(self) -> Iterator[str]:
        """A line for each set of data on the sizes of its images."""
        for data, sizes in self.sizes.items():
            if not sizes:
                yield f"{data}: not one image could be read"
                continue
            sides = np.sort(np.repeat([min(size) for size in sizes], list(sizes.values())))
            small, large = (min(sizes, key=np.prod), max(sizes, key=np.prod))
            yield (f"{data}: {len(sides):,} images, {small[1]}×{small[0]} to {large[1]}×{large[0]} pixels, the shorter "
                   f"side {int(np.median(sides))} in the median")
