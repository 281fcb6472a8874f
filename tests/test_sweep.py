"""Sweeps: what a grid means, what is refused before a run begins; killed cells go on, and locked ones are left."""
import contextlib
import json
import os
import shlex
import signal
import subprocess
import time

import pytest
from helpers import ROOT, records, refusal, run_records, write_run

from cb_vit import workdir
from cb_vit.analysis.sweeps import cell_name, cells_of, read_sweep, split_values
from cb_vit.config import ConfigError, Failure
from cb_vit.tools import cells, cli, compare, report, scheduler, sweep
from cb_vit.tools.sweep_plan import Plan, read_grid

CONFIG = "debug:variant=mu/4"


def plan(*grid, config=CONFIG, settings=()):
    return Plan(config, settings, read_grid(grid, settings, config))


def start(home, *args):
    sweep.main(cli.parse(sweep, [f"--config={CONFIG}", f"--workdir={home}", *map(str, args)]))


@pytest.mark.parametrize("text, parts", [
    ("a,b", ["a", "b"]), (" 1 , 2", ["1", "2"]), ("(0,1),(2,),[3,[4,5]]", ["(0,1)", "(2,)", "[3,[4,5]]"]),
    ("'a,(b',c", ["'a,(b'", "c"]), ("S/16,B/16", ["S/16", "B/16"]), ("a,,b", ["a", "", "b"])])
def test_values_stand_between_commas(text, parts):
    assert split_values(text) == parts


def test_names_of_cells_are_safe_and_the_last_name_changes_first():
    grid = {"variant": ("S/16", "B/16"), "seed": ("0", "1")}
    assert [cell_name(values) for values in cells_of(grid)] == [
        "variant=S-16,seed=0", "variant=S-16,seed=1", "variant=B-16,seed=0", "variant=B-16,seed=1"]
    long = [cell_name({"pp": f"decode|{'x' * 60}|{end}"}) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name) < 40 for name in long)
    assert cell_name({"a": "../ü $(x)\n"}) == "a=..-x-"


@pytest.mark.parametrize("grid, settings, error", [
    ((), (), "--grid: not given; for example --grid context=none,cb --grid seed=0,1,2"),
    (("context",), (), "--grid: cannot read 'context'; write a name and its values"),
    (("=1",), (), "--grid: cannot read '=1'"), (("a b=1",), (), "--grid: cannot read 'a b=1'"),
    (("seed=",), (), "--grid: 'seed=' has an empty value"), (("seed=1,,2",), (), "--grid: 'seed=1,,2' has an empty"),
    (("seed=1,2,1",), (), "--grid: seed=1 is given twice"),
    (("seed=1", "seed=2"), (), "--grid: seed is given twice; put all its values into one"),
    (("config.lr=1,2",), (), "--grid: 'config.lr=1,2': settings stand here without config.; write lr=1,2"),
    (("seed=1",), (("seed", "3"),), "--grid: seed is set for all cells as well; keep one of the two"),
    (("variant=mu/8",), (), "--grid: variant is set for all cells as well; keep one of the two")])
def test_a_grid_that_is_none(grid, settings, error):
    with pytest.raises(ConfigError) as caught:
        read_grid(grid, settings, CONFIG)
    assert str(caught.value).startswith(error)


def test_names_are_arguments_of_the_file_or_settings():
    found = plan("context=none,cb", "seed=0,1", "model.drop_path=0,0.1", "size=16", settings=[("plot", "False")])
    assert found.arguments == {"context", "size"}
    assert found.words({"context": "cb", "seed": "1", "model.drop_path": "0.1", "size": "16"}) == [
        "--config=debug:variant=mu/4,context=cb,size=16", "--config.plot=False", "--config.seed=1",
        "--config.model.drop_path=0.1"]
    asked = found.sweep("ema/val/prec@1", "context=none")
    assert len(asked.cells) == 8 and asked.baseline == "context=none"
    config = asked.cells["context=cb,seed=1,model.drop_path=0.1,size=16"].config
    assert (config["model"], config["seed"], config["plot"]) == (
        {"variant": "mu/4", "context": "cb", "drop_path": 0.1}, 1, False)


