"""What a config means: settings, parameters, steps, batch and memory a device. Trains nothing.

    python -m cb_vit.tools.inspect_config --config=configs/digits.py
    python -m cb_vit.tools.inspect_config --config=configs/vit_i1k.py:variant=B/16 --examples=1268355
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from cb_vit import datasets, experiment
from cb_vit import optax as cb_optax
from cb_vit.config import ConfigError
from cb_vit.datasets.contents import describe
from cb_vit.datasets.core import Source
from cb_vit.experiment import Experiment
from cb_vit.settings import Settings, check
from cb_vit.tools import cli
from cb_vit.tree import flatten_with_names
from cb_vit.workdir import flatten

EXAMPLES = flags.DEFINE_integer("examples", None, "Go on without the training data, as if it had so many examples.")
COMPILE = flags.DEFINE_bool("compile", False, "Compile the train step too, for XLA's own count of memory and FLOPs.")
MIB = 2**20


def main(config: dict[str, Any]) -> None:
    """Print the report."""
    settings = check(config)
    run = experiment.build(settings, source=_source(settings))
    for title, lines in (("config", _config(settings)), ("data", describe("config.input.data", run.pipeline.source)),
                         ("parameters", _parameters(run)), ("run", _run(run)),
                         ("memory per device", _memory(run))):
        cli.show("", f"# {title}", *lines)


def _source(settings: Settings) -> Source | None:
    """The training data; a stand-in for it, if `--examples` says how long it is."""
    if EXAMPLES.value is None:
        try:
            return datasets.open_source(settings.input.data, "config.input.data")
        except ConfigError as error:
            raise ConfigError(error.path, f"{error.message}. To go on without the data, give its length: "
                                          "--examples=1281167") from None
    preprocess = settings.input.pp
    if preprocess.image_size is None:
        raise ConfigError("config.input.pp", "does not fix the image's size, so the data itself is needed")
    return datasets.open_source(dict(
        name="fake", split="train", num_examples=EXAMPLES.value, image_size=max(preprocess.image_size), encoded=True,
        num_classes=settings.num_classes or preprocess.num_classes), "--examples")


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


def _run(run: Experiment) -> Iterator[str]:
    cfg, batch = run.settings, run.settings.input.batch_size
    devices = run.mesh.devices.ravel()
    share = run.batch_sharding.shard_shape((batch,))[0]
    examples = run.pipeline.examples_per_epoch
    yield f"{'devices':<24}{len(devices)} × {devices[0].device_kind}, mesh {dict(run.mesh.shape)}"
    yield f"{'training examples':<24}{len(run.pipeline.source):,}"
    yield f"{'steps':<24}{run.total_steps:,} ({run.total_steps * batch / examples:.2f} epochs)"
    yield f"{'batch':<24}{batch} in all, {share} a device" + (
        f", in {cfg.grad_accum_steps} parts" if cfg.grad_accum_steps > 1 else "")
    yield f"{'peak learning rate':<24}{cb_optax.peak_lr(cfg, batch):g}"
    for name, otherwise in [("log_training", ""), ("ckpt", "at the last step"), ("keep_ckpt", "never")]:
        every = run.steps(getattr(cfg, name), name)
        yield f"{name:<24}" + (f"every {every:,} steps" if every else otherwise)
    for name, config in run.settings.evals.items():
        yield f"{'evals.' + name:<24}every {run.steps(config.log, f'evals.{name}.log'):,} steps"


def _memory(run: Experiment) -> Iterator[str]:
    """Parameters, gradients and optimiser state by arithmetic; activations only from the compiler."""
    held = lambda tree: sum(  # noqa: E731
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    for name, tree in (
            ("parameters", run.shapes.params), ("gradients", run.shapes.params),
            ("optimiser state", run.shapes.opt), ("average of parameters", run.shapes.ema),
            ("teacher", run.teacher_shapes()), ("batch", run.batch_shapes())):
        if tree is not None:
            yield f"{name:<24}{held(tree) / MIB:,.1f} MiB"
    if not COMPILE.value:
        yield f"{'activations':<24}not counted; --compile asks XLA"
        return
    with run.active_mesh():
        compiled = run.jit_train_step().lower(*run.step_shapes()).compile()
    memory = compiled.memory_analysis()
    yield f"{'XLA: arguments':<24}{memory.argument_size_in_bytes / MIB:,.1f} MiB"
    yield f"{'XLA: temporaries':<24}{memory.temp_size_in_bytes / MIB:,.1f} MiB (gradients and activations)"
    yield f"{'XLA: FLOPs':<24}{run.flops_per_step() / run.settings.input.batch_size / 1e9:.2f} GFLOP an image"


if __name__ == "__main__":
    cli.define()
    cli.run(main, __doc__)
