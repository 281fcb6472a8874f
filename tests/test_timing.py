"""Rates, pauses and restarts in closed form, on a clock that the test moves."""
import json
import types

import pytest

from cb_vit.monitor.timing import GIB, Chrono, memory_stats, mfu, peak_flops


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def device(kind="TPU v4", **kw):
    return types.SimpleNamespace(device_kind=kind, **kw)


@pytest.fixture
def clock():
    return Clock()


def test_rate_leaves_out_compilation_and_pauses(clock):
    chrono = Chrono(100, 32, devices=[device()] * 4, clock=clock)
    clock.pass_(7)  # set-up
    chrono.start(0)
    clock.pass_(50)  # the first step compiles
    first = chrono.measure(1)
    assert "img/sec" not in first
    clock.pass_(4)
    with chrono.paused("evaluate"):
        clock.pass_(30)
    clock.pass_(4)
    metrics = chrono.measure(5)  # 4 steps in 8 s
    assert metrics["img/sec"] == pytest.approx(4 * 32 / 8)
    assert metrics["img/sec/core"] == pytest.approx(metrics["img/sec"] / 4)
    assert metrics["uptime"] == pytest.approx(7 + 50 + 8 + 30)
    assert metrics["core_hours"] == pytest.approx(4 * (50 + 8) / 3600)
    assert metrics["z/secs/evaluate"] == 30
    assert metrics["examples_seen"] == 160 and "epoch" not in metrics and "mfu" not in metrics


def test_a_rate_is_the_mean_over_the_last_minute_of_training(clock):
    chrono = Chrono(10_000, 10, clock=clock)
    chrono.start()
    chrono.tick(1)
    rates = {}
    for step in range(2, 302):
        if step == 150:
            with chrono.paused("evaluate"):
                clock.pass_(1000)
        clock.pass_(1.0 if step <= 201 else 0.5)  # twice as fast from there on
        rates[step] = chrono.measure(step)["img/sec"]
    assert all(rates[step] == pytest.approx(10) for step in range(2, 202))  # the pause does not count
    assert rates[261] == pytest.approx(10 * (30 + 60) / 60)  # half a minute of each
    assert rates[301] == pytest.approx(10 * (10 + 100) / 60)
    assert chrono.measure(301)["img/sec"] == rates[301]  # nothing has passed


def test_the_share_of_waiting_is_that_of_the_minute_of_the_rate(clock):
    chrono = Chrono(10_000, 10, clock=clock)
    chrono.start()

    def step(number, wait, work):
        with chrono.waiting():
            clock.pass_(wait)
        clock.pass_(work)
        return chrono.measure(number).get("data_wait")

    assert step(1, 50, 50) is None  # the pipeline starts, the step compiles
    assert step(2, 1, 3) == pytest.approx(1 / 4)
    with chrono.paused("evaluate"):
        clock.pass_(500)
        with chrono.waiting():  # for the data of an evaluator: training stands still
            clock.pass_(500)
    assert step(3, 0, 4) == pytest.approx(1 / 8)
    assert [step(number, 0.25, 0.75) for number in range(4, 100)][-1] == pytest.approx(1 / 4)
    chrono.start(99)
    assert step(100, 5, 5) is None and step(101, 0, 1) == 0


def test_steps_that_take_minutes_have_a_rate_as_well(clock):
    chrono = Chrono(100, 10, clock=clock)
    chrono.start()
    for step in range(1, 4):
        clock.pass_(100 * step)
        rate = chrono.measure(step).get("img/sec")
    assert rate == pytest.approx(10 / 300)


def test_tick_ends_the_compilation_between_measurements(clock):
    chrono = Chrono(100, 10, clock=clock)
    chrono.start(20)
    chrono.tick(20)  # nothing done yet
    clock.pass_(99)
    for step in range(21, 31):
        chrono.tick(step)
        clock.pass_(2)
    assert chrono.measure(31)["img/sec"] == pytest.approx(5)


def test_eta_counts_the_pauses_to_come(clock):
    chrono = Chrono(100, 1, clock=clock)
    chrono.start()
    assert chrono.eta(0) is None
    clock.pass_(60)
    chrono.tick(1)
    assert chrono.eta(1) is None
    for _ in range(10):
        clock.pass_(2)
        with chrono.paused("evaluate"):
            clock.pass_(1)
    assert chrono.eta(11) == pytest.approx((100 - 11) * 3)
    assert chrono.eta(100) == 0


