"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) with a place for Context Broadcasting.

Leaves carry big_vision's names (`big_vision/models/vit.py`), so that its checkpoints load without a
key map. The block, in timm's order (b batch, n tokens, d width, h heads, k head width, f MLP width):

    x ← x + DropPath(LayerScale(MSA(LN(x))))
    x ← x + DropPath(LayerScale(CB(MLP(LN(x)))))
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from cb_vit.config import ConfigError, parse
from cb_vit.models.common import drop_path, dropout
from cb_vit.models.context import broadcast_context
from cb_vit.registry import Registry

# width, depth, MLP width, heads. "Scaling Vision Transformers" (arXiv 2106.04560) Table 2, DeiT
# (arXiv 2012.12877) Table 1 for Ti, DeiT-III (arXiv 2204.07118) for M, SigLIP-So400m (arXiv 2305.13035).
VARIANTS = Registry("ViT variant", {
    "mu": (32, 1, 128, 2),
    "nano": (64, 4, 256, 4),  # ours, for images of a few pixels
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
})
REMAT = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")


@dataclasses.dataclass(frozen=True)
class Config:
    """The block `config.model`; every field is also a keyword of `Model`.

    Attributes:
        variant: "S/16": size and patch; None: all of patch_size, width, depth, mlp_dim, num_heads.
        patch_size, width, depth, mlp_dim, num_heads: override what the variant gives. Patch in pixels.
        posemb: "learn", or "sincos2d" (MoCo-v3, fixed).
        pool_type: "gap" mean over tokens; "map" attention pooling; "tok" class token; "0" first token,
            "none" logits for every token.
        rep_size: width of a tanh layer before the head; True: the model's width.
        dropout: rate inside MLP and attention output.
        head_zeroinit: zeros in the head's kernel; None: as `init` has it (big_vision yes, DeiT no).
        scan: run the blocks under `nn.scan`: compiles once, whatever the depth.
        remat_policy: what a block keeps for the backward pass: "none" keeps all, "nothing_saveable"
            recomputes the block (big_vision's choice under scan), …
        dtype_mm: dtype of the matrix products; softmax, norms and the residual stream are float32.
        context: "none", "cb" or "cb_s" (scaled per channel; our reading of the paper).
        context_at: where in the block; the paper's place is "mlp_end".
        context_layers: the blocks (from 0) that have it; None: all.
        drop_path: stochastic depth rate; of the last block if `drop_path_schedule` is "linear"
            (DeiT: 0 at the first block), of every block if "constant" (DeiT-III).
        layer_scale: initial value of LayerScale (CaiT, arXiv 2103.17239); None: no LayerScale.
        gelu: "tanh" approximation (big_vision) or exact "erf" (DeiT, timm).
        init: initialisation of all weights, "big_vision" or "deit".
        distilled: DeiT's distillation token and its own head.
    """

    variant: str | None = None
    patch_size: int | tuple[int, int] | None = None
    width: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    posemb: Literal["learn", "sincos2d"] = "learn"
    pool_type: Literal["gap", "map", "tok", "0", "none"] = "gap"
    rep_size: bool | int = False
    dropout: float = 0.0
    head_zeroinit: bool | None = None
    scan: bool = False
    remat_policy: Literal["none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"] = "none"
    dtype_mm: Literal["float32", "bfloat16", "float16"] = "float32"
    context: Literal["none", "cb", "cb_s"] = "none"
    context_at: Literal["mlp_end", "mlp_front", "mlp_mid", "msa_end"] = "mlp_end"
    context_layers: tuple[int, ...] | None = None
    drop_path: float = 0.0
    drop_path_schedule: Literal["linear", "constant"] = "linear"
    layer_scale: float | None = None
    gelu: Literal["tanh", "erf"] = "tanh"
    init: Literal["big_vision", "deit"] = "big_vision"
    distilled: bool = False

    def __post_init__(self):
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, f"is a probability in [0, 1), got {getattr(self, name)}")
        if self.distilled and (self.pool_type != "tok" or self.rep_size):
            raise ConfigError("distilled", f"needs pool_type='tok' without rep_size, got {self.pool_type!r}")
        if self.scan and self.context == "cb_s" and self.context_layers is not None:
            raise ConfigError("context_layers", "cb_s in some blocks only needs scan=False: scanned blocks are alike")


