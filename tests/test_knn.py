"""Nearest neighbours against scikit-learn; whose numbers classes have; models without a head."""
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, After, Numbered, open_evaluator, photographs, predict_features
from sklearn.neighbors import KNeighborsClassifier

import cb_vit
from cb_vit import dist
from cb_vit.config import ConfigError, parse
from cb_vit.datasets.core import DataError
from cb_vit.evaluators import common
from cb_vit.input_pipeline import InputConfig
from cb_vit.tools import cli, eval_only
from cb_vit.train_state import TrainState
from cb_vit.weights.containers import write_npz
from cb_vit.weights.dialects.big_vision import to_big_vision

TEST, TRAIN, WIDTH, CLASSES = 53, 101, 5, 7
TRAIN_DATA = dict(name="fake", split="train")
STATE = TrainState(jnp.int32(0), {}, (), jnp.asarray(True))


def random(classes=CLASSES):
    """(labels, features) of the test examples and then of those for training."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, TEST + TRAIN)
    centres = rng.normal(size=(classes, WIDTH))
    return labels, (centres[labels] + rng.normal(size=(len(labels), WIDTH))).astype(np.float32) * 3


def build(labels, features, broken=(), **settings):
    sources = {"data": Numbered(labels[:TEST], CLASSES), "train_data": After(TEST, labels[TEST:], CLASSES, broken)}
    return open_evaluator("knn", sources, predict_features, {"logits": jnp.asarray(features)}, f"onehot({CLASSES})",
                          **dict(train_data=TRAIN_DATA, k=(1, 5, 20, TRAIN)) | settings)


def by_hand(labels, features, ks, temperature, train=None):
    """The metrics as scikit-learn's votes give them."""
    train = np.arange(TEST, TEST + TRAIN) if train is None else np.asarray(train) + TEST
    features, found = features.astype(np.float64), {}
    for k in ks:
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                     weights=lambda distance: np.exp((1 - distance) / temperature))
        model.fit(features[train], labels[train])
        votes = model.predict_proba(features[:TEST])
        ranked = model.classes_[np.argsort(-votes, axis=1)]
        given = np.take_along_axis(votes, np.argsort(-votes, axis=1), 1) > 0
        hits = (ranked == labels[:TEST, None]) & given
        found[f"k_{k}/prec@1"] = hits[:, 0].mean()
        if k >= 5:
            found[f"k_{k}/prec@5"] = hits[:, :5].any(1).mean()
    return found


@pytest.mark.parametrize("devices, batch_size, temperature, layer", [
    (1, 200, 0.07, "pre_logits"),
    (8, 24, 0.005, "encoder/twice")])  # exp(1 / 0.005) is infinite in float32; and an angle does not know of a factor
def test_the_votes_are_those_of_scikit_learn(devices, batch_size, temperature, layer):
    evaluator, state = build(*random(), devices=devices, batch_size=batch_size, temperature=temperature,
                             representation_layer=layer)
    found = dict(evaluator.run(state))
    assert found == pytest.approx(by_hand(*random(), (1, 5, 20, TRAIN), temperature))
    assert len(found) == 7 and 0.3 < found["k_20/prec@1"] < 1
    assert dict(evaluator.run(state)) == found  # nothing of the first run is left


def test_what_has_no_label_or_cannot_be_read_is_nobodys_neighbour():
    labels, features = random()
    unlabelled = labels.copy()
    unlabelled[[TEST + 4, 7]] = -1
    evaluator, state = build(unlabelled, features, broken=(3, 99), skip_errors=0.1, k=(5, 98))
    found = dict(evaluator.run(state))
    labels[7] = -1
    expected = by_hand(labels, features, (5, 98), 0.07, train=sorted(set(range(TRAIN)) - {3, 4, 99}))
    assert found == pytest.approx({name: value * TEST / (TEST - 1) for name, value in expected.items()})
    evaluator, state = build(unlabelled, features, broken=(3, 99), skip_errors=0.1, k=(99,))
    with pytest.raises(DataError, match="train_data: 99 neighbours are asked for, and 98 examples have a label"):
        dict(evaluator.run(state))


def test_several_labels_are_refused_to_learn_from_but_not_to_test():
    labels, features = random()
    pairs = np.stack([labels, (labels + 1) % CLASSES], 1)
    single = np.where(np.arange(len(pairs))[:, None] < TEST, pairs, np.stack([labels, np.full_like(labels, -1)], 1))
    evaluator, state = build(single, features, k=(20,))
    one, other = (by_hand(*data, (20,), 0.07)["k_20/prec@1"] for data in (
        (labels, features), (np.where(np.arange(len(labels)) < TEST, pairs[:, 1], labels), features)))
    assert dict(evaluator.run(state))["k_20/prec@1"] == pytest.approx(one + other)  # never both
    evaluator.train_data.source.labels = pairs[TEST:]
    with pytest.raises(DataError, match="train_data: examples have several labels"):
        dict(evaluator.run(state))


