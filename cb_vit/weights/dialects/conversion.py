"""From a file of anybody's to parameters under our names, and the model they belong to.

What a file or the card beside it says is taken from there: sizes, tokens, heads. What neither says is an argument, or
an error that names the argument; it is assumed only where all published models of that kind agree, and then said.
Every array is accounted for: what the model has no place for, or lacks, is an error that lists it.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cb_vit.config import ConfigError
from cb_vit.models.resample import square
from cb_vit.models.vit import Config, Model
from cb_vit.pp.normalisation import Normalisation
from cb_vit.retry import PARSING
from cb_vit.texts import first_few, parse_json
from cb_vit.tree import flatten_with_names
from cb_vit.weights.containers.files import FormatError, Tensor, show
from cb_vit.weights.dialects import big_vision, dinov2, huggingface, siglip, timm
from cb_vit.weights.dialects.cards import names_of_classes, pair
from cb_vit.weights.dialects.families import name_family
from cb_vit.weights.dialects.keywords import settle, spell_out, spelt
from cb_vit.weights.dialects.names import Reading, view
from cb_vit.weights.dialects.prefixes import candidates, take_off, under

# What no file of parameters says; `describe` writes it beside them.
UNSEEN = ("num_heads", "gelu", "layer_norm_eps", "pool_type", "context", "context_at", "context_layers")
_READERS = (timm, huggingface, dinov2, siglip, big_vision)
# What the names of a whole ViT have among them.
_EMBEDDINGS = ("patch_embed.proj.", "embeddings.patch_embeddings.", "vit.embeddings.", "deit.embeddings.", "embedding/",
               "embeddings.patch_embedding.", "vision_model.embeddings.patch_embedding.")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A file, understood.

    Attributes:
        format: name of the format: "timm", "deit" (DeiT-III's own names), "dinov2" (its own), "huggingface",
            "big_vision" or "augreg".
        params: tensors by our names, float32 and lazy, in loop layout.
        model: keywords of `Model`, with the sizes that a variant stands for spelt out.
        num_classes: width of the head; None: no head.
        grid: rows and columns of patches that the positions are for; None: they are fixed, for any.
        normalisation: mean and std of pixels from 0 to 1 that the model was trained with; None: not known.
        class_names: names of the head's classes, in their order; None: not known.
        doubts: lines on what is assumed, as all published models of this kind agree, or asked for although the file
            says otherwise.
        notes: lines on what was folded, or cannot be known.
    """

    format: str
    params: dict[str, Tensor]
    model: dict[str, Any]
    num_classes: int | None
    grid: tuple[int, int] | None
    normalisation: Normalisation | None
    class_names: tuple[str, ...] | None
    doubts: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    tensors: Mapping[str, Tensor], *, path: str, config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None, grid: tuple[int, int] | None = None, prefix: str | None = None,
    **overrides: Any,
) -> Converted:
    """Understand a file.

    Args:
        tensors: tensors by name, from `files.parameters`.
        path: path of the file, for errors.
        config: content of the `config.json` beside a file from the Hugging Face hub; None: there is none.
        metadata: metadata of a `.safetensors` file, of which what `describe` wrote is used; None: there are none.
        grid: rows and columns of patches; needed where they are no square.
        prefix: beginning of the names of the arrays to take, e.g. "visual.trunk"; None: all are taken.
        **overrides: keywords of `Model`, for what a file does not say (`context="cb"`, `num_heads=4`), or as a check.

    Raises:
        FormatError: the file holds no ViT like ours, something is missing or left over, or an override contradicts it.
        ConfigError: an override is not a keyword of `Model`.
    """
    described = _described(metadata or {}, path)
    asked = spell_out(overrides)
    tensors, notes = take_off(tensors, prefix, _known, path)
    reading = _read(tensors, path, {**described.model, **asked}.get("num_heads"), config or {}, prefix)
    params = {name: _float32(tensor) for name, tensor in reading.params.items()}
    other = {str(tensor.dtype) for tensor in reading.params.values()} - {"float32"}
    notes += reading.notes + [f"stored as {', '.join(sorted(other))}, read as float32"] * bool(other)

    model, guess, doubts = settle(params, reading, described.model, asked, path)
    if "context" not in described.model and model["context"] != "cb_s":
        notes.append(f"context={model['context']!r} {'as asked for' if 'context' in asked else 'assumed'}: parameters "
                     "do not show it")
    params, grid = _fold(params, grid or described.grid or _grid(reading, model), reading, model, path, notes, guess)
    num_classes = math.prod(params["head/bias"].shape) if "head/bias" in params else None
    _check(params, reading, model, num_classes, grid, path)

    known = [said for said in (described.normalisation, reading.normalisation) if said is not None]
    if not known and reading.usual_normalisation:
        guess["normalisation"] = reading.usual_normalisation
    known += [reading.usual_normalisation] * (reading.usual_normalisation is not None)
    if not known:
        notes.append("how pixels were normalised is not known: Google's ViTs have mean = std = 0.5, DeiTs ImageNet's")
    names = described.class_names or reading.class_names
    if names and len(names) != num_classes:
        notes.append(f"names are given for {len(names)} classes, its head has {num_classes or 0}: not used")
        names = None
    if guess:
        doubts.insert(0, f"{spelt(guess)} assumed, as all published models of this kind have it; the file does not say")
    return Converted(
        reading.format, params, model, num_classes, grid,
        _checked(known[0], params["embedding/kernel"].shape[2], path) if known else None,
        names, tuple(doubts), tuple(notes))


