"""What stands between a config and the first step: the experiment, its evaluators, and the state it begins with."""
from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding

from cb_vit import dist, experiment, io, models
from cb_vit import workdir as workdir_lib
from cb_vit.checkpoint import Checkpointer, in_loop_layout
from cb_vit.config import ConfigError
from cb_vit.evaluators import common as evaluators
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn
from cb_vit.experiment import Experiment
from cb_vit.settings import Settings, TrainConfig
from cb_vit.train_state import TrainState
from cb_vit.tree import first_match, flatten_with_names, map_with_names
from cb_vit.weights import LoadConfig, Weights, compare, fold_normalisation, open_weights, same_normalisation

logger = logging.getLogger(__name__)


def build(settings: Settings, workdir: str | os.PathLike) -> Experiment:
    """The experiment, and a look at what it would begin from, before anything is written.

    Raises:
        ConfigError: see `experiment.build`; or there is nothing where `config.resume` or `config.model_init` points to,
            or parameters of another model.
    """
    cfg, weights = settings.train, None
    if not (io.as_path(workdir) / "checkpoints").exists():
        if cfg.resume:
            resume_folder(cfg.resume)
        elif cfg.model_init:
            weights = open_init(cfg)
    run = experiment.build(settings)
    if weights:
        _fit(run, weights)
    return run


def build_evaluators(run: Experiment) -> dict[str, Any]:
    """The evaluators of `config.evals`, by name, their data opened.

    Raises:
        ConfigError: an evaluator that cannot work.
    """
    evals = open_evaluators(run.settings, lambda config: run.predict, run.shapes, run.batch_sharding, run.num_classes)
    prefixes = [evaluator.config.prefix for evaluator in evals.values()]
    best = run.cfg.keep_best
    known = [*prefixes, *(f"{evaluators.EMA}{prefix}" for prefix in prefixes if run.cfg.ema)]
    if best and not best.metric.startswith(tuple(known)):
        listed = ", ".join(map(repr, known)) or "(config.evals is empty)"
        raise ConfigError("config.keep_best.metric", f"{best.metric!r} is of no evaluator; names of their metrics "
                                                     f"begin with {listed}")
    return evals


def open_evaluators(
    settings: Settings, predict_fn: Callable[[EvaluatorConfig], PredictFn], state_shapes: TrainState,
    sharding: NamedSharding, num_classes: int,
) -> dict[str, Any]:
    """The evaluators of any model, by name, their data opened.

    Args:
        settings: whose `evals` they are.
        predict_fn: settings of an evaluator → its (train_state, images) → (logits, out).
        state_shapes: of the train state.
        sharding: of a batch.
        num_classes: of the model.

    Raises:
        ConfigError: an evaluator that cannot work.
    """
    evals = {name: evaluators.build(name, config, predict_fn=predict_fn(config), state_shapes=state_shapes,
                                    sharding=sharding, batch_size=settings.train.input.batch_size,
                                    num_classes=num_classes)
             for name, config in settings.evals.items()}
    owners: dict[str, str] = {}
    for name, evaluator in evals.items():
        if (other := owners.setdefault(evaluator.config.prefix, name)) != name:
            raise ConfigError(f"config.evals.{name}.prefix", f"{evaluator.config.prefix!r} is that of {other} too: "
                                                             "their metrics would have the same names")
    return evals


