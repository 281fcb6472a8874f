"""Runs of `main.py` in processes of their own: killed, stopped, spread over two processes, and gone on with."""
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, assert_same, saved, saved_steps, timeless

STEPS = 60
RUN = (f"--config.total_steps={STEPS}", "--config.ckpt_steps=3", "--config.log_training_steps=2",
       "--config.evals.val.log_steps=7", "--config.model.dropout=0.1")
# The learning rate of a run that may be made longer cannot depend on its end.
OPEN_END = ("--config.schedule.decay_type=constant", "--config.schedule.warmup_steps=4",
            "--config.log_training_steps=1", "--config.model.dropout=0.1")


# The notes of checkpoints, to the second process.
UNREADABLE = """
import os
from etils import epath

def read_bytes(self, real=epath.gpath.PosixGPath.read_bytes):
    if os.environ.get("JAX_PROCESS_ID") == "1" and self.parent.name == "meta":
        raise PermissionError(13, "Permission denied")
    return real(self)

epath.gpath.PosixGPath.read_bytes = read_bytes
"""


class Run:
    """`python main.py --config=configs/debug.py --workdir=FOLDER …`, under way."""

    def __init__(self, folder, *overrides, devices=1, **environment):
        command = [sys.executable, "main.py", "--config=configs/debug.py", f"--workdir={folder}",
                   "--config.plot=False", "--config.keep_last=1", *overrides]
        environment |= dict(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices))
        self.folder, self.output = folder, folder.parent / f"{folder.name}-{time.monotonic_ns()}.txt"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)

    def wait(self, seconds=120):
        """The exit status."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()  # harmless where it has ended

    def until(self, condition, seconds=120):
        """Wait until `condition()` holds; False if the run ended before that."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)
        return True

    def said(self):
        return self.output.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = Run(folder, *RUN)
    assert run.wait() == 0, run.said()
    return folder


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def checkpoints(folder):
    """Names in the folder of checkpoints: steps, and what is half-written."""
    path = folder / "checkpoints"
    return sorted(os.listdir(path)) if path.exists() else []


def half_written(folder):
    return [name for name in checkpoints(folder) if "tmp" in name]


def assert_as_if_never_stopped(folder, whole):
    assert timeless(folder) == timeless(whole)
    assert_same(saved(folder, STEPS), saved(whole, STEPS))


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def two_processes(folder, *overrides, **environment):
    """The same run on two processes of two devices each."""
    port = free_port()
    return [Run(folder, *overrides, devices=2, JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(process), **environment) for process in (0, 1)]


def test_the_uninterrupted_run_is_complete(whole):
    """What the others are compared with: every record once, and in order."""
    steps = {name: [r["step"] for r in timeless(whole) if name in r] for name in ("training_loss", "val/loss")}
    assert steps == {"training_loss": list(range(2, STEPS + 1, 2)), "val/loss": [*range(7, STEPS, 7), STEPS]}
    assert saved_steps(whole) == [STEPS]


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(whole, tmp_path):
    """kill -9 during start-up, while a checkpoint is half-written, right after one, and at a record; then again."""
    folder, dice = tmp_path / "run", random.Random()

    def kill(condition, delay=0.0):
        run = Run(folder, *RUN)
        assert run.until(condition), run.said()
        time.sleep(delay)
        run.process.kill()
        assert run.wait() == -signal.SIGKILL, "the run was over before it was killed"
        return bool(half_written(folder))

    def saving():
        return max(saved_steps(folder), default=0) > begun and half_written(folder)

    def saved_one():
        return max(saved_steps(folder), default=0) > begun

    def recording():
        return len(lines(folder)) > recorded + 4

    kill(lambda: True, dice.uniform(0, 2))
    mid_save = 0
    for condition, delay in ((saving, 0), (saved_one, 0.1), (recording, 0.1), (saving, 0)):
        begun, recorded = max(saved_steps(folder), default=0), len(lines(folder))
        mid_save += kill(condition, dice.uniform(0, delay))
        if condition is recording:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"step": 61, "training_lo')  # a line torn by the kill
    assert mid_save, "no kill came while a checkpoint was being written"
    run = Run(folder, *RUN)
    assert run.wait() == 0, run.said()
    assert re.search(r"resumed from step \d+ ", run.said()) and f"done at step {STEPS}" in run.said()
    assert_as_if_never_stopped(folder, whole)
    assert checkpoints(folder) == [str(STEPS)]


