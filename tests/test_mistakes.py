"""The evaluator of mistakes against scikit-learn and numpy, on any number of devices; its files by what they say."""
import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Numbered, predict_numbered
from PIL import Image
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from cb_vit import dist
from cb_vit.config import ConfigError
from cb_vit.evaluators import common, mistakes
from cb_vit.evaluators.mistakes import Evaluator
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState

N = 101
FILES = ["confusion.csv", "confusion.png", "least_sure.png", "most_wrong.png", "per_class.csv"]


class Named(Numbered):
    def __init__(self, labels, num_classes, names=None, broken=()):
        super().__init__(labels, num_classes, broken)
        self.class_names = names

    def __getitem__(self, index):
        return super().__getitem__(index) | {"id": f"image {index}"}


def build(labels, logits, devices=1, batch_size=8, names=None, broken=(), ema=None, **settings):
    """(evaluator, state)."""
    mesh = dist.create_mesh([("data", -1)], devices=jax.devices()[:devices])
    config = common.read_evaluator(dict(
        type="mistakes", log_steps=5, data=dict(name="fake", split="test"), pp_fn=f"onehot({logits.shape[1]})",
        batch_size=batch_size, prefix="mistakes/", num_workers=0, num_threads=2, prefetch=2) | settings, "val")
    sharding = dist.batch_sharding(mesh, "data")
    pipeline = Pipeline(config, Named(labels, logits.shape[1], names, broken), config.pp_fn,
                        dist.local_rows(sharding, batch_size))
    state = TrainState(jnp.int32(7), {"logits": jnp.asarray(logits)}, (), jnp.asarray(True), ema)
    return (Evaluator(predict_numbered, config=config, sharding=sharding, pipeline=pipeline),
            jax.device_put(state, dist.replicated(mesh)))


def random(classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, N)
    return labels, (rng.normal(size=(N, classes)) + 1.5 * np.eye(classes)[labels]).astype(np.float32)


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def matrix(text, names):
    found = np.zeros((len(names), len(names)), int)
    for row in rows(text):
        found[names.index(row["true"]), names.index(row["predicted"])] = int(row["examples"])
    return found


@pytest.mark.parametrize("devices, batch_size", [(1, 8), (1, 200), (3, 12), (8, 64)])
def test_the_numbers_are_those_of_scikit_learn(devices, batch_size):
    labels, logits = random(6)
    evaluator, state = build(labels, logits, devices, batch_size)
    metrics, guesses = dict(evaluator.run(state)), logits.argmax(1)
    expected = confusion_matrix(labels, guesses)
    assert metrics == {
        "mean_class_acc": pytest.approx(balanced_accuracy_score(labels, guesses), rel=1e-12),
        "worst_class_acc": pytest.approx((expected.diagonal() / expected.sum(1)).min(), rel=1e-12)}

    files = dict(evaluator.files())
    names = [f"class {number}" for number in range(6)]
    np.testing.assert_array_equal(matrix(files["confusion.csv"], names), expected)
    off = expected - np.diag(expected.diagonal())
    for number, row in enumerate(rows(files["per_class.csv"])):
        assert (row["class"], int(row["examples"]), int(row["correct"])) == (
            names[number], expected[number].sum(), expected[number, number])
        assert float(row["accuracy"]) == pytest.approx(expected[number, number] / expected[number].sum(), abs=1e-4)
        assert (row["most confused with"], int(row["times"])) == (names[off[number].argmax()], off[number].max())


def shown(evaluator, monkeypatch):
    """The contact sheets as (id, true, predicted with its probability)."""
    sheets = []
    monkeypatch.setattr(mistakes, "draw_sheet", lambda tiles, *_: sheets.append(
        [tuple(line.text + line.end for line in tile.lines) for tile in tiles]) or b"")
    dict(evaluator.files())
    return [[(name, is_, says) for is_, says, name in sheet] for sheet in sheets]


