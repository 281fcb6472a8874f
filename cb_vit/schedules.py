"""Learning-rate schedules: multipliers between 0 and 1, as functions of the number of completed steps.

With t completed steps of T, warm-up w, cooldown c and progress p = clip((t - w) / (T - w), 0, 1), a schedule is

    rise(t) · clip((T - t) / c, 0, 1)           rise(t) = start + (decay(w) - start) · t / w    while t < w
                                                        = decay(t)                              from then on
    cosine      end + (1 - end) (1 + cos(π p)) / 2              SGDR, arXiv 1608.03983, without restarts
    linear      linear_end + (1 - linear_end) (1 - p)
    rsqrt       1 / sqrt(1 + (max(t - w, 0) + shift) / timescale)     arXiv 2106.04560
    constant    1

with start = warmup_lr / peak and end = min_lr / peak, both 0 unless told (a factor is 1 where w or c is 0). These are
big_vision's (`create_learning_rate_schedule`). The peak learning rate multiplies them in `cb_vit.optax`.

"deit" is the schedule of DeiT's training runs (facebookresearch/deit `engine.py` and timm's `CosineLRScheduler`),
constant within an epoch and one epoch late. In epoch e of E, with a warm-up of W epochs, it is nominal(max(0, e - 1)),

    nominal(e) = start + (1 - start) · e / W                     while e < W
               = end + (1 - end) (1 + cos(π e / E)) / 2          from then on; not shifted by the warm-up
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float32, Integer

from cb_vit.config import ConfigError, Duration, at

Step = Integer[ArrayLike, ""]
Schedule = Callable[[Step], Float32[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The block `schedule` of a config.

    Attributes:
        decay_type: how the multiplier falls after the warm-up; see the module docstring.
        warmup: length of the linear rise, `warmup_{steps,epochs,examples,percent}`; for "deit" whole epochs; None:
            none.
        warmup_lr: learning rate that the warm-up starts from; not scaled with the batch. DeiT: 1e-6.
        min_lr: learning rate that "cosine" and "deit" end at; not scaled with the batch. DeiT: 1e-5.
        cooldown: length of a linear fall to 0 at the end of the run, on top of the decay; meant for "rsqrt" and
            "constant"; None: none.
        linear_end: fraction of the peak that "linear" ends at; 0 to 1.
        timescale: time after the warm-up in which "rsqrt" falls to 1/√2; None: 10 000 steps.
        shift: time by which "rsqrt" starts further down its curve, to continue another run's decay; None: none.
    """

    decay_type: Literal["cosine", "linear", "rsqrt", "constant", "deit"] = "cosine"
    warmup: Duration | None = None
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown: Duration | None = None
    linear_end: float = 0.0
    timescale: Duration | None = None
    shift: Duration | None = None

    def __post_init__(self):
        if not 0 <= self.linear_end <= 1:
            raise ConfigError("linear_end", f"is a fraction of the peak, 0 to 1, got {self.linear_end}")
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"must be 0 or more, got {getattr(self, name)}")
        # A setting that its decay_type never reads would silently do nothing.
        for name, readers in _READERS.items():
            value = getattr(self, name)
            if value and self.decay_type not in readers:
                field = f"{name}_{value.unit}" if isinstance(value, Duration) else name
                raise ConfigError(field, f"has no effect with decay_type={self.decay_type!r}; it needs "
                                         f"{' or '.join(map(repr, readers))}")
        if self.warmup_lr and not (self.warmup and self.warmup.value):
            raise ConfigError("warmup_lr", "has no effect without a warm-up; set warmup_steps or warmup_epochs")
        if self.min_lr and self.cooldown and self.cooldown.value:
            raise ConfigError("min_lr", f"the cooldown ends at 0; drop min_lr or cooldown_{self.cooldown.unit}")
        if self.timescale is not None and not self.timescale.value:
            raise ConfigError(f"timescale_{self.timescale.unit}", "must be above 0")


