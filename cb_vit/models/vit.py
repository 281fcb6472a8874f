"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) with a place for Context Broadcasting.

Leaves carry big_vision's names (`big_vision/models/vit.py`), so that its checkpoints load without a
key map. The block, in timm's order:

    x ← x + DropPath(LayerScale(MSA(LN(x))))
    x ← x + DropPath(LayerScale(CB(MLP(LN(x)))))
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from cb_vit.config import ConfigError, parse
from cb_vit.models.common import Report, merge_params, to_loop, to_scan
from cb_vit.models.layers import (
    Init,
    MAPHead,
    MlpBlock,
    MultiHeadDotProductAttention,
    PatchEmbedding,
    context,
    drop_path,
    dropout,
    layer_norm,
    layer_scale,
    posemb_sincos_2d,
)
from cb_vit.models.resample import Grid, resample_patch, resample_posemb, square
from cb_vit.models.vit_config import VARIANTS, Config, check_image_size, check_images, inherit, patch_grid, resolve

__all__ = ["VARIANTS", "Attention", "Config", "Model", "ViT", "check_image_size", "inherit", "merge", "patch_grid",
           "resolve"]

# Whether attention probabilities are among the intermediates, or the function of those of a block that is.
Attention = bool | Callable[[Float[Array, "b h n m"]], Any]


def Model(num_classes: int | None, variant: str | None = None, **kw: Any) -> ViT:  # noqa: N802
    """A Vision Transformer as a Linen module.

    Args:
        num_classes: width of the head; None or 0: no head, the pooled features are the output.
        variant: size and patch, e.g. "Ti/16", "S/16", "B/16", "L/16", "H/14".
        **kw: any other fields of `Config`.

    Raises:
        ConfigError: a keyword is unknown, of the wrong type or impossible.
    """
    try:
        return ViT(num_classes, resolve(parse(Config, {"variant": variant, **kw}, "model")))
    except ConfigError as error:
        raise error if error.path.startswith("model") else error.under("model") from None


def merge(
    init_params: Any, loaded: Any, config: Config, dont_load: Sequence[str] = (),
    posemb_resize: str = "bicubic_antialias", *, image_size: tuple[int, int] | None = None,
    loaded_grid: Grid | None = None, other_classes: bool = False,
) -> tuple[Any, Report]:
    """Begin from the parameters of another model: big_vision's `vit.load`, which tells what it did.

    Position embeddings are resampled onto the model's grid, and the patch embedding to the size of its patches; a head
    of another size keeps its initial value. All else must fit. A model may have what its file has not: heads, the
    distillation token, registers, and λ of CB_S, which begins as the CB of the paper. LayerScale is not among them: its
    small γ would silence every block that was loaded.

    Args:
        init_params: the initial parameters, in the model's own layout.
        loaded: the file's parameters, in loop layout, with big_vision's names.
        config: the model's resolved settings.
        dont_load: regexes of parameter names: in the model they keep their initial value, in the file they are unused.
        posemb_resize: the way of resampling, one of the names in `resample.METHODS`.
        image_size: (height, width) in pixels of the images that the model is for; None: they are square.
        loaded_grid: rows and columns of patches that the file is for; None: the model's own if the numbers of patches
            agree, else a square.
        other_classes: whether the file's head is for other classes, even if there are as many; it then begins anew.

    Returns:
        Parameters in the layout and dtypes of `init_params`, and a report of what was done.

    Raises:
        ConfigError: the file belongs to a model that does not fit.
    """
    def fit_posemb(theirs: Array, ours: Array) -> tuple[Array, str | None]:
        # Another width is not for resampling to mend: `merge_params` refuses it. As many patches may still be another
        # grid (7 × 14 against 14 × 7), which only `loaded_grid` can tell.
        if theirs.shape[-1] != ours.shape[-1] or (loaded_grid is None and theirs.shape == ours.shape):
            return theirs, None
        grid = patch_grid(config, image_size) if image_size else square(ours.shape[1])
        before = loaded_grid or square(theirs.shape[1])
        if grid == before:
            return theirs, None
        note = f"resampled from {before[0]}×{before[1]} to {grid[0]}×{grid[1]}, {posemb_resize}"
        return resample_posemb(theirs, grid, posemb_resize, before), note

    def fit_patch(theirs: Array, ours: Array) -> tuple[Array, str | None]:
        if theirs.shape[:2] == ours.shape[:2]:
            return theirs, None
        before, patch = (f"{leaf.shape[0]}×{leaf.shape[1]}" for leaf in (theirs, ours))
        return (resample_patch(theirs, ours.shape[:2], posemb_resize),
                f"resampled from {before} to {patch} pixels, {posemb_resize}")

    params, report = merge_params(
        to_loop(init_params), loaded, dont_load, heads=("head", "head_dist"), other_heads=other_classes,
        fresh=r"dist|reg|.*/context_scale",
        fit={"pos_embedding": fit_posemb, "embedding/kernel": fit_patch})
    return to_scan(params) if config.scan else params, report