@pytest.mark.parametrize("devices, batch_size", [(1, 8), (4, 20)])
def test_the_sheets_show_the_most_wrong_and_the_least_sure(devices, batch_size, monkeypatch):
    labels, logits = random(6)
    evaluator, state = build(labels, logits, devices, batch_size, names=tuple("abcdef"), images=9)
    dict(evaluator.run(state))
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    guesses, losses = logits.argmax(1), -log_p[np.arange(N), labels]
    first, second = np.sort(np.exp(log_p), 1)[:, :-3:-1].T
    wrong = [i for i in np.argsort(-losses) if guesses[i] != labels[i]][:9]
    say = lambda i: (f"image {i}", f"is {'abcdef'[labels[i]]}", f"says {'abcdef'[guesses[i]]}  {first[i]:.0%}")  # noqa: E731
    assert shown(evaluator, monkeypatch) == [
        [say(i) for i in wrong], [say(i) for i in np.argsort(first - second)[:9]]]


def test_several_labels_none_and_broken_examples():
    labels, logits = random(4)
    labels = np.stack([labels, np.roll(labels, 1)], 1)
    labels[[0, 50]] = -1
    evaluator, state = build(labels, logits, broken=(3, 77), skip_errors=0.1)
    dict(evaluator.run(state))
    expected = np.zeros((4, 4), int)
    for i in set(range(N)) - {0, 50, 3, 77}:
        own = [label for label in labels[i] if label >= 0]
        expected[max(own, key=lambda label: logits[i, label]), logits[i].argmax()] += 1
    found = matrix(dict(evaluator.files())["confusion.csv"], [f"class {number}" for number in range(4)])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", ["all right", "no label", "many classes"])
def test_there_is_always_something_to_draw(case):
    classes = 40 if case == "many classes" else 3
    labels, logits = random(classes)
    if case == "all right":
        logits = 9 * np.eye(classes, dtype=np.float32)[labels]
    evaluator, state = build(np.full(N, -1) if case == "no label" else labels, logits)
    metrics, files = dict(evaluator.run(state)), dict(evaluator.files())
    assert np.isnan(metrics["mean_class_acc"]) == (case == "no label")
    assert metrics["mean_class_acc"] == 1 or case != "all right"
    assert sorted(files) == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert Image.open(io.BytesIO(files[name])).format == "PNG"


def test_files_are_left_in_folders_called_as_the_metrics(tmp_path):
    labels, logits = random(3)
    names = ("\x1b[31mred\u202e", "=1+1", 'a "b", c')
    evaluator, state = build(labels, logits, names=names, ema={"logits": jnp.asarray(-logits)})
    found = common.measure(evaluator, state, tmp_path / "run")
    assert found.keys() == {f"{ema}mistakes/{metric}_class_acc" for ema in ("", "ema/") for metric in ("mean", "worst")}
    for folder, sign in (("mistakes", 1), ("ema/mistakes", -1)):
        assert sorted(path.name for path in (tmp_path / "run" / folder).iterdir()) == FILES
        text = (tmp_path / "run" / folder / "confusion.csv").read_text()
        assert "\x1b" not in text and "\u202e" not in text
        np.testing.assert_array_equal(matrix(text, [r"\x1b[31mred\u202e", *names[1:]]),
                                      confusion_matrix(labels, (sign * logits).argmax(1)))
    assert found == common.measure(evaluator, state)  # nothing is written where no folder is given


@pytest.mark.parametrize("settings, message", [
    (dict(images=0), "val.images: must be from 1 to 64"), (dict(images=65), "val.images: must be from 1 to 64"),
    *((dict(prefix=prefix), f"val.prefix: {prefix!r} is to be a folder of the run's own")
      for prefix in ("", "/", "../", "checkpoints/", "metrics.jsonl", "a//b/", ".lock"))])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build(*random(3), **settings)
    assert str(error.value).startswith(message)
