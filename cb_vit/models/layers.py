"""The layers of a Vision Transformer, under big_vision's parameter names.

Letters: b batch, n m tokens, d width, h heads, k head width, f MLP width.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from cb_vit.models.context import broadcast_context
from cb_vit.models.vit_config import Config


class MlpBlock(nn.Module):
    """Dense, GELU, Dense, and the place of Context Broadcasting.

    Attributes:
        config: the model's resolved settings.
        context_at: the place where context is broadcast, as in `Config`; None: nowhere in this MLP.
    """

    config: Config
    context_at: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], keys: list | tuple = (None, None), flag: Bool[Array, ""] | None = None
    ) -> Float[Array, "b n d"]:
        """Apply the MLP to every token by itself, and broadcast context where asked.

        Args:
            x: the normed tokens.
            keys: the random keys of the two dropouts; None: no dropout.
            flag: under scan, whether this block has context; None: it has.
        """
        cfg, dtype, init = self.config, jnp.dtype(self.config.dtype_mm), Init(self.config)
        dense = lambda width: nn.Dense(width, dtype=dtype, kernel_init=init.kernel, bias_init=init.mlp_bias)  # noqa: E731
        if self.context_at == "mlp_front":
            x = context(self, x, flag)
        # They differ by up to 4.7e-4: big_vision's checkpoints are trained with tanh, DeiT's and timm's with erf.
        x = nn.gelu(dense(cfg.mlp_dim)(x), approximate=cfg.gelu == "tanh")
        if self.context_at == "mlp_mid":
            x = context(self, x, flag)
        x = dropout(x, cfg.dropout, keys[0])
        x = dropout(dense(cfg.width)(x), cfg.dropout, keys[1])
        # Without dropout the end and the middle are the same for CB, which commutes with the second Dense; the end is
        # cheaper, since the hidden layer is wider.
        if self.context_at == "mlp_end":
            x = context(self, x, flag)
        return x


class MultiHeadDotProductAttention(nn.Module):
    """Softmax attention with Flax's parameter names; projections of one input share one matmul.

    Attributes:
        config: the model's resolved settings.
    """

    config: Config

    @nn.compact
    def __call__(
        self, inputs_q: Float[Array, "b n d"], inputs_kv: Float[Array, "b m d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b h n m"]]:
        """Attend from `inputs_q` to `inputs_kv`; also returns the probabilities, in float32."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype_mm)
        # One matmul reads the tokens once: ViT training is bound by memory traffic rather than arithmetic.
        if inputs_q is inputs_kv:
            q, k, v = self._project(inputs_q, "query", "key", "value")
        else:
            (q,), (k, v) = self._project(inputs_q, "query"), self._project(inputs_kv, "key", "value")
        with jax.named_scope("attention"):
            # On the queries rather than the logits: they are the smaller array.
            q = q * jnp.asarray(q.shape[-1] ** -0.5, dtype)
            probabilities = softmax(jnp.einsum("bnhk,bmhk->bhnm", q, k))
            x = jnp.einsum("bhnm,bmhk->bnhk", probabilities, v)
        kernel, bias = _Affine(x.shape[-2:], (cfg.width,), cfg, name="out")()
        y = jnp.einsum("bnhk,hkd->bnd", x, kernel.astype(dtype))
        # The cast costs nothing under `jax.jit` where nobody asks for the attention maps.
        return y + jnp.reshape(bias.astype(dtype), (1, 1, -1)), probabilities.astype(jnp.float32)

    def _project(self, x: Float[Array, "b n d"], *names: str) -> Float[Array, "s b n h k"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype_mm)
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        kernels, biases = zip(*(_Affine((cfg.width,), heads, cfg, name=name)() for name in names), strict=True)
        # [d s h k]: the heads stay an axis of their own, so that tensor parallelism can shard it.
        y = jnp.einsum("bnd,dshk->sbnhk", x.astype(dtype), jnp.stack(kernels, 1).astype(dtype))
        return y + jnp.stack(biases)[:, None, None].astype(dtype)


