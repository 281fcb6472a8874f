"""From big_vision's flat optimiser keys to one optax transformation.

With g the gradient of a parameter p and t completed steps, an update is, in this order,

    g ← 0                                          where p is frozen: no update, no optimiser state, no share in ‖g‖
    g ← g · min(1, grad_clip_adaptive · max(‖p‖, 10⁻³) / ‖g‖)   for each output unit; spares heads (arXiv 2102.06171)
    g ← g · min(1, grad_clip_norm / ‖g‖)           one norm over all trainable parameters (arXiv 1211.5063)
    u ← optax_name(g)                              for example Adam's direction (arXiv 1412.6980)
    u ← u + weight_decay · wd_mult · p             decoupled (AdamW)
    u ← u · ‖p‖ / ‖u‖                              "scale_by_lamb" only, where p is decayed (arXiv 1904.00962); one
                                                   ratio for query, key and value of an attention (`lamb_fused_qkv`)
    p ← p - lr · lr_mult · layer_decay^(L+1-i) · schedule(t) · u

so weight decay is multiplied by the learning rate, as in PyTorch's and optax's AdamW and in the DeiT recipes. In
big_vision, as in the AdamW paper (arXiv 1711.05101, algorithm 2), it is not: its `wd` is our `weight_decay · lr`, or
`weight_decay · lr · lr_mult` where `lr_mults` are set.

Layer decay counts as BEiT does (arXiv 2106.08254), with L blocks: i = 0 for patch, position and token embeddings,
i = k + 1 for block k = 0 … L - 1, i = L + 1 for the final norm and the heads. (timm has its norm in the last block.)

All rules go by name: `(regex, value)` pairs, the regex matches the whole name, the first match wins. The optimiser
state holds trees with the parameters' names at the end of its own, so one regex serves both for sharding.
"""
from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from cb_vit import schedules as schedules_lib
from cb_vit import updates
from cb_vit.config import ConfigError, convert
from cb_vit.registry import Registry, suggest
from cb_vit.schedules import Schedule, ScheduleConfig
from cb_vit.tree import Tree, blocks, check_rules, first_match, flatten_with_names, is_stacked, map_with_names
from cb_vit.updates import ParamRule

# The first four are for line searches or need the loss itself; the others would apply a learning rate twice.
_UNFIT = ("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch", "scale_by_lbfgs", "scale_by_polyak",
          "scale_by_learning_rate", "scale_by_rprop", "scale_by_schedule")
TRANSFORMATIONS: Registry[Callable[..., optax.GradientTransformation]] = Registry("optax transformation", {
    name: getattr(optax, name) for name in dir(optax)
    if (name.startswith("scale_by_") or name in ("trace", "identity")) and name not in _UNFIT})