def test_sigterm_saves_the_step_and_exits_with_0(whole, tmp_path):
    folder = tmp_path / "run"
    run = Run(folder, *RUN)
    assert run.until(lambda: len(lines(folder)) >= 5)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 0, run.said()
    step = int(re.search(r"told to stop: saved at step (\d+)", run.said())[1])
    assert saved_steps(folder) == [step] and step < STEPS
    run = Run(folder, *RUN)
    assert run.wait() == 0 and f"resumed from step {step} " in run.said()
    assert_as_if_never_stopped(folder, whole)


def test_a_disk_that_fills_ends_in_one_line_without_the_noise_of_threads(tmp_path):
    folder = tmp_path / "run"
    run = Run(folder, *RUN)
    assert run.until(lambda: saved_steps(folder)), run.said()
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20000, 20000))  # as if it could hold no more
    assert run.wait() == 1
    lines = run.said().splitlines()
    told = lines[1 + max(i for i, line in enumerate(lines) if line.startswith("step ")):]
    place = folder / "checkpoints"
    assert told == [f"error: {place} cannot be written: File too large; raise ulimit -f, then give the same command "
                    f"again; the last good checkpoint is step {saved_steps(folder)[-1]} in {place}"]


def test_two_processes_train_as_one_and_one_goes_on_from_two(tmp_path):
    settings = (*OPEN_END, "--config.evals.val.log_steps=3", "--config.ckpt_steps=3")
    one, two = tmp_path / "one", tmp_path / "two"
    single = Run(one, *settings, "--config.total_steps=12", devices=4)
    assert single.wait() == 0, single.said()
    pair = two_processes(two, *settings, "--config.total_steps=6")
    assert [run.wait() for run in pair] == [0, 0], "\n".join(run.said() for run in pair)
    assert saved_steps(two) == [6] and [r["step"] for r in timeless(two)] == [1, 2, 3, 3, 4, 5, 6, 6]
    # What one of them cannot read stops both, and changes nothing.
    (tmp_path / "sitecustomize.py").write_text(UNREADABLE)
    before = {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    pair = two_processes(two, *settings, "--config.total_steps=12", PYTHONPATH=str(tmp_path))
    assert [run.wait() for run in pair] == [1, 1], "\n".join(run.said() for run in pair)
    for run, reason in zip(pair, ("another process says why", r".Errno 13. Permission denied"), strict=True):
        told = rf"^error: checkpoint 6 in {two}/checkpoints cannot be read \({reason}.*\); nothing is changed$"
        assert re.search(told, run.said(), re.MULTILINE), run.said()
    assert before == {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    on = Run(two, *settings, "--config.total_steps=12", devices=4)
    assert on.wait() == 0 and "resumed from step 6 " in on.said(), on.said()
    # Equal but for the order in which processes add up.
    for ours, theirs in zip(timeless(two), timeless(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    ours, theirs = saved(two, 12), saved(one, 12)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_hang_up_of_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    """SIGHUP becomes SIGTERM, which is what Orbax waits for."""
    folder = tmp_path / "run"
    pair = two_processes(folder, *OPEN_END, "--config.evals.val.log_steps=100000",
                         "--config.ckpt_steps=100000", "--config.total_steps=100000")
    assert pair[0].until(lambda: len(lines(folder)) >= 5), pair[0].said()
    pair[1].process.send_signal(signal.SIGHUP)
    assert [run.wait() for run in pair] == [0, 0], "\n".join(run.said() for run in pair)
    [step] = saved_steps(folder)
    assert all(f"told to stop: saved at step {step};" in run.said() for run in pair)
    assert [r["step"] for r in timeless(folder)] == list(range(1, step + 1))
