"""What a checkpoint must hold: step, parameters, optimiser state; born on the devices that keep it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cb_vit import sharding

Tree = Any
Leaf = Any  # an array; in a state of shapes or shardings, which has the same form, one of those


@flax.struct.dataclass
class TrainState:
    """The state of training after `step` steps.

    Attributes:
        step: steps done, int32 [].
        params: nested dict of parameters.
        opt: the optimiser's state.
        finite: whether loss, gradients and parameters have been finite at every step so far, bool [].
    """

    step: Leaf
    params: Tree
    opt: optax.OptState
    finite: Leaf


def state_shapes(init: Callable[[jax.Array], Tree], tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without making it."""
    return jax.eval_shape(_creator(init, tx), jax.random.key(0))


def create(
    init: Callable[[jax.Array], Tree],
    tx: optax.GradientTransformation,
    key: jax.Array,
    shardings: TrainState,
) -> TrainState:
    """A fresh state, each leaf computed where `shardings` puts it: no device ever holds a whole copy.

    Args:
        init: key → parameters.
        tx: the optimiser.
        key: randomness of the initialisation; the same on all processes.
        shardings: as `state_shardings` gives them.
    """
    return jax.jit(_creator(init, tx), out_shardings=shardings)(key)


def state_shardings(shapes: TrainState, strategy: Sequence[tuple[str, str]], mesh: Mesh) -> TrainState:
    """Where every leaf of the state lives, by `config.sharding_strategy`."""
    return sharding.infer(shapes, strategy, mesh)


def _creator(init, tx) -> Callable[[jax.Array], TrainState]:
    def create(key: jax.Array) -> TrainState:
        params = init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.ones((), bool))

    return create
