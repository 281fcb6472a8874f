"""The training loop end to end, in one process: what a run leaves behind, and that a stop anywhere changes nothing."""
import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath
from helpers import assert_same, records, saved, saved_steps, timeless

from cb_vit import experiment, io, startup, train, workdir
from cb_vit.checkpoint import Checkpointer
from cb_vit.checkpoint_reading import digest
from cb_vit.config import ConfigError, Failure
from cb_vit.datasets.core import DataError
from cb_vit.datasets.fake import FakeSource
from cb_vit.evaluators.classification import Evaluator
from cb_vit.io import CannotWrite
from cb_vit.monitor.metric_writer import MetricWriter
from cb_vit.settings import check
from cb_vit.train import NonFinite, train_and_evaluate

PP = "flip_lr|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"


def data(split="train", **changes):
    return dict(name="fake", split=split, num_examples=32, image_size=8, num_classes=10) | changes


def classification(**changes):
    return dict(type="classification", log_steps=4, data=data("test", num_examples=20), pp_fn=PP) | changes


def tiny(**changes):
    """A config of 8 steps, 2 epochs; `changes` by dotted name."""
    config = dict(
        seed=0, total_steps=8, lr=1e-2, schedule=dict(decay_type="constant"),
        input=dict(data=data(), batch_size=8, pp=PP),
        model=dict(variant="mu/4", width=16, depth=1, mlp_dim=16, num_heads=2, dropout=0.1, context="cb"),
        log_training_steps=2, ckpt_steps=3, keep_last=1, plot=False, evals=dict(val=classification()))
    for name, value in changes.items():
        *blocks, key = name.split(".")
        block = config
        for part in blocks:
            block = block[part]
        block[key] = value
    return config


def steps_with(folder, metric):
    return [record["step"] for record in records(folder) if metric in record]


def on_step(monkeypatch, act):
    """Have `act(step)` called right before each step is dispatched; steps count from 1."""
    original = train.Profiler.step

    def step(self, number, pending=None):
        act(number)
        return original(self, number, pending)

    monkeypatch.setattr(train.Profiler, "step", step)


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(Exception):
    """What the tests make a run die of."""


def crash(*_):
    raise Crash


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and what it returned. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_and_evaluate(tiny(), folder)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the uninterrupted run's folder."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.fixture
def handler():
    """What whoever calls us has put in place for SIGTERM."""
    def ours(*_):
        pytest.fail("SIGTERM was not for us")

    before = signal.signal(signal.SIGTERM, ours)
    yield ours
    signal.signal(signal.SIGTERM, before)


def test_a_run_leaves_the_files_of_a_workdir(whole):
    folder, _ = whole
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", ".lock"}
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(tiny()))
    run = json.loads((folder / "run.json").read_text())
    assert run["model_name"] == "vit" and run["model"]["context"] == "cb" and run["model"]["width"] == 16
    assert run["num_classes"] == 10 and run["image_shape"] == [8, 8, 3] and run["pp"] == PP
    assert saved_steps(folder) == [8]  # keep_last = 1


def test_metrics_have_their_names_and_are_numbers(whole):
    folder, returned = whole
    training = {"training_loss", "l2_grads", "l2_params", "l2_updates", "lr", "epoch", "examples_seen", "img/sec",
                "img/sec/core", "data_wait", "core_hours", "uptime", "z/secs/evaluate", "z/secs/checkpoint"}
    last = records(folder)[-2]
    assert training <= last.keys() and last["step"] == 8 and last["epoch"] == 2 and last["examples_seen"] == 64
    assert last["lr"] == pytest.approx(1e-2)
    assert records(folder)[-1].keys() == {"step", "val/prec@1", "val/prec@5", "val/loss"}
    assert all(np.isfinite(value) for record in records(folder) for value in record.values())
    # What is returned is what was recorded last.
    assert returned == {name: value for record in records(folder) for name, value in record.items()}


def test_the_log_of_a_step_is_of_that_step(whole, tmp_path):
    """One row at every step: the same numbers, each at its own step, as a run that logs now and then."""
    train_and_evaluate(tiny(log_training_steps=1), tmp_path)
    every = {r["step"]: r for r in timeless(tmp_path) if "training_loss" in r}
    some = [r for r in timeless(whole[0]) if "training_loss" in r]
    assert list(every) == list(range(1, 9)) and some == [every[step] for step in (2, 4, 6, 8)]
    assert len({r["training_loss"] for r in every.values()}) == 8


