"""All settings of a run: the schema of a config, put together from those of the rooms, and its checks."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import ml_collections

from cb_vit import io, models
from cb_vit import optax as cb_optax
from cb_vit.augment import ErasingConfig, MixupConfig, Recipe
from cb_vit.checkpoint import KeepBest
from cb_vit.config import NO_SETTING, ConfigError, Duration, Read, as_read, parse, plain, under
from cb_vit.distillation import DistillationConfig
from cb_vit.evaluators.common import EvaluatorConfig, read_evaluator
from cb_vit.input_pipeline import InputConfig
from cb_vit.losses import LOSSES
from cb_vit.monitor.metric_writer import LoggingConfig, check_installed
from cb_vit.monitor.profiling import ProfileConfig
from cb_vit.registry import suggest
from cb_vit.sharding import Strategy, parse_strategy, replicate
from cb_vit.train_state import EmaConfig
from cb_vit.weights import LoadConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(cb_optax.OptimiserConfig, LoggingConfig):
    """A whole config, checked as far as that needs neither data nor devices.

    The optimiser's and the metric writer's keys stand flat at its top as well.

    Attributes:
        seed: seed of everything random; the same on all hosts.
        total: length of the run: `total_steps`, `total_epochs` or `total_examples`.
        input: training data and preprocessing.
        num_classes: width of the model's head; None: as `input.pp` says, or else as many as the data has.
        allow_unused_classes: whether classes of the head may be without training data: folders without images, or a
            head that is larger than the data. Part of ImageNet's classes under a head of all 1 000 needs no leave.
        loss: name of the loss, one of `losses.LOSSES`.
        label_smoothing: share of each target spread evenly over all classes, before mixup.
        class_weights: how much each class counts in the loss of training: "balanced", all classes alike, however many
            examples they have; "sqrt", half of the way there; or weights by the names of classes, 1 for those left out.
            None: every example counts alike. `input.balance` shows rare classes more often instead.
        mixup: settings of mixup and cutmix, which are done on the device; None: neither.
        random_erasing: settings of random erasing, which is done on the device; None: none.
        ema: settings of a moving average of the parameters, which evaluators measure as well, their metrics under
            "ema/"; None: none is kept.
        distillation: settings of learning from a teacher too, for which the model must be `distilled`; None: no
            teacher.
        model_name: name of the model's module.
        model: resolved settings of the model. What a config leaves open is as in the model of `model_init`, where there
            is one, except for how that was trained (dropout, layout, dtype, initialisation); else it is the default.
        evals: settings of the evaluators, by name.
        grad_accum_steps: number of micro-batches that a batch is cut into to save memory.
        mesh: (name, size) pairs of the mesh axes; -1: the rest of the devices.
        mesh_allow_split_physical_axes: whether a mesh axis may take part of a physical axis of a TPU torus.
        sharding_strategy: (regex, rule) pairs for parameters and optimiser state, see `cb_vit/sharding.py`.
        sharding_rules: (logical axis, mesh axes) pairs for activations: "act_batch", "act_len", "act_emb".
        log_training: interval at which training metrics are recorded.
        ckpt: interval at which checkpoints are saved, besides the one at the last step; None: that one only.
        keep_ckpt: interval whose multiples are the steps of checkpoints kept for good; None: none are.
        keep_last: number of the newest checkpoints to keep.
        keep_best: rule by which the best checkpoints are kept as well; None: none are.
        resume: another run's workdir to go on from, where this workdir has no checkpoint yet.
        model_init: model whose parameters to begin with, where there is no run to go on from: a run's workdir
            (WORKDIR@STEP for another checkpoint than its newest), a file of weights, or hf://ORG/NAME, as `cb_vit.load`
            takes them. `check` does not open it: until `with_model`, `model` holds what the config itself says.
        model_load: settings of how the parameters of `model_init` are taken; None: the defaults.
        allow_changed_data: whether a resumed run may go on with another seed, data, preprocessing or batch size. A copy
            of the same data elsewhere is no change.
        profile: settings of the steps to trace; None: none.
        raw: the config as plain values, for `config.json`; not a setting itself.
    """

    seed: int
    total: Duration
    input: InputConfig
    num_classes: int | None = None
    allow_unused_classes: bool = False
    loss: str = "softmax_xent"
    label_smoothing: float = 0.0
    class_weights: Literal["balanced", "sqrt"] | dict[str, float] | None = None
    mixup: MixupConfig | None = None
    random_erasing: ErasingConfig | None = None
    ema: EmaConfig | None = None
    distillation: DistillationConfig | None = None
    model_name: str = "vit"
    model: Any = dataclasses.field(default_factory=dict)
    evals: dict[str, Annotated[EvaluatorConfig, Read(Any, read_evaluator)]] = dataclasses.field(default_factory=dict)
    grad_accum_steps: int = 1
    mesh: tuple[tuple[str, int], ...] = (("data", -1),)
    mesh_allow_split_physical_axes: bool = False
    sharding_strategy: Annotated[Strategy, Read(tuple[tuple[str, str], ...], parse_strategy)] = (
        (".*", (replicate(),)),)
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
    raw: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=NO_SETTING)

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
        if self.class_weights is not None and self.loss != "softmax_xent":
            raise ConfigError("class_weights", f"are for loss='softmax_xent', and it is {self.loss!r}; "
                                               "input.balance=1.0 shows rare classes more often, whatever the loss")
        if self.mixup:
            with under("mixup"):
                _ = self.recipe
        if self.model_load and not self.model_init:
            raise ConfigError("model_load", "says how to take parameters, but not from where: set model_init")
        for name in ("log_training", "ckpt", "keep_ckpt"):
            duration = getattr(self, name)
            if duration is not None and duration.value == 0:
                raise ConfigError(f"{name}_{duration.unit}", "must be more than 0; leave it unset for never")

    def for_classes(self, count: int) -> Settings:
        """The same where the head has so many classes, which a preprocessing string may leave to the data."""
        evals = {name: dataclasses.replace(block, pp_fn=block.pp_fn.for_classes(count)) if block.needs_classes
                 else block for name, block in self.evals.items()}
        return dataclasses.replace(
            self, input=dataclasses.replace(self.input, pp=self.input.pp.for_classes(count)), evals=evals)

    def with_model(self, trained: Mapping[str, Any]) -> Settings:
        """The same, with the model resolved.

        Args:
            trained: settings, by name, of a trained model that has what the config leaves open.

        Raises:
            ConfigError: the model cannot be, or the rest of the config does not go with it.
        """
        module = models.get(self.model_name)
        model = parse(module.Config, module.inherit(self.raw.get("model") or {}, trained), "config.model")
        with under("config.model"):
            model = module.resolve(model)
            if self.input.pp.image_size:
                module.check_image_size(model, self.input.pp.image_size)
        if self.distillation and not getattr(model, "distilled", False):
            raise ConfigError("config.distillation", "the student needs the distillation token and its head: set "
                                                     "config.model.distilled=True")
        return dataclasses.replace(self, model=model)

    @property
    def recipe(self) -> Recipe:
        """What training does to a prepared batch."""
        size = self.input.batch_size
        group = self.mixup.rows(size, size // self.input.virtual_ranks) if self.mixup else size
        return Recipe(self.label_smoothing, self.random_erasing, self.mixup, group)


def check(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Settings:
    """Turn a config into settings, or say what is wrong with it.

    Raises:
        ConfigError: the config cannot work; one line names the field, the value and the way out.
    """
    config = plain(config)
    settings = parse(Settings, config)
    model = parse(models.get(settings.model_name).Config, settings.model, "config.model")
    pp = settings.input.pp
    if settings.num_classes and pp.num_classes not in (None, settings.num_classes):
        raise ConfigError("config.num_classes", f"{settings.num_classes}, but input.pp has onehot({pp.num_classes})"
                                                "; make both the same, in every pp_fn too (in some config files by the "
                                                f"argument classes={settings.num_classes})")
    check_installed(settings)
    _check_mesh_names(settings)
    settings = dataclasses.replace(settings, model=model, raw=as_read(config))
    return settings.with_model({}) if model.sized or not settings.model_init else settings


def check_addresses(settings: Settings) -> None:
    """Refuse what lies in a bucket that nothing here can open, before anything is fetched from elsewhere.

    Raises:
        ConfigError: an address cannot be opened; raised at its setting.
    """
    teacher = settings.distillation and settings.distillation.teacher
    paths = {"resume": settings.resume, "model_init": settings.model_init, "distillation.teacher": teacher}
    data = {"input.data": settings.input.data} | {
        f"evals.{name}.{field}": block for name, config in settings.evals.items()
        for field, block in {"data": config.data, **config.further}.items()}
    paths |= {f"{name}.data_dir": getattr(block, "data_dir", None) for name, block in data.items()}
    for field, path in paths.items():
        if path and not path.startswith("hf://"):
            io.check_address(path, f"config.{field}")


def _check_mesh_names(settings: Settings) -> None:
    axes = [name for name, _ in settings.mesh]
    for i, (_, mapped) in enumerate(settings.sharding_rules):
        for name in (mapped,) if isinstance(mapped, str) else mapped:
            if name not in axes:
                raise ConfigError(f"config.sharding_rules[{i}]", f"the mesh has no axis {name!r}{suggest(name, axes)} "
                                                                 f"config.mesh has {', '.join(axes)}")