def resolve(config: Config) -> Config:
    """`config` with its variant spelt out in sizes, and the sizes checked against each other.

    Raises:
        ConfigError: unknown variant, missing or impossible size.
    """
    sizes = dict.fromkeys(("width", "depth", "mlp_dim", "num_heads", "patch_size"))
    if config.variant is not None:
        size, _, patch = config.variant.partition("/")
        if patch and not patch.isdigit():
            raise ConfigError("variant", f"expected SIZE/PATCH such as 'S/16', got {config.variant!r}")
        sizes.update(zip(sizes, VARIANTS.pick(size, "variant"), strict=False), patch_size=int(patch) if patch else None)
    sizes.update({name: getattr(config, name) for name in sizes if getattr(config, name) is not None})
    for name, value in sizes.items():
        if value is None:
            raise ConfigError(name, f"not set; give it, or a variant such as 'S/16' (variant is {config.variant!r})")
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ConfigError(name, f"must be at least 1, got {value}")
    if isinstance(sizes["patch_size"], int):
        sizes["patch_size"] = (sizes["patch_size"],) * 2
    if sizes["width"] % sizes["num_heads"]:
        raise ConfigError("num_heads", f"{sizes['num_heads']} does not divide width {sizes['width']}")
    if config.posemb == "sincos2d" and sizes["width"] % 4:
        raise ConfigError("posemb", f"'sincos2d' needs a width divisible by 4, got {sizes['width']}")
    layers = config.context_layers or ()
    if any(not 0 <= layer < sizes["depth"] for layer in layers):
        raise ConfigError("context_layers", f"blocks are 0 to {sizes['depth'] - 1}, got {list(layers)}")
    zeroinit = config.init == "big_vision" if config.head_zeroinit is None else config.head_zeroinit
    return dataclasses.replace(config, **sizes, head_zeroinit=zeroinit)


def check_image_size(config: Config, image_size: tuple[int, int]) -> None:
    """Refuse images, (height, width) in pixels, that the patch does not divide.

    Raises:
        ConfigError: at "patch_size" or "variant", whichever set the patch.
    """
    patch = resolve(config).patch_size
    if any(size % p for size, p in zip(image_size, patch, strict=True)):
        height, width = image_size
        field, value = ("variant", config.variant) if config.patch_size is None else ("patch_size", config.patch_size)
        raise ConfigError(field, f"{value!r} has patch {patch[0]}×{patch[1]}, which does not divide the image of "
                                 f"{height}×{width}; change the patch, or the size in input.pp")


def Model(num_classes: int | None, variant: str | None = None, **kw: Any) -> ViT:  # noqa: N802
    """A Vision Transformer as a Linen module.

    Args:
        num_classes: width of the head; None or 0: no head, the pooled features are the output.
        variant: size and patch, e.g. "Ti/16", "S/16", "B/16", "L/16", "H/14".
        **kw: the fields of `Config`.

    Raises:
        ConfigError: a keyword that is unknown, ill-typed or impossible.
    """
    try:
        return ViT(num_classes, resolve(parse(Config, {"variant": variant, **kw}, "model")))
    except ConfigError as error:
        raise error if error.path.startswith("model") else error.under("model") from None


