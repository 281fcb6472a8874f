"""Pictures of one run and of several: what is marked, smoothed and told apart, and what `cb-vit curves` refuses."""
import csv
import io
import itertools
import json

import numpy as np
import pytest
from helpers import refusal
from matplotlib.colors import to_hex
from PIL import Image

from cb_vit.monitor import panels
from cb_vit.monitor.curves import draw_curves
from cb_vit.monitor.panels import RING, draw_curve, kind_of, running_mean, step_axis
from cb_vit.monitor.style import RAW, Look, plain, short
from cb_vit.tools import cli, curves


def history(points, nan=(), evals=("val",)):
    steps = np.arange(1, points + 1) * 10
    falling = np.where(np.isin(np.arange(points), nan), np.nan, 3 / np.maximum(steps, 1) + 0.1)
    names = ["training_loss", "lr", "l2_grads", "img/sec", "data_wait"]
    names += [f"{name}/{score}" for name in evals for score in ("loss", "prec@1")]
    return {name: (steps, falling / 4) for name in names} | {"epoch": (steps, steps / 100)}


def picture(data):
    Image.open(io.BytesIO(data)).verify()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.filterwarnings("error")
def test_curves_can_be_drawn_from_anything():
    others = ("ema/val", "train", r"$\frac{", "an_evaluator_whose_name_has_forty_letters")
    seen = [picture(draw_curves(values, r"a $run$ of $\others")) for values in (
        {}, history(1, nan=[0]), history(500, nan=range(100, 200), evals=others),
        {"training_loss": (np.arange(3), np.array([np.inf, -1e308, 2])), "val/prec@1": (np.zeros(1), np.ones(1))})]
    assert all(image.shape == seen[0].shape and image.std() > 1 for image in seen)
    assert len({image.tobytes() for image in seen}) == len(seen)


def test_an_evaluator_called_train_is_not_the_training_loss(monkeypatch):
    drawn = []
    monkeypatch.setattr("cb_vit.monitor.curves.label_ends", lambda ax, ends: drawn.append([end[0] for end in ends]))
    monkeypatch.setattr("cb_vit.monitor.curves.to_png", lambda figure: b"")
    draw_curves({name: (np.array([1]), np.array([value])) for name, value in [
        ("training_loss", 2.5), ("train/loss", 2.25), ("ema/train/loss", 2.0), ("ema/train/prec@1", 0.5)]})
    assert drawn[:2] == [["training 2.50", "train 2.25", "ema/train 2.00"], ["ema/train 50.0%"]]


def test_of_many_evaluations_those_with_the_shortest_names_are_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr("cb_vit.monitor.curves.label_ends", lambda ax, ends: drawn.append([end[0] for end in ends]))
    monkeypatch.setattr("cb_vit.monitor.curves.to_png", lambda figure: b"")
    names = [*(f"attack/pgd/eps_{eps}" for eps in range(10, 30)), "val", "ema/val"]
    draw_curves({f"{name}/prec@1": (np.array([1]), np.array([0.5])) for name in names})
    assert drawn[1] == [f"{name} 50.0%" for name in (*names[:8], "val", "ema/val")]


@pytest.fixture
def ax():
    return panels.figure(1, 1, 4, 3)[1][0, 0]


@pytest.mark.parametrize("last", [0, 1, 2, 3, 5, 7, 12, 99, 2250, 312_750])
def test_steps_are_whole_numbers(ax, last):
    ax.plot([0, last], [0, 1])
    step_axis(ax, last)
    ticks = ax.xaxis.get_majorticklocs()
    assert len(ticks) >= 2 and all(tick == round(tick) for tick in ticks)
    assert ax.get_xlim() == (0, max(last, 1))


@pytest.mark.parametrize("metric, best, text", [
    ("val/prec@1", 2, f"80.0%  {RING} 90.0%"), ("ema/val/loss", 4, f"0.800  {RING} 0.100"),
    ("training_loss", None, "0.800")])
