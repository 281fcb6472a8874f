"""Calibration against scikit-learn, scipy and numpy in float64; temperatures; what is fitted is not measured."""
import csv
import io

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Numbered, open_evaluator, predict_numbered
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from cb_vit.config import ConfigError
from cb_vit.datasets.chosen import draw
from cb_vit.datasets.core import DataError
from cb_vit.evaluators import calibration
from cb_vit.evaluators.calibration import calibration_error, fit_temperature, mass_bins, width_bins

N, CLASSES = 101, 6
PNG = b"\x89PNG"


def random(seed=0, n=N):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    return labels, (3 * rng.normal(size=(n, CLASSES)) + 3 * np.eye(CLASSES)[labels]).astype(np.float32)


def build(labels, logits, broken=(), sources=None, **settings):
    sources = {"data": Numbered(labels, CLASSES, broken)} | (sources or {})
    return open_evaluator("calibration", sources, predict_numbered, {"logits": jnp.asarray(logits)},
                          f"onehot({CLASSES})", **settings)


def by_hand(labels, logits, bins=15, temperature=1.0):
    """The metrics of one label an example, by libraries."""
    p = softmax(logits.astype(np.float64) / temperature, axis=1)
    confidence, right = p.max(1), p.argmax(1) == labels
    number = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    gaps = [abs(confidence[number == m].sum() - right[number == m].sum()) for m in range(bins)]
    parts = np.array_split(np.argsort(confidence), bins)
    return {"ece": sum(gaps) / len(labels),
            "ece_mass": sum(abs(confidence[i].sum() - right[i].sum()) for i in parts) / len(labels),
            "nll": log_loss(labels, p, labels=range(CLASSES)),
            "brier": brier_score_loss(labels, p, labels=range(CLASSES), scale_by_half=False)}


def least_nll(labels, logits):
    """The best temperature, in T itself, without a derivative."""
    def nll(log_t):
        return -np.mean(log_softmax(logits.astype(np.float64) / np.exp(log_t), axis=1)[np.arange(len(labels)), labels])

    return np.exp(minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).x)


@pytest.mark.parametrize("devices, batch_size", [(1, 200), (3, 12)])
def test_the_numbers_are_those_of_scikit_learn(devices, batch_size):
    labels, logits = random()
    evaluator, state = build(labels, logits, devices=devices, batch_size=batch_size)
    assert dict(evaluator.run(state)) == pytest.approx(by_hand(labels, logits), rel=1e-5)


@pytest.mark.parametrize("strategy, bins_of", [("uniform", width_bins), ("quantile", mass_bins)])
def test_bins_are_those_of_a_calibration_curve(strategy, bins_of):
    confidence = np.random.default_rng(1).beta(3, 1, 300)
    right = np.random.default_rng(2).random(300) < confidence**2
    found = [one for one in bins_of(confidence, right, 15) if one.examples]
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy=strategy)
    np.testing.assert_allclose([one.accuracy for one in found], accuracy, rtol=1e-12)
    np.testing.assert_allclose([one.confidence for one in found], mean, rtol=1e-12)
    assert sum(one.examples for one in found) == 300
    if strategy == "quantile":
        assert {one.examples for one in found} == {20}


def test_bins_end_where_the_paper_has_them_and_ties_have_no_order():
    confidence, right = np.array([0.5, 0.5, 1.0, 0.2]), np.array([True, False, True, False])
    found = width_bins(confidence, right, 2)
    assert [(one.low, one.high, one.examples, one.accuracy) for one in found] == [(0, 0.5, 3, 1 / 3), (0.5, 1, 1, 1)]
    assert calibration_error(found) == pytest.approx(3 / 4 * abs(1 / 3 - 0.4))
    rng = np.random.default_rng(3)
    confidence, right = rng.choice([0.3, 0.6, 1.0], 50), rng.random(50) < 0.5
    errors = {round(calibration_error(mass_bins(confidence[order], right[order], 7)), 12)
              for order in (rng.permutation(50) for _ in range(5))}
    assert len(errors) == 1
    assert np.isnan(calibration_error(width_bins(np.zeros(0), np.zeros(0, bool), 3)))
    assert len(mass_bins(np.array([0.5]), np.array([True]), 15)) == 1


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_temperature_is_that_of_the_least_nll(scale):
    labels, logits = random(4, 300)
    logits *= scale
    true = logits[np.arange(300), labels]
    assert fit_temperature(logits, true) == pytest.approx(least_nll(labels, logits), rel=1e-6)
    # Other logits for the same probabilities.
    shift = np.random.default_rng(5).normal(size=(300, 1)).astype(np.float32) * 100
    assert fit_temperature(logits + shift, true + shift[:, 0]) == pytest.approx(fit_temperature(logits, true), rel=1e-4)


def test_where_there_is_no_least_nll_the_temperature_ends_at_its_bounds():
    labels, _ = random()
    perfect = 5 * np.eye(CLASSES)[labels]
    assert fit_temperature(perfect, np.full(N, 5.0)) == 0.01
    assert fit_temperature(-perfect, np.full(N, -5.0)) == 100
    assert fit_temperature(np.ones((N, CLASSES)), np.ones(N)) == 1


