"""What happens to one parameter's gradient and update by the rule for its name: optax transformations of our own.

`cb_vit.optax` puts them into an order and has the formulas. Norms are float32, and of each block's own parameter where
a leaf stacks blocks (scan layout), so that both layouts train alike.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from cb_vit.schedules import Schedule
from cb_vit.tree import Tree, flatten_with_names, is_stacked, map_with_names

_HEADS = ("head", "head_dist")
_QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """What the optimiser does to one parameter.

    Attributes:
        name: the parameter's name.
        shape: the parameter's shape.
        schedule: the regex in the config that gives the parameter its schedule; None: frozen.
        lr_mult: multiplier of the learning rate; 0 when frozen; under layer decay, a leaf that stacks blocks has one
            for each block.
        wd_mult: multiplier of `weight_decay`; 0 when not decayed or frozen.
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
        factor: λ of the paper, the largest share of its own norm that a unit's gradient may have; 0.01 there for most
            batch sizes.
    """
    def clipped(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        if name.split("/")[0] in _HEADS:
            return gradient
        axes = unit_axes(name, param.ndim)
        limit = factor * jnp.maximum(_norm(param, axes), 1e-3)
        # A gradient of 0 gives min(1, ∞) = 1, and stays 0.
        return (gradient * jnp.minimum(1.0, limit / _norm(gradient, axes))).astype(gradient.dtype)

    return optax.stateless(lambda updates, params: map_with_names(clipped, updates, params))


def add_weight_decay(
    weight_decay: float, rules: Mapping[str, ParamRule], *, trust: bool = False, fused_qkv: bool = True
) -> optax.GradientTransformation:
    """u ← u + weight_decay · wd_mult · p; with `trust`, then LAMB's u ← u · ‖p‖ / ‖u‖ wherever something was added.

    LAMB is that of arXiv 1904.00962, algorithm 2, with φ the identity; u stays as it is where either norm is 0.

    Args:
        weight_decay: the coefficient that each parameter's `wd_mult` multiplies.
        rules: the rule of each parameter, by its name.
        trust: whether LAMB's ratio of norms follows.
        fused_qkv: whether what is one tensor in timm has one norm, see `fused_name`; frozen parameters, and those that
            are not decayed, have no share in it.
    """
    def decayed(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        coefficient = weight_decay * rules[name].wd_mult
        return update + coefficient * param.astype(update.dtype) if coefficient else update

    def tensor(name: str) -> str | None:
        # As in timm, whose LAMB adapts decayed parameters only: norms and biases keep Adam's step.
        if not weight_decay * rules[name].wd_mult:
            return None
        return fused_name(name) if fused_qkv else name

    def apply(updates: Tree, params: Tree) -> Tree:
        updates = map_with_names(decayed, updates, params)
        return _trust(updates, params, tensor) if trust else updates

    return optax.stateless(apply)


def fused_name(name: str) -> str:
    """The tensor that holds a parameter in timm: `…/qkv/kernel` for the kernels of an attention's query, key and value.

    So for biases. Attention pooling (`MAPHead_0`) has `kv` there, and a query of its own. All else stands by itself.
    """
    *path, layer, leaf = ("", *name.split("/"))
    fused = "kv" if any(part.startswith("MAPHead") for part in path) else "qkv"
    return "/".join([*path, fused, leaf])[1:] if layer in _QKV and layer[0] in fused else name


def _trust(updates: Tree, params: Tree, tensor: Callable[[str], str | None]) -> Tree:
    """u ← u · ‖p‖ / ‖u‖, the norms over all that `tensor` gives one name; where it gives None, u stays."""
    squares: dict[str, tuple[Array, Array]] = {}
    leaves = jax.tree.leaves(params)
    for (name, update), param in zip(flatten_with_names(updates)[0], leaves, strict=True):
        if (whole := tensor(name)) is not None:
            # Without the axis of stacked blocks: each has its own ratio, as it has in loop layout.
            axes = tuple(range(int(is_stacked(name)), param.ndim))
            both = _squares(param, axes), _squares(update, axes)
            squares[whole] = tuple(map(jnp.add, squares[whole], both)) if whole in squares else both

    def scaled(name: str, update: jax.Array) -> jax.Array:
        if (whole := tensor(name)) is None:
            return update
        size, length = map(jnp.sqrt, squares[whole])
        ratio = jnp.where((size > 0) & (length > 0), size / length, 1.0)
        return (update * ratio).astype(update.dtype)

    return map_with_names(scaled, updates)


def scale_by_schedules(
    lr: float, schedules: Mapping[str, Schedule], rules: Mapping[str, ParamRule],
) -> optax.GradientTransformation:
    """u ← -lr · lr_mult · schedule(count) · u, with one count for all schedules.

    Args:
        lr: the peak learning rate.
        schedules: the schedules by the regex that `ParamRule.schedule` names.
        rules: the rule of each parameter, by its name.
    """
    def init(params: Tree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Tree, state: optax.ScaleByScheduleState, params: Tree | None = None):
        del params
        # Each is computed once a step, however many parameters follow it.
        now = {regex: schedule(state.count) for regex, schedule in schedules.items()}

        def scaled(name: str, leaf: jax.Array) -> jax.Array:
            mult = rules[name].lr_mult
            if isinstance(mult, tuple):  # [l, 1, …] against a leaf that stacks l blocks
                mult = np.reshape(np.float32(mult), (-1, *[1] * (leaf.ndim - 1)))
            return (leaf * (-lr * mult * now[rules[name].schedule])).astype(leaf.dtype)

        return map_with_names(scaled, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def big_vision_decay(
    wd: float, *, lr: float, batch: int | None, lr_mults: Sequence[tuple[str, float]],
    wd_mults: Sequence[tuple[str, float]], layer_decay: float | None, lamb: bool, freezes: bool,
) -> str:
    """How to write big_vision's `wd`, whose step is schedule · wd · wd_mult · p, in words.

    Args:
        wd: the value of big_vision's setting `wd`.
        lr: the config's learning rate.
        batch: the config's `lr_reference_batch`.
        lr_mults: the config's learning-rate multipliers; big_vision's, too, multiply the gradient's part of the step.
        wd_mults: the config's weight-decay multipliers.
        layer_decay: the config's layer decay, which big_vision has not.
        lamb: whether the optimiser is LAMB.
        freezes: whether the schedule freezes any parameters.
    """
    if lamb:
        return "and no weight_decay equals it under scale_by_lamb, which scales it too; take a recipe's for LAMB"
    if batch:  # the number of images in a batch is not known here
        text = (f"write weight_decay = wd / lr = {wd * batch / lr:.6g} / input.batch_size (lr as scaled by "
                f"lr_reference_batch: {lr:g} · input.batch_size / {batch})")
    else:
        text = f"write weight_decay = wd / lr = {wd / lr:.6g}"
    if lr_mults:
        pairs = [(f"(?=(?:{lr_regex})$){regex}", float(f"{mult / lr_mult:.6g}"))
                 for lr_regex, lr_mult in lr_mults for regex, mult in wd_mults]
        text += f"; nor by lr_mults, so divide those out, less what matches nothing: wd_mults = {[*pairs, *wd_mults]}"
    if layer_decay not in (None, 1):
        text += (f"; nor by layer_decay, so divide wd_mults by {layer_decay:g}ⁿ too, in loop layout: n = L - k in "
                 "block k of L, L + 1 in the stem, 0 above the blocks")
    if freezes:
        text += "; what the schedule freezes is decayed in neither"
    return text


def unit_axes(name: str, ndim: int) -> tuple[int, ...]:
    """The axes within which a parameter's entries belong to one output unit of its layer; the others count units.

    By name, since a kernel's shape does not tell inputs from outputs: they are input-first, and the outputs of query,
    key and value are [h k]. Whatever is no kernel (bias, norm, token, position embedding) is one unit.
    """
    *_, layer, leaf = ("", *name.split("/"))
    outputs = 0 if leaf != "kernel" else 2 if layer in _QKV else 1
    return tuple(range(int(is_stacked(name)), ndim - outputs))


def _norm(x: Float[Array, " ..."], axes: tuple[int, ...]) -> Float32[Array, " ..."]:
    return jnp.sqrt(_squares(x, axes))


def _squares(x: Float[Array, " ..."], axes: tuple[int, ...]) -> Float32[Array, " ..."]:
    # float32 before the sum: in bfloat16 it would stop growing after a few hundred terms.
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True)
