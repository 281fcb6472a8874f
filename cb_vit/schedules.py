"""Learning-rate schedules: multipliers between 0 and 1, as functions of the number of completed steps.

With t completed steps of T, warm-up w, cooldown c and progress p = clip((t - w) / (T - w), 0, 1), a schedule is

    min(1, t / w) · decay(t) · clip((T - t) / c, 0, 1)          (a factor is 1 where w or c is 0)

    cosine      (1 + cos(π p)) / 2                              SGDR, arXiv 1608.03983, without restarts
    linear      linear_end + (1 - linear_end) (1 - p)
    rsqrt       1 / sqrt(1 + (max(t - w, 0) + shift) / timescale)     arXiv 2106.04560
    constant    1

These are big_vision's (`create_learning_rate_schedule`). The peak learning rate multiplies them in `cb_vit.optax`.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Integer

from cb_vit.config import ConfigError, Duration

Step = Integer[ArrayLike, ""]
Schedule = Callable[[Step], Float32[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The block `schedule` of a config.

    Attributes:
        decay_type: how the multiplier falls after the warm-up; see the module docstring.
        warmup: linear rise from 0, `warmup_{steps,epochs,examples,percent}`.
        cooldown: linear fall to 0 at the end of the run, on top of the decay; meant for "rsqrt" and "constant".
        linear_end: what "linear" ends at, as a fraction of the peak.
        timescale: of "rsqrt": the multiplier has fallen to 1/√2 this long after the warm-up (10 000 steps if unset).
        shift: of "rsqrt": start this far down the curve, to continue another run's decay.
    """

    decay_type: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup: Duration | None = None
    cooldown: Duration | None = None
    linear_end: float = 0.0
    timescale: Duration | None = None
    shift: Duration | None = None

    def __post_init__(self):
        if not 0 <= self.linear_end <= 1:
            raise ConfigError("linear_end", f"is a fraction of the peak, 0 to 1, got {self.linear_end}")
        # A setting that its decay_type never reads would silently do nothing.
        if self.linear_end and self.decay_type != "linear":
            raise ConfigError("linear_end", f"has no effect with decay_type={self.decay_type!r}; it needs 'linear'")
        for name in ("timescale", "shift"):
            duration = getattr(self, name)
            if duration is not None and self.decay_type != "rsqrt":
                raise ConfigError(
                    f"{name}_{duration.unit}", f"has no effect with decay_type={self.decay_type!r}; it needs 'rsqrt'")
        if self.timescale is not None and not self.timescale.value:
            raise ConfigError(f"timescale_{self.timescale.unit}", "must be above 0")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Everything in a schedule that is a length of training, in steps."""

    total: int
    warmup: int
    cooldown: int
    timescale: int
    shift: int


def create(
    cfg: ScheduleConfig, *, total_steps: int, batch_size: int, examples: int | None = None,
    path: str = "config.schedule",
) -> Schedule:
    """The multiplier as a function of the number of completed steps: the first update of a run uses `schedule(0)`.

    It takes Python and traced integers alike and answers in float32. Past the end it stays where it ended.

    Args:
        cfg: the block `schedule`.
        total_steps: steps of the whole run.
        batch_size: examples in a global batch.
        examples: examples in one epoch; needed for lengths in epochs.
        path: where the block stands in the config, for errors.

    Raises:
        ConfigError: when warm-up and cooldown do not fit into the run, or a length cannot be expressed in steps.
    """
    def steps(name: str, default: int = 0) -> int:
        duration = getattr(cfg, name)
        if duration is None:
            return default
        try:
            return duration.steps(batch_size, examples, total_steps)
        except ConfigError as error:
            raise ConfigError(f"{path}.{name}_{duration.unit}", error.message) from None

    lengths = Lengths(
        total_steps, steps("warmup"), steps("cooldown"), steps("timescale", default=10_000), steps("shift"))
    _check_fit(cfg, lengths, path)
    return functools.partial(_multiplier, cfg, lengths)


def _check_fit(cfg: ScheduleConfig, lengths: Lengths, path: str) -> None:
    total, warmup, cooldown = lengths.total, lengths.warmup, lengths.cooldown
    # Runs of 0 or 1 steps only evaluate or debug; big_vision lets them pass as well.
    if total <= 1 or (warmup < total and warmup + cooldown <= total):
        return
    name, duration = ("warmup", cfg.warmup) if cfg.warmup is not None and warmup else ("cooldown", cfg.cooldown)
    parts = [f"{warmup} steps of warm-up"] * bool(warmup) + [f"{cooldown} steps of cooldown"] * bool(cooldown)
    raise ConfigError(
        f"{path}.{name}_{duration.unit}",
        f"{' and '.join(parts)} do not fit into a run of {total} steps; shorten them or train for longer")


def _multiplier(cfg: ScheduleConfig, lengths: Lengths, step: Step) -> Float32[Array, ""]:
    t = jnp.asarray(step, jnp.float32)
    multiplier = DECAYS[cfg.decay_type](t, lengths, cfg)
    if lengths.warmup:
        multiplier *= jnp.minimum(1.0, t / lengths.warmup)
    if lengths.cooldown:
        multiplier *= jnp.clip((lengths.total - t) / lengths.cooldown, 0.0, 1.0)
    return multiplier


def _progress(t: Float32[Array, ""], lengths: Lengths) -> Float32[Array, ""]:
    """Share of the run after the warm-up that is done, 0 to 1."""
    return jnp.clip((t - lengths.warmup) / max(1, lengths.total - lengths.warmup), 0.0, 1.0)


def _cosine(t: Float32[Array, ""], lengths: Lengths, cfg: ScheduleConfig) -> Float32[Array, ""]:
    return 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(t, lengths)))


def _linear(t: Float32[Array, ""], lengths: Lengths, cfg: ScheduleConfig) -> Float32[Array, ""]:
    return cfg.linear_end + (1.0 - cfg.linear_end) * (1.0 - _progress(t, lengths))


def _rsqrt(t: Float32[Array, ""], lengths: Lengths, cfg: ScheduleConfig) -> Float32[Array, ""]:
    since = jnp.maximum(t - lengths.warmup, 0.0) + lengths.shift
    return jax.lax.rsqrt(1.0 + since / lengths.timescale)


def _constant(t: Float32[Array, ""], lengths: Lengths, cfg: ScheduleConfig) -> Float32[Array, ""]:
    return jnp.ones_like(t)


DECAYS = {"cosine": _cosine, "linear": _linear, "rsqrt": _rsqrt, "constant": _constant}
