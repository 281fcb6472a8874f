"""Arms against each other: what is compared with what, what is refused, and that every table says the same."""
import csv
import io
import json
import re

import numpy as np
import pytest
from helpers import refusal, run_records, write_run

import cb_vit
from cb_vit.analysis import comparison_tables as tables
from cb_vit.analysis.arms import is_score
from cb_vit.analysis.statistics import sign_flip_p, t_interval
from cb_vit.analysis.sweeps import cell_name, cells_of
from cb_vit.config import ConfigError
from cb_vit.tools import cli, compare

RNG = np.random.default_rng(0)
VALUES = {(arm, seed): 0.8 + number / 50 + RNG.normal(0, 0.01) for number, arm in enumerate(("none", "cb", "cb_s"))
          for seed in range(5)}


def config(context, seed, **more):
    return {"seed": seed, "lr": 0.1, "total_steps": 20, "model": {"context": context},
            "evals": {"val": {"type": "classification"}}, **more}


def arms(home, *names, seeds=range(5), change=lambda name, seed: {}, **more):
    """A run of each arm and seed; `change` says what differs beside."""
    return [write_run(home / f"{name}{seed}", config(name, seed, **change(name, seed)),
                      run_records(VALUES[name, seed], **more)) for name in names for seed in seeds]


def sweep_of(home, seeds=range(5), **more):
    """The folder of a sweep, of whose cells those of these seeds have been run."""
    arms(home, "none", "cb", seeds=seeds)
    grid, cells = {"context": ("none", "cb"), "seed": tuple("01234")}, {}
    for values in cells_of(grid):
        cells[cell_name(values)] = {"grid": values, "config": config(values["context"], int(values["seed"]))}
        run = home / f"{values['context']}{values['seed']}"
        if run.exists():
            run.rename(home / cell_name(values))
    (home / "sweep.json").write_text(json.dumps({
        "format": 1, "config": "mine", "settings": [], "grid": grid, "cells": cells, **more}))
    return home


def by_hand(one, other="none", seeds=range(5)):
    return np.array([VALUES[one, seed] - VALUES[other, seed] for seed in seeds])


def test_arms_are_compared_by_seed_at_the_last_step(tmp_path):
    runs = arms(tmp_path, "none", "cb", "cb_s")
    found = cb_vit.compare(*runs, metric="val/prec@1", baseline="context=none", level=0.9)
    assert [scores.arm for scores in found.primary.scores] == ["context=none", "context=cb", "context=cb_s"]
    assert found.baselines == ("context=none",) and found.higher_is_better and found.chosen == "given"
    for scores, name in zip(found.primary.scores, ("none", "cb", "cb_s"), strict=True):
        values = [VALUES[name, seed] for seed in range(5)]
        assert (scores.seeds, scores.mean, scores.std) == (tuple(range(5)), np.mean(values), np.std(values, ddof=1))
    for one, name in zip(found.primary.differences, ("cb", "cb_s"), strict=True):
        expected = by_hand(name)
        np.testing.assert_array_equal(one.values, expected)
        assert one.interval == t_interval(expected, 0.9) and one.p == sign_flip_p(expected)
        assert one.factors == ("context",) and one.tests == 2
    ps = [one.p for one in found.primary.differences]
    assert [one.p_holm for one in found.primary.differences] == [min(1, 2 * min(ps)), max(2 * min(ps), *ps)] \
        or ps[0] > ps[1]
    assert [result.metric for result in found.exploratory] == ["val/loss"]
    assert all(one.p is None and one.p_holm is None for one in found.exploratory[0].differences)


def test_every_table_says_the_same(tmp_path, capsys):
    runs = arms(tmp_path, "none", "cb")
    compare.main(cli.parse(compare, [*map(str, runs), "--metric=val/prec@1", "--baseline=context=none",
                                     f"--csv={tmp_path}/t.csv", f"--latex={tmp_path}/t.tex"]))
    out, difference = capsys.readouterr().out, by_hand("cb")
    low, high = t_interval(difference, 0.95)
    numbers = (f"{difference.mean():+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{sign_flip_p(difference):.4f}")
    assert all(number in out for number in numbers)
    for words in ("at the last step of each run, not the best", "only you know", "Student's t at 95 %",
                  "none is below 0.0625", "all 2^5 flips", "exploratory: other metrics", "context=none  (baseline)"):
        assert words in out, words
    rows = {(row["metric"], row["arm"]): row for row in csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text()))}
    row = rows["val/prec@1", "context=cb"]
    assert [row[name] for name in ("role", "pairs", "baseline")] == ["primary", "5", "context=none"]
    assert [float(row[name]) for name in ("difference", "low", "high", "p")] == [
        difference.mean(), low, high, sign_flip_p(difference)]
    assert rows["val/loss", "context=cb"]["role"] == "exploratory" and not rows["val/loss", "context=cb"]["p"]
    tex = (tmp_path / "t.tex").read_text()
    assert tex.count(r"\\") == 3 and r"\toprule" in tex and all(f"${number}$" in tex for number in numbers)
    assert refusal(compare, *runs, f"--csv={tmp_path}/t.csv").startswith(f"--csv: {tmp_path}/t.csv is already there")
    assert refusal(compare, *runs, f"--csv={tmp_path}/x", f"--latex={tmp_path}/./x").startswith("--latex: ")


