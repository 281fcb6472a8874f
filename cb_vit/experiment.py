"""What checked settings describe: model, data, optimiser and mesh put together.

Training, evaluation and the tools all start here, so that they mean the same thing by a config.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
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

from cb_vit import datasets, dist, losses, models, sharding
from cb_vit import optax as cb_optax
from cb_vit import train_state as train_state_lib
from cb_vit import train_step as train_step_lib
from cb_vit.config import ConfigError, Duration, at, under
from cb_vit.datasets.contents import report
from cb_vit.datasets.rare_classes import class_weights, labelled
from cb_vit.distillation import Teacher, make_teacher
from cb_vit.evaluators import common as evaluators
from cb_vit.input_pipeline import Pipeline, Spec, check_example
from cb_vit.settings import Settings
from cb_vit.train_state import TrainState
from cb_vit.weights import open_weights
from cb_vit.workdir import run_notes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All parts of a run but its state: what `Settings` describe, on these devices and this data.

    Attributes:
        settings: the checked config.
        mesh: the devices, arranged along named axes.
        batch_sharding: sharding of a global batch over the mesh.
        pipeline: loader of this process's part of the training data.
        num_classes: width of the model's head.
        total_steps: length of the run in steps.
        model: the Linen module.
        tx: the optimiser, a gradient transformation of Optax.
        schedules: learning-rate multipliers, by the regex of the parameters they drive.
        shapes: shapes, dtypes and shardings of the train state.
        class_weights: how much each class counts in the loss, float32 [c]; None: all alike.
        teacher: the frozen model that is learnt from as well; None: there is none.
        begin: function that makes the state before the first step from another model's parameters, and a note on them;
            None: the parameters are drawn.
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
    class_weights: np.ndarray | None = None
    teacher: Teacher | None = None
    begin: Callable[[], tuple[TrainState, dict[str, Any]]] | None = None

    def __str__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))
        variant = getattr(self.settings.model, "variant", None) or "of its own sizes"
        devices, batch_size = self.mesh.devices.ravel(), self.settings.input.batch_size
        return (f"{self.settings.model_name} {variant}, {count:,} parameters; {self.total_steps:,} steps of "
                f"{batch_size} images on {len(devices)} × {devices[0].device_kind}; peak learning rate "
                f"{cb_optax.peak_text(self.settings, batch_size)}")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the head's classes; None: not known."""
        return self.pipeline.source.class_names

    @property
    def example_spec(self) -> Spec:
        """Shape and dtype of each array of an example as the host delivers it."""
        return self.pipeline.spec

    @property
    def scan(self) -> bool:
        """Whether the model keeps its blocks in scan layout."""
        return getattr(self.settings.model, "scan", False)

    @property
    def loss(self) -> losses.Loss:
        """The loss of each example in training, in which classes count as they are to."""
        loss = losses.LOSSES[self.settings.loss]
        return loss if self.class_weights is None else losses.weighted(loss, jnp.asarray(self.class_weights))

    def active_mesh(self) -> contextlib.AbstractContextManager[None]:
        """Trace and run jitted functions in this."""
        return sharding.active_mesh(self.mesh, self.settings.sharding_rules)

    def init(self, key: jax.Array) -> Any:
        """Parameters from a key."""
        shape, _ = self.example_spec["image"]
        return init_params(self.model, shape, key)

    def create_state(self, merge: Callable[..., Any] = lambda init: init, *loaded: Any) -> TrainState:
        """A fresh train state, born sharded.

        Args:
            merge: function from (initial parameters, *loaded) to the parameters to begin with.
            *loaded: parameters read from elsewhere, on the mesh.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        key = train_step_lib.stream_key(self.settings.seed, "init")
        init = lambda key, *loaded: merge(self.init(key), *loaded)  # noqa: E731
        return train_state_lib.create(init, self.tx, shardings, key, *loaded)

    def predict(self, state: TrainState, images: jax.Array, **options: Any) -> tuple[jax.Array, dict[str, Any]]:
        """(logits, out) of the model in evaluation; what evaluators get. The options are those of the model."""
        return self.model.apply({"params": state.params}, images, train=False, **options)

    def open_evaluators(
        self, class_names: Sequence[str] | None = None,
        on_absent: Callable[[str, datasets.Absent], None] = evaluators.tell_absent,
    ) -> dict[str, Any]:
        """The evaluators of `config.evals`, by name, their data opened.

        Args:
            class_names: names of the head's classes in training; None: as the training data here calls them.
            on_absent: function that is told of optional evaluators whose data is not there, as for `open_all`.

        Raises:
            ConfigError: an evaluator cannot work, or none of them measures the metric of `keep_best`.
        """
        settings = self.settings
        evals = evaluators.open_all(
            settings.evals, lambda config: self.predict, state_shapes=self.shapes, sharding=self.batch_sharding,
            training=settings.input, num_classes=self.num_classes, class_names=class_names or self.class_names,
            on_absent=on_absent)
        prefixes = [evaluator.config.prefix for evaluator in evals.values()]
        known = [*prefixes, *(f"{evaluators.EMA}{prefix}" for prefix in prefixes if settings.ema)]
        best = settings.keep_best
        if best and not best.metric.startswith(tuple(known)):
            listed = ", ".join(map(repr, known)) or "(config.evals is empty)"
            absent = "".join(f"; {name} is left out, as its data is not there" for name in settings.evals
                             if name not in evals)
            raise ConfigError("config.keep_best.metric", f"{best.metric!r} is of no evaluator; names of their metrics "
                                                         f"begin with {listed}{absent}")
        return evals

    def notes(self, evals: Mapping[str, Any], model_init: Mapping[str, Any] | None) -> dict[str, Any]:
        """What `run.json` says of the run.

        Args:
            evals: evaluators of the run by name, their data opened.
            model_init: note on where the first parameters came from; None: they were drawn.
        """
        settings = self.settings
        sources = {"train": self.pipeline.source, **{name: evaluator.source for name, evaluator in evals.items()}}
        return run_notes(
            settings.model_name, settings.model, self.num_classes, self.class_names, self.example_spec["image"][0],
            settings.input.pp.text, pp_evals={name: config.pp_fn.text for name, config in settings.evals.items()},
            total_steps=self.total_steps, model_init=model_init,
            data={name: report(source) for name, source in sources.items()},
            devices=f"{self.mesh.devices.size} \u00d7 {self.mesh.devices.flat[0].device_kind}")

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global training batch."""
        spec, rows = {**self.example_spec, "_mask": ((), np.dtype(bool))}, self.settings.input.batch_size
        return {name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=self.batch_sharding)
                for name, (shape, dtype) in spec.items()}

    def teacher_shapes(self) -> Any:
        """Shapes, dtypes and shardings of the teacher's parameters; None without one."""
        return self.teacher and sharding.place(self.teacher.weights.shapes, self.settings.sharding_strategy, self.mesh)

    def read_teacher(self) -> Any:
        """The teacher's parameters, where `teacher_shapes` puts them."""
        return self.teacher and self.teacher.weights.read(self.teacher_shapes())

    def step_shapes(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], Any]:
        """Shapes, dtypes and shardings of the arguments of the train step."""
        return self.shapes, self.batch_shapes(), self.teacher_shapes()

    def jit_train_step(self) -> Any:
        """`(state, batch, teacher) -> (state, metrics)`, jitted; the state is donated."""
        settings = self.settings
        step = functools.partial(
            train_step_lib.train_step, model=self.model, tx=self.tx,
            trainable=cb_optax.trainable(settings, self.shapes.params), loss=self.loss,
            prepare=settings.input.pp.device, augment=settings.recipe, seed=settings.seed,
            distil=self.teacher and self.teacher.loss, ema=settings.ema, grad_accum_steps=settings.grad_accum_steps)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        teacher = jax.tree.map(lambda leaf: leaf.sharding, self.teacher_shapes())
        return jax.jit(step, donate_argnums=0, in_shardings=(shardings, self.batch_sharding, teacher),
                       out_shardings=(shardings, dist.replicated(self.mesh)))

    def flops_per_step(self, more_blocks: int = 0) -> float:
        """FLOPs of the model in one training step of the whole batch, forward and backward, as XLA counts them.

        Counted on a looped model without recomputation: XLA counts the body of a loop once, and what is
        computed twice is no use to anyone.

        Args:
            more_blocks: number of blocks that are counted beside the model's own.
        """
        config = dataclasses.replace(self.settings.model, scan=False, remat_policy="none")
        config = dataclasses.replace(config, depth=config.depth + more_blocks)
        model = models.get(self.settings.model_name).Model(self.num_classes, **dataclasses.asdict(config))
        shape, _ = self.example_spec["image"]
        params = jax.eval_shape(functools.partial(init_params, model, shape), jax.random.key(0))

        def loss(params: Any, image: jax.Array) -> jax.Array:
            return jnp.sum(model.apply({"params": params}, image)[0])

        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        cost = jax.jit(jax.grad(loss)).lower(params, image).cost_analysis() or {}
        return cost.get("flops", 0.0) * self.settings.input.batch_size

    def steps(self, duration: Duration | None, field: str) -> int | None:
        """A duration in steps, `field` being its place in the config, for errors; None for None."""
        with under(f"config.{field}"):
            return None if duration is None else duration.steps(
                self.settings.input.batch_size, self.pipeline.examples_per_epoch, self.total_steps)


