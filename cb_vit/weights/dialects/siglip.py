"""The image tower of SigLIP and SigLIP 2 in Hugging Face transformers: alone, as a part, or under a classifier.

It has no class token: a head of attention pools its tokens. A classifier of transformers does without that head, and
reads the mean over tokens. timm's and big_vision's files of the same models have other names. Read in transformers
5.24.
"""
from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cb_vit.models.vit import VARIANTS
from cb_vit.pp.normalisation import HALF
from cb_vit.weights.containers.files import FormatError, Tensor, show
from cb_vit.weights.dialects import cards, images
from cb_vit.weights.dialects.names import DENSE, NORM, OUT, PATCH, QKV, Names, Reading, parts, pick_heads, unique, view

_BLOCK, _LAYER, _ATTENTION = "Transformer/encoderblock_#", "encoder.layers.#", "MultiHeadDotProductAttention_0"
NAMES = Names("Hugging Face's SigLIP", {
    "embeddings.patch_embedding": ("embedding", PATCH),
    f"{_LAYER}.layer_norm1": (f"{_BLOCK}/LayerNorm_0", NORM),
    f"{_LAYER}.self_attn.q_proj": (f"{_BLOCK}/{_ATTENTION}/query", QKV),
    f"{_LAYER}.self_attn.k_proj": (f"{_BLOCK}/{_ATTENTION}/key", QKV),
    f"{_LAYER}.self_attn.v_proj": (f"{_BLOCK}/{_ATTENTION}/value", QKV),
    f"{_LAYER}.self_attn.out_proj": (f"{_BLOCK}/{_ATTENTION}/out", OUT),
    f"{_LAYER}.layer_norm2": (f"{_BLOCK}/LayerNorm_1", NORM),
    f"{_LAYER}.mlp.fc1": (f"{_BLOCK}/MlpBlock_0/Dense_0", DENSE),
    f"{_LAYER}.mlp.fc2": (f"{_BLOCK}/MlpBlock_0/Dense_1", DENSE),
    "post_layernorm": ("Transformer/encoder_norm", NORM),
    **{f"head.attention.{part}": (f"MAPHead_0/{_ATTENTION}/{part}", QKV) for part in ("query", "key", "value")},
    "head.attention.out_proj": (f"MAPHead_0/{_ATTENTION}/out", OUT),
    "head.layernorm": ("MAPHead_0/LayerNorm_0", NORM),
    "head.mlp.fc1": ("MAPHead_0/MlpBlock_0/Dense_0", DENSE),
    "head.mlp.fc2": ("MAPHead_0/MlpBlock_0/Dense_1", DENSE),
    "classifier": ("head", DENSE),
}, {
    "embeddings.position_embedding.weight": "pos_embedding",
    "head.probe": "MAPHead_0/probe",
})
# Width, depth, MLP width and heads of what is published under these names.
_PUBLISHED = [VARIANTS[name] for name in ("B", "L", "So400m", "g-opt")]
_TOWER = "vision_model."


def recognise(names: Iterable[str]) -> bool:
    """Whether a file with these names is an image tower of SigLIP; that of a CLIP is told by its family."""
    return any(re.fullmatch(r"encoder\.layers\.\d+\.layer_norm1\.weight", name.removeprefix(_TOWER)) for name in names)


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
    spelt = {name.removeprefix(_TOWER): name for name in tensors}
    tensors = unique(((name.removeprefix(_TOWER), tensor) for name, tensor in tensors.items()), path)
    said, guess, notes = cards.huggingface(config, path, ("siglip_vision_model", "siglip")), {}, []
    classifies = "classifier.weight" in tensors
    if classifies and any(name.startswith("head.") for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        notes = ["its attention pooling is left in the file: the classifier reads the mean over tokens"]
    heads = pick_heads(tensors, ".layer_norm1.weight", ".mlp.fc1.weight", path,
                       said.model.get("num_heads") if num_heads is None else num_heads, guess, True, _PUBLISHED)
    params, unknown = NAMES.read(_as_ours(tensors, path), heads, path)
    guess |= {"gelu": "tanh", "layer_norm_eps": 1e-6}
    usual = {"posemb": "learn"}
    if "MAPHead_0/probe" not in params:  # transformers gives all tokens then
        usual["pool_type"] = "gap" if classifies else "none"

    def spell(name: str) -> str:
        theirs = NAMES.theirs(name)
        fused = re.sub(r"^(head\.attention)\.(?:query|key|value)\.", r"\1.in_proj_", theirs[0] if theirs else name)
        return spelt.get(fused, fused)

    return Reading("huggingface", params, [spelt.get(name, name) for name in unknown], spell, said.model, usual, guess,
                   0, said.image_size, images.normalisation(config), HALF, said.class_names, notes)


def _as_ours(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Queries, keys and values of the head apart, where torch has them in one; and positions with an axis in front."""
    found = []
    for name, tensor in tensors.items():
        fused = re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", name)
        try:
            if fused:
                rows = [functools.partial(_third, i=i) for i in range(3)]
                found += zip((f"head.attention.{part}.{fused[1]}" for part in ("query", "key", "value")),
                             parts(tensor, rows), strict=True)
            elif name == "embeddings.position_embedding.weight" and len(tensor.shape) == 2:
                found.append((name, view(tensor, lambda a: a[None])))
            else:
                found.append((name, tensor))
        except (ValueError, IndexError):
            raise FormatError(f"{path}: {show(name)} is {list(tensor.shape)}, not the rows of query, key and value"
                              ) from None
    return unique(found, path)


def _third(rows: np.ndarray, i: int) -> np.ndarray:
    return np.split(rows, 3)[i]
