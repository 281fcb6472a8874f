"""All settings of a run: the schema of a config, put together from those of the rooms, and its checks."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import ml_collections

from cb_vit import datasets, models, sharding
from cb_vit import optax as cb_optax
from cb_vit.augment import ErasingConfig, MixupConfig
from cb_vit.checkpoint import KeepBest
from cb_vit.config import ConfigError, Duration, parse, plain, under
from cb_vit.distillation import DistillationConfig
from cb_vit.evaluators.common import EvaluatorConfig, parse_evals
from cb_vit.input_pipeline import InputConfig
from cb_vit.losses import LOSSES
from cb_vit.monitor.metric_writer import LoggingConfig, check_installed
from cb_vit.monitor.profiling import ProfileConfig
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess
from cb_vit.registry import suggest
from cb_vit.train_state import EmaConfig
from cb_vit.weights import LoadConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(cb_optax.OptimiserConfig, LoggingConfig):
    """The whole config; the optimiser's and the metric writer's keys stand flat at its top as well.

    Attributes:
        seed: of everything random; the same on all hosts.
        total: length of the run: `total_steps`, `total_epochs` or `total_examples`.
        input: training data and preprocessing.
        num_classes: width of the head; None: as many as the data has.
        allow_unused_classes: let classes of the head be without training data: folders without images, or a head that
            is larger than the data. Part of ImageNet's classes under a head of all 1 000 needs no leave.
        loss: one of `losses.LOSSES`.
        label_smoothing: share of each target spread evenly over all classes, before mixup.
        mixup: mixup and cutmix, on the device; None: neither.
        random_erasing: on the device; None: none.
        ema: a moving average of the parameters, which evaluators measure as well, their metrics under "ema/".
        distillation: learn from a teacher too; the model must be `distilled`.
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
        model_init: whose parameters to begin with, where there is nothing to go on from: a run's workdir (WORKDIR@STEP
            for another checkpoint than its newest), a file of weights, or hf://ORG/NAME, as `cb_vit.load` takes them.
        model_load: what is taken from there, and how.
        allow_changed_data: let a resumed run go on with another seed, data, preprocessing or batch size. A copy of the
            same data elsewhere is no change.
        profile: steps to trace.
    """

    seed: int
    total: Duration
    input: InputConfig
    num_classes: int | None = None
    allow_unused_classes: bool = False
    loss: str = "softmax_xent"
    label_smoothing: float = 0.0
    mixup: MixupConfig | None = None
    random_erasing: ErasingConfig | None = None
    ema: EmaConfig | None = None
    distillation: DistillationConfig | None = None
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
    keep_last: int = 2  # one to fall back to, should the newest turn out damaged
    keep_best: KeepBest | None = None
    resume: str | None = None
    model_init: str | None = None
    model_load: LoadConfig | None = None
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
        if self.loss == "bce" and self.label_smoothing:
            raise ConfigError("label_smoothing", f"{self.label_smoothing} would make every class a target of loss "
                                                 "'bce', which takes what is above 0 as 1; set it to 0")
        if self.mixup:
            with under("mixup"):
                _ = self.mixup_group
        if self.model_load and not self.model_init:
            raise ConfigError("model_load", "says how to take parameters, but not from where: set model_init")
        for name in ("log_training", "ckpt", "keep_ckpt"):
            duration = getattr(self, name)
            if duration is not None and duration.value == 0:
                raise ConfigError(f"{name}_{duration.unit}", "must be more than 0; leave it unset for never")


    @property
    def mixup_group(self) -> int:
        """Rows that mixup mixes among themselves."""
        return self.mixup.rows(self.input.batch_size, self.input.batch_size // self.input.virtual_ranks)


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
    with under("config.model"):
        model = module.resolve(model)
    if cfg.distillation and not getattr(model, "distilled", False):
        raise ConfigError("config.distillation", "the student needs the distillation token and its head: set "
                                                 "config.model.distilled=True")
    datasets.check_source(cfg.input.data, "config.input.data")
    preprocess = builder.build(cfg.input.pp, "config.input.pp")
    evals = parse_evals(cfg.evals)
    if preprocess.image_size:
        with under("config.model"):
            module.check_image_size(model, preprocess.image_size)
    if cfg.num_classes and preprocess.num_classes not in (None, cfg.num_classes):
        raise ConfigError("config.num_classes", f"{cfg.num_classes}, but input.pp has onehot({preprocess.num_classes})"
                                                "; make both the same, in every pp_fn too (in some config files by the "
                                                f"argument classes={cfg.num_classes})")
    warning = cb_optax.warn_mismatch(cfg, batch_size=cfg.input.batch_size, width=model.width)
    if warning:
        logger.warning("%s", warning)
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
