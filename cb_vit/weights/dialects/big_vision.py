"""big_vision's names, which are ours, and the older ones of vision_transformer, whose AugReg files are the best known.

The older model counts all layers of a block in one sequence (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
MlpBlock_3) and has its position embedding in a module of its own, with an entry for the class token.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cb_vit.pp.normalisation import HALF
from cb_vit.tree import flatten_with_names
from cb_vit.weights.containers.files import FormatError, Tensor
from cb_vit.weights.dialects.names import Reading, parts, unique

_OLD = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1",
        "MlpBlock_3": "MlpBlock_0", "Transformer/posembed_input/pos_embedding": "pos_embedding"}
_OLD_NAMES, _STACKED = re.compile("|".join(_OLD)), "Transformer/encoderblock/"


def recognise(names: Iterable[str]) -> bool:
    """Whether a file with these names, the prefix "params/" taken off, is of either."""
    return any(re.fullmatch(r"Transformer/encoderblock(_\d+)?/LayerNorm_0/scale", name) for name in names)


def read(tensors: Mapping[str, Tensor], path: str, num_heads: int | None, config: Mapping[str, Any]) -> Reading:
    """A file under our names, and in loop layout where big_vision scanned its blocks.

    Args:
        tensors: tensors of the file by name, without the prefix "params/".
        path: path of the file, for errors.
        num_heads, config: not used, as the file says it all; they are here because all readers are called alike.

    Raises:
        FormatError: the scanned blocks are not equally many in all arrays, or absurdly many.
    """
    renamed = [(_OLD_NAMES.sub(lambda match: _OLD[match[0]], name), name) for name in tensors]
    old = any(ours != name for ours, name in renamed)
    depths = {tensors[name].shape[:1] for ours, name in renamed if ours.startswith(_STACKED)}
    if len(depths) > 1 or any(math.prod(depth) > 9999 for depth in depths) or () in depths:
        raise FormatError(f"{path}: the arrays of {_STACKED} hold {sorted(depths)} blocks; they should agree")
    found, spelt = [], {}
    for ours, name in renamed:
        blocks, names = [tensors[name]], [ours]
        if ours.startswith(_STACKED):
            depth, rest = tensors[name].shape[0], ours.removeprefix(_STACKED)
            blocks = parts(tensors[name], [lambda a, i=i: a[i] for i in range(depth)])
            names = [f"Transformer/encoderblock_{i}/{rest}" for i in range(depth)]
        found += zip(names, blocks, strict=True)
        spelt.update(dict.fromkeys(names, name))
    notes = [f"{depth} scanned blocks are taken apart" for depth, in depths]
    params, usual = unique(found, path), {"gelu": "tanh", "layer_norm_eps": 1e-6, "posemb": "learn"}
    if not old and "pos_embedding" not in params:
        usual["posemb"] = "sincos2d"  # big_vision has no other that is not learned
    guess = {} if {"cls", "MAPHead_0/probe"} & params.keys() else {"pool_type": "gap"}
    return Reading("augreg" if old else "big_vision", params, [], lambda name: spelt.get(name, name), usual=usual,
                   guess=guess, entries=int(old and "cls" in params), normalisation=HALF, notes=notes)


def to_big_vision(params: Any) -> dict[str, np.ndarray]:
    """Parameters as big_vision keeps them in an `.npz`: "params/…", loop layout.

    What big_vision lacks (LayerScale, the distillation token, registers, λ of CB_S, the exact GELU, CB itself) goes
    under our own names, or is not in a file of parameters at all: such a file is for `cb_vit`.

    Args:
        params: parameters under our names, nested or flat, in loop layout.
    """
    return {f"params/{name}": np.asarray(leaf) for name, leaf in flatten_with_names(params)[0]}
