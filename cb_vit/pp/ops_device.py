"""Arithmetic on batches of pixels and labels, inside the jitted step (big_vision does it on the host)."""
from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer, Num


def value_range(
    image: Num[Array, "b h w c"],
    vmin: float = -1.0,
    vmax: float = 1.0,
    in_min: float = 0.0,
    in_max: float = 255.0,
    clip_values: bool = False,
) -> Float32[Array, "b h w c"]:
    """Map [in_min, in_max] linearly to [vmin, vmax]; same arithmetic as big_vision's op.

    Args:
        image: the pixels, uint8 (or float32, after another op of this file).
        vmin: value that `in_min` becomes.
        vmax: value that `in_max` becomes.
        in_min: lower end of the input range.
        in_max: upper end of the input range.
        clip_values: whether the result is clipped to [vmin, vmax]; only of use when the input range is narrower than
            the data.
    """
    image = (image.astype(jnp.float32) - in_min) / (in_max - in_min)
    image = vmin + image * (vmax - vmin)
    return jnp.clip(image, vmin, vmax) if clip_values else image


def vgg_value_range(
    image: Num[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[Array, "b h w c"]:
    """`(image - mean) / std`, one mean and std a channel, in units of 0 to 255 as in big_vision.

    timm and torchvision write the same numbers in units of 0 to 1, after dividing the pixels by 255.

    Args:
        image: the pixels, uint8 (or float32, after another op of this file).
        mean: mean of each channel.
        std: standard deviation of each channel.
    """
    if len(mean) != image.shape[-1]:
        raise ValueError(f"vgg_value_range has {len(mean)} channels, the image {image.shape[-1]}; "
                         f"give mean and std with one value a channel")
    centre, spread = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return (image.astype(jnp.float32) - centre) / spread


def onehot(
    labels: Integer[Array, " b"] | Integer[Array, "b n"],
    depth: int,
    multi: bool = True,
    on: float = 1.0,
    off: float = 0.0,
) -> Float32[Array, "b c"] | Float32[Array, "b n c"]:
    """Rows of `depth` values: `on` at the label, `off` elsewhere.

    Args:
        labels: class numbers; -1 (padding, or no label) lights nothing. A number that is out of range
            lights nothing either: the host refuses it beforehand.
        depth: number of classes, c.
        multi: whether several labels of one example, [b n], share one row, [b c]; False: each has its own, [b n c].
        on: value at a label.
        off: value elsewhere.
    """
    classes = jnp.arange(depth, dtype=jnp.int32).reshape((1,) * labels.ndim + (depth,))
    hit = labels[..., None] == classes
    if multi and labels.ndim > 1:
        hit = hit.any(axis=1)
    return jnp.where(hit, jnp.float32(on), jnp.float32(off))