def test_learning_rate_is_that_of_the_step(tmp_path):
    schedule = dict(decay_type="linear", warmup_steps=2)
    train_and_evaluate(tiny(schedule=schedule, log_training_steps=1, evals={}), tmp_path)
    # The first update of a warm-up has rate 0; the last is one step short of the end.
    expected = [1e-2 * min(1, t / 2) * (1 - max(t - 2, 0) / 6) for t in range(8)]
    np.testing.assert_allclose([r["lr"] for r in records(tmp_path)], expected, rtol=1e-6)
    assert records(tmp_path)[0]["l2_updates"] == 0 and records(tmp_path)[1]["l2_updates"] > 0


@pytest.mark.parametrize("total, log, ckpt, evaluate", [
    (dict(total_steps=8), dict(log_training_steps=2), dict(ckpt_steps=3), dict(log_steps=4)),
    (dict(total_epochs=1.75), dict(log_training_epochs=0.75), dict(ckpt_percent=0.3), dict(log_examples=40)),
    (dict(total_examples=56), dict(log_training_percent=0.5), dict(), dict(log_epochs=1))])
def test_cadence_in_every_unit_and_always_at_the_last_step(tmp_path, total, log, ckpt, evaluate):
    config = tiny(keep_last=100, **{"evals.val.log_steps": None})
    for key in ("total_steps", "log_training_steps", "ckpt_steps"):
        del config[key]
    config["evals"]["val"].update(evaluate)
    last = train_and_evaluate(config | total | log | ckpt, tmp_path)["step"]
    # 32 examples in batches of 8: 4 steps an epoch.
    expected = {8: ([2, 4, 6, 8], [3, 6, 8], [4, 8])} | (
        {7: ([3, 6, 7], [2, 4, 6, 7], [5, 7])} if "ckpt_percent" in ckpt else {7: ([4, 7], [7], [4, 7])})
    assert (steps_with(tmp_path, "training_loss"), saved_steps(tmp_path), steps_with(tmp_path, "val/loss")) == \
        expected[last]


def test_runs_twice_in_a_process_from_a_plain_dict_or_a_config_dict_on_any_thread(whole, tmp_path):
    """As from a notebook, where nobody has parsed flags."""
    returned = {}
    call = lambda: returned.update(train_and_evaluate(ml_collections.ConfigDict(tiny()), tmp_path))  # noqa: E731
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert returned.keys() == whole[1].keys()
    assert timeless(tmp_path) == timeless(whole[0])
    assert_same(saved(tmp_path, 8), saved(whole[0], 8))


def test_a_finished_run_says_so_and_repeats_nothing(whole, finished, caplog, monkeypatch):
    monkeypatch.setattr(Evaluator, "run", crash)
    monkeypatch.setattr(experiment.Experiment, "jit_train_step", crash)
    before = (finished / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO):
        again = train_and_evaluate(tiny(), finished)
    assert "already complete, at step 8" in caplog.text
    assert (finished / "metrics.jsonl").read_bytes() == before and saved_steps(finished) == [8]
    assert again == whole[1]


def test_a_longer_run_goes_on_where_the_shorter_ended(whole, tmp_path):
    assert train_and_evaluate(tiny(total_steps=4), tmp_path)["step"] == 4
    assert train_and_evaluate(tiny(), tmp_path)["step"] == 8
    assert timeless(tmp_path) == timeless(whole[0])
    assert_same(saved(tmp_path, 8), saved(whole[0], 8))


def test_a_run_cannot_end_before_its_checkpoint(finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"config.total_steps: the run ends at step 5, .* is of step 8"):
        train_and_evaluate(tiny(total_steps=5), finished)
    assert (finished / "config.json").read_bytes() == before and records(finished)[-1]["step"] == 8


def test_stopped_at_any_step_it_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch, caplog, handler):
    """SIGTERM, SIGHUP or Ctrl-C while the first step runs, one between, and the last but one: each time it is saved."""
    caplog.set_level(logging.INFO)
    signals = {1: signal.SIGTERM, 4: signal.SIGHUP, 7: signal.SIGINT}
    on_step(monkeypatch, lambda step: step in signals and os.kill(os.getpid(), signals.pop(step)))
    for step in list(signals):
        assert train_and_evaluate(tiny(), tmp_path)["step"] == step
        assert saved_steps(tmp_path) == [step] and f"told to stop: saved at step {step}" in caplog.text
        assert signal.getsignal(signal.SIGTERM) is handler
    assert train_and_evaluate(tiny(), tmp_path)["step"] == 8
    assert timeless(tmp_path) == timeless(whole[0])
    assert_same(saved(tmp_path, 8), saved(whole[0], 8))


