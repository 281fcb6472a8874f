"""What happens to one parameter's gradient and update by the rule for its name: optax transformations of our own.

`cb_vit.optax` puts them into an order and has the formulas. Norms are float32, and of each block's own parameter where
a leaf stacks blocks (scan layout), so that both layouts train alike.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from cb_vit.schedules import Schedule
from cb_vit.tree import Tree, is_stacked, map_with_names

_HEADS = ("head", "head_dist")


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """What the optimiser does to one parameter.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        schedule: the regex of its schedule; None: frozen.
        lr_mult: multiplies the learning rate; 0 when frozen; under layer decay, a leaf that stacks blocks has one a
            block.
        wd_mult: multiplies `weight_decay`; 0 when not decayed or frozen.
    """

    name: str
    shape: tuple[int, ...]
    schedule: str | None
    lr_mult: float | tuple[float, ...]
    wd_mult: float

    @property
    def frozen(self) -> bool:
        """Whether the parameter keeps its value."""
        return self.schedule is None

    @property
    def lr_text(self) -> str:
        """`lr_mult` to read: "0.75", or "0.0317…0.75" from the first block to the last."""
        mults = self.lr_mult if isinstance(self.lr_mult, tuple) else (self.lr_mult,)
        return "…".join(dict.fromkeys(f"{mult:.3g}" for mult in (mults[0], mults[-1])))


def clip_adaptive(factor: float) -> optax.GradientTransformation:
    """Adaptive gradient clipping (arXiv 2102.06171, equation 3): g ← g · min(1, factor · max(‖p‖, 10⁻³) / ‖g‖).

    The norms are those of output units, see `unit_axes`. The heads are spared, as the paper advises.

    Args:
        factor: λ of the paper; 0.01 there for most batch sizes.
    """
    def clipped(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        if name.split("/")[0] in _HEADS:
            return gradient
        axes = unit_axes(name, param.ndim)
        limit = factor * jnp.maximum(_norm(param, axes), 1e-3)
        return (gradient * jnp.minimum(1.0, limit / _norm(gradient, axes))).astype(gradient.dtype)

    return optax.stateless(lambda updates, params: map_with_names(clipped, updates, params))


def add_weight_decay(
    weight_decay: float, rules: Mapping[str, ParamRule], *, trust: bool = False
) -> optax.GradientTransformation:
    """u ← u + weight_decay · wd_mult · p; with `trust`, then LAMB's u ← u · ‖p‖ / ‖u‖ wherever something was added.

    LAMB is that of arXiv 1904.00962, algorithm 2, with φ the identity; u stays as it is where either norm is 0.
    """
    def decayed(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        coefficient = weight_decay * rules[name].wd_mult
        if not coefficient:
            return update
        update = update + coefficient * param.astype(update.dtype)
        if not trust:
            return update
        axes = tuple(range(int(is_stacked(name)), param.ndim))
        size, length = _norm(param, axes), _norm(update, axes)
        ratio = jnp.where((size > 0) & (length > 0), size / length, 1.0)
        return (update * ratio).astype(update.dtype)

    return optax.stateless(lambda updates, params: map_with_names(decayed, updates, params))


def scale_by_schedules(
    lr: float, schedules: Mapping[str, Schedule], rules: Mapping[str, ParamRule],
) -> optax.GradientTransformation:
    """u ← -lr · lr_mult · schedule(count) · u, with one count for all schedules."""
    def init(params: Tree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Tree, state: optax.ScaleByScheduleState, params: Tree | None = None):
        del params
        now = {regex: schedule(state.count) for regex, schedule in schedules.items()}

        def scaled(name: str, leaf: jax.Array) -> jax.Array:
            mult = rules[name].lr_mult
            if isinstance(mult, tuple):  # [l, 1, …] against a leaf that stacks l blocks
                mult = np.reshape(np.float32(mult), (-1, *[1] * (leaf.ndim - 1)))
            return (leaf * (-lr * mult * now[rules[name].schedule])).astype(leaf.dtype)

        return map_with_names(scaled, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def unit_axes(name: str, ndim: int) -> tuple[int, ...]:
    """The axes within which a parameter's entries belong to one output unit of its layer; the others count units.

    By name, since a kernel's shape does not tell inputs from outputs: they are input-first, and the outputs of query,
    key and value are [h k]. Whatever is no kernel (bias, norm, token, position embedding) is one unit.
    """
    *_, layer, leaf = ("", *name.split("/"))
    outputs = 0 if leaf != "kernel" else 2 if layer in ("query", "key", "value") else 1
    return tuple(range(int(is_stacked(name)), ndim - outputs))


def _norm(x: Float[Array, " ..."], axes: tuple[int, ...]) -> Float32[Array, " ..."]:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
