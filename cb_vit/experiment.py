"""What checked settings describe: model, data, optimiser and mesh put together.

Training, evaluation and the tools all start here, so that they mean the same thing by a config.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from cb_vit import augment, datasets, dist, losses, models, sharding
from cb_vit import optax as cb_optax
from cb_vit import train_state as train_state_lib
from cb_vit import train_step as train_step_lib
from cb_vit.config import ConfigError, Duration, under
from cb_vit.distillation import Teacher, make_teacher
from cb_vit.input_pipeline import Pipeline, Spec, check_example, example_spec
from cb_vit.settings import Settings, TrainConfig
from cb_vit.train_state import TrainState
from cb_vit.weights import open_weights


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All parts of a run but its state: what `Settings` describe, on these devices and this data.

    Attributes:
        settings: the checked config.
        mesh: the devices.
        batch_sharding: of a batch.
        pipeline: this process's training data.
        num_classes: width of the head.
        total_steps: length of the run.
        model: the Linen module.
        tx: the optimiser.
        schedules: learning-rate multipliers, by the regex of the parameters they drive.
        shapes: the train state's shapes, dtypes and shardings.
        example_spec: shape and dtype of each array of an example as the host delivers it.
        teacher: who is learnt from; None: nobody.
    """

    settings: Settings
    mesh: Mesh
    batch_sharding: NamedSharding
    pipeline: Pipeline
    num_classes: int
    total_steps: int
    model: nn.Module
    tx: optax.GradientTransformation
    schedules: dict[str, Any]
    shapes: TrainState
    example_spec: Spec
    teacher: Teacher | None = None

    @property
    def cfg(self) -> TrainConfig:
        """The settings of `config`'s top level."""
        return self.settings.train

    def __str__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))
        variant = self.cfg.model.get("variant") or "of its own sizes"
        devices = self.mesh.devices.ravel()
        return (f"{self.cfg.model_name} {variant}, {count:,} parameters; {self.total_steps:,} steps of "
                f"{self.cfg.input.batch_size} images on {len(devices)} × {devices[0].device_kind}; peak learning rate "
                f"{cb_optax.peak_text(self.cfg, self.cfg.input.batch_size)}")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the head's classes; None: not known."""
        return self.pipeline.source.class_names

    @property
    def scan(self) -> bool:
        """Whether the model keeps its blocks in scan layout."""
        return getattr(self.settings.model, "scan", False)

    def active_mesh(self) -> contextlib.AbstractContextManager[None]:
        """Trace and run jitted functions in this."""
        return sharding.active_mesh(self.mesh, self.cfg.sharding_rules)

    def init(self, key: jax.Array) -> Any:
        """Parameters from a key."""
        shape, _ = self.example_spec["image"]
        return init_params(self.model, shape, key)

    def create_state(self, merge: Callable[..., Any] = lambda init: init, *loaded: Any) -> TrainState:
        """A fresh train state, born sharded.

        Args:
            merge: (initial parameters, *loaded) → the parameters to begin with.
            *loaded: parameters read from elsewhere, on the mesh.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        key = train_step_lib.stream_key(self.cfg.seed, "init")
        init = lambda key, *loaded: merge(self.init(key), *loaded)  # noqa: E731
        return train_state_lib.create(init, self.tx, shardings, key, *loaded)

    def predict(self, state: TrainState, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """(logits, out) of the model in evaluation; what evaluators get."""
        return self.model.apply({"params": state.params}, images, train=False)

    def augment(self, key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What training does to a prepared batch: label smoothing and random erasing, then mixup, as in DeiT."""
        cfg, images = self.cfg, batch["image"]
        labels = losses.smooth_labels(batch["labels"], cfg.label_smoothing)
        erasing, mixing = jax.random.split(key)
        if cfg.random_erasing:
            images = augment.erase(erasing, images, cfg.random_erasing)
        if cfg.mixup:
            images, labels = augment.mix(mixing, images, labels, batch["_mask"], cfg.mixup, cfg.mixup_group)
        return {**batch, "image": images, "labels": labels}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global training batch."""
        spec = {**self.example_spec, "_mask": ((), np.dtype(bool))}
        return {name: jax.ShapeDtypeStruct((self.cfg.input.batch_size, *shape), dtype, sharding=self.batch_sharding)
                for name, (shape, dtype) in spec.items()}

    def teacher_shapes(self) -> Any:
        """Shapes, dtypes and shardings of the teacher's parameters; None without one."""
        return self.teacher and sharding.place(self.teacher.weights.shapes, self.cfg.sharding_strategy, self.mesh)

    def read_teacher(self) -> Any:
        """The teacher's parameters, where `teacher_shapes` puts them."""
        return self.teacher and self.teacher.weights.read(self.teacher_shapes())

    def step_shapes(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], Any]:
        """Shapes, dtypes and shardings of the arguments of the train step."""
        return self.shapes, self.batch_shapes(), self.teacher_shapes()

    def jit_train_step(self) -> Any:
        """`(state, batch, teacher) -> (state, metrics)`, jitted; the state is donated."""
        cfg = self.cfg
        step = functools.partial(
            train_step_lib.train_step, model=self.model, tx=self.tx,
            trainable=cb_optax.trainable(cfg, self.shapes.params), loss=losses.LOSSES[cfg.loss],
            prepare=self.settings.preprocess.device, augment=self.augment, seed=cfg.seed,
            distil=self.teacher and self.teacher.loss, ema=cfg.ema, grad_accum_steps=cfg.grad_accum_steps)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        teacher = jax.tree.map(lambda leaf: leaf.sharding, self.teacher_shapes())
        return jax.jit(step, donate_argnums=0, in_shardings=(shardings, self.batch_sharding, teacher),
                       out_shardings=(shardings, dist.replicated(self.mesh)))

    def flops_per_step(self) -> float:
        """FLOPs of the model in one training step of the whole batch, forward and backward, as XLA counts them.

        Counted on a looped model without recomputation: XLA counts the body of a loop once, and what is
        computed twice is no use to anyone.
        """
        config = dataclasses.replace(self.settings.model, scan=False, remat_policy="none")
        model = models.get(self.cfg.model_name).Model(self.num_classes, **dataclasses.asdict(config))
        shape, _ = self.example_spec["image"]
        params = jax.eval_shape(functools.partial(init_params, model, shape), jax.random.key(0))

        def loss(params: Any, image: jax.Array) -> jax.Array:
            return jnp.sum(model.apply({"params": params}, image)[0])

        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        cost = jax.jit(jax.grad(loss)).lower(params, image).cost_analysis() or {}
        return cost.get("flops", 0.0) * self.cfg.input.batch_size

    def steps(self, duration: Duration | None, field: str) -> int | None:
        """A duration of the config in steps."""
        with under(f"config.{field}"):
            return None if duration is None else duration.steps(
                self.cfg.input.batch_size, self.pipeline.examples_per_epoch, self.total_steps)


