"""The keywords of `Model` for a file: what its names and shapes decide, and what the caller adds."""
from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from typing import Any

from cb_vit.config import ConfigError, convert, suggest
from cb_vit.models.vit import Config, resolve
from cb_vit.weights.containers.files import FormatError, Tensor, show
from cb_vit.weights.dialects.names import Reading

# What arrays may leave open, with an example.
_OPEN = {"num_heads": None, "gelu": "erf", "layer_norm_eps": 1e-6, "pool_type": "gap", "posemb": "learn"}
# What γ begins at in a model made anew; here it is loaded. The value of DeiT-III's own code.
LAYER_SCALE = 1e-4


def spell_out(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as `Config` has them, with a variant as its sizes; None is none."""
    hints = typing.get_type_hints(Config)
    for name in overrides:
        if name not in hints:
            raise ConfigError(f"model.{name}", f"unknown{suggest(name, hints)} there are {', '.join(hints)}")
    found = {name: convert(value, hints[name], f"model.{name}") for name, value in overrides.items()
             if value is not None}
    if isinstance(found.get("patch_size"), int):
        found["patch_size"] = (found["patch_size"],) * 2
    variant = found.pop("variant", None)
    if variant is None:
        return found
    names = ["width", "depth", "mlp_dim", "num_heads"] + ["patch_size"] * ("/" in variant)
    try:
        sizes = resolve(Config(variant, patch_size=None if "/" in variant else 1))
    except ConfigError as error:
        raise error.under("model") from None
    return {**{name: getattr(sizes, name) for name in names}, **found}


def settle(
    params: Mapping[str, Tensor], reading: Reading, described: Mapping[str, Any], asked: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """All keywords, each from the first that knows: the arrays, the caller, our metadata, the card, what is usual.

    Args:
        params: tensors of the file by our names.
        reading: result of the file's reader.
        described: keywords that the file's metadata give.
        asked: keywords that the caller gives.
        path: path of the file, for errors.

    Returns:
        The keywords; those of them that are guessed; and lines on those asked for against what the file says.

    Raises:
        FormatError: two of these contradict each other, or none knows a keyword that is needed.
    """
    for name in described.keys() & reading.model.keys() - asked.keys():
        if described[name] != reading.model[name]:
            raise FormatError(f"{path}: its metadata say {name}={described[name]!r}, its config.json "
                              f"{reading.model[name]!r}; give {name}")
    seen, given = seen_in(params, reading, path), {**described, **asked}
    card = {name: value for name, value in reading.model.items() if name not in given}
    told = {**agree(seen, card, path, "its config.json says {}"), **agree(seen, given, path)}
    guess = {name: value for name, value in reading.guess.items() if name not in card and name not in given}
    model = {"context": "none", **reading.usual, **told, **guess}
    if unsaid := {name: value for name, value in _OPEN.items() if model.get(name) is None}:
        if "num_heads" in unsaid:
            unsaid["num_heads"] = max(1, model["width"] // 64)
        raise FormatError(f"{path}: neither the file nor a config.json beside it says {' and '.join(unsaid)}; give "
                          f"{spelt(unsaid)} or whatever is right")
    against = [f"{name}={asked[name]!r} as asked for, where {who} {before[name]!r}"
               for who, before in (("its metadata say", described), ("its config.json says", reading.model))
               for name in asked if name in before and asked[name] != before[name]]
    return model, guess, against


def spelt(keywords: Mapping[str, Any]) -> str:
    """Keywords as they are written in a call, for errors."""
    return ", ".join(f"{name}={value!r}" for name, value in keywords.items())


def agree(seen: dict[str, Any], told: Mapping[str, Any], path: str, who: str = "{} is asked for") -> dict[str, Any]:
    """The keywords of both sources, which must not contradict each other.

    Args:
        seen: keywords that the file's arrays show.
        told: keywords that someone else gives.
        path: path of the file, for errors.
        who: beginning of the error, with a place {} for the keyword that is told.

    Raises:
        FormatError: the file contradicts something that is told.
    """
    if told.get("rep_size") is True:
        told = {**told, "rep_size": seen["width"]}
    for name, value in told.items():
        if name in seen and name != "layer_scale" and value != seen[name]:
            raise FormatError(f"{path}: {who.format(f'{name}={value!r}')}, but the file has {seen[name]!r}")
    return {**seen, **told}


def seen_in(params: Mapping[str, Tensor], reading: Reading, path: str) -> dict[str, Any]:
    """The keywords of `Model` that names and shapes decide."""
    block = "Transformer/encoderblock_0/"
    matches = (re.match(r"Transformer/encoderblock_(\d{1,4})/", name) for name in params)
    numbers = {int(match[1]) for match in matches if match}
    depth = len(numbers)
    if numbers != set(range(depth)):  # before anything is built for a block 9999
        raise FormatError(f"{path}: its blocks are not numbered from 0 to {depth - 1}; some are missing")

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in params:
            raise FormatError(f"{path}: it lacks {show(reading.spell(name))}")
        if len(params[name].shape) != ndim:
            raise FormatError(f"{path}: {show(reading.spell(name))} is {list(params[name].shape)}: no ViT has that")
        return params[name].shape

    *patch, _, width = shape("embedding/kernel", 4)
    heads = shape(f"{block}MultiHeadDotProductAttention_0/query/kernel", 3)[1]
    mlp_dim = shape(f"{block}MlpBlock_0/Dense_0/kernel", 2)[1]
    if 2 * shape(f"{block}MlpBlock_0/Dense_1/kernel", 2)[0] == mlp_dim:
        raise FormatError(f"{path}: it seems to be a ViT with gated MLPs (SwiGLU), which is not supported")
    seen = dict(patch_size=tuple(patch), width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads,
                distilled="dist" in params)
    if "cls" in params or "MAPHead_0/probe" in params:
        seen["pool_type"] = "tok" if "cls" in params else "map"
    if "pre_logits/bias" in params:
        seen["rep_size"] = math.prod(params["pre_logits/bias"].shape)
    if "reg" in params:
        seen["registers"] = shape("reg", 3)[1]
    if f"{block}LayerScale_0/gamma" in params:
        seen["layer_scale"] = LAYER_SCALE
    return seen | _context(params, depth, width)


def _context(params: Mapping[str, Tensor], depth: int, width: int) -> dict[str, Any]:
    """Where CB_S is; plain CB leaves no trace."""
    scales = {name: tensor for name, tensor in params.items() if name.endswith("/context_scale")}
    if not scales:
        return {}
    layers = tuple(sorted(int(re.search(r"encoderblock_(\d+)", name)[1]) for name in scales))
    found = {"context": "cb_s"} | ({} if layers == tuple(range(depth)) else {"context_layers": layers})
    if not any("/MlpBlock_0/" in name for name in scales):
        found["context_at"] = "msa_end"
    elif {tensor.shape for tensor in scales.values()} != {(width,)}:
        found["context_at"] = "mlp_mid"
    return found
