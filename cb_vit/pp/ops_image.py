"""Ops on one image, on the host, with Pillow: bytes in, an image of mode RGB or L on the way, uint8 out.

Pixels follow timm's and torchvision's PIL path (same Pillow calls), argument names follow big_vision.
Sizes are in pixels, an int for a square or (h, w). Randomness comes only from the `rng` passed in,
where big_vision draws from tf.random and timm from Python's global `random`.
"""
from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from cb_vit.pp.images import (
    HW,
    Size,
    as_pil,
    check_fits,
    check_method,
    check_size,
    decode_image,
    height_width,
    is_encoded,
    resize_image,
    to_channels,
)
from cb_vit.pp.ops_general import Features, HostOp, find_keys, register_op


class ImageOp(HostOp):
    """A host op that changes `image`; it tells what it does to size and channels, where that is fixed."""

    def size_after(self, size: HW | None) -> HW | None:
        """(h, w) of the output, given the input's; None where it is not fixed.

        Raises:
            ValueError: an image of this size cannot be processed.
        """
        return size

    def channels_after(self, channels: int | None) -> int | None:
        """Channels of the output, given the input's; None where they are not fixed."""
        return channels


class PixelOp(ImageOp):
    """An image op on pixels, that is after `decode`; subclasses write `transform`."""

    @abc.abstractmethod
    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image changed."""

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        """The features with `image` changed."""
        find_keys(features, ["image"])
        return {**features, "image": self.transform(as_pil(features["image"]), rng)}


@register_op("decode")
@dataclasses.dataclass(frozen=True)
class Decode(ImageOp):
    """Encoded bytes (in one of `images.FORMATS`) to an image [h w channels]; an array is only converted.

    Greyscale, palette and CMYK become RGB, transparency is cut off, an animation gives its first frame,
    16-bit pixels keep their high byte (Pillow's own conversion, and so timm, saturates greyscale ones).
    JPEG decoding is Pillow's, which big_vision asks of TensorFlow with `precise=True`. The orientation in EXIF is
    ignored, as in big_vision and timm, unless `exif` is set. Broken, truncated and over-large files
    (`PIL.Image.MAX_IMAGE_PIXELS`) are errors.

    Attributes:
        channels: 3 for RGB, 1 for grey.
        exif: whether the image is turned as its EXIF orientation says.
    """

    channels: Literal[3, 1] = 3
    exif: bool = False

    def channels_after(self, channels: int | None) -> int | None:
        """`channels`, whatever the file has."""
        return self.channels

    def size_after(self, size: HW | None) -> HW | None:
        """None: the size is the file's own."""
        return None

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        """The features with `image` decoded."""
        find_keys(features, ["image"])
        data = features["image"]
        if not is_encoded(data):
            return {**features, "image": to_channels(as_pil(data), self.channels)}
        try:
            return {**features, "image": self._decode(data)}
        except Exception as error:  # Pillow's plugins raise whatever they stumble over in damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"cannot decode {len(data)} bytes that begin {bytes(data[:8])!r}: {reason}") from error

    def _decode(self, data: bytes) -> Image.Image:
        image = decode_image(data)
        return to_channels(ImageOps.exif_transpose(image) if self.exif else image, self.channels)


@register_op("resize")
@dataclasses.dataclass(frozen=True)
class Resize(PixelOp):
    """Resize [h w c] to `size`, whatever the aspect ratio.

    Antialiased (the default, and what timm does) is Pillow's `resize`: the filter widens when the image shrinks,
    bicubic is Keys' with a = -0.5. `antialias=False` (big_vision's default, with method bilinear) samples at points,
    with Pillow's `transform`: nearest and bilinear are TensorFlow's to one grey level, but bicubic there has a = -1.

    Attributes:
        size: size of the result, an int for a square or (h, w).
        method: one of the names in `images.METHODS`.
        antialias: whether the filter widens where the image shrinks.
    """

    size: Size
    method: str = "bicubic"
    antialias: bool = True

    def check(self) -> None:
        """Refuse a size that is not positive, and a method that does not exist."""
        check_size(self.size)
        check_method(self.method, self.antialias)

    def size_after(self, size: HW | None) -> HW | None:
        """`size`."""
        return height_width(self.size)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image resized."""
        return resize_image(image, height_width(self.size), self.method, self.antialias)


@register_op("resize_small")
@dataclasses.dataclass(frozen=True)
class ResizeSmall(PixelOp):
    """Resize [h w c], keeping the aspect ratio, so that the shorter side is `smaller_size`.

    The longer side is cut off to whole pixels, `int(smaller_size * long / short)`, as torchvision does and
    so timm's and DeiT's evaluation; big_vision rounds it to the nearest, hence may get one pixel more.
    big_vision's default method is area.

    Attributes:
        smaller_size: length of the shorter side of the result.
        method: one of the names in `images.METHODS`.
        antialias: whether the filter widens where the image shrinks, see `Resize`.
    """

    smaller_size: int
    method: str = "bicubic"
    antialias: bool = True

    def check(self) -> None:
        """Refuse a size that is not positive, and a method that does not exist."""
        check_size(self.smaller_size)
        check_method(self.method, self.antialias)

    def size_after(self, size: HW | None) -> HW | None:
        """(h, w) of the output; None where the input's is not known."""
        if size is None:
            return None
        longer = int(self.smaller_size * max(size) / min(size))
        return (longer, self.smaller_size) if size[0] >= size[1] else (self.smaller_size, longer)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image resized."""
        return resize_image(image, self.size_after((image.height, image.width)), self.method, self.antialias)


@register_op("inception_crop")
@dataclasses.dataclass(frozen=True)
class InceptionCrop(PixelOp):
    """Cut a box of random area and aspect ratio out of [h w c], then resize it to `size`.

    This is timm's and torchvision's RandomResizedCrop. Up to `tries` times: area uniform in [area_min, area_max]
    percent of the image, logarithm of the ratio w / h uniform in [log ratio_min, log ratio_max], accepted if the box
    fits; its position is uniform. If none fits: the largest centred box with the ratio clipped to the range.
    The box is cut out before it is resized, so pixels outside never blend in. big_vision's op: area_min 5,
    bilinear without antialias, and TensorFlow's sample_distorted_bounding_box, which draws the ratio itself (not its
    logarithm) and the height (not the area) uniformly and takes the whole image if nothing fits.

    Attributes:
        size: size of the result, an int for a square or (h, w).
        area_min: smallest area of the box, in percent of the image.
        area_max: largest area of the box, in percent of the image.
        ratio_min: smallest w / h of the box.
        ratio_max: largest w / h of the box.
        tries: number of boxes that are drawn before the centred one is taken.
        method: one of the names in `images.METHODS`.
        antialias: whether the filter widens where the image shrinks, see `Resize`.
    """

    size: Size
    area_min: float = 8.0
    area_max: float = 100.0
    ratio_min: float = 3 / 4
    ratio_max: float = 4 / 3
    tries: int = 10
    method: str = "bicubic"
    antialias: bool = True

    def check(self) -> None:
        """Refuse ranges that do not run upwards, and areas that are no percentages."""
        check_size(self.size)
        check_method(self.method, self.antialias)
        # From 1 on: big_vision's op takes percent and timm's shares, and a share would be taken for less than 1 %.
        if not 1 <= self.area_min <= self.area_max <= 100:
            raise ValueError(f"area_min and area_max are percent of the image, 1 <= area_min <= area_max <= 100 "
                             f"(write 8 for 8 %), got {self.area_min} and {self.area_max}")
        if not 0 < self.ratio_min <= self.ratio_max:
            raise ValueError(f"needs 0 < ratio_min <= ratio_max, got {self.ratio_min} and {self.ratio_max}")
        if self.tries < 1:
            raise ValueError(f"tries must be 1 or more, got {self.tries}")

    def size_after(self, size: HW | None) -> HW | None:
        """`size`."""
        return height_width(self.size)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The box cut out and resized."""
        crop = image.crop(self.box(image.height, image.width, rng))
        return resize_image(crop, height_width(self.size), self.method, self.antialias)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of one random box in an image of this size."""
        for _ in range(self.tries):
            area = rng.uniform(self.area_min, self.area_max) / 100 * height * width
            ratio = math.exp(rng.uniform(math.log(self.ratio_min), math.log(self.ratio_max)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio_max)))
        h = min(height, max(1, round(width / self.ratio_min)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@register_op("central_crop")
@dataclasses.dataclass(frozen=True)
class CentralCrop(PixelOp):
    """Cut `size` out of the middle of [h w c]; an image smaller than that is an error.

    An odd margin is split as torchvision and timm do, `round(margin / 2)` with halves to even: of 3 pixels, 2 go
    to the top or left, of 1 or 5, 0 or 2. big_vision always gives the smaller half; torchvision pads small images.

    Attributes:
        size: size of the result, an int for a square or (h, w).
    """

    size: Size

    def check(self) -> None:
        """Refuse a size that is not positive."""
        check_size(self.size)

    def size_after(self, size: HW | None) -> HW | None:
        """`size`, which must fit."""
        return check_fits(height_width(self.size), size)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The middle of the image."""
        h, w = self.size_after((image.height, image.width))
        top, left = round((image.height - h) / 2), round((image.width - w) / 2)
        return image.crop((left, top, left + w, top + h))


