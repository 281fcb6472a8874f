"""Trained models on disk: what a run's folder says of its model, and reading the parameters."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from typing import Any, Literal

import flax.linen as nn

from cb_vit import io, models
from cb_vit.checkpoint import Checkpointer, Item
from cb_vit.config import ConfigError
from cb_vit.models.resample import METHODS
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess

Tree = Any


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """The block `config.model_load`: how the parameters of `config.model_init` are taken.

    Attributes:
        params: "raw", or "ema": their moving average, where that run kept one.
        dont_load: regexes of names; those of the model begin anew, those of the file are left there.
        posemb_resize: how position embeddings are brought to another resolution: "bicubic_antialias" as timm does,
            "bicubic" as DeiT did, "linear" as big_vision does.
    """

    params: Literal["raw", "ema"] = "raw"
    dont_load: tuple[str, ...] = ()
    posemb_resize: str = "bicubic_antialias"

    def __post_init__(self):
        METHODS.pick(self.posemb_resize, "posemb_resize")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained model whose parameters have not been read yet.

    Attributes:
        path: the run's folder.
        step: of its checkpoint.
        item: the parameters, or their moving average.
        model: the Linen module, its blocks in loop layout.
        shapes: shapes and dtypes of its parameters.
        image_shape: of the images it was trained on, [y x c].
        preprocess: what was done to them.
    """

    path: str
    step: int
    item: Item
    model: nn.Module
    shapes: Tree
    image_shape: tuple[int, int, int]
    preprocess: Preprocess

    def read(self, like: Tree) -> Tree:
        """The parameters, each leaf straight onto its devices; `like`: `shapes` with shardings."""
        with contextlib.closing(_checkpoints(self.path)) as checkpointer:
            return checkpointer.restore_params(self.step, like, self.item)


def open_weights(path: str | os.PathLike, field: str, item: Item = "params") -> Weights:
    """Look into the folder of a run; its parameters are read later.

    Args:
        path: the workdir, or the folder of checkpoints in it; FOLDER@STEP for another checkpoint than the newest.
        field: the setting that names it, for errors.
        item: the parameters, or their moving average.

    Raises:
        ConfigError: at `field`, what is missing or cannot be read.
    """
    folder, step = re.fullmatch(r"(.*?)(?:/checkpoints)?(?:@(\d+))?/*", os.fspath(path), re.DOTALL).groups()
    notes_file = io.as_path(folder) / "run.json"
    if not notes_file.exists():
        raise ConfigError(field, f"{path} is not the workdir of a run: it has no run.json")
    try:
        notes = json.loads(notes_file.read_text())
        model = models.get(notes["model_name"]).Model(notes["num_classes"], **{**notes["model"], "scan": False})
        preprocess = builder.build(notes["pp"], "pp")
        shape = tuple(notes["image_shape"])
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise ConfigError(field, f"{notes_file} does not describe a model: {error!r}") from None
    try:
        with contextlib.closing(_checkpoints(folder)) as checkpointer:
            found, shapes = checkpointer.params_shapes(step and int(step), item)
    except ConfigError as error:
        raise ConfigError(field, error.message) from None
    return Weights(folder, found, item, model, shapes, shape, preprocess)


def _checkpoints(path: str | os.PathLike) -> Checkpointer:
    return Checkpointer(io.as_path(path) / "checkpoints", read_only=True)