class ViT(nn.Module):
    """The model behind `Model`; `config` is resolved.

    Attributes:
        num_classes: width of the head; None or 0: no head.
        config: sizes and options.
    """

    num_classes: int | None
    config: Config

    @nn.compact
    def __call__(
        self, image: Float[Array, "b y x c"], *, train: bool = False, attention: bool = False
    ) -> tuple[Float[Array, "b *out"], dict[str, Any]]:
        """Classify images.

        Args:
            image: pixels as the model's preprocessing scales them.
            train: apply dropout and drop path; they draw from the Linen stream "dropout".
            attention: also put every block's attention probabilities into the intermediates.

        Returns:
            `(logits, out)`: logits [b, num_classes] (the mean of both heads if distilled), and the
            named intermediates: "stem", "with_posemb" [b n d]; "encoder/blockXX" with "sa", "+sa",
            "mlp", "+mlp" [b n d] and, if asked for, "attention" [b h n n]; "encoded" [b n d];
            "pre_logits"; "logits"; "logits_cls" and "logits_dist" if distilled.
        """
        cfg, out = self.config, {}
        init = _Init(cfg)
        x = out["stem"] = _Embedding(cfg, name="embedding")(image)
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], -1, cfg.width)
        if cfg.posemb == "learn":
            posemb = self.param("pos_embedding", init.posemb, (1, x.shape[1], cfg.width), jnp.float32)
        else:
            posemb = posemb_sincos_2d(*grid, cfg.width)
        x = out["with_posemb"] = x + posemb

        prefix = ["cls"] * (cfg.pool_type == "tok") + ["dist"] * cfg.distilled
        tokens = [self.param(name, init.token, (1, 1, cfg.width), jnp.float32) for name in prefix]
        x = jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], 1, cfg.width)) for t in tokens), x], axis=1)

        key = self.make_rng("dropout") if train and (cfg.dropout or cfg.drop_path) else None
        x = dropout(x, cfg.dropout, None if key is None else jax.random.fold_in(key, cfg.depth))
        x, out["encoder"] = Encoder(cfg, attention, name="Transformer")(x, key)
        out["encoded"] = x

        pooled = self._pool(x)
        if cfg.rep_size:
            width = cfg.width if cfg.rep_size is True else cfg.rep_size
            pooled[0] = nn.tanh(nn.Dense(width, kernel_init=init.head, name="pre_logits")(pooled[0]))
        out["pre_logits"] = pooled[0]
        if not self.num_classes:
            return pooled[0], out
        head_init = nn.initializers.zeros if cfg.head_zeroinit else init.head
        heads = [nn.Dense(self.num_classes, kernel_init=head_init, name=name)(p)
                 for name, p in zip(("head", "head_dist"), pooled, strict=False)]
        if cfg.distilled:
            out["logits_cls"], out["logits_dist"] = heads
        out["logits"] = sum(heads) / len(heads)
        return out["logits"], out

    def _pool(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b ..."]]:
        """What the heads see: one entry a head."""
        cfg = self.config
        if cfg.pool_type == "gap":
            return [jnp.mean(x, axis=1)]
        if cfg.pool_type == "map":
            return [MAPHead(cfg)(x)]
        if cfg.pool_type == "none":
            return [x]
        return [x[:, i] for i in range(2 if cfg.distilled else 1)]


class Encoder(nn.Module):
    """The stack of blocks and the final norm, looped or scanned; both give the same function.

    Attributes:
        config: resolved.
        attention: collect attention probabilities.
    """

    config: Config
    attention: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], key: Key[Array, ""] | None) -> tuple[Float[Array, "b n d"], dict]:
        """Apply all blocks; `key` is the randomness of dropout and drop path, None in evaluation."""
        cfg = self.config
        linear = cfg.drop_path_schedule == "linear"
        rates = np.linspace(0, cfg.drop_path, cfg.depth) if linear else np.full(cfg.depth, cfg.drop_path)
        layers = range(cfg.depth) if cfg.context_layers is None else cfg.context_layers
        has_context = [cfg.context != "none" and i in layers for i in range(cfg.depth)]
        # Keys are folded from the block's number, so that loop and scan draw alike.
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(cfg.depth))

        block = Block
        if cfg.remat_policy != "none":
            policy = getattr(jax.checkpoint_policies, cfg.remat_policy)
            block = nn.remat(Block, policy=policy, prevent_cse=not cfg.scan)
        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))
        if cfg.scan:
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.depth)
            flags = jnp.asarray(has_context) if len(set(has_context)) > 1 else None
            xs = (jnp.asarray(rates, jnp.float32), keys, flags)
            x, stacked = scanned(cfg, any(has_context), self.attention, name="encoderblock")(x, xs)
            outs = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(cfg.depth)]
        else:
            outs = []
            for i in range(cfg.depth):
                xs = (float(rates[i]), None if keys is None else keys[i], None)
                x, out = block(cfg, has_context[i], self.attention, name=f"encoderblock_{i}")(x, xs)
                outs.append(out)
        return nn.LayerNorm(name="encoder_norm")(x), {f"block{i:02d}": out for i, out in enumerate(outs)}


