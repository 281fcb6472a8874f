"""The settings of the Vision Transformer: its sizes and options, and which of them go together."""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from cb_vit.config import ConfigError, bare_name
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


SIZES = ("width", "depth", "mlp_dim", "num_heads", "patch_size")
# How a model was trained, which is nothing of what it computes.
OF_TRAINING = ("dropout", "drop_path", "drop_path_schedule", "scan", "remat_policy", "dtype_mm", "init",
               "head_zeroinit")
_WORDS = {"tiny": "ti", "small": "s", "medium": "m", "base": "b", "large": "l", "huge": "h"}  # of timm's names


@dataclasses.dataclass(frozen=True)
class Config:
    """The block `config.model`; every field is also a keyword of `Model`.

    Attributes:
        variant: size and patch, such as "S/16"; None: patch_size, width, depth, mlp_dim and num_heads are all given.
        patch_size: side of a patch in pixels, or (height, width); None: the variant's.
        width: channels of a token; None: the variant's.
        depth: number of blocks; None: the variant's.
        mlp_dim: hidden channels of an MLP; None: the variant's.
        num_heads: attention heads of a block, which divide `width`; None: the variant's.
        posemb: position embeddings: "learn" (learned), or "sincos2d" (MoCo-v3's, fixed).
        pool_type: what the head sees: "gap" mean over patches; "map" attention pooling of patches; "tok" class token;
            "0" first token; "none" every token.
        rep_size: width of a tanh layer before the head; True: the model's width; False: no such layer.
        dropout: rate of dropout after the position embedding, in MLPs and after attention; 0: none.
        head_zeroinit: whether the head's kernel begins at zero; None: as `init` has it (big_vision yes, DeiT no).
        scan: whether the blocks run under `nn.scan`, which compiles one block whatever the depth.
        remat_policy: what a block keeps for the backward pass: "none" keeps all, "nothing_saveable"
            recomputes the block (big_vision's choice under scan), the others are `jax.checkpoint_policies`'.
        dtype_mm: dtype of the matrix products and of the residual stream, as in big_vision (but there the stream is
            float32 where `pos_embedding` was made so: a smaller error, for more memory traffic); softmax, norms, the
            mean of CB, attention pooling, the head and all parameters are float32.
        context: Context Broadcasting: "none", "cb", or "cb_s" (scaled per channel; our reading of the paper). The mean
            is over all tokens: class and distillation token and registers are in it, and receive it.
        context_at: place in a block where context is broadcast; the paper's is "mlp_end".
        context_layers: numbers (from 0) of the blocks that broadcast context; None: all.
        drop_path: rate of stochastic depth, of the last block or of all, see `drop_path_schedule`; 0: none.
        drop_path_schedule: "linear": from 0 in the first block to `drop_path` in the last (DeiT); "constant": the same
            in every block (DeiT-III).
        layer_scale: initial value of LayerScale (CaiT, arXiv 2103.17239); None: no LayerScale.
        gelu: form of the GELU: the "tanh" approximation (big_vision) or the exact "erf" (DeiT, timm).
        layer_norm_eps: what every LayerNorm adds to the variance: 1e-6 in big_vision, DeiT and timm, 1e-12 in
            Hugging Face's ViT.
        init: initialisation of all weights, "big_vision" or "deit".
        distilled: whether there are DeiT's distillation token and a head for it.
        registers: number of learned tokens without a position, after class and distillation token and before the
            patches, that no head reads ("Vision Transformers Need Registers", arXiv 2309.16588); 0: none.
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
    layer_norm_eps: float = 1e-6
    init: Literal["big_vision", "deit"] = "big_vision"
    distilled: bool = False
    registers: int = 0

    def __post_init__(self):
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, f"is a probability in [0, 1), got {getattr(self, name)}")
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            raise ConfigError("layer_scale", f"must be a finite number, got {self.layer_scale}")
        if not 0 < self.layer_norm_eps < 1:
            raise ConfigError("layer_norm_eps", f"is a small number above 0, got {self.layer_norm_eps}")
        # DeiT's two heads stand on two tokens, class and distillation, and `pre_logits` would belong to only one.
        if self.distilled and (self.pool_type != "tok" or self.rep_size):
            raise ConfigError("distilled", f"needs pool_type='tok' without rep_size, got {self.pool_type!r}")
        if self.registers < 0:
            raise ConfigError("registers", f"is a number of tokens, 0 or more, got {self.registers}")
        if self.registers and self.pool_type == "0":
            raise ConfigError("registers", f"{self.registers} with pool_type='0': the first token would be a register; "
                                           "choose 'tok', 'gap' or 'map'")
        if self.scan and self.context == "cb_s" and self.context_layers is not None:
            raise ConfigError("context_layers", "cb_s in some blocks only needs scan=False: scanned blocks are alike")

    @property
    def sized(self) -> bool:
        """Whether it says how large the model is."""
        return self.variant is not None or None not in [getattr(self, name) for name in SIZES]


def inherit(block: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model, with what they leave open as a trained model has it, except for how that was trained.

    Args:
        block: settings as a config has them; those that are None are open. A variant says all sizes.
        trained: the trained model's resolved settings, by name.
    """
    known = {field.name for field in dataclasses.fields(Config)} - {*OF_TRAINING}
    said = {name: value for name, value in block.items() if value is not None}
    if "variant" in said:
        known -= {*SIZES}
    return {name: trained[name] for name in sorted(known) if name in trained} | said


