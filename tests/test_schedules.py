"""Schedules against their closed forms, at the places where they bend, and the errors of their block."""
import typing

import jax
import numpy as np
import pytest

from cb_vit import schedules
from cb_vit.config import ConfigError, parse
from cb_vit.schedules import ScheduleConfig


def build(total_steps=110, batch_size=8, examples=80, **block):
    cfg = parse(ScheduleConfig, block, "config.schedule")
    return schedules.create(cfg, total_steps=total_steps, batch_size=batch_size, examples=examples)


def values(schedule, steps):
    return np.array([schedule(step) for step in steps])


@pytest.mark.parametrize(("block", "expected"), [
    # Warm-up 10 of 110 steps: start, half way up, top, middle of the decay, end, past the end.
    (dict(decay_type="cosine", warmup_steps=10), [0, 0.5, 1, 0.5, 0, 0]),
    (dict(decay_type="linear", warmup_steps=10), [0, 0.5, 1, 0.5, 0, 0]),
    (dict(decay_type="linear", warmup_steps=10, linear_end=0.2), [0, 0.5, 1, 0.6, 0.2, 0.2]),
    (dict(decay_type="constant", warmup_steps=10), [0, 0.5, 1, 1, 1, 1]),
    (dict(decay_type="rsqrt", warmup_steps=10, timescale_steps=50), [0, 0.5, 1, 0.5**0.5, 3**-0.5, 3.2**-0.5]),
    (dict(decay_type="constant", warmup_steps=10, cooldown_steps=100), [0, 0.5, 1, 0.5, 0, 0]),
])
def test_values_at_the_bends(block, expected):
    np.testing.assert_allclose(values(build(**block), [0, 5, 10, 60, 110, 120]), expected, atol=1e-7)


def test_cosine_closed_form_over_the_whole_run():
    t = np.arange(201)
    p = np.clip((t - 20) / 180, 0, 1)
    expected = np.minimum(1, t / 20) * (1 + np.cos(np.pi * p)) / 2
    np.testing.assert_allclose(values(build(total_steps=200, warmup_steps=20), t), expected, atol=2e-7)


def test_rsqrt_closed_form_with_shift_and_cooldown():
    t = np.arange(201)
    expected = np.minimum(1, t / 20) / np.sqrt(1 + (np.maximum(t - 20, 0) + 30) / 40) * np.minimum(1, (200 - t) / 50)
    schedule = build(
        200, decay_type="rsqrt", warmup_steps=20, timescale_steps=40, shift_steps=30, cooldown_steps=50)
    np.testing.assert_allclose(values(schedule, t), expected, atol=2e-7)


def test_rsqrt_shift_continues_another_run():
    """A run with shift s starts where the unshifted one is s steps after its warm-up."""
    whole = build(300, decay_type="rsqrt", timescale_steps=40)
    rest = build(200, decay_type="rsqrt", timescale_steps=40, shift_steps=100)
    np.testing.assert_allclose(values(rest, range(200)), values(whole, range(100, 300)), rtol=1e-6)
    unset = build(20_000, decay_type="rsqrt")
    np.testing.assert_allclose(unset(10_000), 0.5**0.5, rtol=1e-6)


def test_lengths_in_every_unit_agree():
    """10 steps = 1 epoch of 80 examples at batch 8 = 80 examples = 10 % of 100 steps."""
    blocks = [dict(warmup_steps=10), dict(warmup_epochs=1), dict(warmup_examples=80), dict(warmup_percent=0.1)]
    curves = [values(build(100, **block), range(101)) for block in blocks]
    for curve in curves[1:]:
        np.testing.assert_array_equal(curve, curves[0])


def test_stays_between_0_and_1_and_is_float32():
    for decay_type in schedules.DECAYS:
        schedule = build(50, decay_type=decay_type, warmup_steps=7, cooldown_steps=9)
        curve = values(schedule, range(60))
        assert schedule(3).dtype == np.float32
        assert curve.min() == 0 and curve.max() <= 1


@pytest.mark.parametrize("decay_type", schedules.DECAYS)
def test_jit_equals_python(decay_type):
    schedule = build(50, decay_type=decay_type, warmup_steps=7, cooldown_steps=9)
    jitted = jax.jit(schedule)
    np.testing.assert_allclose(values(jitted, range(60)), values(schedule, range(60)), rtol=1e-6, atol=1e-7)


def test_every_decay_type_has_a_function():
    hints = typing.get_type_hints(ScheduleConfig)
    assert set(typing.get_args(hints["decay_type"])) == set(schedules.DECAYS)


@pytest.mark.parametrize(("block", "kwargs", "message"), [
    (dict(warmup_steps=110), {}, "config.schedule.warmup_steps: 110 steps of warm-up do not fit into a run of 110"),
    (dict(warmup_epochs=6, cooldown_percent=0.5), {},
     "config.schedule.warmup_epochs: 60 steps of warm-up and 55 steps of cooldown do not fit into a run of 110"),
    (dict(cooldown_examples=1000), {}, "config.schedule.cooldown_examples: 125 steps of cooldown do not fit"),
    (dict(warmup_epochs=1), dict(examples=None), "config.schedule.warmup_epochs: the data source has no length"),
    (dict(linear_end=0.1), {}, "config.schedule.linear_end: has no effect with decay_type='cosine'; it needs 'linear'"),
    (dict(shift_steps=5), {}, "config.schedule.shift_steps: has no effect with decay_type='cosine'; it needs 'rsqrt'"),
    (dict(decay_type="linear", linear_end=2), {}, "config.schedule.linear_end: is a fraction of the peak, 0 to 1, got"),
    (dict(decay_type="rsqrt", timescale_steps=0), {}, "config.schedule.timescale_steps: must be above 0"),
    (dict(decay_type="rsqrt", timescale=100), {}, "config.schedule.timescale: unknown; did you mean timescale_steps?"),
    (dict(decay_type="cosin"), {}, "config.schedule.decay_type: unknown value 'cosin'; did you mean cosine?"),
])
def test_errors_name_the_field(block, kwargs, message):
    with pytest.raises(ConfigError) as error:
        build(**kwargs, **block)
    assert str(error.value).startswith(message)


def test_runs_of_no_or_one_step_need_not_fit():
    for total_steps in (0, 1):
        assert build(total_steps, warmup_steps=10)(0) == 0
