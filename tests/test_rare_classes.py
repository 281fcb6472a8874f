"""Rare classes: the order that shows them more often, and the weights that let them count more."""
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cb_vit import datasets, experiment, losses
from cb_vit.config import ConfigError
from cb_vit.datasets.contents import Contents, DataError
from cb_vit.datasets.rare_classes import class_weights, labels_of
from cb_vit.datasets.relabel import Relabelled
from cb_vit.input_pipeline import Pipeline
from cb_vit.order import BalancedOrder
from cb_vit.settings import check

COUNTS = (60, 20, 3, 1)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


@dataclasses.dataclass(frozen=True)
class Listed:
    """A source that is no more than its labels."""

    given: np.ndarray
    class_names: tuple[str, ...] | None = ("a", "b", "c", "d")
    num_classes: int = 4

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return {"image": np.zeros((4, 4, 3), np.uint8), "label": int(self.given[index]), "id": str(index)}


@pytest.mark.parametrize(("balance", "shares"), [
    (1.0, [21, 21, 21, 21]), (0.5, [42, 24, 10, 8]), (1e-9, COUNTS)])  # 84 √n / Σ √n: 42.6, 24.6, 9.5, 5.5
def test_an_epoch_holds_the_classes_in_their_shares(balance, shares):
    order = BalancedOrder(LABELS, balance, seed=3)
    exact = np.array(COUNTS) ** (1 - balance)
    exact = exact / exact.sum() * len(LABELS)
    for epoch in range(3):
        drawn = LABELS[[order[epoch * len(LABELS) + place] for place in range(len(LABELS))]]
        found = np.bincount(drawn, minlength=4)
        assert found.sum() == len(LABELS) and np.all(np.abs(found - exact) < 1)
        if balance != 0.5:
            assert found.tolist() == list(shares)
        assert len(set(drawn[:21])) > 1  # mixed, not class by class


def test_a_class_goes_through_all_its_examples_before_one_comes_again():
    order = BalancedOrder(LABELS, 1.0, seed=0)
    drawn = np.array([order[place] for place in range(4 * len(LABELS))])
    for label, count in enumerate(COUNTS):
        own = drawn[LABELS[drawn] == label]
        # Inside an epoch the draws of a class are permuted with all others, so only whole numbers of rounds tell.
        times = np.bincount(own, minlength=len(LABELS))[LABELS == label]
        assert len(own) == 84 and times.max() - times.min() <= 1 and len(times) == count


def test_the_order_is_a_function_of_seed_and_position():
    order, again, other = (BalancedOrder(LABELS, 0.7, seed) for seed in (1, 1, 2))
    places = np.random.default_rng(0).permutation(500).tolist()
    found = {place: order[place] for place in places}
    assert found == {place: again[place] for place in range(500)} != {place: other[place] for place in range(500)}
    assert [order[place] for place in range(84)] != [order[place + 84] for place in range(84)]


def config(**changes):
    data = dict(name="fake", split="train", num_examples=64, image_size=4, num_classes=4)
    return dict(seed=0, total_steps=8, lr=1e-3, schedule=dict(decay_type="constant"), plot=False, model=dict(
        patch_size=2, width=8, depth=1, mlp_dim=8, num_heads=2), input=dict(
            data=data, batch_size=8, balance=1.0, pp="value_range(-1, 1)|onehot"), **changes)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_pipeline_follows_it_from_any_step_and_for_any_rows(repeats):
    block = config()["input"] | dict(repeats=repeats, virtual_ranks=2)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (200, 40, 10, 6)))
    settings = check(config() | dict(input=block)).for_classes(4).input
    pipeline = Pipeline(settings, Listed(labels), settings.pp, np.arange(8))
    whole = np.concatenate([batch["label"] for batch in pipeline.train(0, 0, 32)])
    assert np.bincount(whole).tolist() == [64, 64, 64, 64] or repeats > 1
    late = dataclasses.replace(pipeline, rows=np.array([1, 6]))
    late = np.concatenate([batch["label"] for batch in late.train(0, 20, 32)])
    np.testing.assert_array_equal(late.reshape(-1, 2), whole.reshape(-1, 8)[20:, [1, 6]])


@pytest.mark.parametrize("how", ["balanced", "sqrt"])
def test_weights_are_what_they_say_and_one_in_the_mean(how):
    from sklearn.utils.class_weight import compute_class_weight

    found = class_weights(how, Listed(LABELS), False, "x")
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS)
    np.testing.assert_allclose(np.mean(found[LABELS]), 1, rtol=1e-6)
    proportional = expected if how == "balanced" else np.sqrt(expected)
    np.testing.assert_allclose(found / found[0], proportional / proportional[0], rtol=1e-6)