@pytest.mark.parametrize("body, arguments", [
    ("def get_config():\n    return base.get_config()\n", set()),
    ("def get_config(arg=None):\n    return base.get_config(arg)\n", {"context"}),
    ("def get_config(arg=''):\n    known = {'context': 'cb'}\n    for part in filter(None, arg.split(',')):\n"
     "        known[part.partition('=')[0]]\n    return base.get_config(arg)\n", {"context"})])
def test_files_of_ones_own_take_what_they_take(tmp_path, body, arguments):
    path = tmp_path / "mine.py"
    path.write_text(f"import configs.debug as base\n{body}")
    grid = ("context=none,cb", "seed=0,1") if arguments else ("model.context=none,cb", "seed=0,1")
    found = plan(*grid, config=str(path))
    if "known[" in body:
        path.write_text(path.read_text().replace("known[part.partition('=')[0]]", "assert part.startswith('context')"))
    assert found.arguments == arguments and len(found.sweep(None, None).cells) == 4


@pytest.mark.parametrize("grid, error", [
    (("context=none,bc",), "config.model.context: unknown value 'bc'; .* \\(in the cell context=bc\\)$"),
    (("lr=0.1,-1",), "config.lr: must be .*, got -1.0 \\(in the cell lr=-1\\)$"),
    (("contxt=cb",), "--grid: contxt is neither an argument .*, which takes variant, context, size, nor a setting; did "
                        "you mean context\\?$"),
    (("model.contxt=cb",), "config.model.contxt: unknown; did you mean context\\? \\(in the cell model.contxt=cb\\)$"),
    (("lr=0.1,1e-1",), "--grid: the cells lr=0.1 and lr=1e-1 are the same run; leave one out$"),
    (("context=cb", "total_steps=1", "total_epochs=1"), "config.total: total_steps and total_epochs are both set"),
    (("input.pp=value_range|onehot(10),value_range/onehot(10)",), "config.input.pp: "),
    (("size=big",), ".*debug.py, line .*: argument size=big: expected int")])
def test_every_cell_is_checked_before_one_begins(tmp_path, grid, error):
    args = [word for text in grid for word in ("--grid", text)]
    with pytest.raises(ConfigError, match=error):
        start(tmp_path / "sweep", *args)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("args, error", [
    ([], "--grid: not given"),
    (["--grid=seed=0", "--metric=vla/prec@1"], "--metric: 'vla/prec@1' is of no evaluator; names of their metrics be"),
    (["--grid=seed=0", "--metric=val/"], "--metric: 'val/' is of no evaluator; names of their metrics begin with 'va"),
    (["--grid=context=none,cb", "--baseline=contxt=none"], "--baseline: 'contxt=none': contxt is no name of the grid"),
    (["--grid=context=none,cb", "--baseline=context=no"], "--baseline: 'context=no' is no cell of the grid"),
    (["--grid=seed=0", "--metric=val/precc@1"], "--metric: 'val/precc@1': this evaluator has no 'precc@1'"),
    (["--grid=seed=0", "--baseline=seed=0"], "--baseline: 'seed=0': seed is no name of the grid"),
    (["--grid=seed=0", "--parallel=0"], "--parallel: expected a whole number of at least 1, got '0'"),
    (["--grid=seed=0", "--workdir=gs://b/x"], "--workdir: gs://b/x is in a bucket, where cells can be neither locked"),
    (["--grid=seed=0", "--workdir=RUN"], "--workdir: RUN is the folder of a run; give one for the sweep alone")])
def test_a_sweep_that_cannot_be_is_one_line(tmp_path, args, error):
    run = write_run(tmp_path / "run", {"seed": 0, "evals": {}}, [])
    fill = lambda text: text.replace("RUN", str(run))  # noqa: E731
    given = [f"--config={CONFIG}", f"--workdir={tmp_path}/sweep", *map(fill, args)]
    assert refusal(sweep, *given).startswith(fill(error))
    assert not (tmp_path / "sweep").exists()


def test_processes_that_belong_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    assert refusal(sweep, f"--config={CONFIG}", f"--workdir={tmp_path}", "--grid=seed=0").startswith(
        "JAX_COORDINATOR_ADDRESS: is set: these processes are one run together")


