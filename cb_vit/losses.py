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


def smooth_labels(labels: Num[Array, "*b c"], amount: float) -> Float32[Array, "*b c"]:
    """Label smoothing (arXiv 1512.00567, section 7): (1 - s) y + s / C, so the true class holds 1 - s + s / C.

    For rows that sum to 1 it commutes with mixup and cutmix. A row that is all zero becomes s / C.

    Args:
        labels: one-hot or soft labels.
        amount: s, 0 to 1; DeiT uses 0.1.
    """
    return (1.0 - amount) * labels.astype(jnp.float32) + amount / labels.shape[-1]