def test_a_hang_up_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with contextlib.closing(Checkpointer(tmp_path)) as checkpointer, train.stop_signal(checkpointer) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop(1)
            signal.raise_signal(signal.SIGTERM)
            assert stop(2)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_told_to_stop_it_saves_before_it_evaluates(whole, tmp_path, monkeypatch):
    """A preempted machine may be gone in half a minute; the evaluation is made up by the run that goes on."""
    on_step(monkeypatch, lambda step: step == 8 and not saved_steps(tmp_path) == [8] and terminate())
    assert train_and_evaluate(tiny(), tmp_path)["step"] == 8
    assert saved_steps(tmp_path) == [8] and steps_with(tmp_path, "val/loss") == [4]
    train_and_evaluate(tiny(), tmp_path)
    assert timeless(tmp_path) == timeless(whole[0])


def test_crashed_anywhere_it_ends_as_if_it_had_not(whole, tmp_path, monkeypatch):
    """Each attempt dies at another place; a checkpoint under way at that moment is completed."""
    def dies(setting, at=3):
        with monkeypatch.context() as patch:
            setting(patch)
            with pytest.raises((Crash, DataError)):
                train_and_evaluate(tiny(), tmp_path)
        return saved_steps(tmp_path)

    def at_evaluation(patch):
        def run(self, state):
            yield "prec@1", 0.0
            raise DataError("a record is broken")
        patch.setattr(Evaluator, "run", run)

    def at_write(step):
        original = MetricWriter.write
        write = lambda self, at, scalars: crash() if at == step else original(self, at, scalars)  # noqa: E731
        return lambda patch: patch.setattr(MetricWriter, "write", write)

    at_step = lambda number: lambda patch: on_step(patch, lambda step: step == number and crash())  # noqa: E731
    assert dies(at_step(1)) == []
    assert dies(lambda patch: patch.setattr(train.Checkpointer, "save", crash)) == []
    assert dies(at_step(4)) == [3]  # right after its save began
    assert dies(at_evaluation) == [3]
    assert dies(at_step(8)) == [6] and steps_with(tmp_path, "val/loss") == [4]
    assert dies(at_write(8)) == [6]
    assert train_and_evaluate(tiny(), tmp_path)["step"] == 8
    assert timeless(tmp_path) == timeless(whole[0])
    assert_same(saved(tmp_path, 8), saved(whole[0], 8))


def test_an_evaluation_lost_at_the_restored_step_is_made_up(whole, finished):
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # and its line is torn
    assert train_and_evaluate(tiny(), finished) == whole[1]
    assert timeless(finished) == timeless(whole[0])


def test_an_evaluator_without_a_prefix_has_its_turn(tmp_path):
    train_and_evaluate(tiny(total_steps=4, **{"evals.val.prefix": ""}), tmp_path)
    assert steps_with(tmp_path, "prec@1") == [4]


def test_a_changed_setting_is_told(finished, caplog):
    train_and_evaluate(tiny(lr=2e-2), finished)
    assert "config.lr: 0.01 -> 0.02" in caplog.text
    assert json.loads((finished / "config.json").read_text())["lr"] == 2e-2


def forget(folder, step, key):
    """Take `key` out of the notes of a checkpoint, which is then as an earlier version left it."""
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta[key], meta["digest"]
    path.write_text(json.dumps({**meta, "digest": digest(meta)}))


