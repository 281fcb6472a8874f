"""Common corruptions of ImageNet-C and CIFAR-10-C, made on the fly: `corrupt("gaussian_noise", 3)`.

The 15 corruptions of Hendrycks & Dietterich (arXiv 1903.12261) at five severities, with the constants of the authors'
code (https://github.com/hendrycks/robustness, `ImageNet-C/create_c`, Apache-2.0): `make_imagenet_c.py`, written for
crops of 224×224, and for small images `make_cifar_c.py`, written for 32×32. What the constants mean, and where a method
is another one, is said in `corruption_ops.py`. Nothing here needs SciPy, which is imported by the first image.
"""
from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cb_vit.config import ConfigError
from cb_vit.pp.images import as_uint8
from cb_vit.pp.ops_general import register_op
from cb_vit.pp.ops_image import PixelOp
from cb_vit.registry import Registry

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 96  # pixels of the shorter side below which an image gets the constants of CIFAR-10-C
Constants = tuple[tuple[Any, ...], ...]  # arguments of the function in `corruption_ops`, by severity
_SIDE = 244 / 224  # the authors' lengths of the elastic transform count 244 pixels ("should have been 224")


@dataclasses.dataclass(frozen=True)
class Corruption:
    """The constants of a corruption, whose function has its name in `corruption_ops`.

    Attributes:
        imagenet: those of ImageNet-C.
        cifar: those of CIFAR-10-C.
    """

    imagenet: Constants
    cifar: Constants

    def constants(self, shape: tuple[int, ...], severity: int) -> tuple[Any, ...]:
        """Those for an image of shape [h w c]: CIFAR-10-C's where its shorter side is below `SMALL`."""
        return (self.cifar if min(shape[:2]) < SMALL else self.imagenet)[severity - 1]


def _each(*values: float) -> Constants:
    return tuple((value,) for value in values)


CORRUPTIONS: Registry[Corruption] = Registry("corruption", {
    "gaussian_noise": Corruption(_each(0.08, 0.12, 0.18, 0.26, 0.38), _each(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_each(60, 25, 12, 5, 3), _each(500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_each(0.03, 0.06, 0.09, 0.17, 0.27), _each(0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
                               ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption(((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                             ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": Corruption(((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                              ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
                            ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))),
    "snow": Corruption(((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
                       ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    "frost": Corruption(((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
                        ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2))),
    "fog": Corruption(((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
                      ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(_each(0.1, 0.2, 0.3, 0.4, 0.5), _each(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_each(0.4, 0.3, 0.2, 0.1, 0.05), _each(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        tuple(tuple(_SIDE * share for share in shares) for shares in (
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    "pixelate": Corruption(_each(0.6, 0.5, 0.4, 0.3, 0.25), _each(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(_each(25, 18, 15, 10, 7), _each(80, 65, 58, 50, 40)),
})
PICTURED = "frost"  # the one corruption that needs files
BUILT_IN = tuple(name for name in CORRUPTIONS if name != PICTURED)


@register_op("corrupt")
@dataclasses.dataclass(frozen=True)
class Corrupt(PixelOp):
    """A common corruption of [h w c], grey or RGB, as ImageNet-C and CIFAR-10-C have it; after resize and crop.

    ImageNet-C's constants, or CIFAR-10-C's where the shorter side is below 96 pixels; lengths in them are pixels,
    whatever the image's size, but for the elastic transform, whose lengths grow with the shorter side. In a grey image
    a pixel counts as one of three like channels. Levels are rounded, where the authors' code cuts fractions off.

    Attributes:
        name: name of the corruption, one of `CORRUPTIONS`.
        severity: strength, 1 to 5.
    """

    name: str
    severity: int

    def check(self) -> None:
        """Refuse a corruption that does not exist, or whose pictures are not installed, and other severities."""
        check_corruption(self.name, "name")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity goes from 1 to 5, got {self.severity}")

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image corrupted."""
        if image.mode not in ("RGB", "L"):
            raise ValueError(f"takes grey or RGB images, got one of mode {image.mode}; decode makes it RGB")
        pixels = corrupt(as_uint8(image), self.name, self.severity, rng)
        return Image.fromarray(pixels if image.mode == "RGB" else pixels[:, :, 0])


def check_corruption(name: str, path: str) -> None:
    """Refuse a corruption that does not exist, or whose pictures are not installed.

    Raises:
        ConfigError: at `path`.
    """
    CORRUPTIONS.pick(name, path)
    if name == PICTURED and frost_folder() is None:
        raise ConfigError(path, f"{name} needs pictures that are not installed; pip install 'cb_vit[corruptions]'")


def corrupt(image: UInt8[np.ndarray, "h w c"], name: str, severity: int, rng: np.random.Generator
            ) -> UInt8[np.ndarray, "h w c"]:
    """An image corrupted.

    Args:
        image: grey or RGB pixels.
        name: name of the corruption.
        severity: strength, 1 to 5.
        rng: the generator that it draws from; the same state gives the same image.
    """
    from cb_vit.pp import corruption_ops  # not at the top: most strings corrupt nothing, and need no SciPy
    constants = CORRUPTIONS[name].constants(image.shape, severity)
    found = getattr(corruption_ops, name)(image / 255, rng, *constants)
    return np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8)


def frost_folder() -> pathlib.Path | None:
    """The folder of the authors' pictures of frost, of the package `imagecorruptions-imaug`; None: there is none."""
    found = importlib.util.find_spec("imagecorruptions")  # to import it would take OpenCV and Numba, not needed here
    places = found.submodule_search_locations or () if found else ()
    return next((folder for place in places if (folder := pathlib.Path(place) / "frost").is_dir()), None)
