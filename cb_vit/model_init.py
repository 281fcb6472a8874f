"""Beginning from the parameters of another model: `config.model_init`, and what becomes of every array of it."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax

from cb_vit import datasets, dist, models
from cb_vit.checkpoint import in_loop_layout
from cb_vit.config import ConfigError, at
from cb_vit.datasets import labels
from cb_vit.experiment import Experiment
from cb_vit.settings import Settings
from cb_vit.train_state import TrainState
from cb_vit.tree import first_match, flatten_with_names, map_with_names
from cb_vit.weights import LoadConfig, Weights, open_weights
from cb_vit.weights.loading import compare, with_channels

logger = logging.getLogger(__name__)


def open_init(settings: Settings) -> Weights:
    """The parameters that `config.model_init` names.

    Raises:
        ConfigError: there are no parameters there, or they cannot be read.
    """
    load = settings.model_load or LoadConfig()
    return open_weights(settings.model_init, "config.model_init", params=load.params, key=load.key,
                        prefix=load.prefix)


def with_model_of(settings: Settings, weights: Weights) -> Settings:
    """`settings`, whose model is that of `weights` in all that they leave open; the log says in what."""
    trained, module = dataclasses.asdict(weights.model.config), models.get(settings.model_name)
    taken = settings.with_model(trained)
    ours, default = settings.raw.get("model") or {}, module.Config()
    told = [f"{name} {value!r}" for name, value in module.inherit(ours, trained).items()
            if ours.get(name) is None and value != getattr(default, name)]
    if told:
        logger.info("config.model: as in %s, where it is not set: %s", weights, ", ".join(told))
    return taken


def with_model(settings: Settings) -> Settings:
    """`settings` with the whole model, of which a `model_init` may have a part."""
    return with_model_of(settings, open_init(settings)) if settings.model_init else settings


def fit(run: Experiment, weights: Weights) -> Callable[[], tuple[TrainState, dict[str, Any]]]:
    """Fit parameters of another model to a run, by their shapes alone.

    Returns:
        A function that reads the parameters, and makes the state before the first step and a note of where its
        parameters are from.

    Raises:
        ConfigError: the parameters do not fit; what cannot be read shows only when they are read.
    """
    merge, lines, weights = _fit(run, weights)
    own, everywhere = dict(flatten_with_names(in_loop_layout(run.shapes.params))[0]), dist.replicated(run.mesh)

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        fits = name in own and own[name].shape == leaf.shape
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own[name].sharding if fits else everywhere)

    def begin() -> tuple[TrainState, dict[str, Any]]:
        loaded = weights.read(map_with_names(place, weights.shapes))
        for line in (*weights.notes, *lines):
            logger.info("parameters of %s: %s", weights, line)
        taken = (run.settings.model_load or LoadConfig()).params
        note = {"path": weights.path, "step": weights.step, "params": taken, "report": [*weights.notes, *lines]}
        return run.create_state(merge, loaded), {"model_init": note}

    return begin


def _fit(run: Experiment, weights: Weights) -> tuple[Callable[[Any, Any], Any], list[str], Weights]:
    """(initial parameters, loaded ones) → parameters; what becomes of each array; and the weights to load."""
    settings, image_shape = run.settings, run.example_spec["image"][0]
    with at("config.model_init"):
        weights = with_channels(weights, image_shape[-1])
    module, cfg, load = models.get(settings.model_name), settings.model, settings.model_load or LoadConfig()
    other, said = _compare_classes(run, weights)
    own = settings.input.pp.normalisation(image_shape[-1])
    anew = first_match("embedding/kernel", [(regex, True) for regex in load.dont_load], False)
    with at("config.model_init"):
        trained = own if anew else weights.known_normalisation()
    folds = len(trained.mean) == len(own.mean) and not own.same(trained)
    lines = ["embedding: normalised pixels mean something else here, which is folded into it"] * folds
    lines += [*compare(weights.model.config, cfg), *said]

    def merge(init: Any, loaded: Any) -> tuple[Any, Any]:
        return module.merge(
            init, own.fold(loaded, trained) if folds else loaded, cfg, load.dont_load,
            load.posemb_resize, image_size=image_shape[:2], loaded_grid=weights.grid,
            other_classes=other)

    try:
        _, report = jax.eval_shape(merge, run.shapes.params, weights.shapes)
    except ConfigError as error:
        raise ConfigError(f"config.{error.path}", f"{weights}: {error.message}") from None
    return lambda init, loaded: merge(init, loaded)[0], [*report.lines, *lines], weights


def _compare_classes(run: Experiment, weights: Weights) -> tuple[bool, list[str]]:
    """Whether the head of `weights` is for other classes than the run's, and a line on it."""
    count = weights.model.num_classes
    if not count or count != run.num_classes:  # there is no head to keep
        return False, []
    names = datasets.known_names(run.pipeline.source)
    try:
        places = labels.match(names, weights.class_names, count)
    except labels.Unmatched as error:
        return True, [f"head: its classes are others: {error}"]
    if places is None:
        return False, [f"head: its {count} classes are taken to be those of the data, by their numbers"]
    if places != tuple(range(count)):
        return True, ["head: its classes stand in another order"]
    how = "by name" if weights.class_names else "ImageNet's, in its order: a head of 1,000 without names"
    return False, [f"head: its classes are those of the data, {how}"]
