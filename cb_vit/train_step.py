"""One step of supervised training, as a pure function."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cb_vit.train_state import EmaConfig, TrainState

Tree = Any
# Part of what a seed means: another number here changes every run that goes on from a checkpoint.
STREAMS = {"init": 0, "dropout": 1, "augment": 2}


def stream_key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of one stream of randomness at one step: addressed by (seed, step, stream), never carried.

    So no checkpoint holds a key, and a resumed run draws what an uninterrupted one would have drawn.

    Args:
        seed: the run's seed, the same on all processes.
        stream: one of the names in `STREAMS`.
        step: completed steps, int32 [] where traced.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), step)


def augmented(
    batch: dict[str, jax.Array], step: int | jax.Array, *, prepare: Callable[[dict], dict],
    augment: Callable[[jax.Array, dict], dict], seed: int,
) -> dict[str, jax.Array]:
    """The batch as the model sees it at one step.

    Args:
        batch: what the host delivers, as for `train_step`; so are `prepare`, `augment` and `seed`.
        step: completed steps, int32 [] where traced.

    Returns:
        Float "image" and soft "labels", and in "_mask" the rows that teach.
    """
    batch = prepare(batch)
    # A row without any label (-1 on the host) teaches nothing, nor does one that could not be read.
    learnt = batch["_mask"] & jnp.any(batch["labels"] > 0, axis=1)
    return augment(stream_key(seed, "augment", step), {**batch, "_mask": learnt})


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    teacher: Tree = None,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    trainable: Tree,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    prepare: Callable[[dict], dict],
    augment: Callable[[jax.Array, dict], dict],
    seed: int,
    distil: Callable[..., jax.Array] | None = None,
    ema: EmaConfig | None = None,
    grad_accum_steps: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimiser step.

    Args:
        state: the state before the step. To be donated, or both states take memory at once.
        batch: what the host delivers: "image" uint8 [b y x c], labels, and "_mask" bool [b], False
            where a broken example keeps its row.
        teacher: the parameters of the teacher, handed to `distil`; None: no teacher. An argument, since what a jitted
            function closes over is compiled into it as constants.
        model: a Linen module, `apply(params, images, train)` → (logits, out).
        tx: the optimiser, as an optax transformation.
        trainable: for each parameter, whether it is trained; the backward pass leaves the others out, and
            so do the norms of gradients and updates.
        loss: the loss of each example, (logits [b c], labels [b c]) → [b].
        prepare: the device side of preprocessing; makes float images and "labels" [b c].
        augment: what is done to prepared images and labels, such as mixup, (key, batch) → batch.
        seed: the run's seed, the same on all processes.
        distil: the loss with a teacher's share, (teacher, images, out, label loss [b]) → [b], see `distillation.py`;
            None: `loss` alone.
        ema: how the average in `state.ema` is kept; None: it is not.
        grad_accum_steps: number of micro-batches that the batch is cut into, one after the other, to save memory;
            the result is that of the whole batch, but for rounding and dropout's draws.

    Returns:
        The state after the step, and scalars: `training_loss`, `l2_grads`, `l2_params`, `l2_updates`,
        `examples_skipped`, the masked rows, and `finite`: whether loss, gradients and parameters are,
        and have been at all steps before.
    """
    skipped = jnp.sum(~batch["_mask"], dtype=jnp.int32)
    # On the whole batch, not on micro-batches: mixup's partners are then those of a run without accumulation.
    batch = augmented(batch, state.step, prepare=prepare, augment=augment, seed=seed)
    # The number in the whole batch divides each micro-batch's sum, so that their gradients add up to the batch's own.
    count = jnp.maximum(jnp.sum(batch["_mask"], dtype=jnp.int32), 1)
    key = stream_key(seed, "dropout", state.step)

    def loss_fn(params: Tree, micro: dict[str, jax.Array], index: jax.Array) -> jax.Array:
        # Each micro-batch draws its own dropout.
        rngs = {"dropout": jax.random.fold_in(key, index)}
        params = jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, trainable)
        logits, out = model.apply({"params": params}, micro["image"], train=True, rngs=rngs)
        if distil is None:
            each = loss(logits, micro["labels"])
        else:
            each = distil(teacher, micro["image"], out, loss(out["logits_cls"], micro["labels"]))
        # Selected, not multiplied: a row without an example may have any loss, NaN too.
        return jnp.sum(jnp.where(micro["_mask"], each, 0.0)) / count

    value, grads = _accumulate(jax.value_and_grad(loss_fn), state.params, batch, grad_accum_steps)
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "training_loss": value,
        "l2_grads": optax.tree.norm(grads),
        "l2_params": optax.tree.norm(params),
        "l2_updates": optax.tree.norm(updates),
        "examples_skipped": skipped,
    }
    # Carried on the device, for to fetch it would make the host wait for every step. A NaN in any gradient or parameter
    # shows in its norm.
    finite = state.finite & jnp.all(jnp.isfinite(jnp.stack([value, metrics["l2_grads"], metrics["l2_params"]])))
    # Of the parameters after the update, as in timm.
    average = None if ema is None else ema.update(state.ema, params, state.step)
    return TrainState(state.step + 1, params, opt, finite, average), {**metrics, "finite": finite}


def _accumulate(grad_fn: Callable, params: Tree, batch: dict[str, jax.Array], steps: int) -> tuple[jax.Array, Tree]:
    """Sum `grad_fn` over `steps` micro-batches."""
    if steps == 1:  # without the loop, and without its buffer of gradients
        return grad_fn(params, batch, jnp.zeros((), jnp.int32))
    # Rows i, i + steps, … go together: every device then gives an equal share of each micro-batch,
    # and no row changes its device.
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 0, 1), batch)

    def body(total: Tree, xs: tuple) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, *xs)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(body, zero, (micro, jnp.arange(steps, dtype=jnp.int32)))
    return total
