"""Schedules against their closed forms, at the places where they bend, and the errors of their block."""
import typing

import jax
import numpy as np
import pytest

from cb_vit import schedules
from cb_vit.config import ConfigError, parse
from cb_vit.schedules import ScheduleConfig


def build(total_steps=110, batch_size=8, examples=80, peak_lr=1.0, peak_text=None, **block):
    cfg = parse(ScheduleConfig, block, "config.schedule")
    return schedules.create(cfg, peak_lr=peak_lr, total_steps=total_steps, batch_size=batch_size, examples=examples,
                            peak_text=peak_text)


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


@pytest.mark.parametrize("block", [
    *(dict(decay_type=name, warmup_steps=7, cooldown_steps=9) for name in schedules.DECAYS),
    dict(decay_type="deit", warmup_epochs=1, warmup_lr=0.1, min_lr=0.01)], ids=str)
def test_jit_equals_python(block):
    schedule = build(50, **block)
    jitted = jax.jit(schedule)
    np.testing.assert_allclose(values(jitted, range(60)), values(schedule, range(60)), rtol=1e-6, atol=1e-7)


def test_every_decay_type_has_a_function():
    hints = typing.get_type_hints(ScheduleConfig)
    assert set(typing.get_args(hints["decay_type"])) == set(schedules.DECAYS) | {"deit"}


def test_a_warmup_from_above_0_rises_in_a_straight_line_to_the_decay():
    block = dict(peak_lr=1e-3, warmup_steps=10, warmup_lr=1e-4)
    for decay_type in schedules.DECAYS:
        expected = 1e-4 + 9e-4 * np.arange(11) / 10
        np.testing.assert_allclose(1e-3 * values(build(decay_type=decay_type, **block), range(11)), expected, rtol=1e-6)
    # rsqrt may start below the peak: with a shift as long as its timescale, at 1/√2.
    shifted = values(build(decay_type="rsqrt", timescale_steps=50, shift_steps=50, **block), [0, 5, 10])
    np.testing.assert_allclose(shifted, [0.1, (0.1 + 0.5**0.5) / 2, 0.5**0.5], rtol=1e-6)


def test_cosine_ends_at_min_lr_and_stays_there():
    schedule = build(peak_lr=1e-3, warmup_steps=10, warmup_lr=1e-6, min_lr=1e-5)
    np.testing.assert_allclose(
        1e-3 * values(schedule, [0, 10, 60, 110, 120]), [1e-6, 1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5], rtol=1e-5)


DEIT = dict(decay_type="deit", warmup_lr=1e-6, min_lr=1e-5)
IMAGENET = dict(total_steps=300 * 1251, batch_size=1024, examples=1_281_167, peak_lr=5e-4 * 1024 / 512)


@pytest.mark.parametrize("jit", [False, True])
def test_deit_is_constant_within_an_epoch_and_one_epoch_late(jit):
    """DeiT's learning rates at 300 epochs: what its scheduler gave the epoch before."""
    nominal = {0: 1e-6, 1: 2.008e-4, 2: 4.006e-4, 3: 6.004e-4, 4: 8.002e-4}

    def falling(t):
        return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * t / 300))

    expected = {e: nominal.get(max(0, e - 1), falling(e - 1)) for e in (0, 1, 2, 3, 4, 5, 6, 10, 150, 298, 299)}
    assert f"{expected[150]:.4e} {expected[299]:.4e}" == "5.1018e-04 1.0109e-05"
    schedule = build(warmup_epochs=5, **DEIT, **IMAGENET)
    schedule = jax.jit(schedule) if jit else schedule
    for epoch, lr in expected.items():
        for step in (0, 1, 625, 1250):
            np.testing.assert_allclose(1e-3 * schedule(1251 * epoch + step), lr, rtol=1e-6, err_msg=str((epoch, step)))
    np.testing.assert_allclose(1e-3 * schedule(10**6), expected[299], rtol=1e-6)