def test_values_may_be_added_and_what_cells_share_may_not_change(tmp_path):
    first = plan("context=none,cb", "seed=0,1")
    first.record(tmp_path, first.sweep(None, None))
    more = plan("context=cb,cb_s", "seed=2", settings=[("lr", "1e-3")])  # which it is anyhow
    merged = more.record(tmp_path, more.sweep("val/loss", None))
    assert merged == read_sweep(tmp_path, "--workdir") and merged.metric == "val/loss"
    assert merged.grid == {"context": ("none", "cb", "cb_s"), "seed": ("0", "1", "2")} and len(merged.cells) == 6
    before = (tmp_path / "sweep.json").read_bytes()
    for other, error in (
            (plan("context=cb", "seed=0", settings=[("lr", "0.1")]),
             r"--workdir: the sweep in .* began with other settings: config.lr: 0.001 -> 0.1 \(in the cell "),
            (plan("context=cb_s", "seed=9", config="debug:variant=mu/8"), r"config.model.variant: 'mu/4' -> 'mu/8'"),
            (plan("seed=0", "context=cb"), "--grid: the sweep in .* is over context, seed, not over seed, context"),
            (plan("context=cb", "seed=0", "lr=1"), "--grid: the sweep in .* is over context, seed, not over")):
        with pytest.raises(ConfigError, match=error):
            other.record(tmp_path, other.sweep(None, None))
    assert more.record(tmp_path, more.sweep("val/prec@1", None)).metric == "val/prec@1"  # no run has begun
    more.record(tmp_path, more.sweep("val/loss", None))
    write_run(tmp_path / "context=cb,seed=0", {"evals": {}}, run_records(0.5))
    with pytest.raises(ConfigError, match="--metric: val/prec@1 is named too late: the sweep .* began with val/loss; "):
        more.record(tmp_path, more.sweep("val/prec@1", None))
    with pytest.raises(ConfigError, match="--baseline: context=cb is named too late: the sweep in .* began with none"):
        more.record(tmp_path, more.sweep(None, "context=cb"))
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_a_second_process_that_writes_the_sweep_down_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("cb_vit.tools.sweep_plan.WAIT", 0.2)
    asked = plan("seed=0")
    with workdir.lock(tmp_path), pytest.raises(workdir.Locked):
        asked.record(tmp_path, asked.sweep(None, None))
    assert asked.record(tmp_path, asked.sweep(None, None)).grid == {"seed": ("0",)}


@pytest.fixture
def job(tmp_path):
    """A cell of a sweep of 30 steps, which has not begun."""
    settings = [("total_steps", "30"), ("ckpt_steps", "10"), ("plot", "False"), ("mixup", "None"),
                ("random_erasing", "None"), ("ema", "None")]
    asked = plan("context=cb", "seed=3", settings=settings)
    (name, cell), = asked.record(tmp_path, asked.sweep(None, None)).cells.items()
    folder = workdir.io.as_path(tmp_path / name)
    return cells.Job(name, folder, [*asked.words(cell.grid), f"--workdir={folder}"], cell.config)


def checkpoint(job, *steps):
    for step in steps:
        (job.folder / "checkpoints" / str(step)).mkdir(parents=True)


def test_a_cell_is_complete_when_it_is_saved_and_evaluated_at_its_last_step(job, tmp_path):
    assert not cells.is_complete(job) and cells.standing(job, tmp_path) == "begins" and cells.share(job) == 0
    write_run(job.folder, job.config, run_records(0.5, 30)[:3], 30)
    assert cells.share(job) == 0.5
    checkpoint(job, 5, 30)  # told to stop just there, it has saved and not evaluated
    assert not cells.is_complete(job) and cells.standing(job, tmp_path) == "goes on from step 30"
    write_run(job.folder, job.config, run_records(0.5, 30), 30)
    assert cells.is_complete(job) and cells.standing(job, tmp_path) == "complete"
    (job.folder / "checkpoints/30").rename(job.folder / "checkpoints/30.orbax-checkpoint-tmp-1")  # killed in saving
    assert not cells.is_complete(job) and cells.standing(job, tmp_path) == "goes on from step 5"
    write_run(job.folder, {**job.config, "lr": 5.0}, run_records(0.5, 30), 30)
    with pytest.raises(ConfigError, match="--workdir: .* holds a run of another config .config.lr: 5.0 -> 0.001"):
        cells.is_complete(job)