@pytest.mark.parametrize("settings, message", [
    (dict(k=()), "val.k: must be different numbers of at least 1, got ()"), (dict(k=(0, 1)), "val.k: must be"),
    (dict(k=(5, 5)), "val.k: must be different"), (dict(k=(102,)), "val.k: 102 neighbours are more than the 101 "),
    (dict(temperature=0.0), "val.temperature: must be above 0"), (dict(train_data=None), "val.train_data: required"),
    (dict(temperature=float("inf")), "val.temperature: must be above 0"),
    (dict(train_data=dict(name="fake", split="test")), "val.train_data: is the data that is measured")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build(*random(), **settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("layer, message", [
    ("pre_logit", "representation_layer: the model has no 'pre_logit'; did you mean pre_logits? one vector an example "
                  "has encoder/twice, pre_logits"),
    ("encoder/pre_ln", r"representation_layer: 'encoder/pre_ln' is [1, 5] an example, and one vector is wanted: ")])
def test_a_layer_is_one_of_the_models_and_a_vector(layer, message):
    evaluator, state = build(*random(), representation_layer=layer)
    shapes = jax.eval_shape(predict_features, state, jnp.zeros((1, 1, 1, 3), int))
    with pytest.raises(ConfigError) as error:
        evaluator.check(*shapes)
    assert str(error.value).startswith(message)


def brightness(state, images):
    """A model of two classes, and features that tell the photographs apart."""
    mean = jnp.mean(images, axis=(1, 2, 3))
    return jnp.stack([mean, -mean], 1), {"pre_logits": jnp.stack([mean, jnp.ones_like(mean)], 1)}


def open_photographs(root, num_classes, pp="decode|resize(8)|value_range(-1, 1)|onehot", **settings):
    train, test = (dict(name="folder", root=str(root / home), split=split)
                   for home, split in (("a", "train"), ("b", "test")))
    block = dict(type="knn", data=test, train_data=train, log_steps=1, pp_fn=pp, batch_size=8, k=(3,), num_threads=1)
    block |= settings
    return common.open_all(
        {"knn": common.read_evaluator(block, "config.evals.knn")}, lambda config: brightness, state_shapes=None,
        sharding=dist.batch_sharding(dist.create_mesh([("data", 8)]), "data"), num_classes=num_classes,
        training=parse(InputConfig, dict(data=TRAIN_DATA, pp="", batch_size=8)), class_names=("cat", "dog"))["knn"]


def test_classes_are_those_of_the_training_part_whatever_the_model_knows(tmp_path):
    for home, split, each in (("a", "train", 4), ("b", "test", 3)):
        (photographs(tmp_path / home, each) / "flowers").rename(tmp_path / home / split)
    test = tmp_path / "b" / "test"
    shutil.rmtree(test / "daisy")  # then rose would be the first class
    for num_classes in (0, 2):
        evaluator = open_photographs(tmp_path, num_classes)
        assert dict(evaluator.run(STATE)) == {"k_3/prec@1": 1.0}
        assert common.sources_of(evaluator).keys() == {"data", "train_data"}
    open_photographs(tmp_path, 0, pp="decode|resize(8)|value_range(-1, 1)|onehot(9)")
    for changes, message in (
            (dict(pp="decode|resize(8)|value_range(-1, 1)|onehot(2)"),
             "config.evals.knn.pp_fn: onehot has 2 classes, the train_data 3; make it onehot(3)"),
            (dict(train_data=dict(name="folder", root=str(tmp_path / "a"), split="dev")),
             "config.evals.knn.train_data.split: "),
            (dict(k=(13,)), "config.evals.knn.k: 13 neighbours are more than the 12 examples"),
            (dict(representation_layer="cls"), "config.evals.knn.representation_layer: the model has no 'cls'")):
        with pytest.raises(ConfigError) as error:
            open_photographs(tmp_path, 0, **changes)
        assert str(error.value).startswith(message)
    (test / "rose").rename(test / "lily")
    with pytest.raises(ConfigError, match=r"^config\.evals\.knn\.data: .*'lily'"):
        open_photographs(tmp_path, 0)


HEADLESS = """
import configs.debug as base

def get_config():
    config = base.get_config()
    data = dict(config.input.data.to_dict(), num_examples=64)
    config.evals = dict(knn=dict(type="knn", k=(5, 10), data=dict(data, split="test"), train_data=data, log_steps=1,
                                 pp_fn="value_range(-1, 1)|onehot"))
    return config
"""


def test_weights_without_a_head_are_evaluated(tmp_path, capsys, monkeypatch):
    model = cb_vit.Model(None, variant="mu/4")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    write_npz(tmp_path / "none.npz", to_big_vision(params))
    (tmp_path / "probes.py").write_text(HEADLESS)
    monkeypatch.syspath_prepend(ROOT)
    eval_only.main(cli.parse(eval_only, [f"--config={tmp_path / 'probes.py'}", f"--weights={tmp_path / 'none.npz'}"]))
    found = dict(re.findall(r"^(\w+/\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert list(found) == [f"knn/k_{k}/prec@{top}" for k in (5, 10) for top in (1, 5)]
    assert float(found["knn/k_10/prec@1"]) > 0.3  # of ten patterns
