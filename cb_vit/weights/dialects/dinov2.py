"""DINOv2 of Hugging Face transformers, with registers and without: `model.safetensors` and the `config.json` beside it.

Of the model itself, its backbone, or what has one as a part. Its own files and timm's have other names, and are read in
`timm.py`. Read in transformers 5.24, as it saves them; what it has in memory is called otherwise.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cb_vit.pp.normalisation import IMAGENET
from cb_vit.weights.containers.files import Tensor
from cb_vit.weights.dialects import cards, images
from cb_vit.weights.dialects.names import DENSE, NORM, OUT, PATCH, QKV, Names, Reading, pick_heads, without_mask

_BLOCK, _LAYER = "Transformer/encoderblock_#", "encoder.layer.#"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
NAMES = Names("Hugging Face's DINOv2", {
    "embeddings.patch_embeddings.projection": ("embedding", PATCH),
    f"{_LAYER}.norm1": (f"{_BLOCK}/LayerNorm_0", NORM),
    f"{_LAYER}.attention.attention.query": (f"{_ATTENTION}/query", QKV),
    f"{_LAYER}.attention.attention.key": (f"{_ATTENTION}/key", QKV),
    f"{_LAYER}.attention.attention.value": (f"{_ATTENTION}/value", QKV),
    f"{_LAYER}.attention.output.dense": (f"{_ATTENTION}/out", OUT),
    f"{_LAYER}.norm2": (f"{_BLOCK}/LayerNorm_1", NORM),
    f"{_LAYER}.mlp.fc1": (f"{_BLOCK}/MlpBlock_0/Dense_0", DENSE),
    f"{_LAYER}.mlp.fc2": (f"{_BLOCK}/MlpBlock_0/Dense_1", DENSE),
    "layernorm": ("Transformer/encoder_norm", NORM),
}, {
    "embeddings.cls_token": "cls",
    "embeddings.register_tokens": "reg",
    "embeddings.position_embeddings": "pos_embedding",
    f"{_LAYER}.layer_scale1.lambda1": f"{_BLOCK}/LayerScale_0/gamma",
    f"{_LAYER}.layer_scale2.lambda1": f"{_BLOCK}/LayerScale_1/gamma",
})


def recognise(names: Iterable[str]) -> bool:
    """Whether a file with these names is a DINOv2 of Hugging Face's."""
    return any(re.fullmatch(r"encoder\.layer\.\d+\.layer_scale1\.lambda1", name) for name in names)


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
    tensors, notes = without_mask(tensors, "embeddings.mask_token")
    said, guess = cards.huggingface(config, path, ("dinov2", "dinov2_with_registers")), {}
    heads = pick_heads(tensors, ".norm1.weight", ".mlp.fc1.weight", path,
                       said.model.get("num_heads") if num_heads is None else num_heads, guess, True)
    params, unknown = NAMES.read(tensors, heads, path)
    guess |= {"gelu": "erf", "layer_norm_eps": 1e-6}

    def spell(name: str) -> str:
        theirs = NAMES.theirs(name)
        return theirs[0] if theirs else name

    return Reading("huggingface", params, unknown, spell, said.model, {"pool_type": "tok", "posemb": "learn"}, guess, 1,
                   said.image_size, images.normalisation(config), IMAGENET, said.class_names, notes)
