"""Labels of data brought to a model's classes, and training data that cannot be right."""
import logging
import pickle

import numpy as np
import pytest

from cb_vit.config import ConfigError
from cb_vit.datasets import align, for_head, known_names
from cb_vit.datasets.contents import Contents, DataError, describe, report
from cb_vit.datasets.labels import wnids
from cb_vit.datasets.relabel import Relabelled, by_index


class Listed:
    """A source that is its list of labels."""

    def __init__(self, labels, names=None, num_classes=None, counted=True, left_out=()):
        self.labels, self.class_names = labels, names and tuple(names)
        self.num_classes = num_classes or len(names)
        counts = np.bincount([label for label in labels if label >= 0], minlength=self.num_classes)
        self.contents = Contents("f", counts if counted else None, dict(left_out))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": b"", "label": self.labels[index], "id": f"example {index}"}


def labels(source):
    return [source[i]["label"] for i in range(len(source))]


def test_labels_follow_names():
    source = align(Listed([0, 1, 1, -1], ["dog", "emu"]), ("cat", "dog", "emu"), 3, "data")
    assert labels(source) == [1, 2, 2, -1] and labels(pickle.loads(pickle.dumps(source))) == [1, 2, 2, -1]
    assert (source.num_classes, source.class_names, len(source)) == (3, ("cat", "dog", "emu"), 4)
    assert source.contents.counts.tolist() == [0, 1, 2]
    same = Listed([0, 1], ["a", "b"])
    assert align(same, ("a", "b"), 2, "data") is same


def test_a_class_that_has_no_examples_may_be_unknown():
    names = ["ant", "dog"]
    assert labels(align(Listed([1, 1], names), ("cat", "dog"), 2, "data")) == [1, 1]
    with pytest.raises(ConfigError, match="class 'ant'"):
        align(Listed([1, 1], names, counted=False), ("cat", "dog"), 2, "data")
    with pytest.raises(DataError, match="example 0: is of class ant, which the model does not have"):
        _ = Relabelled(Listed([0], names), [-1, 1], 2, ("cat", "dog"))[0]


def test_another_class_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"^evals\.val\.data: class 'fox' is not among cat, dog.*labels='index'"):
        align(Listed([0, 1], ["cat", "fox"]), ("cat", "dog"), 2, "evals.val.data")


def test_numbers_of_imagenets_classes(caplog):
    caplog.set_level(logging.INFO)
    numbered = Listed([0, 1, 2], ["7", "388", "999"])
    for names in (wnids(), None):
        assert labels(align(numbered, names, 1000, "data")) == [7, 388, 999]
    assert "taken for ImageNet's" in caplog.text
    words = Listed([0, 1], ["tench", "goldfish"])
    assert labels(align(words, tuple(reversed(wnids())), 1000, "data")) == [999, 998]


def test_without_names_the_numbers_must_fit(caplog):
    caplog.set_level(logging.INFO)
    named, unnamed = Listed([0, 1], ["cat", "dog"]), Listed([0, 1], num_classes=2)
    assert align(named, None, 2, "data") is named and "names of the model's classes are not known" in caplog.text
    assert align(unnamed, ("cat", "dog"), 2, "data") is unnamed is align(unnamed, None, 3, "data")
    for source, count in ((named, 3), (named, 1), (unnamed, 1)):
        with pytest.raises(ConfigError, match=rf"has 2 classes, the model {count}"):
            align(source, None, count, "data")


def test_by_index(caplog):
    caplog.set_level(logging.INFO)
    words = by_index(Listed([0, 1], ["cat", "fox"]), "data")
    assert labels(align(words, ("cat", "dog", "emu"), 3, "data")) == [0, 1] and "labels='index'" in caplog.text
    assert known_names(words) is None and words.class_names == ("cat", "fox")  # to be shown, not compared
    numbers = by_index(Listed([0, 1, 1], ["3", "07"]), "data")
    assert labels(numbers) == [3, 7, 7] and numbers.num_classes == 8
    assert numbers.contents.counts.tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
    with pytest.raises(ConfigError, match=r"data\.labels: 'index' makes class 20261125 of the name"):
        by_index(Listed([0, 1], ["3", "20261125"]), "data")


