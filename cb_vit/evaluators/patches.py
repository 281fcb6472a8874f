"""Patches and tiles of images: which are hidden first, hiding some of them, and shuffling them."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


class Looks(NamedTuple):
    """What is drawn for the images of a batch.

    Attributes:
        ranks: when each patch is hidden, 0 first, by way: int32 [b gy gx] each.
        places: where each tile comes from, by the number of rows and columns t: int32 [b t·t] each.
    """

    ranks: dict[str, Any]
    places: dict[int, Any]


def draw_looks(
    ways: Sequence[str], shuffled: Sequence[int], model: Any, pixels: Float[Array, "b y x c"], keys: Key[Array, " b"],
    has_class_token: bool,
) -> Looks:
    """What is drawn for the images of a batch.

    Args:
        ways: names of the orders in which patches are hidden.
        shuffled: numbers of rows and columns of the tiles that are shuffled.
        model: function from pixels, and options of the model's call, to (logits, out).
        pixels: pixels from 0 to 255.
        keys: a key for each image.
        has_class_token: whether the first token is a class token.
    """
    grid = jax.eval_shape(model, pixels)[1]["stem"].shape[1:3]
    salient = {"salient", "non_salient"} & set(ways)
    salience = _salience(model, pixels, grid, has_class_token) if salient else None
    # The distance of each patch's middle from that of the image.
    y, x = np.mgrid[:grid[0], :grid[1]]
    distance = ((y + 0.5) / grid[0] - 0.5) ** 2 + ((x + 0.5) / grid[1] - 0.5) ** 2
    distance = jnp.broadcast_to(jnp.asarray(distance, jnp.float32), (len(keys), *grid))
    first = {  # patches with the lowest value are hidden first
        "random": lambda: jax.vmap(lambda key: jax.random.uniform(_stream(key, 0), grid))(keys),
        "centre": lambda: distance, "outer": lambda: -distance,
        "salient": lambda: -salience, "non_salient": lambda: salience}
    ranks = {way: jnp.argsort(jnp.argsort(first[way]().reshape(len(keys), -1), axis=1), axis=1).reshape(-1, *grid)
             for way in ways}
    places = {tiles: jax.vmap(lambda key, tiles=tiles: jax.random.permutation(_stream(key, tiles), tiles**2))(keys)
              for tiles in shuffled}
    return Looks(ranks, places)


def _stream(key: Key[Array, ""], number: int) -> Key[Array, ""]:
    return jax.random.fold_in(key, number)


def _salience(model: Any, pixels: Float[Array, "b y x c"], grid: tuple[int, int], has_class_token: bool
              ) -> Float[Array, "b gy gx"]:
    """How much each patch matters to the model."""
    if has_class_token:
        _, out = model(pixels, attention=lambda probabilities: jnp.mean(probabilities[:, :, 0], axis=1))
        last = max((name for name in out["encoder"] if name.startswith("block")), key=lambda name: (len(name), name))
        return out["encoder"][last]["attention"][:, -math.prod(grid):].reshape(-1, *grid)
    slope = jax.grad(lambda pixels: jnp.sum(jnp.max(model(pixels)[0].astype(jnp.float32), axis=1)))(pixels)
    return jnp.sum(jnp.abs(_cut(slope, grid)), axis=(2, 4, 5))


def hidden(share: float, patches: int) -> int:
    """Number of patches that are a share of them, rounded down; 0.29 of 100 are 29, whatever floats make of it."""
    return int(share * patches + 1e-9)


def hide(
    pixels: Float[Array, "b y x c"], gone: Bool[Array, "b gy gx"], fill: Float[np.ndarray, " c"]
) -> Float[Array, "b y x c"]:
    """Images without some of their patches.

    Args:
        pixels: the images.
        gone: whether each patch is hidden.
        fill: the pixel that is in its place.
    """
    patches = _cut(pixels, gone.shape[1:])
    found = jnp.where(gone[:, :, None, :, None, None], jnp.asarray(fill).reshape(1, 1, 1, 1, 1, -1), patches)
    return found.reshape(pixels.shape)


def shuffle(
    pixels: Float[Array, "b y x c"], places: Int[Array, "b tt"], tiles: int
) -> Float[Array, "b y x c"]:
    """Images of which each tile is another one.

    Args:
        pixels: the images.
        places: where each tile comes from, row by row.
        tiles: number of rows and columns of tiles.
    """
    cut = jnp.moveaxis(_cut(pixels, (tiles, tiles)), 3, 2)
    flat = cut.reshape(len(pixels), tiles**2, -1)
    moved = jnp.take_along_axis(flat, places[..., None], axis=1).reshape(cut.shape)
    return jnp.moveaxis(moved, 2, 3).reshape(pixels.shape)


def _cut(pixels: Float[Array, "b y x c"], grid: tuple[int, int]) -> Float[Array, "b gy py gx px c"]:
    b, y, x, c = pixels.shape
    return pixels.reshape(b, grid[0], y // grid[0], grid[1], x // grid[1], c)
