"""How dense attention is: each measure, as the numbers that one image gives; `docs/density.md` has the formulas.

A map is reduced where it is made, so that no map outlives its block: `model.apply(…, attention=density)`.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cb_vit.config import ConfigError

QUERIES, KEYS = ("all", "patches", "prefix"), ("all", "patches")
TINY = float(np.finfo(np.float32).tiny)  # below it, processors may take a number for 0
Rows = Mapping[str, Float[Array, "b h n"]]  # by the name of a measure, what each query gives; inf: not defined


class Scale(NamedTuple):
    """The axis on which the values of a measure are told apart evenly.

    Attributes:
        forth: function from a value to its place on the axis.
        back: its inverse.
    """

    forth: Callable[[Any], Any]
    back: Callable[[Any], Any]


LINEAR, LOG, ROOT = Scale(np.copy, np.copy), Scale(np.log, np.exp), Scale(np.sqrt, np.square)


class Measure(NamedTuple):
    """What is known of a measure before anything is measured.

    Attributes:
        bounds: function from the numbers of queries and of keys and k of `Density` to the least and the greatest value.
        scale: the axis of its values.
    """

    bounds: Callable[[int, int, int], tuple[float, float]]
    scale: Scale = LINEAR


MEASURES = {
    "entropy": Measure(lambda q, n, k: (0, math.log(n))),
    "entropy_normalised": Measure(lambda q, n, k: (0, 1)),
    "effective_tokens": Measure(lambda q, n, k: (1, n), LOG),
    "top_k_mass": Measure(lambda q, n, k: (min(k / n, 1), 1)),
    "distance_from_uniform": Measure(lambda q, n, k: (0, 1 - 1 / n)),
    "rank": Measure(lambda q, n, k: (1, min(q, n)), LOG),
    "jacobian": Measure(lambda q, n, k: (0, 1 / 4), ROOT)}
DISTANCE = "attention_distance"  # in pixels; from patches to patches alone


class Series(NamedTuple):
    """One number that every image gives, of every block and head.

    Attributes:
        queries: the tokens over which it is averaged, one of `QUERIES`.
        keys: the tokens among which attention is shared out, one of `KEYS`.
        measure: its name.
        low, high: the least and the greatest value that there can be.
        scale: the axis of its values.
    """

    queries: str
    keys: str
    measure: str
    low: float
    high: float
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Density:
    """The measures of a model's attention; calling it reduces a map.

    Attributes:
        grid: rows and columns of patches, which are the last tokens.
        patch: (height, width) of a patch in pixels.
        prefix: number of tokens before the patches: class and distillation token, registers.
        top_k: k of `top_k_mass`.

    Raises:
        ConfigError: there is one patch, which has nothing to share attention with; raised at "images".
    """

    grid: tuple[int, int]
    patch: tuple[int, int]
    prefix: int
    top_k: int

    def __post_init__(self):
        if self.patches < 2:
            raise ConfigError("images", "make one patch, and attention between patches needs two; take larger images")

    @classmethod
    def of(cls, out: Mapping[str, Any], image_size: tuple[int, int], top_k: int) -> Density:
        """The measures for a model by the shapes of its intermediates.

        Args:
            out: the intermediates, or their shapes.
            image_size: (height, width) in pixels of the images that gave them.
            top_k: k of `top_k_mass`.
        """
        grid, tokens = out["stem"].shape[1:3], out["encoded"].shape[1]
        patch = tuple(size // count for size, count in zip(image_size, grid, strict=True))
        return cls(tuple(grid), patch, tokens - math.prod(grid), top_k)

    @property
    def patches(self) -> int:
        """Number of patches."""
        return math.prod(self.grid)

    @functools.cached_property
    def series(self) -> tuple[Series, ...]:
        """What the numbers of an image are, in their order."""
        tokens = {"all": self.prefix + self.patches, "patches": self.patches, "prefix": self.prefix}
        found = [Series(queries, keys, name, *measure.bounds(tokens[queries], tokens[keys], self.top_k), measure.scale)
                 for queries, keys in self._pairs for name, measure in MEASURES.items()]
        return (*found, Series("patches", "patches", DISTANCE, 0, float(self.distances.max()), LINEAR))

    @functools.cached_property
    def distances(self) -> Float[np.ndarray, "p p"]:
        """Distances in pixels between the centres of patches."""
        centres = np.stack(np.mgrid[:self.grid[0], :self.grid[1]], -1).reshape(-1, 2) * np.array(self.patch)
        return np.sqrt(np.square(centres[:, None] - centres[None]).sum(-1))

    def __call__(self, attention: Float[Array, "b h n n"]) -> Float[Array, "b h s"]:
        """The numbers of each image and head, in the order of `series`; inf: there is none.

        A query that gives the patches no attention at all has none over them, and does not count there.

        Args:
            attention: the probabilities, from each query to each key. Rows are divided by their sum, as what was
                rounded to bfloat16 does not sum to 1.
        """
        before, patches = attention[..., :self.prefix], attention[..., self.prefix:]
        mass = jnp.sum(patches, axis=-1)
        whole = mass + jnp.sum(before, axis=-1)
        share, before = mass / whole, before / whole[..., None]
        # Normalised at once: the squares of small shares would be lost, and differences to a whole map would cancel.
        inside = patches / jnp.maximum(mass, TINY)[..., None]
        none = mass < TINY  # false for NaN, which stays what it is
        square, cube = jnp.sum(inside**2, axis=-1), jnp.sum(inside**3, axis=-1)
        entropy = -jnp.sum(_p_log_p(inside), axis=-1)
        top = jax.lax.top_k(inside, min(self.top_k, self.patches))[0]
        rows = {"patches": self._rows(self.patches, entropy, square, cube, top, _off(inside, self.patches))}
        rows["patches"] = {name: jnp.where(none, jnp.inf, value) for name, value in rows["patches"].items()}
        grams, squares = {"patches": _gram(inside)}, {"patches": square}

        # Over all keys by what the two parts give, as in the chain rule of entropy.
        n, scaled = self.prefix + self.patches, share[..., None]
        entropy = share * entropy - _p_log_p(share) - jnp.sum(_p_log_p(before), axis=-1)
        square = share**2 * square + jnp.sum(before**2, axis=-1)
        cube = share**3 * cube + jnp.sum(before**3, axis=-1)
        top = jnp.concatenate([before, scaled * top], axis=-1)
        top = jax.lax.top_k(top, min(self.top_k, top.shape[-1]))[0]
        rows["all"] = self._rows(n, entropy, square, cube, top, _off(scaled * inside, n) + _off(before, n))
        grams["all"] = grams["patches"] * scaled * share[..., None, :] + _gram(before)
        squares["all"] = square

        found = []
        for queries, keys in self._pairs:
            where = self._of(queries)
            rank = _rank(squares[keys][..., where], grams[keys][..., where, where])
            found += [rank if name == "rank" else _mean(rows[keys][name][..., where]) for name in MEASURES]
        return jnp.stack([*found, self._pixels(inside[..., self.prefix:, :], none[..., self.prefix:])], axis=-1)

    def _pixels(self, inside: Float[Array, "b h p p"], none: Bool[Array, "b h p"]) -> Float[Array, "b h"]:
        """Mean distance over the queries that have one, as a contraction with a fixed matrix; inf: none has."""
        # At full precision, as TPUs would multiply in bfloat16.
        total = jnp.einsum("bhqk,qk->bh", inside, jnp.asarray(self.distances, jnp.float32), precision="highest")
        number = jnp.sum(~none, axis=-1)
        return jnp.where(number == 0, jnp.inf, total / jnp.maximum(number, 1))

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        return list(itertools.product(QUERIES if self.prefix else QUERIES[:2], KEYS))

    def _of(self, tokens: str) -> slice:
        return {"all": slice(None), "patches": slice(self.prefix, None), "prefix": slice(self.prefix)}[tokens]

    def _rows(self, n: int, entropy: Array, square: Array, cube: Array, top: Array, off: Array) -> Rows:
        """What each query gives, by what its n probabilities sum to."""
        entropy = jnp.maximum(entropy, 0)  # rounding may leave less
        return {"entropy": entropy, "entropy_normalised": entropy / math.log(n), "effective_tokens": jnp.exp(entropy),
                "top_k_mass": jnp.sum(top, axis=-1), "distance_from_uniform": off,
                "jacobian": jnp.maximum(square - 2 * cube + square**2, 0)}


def by_block(encoder: Mapping[str, Any]) -> Float[Array, "b l h s"]:
    """What `Density` made of the attention of each block, put together.

    Args:
        encoder: the model's intermediates `out["encoder"]`.
    """
    blocks = sorted((name for name in encoder if name.startswith("block")), key=lambda name: int(name[len("block"):]))
    return jnp.stack([encoder[name]["attention"] for name in blocks], axis=1)


def _p_log_p(p: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    return p * jnp.log(jnp.maximum(p, TINY))  # 0 where p is 0


def _off(p: Float[Array, "*b m"], n: int) -> Float[Array, "*b"]:
    """What some of n keys add to the total variation distance from uniform."""
    return jnp.sum(jnp.abs(p - 1 / n), axis=-1) / 2


def _gram(p: Float[Array, "b h n m"]) -> Float[Array, "b h n n"]:
    return jnp.einsum("bhnm,bhkm->bhnk", p, p, precision="highest")


def _rank(squares: Float[Array, "b h q"], gram: Float[Array, "b h q q"]) -> Float[Array, "b h"]:
    """Participation ratio (tr AᵀA)² / tr (AᵀA)² of A; inf: A is 0.

    Args:
        squares: the squared norm of each row of A.
        gram: AAᵀ, whose squares sum to as much as those of AᵀA.
    """
    trace = jnp.sum(squares, axis=-1)
    return jnp.where(trace == 0, jnp.inf, trace**2 / jnp.sum(gram**2, axis=(-2, -1)))


def _mean(values: Float[Array, "b h q"]) -> Float[Array, "b h"]:
    """Mean over the queries that have a value; inf: none has."""
    has = values != jnp.inf
    number = jnp.sum(has, axis=-1)
    return jnp.where(number == 0, jnp.inf, jnp.sum(jnp.where(has, values, 0), axis=-1) / jnp.maximum(number, 1))