def test_numbers_that_leave_gaps():
    """A part of ImageNet under a head of 1 000, in folders called by its numbers, needs no leave; others do."""
    numbers = by_index(Listed([0, 1], ["3", "17"]), "data")
    imagenet = head(numbers, 1000)
    assert labels(imagenet) == [3, 17] and imagenet.num_classes == 1000
    assert head(numbers, 18, allow_unused=True) is numbers
    for count in (18, 20):
        with pytest.raises(ConfigError, match=rf"makes {count} classes and the data has 2, .*; leave labels at"):
            head(numbers, count)
    with pytest.raises(ConfigError, match="makes 1000 classes and the data has 2"):
        head(by_index(Listed([0, 1], ["cat", "dog"]), "data"), 1000)


def head(source, count, known=None, allow_unused=False):
    return for_head(source, count, known, allow_unused, "config.input.data", "config.num_classes")


def test_a_head_that_fits():
    source = Listed([0, 1], ["dog", "cat"])
    assert head(source, 2) is source is head(source, 2, ("x", "y"))
    assert labels(head(source, 2, ("cat", "dog"))) == [1, 0]  # what the run, or what it begins from, calls them
    larger = head(source, 3, ("cat", "dog", "emu"))
    assert labels(larger) == [1, 0] and larger.class_names == ("cat", "dog", "emu")
    imagenet = head(Listed([0, 1], ["goldfish", "tench"]), 1000)
    assert labels(imagenet) == [1, 0] and imagenet.class_names == wnids()


@pytest.mark.parametrize("source, count, message", [
    (Listed([0, 1], ["a", "b"]), 20, r"^config\.num_classes: makes 20 classes and the data has 2"),
    (Listed([0, 1], num_classes=2), 20, r"^config\.num_classes: makes 20 classes and the data has 2"),
    (Listed([0, 1], ["cat", "tench"]), 1000, r"^config\.num_classes: makes 1000 classes"),
    (Listed([0, 2], ["a", "b", "c"]), 3, r"^config\.input\.data: class 'b' has no image that can be used in this s"),
    (Listed([0, 1], ["a", "b", "c", "d"], left_out={".txt": 2}), 4,
     r"'c' has .* nor have 1 other classes; left out: 2 \.txt")])
def test_classes_without_training_data_need_leave(source, count, message):
    with pytest.raises(ConfigError, match=f"{message}.*allow_unused_classes=True$"):
        head(source, count)
    allowed = head(source, count, allow_unused=True)
    assert labels(allowed) == labels(source) and allowed.num_classes == count
    assert allowed.class_names is None or len(allowed.class_names) == count


@pytest.mark.parametrize("source", [
    Listed([0, 0], ["cat"]), Listed([0, 0], ["cat"], counted=False), Listed([1, 1], ["dog", "cat"])])
def test_one_class_alone_is_nothing_to_learn(source):
    for allow in (False, True):
        with pytest.raises(ConfigError, match="one class alone, cat"):
            head(source, source.num_classes, allow_unused=allow)


def test_a_head_smaller_than_the_data():
    with pytest.raises(ConfigError, match="makes 2 classes, the data has 3"):
        head(Listed([0, 1, 2], ["a", "b", "c"]), 2, allow_unused=True)


def test_the_report():
    source = Listed([0, 1, 1, 1], ["cat", "dog"], left_out={".txt": 3, "hidden": 1})
    assert report(source) == {"examples": 4, "classes": 2, "fewest": ["cat", 1], "most": ["dog", 3],
                              "left_out": {".txt": 3, "hidden": 1}, "fingerprint": "f"}
    assert list(describe("train", source)) == [
        "train: 4 examples of 2 classes, 1 (cat) to 3 (dog) a class; left out: 3 .txt, 1 hidden"]