def test_a_run_of_lamb_goes_on_with_the_norms_it_began_with(tmp_path, caplog):
    """One that does not say which has one a parameter, here and where another goes on from it; new ones have timm's."""
    caplog.set_level(logging.INFO)

    def config(steps, **changes):
        return tiny(evals={}, optax_name="scale_by_lamb", weight_decay=0.1, total_steps=steps, **changes)

    def run(name, *settings, **changes):
        train_and_evaluate(config(*settings, **changes), tmp_path / name)
        return saved(tmp_path / name, *settings)

    def norms(name, **changes):
        return startup.build(check(config(4, **changes)), tmp_path / name).settings.lamb_fused_qkv

    apart, old, new = run("apart", 4, lamb_fused_qkv=False), run("old", 2, lamb_fused_qkv=False), run("new", 2)
    assert any(not np.array_equal(old[name], new[name]) for name in old)
    forget(tmp_path / "old", 2, "lamb_fused_qkv")
    assert norms("new") is True and norms("empty") is None and "as it began" not in caplog.text
    assert norms("old", lamb_fused_qkv=True) is True and norms("empty", resume=str(tmp_path / "old")) is False
    caplog.clear()
    run("old", 3)
    assert caplog.text.count("keeps LAMB's norms of query, key and value apart, as it began") == 1
    assert_same(run("old", 4), apart)  # from a checkpoint that says so


def unreadable(patch, folder):
    real = epath.gpath.PosixGPath.read_bytes

    def broken(self):
        if self.parent.name == "meta":
            raise PermissionError(13, "Permission denied")
        return real(self)

    patch.setattr(epath.gpath.PosixGPath, "read_bytes", broken)


def all_damaged(patch, folder):
    for path in (folder / "checkpoints").glob("*/meta/metadata"):
        path.write_text("{")


def nonsense(name):
    return lambda patch, folder: (folder / name).write_text("[]\n")


@pytest.mark.parametrize("harm, message", [
    (unreadable, "checkpoint 8 in .* cannot be read .*Permission denied.; nothing is changed"),
    (all_damaged, "no checkpoint in .* is sound .*; nothing is changed. .*: mkdir -p .* && mv "),
    (nonsense("run.json"), r"workdir: .*run.json holds \[\], no settings; move it away"),
    (nonsense("metrics.jsonl"), "workdir: .*metrics.jsonl holds no record .*; move it away")])
def test_what_a_run_cannot_go_on_from_is_left_as_it_is(finished, monkeypatch, harm, message):
    """Not even a config that has changed meanwhile is written down."""
    harm(monkeypatch, finished)
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in finished.rglob("*")}
    for _ in range(2):
        with pytest.raises((Failure, ConfigError), match=f"^{message}"):
            train_and_evaluate(tiny(lr=2e-2), finished)
    assert before == {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in before}


def test_where_the_checkpoints_are_gone_the_records_are_not(whole, finished, caplog):
    before = (finished / "metrics.jsonl").read_bytes()
    shutil.rmtree(finished / "checkpoints")
    train_and_evaluate(tiny(), finished)
    assert (finished / "metrics.1.jsonl").read_bytes() == before and "this run begins anew" in caplog.text
    assert timeless(finished) == timeless(whole[0])


@pytest.mark.parametrize("field, value", [
    ("seed", 1), ("input.pp", PP.removeprefix("flip_lr|")), ("input.batch_size", 16), ("input.data.num_examples", 24)])