def test_latex_prints_what_names_say():
    assert tables.latex("a_b & 5% {x} \\y #1 ^~\x1b") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \#1 \textasciicircum{}\textasciitilde{}\textbackslash{}x1b")


def test_a_baseline_that_leaves_several_is_matched_by_the_rest(tmp_path):
    runs = []
    for lr in (0.1, 0.2):
        runs += arms(tmp_path / str(lr), "none", "cb", seeds=(0, 1), change=lambda name, seed, lr=lr: {"lr": lr})
    found = cb_vit.compare(*runs, metric="val/prec@1", baseline="context=none")
    assert [(one.arm, one.baseline) for one in found.primary.differences] == [
        (f"lr={lr}, context=cb", f"lr={lr}, context=none") for lr in (0.1, 0.2)]
    found = cb_vit.compare(*runs, metric="val/prec@1", baseline="context=none,lr=0.1")
    assert [one.factors for one in found.primary.differences] == [("context",), ("lr",), ("lr", "context")]
    assert "differ in more than one thing (lr, context): their difference cannot be put" in "".join(tables.notes(found))
    runs += arms(tmp_path / "0.3", "cb", seeds=(0, 1), change=lambda name, seed: {"lr": 0.3})
    assert refusal(compare, *runs, "--metric=val/prec@1", "--baseline=context=none") == (
        "--baseline: 'context=none' leaves several arms, and none of them is like lr=0.3, context=cb in all else; say "
        "more of it")


def test_what_changes_nothing_makes_no_arm(tmp_path):
    def elsewhere(name, seed):
        data = {"data_dir": f"/{seed}"}
        return {"plot": bool(seed), "ckpt_steps": seed + 1, "input": {"num_workers": seed, "data": data}}

    found = cb_vit.compare(*arms(tmp_path, "none", "cb", change=elsewhere), metric="val/loss", baseline="context=none")
    assert not found.higher_is_better and len(found.primary.scores) == 2


def test_one_arm_and_one_seed_are_said_in_words(tmp_path):
    runs = arms(tmp_path, "none", "cb", seeds=(3,))
    said = "\n".join(tables.lines(cb_vit.compare(*runs, metric="val/prec@1", baseline="context=none")))
    assert "context=cb has pairs with context=none: 1, so no spread, and neither interval nor test" in said
    assert "there is one arm" in "".join(tables.notes(cb_vit.compare(runs[0], metric="val/loss")))
    assert "no arm is named" in "".join(tables.notes(cb_vit.compare(*runs, metric="val/loss")))


def broken(home, kind):
    """Runs of which the last is not as it should be."""
    runs = arms(home, "none", "cb")
    path = runs[-1] / "metrics.jsonl"
    lines = path.read_text().splitlines()
    if kind == "unfinished":
        path.write_text("\n".join(lines[:2] + lines[2:3]) + "\n")
    elif kind == "nan":
        path.write_text("\n".join([*lines[:-1], json.dumps({"step": 20, "val/prec@1": None, "val/loss": 1})]) + "\n")
    elif kind == "metric":
        path.write_text("\n".join([*lines[:-1], json.dumps({"step": 20, "val/loss": 1})]) + "\n")
    elif kind == "seed":
        runs.pop()
    return runs


@pytest.mark.parametrize("kind, error", [
    ("unfinished", "DIR: cb4 is not finished (at its last step, 20, but not evaluated there)"),
    ("nan", "DIR: val/prec@1 of cb4 is no number at its last step"),
    ("metric", "DIR: cb4 has no val/prec@1 at its last step"), ("seed", "DIR: context=cb has no run of seed 4")])
def test_what_is_missing_is_refused_or_left_out_aloud(tmp_path, kind, error):
    runs = broken(tmp_path, kind)
    given = [*runs, "--metric=val/prec@1", "--baseline=context=none"]
    assert refusal(compare, *given) == f"{error}; finish what is not, or leave it out with --allow_missing"
    found = cb_vit.compare(*runs, metric="val/prec@1", baseline="context=none", allow_missing=True)
    np.testing.assert_array_equal(found.primary.differences[0].values, by_hand("cb", seeds=range(4)))
    assert f"left out: {error.removeprefix('DIR: ')}; a comparison without" in "".join(found.notes)


