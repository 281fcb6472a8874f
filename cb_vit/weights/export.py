"""Models out: files under the names of timm, Hugging Face and big_vision, and folders of runs.

    weights = open_weights("runs/digits", "weights")
    print("\\n".join(export(weights, "digits.safetensors")))
"""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import jax

from cb_vit import io
from cb_vit.config import ConfigError
from cb_vit.pp.normalisation import HALF, Normalisation
from cb_vit.registry import Registry
from cb_vit.weights.containers import write_npz, write_safetensors
from cb_vit.weights.containers.opening import IN_FOLDER
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.conversion import UNSEEN, describe
from cb_vit.weights.dialects.huggingface import config_json, to_huggingface
from cb_vit.weights.dialects.images import evaluation, preprocessor
from cb_vit.weights.dialects.timm import snippet, to_timm
from cb_vit.weights.export_run import image_size, write_run
from cb_vit.weights.loading import Weights, open_weights

Tree = Any
RUN = {"checkpoints", "run.json"}  # all that the folder of an exported run holds


def export(
    weights: Weights, dst: str, *, names: str = "timm", normalisation: tuple[Any, Any] | None = None,
    fold: bool = False, overwrite: bool = False,
) -> list[str]:
    """Write a model in another form, whole or not at all.

    Args:
        weights: the model, from `open_weights`.
        dst: path to write: NAME.safetensors for PyTorch, NAME.npz for big_vision; any other name, without a suffix or
            with a slash at its end, is the folder of a run, which holds parameters and no optimiser.
        names: kind of names in a .safetensors file, one of `NAMES`.
        normalisation: (mean, std) of pixels from 0 to 1 that the model was trained with, each [c], in place of what
            `weights` say.
        fold: whether the patch embedding is changed so that the model takes pixels from -1 to 1.
        overwrite: whether what is there is replaced; a run that was trained never is, nor what a link leads to.

    Returns:
        Lines to print: what `dst` cannot say of the model, and the Python that loads it elsewhere.

    Raises:
        ConfigError: the model cannot be expressed in that form, or an argument cannot work.
        FormatError: a file cannot be read or written.
    """
    write = _writer(dst, names)
    check_target(dst, overwrite)
    if normalisation is not None:
        normalisation = Normalisation.of(normalisation, weights.channels)
    if normalisation := normalisation or weights.normalisation:
        # Seven digits: those of the float32 that a run's preprocessing computes in.
        weights = dataclasses.replace(weights, normalisation=normalisation.rounded(7))
    elif fold:
        raise ConfigError("fold", f"{weights} does not say how its pixels were normalised; give mean and std")
    params = weights.read()
    if fold:
        params = HALF.fold(params, weights.normalisation)
        weights = dataclasses.replace(weights, normalisation=HALF)
    usage = write(dst, weights, jax.device_get(params), overwrite)
    return [*_unsaid(dst, weights), *usage]


def check_target(dst: str, overwrite: bool) -> None:
    """Refuse what is there already, and above all a run with more in it than was ever exported.

    Raises:
        ConfigError: `dst` may not be written; raised at "DST".
    """
    if dst.startswith("hf://"):
        raise ConfigError("DST", f"{dst}: nothing is put on the hub from here; write it to this machine")
    io.check_address(dst, "DST")
    path = io.as_path(dst)
    if not io.is_taken(dst):
        if io.is_local(dst) and not _is_run(dst) and not path.parent.is_dir():
            raise ConfigError("DST", f"{dst}: there is no folder {path.parent}; make it first")
        return
    if not overwrite:
        raise ConfigError("DST", f"{dst} is already there; choose another name, or overwrite it")
    there = io.kind(path) if io.is_local(dst) else None
    if there == io.LINK:
        return
    if there == io.DEVICE:
        raise ConfigError("DST", f"{dst} is {there}; choose another name")
    if path.is_dir() != _is_run(dst):
        raise ConfigError("DST", f"{dst} is a {'folder' if path.is_dir() else 'file'}; choose another name")
    if path.is_dir() and (more := {entry.name for entry in path.iterdir()} - RUN):
        raise ConfigError("DST", f"{dst} holds more than an exported run, {min(more)}, and is not replaced; choose "
                                 "another name")