def build(
    settings: Settings, devices: Sequence[jax.Device] | None = None, source: datasets.Source | None = None,
    known_classes: Sequence[str] | None = None,
) -> Experiment:
    """Put an experiment together; reads data, writes nothing.

    Args:
        settings: the checked config, from `settings.check`.
        devices: devices to run on; None: all.
        source: source of the training data; None: the one that `config.input.data` names.
        known_classes: names of the classes of the model that training goes on or begins from; None: not known.

    Raises:
        ConfigError: the config does not go with the number of devices or with the data.
        DataError: not even the first example can be read.
    """
    mesh, batch_sharding = lay_out(settings, devices)
    settings, pipeline, total_steps = open_data(settings, batch_sharding, source, known_classes)
    training, num_classes, (image_shape, _) = settings.input, pipeline.source.num_classes, pipeline.spec["image"]
    with under("config.model"):
        models.get(settings.model_name).check_image_size(settings.model, image_shape[:2])
    warning = cb_optax.warn_mismatch(settings, batch_size=training.batch_size, width=settings.model.width)
    if warning:
        logger.warning("%s", warning)
    if settings.profile and (start := settings.profile.start_step) > total_steps:
        raise ConfigError("config.profile.start_step", f"{start} is past the last step, {total_steps}")

    model = models.get(settings.model_name).Model(num_classes, **dataclasses.asdict(settings.model))
    init = functools.partial(init_params, model, image_shape)
    params = jax.eval_shape(init, jax.random.key(0))
    tx, schedules = cb_optax.make(settings, params, total_steps=total_steps, batch_size=training.batch_size,
                               examples=pipeline.examples_per_epoch)
    shapes = train_state_lib.state_shapes(init, tx, settings.ema is not None)
    shardings = train_state_lib.state_shardings(shapes, settings.sharding_strategy, mesh)
    shapes = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    weights = None
    if settings.class_weights:
        weights = dist.together(lambda: class_weights(
            settings.class_weights, pipeline.source, bool(training.skip_errors), "config.class_weights"))
    teacher = settings.distillation and make_teacher(
        settings.distillation, open_weights(settings.distillation.teacher, "config.distillation.teacher"), training.pp,
        image_shape, num_classes, datasets.known_names(pipeline.source))
    return Experiment(settings, mesh, batch_sharding, pipeline, num_classes, total_steps, model, tx, schedules,
                      shapes, weights, teacher)


