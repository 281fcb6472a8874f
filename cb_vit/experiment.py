"""What a config describes: first its checked settings, then model, data, optimiser and mesh put together.

Training, evaluation and the tools all start here, so that they mean the same thing by a config.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax as optax_lib
from jax.sharding import Mesh, NamedSharding

from cb_vit import datasets, dist, models, optax, sharding
from cb_vit import train_state as train_state_lib
from cb_vit import train_step as train_step_lib
from cb_vit.checkpoint import KeepBest
from cb_vit.config import ConfigError, Duration, parse, plain
from cb_vit.evaluators.common import EvaluatorConfig, parse_evals
from cb_vit.input_pipeline import InputConfig, Pipeline, Spec, example_spec
from cb_vit.losses import LOSSES
from cb_vit.metric_writer import LoggingConfig, check_installed
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess
from cb_vit.profiling import ProfileConfig
from cb_vit.registry import suggest
from cb_vit.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(optax.OptimiserConfig, LoggingConfig):
    """The whole config; the optimiser's and the metric writer's keys stand flat at its top as well.

    Attributes:
        seed: of everything random; the same on all hosts.
        total: length of the run: `total_steps`, `total_epochs` or `total_examples`.
        input: training data and preprocessing.
        num_classes: width of the head; None: as many as the data has.
        loss: "softmax_xent" or "sigmoid_xent".
        label_smoothing: share of each target spread evenly over all classes.
        model_name: the module of the model.
        model: its settings.
        evals: evaluators by name.
        grad_accum_steps: micro-batches a batch is cut into to save memory.
        mesh: (name, size) of the mesh axes; -1: the rest of the devices.
        mesh_allow_split_physical_axes: lets a mesh axis take part of a physical axis of a TPU torus.
        sharding_strategy: (regex, rule) pairs for parameters and optimiser state, see `cb_vit/sharding.py`.
        sharding_rules: (logical axis, mesh axes) pairs for activations: "act_batch", "act_len", "act_emb".
        log_training: how often training metrics are recorded.
        ckpt: how often a checkpoint is saved, besides the last step; None: at the last step only.
        keep_ckpt: checkpoints at multiples of this are kept for good.
        keep_last: newest checkpoints kept.
        keep_best: also keep the best by a metric.
        resume: another run's workdir to go on from, where this workdir has no checkpoint yet.
        allow_changed_data: let a resumed run go on with another seed, data, preprocessing or batch size.
        profile: steps to trace.
    """

    seed: int
    total: Duration
    input: InputConfig
    num_classes: int | None = None
    loss: str = "softmax_xent"
    label_smoothing: float = 0.0
    model_name: str = "vit"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    evals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    grad_accum_steps: int = 1
    mesh: tuple[tuple[str, int], ...] = (("data", -1),)
    mesh_allow_split_physical_axes: bool = False
    sharding_strategy: tuple[tuple[str, str], ...] = ((".*", "replicate"),)
    sharding_rules: tuple[tuple[str, str | tuple[str, ...]], ...] = (("act_batch", "data"),)
    log_training: Duration = Duration(50, "steps")
    ckpt: Duration | None = None
    keep_ckpt: Duration | None = None
    keep_last: int = 1
    keep_best: KeepBest | None = None
    resume: str | None = None
    allow_changed_data: bool = False
    profile: ProfileConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be in [0, 2³²), got {self.seed}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing", f"is a share in [0, 1), got {self.label_smoothing}")
        for name in ("grad_accum_steps", "keep_last", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, f"must be at least 1, got {value}")
        if self.input.batch_size % self.grad_accum_steps:
            raise ConfigError("grad_accum_steps", f"{self.grad_accum_steps} does not divide input.batch_size "
                                                  f"{self.input.batch_size}")
        LOSSES.pick(self.loss, "loss")
        for name in ("log_training", "ckpt", "keep_ckpt"):
            duration = getattr(self, name)
            if duration is not None and duration.value == 0:
                raise ConfigError(name, "must be more than 0; leave it unset for never")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A config, checked as far as that needs neither data nor devices.

    Attributes:
        train: all settings.
        model: `train.model`, in the model's own schema, resolved.
        evals: `train.evals`, each in its evaluator's own schema.
        preprocess: `train.input.pp`, parsed.
        raw: the config as plain values, for `config.json`.
    """

    train: TrainConfig
    model: Any
    evals: dict[str, EvaluatorConfig]
    preprocess: Preprocess
    raw: dict[str, Any]


