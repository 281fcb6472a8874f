"""The profiler traces the asked steps, no others, and writes what it has when a run ends early."""
import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from cb_vit.config import ConfigError, parse
from cb_vit.io import CannotWrite
from cb_vit.monitor.profiling import ProfileConfig, Profiler


@pytest.fixture(scope="module")
def work():
    function = jax.jit(lambda x: jnp.tanh(x @ x))
    x = function(jnp.eye(16))
    return function, x


def run(profiler, work, steps):
    function, x = work
    for step in steps:
        with profiler.step(step, x):
            x = function(x)


def traced(workdir):
    """The numbers of the steps in each trace under `workdir`, one list a trace."""
    traces = []
    for path in sorted(workdir.glob("profile/**/*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        traces.append(sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train"))
    return traces


@pytest.mark.parametrize("act", ["start_trace", "stop_trace"])
@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x; No space left on device")])
def test_a_disk_that_fills_is_told_in_one_line(tmp_path, work, monkeypatch, act, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, act, fail)
    with pytest.raises(CannotWrite, match=rf"^{tmp_path}/profile cannot be written: No space left on device; free "):
        with Profiler(ProfileConfig(start_step=1, num_steps=1), tmp_path) as profiler:
            run(profiler, work, (1, 2))


def test_traces_exactly_the_asked_steps(tmp_path, work, caplog):
    with caplog.at_level("INFO"), Profiler(ProfileConfig(start_step=3, num_steps=2), tmp_path) as profiler:
        run(profiler, work, range(1, 9))
        assert traced(tmp_path) == [[3, 4]]  # written before the run ends
    assert traced(tmp_path) == [[3, 4]]
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))
    assert str(tmp_path / "profile") in caplog.text and "xprof" in caplog.text and "perfetto" in caplog.text


def test_a_run_that_ends_early_keeps_its_profile(tmp_path, work):
    profiler = Profiler(ProfileConfig(start_step=2, num_steps=50), tmp_path)
    run(profiler, work, range(1, 4))
    assert traced(tmp_path) == []
    profiler.close()
    profiler.close()
    assert traced(tmp_path) == [[2, 3]]


def test_a_resume_traces_what_is_left_of_the_asked_steps(tmp_path, work):
    with Profiler(ProfileConfig(start_step=3, num_steps=4), tmp_path) as profiler:
        run(profiler, work, range(5, 9))
    assert traced(tmp_path) == [[5, 6]]


@pytest.mark.parametrize("cfg, primary, first", [
    (None, True, 1), (ProfileConfig(2), False, 1), (ProfileConfig(2, 3), True, 5)])
def test_nothing_is_traced_without_need(tmp_path, work, cfg, primary, first):
    with Profiler(cfg, tmp_path, primary=primary) as profiler:
        run(profiler, work, range(first, first + 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block, field", [
    ({"start_step": 0}, "start_step"), ({"start_step": 1, "num_steps": 0}, "num_steps"), ({}, "start_step")])
def test_impossible_settings_name_the_field(block, field):
    with pytest.raises(ConfigError, match=rf"config\.profile\.{field}"):
        parse(ProfileConfig, block, "config.profile")
