"""Few-shot regression against closed forms in NumPy; which examples are chosen."""
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import After, Numbered, open_evaluator, predict_features

from cb_vit.config import ConfigError
from cb_vit.datasets.core import DataError
from cb_vit.evaluators.fewshot_lsr import choose, regress

TEST, TRAIN, WIDTH, CLASSES = 53, 120, 6, 4
TRAIN_DATA = dict(name="fake", split="train")


def random():
    """(labels, features) of the test examples and then of those for training."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.integers(0, CLASSES, TEST), rng.permutation(TRAIN) % CLASSES])
    features = rng.normal(size=(CLASSES, WIDTH))[labels] + rng.normal(size=(len(labels), WIDTH))
    features[:, 2] = 7  # says nothing, and has no spread
    return labels, (features * 10 + 3).astype(np.float32)


def build(labels, features, broken=(), **settings):
    train = After(TEST, labels[TEST:].tolist(), CLASSES, broken)
    sources = {"data": Numbered(labels[:TEST], CLASSES), "train_data": train}
    return open_evaluator("fewshot_lsr", sources, predict_features, {"logits": jnp.asarray(features)},
                          f"onehot({CLASSES})", **dict(train_data=TRAIN_DATA) | settings)


def solve(x, label, strength):
    """The matrix by the normal equations of all features, or with no penalty the shortest of all solutions."""
    x = x.astype(np.float64)
    x = np.column_stack([(x - x.mean(0)) / (x.std(0) + 1e-5), np.full(len(x), 100.0)])
    y = np.where(label[:, None] == np.arange(CLASSES), 1.0, -1.0)
    if not strength:
        return np.linalg.lstsq(x, y, rcond=None)[0]
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


@pytest.mark.parametrize("examples", [3, WIDTH, WIDTH + 1, 40])  # fewer than features and more
def test_one_decomposition_solves_for_every_penalty(examples):
    labels, features = random()
    features = np.delete(features, 2, axis=1)[:examples]
    fitted = regress(features, labels[:examples], CLASSES, (0.5, 1024.0, 1e-7))
    for weights, strength in zip(fitted.weights, (0.5, 1024.0, 0), strict=True):
        np.testing.assert_allclose(weights, solve(features, labels[:examples], strength), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("devices, batch_size", [(1, 8), (8, 64)])
def test_the_accuracies_are_those_of_the_normal_equations(devices, batch_size):
    labels, features = random()
    evaluator, state = build(labels, features, devices=devices, batch_size=batch_size, l2_reg=(1.0, 1024.0))
    found = dict(evaluator.run(state))
    chosen, expected = choose(evaluator.train_data, 10, 3), {}
    for shots in (1, 5, 10):
        for strength in (1.0, 1024.0):
            accuracies = []
            for seed in chosen:
                rows = TEST + np.concatenate([one[:shots] for one in seed])
                weights, x = solve(features[rows], labels[rows], strength), features[rows].astype(np.float64)
                test = (features[:TEST] - x.mean(0)) / (x.std(0) + 1e-5)
                scores = np.column_stack([test, np.full(TEST, 100.0)]) @ weights
                accuracies.append(np.mean(scores.argmax(1) == labels[:TEST]))
            name = f"shots_{shots}/l2_{strength:g}"
            expected |= {f"{name}/prec@1": np.mean(accuracies), f"{name}/std": np.std(accuracies, ddof=1)}
    assert list(found) == list(expected) and found == pytest.approx(expected)
    assert 0.3 < found["shots_10/l2_1/prec@1"] < 1


def test_shots_are_of_every_class_and_more_of_them_hold_the_fewer():
    evaluator, _ = build(*random(), seeds=2)
    labels = random()[0][TEST:]
    ten, three = (choose(evaluator.train_data, shots, 2) for shots in (10, 3))
    for more, fewer in zip(ten, three, strict=True):
        for label in range(CLASSES):
            assert set(labels[more[label]]) == {label} and len(set(more[label].tolist())) == 10
            np.testing.assert_array_equal(more[label][:3], fewer[label])
    assert any((a != b).any() for a, b in zip(*ten, strict=True))


def test_with_one_seed_and_one_penalty_names_are_short_and_broken_examples_are_left_out():
    labels, features = random()
    evaluator, state = build(labels, features, skip_errors=0.5, seeds=1, shots=(TRAIN // CLASSES,))
    evaluator.train_data.source.broken = broken = range(0, TRAIN, 9)  # their labels could be read
    found = dict(evaluator.run(state))
    rows = TEST + np.setdiff1d(np.arange(TRAIN), broken)
    x = features[rows].astype(np.float64)
    test = np.column_stack([(features[:TEST] - x.mean(0)) / (x.std(0) + 1e-5), np.full(TEST, 100.0)])
    guesses = (test @ solve(features[rows], labels[rows], 1024.0)).argmax(1)
    assert found == {f"shots_{TRAIN // CLASSES}/prec@1": pytest.approx(np.mean(guesses == labels[:TEST]))}


def test_several_labels_are_refused():
    labels, features = random()
    evaluator, state = build(labels, features)
    evaluator._chosen.source.source.labels = np.stack([labels[TEST:], (labels[TEST:] + 1) % CLASSES], 1)
    with pytest.raises(DataError, match="train_data: examples have several labels"):
        dict(evaluator.run(state))


@pytest.mark.parametrize("settings, message", [
    (dict(shots=(1, 31)), "val.shots: 31 are more than the 30 examples of 'class 0' in train_data; give less"),
    (dict(shots=()), "val.shots: must be different numbers"), (dict(shots=(0,)), "val.shots: must be different"),
    (dict(l2_reg=(0.0,)), "val.l2_reg: must be different numbers above 0"), (dict(l2_reg=()), "val.l2_reg: must be"),
    (dict(l2_reg=(1.0, 1.0)), "val.l2_reg: must be different"), (dict(seeds=0), "val.seeds: must be at least 1"),
    (dict(train_data=None), "val.train_data: required")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build(*random(), **settings)
    assert str(error.value).startswith(message)
