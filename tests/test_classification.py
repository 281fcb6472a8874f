"""The classification evaluator against numpy, over every example once, on any number of devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Numbered
from helpers import predict_numbered as predict
from scipy.special import log_softmax

from cb_vit import dist
from cb_vit.config import ConfigError, parse
from cb_vit.datasets.core import DataError
from cb_vit.evaluators import common
from cb_vit.evaluators.classification import Evaluator, batch_sums
from cb_vit.input_pipeline import InputConfig, Pipeline
from cb_vit.train_state import TrainState

N = 101


def evaluate(labels, logits, devices=1, batch_size=8, broken=(), **settings):
    """The metrics that the evaluator yields."""
    classes = logits.shape[1]
    mesh = dist.create_mesh([("data", -1)], devices=jax.devices()[:devices])
    pp = f"onehot({classes})"
    config = common.read_evaluator(
        BLOCK | dict(pp_fn=pp, batch_size=batch_size, prefix="", num_workers=0, num_threads=2, prefetch=2) | settings,
        "val")
    sharding = dist.batch_sharding(mesh, "data")
    rows = dist.local_rows(sharding, batch_size)
    evaluator = Evaluator(predict, config=config, sharding=sharding, pipeline=Pipeline(
        config, Numbered(labels, classes, broken), config.pp_fn, rows))
    state = TrainState(jnp.int32(0), {"logits": jnp.asarray(logits)}, (), jnp.asarray(True))
    state = jax.device_put(state, dist.replicated(mesh))
    return dict(evaluator.run(state))


def expected(labels, logits, loss="softmax_xent", rows=None):
    """The same by hand, an example after the other, in float64."""
    hits1, hits5, losses = [], [], []
    for i in range(len(labels)) if rows is None else rows:
        own = {int(label) for label in np.atleast_1d(labels[i]) if label >= 0}
        if not own:
            continue
        ranked = np.argsort(-logits[i].astype(np.float64))
        hits1.append(ranked[0] in own)
        hits5.append(bool(own & set(ranked[:5].tolist())))
        if loss == "softmax_xent":
            losses.append(-sum(log_softmax(logits[i].astype(np.float64))[label] for label in own))
        else:
            signs = np.where(np.isin(np.arange(logits.shape[1]), list(own)), -1.0, 1.0)
            losses.append(np.logaddexp(0, signs * logits[i].astype(np.float64)).sum())
    metrics = {"prec@1": np.mean(hits1), "loss": np.mean(losses)}
    return metrics | ({"prec@5": np.mean(hits5)} if logits.shape[1] > 5 else {})


def random(classes, per_example=1, seed=0):
    """(labels, logits); among several labels, -1 is none."""
    rng = np.random.default_rng(seed)
    shape = (N, per_example) if per_example > 1 else N
    return rng.integers(-1 if per_example > 1 else 0, classes, shape), rng.normal(size=(N, classes)).astype(np.float32)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:  # counts are exact: the only rounding is that of one division
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6 if name == "loss" else 1e-15, err_msg=name)


@pytest.mark.parametrize("devices, batch_size", [(1, 8), (1, 1), (1, 101), (1, 200), (3, 12), (3, 3), (8, 8), (8, 64)])
def test_every_example_counts_once_on_any_devices(devices, batch_size):
    labels, logits = random(10)
    assert_same(evaluate(labels, logits, devices, batch_size), expected(labels, logits))


@pytest.mark.parametrize("loss", ["softmax_xent", "sigmoid_xent"])
def test_several_labels_any_is_right_and_rows_without_one_are_left_out(loss):
    labels, logits = random(10, per_example=3)
    labels[[0, 7, 55]] = -1
    assert_same(evaluate(labels, logits, 3, 12, loss_name=loss), expected(labels, logits, loss))


def test_top_five_is_left_out_where_it_means_nothing():
    for classes in (3, 5, 6):
        labels, logits = random(classes)
        assert ("prec@5" in evaluate(labels, logits)) == (classes > 5)
        assert_same(evaluate(labels, logits), expected(labels, logits))


def test_without_labels_there_is_nothing_to_measure():
    labels, logits = random(10)
    assert all(np.isnan(value) for value in evaluate(np.full(N, -1), logits).values())


def test_broken_examples_fail_or_are_left_out():
    labels, logits = random(10)
    with pytest.raises(DataError, match="example 3 is broken"):
        evaluate(labels, logits, broken=(3, 0)[:1])
    rows = sorted(set(range(N)) - {0, 40, 100})
    for devices, batch_size in ((1, 8), (5, 50), (1, 101)):  # the last batch of 50 holds the last example alone
        got = evaluate(labels, logits, devices, batch_size, broken=(0, 40, 100), skip_errors=0.03)
        assert_same(got, expected(labels, logits, rows=rows))


def test_no_more_examples_are_left_out_than_allowed():
    labels, logits = random(10)
    labels[[5, 6]] = -1  # without a label, but not broken
    assert_same(evaluate(labels, logits, broken=(7,), skip_errors=True),
                expected(labels, logits, rows=[i for i in range(N) if i != 7]))
    for broken, message in (((7, 100), "2 of 101 examples could not be read, such as example 100 is broken; mend "),
                            (range(8, 16), "of 8 examples of a batch not one could be read, such as example 8 is "),
                            (range(1, N), "of 8 examples of a batch not one could be read, such as example 8 is ")):
        with pytest.raises(DataError, match=f"^{message}"):
            evaluate(labels, logits, broken=broken, skip_errors=True)


def test_masked_rows_add_nothing_whatever_is_in_them():
    labels, logits = random(7)
    labels, mask = jnp.eye(7)[labels], jnp.arange(N) % 3 > 0
    poisoned = jnp.where(mask[:, None], logits, jnp.nan)
    args = labels, mask
    sums = batch_sums(poisoned, *args, jnp.where(mask, 1.0, jnp.nan))
    assert {name: float(x) for name, x in sums.items()} == {
        name: float(x) for name, x in batch_sums(jnp.asarray(logits), *args, jnp.ones(N)).items()}
    assert float(sums["seen"]) == float(mask.sum())


BLOCK = dict(type="classification", log_steps=5, data=dict(name="fake", split="test", num_examples=20, num_classes=3),
             pp_fn="value_range(-1, 1)|onehot(3)")


def build(**changes):
    configs = {"val": common.read_evaluator(BLOCK | changes, "config.evals.val")}
    training = parse(InputConfig, dict(data=BLOCK["data"], pp="", batch_size=16, num_threads=3))
    sharding = dist.batch_sharding(dist.create_mesh([("data", 8)]), "data")
    return common.open_all(configs, lambda config: like_training, state_shapes=None, sharding=sharding,
                           training=training, num_classes=3)["val"]


def like_training(state, images):
    """A model for images of 32 pixels."""
    return images.reshape(-1, 32 * 32 * 3)[:, :3], {}


def test_an_evaluator_takes_from_its_surroundings_what_it_does_not_say():
    assert (build().config.num_threads, build(num_threads=1).config.num_threads) == (3, 1)
    assert (build().config.batch_size, build().config.prefix) == (16, "val/")
    assert (build(batch_size=8, prefix="").config.batch_size, build(prefix="").config.prefix) == (8, "")


@pytest.mark.parametrize("changes, message", [
    (dict(type=None), "config.evals.val.type: required: classification"),
    (dict(type="clasification"), "config.evals.val.type: unknown evaluator 'clasification'; did you mean"),
    (dict(loss_name="xent"), "config.evals.val.loss_name: unknown loss 'xent'"),
    (dict(los_name="softmax_xent"), "config.evals.val.los_name: unknown; did you mean loss_name?"),
    (dict(log_steps=None), "config.evals.val.log: required and not set"),
    (dict(pp_fn="onehott(3)"), "config.evals.val.pp_fn: "),
    (dict(pp_fn="value_range|onehot(4)"), "config.evals.val.pp_fn: onehot has 4 classes, the model 3"),
    (dict(pp_fn="value_range"), "config.evals.val.pp_fn: must make one-hot labels of 3 classes"),
    (dict(pp_fn="onehot(3)"), "config.evals.val.pp_fn: must hand the model a float32 image; add value_range"),
    (dict(pp_fn="resize(20)|value_range|onehot(3)"), "config.evals.val.pp_fn: the model cannot take its images, (20,"),
    (dict(data=dict(name="fake")), "config.evals.val.data.split: "),
    (dict(log_steps=0), "config.evals.val.log_steps: must be more than 0"),
    (dict(batch_size=0), "config.evals.val.batch_size: must be at least 1, got 0")])
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as error:
        build(**changes)
    assert str(error.value).startswith(message)


def test_a_block_without_a_type_is_refused():
    with pytest.raises(ConfigError, match="config.evals.val.type: required: classification"):
        common.read_evaluator({"log_steps": 1}, "config.evals.val")
