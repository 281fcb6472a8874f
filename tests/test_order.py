"""The global order with repeated augmentation, against an emulation of DeiT's sampler, rank by rank."""
import math

import jaxtyping
import numpy as np
import pytest

from cb_vit import datasets
from cb_vit.config import ConfigError, parse
from cb_vit.input_pipeline import InputConfig, Pipeline
from cb_vit.order import RepeatedOrder

IMAGENET = 1_281_167


def emulate(permutation, ranks, repeats):
    """For each rank, its samples of one epoch: the list is made as DeiT's RASampler describes it (spec A.2)."""
    examples = len(permutation)
    per_rank = math.ceil(examples * repeats / ranks)
    row = np.repeat(permutation, repeats)
    row = np.concatenate([row, row[:per_rank * ranks - len(row)]])
    selected = examples // 256 * 256 // ranks
    return [row[rank::ranks][:selected] for rank in range(ranks)]


@pytest.mark.parametrize(("examples", "batch", "ranks", "repeats"), [
    (1000, 32, 4, 3), (1000, 96, 16, 3), (777, 64, 1, 3), (600, 30, 3, 2), (513, 128, 8, 5), (1000, 32, 4, 1)])
def test_every_rank_sees_what_its_sampler_gives(examples, batch, ranks, repeats):
    order, share = RepeatedOrder(examples, batch, ranks, repeats), batch // ranks
    for epoch in range(3):
        # Places in the endless row of epochs stand for the permuted examples themselves.
        permutation = epoch * examples + np.arange(examples)
        expected = [samples[:len(samples) // share * share].reshape(-1, share)
                    for samples in emulate(permutation, ranks, repeats)]
        assert order.steps_per_epoch == len(expected[0])
        begin = epoch * order.steps_per_epoch * batch
        places = [order(position) for position in range(begin, begin + order.steps_per_epoch * batch)]
        got = np.reshape(places, (order.steps_per_epoch, ranks, share))
        np.testing.assert_array_equal(got, np.stack(expected, axis=1))


def test_an_epoch_of_imagenet_is_that_of_deit(monkeypatch):
    order = RepeatedOrder(IMAGENET, 1024, 4, 3)
    assert order.steps_per_epoch == RepeatedOrder(IMAGENET, 1024, 16, 3).steps_per_epoch == 1251
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a million checked calls would take long
    epoch = order(np.arange(1251 * 1024))
    assert len(np.unique(epoch)) == 427_008 and epoch.max() < IMAGENET
    assert order(1251 * 1024) == IMAGENET  # the next epoch has its own permutation


@pytest.mark.parametrize("ranks", [4, 16])
def test_copies_stand_on_different_ranks(ranks):
    order = RepeatedOrder(IMAGENET, 1024, ranks, 3)
    batch = np.reshape([order(position) for position in range(1024)], (ranks, -1))
    assert len(np.unique(batch)) == pytest.approx(1024 / 3, abs=1)
    assert all(len(np.unique(rank)) == len(rank) for rank in batch)


def pipeline(examples=600, batch=16, rows=None, pp="keep('image', 'label')", **settings):
    data = dict(name="fake", split="train", num_examples=examples, image_size=4, num_classes=examples)
    config = parse(InputConfig, dict(data=data, batch_size=batch, pp=pp, num_threads=1) | settings)
    rows = np.arange(batch) if rows is None else rows
    return Pipeline(config, datasets.open_source(config.data, "data"), config.pp, rows)


def labels(batches):
    return np.stack([batch["label"] for batch in batches])


def test_batches_follow_the_order_whoever_loads_them_and_wherever_they_begin():
    repeated, plain = pipeline(repeats=3), pipeline()
    permuted = labels(plain.train(7, 0, 2 * 600 // 16 + 1)).ravel()  # two epochs' permutations and a bit
    steps = repeated._order.steps_per_epoch
    assert repeated.examples_per_epoch == steps * 16 == 512 and plain.examples_per_epoch == 600
    whole = labels(repeated.train(7, 0, steps + 5))
    expected = [permuted[repeated._order(position)] for position in range((steps + 5) * 16)]
    np.testing.assert_array_equal(whole.ravel(), expected)
    np.testing.assert_array_equal(labels(repeated.train(7, steps - 2, steps + 5)), whole[steps - 2:])
    odd = np.arange(1, 16, 2)
    np.testing.assert_array_equal(labels(pipeline(repeats=3, rows=odd).train(7, 3, 9)), whole[3:9, odd])
    np.testing.assert_array_equal(labels(pipeline(repeats=3, num_workers=2).train(7, 3, 9)), whole[3:9])


def test_copies_of_an_image_are_augmented_each_on_its_own():
    noisy = pipeline(repeats=3, pp="random_crop(4, padding=3)|keep('image', 'label')")
    (batch, *_) = noisy.train(0, 0, 1)
    different = [len({batch["image"][i].tobytes() for i in np.flatnonzero(batch["label"] == label)})
                 for label in np.unique(batch["label"])]
    assert np.mean(different) > 2


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"virtual_ranks: 3 does not divide batch_size 16, which repeats needs"):
        pipeline(repeats=3, virtual_ranks=3)
    with pytest.raises(ConfigError, match=r"repeats: must be at least 1, got 0"):
        pipeline(repeats=0)
    with pytest.raises(ConfigError, match=r"config.input.repeats: needs an epoch of at least a batch of 16 .* are 200"):
        pipeline(examples=200, repeats=3)
    pipeline(virtual_ranks=3)  # without repeats nobody asks

