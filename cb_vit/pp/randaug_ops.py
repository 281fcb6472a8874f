"""The ops of RandAugment on Pillow images, and what a magnitude means to each: timm 1.0.31's, pixel for pixel."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

LEVELS = 10  # magnitudes count tenths of an op's range


class Sampling(NamedTuple):
    """How ops that move pixels sample them.

    Attributes:
        resample: Pillow's method.
        fillcolor: colour of the pixels that come in from outside.
    """

    resample: Image.Resampling
    fillcolor: int | tuple[int, ...]


class Transform(NamedTuple):
    """One of RandAugment's ops: `apply(image, argument(level, sign), sampling)`.

    Attributes:
        argument: the function from the level, magnitude / 10, and a random sign, 1 or -1, to what `apply` takes.
        apply: the function from an image of mode RGB or L to another one; the first is left as it is.
    """

    argument: Callable[[float, int], Any]
    apply: Callable[[Image.Image, Any, Sampling], Image.Image]


def _no_argument(level: float, sign: int) -> None:
    return None


def _bits(level: float, sign: int) -> int:
    return int(4 * level)


def _threshold(level: float, sign: int) -> int:
    return min(256, int(256 * level))


def _factor(level: float, sign: int) -> float:
    return 1.8 * level + 0.1


def _factor_increasing(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * level)  # 1 changes nothing


def _range(low: float, high: float) -> Callable[[float, int], float]:
    return lambda level, sign: min(high, low + (high - low) * level)


def _signed(largest: float) -> Callable[[float, int], float]:
    return lambda level, sign: sign * largest * level


def _look_up(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, bits: int, sampling: Sampling) -> Image.Image:
    # Pillow 13's own function refuses 0 bits, which is black.
    mask = 256 - 2 ** (8 - min(max(bits, 0), 8))
    return _look_up(image, [value & mask for value in range(256)])


def _solarize(image: Image.Image, threshold: int, sampling: Sampling) -> Image.Image:
    return ImageOps.solarize(image, threshold)


def _solarize_add(image: Image.Image, amount: int, sampling: Sampling) -> Image.Image:
    return _look_up(image, [min(255, value + amount) if value < 128 else value for value in range(256)])


def _blur(image: Image.Image, radius: float, sampling: Sampling) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _desaturate(image: Image.Image, share: float, sampling: Sampling) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 - share)


def _plain(function: Callable[[Image.Image], Image.Image]) -> Transform:
    return Transform(_no_argument, lambda image, argument, sampling: function(image))


def _enhance(kind: Callable, argument: Callable[[float, int], float]) -> Transform:
    return Transform(argument, lambda image, factor, sampling: kind(image).enhance(factor))


def _affine(largest: float, matrix: Callable[[float, int, int], tuple[float, ...]]) -> Transform:
    """`matrix(argument, width, height)` maps a pixel of the output to one of the input, from the top left corner."""
    return Transform(_signed(largest), lambda image, argument, sampling: image.transform(
        image.size, Image.Transform.AFFINE, matrix(argument, *image.size), **sampling._asdict()))


TRANSFORMS: dict[str, Transform] = {
    "AutoContrast": _plain(ImageOps.autocontrast),
    "Equalize": _plain(ImageOps.equalize),
    "Invert": _plain(ImageOps.invert),
    "Rotate": Transform(_signed(30), lambda image, degrees, sampling: image.rotate(degrees, **sampling._asdict())),
    "Posterize": Transform(_bits, _posterize),
    "PosterizeIncreasing": Transform(lambda level, sign: 4 - _bits(level, sign), _posterize),
    "Solarize": Transform(_threshold, _solarize),
    "SolarizeIncreasing": Transform(lambda level, sign: 256 - _threshold(level, sign), _solarize),
    "SolarizeAdd": Transform(lambda level, sign: min(128, int(110 * level)), _solarize_add),
    **{kind.__name__: _enhance(kind, _factor) for kind in (
        ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)},
    **{f"{kind.__name__}Increasing": _enhance(kind, _factor_increasing) for kind in (
        ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)},
    "ShearX": _affine(0.3, lambda factor, w, h: (1, factor, 0, 0, 1, 0)),
    "ShearY": _affine(0.3, lambda factor, w, h: (1, 0, 0, factor, 1, 0)),
    "TranslateXRel": _affine(0.45, lambda share, w, h: (1, 0, share * w, 0, 1, 0)),
    "TranslateYRel": _affine(0.45, lambda share, w, h: (1, 0, 0, 0, 1, share * h)),
    "Desaturate": Transform(_range(0.5, 1.0), _desaturate),
    "GaussianBlur": Transform(_range(0.1, 2.0), _blur),
}

PLAIN = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
         "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
INCREASING = tuple(f"{name}Increasing" if f"{name}Increasing" in TRANSFORMS else name for name in PLAIN)
