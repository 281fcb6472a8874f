"""timm's Vision Transformers, and those of facebookresearch/deit and dinov2, which began as timm's and share its names.

Context Broadcasting in a timm model is one line, after which our weights give our logits:

    for b in model.blocks: b.mlp.register_forward_hook(lambda mlp, _, y: (y + y.mean(1, keepdim=True)) / 2)

CB_S has a parameter, to be there before the weights are loaded:

    for b in model.blocks:
        b.mlp.register_parameter("context_scale", torch.nn.Parameter(torch.ones(model.embed_dim)))
        b.mlp.register_forward_hook(lambda mlp, _, y: (y + mlp.context_scale * y.mean(1, keepdim=True)) / 2)

`snippet` writes out all it takes to load an exported file. Read in timm 1.0.31: `models/vision_transformer.py`,
`models/deit.py`, `layers/attention_pool.py`.
"""
from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cb_vit.config import ConfigError
from cb_vit.models.vit import Config
from cb_vit.pp.normalisation import IMAGENET
from cb_vit.weights.containers.files import FormatError, Tensor, show
from cb_vit.weights.dialects import cards, images
from cb_vit.weights.dialects.names import (
    DENSE,
    NORM,
    OUT,
    PATCH,
    QKV,
    Names,
    Reading,
    add_entries,
    flat,
    parts,
    pick_heads,
    unique,
    without_mask,
)

_BLOCK, _ATTENTION = "Transformer/encoderblock_#", "MultiHeadDotProductAttention_0"
# timm fuses queries, keys and values into one layer: rows in this order, each head by head.
_FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
NAMES = Names("timm", {
    "patch_embed.proj": ("embedding", PATCH),
    "blocks.#.norm1": (f"{_BLOCK}/LayerNorm_0", NORM),
    "blocks.#.attn.query": (f"{_BLOCK}/{_ATTENTION}/query", QKV),
    "blocks.#.attn.key": (f"{_BLOCK}/{_ATTENTION}/key", QKV),
    "blocks.#.attn.value": (f"{_BLOCK}/{_ATTENTION}/value", QKV),
    "blocks.#.attn.proj": (f"{_BLOCK}/{_ATTENTION}/out", OUT),
    "blocks.#.norm2": (f"{_BLOCK}/LayerNorm_1", NORM),
    "blocks.#.mlp.fc1": (f"{_BLOCK}/MlpBlock_0/Dense_0", DENSE),
    "blocks.#.mlp.fc2": (f"{_BLOCK}/MlpBlock_0/Dense_1", DENSE),
    "norm": ("Transformer/encoder_norm", NORM),
    "attn_pool.q": (f"MAPHead_0/{_ATTENTION}/query", QKV),
    "attn_pool.key": (f"MAPHead_0/{_ATTENTION}/key", QKV),
    "attn_pool.value": (f"MAPHead_0/{_ATTENTION}/value", QKV),
    "attn_pool.proj": (f"MAPHead_0/{_ATTENTION}/out", OUT),
    "attn_pool.norm": ("MAPHead_0/LayerNorm_0", NORM),
    "attn_pool.mlp.fc1": ("MAPHead_0/MlpBlock_0/Dense_0", DENSE),
    "attn_pool.mlp.fc2": ("MAPHead_0/MlpBlock_0/Dense_1", DENSE),
    "pre_logits.fc": ("pre_logits", DENSE),  # timm before 0.6
    "head": ("head", DENSE),
    "head_dist": ("head_dist", DENSE),
}, {
    "cls_token": "cls",
    "dist_token": "dist",
    "reg_token": "reg",
    "pos_embed": "pos_embedding",
    "attn_pool.latent": "MAPHead_0/probe",
    "blocks.#.ls1.gamma": f"{_BLOCK}/LayerScale_0/gamma",
    "blocks.#.ls2.gamma": f"{_BLOCK}/LayerScale_1/gamma",
    "blocks.#.mlp.context_scale": f"{_BLOCK}/MlpBlock_0/context_scale",
})
_POOL = {"tok": "token", "gap": "avg", "map": "map", "none": ""}


def recognise(names: Iterable[str]) -> bool:
    """Whether a file with these names is one of timm's, DeiT's or DINOv2's."""
    return any(re.fullmatch(r"blocks\.(\d+\.)?\d+\.attn\.qkv\.weight", name) for name in names)