def build(
    settings: Settings, devices: Sequence[jax.Device] | None = None, source: datasets.Source | None = None,
    known_classes: Sequence[str] | None = None,
) -> Experiment:
    """Put an experiment together; reads data, writes nothing.

    Args:
        settings: as `check` gives them.
        devices: to run on; default all.
        source: training data; default what `config.input.data` names.
        known_classes: names of the classes of the model that training goes on or begins from; None: not known.

    Raises:
        ConfigError: what the number of devices or the data rules out.
        DataError: when not even the first example can be read.
    """
    cfg = settings.train
    mesh, batch_sharding = lay_out(settings, devices)
    check_batch_size(cfg.input.batch_size, cfg.grad_accum_steps, batch_sharding, "config.input.batch_size")
    source = source or datasets.open_source(cfg.input.data, "config.input.data")
    num_classes = cfg.num_classes or settings.preprocess.num_classes or source.num_classes
    source = datasets.for_head(source, num_classes, known_classes, cfg.allow_unused_classes, "config.input.data",
                               "config.num_classes" if cfg.num_classes else "config.input.pp")
    pipeline = Pipeline(cfg.input, source, settings.preprocess, dist.local_rows(batch_sharding, cfg.input.batch_size))
    spec = example_spec(source, settings.preprocess, cfg.input.skip_errors)
    check_example(settings.preprocess, spec, num_classes, "config.input.pp")
    with under("config.model"):
        models.get(cfg.model_name).check_image_size(settings.model, spec["image"][0][:2])
    with under("config"):
        try:
            total_steps = cfg.total.steps(cfg.input.batch_size, pipeline.examples_per_epoch)
        except ConfigError as error:
            raise ConfigError(f"total_{cfg.total.unit}", error.message) from None
    if total_steps < 1:
        raise ConfigError(f"config.total_{cfg.total.unit}", "must be more than 0")

    if cfg.profile and cfg.profile.start_step > total_steps:
        raise ConfigError("config.profile.start_step", f"{cfg.profile.start_step} is past the last step, {total_steps}")

    model = models.get(cfg.model_name).Model(num_classes, **dataclasses.asdict(settings.model))
    init = functools.partial(init_params, model, spec["image"][0])
    params = jax.eval_shape(init, jax.random.key(0))
    tx, schedules = cb_optax.make(cfg, params, total_steps=total_steps, batch_size=cfg.input.batch_size,
                               examples=pipeline.examples_per_epoch)
    shapes = train_state_lib.state_shapes(init, tx, cfg.ema is not None)
    shardings = train_state_lib.state_shardings(shapes, cfg.sharding_strategy, mesh)
    shapes = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    teacher = cfg.distillation and make_teacher(
        cfg.distillation, open_weights(cfg.distillation.teacher, "config.distillation.teacher"), settings.preprocess,
        spec["image"][0], num_classes, datasets.known_names(source))
    return Experiment(settings, mesh, batch_sharding, pipeline, num_classes, total_steps, model, tx, schedules,
                      shapes, spec, teacher)


