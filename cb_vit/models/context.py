"""Context Broadcasting: the uniform attention that softmax finds hard to learn, supplied by hand.

"Scratching Visual Transformer's Back with Uniform Attention" (Hyeon-Woo et al., ICCV 2023,
arXiv 2210.08457). As an operator on the n tokens CB is ½(I + 11ᵀ/n): it keeps the token mean
(eigenvalue 1), halves every deviation from it (eigenvalue ½), commutes with any per-token affine
map, and has no parameters. It stands at the end of a block's MLP, inside the residual branch, so
the residual stream itself is not collapsed however many blocks there are.
"""
from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def broadcast_context(
    x: Float[Array, "*b n d"],
    scale: Float[Array, " d"] | None = None,
    mask: Bool[Array, "*b n"] | None = None,
) -> Float[Array, "*b n d"]:
    """Average each token with the mean of all tokens, class token and registers included: (x + mean_n x) / 2.

    Args:
        x: n tokens of width d, with any leading axes.
        scale: λ, a factor on the mean for each channel: (x + λ ⊙ mean_n x) / 2. This is CB_S in our
            reading of the paper, whose exact form could not be verified; λ = 1 gives CB.
        mask: whether each token is real. The mean runs over the real tokens alone; padding tokens
            are averaged with it like any other and stay meaningless. A row without real tokens has
            mean 0. None: all tokens are real.

    Returns:
        The tokens with their context, in the dtype of `x`. The mean and the average are taken in
        float32 whatever that dtype is: a bfloat16 sum over 197 tokens would lose most of its bits.
    """
    tokens = x.astype(jnp.float32)
    if mask is None:
        context = jnp.mean(tokens, axis=-2, keepdims=True)
    else:
        real = jnp.expand_dims(mask, -1)
        count = jnp.maximum(jnp.sum(real, axis=-2, keepdims=True), 1)  # not 0 / 0 in a row of padding
        # Selected, not multiplied by the mask: padding may hold NaN, and 0 · NaN is NaN.
        context = jnp.sum(jnp.where(real, tokens, 0.0), axis=-2, keepdims=True) / count
    if scale is not None:
        context = context * jnp.reshape(scale.astype(jnp.float32), (1,) * (x.ndim - 1) + (-1,))
    return ((tokens + context) / 2).astype(x.dtype)
