"""The live line: what a terminal shows in the end, and that a pipe sees nothing of it."""
import io
import logging
import math
import sys
import time
import types

import pytest

from cb_vit import train_and_evaluate
from cb_vit.monitor import progress
from cb_vit.monitor.metric_writer import LoggingConfig, MetricWriter
from cb_vit.monitor.progress import LiveLine
from cb_vit.monitor.timing import Chrono

CPU = types.SimpleNamespace(device_kind="cpu", memory_stats=lambda: None)
GPU = types.SimpleNamespace(device_kind="gpu", memory_stats=lambda: {"bytes_in_use": 3 * 2**30})


class Terminal(io.StringIO):
    """Collects what is written, and says that it is a terminal or that it is none."""

    def __init__(self, tty=True):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty

    def screen(self):
        """The lines that somebody in front of it would see."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part):]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def terminal(monkeypatch, caplog):
    """A terminal of 200 columns, on which the log is shown as well."""
    def make(tty=True, columns=200):
        stream = Terminal(tty)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(stream)])
        return stream

    caplog.set_level(logging.INFO)  # of the root; to set the attribute alone would leave what loggers remember of it
    monkeypatch.setattr(progress, "INTERVAL", 0)
    return make


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def run(tmp_path):
    """`run(stream, …)`: a line of a run of 100 steps of 10 images, with its clock and its writer."""
    def make(stream, step=0, device=CPU):
        clock = Clock()
        chrono = Chrono(100, 10, examples_per_epoch=200, clock=clock)
        chrono.start(step)
        writer = MetricWriter(tmp_path, LoggingConfig(plot=False), resume_step=step or None, run_config={})
        live = LiveLine(chrono, writer, step=step, metric="val/prec@1", device=device, stream=stream)
        return live, chrono, writer, clock

    return make


def advance(live, chrono, clock, steps):
    for step in steps:
        with chrono.waiting():
            clock.now += 0.5
        clock.now += 1.5
        chrono.tick(step)
        live.update(step)


def test_the_line_says_how_far_the_run_is(terminal, run):
    stream = terminal()
    live, chrono, writer, clock = run(stream, device=GPU)
    with live:
        assert "| 0/100 | epoch 0.0 of 5.0 | device 3.0 GiB" in stream.screen()[-1]
        advance(live, chrono, clock, range(1, 41))
        writer.write(40, {"val/prec@1": 0.75})
        writer.write(40, {"ema/val/prec@1": 0.99})
        writer.write(41, {"val/prec@1": 0.5})
        writer.write(42, {"val/prec@1": math.nan})
        with live.doing("evaluating val"):  # 5 images a second: 40 s an epoch, 120 s to go
            assert stream.screen()[-1].partition("| ")[2] == (
                "evaluating val | 40/100 | epoch 2.0 of 5.0 | 5 img/s | ETA 0:02:00 | best val/prec@1 0.7500 | "
                "waiting for data 25 % | 0:00:40 an epoch | device 3.0 GiB")
    assert stream.screen() == [""]  # and it leaves nothing behind


def test_what_is_logged_stands_above_the_line(terminal, run):
    stream = terminal()
    before = list(logging.root.handlers)
    live, chrono, _, clock = run(stream, step=30)
    with pytest.raises(RuntimeError), live:
        for step in range(31, 36):
            advance(live, chrono, clock, [step])
            logging.info("step %d is done", step)
            assert stream.screen()[-2] == f"step {step} is done" and f"| {step}/100 |" in stream.screen()[-1]
        raise RuntimeError
    assert stream.screen() == [*(f"step {step} is done" for step in range(31, 36)), ""]
    assert logging.root.handlers == before


def test_a_pipe_sees_what_is_logged_and_nothing_more(terminal, run):
    stream = terminal(tty=False)
    for target in (stream, None):
        live, chrono, _, clock = run(target)
        with live, live.doing("evaluating val"):
            advance(live, chrono, clock, range(1, 100))
            logging.info("logged")
    assert stream.getvalue() == "logged\nlogged\n"


@pytest.mark.parametrize("columns", [20, 40, 60, 61, 80, 100, 120])
def test_a_narrow_terminal_has_fewer_words_but_whole_ones(terminal, run, columns):
    stream = terminal(columns=columns)
    live, chrono, writer, clock = run(stream, device=GPU)
    words = {"40/100", "epoch 2.0 of 5.0", "5 img/s", "ETA 0:02:00", "best val/prec@1 0.7500", "waiting for data 25 %",
             "0:00:40 an epoch", "device 3.0 GiB"}
    with live:
        writer.write(40, {"val/prec@1": 0.75})
        advance(live, chrono, clock, range(1, 41))
        assert all(len(part) < columns for part in stream.getvalue().split("\r"))
        shown = stream.screen()[-1].split("| ", 1)[1].split(" | ")
    assert columns < 40 or words.issuperset(shown) and shown[0] == "40/100" and len(shown) >= columns // 20 - 1


def test_steps_that_fly_are_not_drawn_one_by_one(terminal, run, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.5)
    stream = terminal()
    live, chrono, _, clock = run(stream)
    with live:
        begin = time.monotonic()
        advance(live, chrono, clock, range(1, 5000))
        assert stream.getvalue().count("\r") <= 2 + 2 * (time.monotonic() - begin)


def test_the_line_of_a_run(terminal, tmp_path):
    stream = terminal()
    data, pp = dict(name="fake", num_examples=160, image_size=8, num_classes=3), "value_range(-1, 1)|onehot(3)"
    train_and_evaluate(dict(
        seed=0, total_steps=2, lr=1e-2, schedule=dict(decay_type="constant"), plot=False,
        input=dict(data=dict(data, split="train"), batch_size=16, pp=pp),
        model=dict(patch_size=4, width=8, depth=1, mlp_dim=8, num_heads=2),
        evals=dict(val=dict(type="classification", data=dict(data, split="test"), log_steps=1, pp_fn=pp))),
        tmp_path, terminal=stream)
    drawn = stream.getvalue().split("\r")
    for words in ("compiling | 0/2", "| 1/2 |", "evaluating val | 2/2 |", "best val/prec@1 0."):
        assert any(words in line for line in drawn), words
    assert [line for line in stream.screen() if "|" in line] == [
        line for line in stream.screen() if line.startswith("step 2/2 (100.0%) epoch 0.2 | loss ")] != []
