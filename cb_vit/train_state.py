"""What a checkpoint must hold: step, parameters, their average, optimiser state; born on the devices that keep it."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cb_vit import sharding
from cb_vit.config import ConfigError

Tree = Any
Leaf = Any  # an array; in a state of shapes or shardings, which has the same form, one of those


@flax.struct.dataclass
class TrainState:
    """The state of training after `step` steps.

    Attributes:
        step: number of steps done, int32 [].
        params: the parameters, as nested dicts.
        opt: the optimiser's state.
        finite: whether loss, gradients and parameters have been finite at every step so far, bool [].
        ema: moving average of the parameters, a tree like `params`; None: not kept.
    """

    step: Leaf
    params: Tree
    opt: optax.OptState
    finite: Leaf
    ema: Tree = None

    @property
    def arrays(self) -> dict[str, Tree]:
        """The trees of arrays by field, without those that are not kept or empty."""
        trees = {"params": self.params, "opt": self.opt, "ema": self.ema}
        return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """The block `config.ema`: an exponential moving average of the parameters, kept and evaluated beside them.

    After each step, e ← d·e + (1 - d)·p, from e = p at the start (Polyak and Juditsky, 1992; timm's ModelEma).

    Attributes:
        decay: d, the share of the average that a step keeps, in [0, 1). DeiT has 0.99996.
        warmup: whether d rises with the number t of steps done before, min(decay, 1 - (1 + t)^-⅔), so that a short
            run's average is not mostly its first parameters (timm's ModelEmaV3); DeiT has none.
    """

    decay: float = 0.99996
    warmup: bool = False

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", f"must be in [0, 1), got {self.decay}")

    def update(self, ema: Tree, params: Tree, step: jax.Array) -> Tree:
        """The average after `params` has been taken in.

        Args:
            ema: the average before.
            params: the parameters after this step's update.
            step: number of steps done before this one, int32 [].
        """
        # 1 - d is taken in Python's float64: float32 would have 4e-5 to three digits only.
        rate = jnp.float32(1 - self.decay)
        if self.warmup:
            rate = jnp.maximum(rate, (1 + step.astype(jnp.float32)) ** (-2 / 3))
        # As a correction of e, which rounds less than the sum of two products does where the rate is small.
        return jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)


def begin(params: Tree, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step.

    Args:
        params: the first parameters.
        tx: the optimiser, as an optax transformation.
        ema: whether an average is kept; it begins as a copy of the parameters.
    """
    # A copy, since the state is donated: one buffer cannot be given away twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.ones((), bool), average)


def state_shapes(
    init: Callable[[jax.Array], Tree], tx: optax.GradientTransformation, ema: bool = False
) -> TrainState:
    """Shapes and dtypes of the state, without making it.

    Args:
        init: the function from a random key to parameters.
        tx: the optimiser, as an optax transformation.
        ema: whether an average of the parameters is kept.
    """
    # Which key makes no difference to shapes.
    return jax.eval_shape(lambda key: begin(init(key), tx, ema), jax.random.key(0))


def create(
    init: Callable[..., Tree],
    tx: optax.GradientTransformation,
    shardings: TrainState,
    *args: Tree,
) -> TrainState:
    """A fresh state, each leaf computed where `shardings` puts it: no device ever holds a whole copy.

    Args:
        init: the function from `args` to parameters.
        tx: the optimiser, as an optax transformation.
        shardings: the sharding of every leaf, as `state_shardings` gives them.
        *args: a random key, the same on all processes, and any trees of arrays, on the mesh, that `init` makes use of.
    """
    # `out_shardings` make XLA partition the draws as well; initialised first and placed afterwards, a large model would
    # have to fit on one device.
    ema = shardings.ema is not None
    return jax.jit(lambda *args: begin(init(*args), tx, ema), out_shardings=shardings)(*args)


def state_shardings(shapes: TrainState, strategy: sharding.Strategy, mesh: Mesh) -> TrainState:
    """Where every leaf of the state lives.

    Args:
        shapes: shapes of the state, as `state_shapes` gives them.
        strategy: `config.sharding_strategy`, parsed.
        mesh: the run's device mesh.
    """
    return sharding.infer(shapes, strategy, mesh)