class MAPHead(nn.Module):
    """Multihead attention pooling (Set Transformer, arXiv 1810.00825), as in big_vision: one learned query.

    Attributes:
        config: the model's resolved settings.
    """

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pool tokens into one vector; in float32 whatever `dtype_mm` is, as big_vision does."""
        cfg = dataclasses.replace(self.config, dtype_mm="float32")
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, cfg.width), jnp.float32)
        x, _ = MultiHeadDotProductAttention(cfg)(jnp.broadcast_to(probe, (x.shape[0], 1, cfg.width)), x)
        return (x + MlpBlock(cfg)(layer_norm(cfg)(x)))[:, 0]


def layer_norm(config: Config, name: str | None = None) -> nn.LayerNorm:
    """The norm of every place in the model.

    Args:
        config: the model's resolved settings.
        name: the submodule's name; None: Flax counts, `LayerNorm_0`, `LayerNorm_1`, …
    """
    return nn.LayerNorm(epsilon=config.layer_norm_eps, name=name)


class LayerScale(nn.Module):
    """x·γ, one factor a channel (CaiT, arXiv 2103.17239).

    Attributes:
        value: the initial value of γ.
    """

    value: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Scale the channels of a residual branch."""
        gamma = self.param("gamma", nn.initializers.constant(self.value), x.shape[-1:], jnp.float32)
        return x * jnp.reshape(gamma, (1, 1, -1))  # float32: bfloat16 would keep two digits of γ


def layer_scale(config: Config) -> Callable[[Array], Array]:
    """The `LayerScale` that `config` asks for, or the identity.

    Called twice in a block, which gives the names `LayerScale_0` and `LayerScale_1`.
    """
    return (lambda x: x) if config.layer_scale is None else LayerScale(config.layer_scale)


def context(module: nn.Module, x: Float[Array, "b n d"], flag: Bool[Array, ""] | None) -> Float[Array, "b n d"]:
    """Broadcast context here, with the λ of CB_S as a parameter of `module`, whose `config` says which kind.

    Args:
        module: the compact module that calls this.
        x: the tokens.
        flag: under scan, whether this block has context; None: it has.
    """
    scaled = module.config.context == "cb_s"
    scale = module.param("context_scale", nn.initializers.ones, x.shape[-1:], jnp.float32) if scaled else None
    with jax.named_scope("context"):
        y = broadcast_context(x, scale)
        # A scanned body is one program for all blocks, so whether it applies is data, and both results are at hand.
        return y if flag is None else jnp.where(flag, y, x)


