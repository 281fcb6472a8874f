"""Trained models from anywhere: what a file or a run's folder says of its model, and its parameters.

    model, params = cb_vit.load("runs/digits")                              # a run of this project
    model, params = cb_vit.load("hf://timm/deit_tiny_patch16_224.fb_in1k")  # the hub, or its cache without a network
    logits, out = model.apply({"params": params}, images)
"""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cb_vit import dist, io, models, retry, workdir
from cb_vit.checkpoint import Checkpointer, Params
from cb_vit.config import ConfigError, at
from cb_vit.models.common import Report
from cb_vit.models.resample import METHODS
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess
from cb_vit.pp.normalisation import Normalisation
from cb_vit.registry import parse_calls
from cb_vit.tree import map_with_names, unflatten_names
from cb_vit.weights import containers, hub
from cb_vit.weights.containers.opening import IN_FOLDER
from cb_vit.weights.dialects.conversion import UNSEEN, convert
from cb_vit.weights.dialects.images import evaluation
from cb_vit.weights.refit import with_channels, with_classes, with_image_size

logger = logging.getLogger(__name__)
Tree = Any
LABEL_OPS = ("onehot", "keep", "drop", "copy")  # ops of a preprocessing string that are not about pixels


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """The block `config.model_load`: how the parameters of `config.model_init` are taken.

    Attributes:
        params: kind of a run's parameters: "raw", or "ema", their moving average, where that run kept one.
        dont_load: regexes of names of arrays; those of the model begin anew, those of the file are left there.
        posemb_resize: method by which position embeddings are brought to another resolution: "bicubic_antialias" as
            timm does, "bicubic" as DeiT did, "linear" as big_vision does.
        key: entry of a PyTorch file that holds the weights; see `load`.
        prefix: beginning of the names of the arrays to take; see `load`.
    """

    params: Params = "raw"
    dont_load: tuple[str, ...] = ()
    posemb_resize: str = "bicubic_antialias"
    key: str | None = None
    prefix: str | None = None

    def __post_init__(self):
        METHODS.pick(self.posemb_resize, "posemb_resize")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained model whose parameters have not been read yet.

    Attributes:
        path: path of the file or of the run's folder, as given.
        format: kind of the file: "run", "timm", "deit", "dinov2", "huggingface", "big_vision" or "augreg".
        step: step of a run's checkpoint; None for a file.
        model: the Linen module, its blocks in loop layout.
        shapes: shapes and dtypes of the model's parameters.
        grid: rows and columns of patches that the positions are for; None: they are fixed, for any.
        normalisation: mean and std, each [c], of pixels from 0 to 1, that the model was trained with; None: not known.
        pp: preprocessing string for evaluation, from a file's bytes to the model's images; None: not known.
        class_names: names of the head's classes, in their order; None: not known.
        doubts: lines on what was assumed in reading, or asked for although the file says otherwise.
        notes: the doubts, and lines on what was folded or cannot be known.
        fetch: function that reads the parameters, each leaf to where the given shapes with shardings put it.
    """

    path: str
    format: str
    step: int | None
    model: nn.Module
    shapes: Tree
    grid: tuple[int, int] | None
    normalisation: Normalisation | None
    pp: str | None
    class_names: tuple[str, ...] | None
    doubts: tuple[str, ...]
    notes: tuple[str, ...]
    fetch: Callable[[Tree], Tree]

    def __str__(self) -> str:
        return self.path if self.step is None else f"step {self.step} of {self.path}"

    @property
    def channels(self) -> int:
        """Channels of the model's images."""
        return self.shapes["embedding"]["kernel"].shape[2]

    def read(self, like: Tree = None) -> Tree:
        """The parameters, float32, each leaf straight onto its devices.

        Args:
            like: the attribute `shapes` with shardings; None: all leaves go to the first device.
        """
        if like is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), self.shapes)
        return self.fetch(like)

    def other_size(self) -> tuple[str, ...]:
        """A line where images are prepared in another size than positions are for, as cards of DINOv2 have it; or none.

        It is for who puts images in, not for who takes the parameters into another model.
        """
        if self.pp is None or self.grid is None or self.model.config.posemb != "learn":
            return ()
        size = builder.build(self.pp, "pp").image_size
        own = tuple(count * side for count, side in zip(self.grid, self.model.config.patch_size, strict=True))
        if size in (None, own):
            return ()
        return (f"its images are prepared in {size[0]}×{size[1]} pixels, its positions are for {own[0]}×{own[1]}: give "
                f"image_size={size[0] if size[0] == size[1] else size}, or the other",)

    def known_normalisation(self) -> Normalisation:
        """How the model's pixels were normalised.

        Raises:
            ConfigError: the normalisation is not known.
        """
        if self.normalisation is None:
            raise ConfigError("normalisation", f"{self.path} does not say how its pixels were normalised; write that "
                              "down with `cb-vit convert SRC DST.safetensors --mean=… --std=…`")
        return self.normalisation

    def adapter(self, preprocess: Preprocess) -> Callable[[Float[Array, "b y x c"]], Float[Array, "b y x c"]]:
        """A function from images as `preprocess` normalises them to images as the model knows them.

        Raises:
            ConfigError: it is not known how the model's images were normalised.
        """
        trained = self.known_normalisation()
        own = preprocess.normalisation(len(trained.mean))
        if own.same(trained):
            return lambda image: image
        scale, shift = (values.reshape(1, 1, 1, -1) for values in own.to(trained))
        return lambda image: image * scale + shift