def lay_out(settings: Settings, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, NamedSharding]:
    """The mesh that a config describes, and the sharding of a batch, which those of evaluators are checked against.

    Raises:
        ConfigError: what the number of devices rules out.
    """
    cfg = settings.train
    mesh = dist.create_mesh(cfg.mesh, cfg.mesh_allow_split_physical_axes, devices)
    batch_sharding = dist.batch_sharding(mesh, dict(cfg.sharding_rules).get("act_batch", ()))
    for name, evaluator in settings.evals.items():
        if evaluator.batch_size:
            check_batch_size(evaluator.batch_size, 1, batch_sharding, f"config.evals.{name}.batch_size")
    return mesh, batch_sharding


def init_params(model: nn.Module, image_shape: tuple[int, ...], key: jax.Array) -> Any:
    """Parameters of `model` for images [y x c]."""
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32))["params"]


def check_batch_size(batch_size: int, grad_accum_steps: int, where: NamedSharding, path: str) -> None:
    """Refuse a global batch that the devices cannot share evenly.

    Raises:
        ConfigError: at `path`, with sizes that would do.
    """
    names = [name for axes in where.spec for name in ((axes,) if isinstance(axes, str) else axes or ())]
    ways = math.prod(where.mesh.shape[name] for name in names)
    unit = ways * grad_accum_steps
    if batch_size % unit:
        below = batch_size // unit * unit
        parts = f"{ways} devices" + (f" × grad_accum_steps {grad_accum_steps}" if grad_accum_steps > 1 else "")
        raise ConfigError(path, f"{batch_size} cannot be shared evenly by {parts}; use "
                                f"{f'{below} or ' if below else ''}{below + unit}")


def label_regexes(schedules: Mapping[str, Any]) -> dict[str, str]:
    """A metric name for the learning rate of each schedule: "lr" for the first, "lr/<letters>" for the rest."""
    return {regex: "lr" if i == 0 else f"lr/{re.sub(r'[^A-Za-z0-9_]+', '_', regex).strip('_') or i}"
            for i, regex in enumerate(schedules)}