class Block(nn.Module):
    """One pre-norm block.

    Attributes:
        config: resolved.
        has_context: whether this block broadcasts context (if the config asks for it at all).
        attention: return the attention probabilities.
    """

    config: Config
    has_context: bool
    attention: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], xs: tuple) -> tuple[Float[Array, "b n d"], dict]:
        """`xs` = (drop path rate, key or None, flag or None): what differs from block to block.

        The flag is the traced form of `has_context` under scan.
        """
        cfg, out = self.config, {}
        rate, key, flag = xs
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        if not cfg.drop_path:
            keys[1] = keys[4] = None
        at = cfg.context_at if self.has_context else None

        y = nn.LayerNorm()(x)
        y, probabilities = MultiHeadDotProductAttention(cfg)(y, y)
        if self.attention:
            out["attention"] = probabilities
        y = dropout(y, cfg.dropout, keys[0])
        if at == "msa_end":
            y = _context(self, y, flag)
        out["sa"] = y = _layer_scale(cfg)(y)
        out["+sa"] = x = x + drop_path(y, rate, keys[1])

        y = nn.LayerNorm()(x)
        y = MlpBlock(cfg, at)(y, keys[2:4], flag)
        out["mlp"] = y = _layer_scale(cfg)(y)
        x = nn.with_logical_constraint(x + drop_path(y, rate, keys[4]), ("act_batch", "act_len", "act_emb"))
        out["+mlp"] = x
        return x, out


class MlpBlock(nn.Module):
    """Dense, GELU, Dense, and the place of Context Broadcasting.

    Attributes:
        config: resolved.
        context_at: where context is broadcast; None: nowhere in this MLP.
    """

    config: Config
    context_at: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], keys: list | tuple = (None, None), flag: Bool[Array, ""] | None = None
    ) -> Float[Array, "b n d"]:
        """[b n d] → [b n d]; `keys` for the two dropouts, `flag` switches the context under scan."""
        cfg, dtype, init = self.config, jnp.dtype(self.config.dtype_mm), _Init(self.config)
        dense = lambda width: nn.Dense(width, dtype=dtype, kernel_init=init.kernel, bias_init=init.mlp_bias)  # noqa: E731
        if self.context_at == "mlp_front":
            x = _context(self, x, flag)
        x = nn.gelu(dense(cfg.mlp_dim)(x), approximate=cfg.gelu == "tanh")
        if self.context_at == "mlp_mid":
            x = _context(self, x, flag)
        x = dropout(x, cfg.dropout, keys[0])
        x = dropout(dense(cfg.width)(x), cfg.dropout, keys[1])
        if self.context_at == "mlp_end":
            x = _context(self, x, flag)
        return x


class MultiHeadDotProductAttention(nn.Module):
    """Softmax attention with Flax's parameter names; projections of one input share one matmul."""

    config: Config

    @nn.compact
    def __call__(
        self, inputs_q: Float[Array, "b n d"], inputs_kv: Float[Array, "b m d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b h n m"]]:
        """Attend from `inputs_q` to `inputs_kv`; also returns the probabilities, in float32."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype_mm)
        if inputs_q is inputs_kv:
            q, k, v = self._project(inputs_q, "query", "key", "value")
        else:
            (q,), (k, v) = self._project(inputs_q, "query"), self._project(inputs_kv, "key", "value")
        with jax.named_scope("attention"):
            q = q * jnp.asarray(q.shape[-1] ** -0.5, dtype)
            logits = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
            probabilities = jax.nn.softmax(logits, axis=-1)
            x = jnp.einsum("bhnm,bmhk->bnhk", probabilities.astype(dtype), v)
        kernel, bias = _Affine(x.shape[-2:], (cfg.width,), cfg, name="out")()
        y = jnp.einsum("bnhk,hkd->bnd", x, kernel.astype(dtype))
        return y + jnp.reshape(bias.astype(dtype), (1, 1, -1)), probabilities

    def _project(self, x: Float[Array, "b n d"], *names: str) -> Float[Array, "s b n h k"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype_mm)
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        kernels, biases = zip(*(_Affine((cfg.width,), heads, cfg, name=name)() for name in names), strict=True)
        # [d s h k]: the heads stay an axis of their own, so that tensor parallelism can shard it.
        y = jnp.einsum("bnd,dshk->sbnhk", x.astype(dtype), jnp.stack(kernels, 1).astype(dtype))
        return y + jnp.stack(biases)[:, None, None].astype(dtype)


class MAPHead(nn.Module):
    """Multihead attention pooling (Set Transformer, arXiv 1810.00825), as in big_vision: one learned query."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pool tokens into one vector."""
        cfg = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, cfg.width), jnp.float32)
        x, _ = MultiHeadDotProductAttention(cfg)(jnp.broadcast_to(probe, (x.shape[0], 1, cfg.width)), x)
        return (x + MlpBlock(cfg)(nn.LayerNorm()(x)))[:, 0]


