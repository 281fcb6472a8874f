"""How many examples may be unreadable: judged over an epoch or a split, the same wherever a run was interrupted."""
import types

import numpy as np
import pytest

from cb_vit import datasets
from cb_vit.config import ConfigError, parse
from cb_vit.datasets.core import DataError
from cb_vit.evaluators.common import EvaluatorConfig
from cb_vit.input_pipeline import InputConfig, Pipeline, error_share
from cb_vit.skip_errors import Judge


def judge(examples, batch_size, share, seed=0, **state):
    """One on a process that loads no row itself, and so names no example."""
    return Judge(pipeline(examples, batch_size, share, rows=0), "config.x", seed, **state)


def pipeline(examples, batch_size, share, rows, **settings):
    data = dict(name="fake", split="train", num_examples=examples, image_size=8, encoded=True,
                broken=tuple(range(0, rows and examples, 3)))
    config = parse(InputConfig, dict(data=data, batch_size=batch_size, pp="decode", skip_errors=share) | settings)
    return Pipeline(config, datasets.open_source(config.data, "data"), config.pp, np.arange(rows))


def stops_at(one, failures):
    """The step at which it stops the run; None: it does not."""
    for step, failed in enumerate(failures, 1):
        try:
            one.add(step, failed)
        except DataError:
            return step
    return None


def by_hand(examples, batch_size, share, failures):
    """The same, an example after the other; a batch belongs to the epoch of its first example."""
    read = failed = 0
    for step, of_batch in enumerate(failures, 1):
        failed, read = failed + of_batch, read + batch_size
        ends = any(position % examples == 0 for position in range((step - 1) * batch_size + 1, step * batch_size + 1))
        if of_batch == batch_size or ((ends or read >= 1000) and failed > share * read):
            return step
        if ends:
            read = failed = 0
    return None


@pytest.mark.parametrize("examples, batch_size", [(64, 8), (37, 8), (8, 8), (5, 8), (3, 7), (1200, 64), (1001, 100)])
def test_it_stops_where_counting_by_hand_does(examples, batch_size):
    dice, seen = np.random.default_rng(examples), set()
    for share in (0.0, 0.01, 0.1, 0.5):
        for rate in (0.3 * share, share, 1.5 * share, 0.9):
            failures = dice.binomial(batch_size, rate, 60).tolist()
            seen.add(found := stops_at(judge(examples, batch_size, share), failures))
            assert found == by_hand(examples, batch_size, share, failures)
    assert len(seen) > 2  # at several places, and not at all


@pytest.mark.parametrize("examples, batch_size", [(64, 8), (37, 8), (5, 8), (1200, 64)])
def test_an_interruption_anywhere_changes_nothing(examples, batch_size):
    failures = np.random.default_rng(1).binomial(batch_size, 0.1, 60).tolist()
    for share in (0.05, 0.12):
        whole = stops_at(judge(examples, batch_size, share), failures)
        one = judge(examples, batch_size, share)
        for step, failed in enumerate(failures[:whole and whole - 1], 1):
            one.add(step, failed)
            other = judge(examples, batch_size, share, **one.state())
            assert stops_at(types.SimpleNamespace(add=lambda k, n, other=other, step=step: other.add(step + k, n)),
                            failures[step:]) == (whole and whole - step)


def test_few_examples_say_nothing_before_the_epoch_ends():
    assert stops_at(judge(10**6, 100, 0.01), [99] + [0] * 8 + [0]) == 10  # 1 000 are read
    assert stops_at(judge(500, 100, 0.2), [99, 0, 0, 0, 0]) is None  # 99 of 500
    assert stops_at(judge(500, 100, 0.19), [99, 0, 0, 0, 0]) == 5


def test_a_batch_without_an_example_stops_at_once_but_for_the_padded_one():
    assert stops_at(judge(10**6, 4, 0.9), [3, 3, 4]) == 3
    # 9 examples in batches of 4, seed None: an evaluator. The last holds one, and 3 rows of padding.
    assert stops_at(judge(9, 4, 0.2, seed=None), [0, 0, 4]) is None
    assert stops_at(judge(9, 4, 0.2, seed=None), [0, 1, 4]) == 3
    assert stops_at(judge(9, 4, 0.2, seed=None), [0, 4, 3]) == 2


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("repeats", [1, 2])
def test_it_names_counts_an_example_and_the_setting(seed, repeats):
    one = Judge(pipeline(256, 64, 0.01, rows=64, repeats=repeats), "config.input.skip_errors", seed)
    with pytest.raises(DataError, match=r"^84 of 256 examples could not be read, such as train#\d+: decode: .*; mend "
                                        r"the data, or allow more: config\.input\.skip_errors is 0\.01$"):
        for step in range(1, 5):
            one.add(step, 21)


DATA = dict(name="fake", split="train")


@pytest.mark.parametrize("value, share", [(True, 0.01), (False, 0), (0, 0), (0.5, 0.5)])
def test_the_setting_is_a_share_or_a_word(value, share):
    block = dict(data=DATA, batch_size=8, pp="flip_lr", skip_errors=value)
    assert error_share(parse(InputConfig, block).skip_errors) == share


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 5])
def test_what_is_no_share_is_refused(value):
    for schema, rest in ((InputConfig, dict(batch_size=8, pp="flip_lr")),
                         (EvaluatorConfig, dict(type="classification", pp_fn="flip_lr", log_steps=1))):
        with pytest.raises(ConfigError, match=r"^config\.skip_errors: is a share in \[0, 1\), or True for 1 %, got"):
            parse(schema, dict(data=DATA, skip_errors=value, **rest))