def describe(
    config: Config, normalisation: Normalisation | None = None, grid: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, str]:
    """Metadata of an exported `.safetensors` file that lets `convert` know what parameters do not say.

    Args:
        config: resolved settings of the model.
        normalisation: mean and std of pixels from 0 to 1 that the model was trained with; None: not known.
        grid: rows and columns of patches that the positions are for; None: not said.
        class_names: names of the head's classes, in their order; None: not known.
    """
    model = {name: getattr(config, name) for name in UNSEEN if getattr(config, name) is not None}
    said = {"model": model, "normalisation": normalisation, "grid": grid, "class_names": class_names}
    return {"format": "pt", "cb_vit": json.dumps(said)}


@dataclasses.dataclass(frozen=True)
class _Described:
    """What `describe` wrote; the normalisation is yet to be checked."""

    model: dict[str, Any]
    normalisation: Any = None
    grid: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None


def _described(metadata: Mapping[str, Any], path: str) -> _Described:
    if "cb_vit" not in metadata:
        return _Described({})
    try:
        said = parse_json(metadata["cb_vit"].encode())
        model = spell_out({name: said["model"][name] for name in UNSEEN if name in said["model"]})
        if len(model) == len(said["model"]):
            return _Described(model, said["normalisation"], said.get("grid") and pair(said["grid"]),
                              names_of_classes(said.get("class_names")))
    except PARSING:
        pass
    raise FormatError(f"{path}: what its metadata say under 'cb_vit' is not what was once written there")


def _checked(normalisation: Any, channels: int, path: str) -> Normalisation:
    try:
        return Normalisation.of(normalisation, channels)
    except ConfigError as error:
        raise FormatError(f"{path}: how its pixels are normalised: {error.message}") from None