def load(
    path: str | os.PathLike, *, params: Params = "raw", key: str | None = None,
    prefix: str | None = None, num_classes: int | None = None, channels: int | None = None,
    image_size: int | tuple[int, int] | None = None, normalisation: tuple[Any, Any] | None = None,
    place: Callable[[Tree], Tree] | None = None, **model: Any,
) -> tuple[nn.Module, Tree]:
    """A model and its parameters, ready for `model.apply({"params": params}, images)`.

    Args:
        path: path of a run's workdir (`WORKDIR@STEP`: that checkpoint), of a `.safetensors`, `.pth`, `.bin` or `.npz`
            file of timm, DeiT, DINOv2, Hugging Face, big_vision or AugReg (`FILE.npz:PART`: part of it), or of a folder
            of Hugging Face's, or `hf://ORG/NAME[@REVISION][/FILE]`.
        params: kind of a run's parameters: themselves ("raw"), or their moving average ("ema").
        key: entry of a PyTorch file that holds the weights, e.g. "model_ema".
        prefix: beginning of the names of the arrays to take from a file, e.g. "visual.trunk"; None: all are taken,
            without what stands in front of every name.
        num_classes: width of the head; 0 leaves the head (or heads) in the file; None: the file's own.
        channels: number of channels of your images; a model of three is adapted by timm's rule, and what was trained on
            RGB takes grey pixels (channels=1) as it took them three times over. None: the file's own.
        image_size: side of your images in pixels, or (height, width), onto whose grid of patches positions are
            resampled, antialiased as timm does it. None: the file's own.
        normalisation: (mean, std) of pixels from 0 to 1 that your images have: the difference to what the model was
            trained with is folded into its patch embedding. None: images must be normalised as in training.
        place: function from the shapes of the parameters to the same with shardings, to read them straight into shards;
            None: all go to the first device.
        **model: keywords of `Model`, for what a file does not say, such as `context="cb"` or `num_heads=4`.

    Raises:
        ConfigError: the folder holds no run, or a keyword fits no model.
        FormatError: the file cannot be read, is of another architecture, contradicts `model`, or does not say what only
            `model` can.

    Warns:
        UserWarning: something is assumed, as all published models of that kind agree, or `model` contradicts the file.
    """
    weights = open_weights(path, "path", params=params, key=key, prefix=prefix, num_classes=num_classes,
                           channels=channels, image_size=image_size, **model)
    for note in (*weights.notes, *weights.other_size()):
        logger.info("%s: %s", weights, note)
    for doubt in weights.doubts:
        warnings.warn(f"{path}: {doubt}", stacklevel=2)
    if normalisation is not None:
        normalisation = Normalisation.of(normalisation, weights.channels)
    tree = weights.read(None if place is None else place(weights.shapes))
    if normalisation is not None:
        if weights.normalisation is None:
            raise ConfigError("normalisation", f"{path} does not say how its pixels were normalised: nothing to fold")
        tree = normalisation.fold(tree, weights.normalisation)
    return weights.model, tree