def test_the_best_of_an_evaluator_is_marked_with_its_value(ax, metric, best, text):
    values = np.array([0.2, np.nan, 0.9, 0.3, 0.1, 0.8])
    assert draw_curve(ax, (np.arange(6) * 7, values), Look(), kind_of(metric)) == (0.8, text)
    rings = [line.get_xydata().tolist() for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert rings == ([[[best * 7, values[best]]]] if best is not None else [])


def test_an_end_that_is_the_best_is_named_once(ax):
    assert draw_curve(ax, (np.arange(3), np.array([0.1, 0.2, 0.3])), Look(), kind_of("val/prec@1")) == (0.3, "30.0%")
    assert draw_curve(ax, (np.arange(3), np.full(3, np.nan)), Look(), kind_of("val/prec@1")) is None


@pytest.mark.parametrize("metric, smoothed", [
    ("training_loss", True), ("img/sec", True), ("lr", False), ("val/loss", False)])
def test_what_is_noisy_is_smoothed_over_grey(ax, metric, smoothed):
    values = 2 + np.random.default_rng(0).normal(0, 0.3, 1000)
    draw_curve(ax, (np.arange(1000), values), Look(), kind_of(metric))
    drawn = {to_hex(line.get_color()): line.get_ydata() for line in ax.lines if len(line.get_xdata()) > 1}
    assert (RAW in drawn) == smoothed
    assert (np.std(drawn[Look().colour]) < 0.1) == smoothed
    np.testing.assert_array_equal(drawn.get(RAW, values), values)


def test_a_running_mean_is_pulled_by_neither_gaps_nor_ends():
    values = np.full(50, 3.0)
    values[10:20] = np.nan
    np.testing.assert_array_equal(running_mean(values, 7), values)
    line = np.arange(50.0)
    np.testing.assert_allclose(running_mean(line, 7)[3:-3], line[3:-3])


def test_curves_side_by_side_differ_by_more_than_their_colour():
    looks = [Look.number(index) for index in range(32)]
    assert len(set(looks)) == 32
    assert all(one.colour != other.colour and one.dash != other.dash for one, other in itertools.pairwise(looks))


def test_names_are_short_and_stay_different():
    names = ["val", "a" * 40 + "1", "a" * 40 + "2", "b" + "a" * 30 + "c" + "a" * 30, "b" + "a" * 30 + "d" + "a" * 30]
    found = short(names[:3])
    assert found["val"] == "val" and len(set(found.values())) == 3 and max(map(len, found.values())) <= 21
    assert len(set(short(names).values())) == 5  # where only the middle differs it is shown
    assert plain("a\x1b[2J$x$") == r"a\x1b[2J\$x\$"


# cb-vit curves


def write(folder, records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def two(tmp_path):
    """A run that has been evaluated and one that has not yet."""
    return [write(tmp_path / "cb/seed0", [
        {"step": 5, "training_loss": 2.5, "lr": 0.1}, {"step": 5, "val/prec@1": 0.75},
        {"step": 10, "training_loss": None, "lr": 0.2}, {"step": 10, "val/prec@1": 0.5}]),
        write(tmp_path / "plain/seed0", [{"step": 2000, "training_loss": 1.5, "lr": 0.3, "img/sec": 7.25}])]


def draw(*args):
    curves.main(cli.parse(curves, list(map(str, args))))


def test_runs_are_drawn_over_each_other(two, tmp_path, capsys):
    draw(*two, f"--output={tmp_path}/seeds.png")
    assert capsys.readouterr().out.splitlines() == [
        "run          steps  accuracy      best  at step    last",
        "cb/seed0        10  val/prec@1  0.7500        5  0.5000",
        "plain/seed0  2,000  none yet",
        f"wrote  {tmp_path}/seeds.png, {tmp_path}/seeds.csv: training_loss, val/prec@1, img/sec"]
    assert picture((tmp_path / "seeds.png").read_bytes()).std() > 1
    with open(tmp_path / "seeds.csv") as file:
        assert list(csv.reader(file)) == [
            ["run", "step", "metric", "value"], ["cb/seed0", "5", "training_loss", "2.5"],
            ["cb/seed0", "10", "training_loss", ""], ["cb/seed0", "5", "val/prec@1", "0.75"],
            ["cb/seed0", "10", "val/prec@1", "0.5"], ["plain/seed0", "2000", "training_loss", "1.5"],
            ["plain/seed0", "2000", "img/sec", "7.25"]]
    (tmp_path / "seeds.png").unlink()
    assert refusal(curves, *two, f"--output={tmp_path}/seeds.png") == (
        f"--output: {tmp_path}/seeds.csv is already there; choose another name, or give --overwrite")
    draw(two[1], f"--output={tmp_path}/seeds.png", "--overwrite", "--metrics=l.*")
    assert (tmp_path / "seeds.csv").read_text() == "run,step,metric,value\nseed0,2000,lr,0.3\n"


@pytest.mark.parametrize("args, error", [
    (["RUN", "{0}"], "RUN: {0}/metrics.jsonl does not exist; give the workdir of a run"),
    (["RUN", "{0}/empty"], "RUN: {0}/empty/metrics.jsonl holds no record of a run; give the workdir of one that has "
                           "logged a step"),
    (["RUN", "{0}/other"], "RUN: {0}/other/metrics.jsonl holds no record of a run (b'{{\"epoch\": 1}}'); give the "
                           "workdir of one that has logged a step"),
    (["RUN", "RUN/../seed0"], "RUN: RUN/../seed0 and RUN are the same run; give it once"),
    (["ftp://run"], "RUN: ftp://run: unknown kind of address ftp://; choices: gs://, s3://, az://, or a path"),
    (["RUN", "--metrics=loss"], "--metrics: 'loss' is the whole name of no metric; there are training_loss, lr, "
                                "val/prec@1"),
    (["RUN", "--metrics=["], "--metrics: '[' is no regular expression: unterminated character set at position 0"),
    (["RUN", "--output={0}/x.svg"], "--output: {0}/x.svg: expected a name that ends in .png"),
    (["RUN", "--output={0}/no/x.png"], "--output: {0}/no/x.png: there is no folder {0}/no; make it first"),
    (["RUN", "--output={0}/folder.png", "--overwrite"], "--output: {0}/folder.png is a folder; choose another name"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(two, tmp_path, args, error):
    write(tmp_path / "empty", [])
    write(tmp_path / "other", [{"epoch": 1}])
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    fill = lambda text: text.replace("RUN/", f"{two[0]}/").format(tmp_path)  # noqa: E731
    args = [f"--output={tmp_path}/curves.png"] + [str(two[0]) if arg == "RUN" else fill(arg) for arg in args]
    assert refusal(curves, *args) == fill(error).replace("and RUN are", f"and {two[0]} are")
    assert sorted(tmp_path.rglob("*")) == before


def test_more_metrics_than_a_picture_has_room_for(tmp_path):
    run = write(tmp_path / "run", [{"step": 1, **{f"m{i}": i for i in range(30)}}])
    assert refusal(curves, run, "--metrics=m.*").startswith("--metrics: 'm.*' matches 30 metrics, and a picture has ")


@pytest.mark.parametrize("places, names", [
    (["/a/b"], ["b"]), (["/a/x", "/a/y"], ["x", "y"]), (["/a/x/0", "/a/y/0"], ["x/0", "y/0"]),
    (["/a", "/a/a", "gs://b/a"], ["a", "a/a", "b/a"])])
def test_runs_have_the_shortest_names_that_tell_them_apart(places, names):
    assert curves.short_names(places) == names