def test_deit_epochs_begin_at_exact_steps():
    """Every boundary of a long run, at a number of steps whose reciprocal is below it in float32."""
    assert np.float32(1 / 41) * np.float32(41) < 1
    schedule = build(**IMAGENET | dict(total_steps=410_000, examples=1024 * 41), decay_type="deit")
    epochs = np.arange(2, 10_000)
    before, after = (np.asarray(jax.jit(jax.vmap(schedule))(41 * epochs - late)) for late in (1, 0))
    np.testing.assert_array_equal(before[1:], after[:-1])
    falling = 0.5 * (1 + np.cos(np.pi * (epochs - 1) / 10_000))
    np.testing.assert_allclose(after, falling, atol=1e-7)


def test_deit_warmup_in_every_unit():
    """5 epochs = 6255 steps = 5 × 1 281 167 examples = 1/60 of the run; and a run of total_epochs=300 is 42 longer."""
    run = IMAGENET | dict(total_steps=round(300 * 1_281_167 / 1024))
    warmups = dict(epochs=5, steps=6255, examples=5 * 1_281_167, percent=1 / 60)
    curves = [values(build(**DEIT, **run, **{f"warmup_{unit}": value}), range(0, 375_342, 625))
              for unit, value in warmups.items()]
    for curve in curves[1:]:
        np.testing.assert_array_equal(curve, curves[0])
    np.testing.assert_allclose(1e-3 * curves[0][[3, -1]], [1e-6, 1.0109e-5], rtol=1e-4)


def test_deit_without_a_warmup_starts_at_the_peak():
    np.testing.assert_allclose(values(build(decay_type="deit"), [0, 10, 20]), [1, 1, 0.5 + 0.5 * np.cos(np.pi / 11)])


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
    (dict(warmup_lr=-1), {}, "config.schedule.warmup_lr: must be 0 or more, got -1.0"),
    (dict(warmup_lr=0.1), {}, "config.schedule.warmup_lr: has no effect without a warm-up; set warmup_steps or"),
    (dict(warmup_lr=2, warmup_steps=9), {}, "config.schedule.warmup_lr: 2 is above the peak learning rate 1"),
    (dict(min_lr=1e-3), dict(peak_lr=1e-4), "config.schedule.min_lr: 0.001 is above the peak learning rate 0.0001"),
    (dict(warmup_lr=1e-6, warmup_steps=9), dict(peak_lr=3e-7, peak_text="3e-07 (lr 5e-06 × 30 / 500)"),
     "config.schedule.warmup_lr: 1e-06 is above the peak learning rate 3e-07 (lr 5e-06 × 30 / 500); lower it, for "
     "example to 0 or 3e-08, or raise lr"),
    (dict(decay_type="linear", min_lr=0.1), {},
     "config.schedule.min_lr: has no effect with decay_type='linear'; it needs 'cosine' or 'deit'"),
    (dict(min_lr=0.1, cooldown_steps=9), {}, "config.schedule.min_lr: the cooldown ends at 0; drop min_lr or"),
    (dict(decay_type="deit", cooldown_steps=9), {},
     "config.schedule.cooldown_steps: has no effect with decay_type='deit'; it needs 'cosine' or 'linear' or 'rsqrt'"),
    (dict(decay_type="deit", warmup_steps=15), {},
     "config.schedule.warmup_steps: decay_type='deit' warms up for whole epochs, and 15 steps are 1.5 of them"),
    (dict(decay_type="deit", warmup_epochs=11), {},
     "config.schedule.warmup_epochs: 11 epochs of warm-up do not fit into a run of 11 epochs"),
    (dict(decay_type="deit"), dict(examples=None), "config.schedule.decay_type: 'deit' counts epochs, but the data"),
    (dict(decay_type="cosin"), {}, "config.schedule.decay_type: unknown value 'cosin'; did you mean cosine?"),
])
def test_errors_name_the_field(block, kwargs, message):
    with pytest.raises(ConfigError) as error:
        build(**kwargs, **block)
    assert str(error.value).startswith(message)


def test_runs_of_no_or_one_step_need_not_fit():
    for total_steps in (0, 1):
        assert build(total_steps, warmup_steps=10)(0) == 0
