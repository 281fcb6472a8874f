"""What a config means: data, steps, hours, memory, parameters and FLOPs. Trains nothing.

    cb-vit inspect --config=digits
    cb-vit inspect --config=vit_i1k:variant=B/16 --examples=1268355 --speed=5000
    cb-vit inspect --config=digits --all
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import sys
from collections.abc import Iterator

import jax

from cb_vit import datasets, experiment
from cb_vit import optax as cb_optax
from cb_vit.config import ConfigError
from cb_vit.datasets.contents import describe
from cb_vit.datasets.core import Source
from cb_vit.experiment import Experiment
from cb_vit.model_init import with_model
from cb_vit.settings import Settings, check
from cb_vit.tools import cli
from cb_vit.tree import flatten_with_names
from cb_vit.workdir import flatten

MIB = 2**20


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_config()
    parser.add_argument("--examples", type=cli.at_least_one,
                        help="Go on without the training data, as if it had so many examples.")
    parser.add_argument("--speed", type=cli.at_least_one, metavar="IMG_PER_S",
                        help="Say how long training takes at so many images a second, all devices together.")
    parser.add_argument("--all", action="store_true", help="Every setting and every parameter too.")
    parser.add_argument("--compile", action="store_true",
                        help="Compile the train step too, for XLA's own count of memory and FLOPs.")


def main(args: argparse.Namespace) -> None:
    """Print the report."""
    settings = with_model(check(cli.config_of(args)))
    if args.examples:  # which tell nothing of how rare a class is
        settings = dataclasses.replace(settings, class_weights=None)
    run = experiment.build(settings, source=_source(settings, args.examples))
    data = (_line("data", line.removeprefix("data: ")) for line in describe("data", run.pipeline.source))
    cli.show(*data, *_run(run, args.speed), *_model(run), *_memory(run, args.compile))
    if args.all:
        for title, lines in ("config", _config(settings)), ("parameters", _parameters(run)):
            cli.show("", f"# {title}", *lines)


def _source(settings: Settings, examples: int | None) -> Source | None:
    """The training data; a stand-in for it, if `--examples` says how long it is."""
    if examples is None:
        try:
            return datasets.open_source(settings.input.data, "config.input.data")
        except ConfigError as error:
            raise ConfigError(error.path, f"{error.message}. To go on without the data, give its length: "
                                          "--examples=1281167") from None
    preprocess = settings.input.pp
    if preprocess.image_size is None:
        raise ConfigError("config.input.pp", "does not fix the image's size, so the data itself is needed")
    classes = settings.num_classes or preprocess.num_classes
    if not classes:
        raise ConfigError("config.num_classes", "is left to the data, which --examples goes on without; give it: "
                                                "--config.num_classes=1000")
    return datasets.open_source(dict(
        name="fake", split="train", num_examples=examples, image_size=max(preprocess.image_size), encoded=True,
        num_classes=classes), "--examples")


def _config(settings: Settings) -> Iterator[str]:
    for key, value in flatten(settings.raw).items():
        yield f"{key:<36}{value!r}"


def _parameters(run: Experiment) -> Iterator[str]:
    """A line for each parameter: what the optimiser does to it, and where it lives."""
    rules = {rule.name: rule for rule in cb_optax.describe(run.settings, run.shapes.params)}
    leaves = flatten_with_names(run.shapes.params)[0]
    width = max(len(name) for name, _ in leaves) + 2
    yield f"{'name':<{width}}{'shape':<20}{'count':>12}  {'lr ×':>12}{'decay ×':>9}  sharding"
    for name, leaf in leaves:
        rule = rules[name]
        spec = ", ".join("-" if axes is None else str(axes) for axes in leaf.sharding.spec) or "replicated"
        rate = "frozen" if rule.frozen else rule.lr_text
        yield f"{name:<{width}}{str(leaf.shape):<20}{leaf.size:>12,}  {rate:>12}{rule.wd_mult:>9g}  {spec}"
    yield f"{'all':<{width}}{'':<20}{sum(leaf.size for _, leaf in leaves):>12,}"


def _run(run: Experiment, speed: int | None) -> Iterator[str]:
    """Devices, steps, hours, and what happens how often."""
    cfg, batch = run.settings, run.settings.input.batch_size
    devices = run.mesh.devices.ravel()
    share = run.batch_sharding.shard_shape((batch,))[0]
    parts = f", in {cfg.grad_accum_steps} parts" if cfg.grad_accum_steps > 1 else ""
    images = run.total_steps * batch
    yield _line("devices", f"{len(devices)} × {devices[0].device_kind}, mesh {dict(run.mesh.shape)}")
    yield _line("steps", f"{run.total_steps:,} of {batch} images ({share} a device{parts}), "
                         f"{images / run.pipeline.examples_per_epoch:.2f} epochs")
    yield _line("time", f"{images:,} images" + (
        f" at {speed:,} a second: {datetime.timedelta(seconds=round(images / speed))}, without evaluation" if speed else
        "; --speed=IMG_PER_S says how long"))
    yield _line("learning rate", f"peak {cb_optax.peak_text(cfg, batch)}, {cfg.schedule.decay_type}")
    every = {name: run.steps(getattr(cfg, name), name) for name in ("log_training", "ckpt", "keep_ckpt")}
    every |= {f"evals.{name}": run.steps(block.log, f"evals.{name}.log") for name, block in cfg.evals.items()}
    yield _line("every", ", ".join(f"{name} {steps:,}" for name, steps in every.items() if steps) + " steps")


def _model(run: Experiment) -> Iterator[str]:
    """Parameters and FLOPs: of the model, of one of its blocks, and of all else."""
    config, batch = run.settings.model, run.settings.input.batch_size
    sizes = {name: leaf.size for name, leaf in flatten_with_names(run.shapes.params)[0]}
    total, blocks = sum(sizes.values()), sum(size for name, size in sizes.items() if "/encoderblock" in name)
    flops = run.flops_per_step() / batch
    block = run.flops_per_step(more_blocks=1) / batch - flops
    yield _line("model", f"{run.settings.model_name} {config.variant or ''}, context {config.context}: {total:,} "
                         f"parameters, {_flop(flops)} an image and step")
    yield _line("each block", f"{blocks // config.depth:,} parameters, {_flop(block)}; {config.depth} of them are "
                              f"{config.depth * block / flops:.0%} of the FLOPs")


def _flop(count: float) -> str:
    return f"{count / 1e9:.3g} GFLOP"


def _line(name: str, text: str) -> str:
    return f"{name:<16}{text}"


def _memory(run: Experiment, compiled: bool) -> Iterator[str]:
    """Parameters, gradients and optimiser state by arithmetic; activations only from the compiler."""
    held = lambda tree: sum(  # noqa: E731
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    parts = {"parameters": run.shapes.params, "gradients": run.shapes.params, "optimiser": run.shapes.opt,
             "average": run.shapes.ema, "teacher": run.teacher_shapes(), "batch": run.batch_shapes()}
    sizes = {name: held(tree) / MIB for name, tree in parts.items() if tree is not None}
    yield _line("memory", f"{sum(sizes.values()):,.1f} MiB a device: " + ", ".join(
        f"{name} {size:,.1f}" for name, size in sizes.items()) + "; activations: --compile" * (not compiled))
    if not compiled:
        return
    with run.active_mesh():
        program = run.jit_train_step().lower(*run.step_shapes()).compile()
    memory = program.memory_analysis()
    yield _line("XLA", f"arguments {memory.argument_size_in_bytes / MIB:,.1f} MiB, temporaries (gradients and "
                       f"activations) {memory.temp_size_in_bytes / MIB:,.1f} MiB a device")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