def test_classes_without_examples_weigh_nothing_and_names_can_be_given():
    found = class_weights("balanced", Listed(LABELS[LABELS != 2]), False, "x")
    assert found[2] == 0 and np.isfinite(found).all()
    np.testing.assert_array_equal(class_weights({"b": 2.5, "d": 0}, Listed(LABELS), False, "x"), [1, 2.5, 1, 0])
    for given, message in (({"bb": 1.0}, "x.bb: no class of the 4 is called so; did you mean b"),
                           ({"b": -1.0}, "x.b: a weight is a number of 0 or more, got -1")):
        with pytest.raises(ConfigError, match=message):
            class_weights(given, Listed(LABELS), False, "x")


def test_labels_come_through_relabelling_and_those_without_are_left_out():
    moved = Relabelled(Listed(np.array([0, 1, 3, -1, 1])), (2, 0, 1, -1), 3, None)
    assert labels_of(moved).tolist() == [2, 0, -1, -1, 0]
    np.testing.assert_allclose(class_weights("balanced", moved, False, "x"), [0.75, 0, 1.5])
    order = BalancedOrder(labels_of(moved), 1.0, 0)
    assert {order[place] for place in range(50)} == {0, 1, 4}
    with pytest.raises(ConfigError, match="^x: goes by labels, and not one example has one"):
        class_weights("sqrt", Listed(np.array([-1, -1])), False, "x")


def test_an_example_that_cannot_be_read_has_no_label_where_that_is_allowed():
    class Broken(Listed):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("gone")
            return super().__getitem__(index)

    assert labels_of(Broken(np.array([0, 1, 2])), skip_errors=True).tolist() == [0, -1, 2]
    with pytest.raises(DataError, match="^example 1: gone"):
        labels_of(Broken(np.array([0, 1, 2])))


def test_labels_that_cannot_be_gone_by_are_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(datasets, "open_source", lambda block, path: Listed(np.full(64, -1)))
    with pytest.raises(ConfigError, match="^config.input.balance: goes by labels"):
        experiment.build(check(config()))


def test_threads_that_ask_for_several_epochs_get_what_one_gets():
    order, alone = (BalancedOrder(LABELS, 1.0, seed=0) for _ in range(2))
    places = [84 * epoch + place for place in range(40) for epoch in range(9)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(order.__getitem__, places))
    finally:
        sys.setswitchinterval(before)
    assert found == [alone[place] for place in places]
    assert pickle_copy(order)[5] == alone[5]


def pickle_copy(order):
    """As it comes to a worker process."""
    return ForkingPickler.loads(ForkingPickler.dumps(order))


def test_the_weighted_loss_is_that_of_numpy_on_mixed_labels():
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), 5), rng.uniform(0, 3, 4)
    loss = losses.weighted(losses.softmax_xent, jnp.float32(weights))
    expected = -np.sum(weights * labels * scipy.special.log_softmax(logits, axis=-1), axis=-1)
    np.testing.assert_allclose(loss(jnp.float32(logits), jnp.float32(labels)), expected, rtol=1e-5)


def test_training_weighs_its_classes_and_refuses_what_it_cannot(monkeypatch):
    source = Listed(np.random.default_rng(0).permutation(np.repeat(np.arange(4), (40, 16, 6, 2))))
    monkeypatch.setattr(datasets, "open_source", lambda block, path: source)
    logits, labels = jnp.float32(np.random.default_rng(0).normal(size=(4, 4))), jnp.eye(4)
    plain, weighted = (experiment.build(check(config(class_weights=how))).loss(logits, labels)
                       for how in (None, "balanced"))
    np.testing.assert_allclose(weighted / plain, [64 / (4 * count) for count in (40, 16, 6, 2)], rtol=1e-5)
    for changes, message in ((dict(loss="bce", class_weights="balanced"), "^config.class_weights: are for loss='soft"),
                             (dict(class_weights="even"), "^config.class_weights: .*'even'"),
                             (dict(input=config()["input"] | dict(balance=1.5)), "^config.input.balance: goes from 0")):
        with pytest.raises(ConfigError, match=message):
            check(config() | changes)


def test_contents_that_know_the_counts_are_not_read():
    class Counted(Listed):
        contents = Contents(counts=np.array(COUNTS))

        def __getitem__(self, index):
            raise AssertionError("no example is to be read")

    np.testing.assert_array_equal(class_weights("balanced", Counted(LABELS), False, "x"),
                                  class_weights("balanced", Listed(LABELS), False, "x"))