class ViT(nn.Module):
    """The model behind `Model`.

    Attributes:
        num_classes: width of the head; None or 0: no head.
        config: the model's resolved settings.
    """

    num_classes: int | None
    config: Config

    @nn.compact
    def __call__(
        self, image: Any, *, train: bool = False, attention: Attention = False
    ) -> tuple[Float[Array, " b *out"], dict[str, Any]]:
        """Classify images.

        Args:
            image: [b y x c], pixels as the model's preprocessing scales them, in float32 or narrower.
            train: whether dropout and drop path apply; they draw from the Linen stream "dropout".
            attention: whether every block's attention probabilities are among the intermediates; or a function of a
                block's, float32 [b h n n], whose result is there in their place, so that the maps of all blocks never
                exist at once.

        Returns:
            `(logits, out)`: logits [b, num_classes] (the mean of both heads if distilled), and the
            named intermediates, big_vision's and ours: "stem" [b gy gx d]; "with_posemb" [b p d], of the p patches that
            come last of the n tokens, after class token, distillation token and registers; "encoder/blockXX" with
            "sa", "+sa", "mlp", "+mlp" [b n d] and, if asked for, "attention" [b h n n] or what is made of it;
            "encoder/pre_ln" [b n d], what the last block gives; "encoded" [b n d], after the norm;
            "head_input" [b d], the pooled tokens (not with pool_type="none"); "pre_logits" and "logits", what the head
            sees and says; "pre_logits_2d" [b gy gx …] and "logits_2d" [b gy gx num_classes], the same on each patch;
            "logits_cls" and "logits_dist" if distilled, and "logits_2d" is then of the first one's head. What is not
            used costs nothing under `jax.jit`.

        Raises:
            ConfigError: the images are no such array, or have another size or other channels than the parameters.
        """
        cfg, out = self.config, {}
        check_images(cfg, image, self.variables.get("params", {}))
        init = Init(cfg)
        x = out["stem"] = PatchEmbedding(cfg, name="embedding")(jnp.asarray(image))
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], -1, cfg.width)
        if cfg.posemb == "learn":
            posemb = self.param("pos_embedding", init.posemb, (1, x.shape[1], cfg.width), jnp.float32)
        else:
            posemb = posemb_sincos_2d(*grid, cfg.width)
        x = out["with_posemb"] = x + posemb.astype(x.dtype)

        # Positions are added before the tokens are put in front, so these have none: DeiT's extra entry for the class
        # token is part of `cls` here.
        prefix = ["cls"] * (cfg.pool_type == "tok") + ["dist"] * cfg.distilled
        tokens = [self.param(name, init.token, (1, 1, cfg.width), jnp.float32) for name in prefix]
        if cfg.registers:
            tokens.append(self.param("reg", init.registers, (1, cfg.registers, cfg.width), jnp.float32))
        tokens = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in tokens]
        x, before = jnp.concatenate([*tokens, x], axis=1), len(prefix) + cfg.registers

        # Blocks fold their numbers, 0 … depth - 1, into this one key, so `depth` is free for the dropout here.
        key = self.make_rng("dropout") if train and (cfg.dropout or cfg.drop_path) else None
        x = dropout(x, cfg.dropout, None if key is None else jax.random.fold_in(key, cfg.depth))
        x, out["encoder"] = Encoder(cfg, attention, name="Transformer")(x, key)
        out["encoded"] = x

        pooled, patches = self._pool(x), x[:, before:].reshape(x.shape[0], *grid, cfg.width)
        if cfg.pool_type != "none":
            out["head_input"] = pooled[0]
        if cfg.rep_size:
            width = cfg.width if cfg.rep_size is True else cfg.rep_size
            # No `dtype`: from here on the arithmetic is float32, as the parameters are.
            hidden = nn.Dense(width, kernel_init=init.head, name="pre_logits")
            pooled[0], patches = nn.tanh(hidden(pooled[0])), nn.tanh(hidden(patches))
        out["pre_logits"], out["pre_logits_2d"] = pooled[0], patches
        if not self.num_classes:
            return pooled[0], out
        head_init = nn.initializers.zeros if cfg.head_zeroinit else init.head
        # One head for each pooled vector: the second is that of the distillation token.
        heads = [nn.Dense(self.num_classes, kernel_init=head_init, name=name)
                 for name, _ in zip(("head", "head_dist"), pooled, strict=False)]
        logits = [head(p) for head, p in zip(heads, pooled, strict=True)]
        if cfg.distilled:
            out["logits_cls"], out["logits_dist"] = logits
        out["logits"], out["logits_2d"] = sum(logits) / len(logits), heads[0](patches)
        return out["logits"], out

    def _pool(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b ..."]]:
        """What the heads see: one entry a head."""
        cfg = self.config
        if cfg.pool_type in ("gap", "map"):
            # Of patches alone, as in timm (`pool_include_prefix=False`); there is no class token besides the registers.
            patches = x[:, cfg.registers:]
            return [jnp.mean(patches, axis=1) if cfg.pool_type == "gap" else MAPHead(cfg)(patches)]
        if cfg.pool_type == "none":
            return [x]
        return [x[:, i] for i in range(2 if cfg.distilled else 1)]


class Encoder(nn.Module):
    """The stack of blocks and the final norm, looped or scanned; both give the same function.

    Attributes:
        config: the model's resolved settings.
        attention: whether attention probabilities are collected, or the function of them that is.
    """

    config: Config
    attention: Attention = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], key: Key[Array, ""] | None) -> tuple[Float[Array, "b n d"], dict]:
        """Apply all blocks; `key` is the randomness of dropout and drop path, None in evaluation."""
        cfg = self.config
        linear = cfg.drop_path_schedule == "linear"
        # From 0 in the first block to the full rate in the last, as in DeiT; DeiT-III has one rate for all.
        rates = np.linspace(0, cfg.drop_path, cfg.depth) if linear else np.full(cfg.depth, cfg.drop_path)
        layers = range(cfg.depth) if cfg.context_layers is None else cfg.context_layers
        has_context = [cfg.context != "none" and i in layers for i in range(cfg.depth)]
        # Keys are folded from the block's number, so that loop and scan draw alike.
        fold = jax.vmap(lambda i: jax.random.fold_in(key, i))
        keys = None if key is None else fold(jnp.arange(cfg.depth, dtype=jnp.int32))

        block = Block
        if cfg.remat_policy != "none":
            policy = getattr(jax.checkpoint_policies, cfg.remat_policy)
            # Were XLA to merge the recomputation with the first computation, nothing would be saved; under `scan` it
            # cannot, and the barrier against it would only cost time.
            block = nn.remat(Block, policy=policy, prevent_cse=not cfg.scan)
        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))
        if cfg.scan:
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.depth)
            # Blocks that are all alike need no flag, and then no select between tokens with and without context.
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
        named = {f"block{i:02d}": out for i, out in enumerate(outs)} | {"pre_ln": x}
        return layer_norm(cfg, name="encoder_norm")(x), named