def check(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Settings:
    """Turn a config into settings, or say what is wrong with it.

    Raises:
        ConfigError: one line that names the field, the value and the way out.
    """
    cfg = parse(TrainConfig, config)
    module = models.get(cfg.model_name)
    model = parse(module.Config, cfg.model, "config.model")
    with _under("config.model"):
        model = module.resolve(model)
    datasets.check_source(cfg.input.data, "config.input.data")
    preprocess = builder.build(cfg.input.pp, "config.input.pp")
    evals = parse_evals(cfg.evals)
    for size in [preprocess.image_size, *(builder.build(e.pp_fn, "pp_fn").image_size for e in evals.values())]:
        if size is not None:
            with _under("config.model"):
                module.check_image_size(model, size)
    if cfg.num_classes and preprocess.num_classes not in (None, cfg.num_classes):
        raise ConfigError("config.num_classes", f"{cfg.num_classes}, but input.pp has onehot({preprocess.num_classes})")
    check_installed(cfg)
    sharding.parse_strategy(cfg.sharding_strategy, "config.sharding_strategy")
    _check_mesh_names(cfg)
    return Settings(cfg, model, evals, preprocess, plain(config))


def _check_mesh_names(cfg: TrainConfig) -> None:
    axes = [name for name, _ in cfg.mesh]
    for i, (_, mapped) in enumerate(cfg.sharding_rules):
        for name in (mapped,) if isinstance(mapped, str) else mapped:
            if name not in axes:
                raise ConfigError(f"config.sharding_rules[{i}]", f"the mesh has no axis {name!r}{suggest(name, axes)} "
                                                                 f"config.mesh has {', '.join(axes)}")


@contextlib.contextmanager
def _under(path: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise error.under(path) from None


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
    """

    settings: Settings
    mesh: Mesh
    batch_sharding: NamedSharding
    pipeline: Pipeline
    num_classes: int
    total_steps: int
    model: nn.Module
    tx: optax_lib.GradientTransformation
    schedules: dict[str, Any]
    shapes: TrainState
    example_spec: Spec

    @property
    def cfg(self) -> TrainConfig:
        """The settings of `config`'s top level."""
        return self.settings.train

    @property
    def scan(self) -> bool:
        """Whether the model keeps its blocks in scan layout."""
        return getattr(self.settings.model, "scan", False)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Trace and run jitted functions in this: it gives names of activation axes their mesh axes."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.cfg.sharding_rules):
            yield

    def init(self, key: jax.Array) -> Any:
        """Parameters from a key."""
        shape, _ = self.example_spec["image"]
        return init_params(self.model, shape, key)

    def create_state(self) -> TrainState:
        """A fresh train state, born sharded."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        key = train_step_lib.stream_key(self.cfg.seed, "init")
        return train_state_lib.create(self.init, self.tx, key, shardings)

    def predict(self, state: TrainState, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """(logits, out) of the model in evaluation; what evaluators get."""
        return self.model.apply({"params": state.params}, images, train=False)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global training batch."""
        spec = {**self.example_spec, "_mask": ((), np.dtype(bool))}
        return {name: jax.ShapeDtypeStruct((self.cfg.input.batch_size, *shape), dtype, sharding=self.batch_sharding)
                for name, (shape, dtype) in spec.items()}

    def jit_train_step(self) -> Any:
        """`(state, batch) -> (state, metrics)`, jitted; the state is donated."""
        cfg = self.cfg
        step = functools.partial(
            train_step_lib.train_step, model=self.model, tx=self.tx, loss=LOSSES[cfg.loss],
            prepare=self.settings.preprocess.device, seed=cfg.seed, label_smoothing=cfg.label_smoothing,
            grad_accum_steps=cfg.grad_accum_steps)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(step, donate_argnums=0, in_shardings=(shardings, self.batch_sharding),
                       out_shardings=(shardings, dist.replicated(self.mesh)))

    def steps(self, duration: Duration | None, field: str) -> int | None:
        """A duration of the config in steps."""
        with _under(f"config.{field}"):
            return None if duration is None else duration.steps(
                self.cfg.input.batch_size, len(self.pipeline.source), self.total_steps)


def build(
    settings: Settings, devices: Sequence[jax.Device] | None = None, source: datasets.Source | None = None
) -> Experiment:
    """Put an experiment together; reads data, writes nothing.

    Args:
        settings: as `check` gives them.
        devices: to run on; default all.
        source: training data; default what `config.input.data` names.

    Raises:
        ConfigError: what the number of devices or the data rules out.
        DataError: when not even the first example can be read.
    """
    cfg = settings.train
    mesh = dist.create_mesh(cfg.mesh, cfg.mesh_allow_split_physical_axes, devices)
    batch_sharding = dist.batch_sharding(mesh, dict(cfg.sharding_rules).get("act_batch", ()))
    check_batch_size(cfg.input.batch_size, cfg.grad_accum_steps, batch_sharding, "config.input.batch_size")
    for name, evaluator in settings.evals.items():
        if evaluator.batch_size:
            check_batch_size(evaluator.batch_size, 1, batch_sharding, f"config.evals.{name}.batch_size")

    source = source or datasets.open_source(cfg.input.data, "config.input.data")
    num_classes = _num_classes(cfg, settings.preprocess, source.num_classes)
    pipeline = Pipeline(cfg.input, source, settings.preprocess, dist.local_rows(batch_sharding, cfg.input.batch_size))
    spec = example_spec(source, settings.preprocess, cfg.input.skip_errors)
    _check_example(settings, spec, num_classes)
    with _under("config"):
        try:
            total_steps = cfg.total.steps(cfg.input.batch_size, len(source))
        except ConfigError as error:
            raise ConfigError(f"total_{cfg.total.unit}", error.message) from None
    if total_steps < 1:
        raise ConfigError(f"config.total_{cfg.total.unit}", "must be more than 0")

    model = models.get(cfg.model_name).Model(num_classes, **dataclasses.asdict(settings.model))
    init = functools.partial(init_params, model, spec["image"][0])
    params = jax.eval_shape(init, jax.random.key(0))
    tx, schedules = optax.make(cfg, params, total_steps=total_steps, batch_size=cfg.input.batch_size,
                               examples=len(source))
    shapes = train_state_lib.state_shapes(init, tx)
    shardings = train_state_lib.state_shardings(shapes, cfg.sharding_strategy, mesh)
    shapes = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    return Experiment(settings, mesh, batch_sharding, pipeline, num_classes, total_steps, model, tx, schedules,
                      shapes, spec)


def init_params(model: nn.Module, image_shape: tuple[int, ...], key: jax.Array) -> Any:
    """Parameters of `model` for images [y x c]."""
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32))["params"]