def resolve(config: Config) -> Config:
    """`config` with its variant spelt out in sizes, and the sizes checked against each other.

    Raises:
        ConfigError: the variant is unknown, or a size is missing or impossible.
    """
    sizes = dict.fromkeys(SIZES)
    if config.variant is not None:
        size, patch = _read_variant(config.variant)
        sizes.update(zip(sizes, VARIANTS.pick(size, "variant"), strict=False), patch_size=patch)
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


def _read_variant(variant: str) -> tuple[str, int | None]:
    size, _, patch = variant.partition("/")
    meant = _variant_meant(variant)
    if size not in VARIANTS and meant:
        raise ConfigError("variant", f"unknown ViT variant {variant!r}; did you mean {meant}?")
    if patch and not patch.isdecimal():
        raise ConfigError("variant", f"expected SIZE/PATCH such as 'S/16', got {variant!r}" +
                          (f"; did you mean {meant}?" if meant else ""))
    return size, int(patch) if patch else None


def _variant_meant(variant: str) -> str | None:
    """What "b/16", "B16", "ViT-B-16" or timm's "vit_base_patch16_224" mean here."""
    words = re.sub("|".join(_WORDS), lambda word: _WORDS[word[0]], re.sub(r"[_-]\d{3}$", "", variant.lower()))
    bare = bare_name(re.sub("^(vit|deit3?)[^a-z]|patch", "", words))
    found = re.fullmatch(r"([a-z]+(?:400m)?(?:opt)?)(\d{0,2})", bare)
    # Where two sizes differ in case alone ("g", "G"), the first of the table is meant.
    sizes = {bare_name(size): size for size in reversed(VARIANTS)}
    return "/".join(filter(None, (sizes[found[1]], found[2]))) if found and found[1] in sizes else None


def patch_grid(config: Config, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of (height, width) pixels; `config` is resolved."""
    return tuple(size // patch for size, patch in zip(image_size, config.patch_size, strict=True))


def check_image_size(config: Config, image_size: tuple[int, int]) -> None:
    """Refuse images, (height, width) in pixels, that the patch does not divide.

    Raises:
        ConfigError: at "patch_size" or "variant", whichever set the patch.
    """
    patch = resolve(config).patch_size
    if any(size % p for size, p in zip(image_size, patch, strict=True)):
        height, width = image_size
        # A `patch_size` of its own overrides the variant's, and then it is the one to change.
        from_variant = config.variant is not None and config.variant.endswith(f"/{patch[0]}")
        field, value = ("variant", config.variant) if from_variant else ("patch_size", config.patch_size)
        raise ConfigError(field, f"{value!r} has patch {patch[0]}×{patch[1]}, which does not divide the image of "
                                 f"{height}×{width}; change the patch, or the size in input.pp")


def check_images(config: Config, image: Any, params: Mapping[str, Any]) -> None:
    """Refuse what is no batch of images [b y x c] for a model; only shapes and dtypes are looked at.

    Args:
        config: the model's resolved settings.
        image: what the model is called with, an array or a tracer of one.
        params: the model's parameters; empty while they are made.

    Raises:
        ConfigError: at "images", or at "model.patch_size" where the patch does not divide them.
    """
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or dtype is None:
        raise ConfigError("images", f"are a {type(image).__name__}; give one array [b y x c] of float32")
    if str(dtype) not in ("float32", "bfloat16", "float16"):
        way = "make them one array of np.float32"
        if str(dtype).lstrip("u").startswith(("int", "bool")):
            way = "scale them as the model's preprocessing does: value_range(-1, 1) is np.float32(images) / 127.5 - 1"
        raise ConfigError("images", f"are {dtype}; {way}")
    if len(shape) != 4:
        way = "; give images[None]" if len(shape) == 3 else ""
        raise ConfigError("images", f"have {len(shape)} axes, {_axes(shape)}, where [b y x c] has 4{way}")
    # Flax would say that the shape of a parameter does not match; what the images should be follows from these two.
    kernel, posemb = params.get("embedding", {}).get("kernel"), params.get("pos_embedding")
    channels = None if kernel is None else kernel.shape[2]
    if not _fits(config, shape, channels):
        _, first, *_, last = shape
        if first < last and _fits(config, (shape[0], *shape[2:], first), channels):
            raise ConfigError("images", f"{_axes(shape)} have their channels first; give [b y x c], that is "
                                        "images.transpose(0, 2, 3, 1)")
        if channels not in (None, last):
            raise ConfigError("images", f"{_axes(shape)} have {last} channels, the model's embedding {channels}; "
                                        f"cb_vit.load(…, channels={last}) converts it")
        (py, px), (height, width) = config.patch_size, shape[1:3]
        raise ConfigError("model.patch_size", f"{py}×{px} does not divide the image of {height}×{width}")
    rows, columns = patch_grid(config, shape[1:3])
    known = rows * columns if posemb is None else posemb.shape[1]
    if known != rows * columns:
        side = math.isqrt(known)
        theirs = f"{side}×{side}" if side * side == known else f"{known}"
        raise ConfigError("images", f"of {shape[1]}×{shape[2]} pixels are {rows}×{columns} patches, pos_embedding has "
                                    f"{theirs}; resize them, or resample it: cb_vit.load(…, image_size="
                                    f"({shape[1]}, {shape[2]}))")


def _fits(config: Config, shape: tuple[int, ...], channels: int | None) -> bool:
    divides = all(size and size % patch == 0 for size, patch in zip(shape[1:3], config.patch_size, strict=True))
    return divides and channels in (None, shape[3])


def _axes(shape: tuple[int, ...]) -> str:
    return f"[{' '.join(map(str, shape))}]"