def restore_or_create(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The state a run begins with, and the notes beside it.

    In this order: own workdir, `config.resume`, `config.model_init`, scratch.

    Raises:
        ConfigError: where the run should go on, it would do so with other data, with another model, or past its end.
    """
    if restored := _restore(run, workdir, checkpointer):
        return restored
    if run.cfg.resume:
        directory = resume_folder(run.cfg.resume)
        with contextlib.closing(Checkpointer(directory, read_only=True)) as other:
            if restored := _restore(run, run.cfg.resume, other):
                return restored
        raise ConfigError("config.resume", f"{directory} holds no checkpoint")
    if run.cfg.model_init:
        return begin_from(run, open_init(run.cfg))
    return run.create_state(), {}


def _restore(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]] | None:
    if checkpointer.latest_step() is None:
        return None
    if old := workdir_lib.read_config(workdir):
        for line in workdir_lib.check_changes(old, run.settings.raw, run.cfg.allow_changed_data):
            logger.warning("changed since the last start: %s", line)
    restored = checkpointer.restore_latest(run.shapes, run.scan)
    if restored is None:
        return None
    step = int(restored[0].step)
    if step > run.total_steps:
        raise ConfigError(f"config.total_{run.cfg.total.unit}", f"the run ends at step {run.total_steps}, but the "
                          f"checkpoint in {checkpointer.directory} is of step {step}; use another workdir")
    logger.info("resumed from step %d of %s", step, checkpointer.directory)
    return restored


def resume_folder(workdir: str) -> epath.Path:
    """The checkpoints of `config.resume`.

    Raises:
        ConfigError: there are none.
    """
    folder = io.as_path(workdir) / "checkpoints"
    if not folder.exists():
        raise ConfigError("config.resume", f"{folder} does not exist; give the workdir of a run")
    return folder


def open_init(cfg: TrainConfig) -> Weights:
    """The parameters that `config.model_init` names.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    averaged = cfg.model_load and cfg.model_load.params == "ema"
    return open_weights(cfg.model_init, "config.model_init", "ema" if averaged else "params")


def begin_from(run: Experiment, weights: Weights) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, with parameters of another model, and a note of where they are from.

    Raises:
        ConfigError: they do not fit, or cannot be read.
    """
    merge, lines = _fit(run, weights)
    own, everywhere = dict(flatten_with_names(in_loop_layout(run.shapes.params))[0]), dist.replicated(run.mesh)

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        fits = name in own and own[name].shape == leaf.shape
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own[name].sharding if fits else everywhere)

    loaded = weights.read(map_with_names(place, weights.shapes))
    for line in (*weights.notes, *lines):
        logger.info("parameters of %s: %s", weights, line)
    taken = (run.cfg.model_load or LoadConfig()).params
    note = {"path": weights.path, "step": weights.step, "params": taken, "report": [*weights.notes, *lines]}
    return run.create_state(merge, loaded), {"model_init": note}


def _fit(run: Experiment, weights: Weights) -> tuple[Callable[[Any, Any], Any], list[str]]:
    """(initial parameters, loaded ones) → parameters, and what became of each; from shapes alone."""
    module, cfg, load = models.get(run.cfg.model_name), run.settings.model, run.cfg.model_load or LoadConfig()
    own = run.settings.preprocess.normalisation(run.example_spec["image"][0][-1])
    anew = first_match("embedding/kernel", [(regex, True) for regex in load.dont_load], False)
    try:
        trained = own if anew else weights.known_normalisation()
    except ConfigError as error:
        raise ConfigError("config.model_init", error.message) from None
    folds = len(trained[0]) == len(own[0]) and not same_normalisation(trained, own)
    lines = ["embedding: normalised pixels mean something else here, which is folded into it"] * folds
    lines += compare(weights.model.config, cfg)

    def merge(init: Any, loaded: Any) -> tuple[Any, Any]:
        return module.merge(
            init, fold_normalisation(loaded, trained, own) if folds else loaded, cfg, load.dont_load,
            load.posemb_resize, image_size=run.example_spec["image"][0][:2], loaded_grid=weights.grid)

    try:
        _, report = jax.eval_shape(merge, run.shapes.params, weights.shapes)
    except ConfigError as error:
        raise ConfigError(f"config.{error.path}", f"{weights}: {error.message}") from None
    return lambda init, loaded: merge(init, loaded)[0], [*report.lines, *lines]


def run_notes(run: Experiment, model_init: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `run.json` says of a run; `model_init`: where its first parameters came from."""
    source = run.pipeline.source
    return workdir_lib.run_notes(
        run.cfg.model_name, run.settings.model, run.num_classes, source.class_names, run.example_spec["image"][0],
        run.cfg.input.pp, pp_evals={name: config.pp_fn for name, config in run.settings.evals.items()},
        total_steps=run.total_steps, model_init=model_init)


def open_checkpoints(run: Experiment, workdir: str | os.PathLike) -> Checkpointer:
    """The checkpoints of a run's own workdir, kept as its config says."""
    cfg = run.cfg
    return Checkpointer(io.as_path(workdir) / "checkpoints", keep_last=cfg.keep_last,
                        keep_every=run.steps(cfg.keep_ckpt, "keep_ckpt"), keep_best=cfg.keep_best)