def read(tensors: Mapping[str, Tensor], path: str, num_heads: int | None, config: Mapping[str, Any]) -> Reading:
    """A file under our names and in our layout, in place of timm's.

    Args:
        tensors: tensors of the file by name.
        path: path of the file, for errors.
        num_heads: number of heads; None: the config's, or what all published models of the file's sizes have.
        config: content of a `config.json` from the Hugging Face hub, read as `cards` has it; {}: there is none.

    Raises:
        FormatError: a shape is impossible, or the config makes another model.
    """
    said, guess = cards.timm(config, path), {}
    deit = any(".gamma_" in name for name in tensors)  # DeiT-III's own files
    bare = "register_tokens" in tensors  # DINOv2's own, where these have no positions, but the class token has
    dinov2 = bare or ("mask_token" in tensors and not deit)
    tensors, notes = without_mask(tensors, "mask_token")
    tensors = _unfuse(((_modern(name), tensor) for name, tensor in tensors.items()), path)
    tokens = [name for name in ("cls_token", "dist_token") if name in tensors]
    width = next((math.prod(t.shape) for name, t in tensors.items() if name.endswith(".norm1.weight")), 0)
    if said.widths and num_heads is None and width not in said.widths:
        name = show(config["architecture"])
        raise FormatError(f"{path}: its config.json names the architecture {name}, but the file is {width} wide; give "
                          "num_heads, or let model_args say it")
    guessable = said.guessable and "cls_token" in tensors  # SigLIP's, without, have either GELU, and some other heads
    heads = pick_heads(tensors, ".norm1.weight", ".mlp.fc1.weight", path,
                       said.model.get("num_heads") if num_heads is None else num_heads, guess, guessable)
    params, unknown = NAMES.read(tensors, heads, path)

    # Of DeiT-III's own names are the files of RoPE-ViT as well, whose rotary positions, besides these, leave no trace.
    usual = {} if deit and not said.known else {"posemb": "learn"}
    scaled = any(name.endswith(".ls1.gamma") for name in tensors)
    guess |= {"layer_norm_eps": 1e-6} if said.guessable else {}
    guess |= {"gelu": "erf"} if guessable else {}
    registers = params["reg"].shape[1] if "reg" in params and len(params["reg"].shape) == 3 else 0
    # And DINOv2's, which are normalised alike; with other registers TIPS' and RADIO's, which are not.
    deits = "dist_token" in tokens or (tokens and scaled and registers in (0, 4))
    if tokens == ["cls_token"] and not said.known:  # nor does a mean over tokens leave a trace
        guess["pool_type"] = "tok"
    elif not tokens and "attn_pool.latent" not in tensors:
        guess["pool_type"] = "gap"
    entries = len(tokens)
    if not bare and (registers or tokens == ["cls_token"]):
        entries = {None: None, True: 0, False: entries + registers}[said.no_embed_class]
    return Reading(
        "deit" if deit else "dinov2" if dinov2 else "timm", params, unknown, _spell, said.model, usual, guess, entries,
        said.image_size, images.normalisation(config), IMAGENET if deits else None, said.class_names, notes)


def to_timm(
    params: Any, config: Config, *, grid: tuple[int, int] | None = None, no_embed_class: bool | None = None
) -> dict[str, np.ndarray]:
    """Parameters under timm's names, as `load_state_dict(strict=True)` takes them; `snippet` has the rest.

    timm's position embedding has entries for class and distillation token, which ours lacks: they are written as
    zeros. With LayerScale and a class token there are none, as in timm's DeiT-III, nor with registers, as in its
    DINOv2.

    Args:
        params: parameters under our names, nested or flat, in loop layout.
        config: resolved settings of the model.
        grid: rows and columns of patches; needed for posemb="sincos2d" only, which timm has to learn.
        no_embed_class: whether the model is made with timm's option of that name; None: as said above.

    Raises:
        ConfigError: timm cannot express the model.
    """
    _refuse(config)
    bare = _no_embed_class(config) if no_embed_class is None else no_embed_class
    if bare and config.distilled:
        raise ConfigError("no_embed_class", "timm's distilled models always have the entries of both tokens")
    entries = 0 if bare else (config.pool_type == "tok") + config.distilled + config.registers
    return _fuse(NAMES.write(add_entries(flat(params, config, grid), entries)))