def posemb_sincos_2d(h: int, w: int, width: int, temperature: float = 10_000.0) -> Float[Array, "1 n d"]:
    """Fixed position embedding of MoCo-v3 (arXiv 2104.02057), [1, h·w, width]: [sin x, cos x, sin y, cos y].

    Args:
        h: rows of patches.
        w: columns of patches.
        width: channels, a multiple of 4.
        temperature: the ratio of the longest wavelength to the shortest.
    """
    y, x = np.mgrid[:h, :w]
    omega = 1.0 / temperature ** (np.arange(width // 4) / max(1, width // 4 - 1))
    y, x = (np.outer(axis.ravel(), omega) for axis in (y, x))
    posemb = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return jnp.asarray(posemb, jnp.float32)[None]


class PatchEmbedding(nn.Module):
    """Patches to tokens: a convolution whose stride is its kernel, [b y x c] → [b y/p x/p d].

    Attributes:
        config: the model's resolved settings.
    """

    config: Config

    @nn.compact
    def __call__(self, image: Float[Array, "b y x c"]) -> Float[Array, "b gy gx d"]:
        cfg, init = self.config, Init(self.config)
        dtype, (py, px) = jnp.dtype(cfg.dtype_mm), cfg.patch_size
        b, y, x, c = image.shape
        kernel = self.param("kernel", init.patch_kernel, (py, px, c, cfg.width), jnp.float32)
        bias = self.param("bias", init.patch_bias(py * px * c), (cfg.width,), jnp.float32)
        # As a reshape and a matmul: the same sums as the convolution, and every backend is fast at it.
        patches = image.astype(dtype).reshape(b, y // py, py, x // px, px, c)
        tokens = jnp.einsum("bypxqc,pqcd->byxd", patches, kernel.astype(dtype))
        return tokens + jnp.reshape(bias.astype(dtype), (1, 1, 1, -1))


class _Affine(nn.Module):
    """The kernel and bias of a DenseGeneral, without applying them: several are applied in one matmul.

    Initialised like the flattened matrix, [prod(inputs), prod(outputs)], as Flax does: a fan-in taken from one axis of
    the shape alone would give another spread.

    Attributes:
        inputs: sizes of the axes that are summed over.
        outputs: sizes of the axes that are made.
        config: the model's resolved settings.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    config: Config

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        init = Init(self.config).kernel
        shape, flat = (*self.inputs, *self.outputs), (math.prod(self.inputs), math.prod(self.outputs))
        kernel = self.param("kernel", lambda key: init(key, flat, jnp.float32).reshape(shape))
        return kernel, self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32)


class Init:
    """Initialisers of all weights as big_vision's `models/vit.py` or DeiT's training code has them.

    DeiT's `trunc_normal_(std=.02)` truncates at ±2, that is at 100 sigma, so it is a plain normal (JAX's
    `truncated_normal(0.02)` cuts at 2 sigma, and has a spread of 0.0176); its patch convolution keeps PyTorch's
    default, uniform within ±1/sqrt(fan_in), for the bias as well.
    """

    def __init__(self, config: Config):
        deit, i = config.init == "deit", nn.initializers
        normal = i.normal(0.02)
        self.kernel = normal if deit else i.xavier_uniform()
        self.mlp_bias = i.zeros if deit else i.normal(1e-6)
        self.head = normal if deit else i.lecun_normal()
        self.posemb = normal if deit else i.normal(1 / math.sqrt(config.width))
        self.token = normal if deit else i.zeros
        # Neither has any, so as in the code of their paper. Zeros would stay alike: nothing else tells them apart.
        self.registers = i.normal(1e-6)
        self.patch_kernel = _torch_uniform if deit else i.lecun_normal()
        self.patch_bias = (lambda fan_in: _uniform(fan_in)) if deit else (lambda fan_in: i.zeros)


def _torch_uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    return _uniform(math.prod(shape[:-1]))(key, shape, dtype)


def _uniform(fan_in: int):
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@jax.custom_vjp
def softmax(logits: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """Softmax over the last axis: float32 arithmetic, but only arrays of the logits' dtype in memory.

    Attention maps are most of what training a ViT moves through memory (`benchmarks/README.md`); JAX's own
    softmax of a bfloat16 array either computes in bfloat16 or keeps a float32 map for the backward pass.
    """
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(logits.dtype)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    probabilities = softmax(logits)
    # The result is all that the backward pass needs; the logits need not be kept.
    return probabilities, probabilities


def _softmax_backward(probabilities: Array, gradient: Array) -> tuple[Array]:
    # float32 again: the sum runs over all tokens, and the difference cancels digits.
    p, g = probabilities.astype(jnp.float32), gradient.astype(jnp.float32)
    return ((p * (g - jnp.sum(p * g, axis=-1, keepdims=True))).astype(probabilities.dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def dropout(x: Float[Array, " ..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, " ..."]:
    """Inverted dropout (Srivastava et al., 2014): x·Bernoulli(1-rate)/(1-rate). No key: x."""
    if key is None or rate == 0:
        return x
    # The keeping probability is float32: in bfloat16, 1 - 0.1 would be 0.898.
    keep = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def drop_path(
    x: Float[Array, "b n d"], rate: float | Float[Array, ""], key: Key[Array, ""] | None
) -> Float[Array, "b n d"]:
    """Stochastic depth (Huang et al., arXiv 1603.09382): drops the whole branch of an example.

    Args:
        x: the residual branch, before it is added.
        rate: the probability that an example loses the branch, in [0, 1); traced under `nn.scan`.
        key: the random key; None (evaluation) keeps every branch.

    Returns:
        x·Bernoulli(1-rate)/(1-rate), one draw an example, as in timm and DeiT.
    """
    # A traced rate cannot be compared here; one of 0 keeps everything by the draw.
    if key is None or (isinstance(rate, float | int) and rate == 0):
        return x
    keep = jax.random.bernoulli(key, jnp.float32(1 - rate), (x.shape[0], 1, 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