def _grid(reading: Reading, model: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches of the images that a config file speaks of."""
    size = reading.image_size
    return size and tuple(side // patch for side, patch in zip(size, model["patch_size"], strict=True))


def _known(names: Collection[str]) -> bool:
    return any(reader.recognise(names) for reader in _READERS)


def _read(
    tensors: Mapping[str, Tensor], path: str, num_heads: int | None, config: Mapping[str, Any], prefix: str | None
) -> Reading:
    """What the reader of its format makes of a file, or of what is under `prefix` in it.

    Raises:
        FormatError: no reader knows the file, or it is of another family.
    """
    family = name_family(tensors)
    reader = next((module for module in _READERS if module.recognise(tensors)), None)
    if reader and not family:
        return reader.read(tensors, path, num_heads, config)
    parts = [part for part in candidates(tensors, _known) if name_family(inside := under(part, tensors)) is None
             and any(name.startswith(_EMBEDDINGS) for name in inside)]
    if prefix:
        parts = [prefix.rstrip("./") + ("/" if any("/" in name for name in tensors) else ".") + part for part in parts]
    way_out = f"; a ViT is in {first_few(map(show, parts))}: choose with prefix" if parts else ""
    if family:
        raise FormatError(f"{path}: it seems to be {family}, which is not supported{way_out}")
    raise FormatError(f"{path}: no ViT of timm, DeiT, DINOv2, Hugging Face, big_vision or AugReg; it holds "
                      f"{first_few(map(show, tensors)) or 'nothing'}{way_out}")


def _float32(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape, np.dtype(np.float32), lambda: np.asarray(tensor.read()).astype(np.float32, copy=False))


def _fold(
    params: dict[str, Tensor], grid: tuple[int, int] | None, reading: Reading, model: Mapping[str, Any], path: str,
    notes: list[str], guess: dict[str, Any],
) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """Positions of tokens are added to the tokens themselves, so that what remains is a grid: the sums are the same."""
    params = dict(params)
    if "pos_embedding" not in params:
        if model["posemb"] != "sincos2d":
            raise FormatError(f"{path}: it has no position embedding; rotary or relative positions, or none, are not "
                              "supported, and fixed ones are to be asked for: posemb='sincos2d'")
        return params, grid
    positions, before = params["pos_embedding"], {"cls": 1, "dist": 1, "reg": model.get("registers", 0)}
    before = {name: length for name, length in before.items() if name in params}
    count, own = positions.shape[1] if len(positions.shape) == 3 else 0, sum(before.values())
    fits = lambda n: n > 0 and n == (math.prod(grid) if grid else math.isqrt(n)**2)  # noqa: E731
    possible = (0, own) if reading.entries is None else (reading.entries,)
    extra = next((n for n in possible if fits(count - n)), None)
    if extra is None:
        raise FormatError(
            f"{path}: the position embedding is {list(positions.shape)}, and the file has {own} tokens before patches; "
            + (f"a grid of {grid[0]}×{grid[1]} has {math.prod(grid)}" if grid else "that is no square")
            + ": give grid, the rows and columns of patches")
    if reading.entries is None and not grid:
        guess["grid"] = side, _ = square(count - extra)
        if not extra and model.get("layer_scale") is None:  # of published files, DeiT-III's have none
            raise FormatError(
                f"{path}: its {count} positions are those of {side}×{side} patches, or of {count - own} "
                f"and the tokens before them; give grid, the rows and columns of patches: grid=({side}, {side})")
    ends = itertools.accumulate(before.values())
    placed = {name: slice(end - before[name], end) for name, end in zip(before, ends, strict=True) if end <= extra}
    for name, rows in placed.items():
        params[name] = params[name].map(lambda a, rows=rows: a + positions.read()[:, rows], params[name].shape)
    if extra:
        params["pos_embedding"] = view(positions, lambda a: a[:, extra:])
        notes.append(f"the positions of {' and '.join(placed)} are added to the tokens themselves")
    return params, grid or square(count - extra)


def _check(
    params: Mapping[str, Tensor], reading: Reading, model: dict[str, Any], num_classes: int | None,
    grid: tuple[int, int] | None, path: str,
) -> None:
    """Hold the file against the leaves of the model itself.

    Raises:
        FormatError: a leaf is missing, left over, or of another shape.
    """
    try:
        module = Model(num_classes, **{**model, "scan": False})
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None
    (rows, columns), (height, width) = grid or (1, 1), model["patch_size"]
    image = jax.ShapeDtypeStruct((1, rows * height, columns * width, params["embedding/kernel"].shape[2]), np.float32)
    tree = jax.eval_shape(lambda image: module.init(jax.random.key(0), image)["params"], image)
    leaves = {name: leaf.shape for name, leaf in flatten_with_names(tree)[0]}

    missing = [reading.spell(name) for name in leaves if name not in params]
    surplus = reading.unknown + [reading.spell(name) for name in params if name not in leaves]
    wrong = [f"{what} {first_few(map(show, dict.fromkeys(found)))}" for what, found in (
        ("lacks", missing), ("has besides", surplus)) if found]
    wrong += [f"has {show(reading.spell(name))} of {list(params[name].shape)} and not {list(shape)}"
              for name, shape in leaves.items() if name in params and params[name].shape != shape][:3]
    if wrong:
        raise FormatError(f"{path}: read as {reading.format}, the file {'; it '.join(wrong)}")