def check_batch_size(batch_size: int, grad_accum_steps: int, sharding: NamedSharding, path: str) -> None:
    """Refuse a global batch that the devices cannot share evenly.

    Raises:
        ConfigError: at `path`, with sizes that would do.
    """
    names = [name for axes in sharding.spec for name in ((axes,) if isinstance(axes, str) else axes or ())]
    ways = math.prod(sharding.mesh.shape[name] for name in names)
    unit = ways * grad_accum_steps
    if batch_size % unit:
        below = batch_size // unit * unit
        parts = f"{ways} devices" + (f" × grad_accum_steps {grad_accum_steps}" if grad_accum_steps > 1 else "")
        raise ConfigError(path, f"{batch_size} cannot be shared evenly by {parts}; use "
                                f"{f'{below} or ' if below else ''}{below + unit}")


def _num_classes(cfg: TrainConfig, preprocess: Preprocess, in_data: int) -> int:
    num_classes = cfg.num_classes or preprocess.num_classes or in_data
    if num_classes < in_data:
        raise ConfigError("config.num_classes", f"the model has {num_classes} classes, the data {in_data}")
    return num_classes


def _check_example(settings: Settings, spec: Spec, num_classes: int) -> None:
    """What the first example shows: an image of a size the model takes, and labels for the loss."""
    shape, dtype = spec.get("image", ((), None))
    if len(shape) != 3 or dtype != np.uint8:
        raise ConfigError("config.input.pp", f"must end with a uint8 image [y x c] on the host, got {dtype} {shape}")
    with _under("config.model"):
        models.get(settings.train.model_name).check_image_size(settings.model, shape[:2])
    batch = {name: jax.ShapeDtypeStruct((1, *s), d) for name, (s, d) in spec.items()}
    out = jax.eval_shape(settings.preprocess.device, {**batch, "_mask": jax.ShapeDtypeStruct((1,), bool)})
    if "labels" not in out or out["labels"].shape != (1, num_classes):
        raise ConfigError("config.input.pp", f"must make one-hot labels of {num_classes} classes; "
                                             f"end it with onehot({num_classes})")


def label_regexes(schedules: Mapping[str, Any]) -> dict[str, str]:
    """A metric name for the learning rate of each schedule: "lr" for the first, "lr/<letters>" for the rest."""
    return {regex: "lr" if i == 0 else f"lr/{re.sub(r'[^A-Za-z0-9_]+', '_', regex).strip('_') or i}"
            for i, regex in enumerate(schedules)}