def test_pauses_nest_and_survive_an_error(clock):
    chrono = Chrono(100, 1, clock=clock)
    chrono.start()
    with pytest.raises(RuntimeError), chrono.paused("checkpoint"):
        clock.pass_(2)
        with chrono.paused("fetch"):
            clock.pass_(3)
            assert chrono.core_hours() == 0  # stands still inside
        raise RuntimeError
    with chrono.paused("checkpoint"):
        clock.pass_(10)
    clock.pass_(36)
    assert chrono.core_hours() == pytest.approx(36 / 3600)
    assert chrono.state()["seconds"] == {"fetch": 3, "checkpoint": 15}


def test_core_hours_and_activities_go_on_after_a_restart_on_other_devices(clock):
    first = Chrono(100, 8, devices=[device()] * 8, clock=clock)
    first.start()
    clock.pass_(900)
    with first.paused("evaluate"):
        clock.pass_(60)
    state = json.loads(json.dumps(first.state()))
    assert state["core_hours"] == pytest.approx(2)

    clock = Clock(5.0)  # another machine, another origin
    second = Chrono(100, 8, examples_per_epoch=100, devices=[device()] * 2, clock=clock)
    second.restore(state)
    clock.pass_(1e4)  # restoring is no training
    second.start(50)
    clock.pass_(1800)
    with second.paused("evaluate"):
        clock.pass_(6)
    metrics = second.measure(51)
    assert metrics["core_hours"] == pytest.approx(2 + 1)
    assert metrics["z/secs/evaluate"] == 66
    assert metrics["examples_seen"] == 408 and metrics["epoch"] == pytest.approx(4.08)
    assert "img/sec" not in metrics  # the first step of the restart compiles again


@pytest.mark.parametrize("kind, tflops", [
    ("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459),
    ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU v6e", 918), ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla T4", 65),
])
def test_peaks_of_known_devices(kind, tflops):
    assert peak_flops(kind) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v9", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 9999"])
def test_unknown_devices_have_no_peak(kind):
    assert peak_flops(kind) is None



def test_mfu_is_the_fraction_of_all_peaks():
    assert mfu(275e12, 0.5, [device("TPU v4")] * 8) == pytest.approx(2 / 8)
    assert mfu(1e12, 1, [device("TPU v4"), device("TPU v5 lite")]) == pytest.approx(1 / (275 + 197))
    assert mfu(1e12, 1, [device("TPU v4"), device("cpu")]) is None
    assert mfu(1e12, 1, []) is None and mfu(1e12, 0, [device()]) is None


def test_chrono_reports_mfu_once_flops_are_known(clock):
    chrono = Chrono(10, 8, devices=[device("TPU v5 lite")] * 2, clock=clock)
    chrono.start()
    chrono.tick(1)
    clock.pass_(2)
    assert "mfu" not in chrono.measure(2)
    chrono.flops_per_step = 197e12
    clock.pass_(2)
    assert chrono.measure(3)["mfu"] == pytest.approx(1 / 4)


def test_progress_line(clock):
    chrono = Chrono(2250, 64, examples_per_epoch=1797, clock=clock)
    chrono.start(1190)
    chrono.tick(1191)
    clock.pass_(9)
    metrics = {"training_loss": 0.13249, "lr": 8.2e-4, "img/sec": 5821.3, "mfu": 0.3118, "l2_grads": 1.0}
    assert chrono.progress_line(1200, metrics) == (
        "step 1200/2250 (53.3%) epoch 42.7 | loss 0.132 | lr 8.2e-04 | 5821 img/s | MFU 31.2 % | ETA 0:17:30")
    assert chrono.progress_line(1200, metrics | {"data_wait": 0.12}).endswith("| waiting for data 12 % | ETA 0:17:30")
    assert "waiting" not in chrono.progress_line(1200, metrics | {"data_wait": 0.09})
    assert Chrono(10, 1, clock=clock).progress_line(0, {}) == "step 0/10 (0.0%)"
    assert "loss nan" in chrono.progress_line(1200, {"training_loss": float("nan")})


def test_memory_in_gib():
    tpu = device(memory_stats=lambda: {"bytes_in_use": 2 * GIB, "peak_bytes_in_use": 3 * GIB, "num_allocs": 7})
    stats = memory_stats(tpu)
    assert stats["hbm_gib"] == 2 and stats["hbm_peak_gib"] == 3 and "hbm_limit_gib" not in stats
    assert 0.001 < stats["host_peak_gib"] < 1000
    assert set(memory_stats(device("cpu", memory_stats=lambda: None))) == {"host_peak_gib"}
