"""How PyTorch spells the layers of a ViT and how we do: tables that serve both directions.

A table says of each module of theirs which of ours it is and of what kind; the kind says how its arrays lie.
The number of a block is written `#`. torch keeps a dense kernel as [outputs, inputs], a convolution as
[outputs, inputs, y, x] and the heads folded into the width, head by head; we keep [inputs, outputs], [y, x, inputs,
outputs] and the heads as an axis of their own, as Flax does (reference: big_vision, `models/vit.py`).
"""
from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cb_vit.config import ConfigError
from cb_vit.models.layers import posemb_sincos_2d
from cb_vit.models.vit import VARIANTS, Config
from cb_vit.pp.normalisation import Normalisation
from cb_vit.texts import first_few
from cb_vit.tree import flatten_with_names
from cb_vit.weights.containers.files import FormatError, Tensor, show

# Width, depth, MLP width and heads of models that others have published, with a class token, in PyTorch.
PUBLISHED = [VARIANTS[name] for name in ("Ti", "S", "M", "B", "L", "H", "g", "G")]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array lies in a file: `read(theirs, heads)` gives ours, `write(ours)` theirs."""

    read: Callable[[np.ndarray, int], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _patches(kernel: np.ndarray, heads: int) -> np.ndarray:
    if kernel.ndim == 2:  # timm before 0.4 had a dense layer here: one row a channel, as a convolution's is
        side = math.isqrt(kernel.shape[1] // 3)
        kernel = kernel.reshape(len(kernel), 3, side, side)
    return kernel.transpose(2, 3, 1, 0)


SAME = Layout(lambda a, heads: a, lambda a: a)
DENSE_KERNEL = Layout(lambda a, heads: a.transpose(1, 0), np.transpose)
PATCH_KERNEL = Layout(_patches, lambda a: a.transpose(3, 2, 0, 1))
TO_HEADS = Layout(lambda a, heads: a.transpose(1, 0).reshape(a.shape[1], heads, -1), lambda a: a.reshape(len(a), -1).T)
HEADS_BIAS = Layout(lambda a, heads: a.reshape(heads, -1), np.ravel)
FROM_HEADS = Layout(lambda a, heads: a.transpose(1, 0).reshape(heads, -1, len(a)),
                    lambda a: a.reshape(-1, a.shape[-1]).T)

# Kinds of modules: their leaf → our leaf and its layout.
Kind = dict[str, tuple[str, Layout]]
NORM: Kind = {"weight": ("scale", SAME), "bias": ("bias", SAME)}
DENSE: Kind = {"weight": ("kernel", DENSE_KERNEL), "bias": ("bias", SAME)}
PATCH: Kind = {"weight": ("kernel", PATCH_KERNEL), "bias": ("bias", SAME)}
QKV: Kind = {"weight": ("kernel", TO_HEADS), "bias": ("bias", HEADS_BIAS)}
OUT: Kind = {"weight": ("kernel", FROM_HEADS), "bias": ("bias", SAME)}


class Names:
    """A table of modules, `theirs: (ours, kind)`, and one of single leaves, `theirs: ours`; see the head of this file.

    Attributes:
        format: name of the format whose names these are, for errors.
    """

    def __init__(self, format: str, modules: Mapping[str, tuple[str, Kind]], leaves: Mapping[str, str]):
        self.format = format
        entries = [(name, ours, SAME) for name, ours in leaves.items()]
        entries += [(f"{module}.{leaf}", f"{ours}/{our_leaf}", layout) for module, (ours, kind) in modules.items()
                    for leaf, (our_leaf, layout) in kind.items()]
        self._ours = {theirs: (ours, layout) for theirs, ours, layout in entries}
        self._theirs = {ours: (theirs, layout) for theirs, ours, layout in entries}

    def ours(self, name: str) -> tuple[str, Layout] | None:
        """Our name for theirs, and the layout; None: not in the table."""
        return _find(self._ours, name)

    def theirs(self, name: str) -> tuple[str, Layout] | None:
        """Their name for ours, and the layout; None: not in the table."""
        return _find(self._theirs, name)

    def read(self, tensors: Mapping[str, Tensor], heads: int, path: str) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors under our names and in our layout, still lazy, and the names that the table lacks.

        Raises:
            FormatError: a shape is impossible for what the name says.
        """
        params, unknown = {}, []
        for name, tensor in tensors.items():
            match self.ours(name):
                case None:
                    unknown.append(name)
                case ours, layout:
                    try:
                        params[ours] = view(tensor, lambda a, layout=layout: layout.read(a, heads))
                    except ValueError:
                        raise FormatError(f"{path}: {show(name)} is {list(tensor.shape)}, which does not go with its "
                                          f"name and {heads} heads") from None
        return params, unknown

    def write(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Our arrays under their names and in their layout.

        Raises:
            ConfigError: an array has no name in the table.
        """
        homeless = [name for name in params if self.theirs(name) is None]
        if homeless:
            raise ConfigError("params", f"{self.format} has no place for {first_few(map(show, homeless))}")
        found = ((self.theirs(name), array) for name, array in params.items())
        return {theirs: np.ascontiguousarray(layout.write(array)) for (theirs, layout), array in found}


def _find(table: Mapping[str, tuple[str, Layout]], name: str) -> tuple[str, Layout] | None:
    number = re.search(r"(?<=blocks\.)\d+|(?<=layer\.)\d+|(?<=layers\.)\d+|(?<=encoderblock_)\d+", name)
    entry = table.get(name if number is None else name[:number.start()] + "#" + name[number.end():])
    return entry and (entry[0].replace("#", number[0]) if number else entry[0], entry[1])


def unique(tensors: Iterable[tuple[str, Tensor]], path: str) -> dict[str, Tensor]:
    """Renamed tensors by name.

    Raises:
        FormatError: two tensors have got the same name.
    """
    found = {}
    for name, tensor in tensors:
        if name in found:
            raise FormatError(f"{path}: {show(name)} is in it twice, under an old and a new name")
        found[name] = tensor
    return found


def view(tensor: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """A tensor that `function`, which only moves things about, is applied to when it is read.

    Raises:
        ValueError: `function` cannot take an array of this shape.
    """
    without_memory = np.broadcast_to(np.zeros(()), tensor.shape)
    return tensor.map(function, function(without_memory).shape)


def parts(tensor: Tensor, functions: Sequence[Callable[[np.ndarray], np.ndarray]]) -> list[Tensor]:
    """A view for each function; the tensor is read once for all of them, and kept until the last has been read.

    Raises:
        ValueError, IndexError: a function cannot take an array of this shape.
    """
    kept, waiting = [], set()

    def read(i: int) -> np.ndarray:
        if not kept:
            kept.append(tensor.read())
            waiting.update(range(len(functions)))
        array = kept[0]
        waiting.discard(i)
        if not waiting:
            kept.clear()
        return functions[i](array)

    return [dataclasses.replace(view(tensor, function), read=functools.partial(read, i))
            for i, function in enumerate(functions)]


def without_mask(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the token that stands for masked patches in training, and a note on it if it is there.

    Args:
        tensors: tensors of the file by name.
        name: name of the token.
    """
    note = f"{show(name)} is left in the file: it stands for masked patches, of which there are none after training"
    return {key: tensor for key, tensor in tensors.items() if key != name}, [note] * (name in tensors)


def pick_heads(
    tensors: Mapping[str, Tensor], norm: str, mlp: str, path: str, told: int | None, guess: dict[str, Any], may: bool,
    published: Sequence[tuple[int, ...]] = PUBLISHED,
) -> int:
    """How many heads a model has, as PyTorch's files do not say; 1 where nobody knows.

    Args:
        tensors: tensors by the file's own names.
        norm, mlp: ends of the names of the scale of a block's first norm, and of the kernel of its MLP's first layer.
        path: path of the file, for errors.
        told: number of heads that someone else says; None: nobody does.
        guess: dict in which "num_heads" is put down where nobody says: what all published models of the same sizes
            have, or None.
        may: whether the number may be guessed.
        published: width, depth, MLP width and heads of all models of the kind that others have published.

    Raises:
        FormatError: there are no blocks, or the model cannot have as many heads as told.
    """
    norms = [math.prod(tensor.shape) for name, tensor in tensors.items() if name.endswith(norm)]
    if not norms:
        raise FormatError(f"{path}: it lacks the norms of its blocks, …{norm}")
    width, inner = norms[0], {tensor.shape[:1] for name, tensor in tensors.items() if name.endswith(mlp)}
    if told is not None and (told < 1 or width % told):
        raise FormatError(f"{path}: num_heads={told} does not divide the width of the file, {width}")
    if told is not None:
        return told
    found = [heads for *sizes, heads in published if may and (width, len(norms)) == tuple(sizes[:2])
             and inner == {(sizes[2],)}]
    guess["num_heads"] = found[0] if found else None
    return guess["num_heads"] or 1


def flat(params: Any, config: Config, grid: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """Parameters, nested or flat, by name; a fixed position embedding is written out as if it were learned.

    Raises:
        ConfigError: `grid`, the rows and columns of patches, is not given, and a fixed embedding needs it.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_with_names(params)[0]}
    if config.posemb == "learn":
        return arrays
    if grid is None:
        raise ConfigError("grid", "posemb='sincos2d' is no parameter; give (rows, columns) of patches to write it out")
    return {**arrays, "pos_embedding": np.asarray(posemb_sincos_2d(*grid, config.width))}


def add_entries(params: Mapping[str, np.ndarray], entries: int) -> dict[str, np.ndarray]:
    """The position embedding with so many empty rows in front: those of tokens that have theirs in themselves."""
    return {**params, "pos_embedding": np.pad(params["pos_embedding"], ((0, 0), (entries, 0), (0, 0)))}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the reader of one format makes of a file.

    Attributes:
        format: name of the format.
        params: tensors under our names and in our layout; positions may still have entries of class tokens.
        unknown: names in the file that mean nothing to the reader.
        spell: function from our name to the file's, for errors.
        model: keywords of `Model` that a config file decides.
        usual: keywords that the format's own code decides; files of others in this format may have others.
        guess: keywords of `Model` that nothing says, but on which all published files of this kind agree.
        entries: number of positions that are those of tokens; None: the file does not say.
        image_size: (height, width) of the images that the positions are for, where a config file says so.
        normalisation: (mean, std) of pixels from 0 to 1, not yet checked; None: not known.
        usual_normalisation: normalisation that all published files of this kind have; None: they do not agree.
        class_names: names of the head's classes, in their order; None: no config file has them.
        notes: lines on what was assumed.
    """

    format: str
    params: dict[str, Tensor]
    unknown: list[str]
    spell: Callable[[str], str]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    usual: dict[str, Any] = dataclasses.field(default_factory=dict)
    guess: dict[str, Any] = dataclasses.field(default_factory=dict)
    entries: int | None = 0
    image_size: tuple[int, int] | None = None
    normalisation: Any = None
    usual_normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