@register_op("random_crop")
@dataclasses.dataclass(frozen=True)
class RandomCrop(PixelOp):
    """Cut `size` out of [h w c] at a uniformly random place, after adding `padding` pixels on every side.

    Modes as in torchvision's RandomCrop: "constant" (black), "edge", "reflect", "symmetric". An image smaller than
    the crop is an error, as in torchvision and big_vision; big_vision's op has no padding.

    Attributes:
        size: size of the result, an int for a square or (h, w).
        padding: number of pixels that are added on every side first; 0: none.
        padding_mode: what these pixels are.
    """

    size: Size
    padding: int = 0
    padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant"

    def check(self) -> None:
        """Refuse a size that is not positive, and negative padding."""
        check_size(self.size)
        if self.padding < 0:
            raise ValueError(f"padding must be 0 or more, got {self.padding}")

    def size_after(self, size: HW | None) -> HW | None:
        """`size`, which must fit."""
        padded = size and (size[0] + 2 * self.padding, size[1] + 2 * self.padding)
        return check_fits(height_width(self.size), padded)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The crop."""
        h, w = self.size_after((image.height, image.width))
        if self.padding:
            pixels, margin = np.asarray(image), (self.padding, self.padding)
            image = Image.fromarray(np.pad(pixels, [margin, margin, (0, 0)][:pixels.ndim], mode=self.padding_mode))
        left, top = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
        return image.crop((left, top, left + w, top + h))


@register_op("flip_lr")
@dataclasses.dataclass(frozen=True)
class FlipLR(PixelOp):
    """Mirror [h w c] left to right with probability one half, as big_vision's op and timm's RandomHorizontalFlip."""

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image, or its mirror image."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
