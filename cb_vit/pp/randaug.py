"""RandAugment (arXiv 1909.13719) as timm does it, in timm's strings: `randaug("rand-m9-mstd0.5-inc1")`.

Follows timm 1.0.31 (`timm/data/auto_augment.py`). timm 0.3.2, which DeiT pins, does the same for this string, DeiT's;
beyond it, 0.3.2 takes `inc0` for `inc1`, and has neither `p`, `mmax` nor `t`.
"""
from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from cb_vit.pp.images import METHODS
from cb_vit.pp.ops_general import register_op
from cb_vit.pp.ops_image import PixelOp
from cb_vit.pp.randaug_ops import INCREASING, LEVELS, PLAIN, TRANSFORMS, Sampling
from cb_vit.registry import Registry

# timm's sets: name to weight, None where all are equal.
SETS: Registry[dict[str, float | None]] = Registry("set of transforms", {
    "3a": dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur")),
    "3aw": {
        "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
        "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1},
    "weights": {
        "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
        "Invert": 0.05},
})


@dataclasses.dataclass(frozen=True)
class Policy:
    """A RandAugment string, read: what is drawn for an image.

    Attributes:
        names: the names of the ops to choose from.
        weights: the probabilities of these ops, which are then drawn without replacement; None: all are equal, and
            drawn with replacement.
        m: mean of the magnitude, in tenths of an op's range.
        mstd: standard deviation of the magnitude; above 100 it is uniform between 0 and `m`.
        mmax: largest magnitude; magnitudes are clipped to 0 … mmax.
        n: number of ops chosen for an image.
        p: probability that a chosen op is applied.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    m: int = LEVELS
    mstd: float = 0.0
    mmax: int = LEVELS
    n: int = 2
    p: float = 0.5

    def choose(self, rng: np.random.Generator) -> list[str]:
        """The names of the ops for one image that are applied, in order."""
        if self.weights is None:
            chosen = rng.integers(len(self.names), size=self.n)
        else:
            chosen = rng.choice(len(self.names), self.n, replace=False, p=self.weights)
        return [self.names[i] for i in chosen if rng.random() < self.p]

    def magnitude(self, rng: np.random.Generator) -> float:
        """The magnitude of one op."""
        if self.mstd > 100:
            drawn = rng.uniform(0, self.m)
        else:
            drawn = rng.normal(self.m, self.mstd) if self.mstd else self.m
        return min(max(drawn, 0.0), float(self.mmax))


class Part(NamedTuple):
    """A part of the string.

    Attributes:
        read: the function that reads the part's value.
        allows: the function that says whether a value is possible.
        words: the meaning of the part and its possible values, for errors.
    """

    read: Callable[[str], Any]
    allows: Callable[[Any], bool]
    words: str


PARTS: Registry[Part] = Registry("part of a RandAugment string", {
    "m": Part(int, lambda value: value >= 0, "m is the magnitude, a whole number of 0 or more"),
    "mstd": Part(float, lambda value: value >= 0, "mstd is the magnitude's standard deviation, 0 or more, or inf"),
    "mmax": Part(int, lambda value: value > 0, "mmax is the largest magnitude, a whole number of 1 or more"),
    "n": Part(int, lambda value: value > 0, "n is how many ops an image gets, a whole number of 1 or more"),
    "p": Part(float, lambda value: 0 <= value <= 1, "p is the probability that a chosen op is applied, 0 to 1"),
    "inc": Part(int, lambda value: value in (0, 1), "inc is 1 for ops that grow stronger with the magnitude, or 0"),
    "t": Part(str, lambda value: value in SETS, f"t is a set of transforms, one of {', '.join(sorted(SETS))}"),
})


def read_policy(text: str) -> Policy:
    """Read a string such as "rand-m9-mstd0.5-inc1": "rand", then parts in any order, each at most once.

    Raises:
        ValueError: a part is given twice or has an impossible value; a `ConfigError` where it is unknown.
    """
    head, *parts = text.split("-")
    if head != "rand":
        raise ValueError(f"{text!r} must begin with 'rand', as in 'rand-m9-mstd0.5-inc1', got {head!r}")
    given: dict[str, Any] = {}
    for part in parts:
        # timm splits a part where its digits begin, and so never sees the value of "mstdinf".
        key, value = re.fullmatch("(t|mstd(?=inf)|[a-z]*)(.*)", part, re.DOTALL).groups()
        if key in given:
            raise ValueError(f"{text!r}: {key} is given twice")
        given[key] = _read_value(PARTS.pick(key, repr(text)), part, value, text)
    increasing, name = given.pop("inc", 0), given.pop("t", None)
    table = SETS[name] if name else dict.fromkeys(INCREASING if increasing else PLAIN)
    weights = None if None in table.values() else tuple(np.divide(list(table.values()), sum(table.values())).tolist())
    policy = Policy(tuple(table), weights, **given)
    if weights and policy.n > len(table):
        raise ValueError(f"{text!r}: n{policy.n} draws without replacement from the {len(table)} ops of t{name}")
    return policy


def _read_value(kind: Part, part: str, value: str, text: str) -> Any:
    try:
        read = kind.read(value)
    except ValueError:
        read = None
    if read is None or not kind.allows(read):
        raise ValueError(f"{text!r}: in {part!r}, {kind.words}")
    return read


@register_op("randaug")
@dataclasses.dataclass(frozen=True)
class RandAug(PixelOp):
    """RandAugment on [h w c], grey or RGB: `n` ops chosen uniformly of 15, each applied with probability `p`.

    `config_str` is timm's: m (10), mstd (0), mmax (10), n (2), p (0.5), inc (0), t (transform set: "3a", "3aw",
    "weights"; weighted ones are drawn without replacement). The magnitude of each op is N(m, mstd), clipped to
    0 … mmax; with mstd above 100 or inf it is U(0, m). What timm passes over in silence is an error here: a
    part without a number, an unknown set, a part given twice; and `mstdinf`, which it documents and skips, is uniform.

    Pixels that come in from outside are `fill` (ImageNet's mean, as from timm's `create_transform`), in a grey image
    its mean. `method` resamples what is turned, sheared or moved; DeiT sets bicubic; None or "random" draws bilinear or
    bicubic for each op, as timm does where no interpolation is set.

    Attributes:
        config_str: the string that says what is drawn.
        fill: colour of the pixels that come in from outside, 0 to 255.
        method: the way of resampling: "bicubic", "bilinear", or one of them at random ("random" or None).
    """

    config_str: str
    fill: tuple[int, int, int] = (124, 116, 104)
    method: Literal["bicubic", "bilinear", "random"] | None = "bicubic"

    def check(self) -> None:
        """Refuse a string that cannot be read, and a colour that is none."""
        read_policy(self.config_str)
        if not all(0 <= value <= 255 for value in self.fill):
            raise ValueError(f"fill must have values from 0 to 255, got {self.fill}")

    @functools.cached_property
    def policy(self) -> Policy:
        """What `config_str` says."""
        return read_policy(self.config_str)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image augmented."""
        if image.mode not in ("RGB", "L"):
            raise ValueError(f"takes grey or RGB images, got one of mode {image.mode}; decode makes it RGB")
        fill = self.fill if image.mode == "RGB" else round(sum(self.fill) / 3)
        for name in self.policy.choose(rng):
            kind = TRANSFORMS[name]
            level, sign = self.policy.magnitude(rng) / LEVELS, 1 if rng.random() < 0.5 else -1
            image = kind.apply(image, kind.argument(level, sign), Sampling(self._resample(rng), fill))
        return image

    def _resample(self, rng: np.random.Generator) -> Image.Resampling:
        if self.method in (None, "random"):
            return METHODS["bilinear" if rng.random() < 0.5 else "bicubic"]
        return METHODS[self.method]
