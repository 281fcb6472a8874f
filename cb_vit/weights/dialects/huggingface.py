"""The ViT and DeiT of Hugging Face transformers: `model.safetensors` and the `config.json` beside it.

The file is read whether it is of a bare `ViTModel` or of one with a head, whose names have `vit.` or `deit.` in front.
Its pooler, a tanh layer on the class token, is what big_vision calls pre_logits.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cb_vit.config import ConfigError
from cb_vit.models.vit import Config
from cb_vit.pp.normalisation import IMAGENET
from cb_vit.weights.containers.files import Tensor
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
    pick_heads,
    unique,
    without_mask,
)

_BLOCK, _LAYER = "Transformer/encoderblock_#", "encoder.layer.#"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
NAMES = Names("Hugging Face's ViT", {
    "embeddings.patch_embeddings.projection": ("embedding", PATCH),
    f"{_LAYER}.layernorm_before": (f"{_BLOCK}/LayerNorm_0", NORM),
    f"{_LAYER}.attention.attention.query": (f"{_ATTENTION}/query", QKV),
    f"{_LAYER}.attention.attention.key": (f"{_ATTENTION}/key", QKV),
    f"{_LAYER}.attention.attention.value": (f"{_ATTENTION}/value", QKV),
    f"{_LAYER}.attention.output.dense": (f"{_ATTENTION}/out", OUT),
    f"{_LAYER}.layernorm_after": (f"{_BLOCK}/LayerNorm_1", NORM),
    f"{_LAYER}.intermediate.dense": (f"{_BLOCK}/MlpBlock_0/Dense_0", DENSE),
    f"{_LAYER}.output.dense": (f"{_BLOCK}/MlpBlock_0/Dense_1", DENSE),
    "layernorm": ("Transformer/encoder_norm", NORM),
    "pooler.dense": ("pre_logits", DENSE),
    "classifier": ("head", DENSE),
    "distillation_classifier": ("head_dist", DENSE),
}, {
    "embeddings.cls_token": "cls",
    "embeddings.distillation_token": "dist",
    "embeddings.position_embeddings": "pos_embedding",
})


def recognise(names: Iterable[str]) -> bool:
    """Whether a file with these names is a ViT or DeiT of Hugging Face's."""
    return any(re.fullmatch(r"((vit|deit)\.)?encoder\.layer\.\d+\.layernorm_before\.weight", name) for name in names)


def read(tensors: Mapping[str, Tensor], path: str, num_heads: int | None, config: Mapping[str, Any]) -> Reading:
    """A file under our names and in our layout, in place of Hugging Face's.

    Args:
        tensors: tensors of the file by name.
        path: path of the file, for errors.
        num_heads: number of heads; None: the config's, or what all published models of the file's sizes have.
        config: content of the `config.json` beside the file, with that of other cards there; {}: there are none.

    Raises:
        FormatError: a shape is impossible, or the config makes another model.
    """
    spelt = {_bare(name): name for name in tensors}
    tensors = unique(((_bare(name), tensor) for name, tensor in tensors.items()), path)
    tensors, notes = without_mask(tensors, "embeddings.mask_token")
    said, guess = cards.huggingface(config, path, ("vit", "deit")), {}
    heads = pick_heads(tensors, ".layernorm_before.weight", ".intermediate.dense.weight", path,
                       said.model.get("num_heads") if num_heads is None else num_heads, guess, True)
    params, unknown = NAMES.read(tensors, heads, path)
    guess |= {"gelu": "erf", "layer_norm_eps": 1e-12}

    body = next((match[0] for match in map(re.compile(r"(vit|deit)\.").match, spelt.values()) if match), "")

    def spell(name: str) -> str:
        theirs = NAMES.theirs(name)
        return _full(theirs[0], body, "dist" in params) if theirs else name

    return Reading(
        "huggingface", params, [spelt[name] for name in unknown], spell, said.model,
        {"pool_type": "tok", "posemb": "learn"}, guess, 2 if "dist" in params else 1, said.image_size,
        images.normalisation(config), IMAGENET if "dist" in params else None, said.class_names,
        notes)


def to_huggingface(
    params: Any, config: Config, *, grid: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Parameters as transformers names them; `config_json` gives the file to put beside them, and says for which class.

    Args:
        params: parameters under our names, nested or flat, in loop layout.
        config: resolved settings of the model.
        grid: rows and columns of patches; needed for posemb="sincos2d" only.

    Raises:
        ConfigError: transformers cannot express the model.
    """
    found = flat(params, config, grid)
    _refuse(config, headless="head/kernel" not in found)
    theirs = NAMES.write(add_entries(found, 2 if config.distilled else 1))
    if "classifier.weight" not in theirs:
        return theirs
    body = "deit." if config.distilled else "vit."
    return {_full(name, body, config.distilled): array for name, array in theirs.items()}


def config_json(
    config: Config, num_classes: int | None, image_size: tuple[int, int], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The content of `config.json` for an exported file.

    Args:
        config: resolved settings of the model.
        num_classes: width of the head; None or 0: no head.
        image_size: (height, width) of the model's images in pixels.
        class_names: names of the head's classes, in their order; None: LABEL_0, LABEL_1, … as transformers calls them.

    Raises:
        ConfigError: transformers cannot express the model.
    """
    _refuse(config, headless=not num_classes)
    kind = "deit" if config.distilled else "vit"
    names = class_names or [f"LABEL_{i}" for i in range(num_classes or 0)]
    architecture = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassificationWithTeacher"}[kind]
    return {
        "architectures": [architecture if num_classes else {"vit": "ViTModel", "deit": "DeiTModel"}[kind]],
        "model_type": kind, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads, "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh", "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_channels": 3,
        "image_size": _square(image_size), "patch_size": _square(config.patch_size),
        "id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)},
    }


def _bare(name: str) -> str:
    return re.sub(r"^(vit|deit)\.|^cls_(?=classifier\.)", "", name)


def _full(name: str, body: str, distilled: bool) -> str:
    """The inverse of `_bare`; `body` is what the names of all but the heads begin with."""
    if name.startswith("classifier."):
        return "cls_" * distilled + name
    return name if name.startswith("distillation_classifier.") else body + name


def _square(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _refuse(config: Config, headless: bool) -> None:
    if config.pool_type != "tok":
        raise ConfigError("pool_type", f"transformers' ViT classifies by its class token, not by {config.pool_type!r}; "
                                       "export to timm")
    if config.layer_scale is not None:
        raise ConfigError("layer_scale", "transformers' ViT has no LayerScale; export to timm")
    if config.registers:
        raise ConfigError("registers", "transformers' ViT has none; export to timm")
    if config.context != "none":
        raise ConfigError("context", "transformers' ViT has no place for Context Broadcasting; export to timm")
    if config.rep_size and (not headless or config.rep_size not in (True, config.width)):
        raise ConfigError("rep_size", "in transformers only models without a head have it, of the model's own width")
