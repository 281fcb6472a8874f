"""DeiT-III's augmentation (arXiv 2204.07118): 3-Augment, colour jitter and the simple random crop.

The recipe is `"decode|inception_crop(224)|flip_lr|three_augment|color_jitter(0.3, 0.3, 0.3)"`, or with
`simple_random_crop(224)` for the crop, which the paper prefers on ImageNet-21k. Pixels are those of torchvision's
PIL path.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cb_vit.pp.images import HW, check_size
from cb_vit.pp.ops_general import register_op
from cb_vit.pp.ops_image import PixelOp, RandomCrop, ResizeSmall

BLUR_RADIUS = (0.1, 2.0)


def to_grey(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image in grey: its luminance (ITU-R 601) in every channel."""
    return image.convert("L").convert(image.mode)


def solarize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with values of 128 and above inverted."""
    return ImageOps.solarize(image, 128)


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur, its radius (standard deviation, in pixels) uniform in `BLUR_RADIUS`."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR_RADIUS)))


CHOICES: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (to_grey, solarize, blur)


@register_op("three_augment")
@dataclasses.dataclass(frozen=True)
class ThreeAugment(PixelOp):
    """Exactly one of grey, solarised and blurred on [h w c], each with probability 1/3."""

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image changed in one of the three ways."""
        return CHOICES[rng.integers(3)](image, rng)


@register_op("color_jitter")
@dataclasses.dataclass(frozen=True)
class ColorJitter(PixelOp):
    """Random brightness, contrast, saturation and hue on [h w c], in random order: torchvision's ColorJitter.

    `brightness` b multiplies by a factor uniform in [max(0, 1 - b), 1 + b]; likewise `contrast`, around the mean of
    the luminance, and `saturation`, around each pixel's. `hue` turns the hue by a share of the circle uniform in
    [-hue, hue], at most 0.5. 0 leaves a property alone. Grey images have no saturation and no hue.

    Attributes:
        brightness: largest change of brightness; 0: none.
        contrast: largest change of contrast; 0: none.
        saturation: largest change of saturation; 0: none.
        hue: largest turn of the hue, as a share of the circle; 0: none.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def check(self) -> None:
        """Refuse negative values, and a hue of more than half a turn."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name} must be 0 or more, got {getattr(self, field.name)}")
        if self.hue > 0.5:
            raise ValueError(f"hue is a share of the circle, at most 0.5, got {self.hue}")

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image jittered."""
        adjustments = [(adjust, strength, centre) for adjust, strength, centre in (
            (adjust_brightness, self.brightness, 1), (adjust_contrast, self.contrast, 1),
            (adjust_saturation, self.saturation, 1), (adjust_hue, self.hue, 0)) if strength]
        for i in rng.permutation(len(adjustments)):
            adjust, strength, centre = adjustments[i]
            low = max(0.0, centre - strength) if centre else -strength
            image = adjust(image, rng.uniform(low, centre + strength))
        return image


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """The image with values times `factor`."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """The image with distances from the mean luminance times `factor`."""
    return ImageEnhance.Contrast(image).enhance(factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """The image with distances from each pixel's luminance times `factor`."""
    return ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """The image with hues turned by `turn`, a share of the circle, in steps of 1/256; what is grey stays as it is."""
    # 255, although 256 closes the circle: torchvision's constant, kept for the same pixels.
    shift, same = int(turn * 255), list(range(256))
    return image.convert("HSV").point([(hue + shift) % 256 for hue in same] + same + same).convert(image.mode)


@register_op("simple_random_crop")
@dataclasses.dataclass(frozen=True)
class SimpleRandomCrop(PixelOp):
    """The shorter side of [h w c] to `size`, bicubic; 4 pixels reflected on every side; then a square at random.

    Far more of the picture stays in view than with `inception_crop`.

    Attributes:
        size: length of a side of the square.
    """

    size: int

    def check(self) -> None:
        """Refuse a size that is not positive."""
        check_size(self.size)

    def size_after(self, size: HW | None) -> HW | None:
        """A square of `size`."""
        return self.size, self.size

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The crop."""
        resized = ResizeSmall(self.size).transform(image, rng)
        return RandomCrop(self.size, padding=4, padding_mode="reflect").transform(resized, rng)