def test_changed_data_is_refused_unless_allowed(finished, field, value):
    before = {name: (finished / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(ConfigError, match=rf"^config\.{field}: .*allow_changed_data"):
        train_and_evaluate(tiny(**{field: value}), finished)
    assert before == {name: (finished / name).read_bytes() for name in before}
    if field == "seed":
        assert train_and_evaluate(tiny(allow_changed_data=True, **{field: value}), finished)["step"] == 8


def test_another_runs_workdir_can_be_gone_on_from(whole, tmp_path, caplog):
    one, other = tmp_path / "one", tmp_path / "other"
    train_and_evaluate(tiny(total_steps=4), one)
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    with pytest.raises(ConfigError, match="config.seed: .*allow_changed_data"):
        train_and_evaluate(tiny(resume=str(one), seed=1), other)
    assert train_and_evaluate(tiny(resume=str(one)), other)["step"] == 8
    assert "config.total_steps: 4 -> 8" in caplog.text
    # The evaluation at step 4 is this folder's first record.
    assert timeless(other) == [r for r in timeless(whole[0]) if r["step"] > 4 or "val/loss" in r]
    assert_same(saved(other, 8), saved(whole[0], 8))
    assert before == {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    # From now on its own checkpoints come first.
    shutil.rmtree(one)
    assert train_and_evaluate(tiny(resume=str(one)), other)["step"] == 8
    with pytest.raises(ConfigError, match="config.resume: .*does not exist"):
        train_and_evaluate(tiny(resume=str(one)), tmp_path / "third")


@pytest.mark.parametrize("ckpt_steps", [1, 100])
def test_a_run_that_diverges_says_where_and_keeps_no_bad_state(tmp_path, ckpt_steps):
    with pytest.raises(NonFinite) as error:
        train_and_evaluate(tiny(lr=1e10, ckpt_steps=ckpt_steps, keep_last=100, log_training_steps=1), tmp_path)
    told = re.match(r"step (\d+) is not finite \(training_loss .*, l2_grads .*, l2_params .*\); ", str(error.value))
    bad = int(told[1])
    assert bad > 1
    good = list(range(1, bad)) if ckpt_steps == 1 else []
    assert saved_steps(tmp_path) == good
    assert (f"last good checkpoint is step {bad - 1}" if good else "no checkpoint yet") in str(error.value)
    assert all(np.isfinite(leaf).all() for step in good for leaf in saved(tmp_path, step).values())
    assert steps_with(tmp_path, "training_loss") == list(range(1, bad))


def test_a_second_run_in_the_same_workdir_is_refused(finished):
    with workdir.lock(finished), pytest.raises(ConfigError, match="another run is in"):
        train_and_evaluate(tiny(), finished)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    for changes, field in [({"lrr": 1.0}, "config.lrr"), ({"input.batch_size": 9}, "config.input.batch_size"),
                           ({"evals.val.data.split": "nowhere"}, "config.evals.val.data.split"),
                           ({"evals.val.pp_fn": PP.replace("10", "7")}, "config.evals.val.pp_fn"),
                           ({"evals.two": classification(prefix="val/")}, "config.evals.two.prefix"),
                           ({"keep_best": dict(metric="vall/loss")}, "config.keep_best.metric")]:
        with pytest.raises(ConfigError, match=f"^{field}: "):
            train_and_evaluate(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unreadable_examples_are_counted_from_the_beginning(tmp_path, monkeypatch):
    config = tiny(total_steps=12, ckpt_steps=5, **{
        "log_training_steps": 4, "input.skip_errors": 0.1, "input.pp": "decode|" + PP,
        "input.data": data(encoded=True, broken=(3, 7, 20))})
    with monkeypatch.context() as patch:
        on_step(patch, lambda step: step == 8 and crash())
        with pytest.raises(Crash):
            train_and_evaluate(config, tmp_path)
    train_and_evaluate(config, tmp_path)
    assert [r["examples_skipped"] for r in records(tmp_path) if "training_loss" in r] == [3, 6, 9]  # epochs of 4 steps
    with pytest.raises(DataError):
        train_and_evaluate(config | dict(input=config["input"] | dict(skip_errors=False)), tmp_path / "strict")


def test_too_many_unreadable_examples_end_a_run_also_one_that_was_interrupted(tmp_path, monkeypatch):
    """Three of an epoch of 32, of which 0.09 are 2.88; no state of the step that shows it is saved."""
    config = tiny(ckpt_steps=1, evals={}, **{
        "input.skip_errors": 0.09, "input.pp": "decode|" + PP, "input.data": data(encoded=True, broken=(3, 7, 20))})
    refused = (r"^step 4: 3 of 32 examples could not be read, such as train#\d+: decode: .*; mend the data, or allow "
               r"more: config\.input\.skip_errors is 0\.09; the last good checkpoint is step 3 in ")
    with pytest.raises(DataError, match=refused):
        train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        on_step(patch, lambda step: step == 3 and terminate())
        assert train_and_evaluate(config, tmp_path / "stopped")["step"] == 3
    with pytest.raises(DataError, match=refused):
        train_and_evaluate(config, tmp_path / "stopped")
    assert saved_steps(tmp_path / "stopped") == saved_steps(tmp_path / "whole") == [3]


def test_data_that_goes_away_ends_the_run_at_the_first_empty_batch(tmp_path, monkeypatch):
    gone, read = [], FakeSource.__getitem__

    def unplugged(self, index):
        if gone:
            raise OSError(5, "Input/output error")
        return read(self, index)

    monkeypatch.setattr(FakeSource, "__getitem__", unplugged)
    on_step(monkeypatch, lambda step: step == 3 and gone.append(True))
    with pytest.raises(DataError, match=r"^step \d+: of 8 examples of a batch not one could be read, such as example "
                                        r"\d+: \[Errno 5\] Input/output error; mend the data; the last good "):
        train_and_evaluate(tiny(total_steps=40, ckpt_steps=1, evals={}, **{"input.skip_errors": 0.9}), tmp_path)
    assert 3 <= max(saved_steps(tmp_path)) < 30


# --- Storage that fails -----------------------------------------------------------------------------------------

def replace(folder):
    folder.rename(folder.parent / "elsewhere")
    folder.mkdir()


def remove_checkpoints(folder):
    shutil.rmtree(folder / "checkpoints")


def limit_files(folder):
    """As a quota or a full disk would, no file can grow past 4 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


@pytest.mark.parametrize("act, reason, way_out", [
    (replace, "No such file or directory", "it was removed, moved or unmounted; put it back"),
    (remove_checkpoints, "No such file or directory", "it was removed, moved or unmounted; put it back"),
    (limit_files, "File too large", "raise ulimit -f")])
def test_storage_that_fails_ends_the_run_in_one_line(tmp_path, monkeypatch, act, reason, way_out):
    folder = tmp_path / "run"
    on_step(monkeypatch, lambda step: step == 5 and (time.sleep(0.2), act(folder)))  # the save of step 3 is over
    try:
        with pytest.raises(CannotWrite) as error:
            train_and_evaluate(tiny(total_steps=12), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert re.fullmatch(rf"{folder}/\S+ cannot be written: {reason}; {way_out}, then give the same command again; the "
                        rf"last good checkpoint is step 3 in {folder}/checkpoints", str(error.value))
    assert act is not replace or os.listdir(folder) == []


@pytest.mark.parametrize("changes, field", [
    ({"model_init": "gs://b/run"}, "config.model_init"), ({"resume": "s3://b/run"}, "config.resume"),
    ({"input.data": dict(name="imagenet2012", split="train", data_dir="gs://b/tfds")}, "config.input.data.data_dir"),
    ({"evals.val.data": dict(name="imagenet2012", split="train", data_dir="gs://b/tfds")},
     "config.evals.val.data.data_dir"), ({}, "workdir")])
def test_what_a_bucket_needs_is_told_first(tmp_path, monkeypatch, changes, field):
    monkeypatch.setattr(io.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train.startup, "open_init", crash)
    with pytest.raises(ConfigError, match=rf"^{field}: \w+://b/\w+ needs (gcsfs: pip install 'cb_vit\[gcs\]'|s3fs: pip "
                                          r"install 's3fs'), or use a local path$"):
        train_and_evaluate(tiny(**changes), "gs://b/run" if field == "workdir" else tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nobody_logged_in_at_weights_and_biases_is_told_before_anything_is_built(tmp_path, monkeypatch):
    wandb = types.ModuleType("wandb")
    wandb.__spec__, wandb.login = types.SimpleNamespace(), lambda verify: False
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train.startup, "build", crash)
    with pytest.raises(ConfigError, match=r"^config\.wandb: no API key is known; run `wandb login`, or set "):
        train_and_evaluate(tiny(wandb=dict(project="p")), tmp_path / "run")
    with pytest.raises(Crash):
        train_and_evaluate(tiny(wandb=dict(project="p", mode="offline")), tmp_path / "run")


def test_several_evaluators_and_the_best_checkpoint(tmp_path):
    """Two evaluators at steps of their own; the best is picked among the steps that have its metric."""
    evals = dict(val=classification(log_steps=2), train=classification(log_steps=3, data=data("train[:50%]")))
    config = tiny(evals=evals, ckpt_steps=1, keep_best=dict(metric="val/loss", mode="max"))
    train_and_evaluate(config, tmp_path)
    assert steps_with(tmp_path, "val/loss") == [2, 4, 6, 8] and steps_with(tmp_path, "train/loss") == [3, 6, 8]
    losses = {r["step"]: r["val/loss"] for r in records(tmp_path) if "val/loss" in r}
    assert saved_steps(tmp_path) == sorted({max(losses, key=losses.get), 8})


def test_the_best_is_saved_wherever_it_is_measured(tmp_path):
    """Evaluation and checkpoints need not meet: what `keep_best` goes by is saved when it is found."""
    evals = dict(val=classification(log_steps=3))
    train_and_evaluate(tiny(evals=evals, ckpt_steps=5, keep_best=dict(metric="val/loss", mode="max")), tmp_path)
    losses = {r["step"]: r["val/loss"] for r in records(tmp_path) if "val/loss" in r}
    assert set(losses) == {3, 6, 8} and saved_steps(tmp_path) == sorted({max(losses, key=losses.get), 8})
    with pytest.raises(ConfigError, match="config.keep_best.n: must be at least 1, got 0"):
        train_and_evaluate(tiny(keep_best=dict(n=0)), tmp_path)


def test_a_profile_past_the_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.profile.start_step: 9 is past the last step, 8"):
        train_and_evaluate(tiny(profile=dict(start_step=9)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_profile_tensorboard_and_curves(tmp_path):
    pytest.importorskip("tensorboardX")
    pytest.importorskip("matplotlib")
    config = tiny(total_steps=4, tensorboard=True, plot=True, profile=dict(start_step=2, num_steps=2))
    train_and_evaluate(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    assert (tmp_path / "training_curves.png").stat().st_size > 1000


def test_the_average_is_measured_too_and_the_best_may_go_by_it(tmp_path):
    best = {"ema": dict(decay=0.5), "keep_best": dict(metric="ema/val/loss", mode="min"), "ckpt_steps": None}
    train_and_evaluate(tiny(**best), tmp_path / "run")
    assert steps_with(tmp_path / "run", "ema/val/loss") == steps_with(tmp_path / "run", "val/loss") == [4, 8]
    judged = [record for record in records(tmp_path / "run") if "val/loss" in record]
    assert min(judged, key=lambda record: record["ema/val/loss"])["step"] in saved_steps(tmp_path / "run")
    assert all(record["ema/val/loss"] != record["val/loss"] for record in judged)
    with pytest.raises(ConfigError, match="keep_best.metric: 'ema/val/loss' is of no evaluator; .* begin with 'val/'$"):
        train_and_evaluate(tiny(**best | {"ema": None}), tmp_path / "other")


EVERYTHING = {
    "weight_decay": 0.05, "optax_name": "scale_by_lamb", "grad_clip_norm": 1.0, "grad_clip_adaptive": 0.1,
    "layer_decay": 0.9, "ema": dict(decay=0.9, warmup=True), "label_smoothing": 0.1,
    "mixup": dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem"),
    "schedule": dict(decay_type="cosine", warmup_steps=1),
    "model.drop_path": 0.1, "model.pool_type": "map", "model.layer_scale": 0.1, "model.context": "cb_s",
    "total_steps": 4, "log_training_steps": 1, "ckpt_steps": 2}


def test_the_number_of_classes_is_the_datas_where_nobody_says_it():
    open_pp = PP.replace("onehot(10)", "onehot")
    run = experiment.build(check(tiny(**{"input.pp": open_pp, "evals.val.pp_fn": open_pp})))
    assert run.num_classes == 10 and run.settings.input.pp.text == PP and run.settings.evals["val"].pp_fn.text == PP
    assert run.shapes.params["head"]["bias"].shape == (10,)
    with pytest.raises(ConfigError, match=r"config\.evals\.val\.pp_fn: onehot has 9 classes, the model 10"):
        experiment.build(check(tiny(**{"evals.val.pp_fn": PP.replace("10", "9")}))).open_evaluators()


def test_a_run_is_the_same_where_jax_has_64_bits(tmp_path):
    """Draws and dtypes are stated everywhere; optax alone corrects Adam's bias in float64, in the seventh digit."""
    config = tiny(**EVERYTHING, random_erasing=dict(prob=0.9, count=2))
    train_and_evaluate(config, tmp_path / "32")
    jax.config.update("jax_enable_x64", True)
    try:
        for mode in ("pixel", "rand", "const"):
            run = experiment.build(check(config | dict(random_erasing=dict(prob=0.9, mode=mode))))
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.shapes)} == {"float32", "int32", "bool"}
            mixed = jax.eval_shape(lambda batch, run=run: run.settings.recipe(
                jax.random.key(0), run.settings.input.pp.device(batch)), run.batch_shapes())
            assert mixed["image"].dtype == mixed["labels"].dtype == np.float32
        train_and_evaluate(config, tmp_path / "64")
    finally:
        jax.config.update("jax_enable_x64", False)
    for got, expected in zip(timeless(tmp_path / "64"), timeless(tmp_path / "32"), strict=True):
        assert got == pytest.approx(expected, rel=1e-4), expected
