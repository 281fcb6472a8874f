"""The evaluators of a config on a trained model. Writes nothing, but what some have to show into `--output`.

    cb-vit eval --workdir=runs/digits
    cb-vit eval --workdir=runs/digits --config.evals.val.batch_size=256
    cb-vit eval --workdir=runs/digits --output=mistakes
    cb-vit eval --config=vit_i1k --weights=hf://timm/deit_tiny_patch16_224.fb_in1k

`--workdir` takes the last checkpoint of a run, with the run's own config unless another is given. `--weights` takes
whatever `cb_vit.load` does, with its own model: of the config, only evaluators, mesh and sharding count, and training
data need not be there.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cb_vit import dist, experiment, io, sharding, startup
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import ConfigError, under
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, has_files, measure, open_all
from cb_vit.settings import Settings, check
from cb_vit.tools import cli, source
from cb_vit.train_state import TrainState
from cb_vit.weights import Weights
from cb_vit.weights.loading import as_run


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_config("Not given: the config of the run.")
    parser.add_argument("--workdir", help="Folder of the run whose last checkpoint is evaluated.")
    parser.add_argument("--weights", help="In place of --workdir: a run, a file of weights, or hf://ORG/NAME.")
    parser.add_argument("--output", help="Folder for the tables and pictures of evaluators that have some.")
    source.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Print every metric of every evaluator."""
    if args.weights is not None and args.workdir:
        raise ConfigError("--weights", "takes the place of --workdir; give one of them")
    if args.weights is None and source.given(args):
        raise ConfigError("--weights", "not given, and --ema, --key, --prefix, --image_size and --model are about "
                                       "it")
    path = args.weights or cli.required(args.workdir, "--workdir", "runs/digits")
    run, _ = as_run(path) or (args.workdir, None)
    settings = check(cli.config_of(args, run))
    if not settings.evals:
        raise ConfigError("config.evals", "has no evaluator; add one to the config, as in configs/digits.py")
    if args.output is not None:
        io.check_address(args.output, "--output")
        if io.is_local(args.output) and (there := io.kind(args.output)) not in (None, io.FOLDER):
            raise ConfigError("--output", f"{args.output} is {there}; give a folder")
        with io.writing(io.as_path(args.output)):  # before time is spent
            io.as_path(args.output).mkdir(parents=True, exist_ok=True)
    if args.weights is None:
        _evaluate_run(settings, path, args.output)
    else:
        _evaluate_weights(settings, source.open_source(args, path, "--weights"), args.output)


def _evaluate_run(settings: Settings, workdir: str, output: str | None) -> None:
    io.check_address(workdir, "--workdir")
    directory = io.as_path(workdir) / "checkpoints"
    if not io.exists(directory):
        raise ConfigError("--workdir", f"{directory} does not exist; give the workdir of a run")
    dist.initialize()
    known = startup.recorded_classes(workdir)
    run = experiment.build(startup.with_model_of_run(settings, workdir), known_classes=known)
    with run.active_mesh(), contextlib.closing(Checkpointer(directory, read_only=True)) as checkpointer:
        with startup.telling_settings(settings, workdir):
            restored = checkpointer.restore_latest(run.shapes, run.scan)
        if restored is None:
            raise ConfigError("--workdir", f"{directory} holds no checkpoint; give the workdir of a run that has one")
        state, _ = restored
        _tell(f"step {int(state.step)} of {directory}")
        _measure(run.open_evaluators(known), state, output)


def _evaluate_weights(settings: Settings, weights: Weights, output: str | None) -> None:
    dist.initialize()
    num_classes = weights.model.num_classes or 0
    if num_classes:
        settings = settings.for_classes(num_classes)
    mesh, batch_sharding = experiment.lay_out(settings)
    shapes = sharding.place(weights.shapes, settings.sharding_strategy, mesh)
    state = TrainState(jnp.int32(weights.step or 0), shapes, (), jnp.bool_(True))
    with sharding.active_mesh(mesh, settings.sharding_rules):
        evaluators = open_all(
            settings.evals, functools.partial(_predictor, weights), state_shapes=state, sharding=batch_sharding,
            training=settings.input, num_classes=num_classes, class_names=weights.class_names)
        _tell(f"{weights}: {weights.format}", *weights.notes)
        _measure(evaluators, state.replace(params=weights.read(shapes)), output)


def _predictor(weights: Weights, config: EvaluatorConfig) -> PredictFn:
    """The function that an evaluator measures: it brings images to the model's normalisation first."""
    preprocess = config.pp_fn
    with under("--weights"):
        adapt = weights.adapter(preprocess)
    if not weights.normalisation.same(preprocess.normalisation(len(weights.normalisation.mean))):
        _tell(f"normalised pixels of {preprocess.text} are brought to the model's own mean and std")

    def predict(state: TrainState, images: jax.Array, **options: Any) -> tuple[jax.Array, dict[str, Any]]:
        return weights.model.apply({"params": state.params}, adapt(images), train=False, **options)

    return predict


def _measure(evaluators: Mapping[str, Any], state: TrainState, output: str | None) -> None:
    for name, evaluator in evaluators.items():
        start = time.monotonic()
        values = measure(evaluator, state, output)
        width = max(24, *(len(metric) + 2 for metric in values))
        _tell(*(f"{metric:<{width}}{value:.4f}" for metric, value in values.items()),
              f"{name + ' took':<{width}}{time.monotonic() - start:.1f} s")
        if has_files(evaluator):
            place = output and os.path.join(output, evaluator.config.prefix)
            _tell(f"{name + ' is in':<{width}}{place}" if place else f"{name} has more to show: give --output=FOLDER")


def _tell(*lines: str) -> None:
    if jax.process_index() == 0:
        cli.show(*lines)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
