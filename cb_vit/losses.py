"""Classification losses: one value per example, in float32 whatever the logits are.

A loss takes logits and labels of one shape; labels are one-hot, multi-hot or soft (mixup, smoothing). Means over
the batch, and what a padded example counts, belong to the caller.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from cb_vit.registry import Registry

Loss = Callable[[Float[Array, "*b c"], Num[Array, "*b c"]], Float32[Array, "*b"]]
LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register("softmax_xent")
def softmax_xent(logits: Float[Array, "*b c"], labels: Num[Array, "*b c"]) -> Float32[Array, "*b"]:
    """Cross-entropy with the softmax: -Σ_c y_c log softmax(x)_c.

    A row of labels that is all zero (padding; ImageNet-ReaL images without a label) gives exactly 0.
    Rows are not normalised: a row with k ones gives the sum of k cross-entropies.
    """
    # A log-sum-exp of bfloat16 logits would keep two digits.
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(labels.astype(jnp.float32) * log_p, axis=-1)


@LOSSES.register("sigmoid_xent")
def sigmoid_xent(logits: Float[Array, "*b c"], labels: Num[Array, "*b c"]) -> Float32[Array, "*b"]:
    """Binary cross-entropy summed over classes: -Σ_c [y_c log σ(x_c) + (1 - y_c) log σ(-x_c)].

    The sum is big_vision's. DeiT-III and PyTorch take the mean, which is smaller by the number of classes: with
    gradient clipping, or any optimiser that is not scale-free, that changes the run. A row of labels that is all
    zero is an example of no class and does count.
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    # log σ(x) = -softplus(-x): no cancellation for confident logits of either sign.
    return jnp.sum(labels * jax.nn.softplus(-logits) + (1.0 - labels) * jax.nn.softplus(logits), axis=-1)


@LOSSES.register("bce")
def bce(logits: Float[Array, "*b c"], labels: Num[Array, "*b c"]) -> Float32[Array, "*b"]:
    """DeiT-III's binary cross-entropy (arXiv 2204.07118): targets y_c > 0 as 0 or 1, and the mean over classes.

    It differs from `sigmoid_xent` in both: after mixup or cutmix both classes count in full, and the loss is smaller
    by the number of classes. Smoothed labels are all above 0, which would make every class a target.
    """
    return sigmoid_xent(logits, jnp.float32(labels > 0)) / logits.shape[-1]


def weighted(loss: Loss, weights: Float[Array, " c"]) -> Loss:
    """`loss`, which is linear in the labels, with w_c y_c in their place: PyTorch's weights for labels that are
    probabilities, where the mean over a batch is divided by the number of examples.

    Args:
        loss: `softmax_xent`.
        weights: how much each class counts.
    """
    return lambda logits, labels: loss(logits, labels.astype(jnp.float32) * jnp.broadcast_to(weights, labels.shape))


def distill_hard(logits: Float[Array, "*b c"], teacher_logits: Float[Array, "*b c"]) -> Float32[Array, "*b"]:
    """Hard-label distillation (DeiT, arXiv 2012.12877, equation 3): cross-entropy with the teacher's decision.

    Args:
        logits: the student's logits.
        teacher_logits: the teacher's logits.
    """
    decision = jax.nn.one_hot(jnp.argmax(teacher_logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return softmax_xent(logits, decision)


def distill_soft(
    logits: Float[Array, "*b c"], teacher_logits: Float[Array, "*b c"], tau: float
) -> Float32[Array, "*b"]:
    """Soft distillation (arXiv 1503.02531) as DeiT's code has it: τ² / C · KL(teacher ‖ student) at temperature τ.

    Divided by the number of classes, so that the mean over a batch is DeiT's mean over batch and classes; equation 2
    of its paper (arXiv 2012.12877) is larger by C.

    Args:
        logits: the student's logits.
        teacher_logits: the teacher's logits.
        tau: the temperature τ, above 0; DeiT's default is 1.
    """
    # As a difference of logarithms: the quotient of two small probabilities would be 0 / 0.
    student = jax.nn.log_softmax(logits.astype(jnp.float32) / tau, axis=-1)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / tau, axis=-1)
    return tau**2 * jnp.mean(jnp.exp(teacher) * (teacher - student), axis=-1)


def smooth_labels(labels: Num[Array, "*b c"], amount: float) -> Float32[Array, "*b c"]:
    """Label smoothing (arXiv 1512.00567, section 7): (1 - s) y + s / C, so the true class holds 1 - s + s / C.

    For rows that sum to 1 it commutes with mixup and cutmix. A row that is all zero becomes s / C.

    Args:
        labels: one-hot or soft labels.
        amount: s, the share that is spread over all classes, 0 to 1; DeiT has 0.1.
    """
    return (1.0 - amount) * labels.astype(jnp.float32) + amount / labels.shape[-1]