@pytest.mark.parametrize("args, error", [
    (["RUNS"], "--metric: not given, and the sweep has named none; choose the one that matters, before looking: "
               "val/prec@1, val/loss"),
    (["RUNS", "--metric=val/prec"], "--metric: no evaluator has measured 'val/prec' at the last step of a run"),
    (["RUNS", "--metric=val/loss", "--baseline=context=nnoe"], "--baseline: no arm is 'context=nnoe'; there are con"),
    (["RUNS", "--metric=val/loss", "--baseline=none"], "--baseline: cannot read 'none'; the arms are context=none, "),
    (["RUNS", "--level=95"], "--level: expected a share between 0 and 1, such as 0.95 for 95 %, got '95'"),
    (["RUNS", "--metric=val/loss", "--better=up"], "--better: unknown choice 'up'"),
    (["RUNS", "RUNS"], "DIR: HOME/none0 and HOME/none0 are the same run; give it once"),
    (["HOME"], "DIR: HOME has neither a config.json, as runs do, nor a sweep.json, as sweeps do"),
    (["ftp://x"], "DIR: ftp://x: unknown kind of address"),
    (["RUNS", "--csv=HOME/none/x", "--metric=val/loss"], "--csv: HOME/none/x: there is no folder HOME/none; make it")])
def test_what_cannot_be_compared_is_one_line(tmp_path, args, error):
    runs = arms(tmp_path, "none", "cb", seeds=(0, 1))
    given = [word for arg in args for word in (runs if arg == "RUNS" else [arg.replace("HOME", str(tmp_path))])]
    assert refusal(compare, *given).startswith(error.replace("HOME", str(tmp_path)))


def test_other_data_and_seeds_that_stand_twice_are_refused(tmp_path):
    runs = arms(tmp_path, "none", "cb", seeds=(0, 1))
    other = write_run(tmp_path / "other", config("cb", 2), run_records(0.5), fingerprint="g")
    assert refusal(compare, *runs, other, "--metric=val/loss").startswith(
        "DIR: other and none0 were not evaluated on the same data: 'val' has 100 examples of fingerprint g in the one")
    twice = write_run(tmp_path / "twice", config("cb", 1), run_records(0.5))
    assert refusal(compare, *runs, twice, "--metric=val/loss") == (
        f"DIR: {twice} and {tmp_path}/cb1 have the same settings and seed 1; give one of them")


@pytest.mark.parametrize("asked, chosen", [(None, "sweep"), ("val/prec@1", "sweep"), ("val/loss", "against")])
def test_the_metric_of_a_sweep_is_the_one_that_it_began_with(tmp_path, asked, chosen):
    home = sweep_of(tmp_path, metric="val/prec@1", baseline="context=none")
    found = cb_vit.compare(home, metric=asked)
    assert found.chosen == chosen and found.baselines == ("context=none",)
    assert ("EXPLORATORY" in tables.heading(found)) == (chosen == "against")
    assert ("primary" in tables.as_csv(found)) == (chosen == "sweep")


def test_a_sweep_that_is_not_over_or_was_tampered_with(tmp_path):
    home = sweep_of(tmp_path, range(4), metric="val/prec@1")
    assert refusal(compare, home).startswith("DIR: context=none,seed=4 is not finished (not a step is recorded), ")
    path = home / "context=cb,seed=1/config.json"
    path.write_text(path.read_text().replace("0.1", "0.3"))
    assert refusal(compare, home).startswith(
        f"DIR: {home}/context=cb,seed=1 was trained with another config than its sweep says: config.lr: 0.1 -> 0.3")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 9999, b'{"format": 2}', json.dumps({
    "format": 1, "config": "x", "settings": [], "grid": {}, "cells": {"../x": {"grid": {"a": "1"}, "config": {}}}
}).encode(), json.dumps({"format": 3, "config": "x", "settings": [], "grid": {}, "cells": {}}).encode()])
def test_a_sweep_json_that_is_none(tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content)
    assert re.match(rf"DIR: {tmp_path}/sweep.json is nothing that a sweep has written \(.+\); move it away",
                    refusal(compare, tmp_path))


def test_names_of_metrics_tell_what_is_better():
    assert all(map(is_score, ("val/prec@1", "mistakes/worst_class_acc", "ema/val/prec@5", "attack/fgsm/eps_1/prec@1")))
    assert not any(map(is_score, ("val/loss", "c/mce", "c/severity_1/error", "cal/ece", "cal/ece_mass", "cal/nll")))
    with pytest.raises(ConfigError, match="--better: not given, and the name of 'x/tau'"):
        is_score("x/tau")