def arguments(config: Config, num_classes: int | None, image_size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer`, or `VisionTransformerDistilled`, for a model of ours.

    `norm_layer`, which a model with another `layer_norm_eps` needs, is a class of PyTorch: `snippet` has it.

    Args:
        config: resolved settings of the model.
        num_classes: width of the head; None or 0: no head.
        image_size: (height, width) of the model's images in pixels.

    Raises:
        ConfigError: timm cannot express the model.
    """
    _refuse(config)
    token = config.pool_type == "tok"
    ratio = config.mlp_dim / config.width
    if int(config.width * ratio) < config.mlp_dim:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    found = dict(
        img_size=tuple(image_size), patch_size=config.patch_size, embed_dim=config.width, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=ratio, num_classes=num_classes or 0)
    if config.gelu == "tanh":
        found["act_layer"] = "gelu_tanh"
    if config.layer_scale is not None:
        found["init_values"] = config.layer_scale
    if not token:
        found |= dict(class_token=False, global_pool=_POOL[config.pool_type], fc_norm=False)
    if config.registers:
        found["reg_tokens"] = config.registers
    if _no_embed_class(config):
        found["no_embed_class"] = True
    return found


def snippet(config: Config, num_classes: int | None, image_size: tuple[int, int], file: str) -> str:
    """Python that makes the timm model `model` of an exported file, with its context.

    Args:
        config, num_classes, image_size: description of the model, as for `arguments`.
        file: path of the `.safetensors` file.

    Raises:
        ConfigError: timm cannot express the model.
    """
    distilled = config.distilled
    module, name = ("deit", "VisionTransformerDistilled") if distilled else ("vision_transformer", "VisionTransformer")
    given = ", ".join(f"{key}={value!r}" for key, value in arguments(config, num_classes, image_size).items())
    given += f", norm_layer=partial(torch.nn.LayerNorm, eps={config.layer_norm_eps!r})" if _other_norm(config) else ""
    return "\n".join([
        *["from functools import partial", ""][:2 * _other_norm(config)],
        "import torch", "from safetensors.torch import load_file", f"from timm.models.{module} import {name}", "",
        f"model = {name}({given})", *_context(config), f"model.load_state_dict(load_file({file!r}))", "model.eval()",
        ""])


def _context(config: Config) -> list[str]:
    """Lines that add Context Broadcasting to a timm `model`."""
    if config.context == "none":
        return []
    layers = config.context_layers
    lines = ["for b in model.blocks:" if layers is None else f"for b in [model.blocks[i] for i in {list(layers)}]:"]
    if config.context == "cb_s":
        return [
            *lines, '    b.mlp.register_parameter("context_scale", torch.nn.Parameter(torch.ones(model.embed_dim)))',
            "    b.mlp.register_forward_hook(lambda mlp, _, y: (y + mlp.context_scale * y.mean(1, keepdim=True)) / 2)"]
    if config.context_at == "mlp_front":
        return [*lines, "    b.mlp.register_forward_pre_hook(lambda _, x: (x[0] + x[0].mean(1, keepdim=True)) / 2)"]
    module = {"mlp_end": "mlp", "mlp_mid": "mlp.act", "msa_end": "attn"}[config.context_at]
    return [*lines, f"    b.{module}.register_forward_hook(lambda module, _, y: (y + y.mean(1, keepdim=True)) / 2)"]


def _refuse(config: Config) -> None:
    if config.pool_type not in _POOL:
        raise ConfigError("pool_type", f"timm has no counterpart to {config.pool_type!r}; it has {', '.join(_POOL)}")
    if config.rep_size:
        raise ConfigError("rep_size", "timm has no layer before the head any more")
    if config.distilled and config.registers:
        raise ConfigError("registers", "timm's distilled models have none")
    if config.context == "cb_s" and config.context_at != "mlp_end":
        raise ConfigError("context_at", f"cb_s goes to timm from 'mlp_end' only, not from {config.context_at!r}")


def _other_norm(config: Config) -> bool:
    return config.layer_norm_eps != 1e-6  # timm's own


def _no_embed_class(config: Config) -> bool:
    scaled = config.layer_scale is not None and config.pool_type == "tok"
    return (scaled or config.registers > 0) and not config.distilled


def _modern(name: str) -> str:
    """timm's name for that of DeiT-III's own files, or of DINOv2's, whose training keeps its blocks in chunks."""
    name = re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name))
    return "reg_token" if name == "register_tokens" else name


def _unfuse(tensors: Iterable[tuple[str, Tensor]], path: str) -> dict[str, Tensor]:
    """Fused layers as layers of their own: `attn.qkv` as `attn.query`, `attn.key`, `attn.value`."""
    split = []
    for name, tensor in tensors:
        match = re.fullmatch(r"(.*\battn|attn_pool)\.(qkv|kv)\.(weight|bias)", name)
        if not match:
            split.append((name, tensor))
            continue
        names = _FUSED[match[2]]
        rows = [functools.partial(_part, i=i, of=len(names)) for i in range(len(names))]
        try:
            found = parts(tensor, rows)
        except (ValueError, IndexError):
            shape = list(tensor.shape)
            raise FormatError(f"{path}: {show(name)} is {shape}, not the rows of {', '.join(names)}") from None
        split += zip((f"{match[1]}.{part}.{match[3]}" for part in names), found, strict=True)
    return unique(split, path)


def _part(rows: np.ndarray, i: int, of: int) -> np.ndarray:
    return np.split(rows, of)[i]


def _fuse(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_unfuse`."""
    whole = {}
    for name, array in arrays.items():
        fused = _spell_fused(name)
        if fused == name:
            whole[name] = array
        elif fused not in whole:
            stem, kind, leaf = re.fullmatch(r"(.*)\.(q?kv)\.(.*)", fused).groups()
            whole[fused] = np.concatenate([arrays[f"{stem}.{part}.{leaf}"] for part in _FUSED[kind]])
    return whole


def _spell_fused(name: str) -> str:
    fused = "kv" if name.startswith("attn_pool.") else "qkv"
    return re.sub(r"\.(query|key|value)\.(weight|bias)$", rf".{fused}.\2", name)


def _spell(name: str) -> str:
    found = NAMES.theirs(name)
    return _spell_fused(found[0]) if found else name
