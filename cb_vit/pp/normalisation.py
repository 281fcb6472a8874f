"""How the pixels that a model is given were normalised."""
from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cb_vit.config import ConfigError

Tree = Any


class Normalisation(NamedTuple):
    """What a model takes of a pixel v from 0 to 1: (v - mean) / std.

    Attributes:
        mean: one number a channel.
        std: the same.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, value: Any, channels: int) -> Normalisation:
        """(mean, std), whoever says it, checked and with one number for each channel.

        Raises:
            ConfigError: it is something else; says what is expected.
        """
        try:
            mean, std = (_numbers(part, channels) for part in value)
            if min(std) > 0:
                return cls(mean, std)
        except (TypeError, ValueError, OverflowError):
            pass
        raise ConfigError("normalisation", "expected (mean, std) with a number for each channel, std above 0, such as "
                                           f"{((0.5,) * channels,) * 2}; got {value!r}")

    def __repr__(self) -> str:
        return repr(tuple(self))  # as it is given in a call

    @property
    def text(self) -> str:
        """In words, one number where all channels have the same."""
        mean, std = (f"{values[0]:g}" if len(set(values)) == 1 else "(" + ", ".join(f"{v:g}" for v in values) + ")"
                     for values in self)
        return f"(v - {mean}) / {std} of v from 0 to 1"

    @property
    def op(self) -> str:
        """The op of a preprocessing string that normalises so."""
        mean, std = self.rounded(9, 255)
        return f"vgg_value_range({mean}, {std})"

    def rounded(self, digits: int, factor: float = 1) -> Normalisation:
        """The same times `factor`, in so many significant digits."""
        return Normalisation(*(tuple(float(f"{factor * value:.{digits}g}") for value in values) for values in self))

    def same(self, other: Normalisation) -> bool:
        """Whether the two are equal but for rounding."""
        return np.shape(self) == np.shape(other) and np.allclose(self, other, rtol=1e-5, atol=1e-6)

    def to(self, trained: Normalisation) -> tuple[np.ndarray, np.ndarray]:
        """(scale, shift), float32 [c] each: pixels normalised so, times scale, plus shift, are as in training."""
        (mean, std), (new_mean, new_std) = (np.asarray(pair, np.float64) for pair in (trained, self))
        return (new_std / std).astype(np.float32), ((new_mean - mean) / std).astype(np.float32)

    def fold(self, params: Tree, trained: Normalisation) -> Tree:
        """Parameters of the same model for images normalised so, changed in the patch embedding alone.

        A model that takes x = (v - mean) / std of v from 0 to 1 computes W x + b of each patch; of x' = (v - mean') /
        std' that is W (std' / std) x' + b + Σ W (mean' - mean) / std.

        Args:
            params: our names.
            trained: that of the images in training.
        """
        kernel, bias = params["embedding"]["kernel"], params["embedding"]["bias"]
        scale, shift = (values.reshape(1, 1, -1, 1) for values in self.to(trained))
        folded = {"kernel": kernel * scale, "bias": bias + (kernel * shift).sum(axis=(0, 1, 2))}
        return {**params, "embedding": folded}


def _numbers(part: Any, channels: int) -> tuple[float, ...]:
    found = tuple(part) if isinstance(part, Iterable) else (part,)
    real = all(isinstance(number, numbers.Real) and not isinstance(number, bool) for number in found)
    if len(found) not in (1, channels) or not real or not all(map(math.isfinite, found)):
        raise ValueError
    return tuple(map(float, found)) * (channels if len(found) == 1 else 1)


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalisation((0.5,) * 3, (0.5,) * 3)  # pixels from -1 to 1
