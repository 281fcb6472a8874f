"""Where a model looks: attention maps over the image, attention rollout, and their pictures.

A map is in multiples of uniform attention: 1 everywhere says that every token is attended to alike.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from cb_vit.models.vit_config import Config
from cb_vit.monitor.style import FAINT, INK, to_png

COLOURS = "inferno"  # perceptually uniform
COLUMNS = 7
MOST_HEADS = 16  # more would be too small to see
TILE, GAP, LINE, TOP, MARGIN, BAR = 1.9, 0.12, 0.32, 0.98, 0.15, 0.75  # inches
SIDE = 224  # pixels, at least, of a picture


def reading_tokens(config: Config) -> slice:
    """The tokens that the head reads: class and distillation tokens where it reads these, else all tokens.

    Args:
        config: the model's resolved settings.
    """
    if config.pool_type in ("tok", "0"):
        return slice(0, 2 if config.distilled else 1)
    return slice(None)


def patch_map(attention: Float[Array, "*b n n"], queries: slice, grid: tuple[int, int]) -> Float[Array, "*b gy gx"]:
    """How much the tokens `queries` attend to each patch, on average over them.

    Args:
        attention: the probabilities, from each query to each token; patches come last, row by row.
        queries: the tokens that attend.
        grid: rows and columns of patches.

    Returns:
        Multiples of uniform attention: share × n. What goes to class tokens is left out, so that the mean is below 1
        where much of it does.
    """
    shares = jnp.mean(attention[..., queries, -math.prod(grid):], axis=-2) * attention.shape[-1]
    return shares.reshape(*shares.shape[:-1], *grid)


def rollout(attentions: Sequence[Float[Array, "*b h n n"]]) -> Float[Array, "*b n n"]:
    """Attention rollout (Abnar & Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928).

    The product over all blocks of ½ (A + I), with A the mean over heads and I for the residual connection: how much of
    each token's input has reached each token's output, were all else per token and linear. It leaves out the values,
    the norms and the MLPs; and as Context Broadcasting stands in the MLP, it leaves out the uniform mixing
    ½ (I + 11ᵀ/n) that CB adds to it: with CB, more of every token reaches every other than a rollout shows.

    Args:
        attentions: the attention probabilities of each block, first to last.

    Returns:
        The shares of the inputs (columns) in the outputs (rows); each row sums to 1.
    """
    n = attentions[0].shape[-1]
    flow = jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (*attentions[0].shape[:-3], n, n))
    for attention in attentions:
        mean = jnp.mean(attention, axis=-3)
        # At full precision, as TPUs would multiply in bfloat16 and rows would no longer sum to 1.
        flow = (jnp.matmul(mean, flow, precision="highest") + flow) / 2
    return flow


@dataclasses.dataclass(frozen=True)
class View:
    """Which maps to look at: the mean over heads of each block; the heads too, where it is one block of not too many.

    Attributes:
        config: the model's resolved settings.
        grid: rows and columns of patches.
        layers: numbers of the blocks to show, from 0.
        rollout: whether the rollout through all blocks is shown as well.
    """

    config: Config
    grid: tuple[int, int]
    layers: tuple[int, ...]
    rollout: bool = False

    @property
    def heads(self) -> int:
        """Number of heads that are shown on their own."""
        return self.config.num_heads if len(self.layers) == 1 and 1 < self.config.num_heads <= MOST_HEADS else 0

    @property
    def who(self) -> str:
        """Whose attention is shown, in words."""
        if self.config.pool_type == "tok":
            return "the class and distillation tokens" if self.config.distilled else "the class token"
        return "the first token" if self.config.pool_type == "0" else "all tokens, on average"

    @property
    def titles(self) -> tuple[str, ...]:
        """The title of each map, in the order of `maps`."""
        blocks = [f"block {i}" + ", mean of heads" * bool(self.heads) for i in self.layers]
        return (*["rollout"] * self.rollout, *blocks, *(f"head {i}" for i in range(self.heads)))

    def maps(self, encoder: Mapping[str, Any]) -> Float[Array, "b maps gy gx"]:
        """The maps of a batch, in multiples of uniform attention.

        Args:
            encoder: the model's intermediates `out["encoder"]`, with attention.
        """
        attentions = [encoder[f"block{i:02d}"]["attention"] for i in range(self.config.depth)]
        shown = [rollout(attentions)] * self.rollout + [jnp.mean(attentions[i], axis=1) for i in self.layers]
        shown += [attentions[self.layers[0]][:, i] for i in range(self.heads)]
        return patch_map(jnp.stack(shown, axis=1), reading_tokens(self.config), self.grid)


def draw_maps(
    image: UInt8[np.ndarray, "y x c"], maps: Mapping[str, Float[np.ndarray, "gy gx"]], title: str, note: str = ""
) -> bytes:
    """The image, and each map over it, as a PNG; all share one scale of colours.

    Args:
        image: the image as the model saw it.
        maps: the maps in multiples of uniform attention, by their titles.
        title: text above the pictures.
        note: a smaller line below the title.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    rows = math.ceil((1 + len(maps)) / COLUMNS)
    columns = math.ceil((1 + len(maps)) / rows)
    tile = TILE * image.shape[0] / image.shape[1]
    width, height = MARGIN + columns * (TILE + GAP) + BAR, TOP + rows * (tile + LINE) - LINE + MARGIN
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def axes(left: float, top: float, width_: float, height_: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + height_) / height, width_ / width, height_ / height))

    # Roots, because a mean is far flatter than its heads; cut off, because a few patches may draw nearly everything.
    values = np.concatenate([np.ravel(patches) for patches in maps.values()])
    scale = PowerNorm(0.5, 0, max(2.0, float(np.percentile(values, 99.5))), clip=True)
    zoom = math.ceil(SIDE / min(image.shape[:2]))  # a map is smooth whatever the pixels are
    rgb = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(zoom, 0).repeat(zoom, 1) / 255
    pictures = {"input": rgb}
    for name, patches in maps.items():
        strength = scale(_enlarge(patches, rgb.shape[:2])).filled()
        pictures[name] = overlay(rgb, colormaps[COLOURS](strength)[..., :3], strength)
    for number, (name, picture) in enumerate(pictures.items()):
        row, column = divmod(number, columns)
        ax = axes(MARGIN + column * (TILE + GAP), TOP + row * (tile + LINE), TILE, tile)
        ax.imshow(picture, interpolation="nearest", aspect="auto")
        ax.set_title(name, loc="left", fontsize=9, color=FAINT if name == "input" else INK, pad=4)
        ax.set_axis_off()
    bar = figure.colorbar(ScalarMappable(scale, COLOURS), extend="max" if values.max() > scale.vmax else "neither",
                          cax=axes(MARGIN + columns * (TILE + GAP) + 0.05, TOP, 0.11, rows * (tile + LINE) - LINE))
    bar.set_ticks([tick for tick in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= scale.vmax])
    bar.minorticks_off()
    bar.set_label("× uniform attention", color=FAINT, fontsize=8)
    bar.ax.tick_params(length=0, colors=FAINT, labelsize=8)
    bar.outline.set_visible(False)
    for below, text, colour, size in ((0.25, title, INK, 11.5), (0.5, note, FAINT, 8.5)):
        figure.text(MARGIN / width, 1 - below / height, text, va="center", color=colour, fontsize=size,
                    parse_math=False)
    return to_png(figure)


def overlay(
    image: Float[np.ndarray, "y x 3"], colours: Float[np.ndarray, "y x 3"], strength: Float[np.ndarray, "y x"]
) -> Float[np.ndarray, "y x 3"]:
    """Colours over the image in grey, denser where they are stronger; everything from 0 to 1.

    Args:
        image: the image.
        colours: the colour of each pixel.
        strength: how strong the colour of each pixel is.
    """
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]  # luma, ITU-R BT.601
    alpha = 0.5 + 0.35 * strength[..., None]
    return (1 - alpha) * grey + alpha * colours


def _enlarge(patches: Float[np.ndarray, "gy gx"], size: tuple[int, int]) -> Float[np.ndarray, "y x"]:
    return np.asarray(Image.fromarray(np.asarray(patches, np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))
