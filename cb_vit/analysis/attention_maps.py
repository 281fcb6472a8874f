"""Where a model looks: attention maps over the image, and attention rollout; `attention_pictures.py` draws them.

A map is in multiples of uniform attention: 1 everywhere says that every token is attended to alike.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cb_vit.models.vit_config import Config

MOST_HEADS = 16  # more would be too small to see


def reading_tokens(config: Config) -> slice:
    """The tokens that the head reads: class and distillation tokens where it reads these, else patches, or all tokens.

    Args:
        config: the model's resolved settings.
    """
    if config.pool_type in ("tok", "0"):
        return slice(0, 2 if config.distilled else 1)
    return slice(None) if config.pool_type == "none" else slice(config.registers, None)


def patch_map(attention: Float[Array, "*b n n"], queries: slice, grid: tuple[int, int]) -> Float[Array, "*b gy gx"]:
    """How much the tokens `queries` attend to each patch, on average over them.

    Args:
        attention: the probabilities, from each query to each token; patches come last, row by row.
        queries: the tokens that attend.
        grid: rows and columns of patches.

    Returns:
        Multiples of uniform attention: share × n. What goes to class tokens and registers is left out, so that the mean
        is below 1 where much of it does.
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
        if self.config.pool_type == "0":
            return "the first token"
        reads_patches = self.config.registers and self.config.pool_type != "none"
        return f"all {'patches' if reads_patches else 'tokens'}, on average"

    @property
    def titles(self) -> tuple[str, ...]:
        """The title of each map, in the order of `maps`."""
        blocks = [f"block {i}" + ", mean of heads" * bool(self.heads) for i in self.layers]
        return (*["rollout"] * self.rollout, *blocks, *(f"head {i}" for i in range(self.heads)))

    @property
    def apart(self) -> tuple[str, ...]:
        """Titles of maps on another level than the others: of a rollout, much stays with the token that attends."""
        return ("rollout",) * self.rollout

    @property
    def mean(self) -> int:
        """Which of the maps stands for the model: the mean over heads of the last block that is shown."""
        return self.rollout + self.layers.index(max(self.layers))

    def maps(self, encoder: Mapping[str, Any]) -> Float[Array, "b maps gy gx"]:
        """The maps of a batch, in multiples of uniform attention.

        Args:
            encoder: the model's intermediates `out["encoder"]`, with attention.
        """
        attentions = [encoder[f"block{i:02d}"]["attention"] for i in range(self.config.depth)]
        shown = [rollout(attentions)] * self.rollout + [jnp.mean(attentions[i], axis=1) for i in self.layers]
        shown += [attentions[self.layers[0]][:, i] for i in range(self.heads)]
        return patch_map(jnp.stack(shown, axis=1), reading_tokens(self.config), self.grid)