@pytest.mark.parametrize("place", ["claim", "run"])
def test_a_cell_that_another_process_has_is_left_to_it(job, tmp_path, place):
    with workdir.lock(tmp_path / cells.CLAIMS / job.name if place == "claim" else job.folder):
        assert cells.standing(job, tmp_path) == "run by others"
        outcome = scheduler.run_all([job], tmp_path, 1, None)
    assert outcome.elsewhere == [job] and not outcome.failed + outcome.complete
    assert not (job.folder / "sweep.log").exists() and not cells.is_claimed(tmp_path, job)


def test_the_commands_of_the_docs_are_commands():
    text = (ROOT / "docs/comparing.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("cb-vit ") and "\u2026" not in line]
    commands = [shlex.split(line)[1:] for line in lines]
    assert {name for name, *_ in commands} == {"sweep", "compare", "report"}
    for name, *words in commands:
        cli.parse({"sweep": sweep, "compare": compare, "report": report}[name], words)


def test_signals_go_on_to_the_runs_and_nothing_more_begins(job, tmp_path):
    process, before = subprocess.Popen(["sleep", "60"]), signal.getsignal(signal.SIGINT)
    with scheduler._signals() as told:
        running = scheduler.Scheduler([job], tmp_path, 2, told)
        running.running[job] = scheduler.Running(process, contextlib.ExitStack())
        for number in (signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert told == [signal.SIGTERM, signal.SIGINT]
        while running.work():
            time.sleep(0.01)
    assert process.returncode == -signal.SIGTERM and not (job.folder / "sweep.log").exists()
    assert running.outcome.stopped == [job] == running.outcome.left and not running.outcome.failed
    assert signal.getsignal(signal.SIGINT) is before


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, capsys):
    start(tmp_path / "sweep", "--grid=context=none,cb", "--dry_run")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["context=none  begins", "context=cb    begins"]
    assert said[2].endswith(f"train --config=debug:variant=mu/4,context=none --workdir={tmp_path}/sweep/context=none")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_named_and_goes_on(job, tmp_path, monkeypatch):
    """A real run, killed once it has saved, and the same sweep again."""
    monkeypatch.chdir(ROOT)
    first = scheduler.Scheduler([job], tmp_path, 1, told := [])
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(first.end)
        began = time.monotonic()
        while first.work() and not cells.saved_steps(job):
            assert time.monotonic() - began < 100
            time.sleep(0.01)
        process, claim = first.running[job]
        claim.close()  # as if the sweep were killed: its run keeps the cell
        with pytest.raises(workdir.Locked), workdir.lock(tmp_path / cells.CLAIMS / job.name):
            raise AssertionError("a cell that runs could be claimed")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not first.work()
    assert first.outcome.failed == [job] and not cells.is_claimed(tmp_path, job) and not told
    assert not cells.is_complete(job)
    reached = max(cells.saved_steps(job))
    outcome = scheduler.run_all([job], tmp_path, 1, None)
    assert outcome.complete == [job] and cells.standing(job, tmp_path) == "complete"
    log = (job.folder / "sweep.log").read_text()
    assert log.count("\n--- ") == 1 and f"resumed from step {reached} of" in log
    steps = [record["step"] for record in records(job.folder) if "training_loss" in record]
    assert steps == [5, 10, 15, 20, 25, 30]
    assert json.loads((job.folder / "run.json").read_text())["versions"]["jax"]


def test_a_sweep_of_which_a_cell_fails_names_its_last_line(job, tmp_path, monkeypatch, capsys):
    (job.folder / "sweep.log").parent.mkdir(parents=True)
    (job.folder / "sweep.log").write_text("--- command\nmuch\n\nerror: the disk is \x1b[2Jfull\n\n")
    assert job.last_words() == "error: the disk is \x1b[2Jfull"
    monkeypatch.setattr(scheduler, "run_all", lambda jobs, *rest: scheduler.Outcome(failed=[job], complete=jobs[1:]))
    with pytest.raises(Failure, match=r"1 of 2 cells failed, the first of them context=cb,seed=3; the same"):
        start(tmp_path / "other", "--grid=seed=0,1")
    out = capsys.readouterr().out
    assert "cells     1 complete, 1 failed\nfailed    context=cb,seed=3: error: the disk is \\x1b[2Jfull\n" in out
    assert "to go on  " in out and "--grid=seed=0,1" in out