def write_timm(dst: str, weights: Weights, params: Tree, overwrite: bool) -> list[str]:
    """A `.safetensors` file for timm, and the Python that loads it there.

    Args:
        dst: path of the file.
        weights: the model.
        params: parameters of the model, on the host.
        overwrite: whether a file that is there is replaced.

    Raises:
        ConfigError: timm cannot express the model.
        FormatError: the file cannot be written.
    """
    config, size = weights.model.config, image_size(weights)
    arrays = to_timm(params, config, grid=weights.grid)
    write_safetensors(dst, arrays, _metadata(weights), overwrite)
    return ["", "# In PyTorch:", snippet(config, weights.model.num_classes, size, dst)]


def write_huggingface(dst: str, weights: Weights, params: Tree, overwrite: bool) -> list[str]:
    """A `.safetensors` file for transformers, with `config.json` and `preprocessor_config.json` beside it.

    Takes, gives and raises what `write_timm` does.
    """
    config, size, folder = weights.model.config, image_size(weights), os.path.dirname(dst) or "."
    arrays = to_huggingface(params, config, grid=weights.grid)
    cards, unsaid = {"config.json": config_json(config, weights.model.num_classes, size, weights.class_names)}, []
    if weights.normalisation:
        pp = weights.pp or evaluation({}, weights.normalisation, weights.grid, config.patch_size)[0]
        cards["preprocessor_config.json"], unsaid = preprocessor(pp, weights.normalisation)
    for name in cards:
        if not overwrite and io.is_taken(os.path.join(folder, name)):
            raise ConfigError("DST", f"there is a {name} beside {dst}; choose another folder, or overwrite it")
    for name, content in cards.items():  # before the weights, which mean nothing without them
        with io.writing(os.path.join(folder, name)):
            io.write_atomic(os.path.join(folder, name), json.dumps(content, indent=2) + "\n")
    write_safetensors(dst, arrays, _metadata(weights), overwrite)
    kind, = cards["config.json"]["architectures"]
    found = os.path.basename(dst) == IN_FOLDER[0]
    notes = [] if found else [f"note      from_pretrained finds only {IN_FOLDER[0]}: give the file that name"]
    notes += [f"note      preprocessor_config.json has no words for {', '.join(unsaid)}"] if unsaid else []
    return [*notes, "", "# In PyTorch:", f"from transformers import {kind}", "",
            f"model = {kind}.from_pretrained({folder!r}).eval()"]


def write_big_vision(dst: str, weights: Weights, params: Tree, overwrite: bool) -> list[str]:
    """A `.npz` file for big_vision. Takes and raises what `write_timm` does."""
    write_npz(dst, to_big_vision(params), overwrite)
    return []


NAMES = Registry("kind of names", {"timm": write_timm, "huggingface": write_huggingface})


def _metadata(weights: Weights) -> dict[str, str]:
    return describe(weights.model.config, weights.normalisation, weights.grid, weights.class_names)


def _writer(dst: str, names: str) -> Any:
    named, kind = NAMES.pick(names, "names"), os.path.splitext(dst)[1]
    if kind == ".safetensors":
        return named
    if names != "timm":
        raise ConfigError("names", f"{names!r} is for .safetensors files, not for {dst}")
    if kind == ".npz":
        return write_big_vision
    if _is_run(dst):
        return write_run
    raise ConfigError("DST", f"{dst}: no {kind} is written here; end it in .safetensors for PyTorch, in .npz for "
                             "big_vision, or in / for the folder of a run")


def _is_run(dst: str) -> bool:
    return dst.endswith("/") or not os.path.splitext(dst)[1]


def _unsaid(dst: str, weights: Weights) -> Iterator[str]:
    """What `dst`, just written, does not say of its model, found by looking into it."""
    rows, columns = weights.grid or (1, 1)
    grid = {"grid": weights.grid} if rows != columns and dst.endswith(".npz") else {}
    found, config = open_weights(dst, "DST", **grid), weights.model.config
    lacking = {name: value for name in UNSEEN if (value := getattr(config, name)) != getattr(found.model.config, name)}
    if lacking | grid:
        given = ", ".join(f"{name}={value!r}" for name, value in (lacking | grid).items())
        yield f"note      it cannot say all of its model: cb_vit.load({dst!r}, {given})"
    known = weights.normalisation
    if known is not None and not (found.normalisation and known.same(found.normalisation)):
        yield (f"note      it cannot say how its pixels are normalised: {known.text}; "
               "folded, it takes them from -1 to 1")