def merge(
    init_params: Tree, path: str | os.PathLike, config: Any, dont_load: Sequence[str] = (),
    posemb_resize: str = "bicubic_antialias", *, image_size: tuple[int, int] | None = None, key: str | None = None,
    prefix: str | None = None, channels: int | None = None,
) -> tuple[Tree, Report]:
    """Begin from the parameters of a file or run; see `models.vit.merge`, which has the rules.

    Args:
        init_params: initial parameters, in the model's own layout.
        path: path of the file or run, as for `load`.
        config: settings of the model, its `model.config`.
        dont_load: regexes of names of arrays that keep their initial value, or that are left in the file.
        posemb_resize: method of resizing position embeddings, one of `models.resample.METHODS`.
        image_size: (height, width) in pixels of the images that the model is for; None: they are square.
        key, prefix: choice of what to take from the file, as for `load`.
        channels: number of channels of the model's images; None: as many as `init_params` have.

    Returns:
        Parameters like `init_params`, and the report, whose `lines` say what became of every array.

    Raises:
        ConfigError: the file is of another model.
        FormatError: the file cannot be read.
    """
    if channels is None:
        channels = init_params["embedding"]["kernel"].shape[2]
    weights = open_weights(path, "init_file", key=key, prefix=prefix, channels=channels)
    params, report = models.get("vit").merge(init_params, weights.read(), config, dont_load, posemb_resize,
                                             image_size=image_size, loaded_grid=weights.grid)
    return params, Report((*report.lines, *weights.notes, *compare(weights.model.config, config)))


def compare(trained: Any, config: Any) -> list[str]:
    """Lines on settings that change what parameters compute, but the shape of none: in training and here."""
    pairs = ((name, getattr(trained, name), getattr(config, name)) for name in (*UNSEEN, "posemb"))
    return [f"{name}: trained with {before!r}, {here!r} here" for name, before, here in pairs if before != here]


def open_weights(
    path: str | os.PathLike, field: str, *, params: Params = "raw", key: str | None = None,
    prefix: str | None = None, num_classes: int | None = None, channels: int | None = None,
    image_size: int | tuple[int, int] | None = None, **model: Any,
) -> Weights:
    """Look into a file or the folder of a run; its parameters are read later.

    Args:
        path: path of the file or run, as for `load`, or of the folder of checkpoints in a run.
        field: setting that names the path, for errors.
        params, key, prefix, num_classes, channels, image_size: choice of what is taken, as for `load`.
        **model: keywords of `Model`, for what a file does not say.

    Raises:
        ConfigError: part of a run is missing or cannot be read; raised at `field`.
        FormatError: the file cannot be read.
    """
    path = os.fspath(path)
    if not path.startswith("hf://"):
        io.check_address(path, field)
    weights = _open(path, field, params, key, prefix, model)
    if num_classes is not None:
        weights = with_classes(weights, num_classes)
    if channels is not None:
        weights = with_channels(weights, channels)
    if image_size is not None:
        weights = with_image_size(weights, image_size)
    return weights


def _open(
    path: str, field: str, params: Params, key: str | None, prefix: str | None, model: Mapping[str, Any]
) -> Weights:
    if run := as_run(path):
        told = {"key": key, "prefix": prefix} | model
        if given := ", ".join(name for name, value in told.items() if value is not None):
            raise ConfigError(field, f"{path} is a run, which knows its model; leave out {given}")
        return _open_run(*run, field, params)
    if params != "raw":
        raise ConfigError(field, f"{path} is no run of this project: only those keep an average ({params!r})")
    file, subtree = containers.split_subtree(path)
    if io.is_local(file) and not file.startswith("hf://"):
        _check_local(path, os.path.expanduser(file), field)
    if subtree is not None and prefix is not None:
        raise ConfigError("prefix", f"{path} names a part of the file already; give one of them")
    return _open_file(path, file, key, subtree if prefix is None else prefix, model)


