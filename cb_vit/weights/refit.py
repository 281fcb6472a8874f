"""A trained model made to fit: for images of another size or other channels, or without its head.

The functions of `weights` take and give a `cb_vit.weights.Weights`, whose parameters are still to be read.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cb_vit import retry
from cb_vit.config import ConfigError
from cb_vit.models.resample import adapt_channels, resample_posemb
from cb_vit.models.vit import patch_grid
from cb_vit.pp.normalisation import Normalisation
from cb_vit.weights.dialects.cards import pair
from cb_vit.weights.dialects.images import for_size

Tree = Any
W = TypeVar("W")
HEADS = ("head", "head_dist")


def with_classes(weights: W, num_classes: int) -> W:
    """The same model; without its heads, if no classes are asked for.

    Raises:
        ConfigError: the number is neither 0 nor the model's own; raised at "num_classes".
    """
    own = weights.model.num_classes or 0
    if num_classes == own:
        return weights
    if num_classes or isinstance(num_classes, bool):
        raise ConfigError("num_classes", f"{num_classes!r} is asked for, but {weights} has {own} classes; 0 leaves its "
                                         "head there, and merge puts the rest into a model of yours")
    heads = {name: weights.shapes[name] for name in HEADS if name in weights.shapes}

    def fetch(like: Tree) -> Tree:
        anywhere = _whole(jax.tree.leaves(like)[0].sharding)
        read = weights.fetch(like | jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=anywhere), heads))
        return {name: leaf for name, leaf in read.items() if name not in heads}

    return dataclasses.replace(
        weights, model=weights.model.clone(num_classes=None), fetch=fetch, class_names=None,
        shapes={name: leaf for name, leaf in weights.shapes.items() if name not in heads},
        notes=(*weights.notes, f"its {own} classes are left there with {' and '.join(heads)}, as num_classes=0 asks"))


def with_channels(weights: W, channels: int) -> W:
    """The same model for images of so many channels; see `models.resample.adapt_channels`.

    Grey pixels are normalised alike in all three places where they stand for red, green and blue, so other mean and
    std for each are folded into the patch embedding first: one channel gives exactly what grey RGB gave.

    Raises:
        ConfigError: the number is not the model's own, and the model is not of RGB images or the number is not at
            least 1; raised at "channels".
    """
    own = weights.channels
    if channels == own:
        return weights
    if own != 3 or type(channels) is not int or channels < 1:
        raise ConfigError("channels", f"{channels!r} is asked for, but {weights} is of images with {own}; only a model "
                                      "of three is adapted, to one or more")
    trained = weights.normalisation
    after, common, note = _normalisation(trained, channels)

    def adapt(embedding: Tree) -> Tree:
        if common is not None:
            embedding = common.fold({"embedding": embedding}, trained)["embedding"]
        return {**embedding, "kernel": adapt_channels(embedding["kernel"], channels)}

    return dataclasses.replace(
        _changed(weights, "embedding", adapt), normalisation=after, pp=None, notes=(*weights.notes, note))


def with_image_size(weights: W, image_size: Any) -> W:
    """The same model for images of another size; learned positions are resampled onto its grid, as in `merge`.

    Args:
        weights: the model.
        image_size: side of the images in pixels, or (height, width).

    Raises:
        ConfigError: the size is none, or the model's patches do not divide it; raised at "image_size".
    """
    try:
        size = pair(image_size)
    except retry.PARSING:
        raise ConfigError("image_size", f"expected pixels, such as 224 or (224, 320), got {image_size!r}") from None
    patch, config = weights.model.config.patch_size, weights.model.config
    if any(side % p for side, p in zip(size, patch, strict=True)):
        near = tuple(max(1, round(side / p)) * p for side, p in zip(size, patch, strict=True))
        raise ConfigError("image_size", f"{size[0]}×{size[1]} is asked for, but the patches of {weights} are "
                                        f"{patch[0]}×{patch[1]}, which do not divide it; take {near[0]}×{near[1]}")
    before, grid = weights.grid, patch_grid(config, size)
    found = dataclasses.replace(weights, grid=grid, pp=weights.pp and for_size(weights.pp, size))
    if grid == before or "pos_embedding" not in weights.shapes:
        return found
    note = f"its positions are resampled from {before[0]}×{before[1]} to {grid[0]}×{grid[1]}, as image_size asks"
    resample = lambda posemb: resample_posemb(posemb, grid, source=before)  # noqa: E731
    return dataclasses.replace(_changed(found, "pos_embedding", resample), notes=(*weights.notes, note))


def _changed(weights: W, name: str, change: Callable[[Tree], Tree]) -> W:
    """The same model with a top-level entry of its parameters changed, which is read whole for that."""
    stored = weights.shapes[name]

    def fetch(like: Tree) -> Tree:
        target = like[name]
        anywhere = _whole(jax.tree.leaves(target)[0].sharding)
        whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=anywhere), stored)
        read = weights.fetch({**like, name: whole})
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        return {**read, name: jax.jit(change, out_shardings=shardings)(read[name])}

    return dataclasses.replace(
        weights, fetch=fetch, shapes={**weights.shapes, name: jax.eval_shape(change, stored)})


def _normalisation(
    trained: Normalisation | None, channels: int
) -> tuple[Normalisation | None, Normalisation | None, str]:
    """The normalisation of the adapted model, the one of three channels to be folded in before, if any, and a note."""
    if channels > 1:
        note = f"three channels are spread over {channels} (timm's rule): a beginning, and not the same function"
        cycle = lambda values: tuple(itertools.islice(itertools.cycle(values), channels))  # noqa: E731
        return trained and Normalisation(*map(cycle, trained)), None, note
    note = "the kernels of three channels are summed into one (timm's rule), for grey pixels"
    if trained is None:
        return None, None, note
    mean, std = (float(np.mean(values)) for values in trained)
    grey, common = Normalisation((mean,), (std,)), Normalisation((mean,) * 3, (std,) * 3)
    if common.same(trained):
        return grey, None, note
    return grey, common, f"{note}, of mean {mean:g} and std {std:g}, which is folded into the embedding"


def _whole(sharding: Any) -> Any:
    """A sharding on the same devices for an array that is whole on each."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