@pytest.mark.parametrize("how", ["holdout", "fit", "few"])
def test_a_temperature_is_fitted_on_what_is_not_measured(how, monkeypatch):
    if how != "holdout":  # drawn once is enough
        monkeypatch.setattr(calibration, "draw_reliability", lambda *_: PNG)
    labels, logits = random()
    if how == "fit":
        fitted, measured = np.arange(60), np.arange(N)
        evaluator, state = build(labels, logits, sources={"fit": Numbered(labels[:60], CLASSES)},
                                 fit=dict(name="fake", split="train"))
    else:
        held = draw(N, 30, 3)
        fitted = held if how == "holdout" else held[draw(30, 20, 3)]
        measured = np.setdiff1d(np.arange(N), held)
        evaluator, state = build(labels, logits, holdout=0.3, seed=3, fit_examples=20 if how == "few" else 10_000)
    found = dict(evaluator.run(state))
    temperature = least_nll(labels[fitted], logits[fitted])
    assert found.pop("temperature") == pytest.approx(temperature, rel=1e-5)
    rest = labels[measured], logits[measured]
    assert found == pytest.approx(by_hand(*rest) | {
        f"scaled/{name}": value for name, value in by_hand(*rest, temperature=temperature).items()}, rel=1e-4)

    files = dict(evaluator.files())
    assert sorted(files) == ["reliability.csv", "reliability.png", "reliability_scaled.csv"]
    assert files["reliability.png"].startswith(PNG)
    for name, prefix in (("reliability.csv", ""), ("reliability_scaled.csv", "scaled/")):
        rows = list(csv.DictReader(io.StringIO(files[name])))
        assert list(rows[0]) == ["bins", "low", "high", "examples", "confidence", "accuracy"]
        for kind, metric in (("width", "ece"), ("mass", "ece_mass")):
            bins = [{key: float(value) for key, value in row.items() if key != "bins"}
                    for row in rows if row["bins"] == kind]
            assert sum(row["examples"] for row in bins) == len(measured)
            assert all(row["low"] - 1e-6 <= row["confidence"] <= row["high"] + 1e-6 for row in bins)
            gaps = sum(row["examples"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / len(measured)
            assert gaps == pytest.approx(found[prefix + metric], abs=1e-5)


def test_several_labels_none_and_broken_examples():
    labels, logits = random()
    labels = np.stack([labels, np.roll(labels, 1)], 1)
    labels[[0, 50]] = -1
    evaluator, state = build(labels, logits, broken=(3, 77), skip_errors=0.1)
    found, rows = dict(evaluator.run(state)), sorted(set(range(N)) - {0, 50, 3, 77})
    p = softmax(logits.astype(np.float64), axis=1)
    targets = np.stack([np.mean([np.eye(CLASSES)[label] for label in set(labels[i].tolist())], 0) for i in rows])
    right = np.array([p[i].argmax() in labels[i] for i in rows])
    assert found["nll"] == pytest.approx(-np.mean(np.sum(targets * np.log(p[rows]), 1)), rel=1e-5)
    assert found["brier"] == pytest.approx(np.mean(np.sum((p[rows] - targets) ** 2, 1)), rel=1e-5)
    assert found["ece"] == pytest.approx(calibration_error(width_bins(p[rows].max(1), right, 15)), rel=1e-5)


def test_without_labels_there_is_nothing_to_measure_and_nothing_to_fit():
    _, logits = random()
    evaluator, state = build(np.full(N, -1), logits)
    assert all(np.isnan(value) for value in dict(evaluator.run(state)).values())
    assert sorted(dict(evaluator.files())) == ["reliability.csv", "reliability.png"]
    evaluator, state = build(np.full(N, -1), logits, holdout=0.5)
    with pytest.raises(DataError, match="no example that the temperature would be fitted on has a label"):
        dict(evaluator.run(state))


@pytest.mark.parametrize("settings, message", [
    (dict(bins=0), "val.bins: must be at least 1, got 0"), (dict(fit_examples=0), "val.fit_examples: must be at least"),
    *((dict(holdout=share), f"val.holdout: is a share between 0 and 1, got {share}") for share in (0.0, 1.0, -0.1)),
    (dict(holdout=0.5, fit=dict(name="fake", split="train")), "val.fit: and holdout both say"),
    (dict(fit=dict(name="fake", split="test")), "val.fit: is the data that is measured"),
    (dict(fit=dict(split="train")), "val.fit.name: required"), (dict(seed=-1), "val.seed: must be in [0, 2³²)"),
    (dict(prefix="checkpoints/"), "val.prefix: 'checkpoints/' is to be a folder of the run's own")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build(*random(), **settings)
    assert str(error.value).startswith(message)


def test_one_example_cannot_be_divided():
    with pytest.raises(ConfigError, match=r"^val.holdout: divides the examples, and there is 1; give more"):
        build(*(part[:1] for part in random()), holdout=0.5)