class LayerScale(nn.Module):
    """x·γ, one factor a channel, γ starting at `value` (CaiT, arXiv 2103.17239)."""

    value: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Scale the channels of a residual branch."""
        gamma = self.param("gamma", nn.initializers.constant(self.value), x.shape[-1:], jnp.float32)
        return x * jnp.reshape(gamma, (1, 1, -1))  # float32: bfloat16 would keep two digits of γ


def _layer_scale(config: Config):
    return (lambda x: x) if config.layer_scale is None else LayerScale(config.layer_scale)


def _context(module: Block | MlpBlock, x: Float[Array, "b n d"], flag: Bool[Array, ""] | None) -> Float[Array, "b n d"]:
    """Broadcast context here, with the λ of CB_S as a parameter of `module`."""
    scaled = module.config.context == "cb_s"
    scale = module.param("context_scale", nn.initializers.ones, x.shape[-1:], jnp.float32) if scaled else None
    with jax.named_scope("context"):
        y = broadcast_context(x, scale)
        return y if flag is None else jnp.where(flag, y, x)


def posemb_sincos_2d(h: int, w: int, width: int, temperature: float = 10_000.0) -> Float[Array, "1 n d"]:
    """Fixed position embedding of MoCo-v3 (arXiv 2104.02057), [1, h·w, width]: [sin x, cos x, sin y, cos y]."""
    y, x = np.mgrid[:h, :w]
    omega = 1.0 / temperature ** (np.arange(width // 4) / max(1, width // 4 - 1))
    y, x = (np.outer(axis.ravel(), omega) for axis in (y, x))
    posemb = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return jnp.asarray(posemb, jnp.float32)[None]


class _Embedding(nn.Module):
    """Patches to tokens: a convolution whose stride is its kernel, [b y x c] → [b y/p x/p d]."""

    config: Config

    @nn.compact
    def __call__(self, image: Float[Array, "b y x c"]) -> Float[Array, "b gy gx d"]:
        cfg, init = self.config, _Init(self.config)
        dtype, (py, px) = jnp.dtype(cfg.dtype_mm), cfg.patch_size
        b, y, x, c = image.shape
        if y % py or x % px:
            raise ConfigError("model.patch_size", f"{py}×{px} does not divide the image of {y}×{x}")
        kernel = self.param("kernel", init.patch_kernel, (py, px, c, cfg.width), jnp.float32)
        bias = self.param("bias", init.patch_bias(py * px * c), (cfg.width,), jnp.float32)
        # As a reshape and a matmul: the same sums as the convolution, and every backend is fast at it.
        patches = image.astype(dtype).reshape(b, y // py, py, x // px, px, c)
        tokens = jnp.einsum("bypxqc,pqcd->byxd", patches, kernel.astype(dtype))
        return tokens + jnp.reshape(bias.astype(dtype), (1, 1, 1, -1))


class _Affine(nn.Module):
    """The kernel and bias of a DenseGeneral, without applying them.

    Initialised like the flattened matrix, [prod(inputs), prod(outputs)], as Flax does.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    config: Config

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        init = _Init(self.config).kernel
        shape, flat = (*self.inputs, *self.outputs), (math.prod(self.inputs), math.prod(self.outputs))
        kernel = self.param("kernel", lambda key: init(key, flat, jnp.float32).reshape(shape))
        return kernel, self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32)


class _Init:
    """Initialisers of the two schools, reference spec B.4.

    DeiT's `trunc_normal_(std=.02)` truncates at ±2, that is at 100 sigma, so it is a plain normal;
    its patch convolution keeps PyTorch's default, uniform within ±1/sqrt(fan_in).
    """

    def __init__(self, config: Config):
        deit, i = config.init == "deit", nn.initializers
        normal = i.normal(0.02)
        self.kernel = normal if deit else i.xavier_uniform()
        self.mlp_bias = i.zeros if deit else i.normal(1e-6)
        self.head = normal if deit else i.lecun_normal()
        self.posemb = normal if deit else i.normal(1 / math.sqrt(config.width))
        self.token = normal if deit else i.zeros
        self.patch_kernel = _torch_uniform if deit else i.lecun_normal()
        self.patch_bias = (lambda fan_in: _uniform(fan_in)) if deit else (lambda fan_in: i.zeros)


def _torch_uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    return _uniform(math.prod(shape[:-1]))(key, shape, dtype)


def _uniform(fan_in: int):
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