# Adam's direction; what makes it LAMB comes with the weight decay.
TRANSFORMATIONS["scale_by_lamb"] = optax.scale_by_adam
_STEM = ("embedding", "cls", "dist", "reg", "pos_embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """The optimiser's keys, which stand flat at the top of a config; the schema of the whole config inherits them.

    A subclass with a `__post_init__` of its own calls `super().__post_init__()`.

    Attributes:
        lr: peak learning rate.
        lr_reference_batch: batch size that `lr` is for: the peak is `lr · batch_size / lr_reference_batch` (arXiv
            1706.02677); DeiT: 512; None: the peak is `lr`.
        lr_mults: pairs `(regex, multiplier of the learning rate)`; parameters without a match have 1.
        layer_decay: factor on learning rates for each block from the output down to a parameter, above 0, at most 1;
            None: no such factor.
        weight_decay: coefficient of AdamW's decay, which is multiplied by the learning rate; 0: no decay.
        wd_mults: pairs `(regex, multiplier of the weight decay)`; parameters without a match are not decayed. The
            default decays every kernel, those of `embedding` and `head` too, and spares biases, norms, `cls`, `reg`,
            `pos_embedding`, `context_scale` and `gamma`.
        schedule: one schedule, or `(regex, schedule or None)` pairs that cover every parameter; None freezes.
        grad_clip_norm: largest global norm of the gradient; None: no clipping.
        grad_clip_adaptive: largest norm of the gradient of an output unit, as a share of the unit's own norm; 0.01 in
            NFNets; None: no such clipping. Comes before `grad_clip_norm`.
        optax_name: the transformation of the gradient, one of `TRANSFORMATIONS`. "scale_by_lamb" is LAMB as timm and
            DeiT-III have it: parameters that are not decayed keep Adam's step. DeiT-III clips the norm at 1.
        optax: keyword arguments of that transformation, e.g. `dict(b2=0.95, mu_dtype="bfloat16")`.
        lamb_fused_qkv: whether LAMB's norms are those of timm's tensors (`updates.fused_name`): one over query, key and
            value of an attention, one over key and value in attention pooling, of those that are trained and decayed.
            False: each parameter has its own. None: as timm, and where a run goes on, as it began (each its own, if
            that run has no record of it).
        wd: trap for big_vision's weight decay; always an error.
    """

    lr: float
    lr_reference_batch: int | None = None
    lr_mults: tuple[tuple[str, float], ...] = ()
    layer_decay: float | None = None
    weight_decay: float = 0.0
    wd_mults: tuple[tuple[str, float], ...] = ((".*/kernel", 1.0),)
    schedule: tuple[tuple[str, ScheduleConfig | None], ...] | ScheduleConfig = ScheduleConfig()
    grad_clip_norm: float | None = None
    grad_clip_adaptive: float | None = None
    optax_name: str = "scale_by_adam"
    optax: dict[str, Any] = dataclasses.field(default_factory=dict)
    lamb_fused_qkv: bool | None = None
    wd: float | None = None

    def __post_init__(self):
        for name in ("lr", "lr_reference_batch", "grad_clip_norm", "grad_clip_adaptive"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(name, f"must be a number above 0, got {value}")
        if self.wd is not None:
            raise ConfigError("wd", "big_vision's weight decay is not multiplied by lr; " + updates.big_vision_decay(
                self.wd, lr=self.lr, batch=self.lr_reference_batch, lr_mults=self.lr_mults, wd_mults=self.wd_mults,
                layer_decay=self.layer_decay, lamb=self.lamb,
                freezes=any(block is None for _, block in self.schedule_rules)))
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError("weight_decay", f"must be 0 or more, got {self.weight_decay}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError("layer_decay", f"must be above 0 and at most 1, got {self.layer_decay}")
        if self.lamb_fused_qkv is not None and not self.lamb:
            raise ConfigError("lamb_fused_qkv", f"is {self.lamb_fused_qkv}, and {self.optax_name} has no such norms; "
                                                "unset it, or set optax_name='scale_by_lamb'")
        if self.lamb and not self.weight_decay:
            raise ConfigError("weight_decay", "is 0, and scale_by_lamb adapts the steps of decayed parameters only, so "
                                              "this is Adam; set it, or optax_name='scale_by_adam'")
        _check_regexes("schedule", self.schedule_rules)
        _check_regexes("lr_mults", self.lr_mults)
        _check_regexes("wd_mults", self.wd_mults)
        for index, (regex, mult) in enumerate(self.lr_mults):
            if not 0 < mult < math.inf:
                raise ConfigError(f"lr_mults[{index}]", f"{regex!r} has multiplier {mult}, which must be above 0; "
                                                        "to freeze, give schedule pairs with None")
        for index, (regex, mult) in enumerate(self.wd_mults):
            if not 0 <= mult < math.inf:
                raise ConfigError(f"wd_mults[{index}]", f"{regex!r} has multiplier {mult}, which must be 0 or more")
        object.__setattr__(self, "optax", _check_arguments(self.optax_name, self.optax))

    @property
    def lamb(self) -> bool:
        """Whether steps are LAMB's."""
        return self.optax_name == "scale_by_lamb"

    @property
    def schedule_rules(self) -> tuple[tuple[str, ScheduleConfig | None], ...]:
        """The schedule as `(regex, schedule or None)` pairs, whichever way it was written."""
        return ((".*", self.schedule),) if isinstance(self.schedule, ScheduleConfig) else self.schedule


def peak_lr(cfg: OptimiserConfig, batch_size: int) -> float:
    """The learning rate that the schedules multiply: lr, or lr · batch_size / lr_reference_batch."""
    return cfg.lr if cfg.lr_reference_batch is None else cfg.lr * batch_size / cfg.lr_reference_batch


def peak_text(cfg: OptimiserConfig, batch_size: int) -> str:
    """The peak learning rate to read: "0.001 (lr 0.0005 × batch_size 1024 / lr_reference_batch 512)"."""
    how = f" (lr {cfg.lr:g} × batch_size {batch_size} / lr_reference_batch {cfg.lr_reference_batch})"
    return f"{peak_lr(cfg, batch_size):.3g}{how if cfg.lr_reference_batch else ''}"


def warn_mismatch(cfg: OptimiserConfig, *, batch_size: int, width: int) -> str | None:
    """A line on a learning rate that was meant for LAMB, if `cfg` has one with Adam's direction.

    LAMB's steps are shares of a parameter's norm, Adam's are not: DeiT-III's 3e-3 to 4e-3 with AdamW ends in NaN
    (naver-ai/rope-vit, issue 16). DeiT's own runs peak at 1e-3.

    Args:
        cfg: the optimiser's settings.
        batch_size: number of examples in a global batch.
        width: the model's width; narrow models stand higher rates.
    """
    rate = peak_lr(cfg, batch_size)
    if cfg.optax_name != "scale_by_adam" or width < 192 or rate <= 2e-3:
        return None
    return (f"config.lr: a peak of {rate:g} is a learning rate for LAMB; with Adam's direction a width of {width} may "
            "diverge above 0.002. Lower lr, or set optax_name='scale_by_lamb'")


def describe(cfg: OptimiserConfig, params_shapes: Tree, *, path: str = "config") -> list[ParamRule]:
    """The rules of `cfg` settled for each parameter, in JAX's leaf order; `make` acts on exactly these.

    Args:
        cfg: the optimiser's settings.
        params_shapes: the parameters, or `jax.eval_shape`'s answer in their place.
        path: where the settings stand in the config, for errors.

    Raises:
        ConfigError: a rule matches no parameter, a parameter has no schedule, none is left to train, or there is layer
            decay without blocks.
    """
    check_rules(cfg.schedule_rules, params_shapes, f"{path}.schedule")
    check_rules(cfg.lr_mults, params_shapes, f"{path}.lr_mults")
    # Without weight decay nobody reads the multipliers, so they need not match anything.
    if cfg.weight_decay:
        check_rules(cfg.wd_mults, params_shapes, f"{path}.wd_mults")
    uncovered = object()
    # The value of a schedule rule here is its own regex, which names the schedule; None still means frozen.
    named = [(regex, None if block is None else regex) for regex, block in cfg.schedule_rules]
    depth = _depth(params_shapes)
    if cfg.layer_decay is not None and not depth:
        raise ConfigError(f"{path}.layer_decay", "goes by blocks named encoderblock…, and there are none; unset it")
    rules = []
    for name, leaf in flatten_with_names(params_shapes)[0]:
        schedule = first_match(name, named, default=uncovered)
        if schedule is uncovered:
            raise ConfigError(f"{path}.schedule", f"no rule covers {name!r}; end with ('.*', dict(...)), "
                                                  "or ('.*', None) to freeze the rest")
        moves = schedule is not None
        rules.append(ParamRule(
            name, tuple(leaf.shape), schedule,
            lr_mult=_lr_mult(cfg, name, leaf.shape, depth) if moves else 0.0,
            wd_mult=first_match(name, cfg.wd_mults, 0.0) if moves else 0.0))
    if all(rule.frozen for rule in rules):
        raise ConfigError(f"{path}.schedule", "freezes every parameter; give at least one a schedule")
    return rules


def _depth(params_shapes: Tree) -> int:
    numbers = [block for name, leaf in flatten_with_names(params_shapes)[0] for block in blocks(name, leaf.shape)]
    return 1 + max(numbers, default=-1)


def _lr_mult(cfg: OptimiserConfig, name: str, shape: tuple[int, ...], depth: int) -> float | tuple[float, ...]:
    mult = first_match(name, cfg.lr_mults, 1.0)
    if cfg.layer_decay is None:
        return mult
    of_blocks = tuple(mult * cfg.layer_decay ** (depth - block) for block in blocks(name, shape))
    if of_blocks:
        return of_blocks if is_stacked(name) else of_blocks[0]
    return mult * cfg.layer_decay ** (depth + 1) if name.split("/")[0] in _STEM else mult


def trainable(cfg: OptimiserConfig, params_shapes: Tree) -> Tree:
    """For each parameter, whether it is trained, that is, has a schedule.

    Args:
        cfg: the optimiser's settings.
        params_shapes: the parameters, or `jax.eval_shape`'s answer in their place.
    """
    rules = {rule.name: rule for rule in describe(cfg, params_shapes)}
    return map_with_names(lambda name, _: not rules[name].frozen, params_shapes)


def make(
    cfg: OptimiserConfig, params_shapes: Tree, *, total_steps: int, batch_size: int, examples: int | None = None,
    path: str = "config",
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
    """The optimiser and, by the regex of their rule, its schedules. The module docstring has the formulas.

    The state counts completed updates in one int32 for all schedules (`optax.ScaleByScheduleState.count`), so as
    long as each train step makes one update it equals the train state's step.

    Args:
        cfg: the optimiser's settings.
        params_shapes: the parameters, or `jax.eval_shape`'s answer in their place.
        total_steps: number of steps of the whole run.
        batch_size: number of examples in a global batch.
        examples: number of examples in one epoch; needed for schedule lengths in epochs.
        path: where the settings stand in the config, for errors.

    Raises:
        ConfigError: the rules are such as `describe` refuses, or a schedule does not fit into the run.
    """
    rules = {rule.name: rule for rule in describe(cfg, params_shapes, path=path)}
    single = isinstance(cfg.schedule, ScheduleConfig)
    schedules = {
        regex: schedules_lib.create(
            block, peak_lr=peak_lr(cfg, batch_size), total_steps=total_steps, batch_size=batch_size, examples=examples,
            path=f"{path}.schedule" if single else f"{path}.schedule[{index}][1]",
            peak_text=peak_text(cfg, batch_size))
        for index, (regex, block) in enumerate(cfg.schedule_rules) if block is not None}
    frozen = map_with_names(lambda name, _: rules[name].frozen, params_shapes)
    trainable = jax.tree.map(operator.not_, frozen)
    clip = optax.chain(
        optax.identity() if cfg.grad_clip_adaptive is None else updates.clip_adaptive(cfg.grad_clip_adaptive),
        optax.identity() if cfg.grad_clip_norm is None else optax.clip_by_global_norm(cfg.grad_clip_norm))
    update_trainable = optax.chain(
        clip,
        TRANSFORMATIONS[cfg.optax_name](**cfg.optax),
        updates.add_weight_decay(cfg.weight_decay, rules, trust=cfg.lamb, fused_qkv=cfg.lamb_fused_qkv is not False),
        updates.scale_by_schedules(peak_lr(cfg, batch_size), schedules, rules))
    # Masked, frozen parameters have no moments to store, and no share in the norm that clipping looks at.
    return optax.chain(
        optax.masked(optax.set_to_zero(), frozen), optax.masked(update_trainable, trainable)), schedules


def _check_regexes(field: str, rules: tuple[tuple[str, Any], ...]) -> None:
    seen = set()
    for index, (regex, _) in enumerate(rules):
        try:
            re.compile(regex)
        except re.error as error:
            raise ConfigError(f"{field}[{index}]", f"{regex!r} is not a regular expression: {error}") from None
        if regex in seen:  # the first match wins, so the second would never be read
            raise ConfigError(f"{field}[{index}]", f"{regex!r} is given twice; keep one")
        seen.add(regex)


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of transformation `name`, numbers converted, or a `ConfigError`."""
    if name not in TRANSFORMATIONS:  # "adam" and "adamw" mean scale_by_adam
        near = suggest(name if name.startswith("scale_by_") else f"scale_by_{name}", TRANSFORMATIONS)
        raise ConfigError("optax_name", f"unknown optax transformation {name!r}{near} "
                                        f"Choices: {', '.join(TRANSFORMATIONS)}")
    transformation = TRANSFORMATIONS[name]
    known = inspect.signature(transformation).parameters
    checked = {}
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(
                f"optax.{key}",
                f"unknown{suggest(key, known)} {name} takes {', '.join(known) or 'no arguments'}")
        kind = type(known[key].default)
        checked[key] = convert(value, kind, f"optax.{key}") if kind in (bool, int, float) else value
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in checked:
            raise ConfigError(f"optax.{key}", f"required by {name} and not set; write optax = dict({key}=...)")
    # Built once for nothing: a value that optax refuses is then told before the data and the devices are touched.
    try:
        transformation(**checked)
    except (TypeError, ValueError) as error:
        raise ConfigError("optax", f"{name} refuses {checked}: {error}") from None
    return checked