def open_data(
    settings: Settings, batch_sharding: NamedSharding, source: datasets.Source | None = None,
    known_classes: Sequence[str] | None = None,
) -> tuple[Settings, Pipeline, int]:
    """The training data, opened.

    Args:
        settings: the checked config.
        batch_sharding: sharding of a global batch over the mesh.
        source, known_classes: as for `build`.

    Returns:
        The settings with what they leave to the data, the pipeline, whose source has the labels of the head, and the
        number of steps of the run.

    Raises:
        ConfigError, DataError: as for `build`.
    """
    training = settings.input
    check_batch_size(training.batch_size, settings.grad_accum_steps, batch_sharding, "config.input.batch_size")
    source = source or datasets.open_source(training.data, "config.input.data")
    num_classes = settings.num_classes or training.pp.num_classes or source.num_classes
    source = datasets.for_head(source, num_classes, known_classes, settings.allow_unused_classes, "config.input.data",
                               "config.num_classes" if settings.num_classes else "config.input.pp")
    settings = settings.for_classes(num_classes)
    training = settings.input
    pipeline = Pipeline(training, source, training.pp, dist.local_rows(batch_sharding, training.batch_size))
    check_example(training.pp, pipeline.spec, num_classes, "config.input.pp")
    if training.balance:
        dist.together(lambda: labelled(pipeline.labels, "config.input.balance"))
    with at(f"config.total_{settings.total.unit}"):
        total_steps = settings.total.steps(training.batch_size, pipeline.examples_per_epoch)
    if total_steps < 1:
        raise ConfigError(f"config.total_{settings.total.unit}", "must be more than 0")
    return settings, pipeline, total_steps


def lay_out(settings: Settings, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, NamedSharding]:
    """The mesh that a config describes, and the sharding of a batch, which those of evaluators are checked against.

    Raises:
        ConfigError: the config does not go with the number of devices.
    """
    mesh = dist.create_mesh(settings.mesh, settings.mesh_allow_split_physical_axes, devices)
    batch_sharding = dist.batch_sharding(mesh, dict(settings.sharding_rules).get("act_batch", ()))
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
        ConfigError: the devices cannot; raised at `path`, with sizes that would do.
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