class Block(nn.Module):
    """One pre-norm block.

    Attributes:
        config: the model's resolved settings.
        has_context: whether this block broadcasts context; under scan, whether any block does.
        attention: whether the attention probabilities are returned, or the function of them that is.
    """

    config: Config
    has_context: bool
    attention: Attention

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], xs: tuple) -> tuple[Float[Array, "b n d"], dict]:
        """Apply the block.

        Args:
            x: the residual stream.
            xs: what differs from block to block: the rate of drop path, the random key (None in evaluation), and, where
                only some of the scanned blocks have context, whether this one has (else None).

        Returns:
            The residual stream after the block, and its named intermediates.
        """
        cfg, out = self.config, {}
        rate, key, flag = xs
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        # Under scan the rate is traced, so that a rate of 0 would be drawn for nothing.
        if not cfg.drop_path:
            keys[1] = keys[4] = None
        at = cfg.context_at if self.has_context else None

        y = layer_norm(cfg)(x)
        y, probabilities = MultiHeadDotProductAttention(cfg)(y, y)
        if self.attention:
            out["attention"] = self.attention(probabilities) if callable(self.attention) else probabilities
        y = dropout(y, cfg.dropout, keys[0])
        if at == "msa_end":
            y = context(self, y, flag)
        out["sa"] = y = layer_scale(cfg)(y)
        # LayerScale multiplies in float32; the residual stream keeps its own dtype.
        out["+sa"] = x = x + drop_path(y, rate, keys[1]).astype(x.dtype)

        y = layer_norm(cfg)(x)
        y = MlpBlock(cfg, at)(y, keys[2:4], flag)
        out["mlp"] = y = layer_scale(cfg)(y)
        x = x + drop_path(y, rate, keys[4]).astype(x.dtype)
        # XLA would otherwise propagate a sharding of activations from that of parameters. `config.sharding_rules` gives
        # these names their mesh axes.
        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))
        out["+mlp"] = x
        return x, out