_READERS = {"linear_end": ("linear",), "min_lr": ("cosine", "deit"), "timescale": ("rsqrt",), "shift": ("rsqrt",),
            "cooldown": ("cosine", "linear", "rsqrt", "constant")}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a schedule computes with: lengths in steps (of "deit": in epochs), learning rates as shares of the peak.

    Attributes:
        total: length of the run.
        warmup: length of the warm-up; 0: none.
        cooldown: length of the cooldown; 0: none.
        timescale: time in which "rsqrt" falls to 1/√2.
        shift: time by which "rsqrt" starts further down its curve.
        start: multiplier at the beginning of the warm-up.
        end: multiplier at the end of the decay.
    """

    total: int
    warmup: int
    cooldown: int = 0
    timescale: int = 0
    shift: int = 0
    start: float = 0.0
    end: float = 0.0


def create(
    cfg: ScheduleConfig, *, peak_lr: float, total_steps: int, batch_size: int, examples: int | None = None,
    path: str = "config.schedule", peak_text: str | None = None,
) -> Schedule:
    """The multiplier as a function of the number of completed steps: the first update of a run uses `schedule(0)`.

    It takes Python and traced integers alike and answers in float32. Past the end it stays where it ended.

    Args:
        cfg: the config's block `schedule`.
        peak_lr: the learning rate at multiplier 1.
        total_steps: number of steps of the whole run.
        batch_size: number of examples in a global batch.
        examples: number of examples in one epoch; needed for lengths in epochs and for "deit".
        path: where the block stands in the config, for errors.
        peak_text: where `peak_lr` comes from, for errors.

    Raises:
        ConfigError: warm-up and cooldown do not fit into the run, a length cannot be expressed in steps (of "deit": in
            epochs), or `warmup_lr` or `min_lr` is above the peak.
    """
    for name in ("warmup_lr", "min_lr"):
        if getattr(cfg, name) > peak_lr:
            raise ConfigError(f"{path}.{name}", f"{getattr(cfg, name):g} is above the peak learning rate "
                                                f"{peak_text or f'{peak_lr:g}'}; lower it, for example to 0 or "
                                                f"{peak_lr / 10:.1g}, or raise lr")
    ends = dict(start=cfg.warmup_lr / peak_lr, end=(cfg.min_lr / peak_lr) or cfg.linear_end)

    if cfg.decay_type == "deit":
        if examples is None:
            raise ConfigError(f"{path}.decay_type", "'deit' counts epochs, but the data source has no length; "
                                                    "use 'cosine'")
        # Whole steps: DeiT drops the last, smaller batch of an epoch.
        steps_per_epoch = max(1, examples // batch_size)
        epochs = max(1, round(total_steps / steps_per_epoch))
        numbers = Numbers(epochs, _whole_epochs(cfg.warmup, steps_per_epoch, examples, epochs, path), **ends)
        _check_fit(cfg, numbers, "epochs", path)
        return functools.partial(_by_epoch, _deit(numbers), steps_per_epoch)

    def steps(name: str, default: int = 0) -> int:
        duration = getattr(cfg, name)
        if duration is None:
            return default
        with at(f"{path}.{name}_{duration.unit}"):
            return duration.steps(batch_size, examples, total_steps)

    numbers = Numbers(
        total_steps, steps("warmup"), steps("cooldown"), steps("timescale", default=10_000), steps("shift"), **ends)
    _check_fit(cfg, numbers, "steps", path)
    return functools.partial(_by_step, DECAYS[cfg.decay_type], numbers)


def _check_fit(cfg: ScheduleConfig, numbers: Numbers, unit: str, path: str) -> None:
    total, warmup, cooldown = numbers.total, numbers.warmup, numbers.cooldown
    # Runs of 0 or 1 steps only evaluate or debug; big_vision lets them pass as well.
    if total <= 1 or (warmup < total and warmup + cooldown <= total):
        return
    name, duration = ("warmup", cfg.warmup) if cfg.warmup is not None and warmup else ("cooldown", cfg.cooldown)
    parts = [f"{warmup} {unit} of warm-up"] * bool(warmup) + [f"{cooldown} {unit} of cooldown"] * bool(cooldown)
    raise ConfigError(
        f"{path}.{name}_{duration.unit}",
        f"{' and '.join(parts)} do not fit into a run of {total} {unit}; shorten them or train for longer")


def _by_step(
    decay: Callable[[Float32[Array, ""], Numbers], Float32[Array, ""]], numbers: Numbers, step: Step
) -> Float32[Array, ""]:
    t = jnp.asarray(step, jnp.float32)  # exact up to 2²⁴ steps
    multiplier = decay(t, numbers)
    if numbers.warmup:
        rising = numbers.start + (multiplier - numbers.start) * (t / numbers.warmup)
        multiplier = jnp.where(t < numbers.warmup, rising, multiplier)
    if numbers.cooldown:
        multiplier *= jnp.clip((numbers.total - t) / numbers.cooldown, 0.0, 1.0)
    return multiplier


def _progress(t: Float32[Array, ""], numbers: Numbers) -> Float32[Array, ""]:
    """Share of the run after the warm-up that is done, 0 to 1."""
    return jnp.clip((t - numbers.warmup) / max(1, numbers.total - numbers.warmup), 0.0, 1.0)


def _cosine(t: Float32[Array, ""], numbers: Numbers) -> Float32[Array, ""]:
    return numbers.end + (1.0 - numbers.end) * 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(t, numbers)))


def _linear(t: Float32[Array, ""], numbers: Numbers) -> Float32[Array, ""]:
    return numbers.end + (1.0 - numbers.end) * (1.0 - _progress(t, numbers))


def _rsqrt(t: Float32[Array, ""], numbers: Numbers) -> Float32[Array, ""]:
    since = jnp.maximum(t - numbers.warmup, 0.0) + numbers.shift
    return jax.lax.rsqrt(1.0 + since / numbers.timescale)


def _constant(t: Float32[Array, ""], numbers: Numbers) -> Float32[Array, ""]:
    return jnp.ones_like(t)


DECAYS = {"cosine": _cosine, "linear": _linear, "rsqrt": _rsqrt, "constant": _constant}


def _deit(numbers: Numbers) -> Float32[np.ndarray, " epochs"]:
    """The multiplier of each epoch."""
    nominal = np.maximum(0, np.arange(numbers.total) - 1)  # DeiT steps its scheduler at the end of epoch e, with e
    rising = numbers.start + (1 - numbers.start) * nominal / max(1, numbers.warmup)
    falling = numbers.end + (1 - numbers.end) * 0.5 * (1 + np.cos(np.pi * nominal / numbers.total))
    return np.where(nominal < numbers.warmup, rising, falling).astype(np.float32)


def _by_epoch(multipliers: Float32[np.ndarray, " epochs"], steps_per_epoch: int, step: Step) -> Float32[Array, ""]:
    # Integers only: a float division that is off by one bit would begin an epoch a step early or late.
    epoch = jnp.clip(jnp.asarray(step) // steps_per_epoch, 0, len(multipliers) - 1)
    return jnp.asarray(multipliers)[epoch]


def _whole_epochs(warmup: Duration | None, steps_per_epoch: int, examples: int, epochs: int, path: str) -> int:
    """The warm-up of "deit" in epochs."""
    if warmup is None:
        return 0
    per_epoch = {"epochs": 1, "steps": steps_per_epoch, "examples": examples, "percent": 1 / epochs}[warmup.unit]
    length = warmup.value / per_epoch
    if abs(length - round(length)) > 1e-6:
        raise ConfigError(f"{path}.warmup_{warmup.unit}", f"decay_type='deit' warms up for whole epochs, and "
                                                          f"{warmup.value:g} {warmup.unit} are {length:.6g} of them")
    return round(length)
