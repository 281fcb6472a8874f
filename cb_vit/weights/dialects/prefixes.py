"""What stands in front of the names of a model: wrappers of it (DataParallel, torch.compile, Lightning), or what it is
a part of (the backbone of a detector, one of two towers).
"""
from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping

from cb_vit.texts import first_few
from cb_vit.weights.containers.files import FormatError, Tensor, show
from cb_vit.weights.dialects.names import unique

Known = Callable[[Collection[str]], bool]
# Modules that PyTorch puts round others, anywhere in a model, and that change nothing.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PART = re.compile(r"[^./]*[./]")
_MOST = 8  # parts of a prefix; a hostile file could have any number


def take_off(
    tensors: Mapping[str, Tensor], prefix: str | None, known: Known, path: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The arrays of a model by bare names, and notes of what was taken off.

    Of what all names share, as much is taken off as makes them known; if nothing does, they stay as they are.

    Args:
        tensors: tensors of the file by name.
        prefix: beginning of the names of the arrays to take; None: all are taken.
        known: function that says whether names are those of a model that can be read.
        path: path of the file, for errors.

    Raises:
        FormatError: nothing is under `prefix`, or two names have become one.
    """
    found, notes = dict(tensors), []
    if wrappers := sorted({match[0] for name in found for match in _WRAPPER.finditer(name)}):
        found = unique(((_WRAPPER.sub("", name), tensor) for name, tensor in found.items()), path)
        notes += [f"{', '.join(map(repr, wrappers))} in names is taken off"]
    if prefix is not None and (start := _WRAPPER.sub("", prefix.rstrip("./") + ".").rstrip("./")):
        whole, found = found, under(start, found)
        if not found:
            raise FormatError(f"{path}: has no part {show(prefix)}; its parts: {_parts(whole)}")
        if rest := len(tensors) - len(found):
            notes += [f"{rest} of the file's {len(tensors)} arrays are not under {show(prefix)}; they are left there"]
    shared = next((start for start in _shared(found) if known([name[len(start):] for name in found])), "")
    if shared:
        found = {name.removeprefix(shared): tensor for name, tensor in found.items()}
        notes += [f"{show(shared)} in front of all names is taken off"]
    return found, notes


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays under a prefix, by what follows; the separator at its end may be left out."""
    starts = tuple(prefix.rstrip("./") + separator for separator in "./")
    return {name[len(starts[0]):]: tensor for name, tensor in tensors.items() if name.startswith(starts)}


def candidates(names: Collection[str], known: Known) -> list[str]:
    """Prefixes under which there are names of a model that can be read, none of them within another."""
    found: dict[str, None] = {}
    for name in names:
        ends = [match.end() for match in _PART.finditer(name)][:_MOST]
        found |= dict.fromkeys(name[:end - 1] for end in ends if known([name[end:]]))
    return [prefix for prefix in found if not any(prefix.startswith((f"{other}.", f"{other}/")) for other in found)]


def _parts(names: Collection[str]) -> str:
    """What a file consists of, for an error: what follows the prefix that all names share."""
    *_, shared = _shared(names)
    matches = (_PART.match(name, len(shared)) for name in names)
    found = sorted({shared + match[0][:-1] for match in matches if match})
    return first_few(map(show, found), 20) or "none"


def _shared(names: Collection[str]) -> Iterator[str]:
    """What all names begin with, shortest first: "", "module.", "module.backbone."."""
    start = ""
    for _ in range(_MOST):
        yield start
        parts = {match and match[0] for match in (_PART.match(name, len(start)) for name in names)}
        if len(parts) != 1 or None in parts:
            return
        start += parts.pop()
