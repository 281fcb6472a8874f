"""Position embeddings for another grid of patches, and patch embeddings for another size of patch or other channels.

Checkpoints are fine-tuned at resolutions that they were not trained at, and every codebase has its own way
to stretch the grid, none of which gives the numbers of another (torch's cubic and timm's differ by tenths of the
embedding's spread). All are separable and linear: a matrix for each of the two axes.
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cb_vit.config import ConfigError
from cb_vit.registry import Registry

Grid = tuple[int, int]
# Each (size before, size after) → weights [after, before].
METHODS = Registry("way to resample position embeddings")


def resample_posemb(
    posemb: Float[Array, "1 n d"], grid: Grid, method: str = "bicubic_antialias", source: Grid | None = None
) -> Float[Array, "1 m d"]:
    """Stretch the embeddings of a grid of patches onto another grid.

    Args:
        posemb: the embeddings of a grid's n patches, row by row, without class or distillation token.
        grid: rows and columns of the new grid.
        method: one of the names in `METHODS`.
        source: rows and columns of the old grid; None: a square.

    Returns:
        [1, rows·columns, d], in the dtype of `posemb`; computed in float32.

    Raises:
        ConfigError: the method is unknown, or `source` is not given and n is no square.
    """
    weights = METHODS.pick(method, "posemb_resize")
    rows, columns = source or square(posemb.shape[1])
    matrices = [weights(before, after) for before, after in zip((rows, columns), grid, strict=True)]
    x = _apply(matrices, posemb.astype(jnp.float32).reshape(rows, columns, -1))
    return x.reshape(1, math.prod(grid), -1).astype(posemb.dtype)


def resample_patch(
    kernel: Float[Array, "p q c d"], patch: Grid, method: str = "bicubic_antialias"
) -> Float[Array, "r s c d"]:
    """The kernel of a patch embedding for patches of another size: FlexiViT's pseudo-inverse resize.

    With B the map that resizes a patch, the new kernel w' is such that ⟨w', B x⟩ is ⟨w, x⟩, for every x where patches
    grow and else as nearly as can be: w' = (Bᵀ)⁺ w (arXiv 2212.08013, section 3.4; timm's `resample_patch_embed`).

    Args:
        kernel: the kernel for patches of p × q pixels.
        patch: height and width of the new patches, in pixels.
        method: one of the names in `METHODS`, the way in which patches are thought to be resized.

    Returns:
        The kernel for the new patches, in the dtype of `kernel`; computed in float32.

    Raises:
        ConfigError: the method is unknown.
    """
    weights = METHODS.pick(method, "posemb_resize")
    # The pseudo-inverse of a Kronecker product is that of pseudo-inverses: each axis has its own.
    matrices = [np.linalg.pinv(weights(before, after).T) for before, after in zip(kernel.shape[:2], patch, strict=True)]
    return _apply(matrices, kernel.astype(jnp.float32)).astype(kernel.dtype)


def adapt_channels(kernel: Float[Array, "p q 3 d"], channels: int) -> Float[Array, "p q c d"]:
    """The kernel of an RGB patch embedding for images of another number of channels: timm's `adapt_input_conv`.

    One channel gets the sum of the three kernels, so that grey pixels give what they gave three times over. More (or
    two) get red, green, blue, red, … scaled by 3 / channels, a beginning for training and not the same function.
    """
    if channels == 1:
        return jnp.sum(kernel, axis=2, keepdims=True)
    return jnp.tile(kernel, (1, 1, math.ceil(channels / 3), 1))[:, :, :channels] * (3 / channels)


def _apply(matrices: list[np.ndarray], x: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """One matrix [after, before] for each of the first axes of `x`."""
    for axis, matrix in enumerate(matrices):
        matrix = jnp.asarray(matrix, jnp.float32)
        # TPUs multiply float32 matrices in bfloat16 unless told otherwise.
        x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
    return x


def square(patches: int) -> Grid:
    """The square grid of so many patches.

    Raises:
        ConfigError: the number is no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError("pos_embedding", f"its {patches} patches are no square, and nothing says what grid they are")
    return side, side


@METHODS.register("bicubic_antialias")
def _bicubic_antialias(before: int, after: int) -> np.ndarray:
    """Keys' cubic, widened where the grid shrinks: timm on its own checkpoints, PIL, `jax.image.resize`."""
    at, patches = _half_pixel_centres(before, after), np.arange(before)
    weights = _cubic((at[:, None] - patches[None]) / max(before / after, 1), a=-0.5)
    # At the border part of the kernel lies outside the grid, so its weights are made to sum to 1 again.
    return weights / weights.sum(axis=1, keepdims=True)


@METHODS.register("bicubic")
def _bicubic(before: int, after: int) -> np.ndarray:
    """DeiT's own fine-tuning: torch's `F.interpolate(mode="bicubic", align_corners=False)`, the border repeated."""
    at = _half_pixel_centres(before, after)
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)[None]
    weights = np.zeros((after, before))
    rows = np.arange(after)[:, None]
    # Added, as several taps beyond the border fall on the same patch.
    np.add.at(weights, (rows, taps.clip(0, before - 1)), _cubic(at[:, None] - taps, a=-0.75))
    return weights


@METHODS.register("linear")
def _linear(before: int, after: int) -> np.ndarray:
    """big_vision and vision_transformer: `scipy.ndimage.zoom(order=1)`, corners onto corners."""
    at, patches = np.linspace(0, before - 1, after), np.arange(before)
    return np.maximum(0, 1 - np.abs(at[:, None] - patches[None]))


def _half_pixel_centres(before: int, after: int) -> np.ndarray:
    """Where the centres of the new patches lie, in old patches."""
    return (np.arange(after) + 0.5) * before / after - 0.5


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution kernel (Keys, 1981) of slope `a` at distance 1; his is -½, torch's without antialias -¾."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
