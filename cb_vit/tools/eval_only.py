"""The evaluators of a config, or a suite of them, on a trained model. All that is written goes into `--output`.

    cb-vit eval --workdir=runs/digits
    cb-vit eval --workdir=runs/digits --config.evals.val.batch_size=256
    cb-vit eval --workdir=runs/digits --output=mistakes
    cb-vit eval --config=vit_i1k --weights=hf://timm/deit_tiny_patch16_224.fb_in1k
    cb-vit eval --suite=robustness --data_dir=/data --weights=hf://timm/deit_tiny_patch16_224.fb_in1k --output=results
    cb-vit eval --suite=stress --workdir=runs/digits --output=runs/digits/stress

`--workdir` takes the last checkpoint of a run, with the run's own config unless another is given. `--weights` takes
whatever `cb_vit.load` does, with its own model: of the config, only evaluators, mesh and sharding count, and training
data need not be there.

`metrics.csv` in `--output` has all metrics. A suite also ends in one table of accuracies, and `results-BLOCK.csv` has
them in the columns of timm's tables of results, where models add up: a row for each, the newest of each.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from cb_vit.config import ConfigError, Failure, under
from cb_vit.datasets import Absent
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, has_files, measure, open_all, tell_absent
from cb_vit.settings import Settings, check
from cb_vit.tools import cli, results, source, suites
from cb_vit.tools.results import Result
from cb_vit.train_state import TrainState
from cb_vit.weights import Weights
from cb_vit.weights.loading import as_run
from cb_vit.workdir import read_config, read_run


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_config("Not given: the config of the run.")
    parser.add_argument("--workdir", help="Folder of the run whose last checkpoint is evaluated.")
    parser.add_argument("--weights", help="In place of --workdir: a run, a file of weights, or hf://ORG/NAME.")
    parser.add_argument("--output", help="Folder for metrics.csv, and for the tables and pictures of evaluators.")
    suites.add_arguments(parser)
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
    suite = suites.read_suite(args)
    settings = check(cli.config_of(args, run)) if suite is None else None
    if settings and not settings.evals:
        raise ConfigError("config.evals", "has no evaluator; add one to the config, as in configs/digits.py")
    if args.weights is None:
        _check_run(path)
    if args.output is not None:
        _prepare(args.output, suite)
    dist.initialize()
    weights = None if args.weights is None else source.open_source(args, path, "--weights")
    if settings is None:
        count = (read_run(run) or {}).get("num_classes") if weights is None else weights.model.num_classes
        suites.check_classes(suite, count or 0, path)
        settings = check(suites.settle(suite, args, run and read_config(run), weights))
    evaluation = Evaluation(path, args.output, suite is not None)
    if weights is None:
        _evaluate_run(settings, path, evaluation)
    else:
        _evaluate_weights(settings, weights, evaluation)


def _prepare(output: str, suite: Mapping[str, Any] | None) -> None:
    """Refuse a folder that cannot be written, or holds other tables, before time is spent."""
    io.check_address(output, "--output")
    if io.is_local(output) and (there := io.kind(output)) not in (None, io.FOLDER):
        raise ConfigError("--output", f"{output} is {there}; give a folder")
    with io.writing(io.as_path(output)):
        io.as_path(output).mkdir(parents=True, exist_ok=True)
    for name in (suite or {}).get("evals", ()):
        results.read_rows(io.as_path(output) / results.file_name(name))


@dataclasses.dataclass
class Evaluation:
    """One call of this command.

    Attributes:
        path: path of the model, as given.
        output: folder for what is written; None: nothing is.
        is_suite: whether evaluators are those of a suite, of which there is a table at the end.
        absent: why evaluators were left out, by name.
    """

    path: str
    output: str | None
    is_suite: bool
    absent: dict[str, str] = dataclasses.field(default_factory=dict)

    def on_absent(self, name: str, error: Absent) -> None:
        """Keep why an optional evaluator is left out."""
        tell_absent(name, error)
        self.absent[name] = error.message.partition("; ")[0]

    def measure(self, evaluators: Mapping[str, Any], state: TrainState) -> None:
        """Print and write what evaluators find."""
        if not evaluators:
            looked = ". ".join(f"{name}: {why}" for name, why in self.absent.items())
            raise Failure(f"there is nothing to evaluate on: {looked}")
        found = [_measured(name, evaluator, state, self.output) for name, evaluator in evaluators.items()]
        if self.is_suite:
            _tell("", *results.summary(found, self.absent))
        if self.output is not None and jax.process_index() == 0:
            self._write(found, sum(leaf.size for leaf in jax.tree.leaves(state.params)))

    def _write(self, found: list[Result], params: int) -> None:
        folder = io.as_path(self.output)
        files = {"metrics.csv": results.metrics(found)}
        for result in found:
            if self.is_suite and result.kind == results.CLASSIFICATION:
                name, model = results.file_name(result.name), results.model_name(self.path)
                files[name] = results.with_rows(folder / name, list(results.timm_rows(result, model, params)))
        for name, content in files.items():
            with io.writing(folder / name):
                io.write_atomic(folder / name, content)
        _tell(f"written to {self.output}: {', '.join(files)}")


def _check_run(workdir: str) -> None:
    io.check_address(workdir, "--workdir")
    if not io.exists(directory := io.as_path(workdir) / "checkpoints"):
        raise ConfigError("--workdir", f"{directory} does not exist; give the workdir of a run")


def _evaluate_run(settings: Settings, workdir: str, evaluation: Evaluation) -> None:
    directory = io.as_path(workdir) / "checkpoints"
    known = startup.recorded_classes(workdir)
    run = experiment.build(startup.with_model_of_run(settings, workdir), known_classes=known)
    with run.active_mesh(), contextlib.closing(Checkpointer(directory, read_only=True)) as checkpointer:
        with startup.telling_settings(settings, workdir):
            restored = checkpointer.restore_latest(run.shapes, run.scan)
        if restored is None:
            raise ConfigError("--workdir", f"{directory} holds no checkpoint; give the workdir of a run that has one")
        state, _ = restored
        _tell(f"step {int(state.step)} of {directory}")
        evaluation.measure(run.open_evaluators(known, evaluation.on_absent), state)


def _evaluate_weights(settings: Settings, weights: Weights, evaluation: Evaluation) -> None:
    num_classes = weights.model.num_classes or 0
    if num_classes:
        settings = settings.for_classes(num_classes)
    mesh, batch_sharding = experiment.lay_out(settings)
    shapes = sharding.place(weights.shapes, settings.sharding_strategy, mesh)
    state = TrainState(jnp.int32(weights.step or 0), shapes, (), jnp.bool_(True))
    with sharding.active_mesh(mesh, settings.sharding_rules):
        evaluators = open_all(
            settings.evals, functools.partial(_predictor, weights), state_shapes=state, sharding=batch_sharding,
            training=settings.input, num_classes=num_classes, class_names=weights.class_names,
            on_absent=evaluation.on_absent)
        _tell(f"{weights}: {weights.format}", *weights.notes)
        evaluation.measure(evaluators, state.replace(params=weights.read(shapes)))


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


def _measured(name: str, evaluator: Any, state: TrainState, output: str | None) -> Result:
    start = time.monotonic()
    values = measure(evaluator, state, output)
    width = max(24, *(len(metric) + 2 for metric in values))
    _tell(*(f"{metric:<{width}}{value:.4f}" for metric, value in values.items()),
          f"{name + ' took':<{width}}{time.monotonic() - start:.1f} s")
    if has_files(evaluator):
        place = output and os.path.join(output, evaluator.config.prefix)
        _tell(f"{name + ' is in':<{width}}{place}" if place else f"{name} has more to show: give --output=FOLDER")
    return Result(name, evaluator, values)


def _tell(*lines: str) -> None:
    if jax.process_index() == 0:
        cli.show(*lines)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