def as_run(path: str) -> tuple[str, int | None] | None:
    """The folder of the run that a path names, and the step in it that it asks for; None: it names no run."""
    folder, step = re.fullmatch(r"(.*?)(?:/checkpoints)?(?:@(\d+))?/*", path, re.DOTALL).groups()
    is_run = not path.startswith("hf://") and io.exists(io.as_path(folder) / "run.json")
    return (folder, step and int(step)) if is_run else None


def _check_local(path: str, file: str, field: str) -> None:
    if not os.path.exists(file):
        raise ConfigError(field, f"{path} does not exist; give a run's workdir, a file of weights or hf://ORG/NAME")
    if os.path.isdir(file) and not any(os.path.exists(os.path.join(file, name)) for name in IN_FOLDER):
        raise ConfigError(field, f"{path} is not the workdir of a run: it has no run.json; nor has it a file of "
                                 f"weights, {', '.join(IN_FOLDER)}")


def _open_run(folder: str, step: int | None, field: str, params: Params) -> Weights:
    notes_file = io.as_path(folder) / "run.json"

    def read() -> dict[str, Any]:
        if (found := workdir.read_run(folder)) is None:  # here, but not on another host
            raise ConfigError(field, f"{notes_file} does not exist")
        return found

    with at(field):
        notes = dist.together(read)
    try:
        model, grid, normalisation, pp = _told_by_run(notes)
        names = workdir.class_names(notes, folder)
    except retry.PARSING as error:
        raise ConfigError(field, f"{notes_file} does not describe a model: {error!r:.300}") from None
    with at(field), contextlib.closing(_checkpoints(folder)) as checkpointer:
        found, shapes = checkpointer.params_shapes(step, params)

    def fetch(like: Tree) -> Tree:
        with contextlib.closing(_checkpoints(folder)) as checkpointer:
            return checkpointer.restore_params(found, like, params)

    return Weights(folder, "run", found, model, shapes, grid, normalisation, pp, names, (), (), fetch)


def _told_by_run(
    notes: Mapping[str, Any]
) -> tuple[nn.Module, tuple[int, int] | None, Normalisation, str | None]:
    """The model, its grid, normalisation and preprocessing as `run.json` has them; raises `retry.PARSING`."""
    module = models.get(notes["model_name"])
    model = module.Model(notes["num_classes"], **{**notes["model"], "scan": False})
    *size, channels = notes["image_shape"]
    normalisation = Normalisation.of(builder.build(notes["pp"], "pp").normalisation(channels), channels)
    pp = next(iter(notes.get("pp_evals", {}).values()), None)
    pp = pp and _pixels_only(pp)
    grid = module.patch_grid(model.config, tuple(size))
    return model, grid, normalisation, pp


def _open_file(path: str, file: str, key: str | None, prefix: str | None, model: Mapping[str, Any]) -> Weights:
    file, card = hub.resolve(file)
    opened = containers.open_file(file, key)
    found = convert(containers.parameters(opened), path=path, config=card, prefix=prefix,
                    metadata={k: v for k, v in opened.metadata.items() if isinstance(v, str)}, **model)
    module = models.get("vit").Model(found.num_classes, **{**found.model, "scan": False})
    shapes = unflatten_names({name: jax.ShapeDtypeStruct(tensor.shape, jnp.float32)
                              for name, tensor in found.params.items()})

    def fetch(like: Tree) -> Tree:
        def one(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            array = found.params[name].read()  # one at a time: the whole is never in memory twice
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

        return map_with_names(one, like)

    pp, note = evaluation(card, found.normalisation, found.grid, module.config.patch_size)
    return Weights(path, found.format, None, module, shapes, found.grid, found.normalisation, pp, found.class_names,
                   found.doubts, (*found.doubts, *found.notes, *([note] if note else ())), fetch)


def _pixels_only(pp: str) -> str:
    """A preprocessing string without what it does to labels."""
    return "|".join(call.text for call in parse_calls(pp, "pp") if call.name not in LABEL_OPS)


def _checkpoints(folder: str) -> Checkpointer:
    return Checkpointer(io.as_path(folder) / "checkpoints", read_only=True)
