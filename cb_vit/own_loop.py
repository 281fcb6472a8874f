"""A config's data as batches that a model can take: for a loop of one's own, in a notebook or elsewhere.

    config = cb_vit.get_config("folder:root=flowers,size=64")
    for batch in cb_vit.batches(config):
        logits, _ = model.apply({"params": params}, batch["image"])
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding

from cb_vit import dist, experiment, workdir
from cb_vit.config import ConfigError
from cb_vit.evaluators import common as evaluators
from cb_vit.input_pipeline import Pipeline, to_device
from cb_vit.model_init import open_init
from cb_vit.registry import Registry
from cb_vit.settings import check
from cb_vit.train_step import augmented

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Global batches on the devices, as the model sees them; each loop over them begins with the first.

    A batch has "image" float32 [b y x c], normalised; "labels" float32 [b classes], after smoothing and mixing in
    training; and "_mask" bool [b], the rows that count, which a last batch of evaluation may not fill, and what could
    not be read does not.

    Attributes:
        class_names: names of the classes, in the order of their numbers; None: nobody named them.
        num_classes: number of classes.
        image_shape: shape of an image, [y x c].
        steps: number of batches.
        pipeline: loader of the examples.
        load: function that gives this process's rows of all batches.
        prepare: function from (batch as loaded, its number) to the batch as the model sees it.
        sharding: sharding of a batch over the devices.
    """

    class_names: tuple[str, ...] | None
    num_classes: int
    image_shape: tuple[int, ...]
    steps: int
    pipeline: Pipeline
    load: Callable[[], Iterator[Any]]
    prepare: Callable[[Batch, jax.Array], Batch]
    sharding: NamedSharding

    @property
    def replicated(self) -> NamedSharding:
        """Where parameters go that a loop is to have whole on every device: `jax.device_put(params, replicated)`."""
        return dist.replicated(self.sharding.mesh)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        config = self.pipeline.config
        loaded = to_device(self.load(), self.pipeline.rows, self.sharding, config.batch_size, config.prefetch)
        with contextlib.closing(loaded):
            for step, batch in enumerate(loaded):
                yield self.prepare(batch, jnp.int32(step))


def batches(
    config: ml_collections.ConfigDict | Mapping[str, Any] | str | os.PathLike, evaluator: str | None = None
) -> Batches:
    """The batches of a config: those that training would see, from the first step to the last; or an evaluator's.

    Classes have the numbers that they have in training: those of the run, or of `config.model_init` where it knows the
    same classes. What cannot be read is masked where `skip_errors` is set, and not counted.

    Args:
        config: the settings of a run, as `get_config` or a config file gives them; or the folder of a run.
        evaluator: name of a block of `config.evals`, whose examples come once each, in their order, without
            augmentation; None: training.

    Raises:
        ConfigError: the config cannot work, or has no such evaluator.
        DataError: not even the first example can be read.
    """
    known = None
    if isinstance(config, str | os.PathLike):
        known, run, config = workdir.recorded_classes(config), config, workdir.read_config(config)
        if config is None:
            raise ConfigError("config", f"{run} is not the folder of a run: it has no config.json")
    settings = check(config)
    if known is None and settings.model_init:
        known = open_init(settings).class_names
    _, sharding = experiment.lay_out(settings)
    settings, training, steps = experiment.open_data(settings, sharding, known_classes=known)
    source = training.source
    if evaluator is None:
        def prepare(batch: Batch, step: jax.Array) -> Batch:
            return _seen(augmented(batch, step, prepare=settings.input.pp.device, augment=settings.recipe,
                                   seed=settings.seed))

        pipeline, load = training, lambda: training.train(settings.seed, 0, steps)
    else:
        block = Registry("evaluator of this config", settings.evals).pick(evaluator, "evaluator")
        pipeline = evaluators.open_pipelines(evaluator, block, sharding, settings.input, source.num_classes,
                                             source.class_names)["data"]
        source = source if block.needs_classes else pipeline.source

        def prepare(batch: Batch, step: jax.Array) -> Batch:
            return _seen(pipeline.preprocess.device(batch))

        load, steps = pipeline.evaluate, -(-len(pipeline.source) // pipeline.config.batch_size)
    return Batches(source.class_names, source.num_classes, pipeline.spec["image"][0], steps, pipeline, load,
                   jax.jit(prepare), sharding)


def _seen(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("image", "labels", "_mask")}
