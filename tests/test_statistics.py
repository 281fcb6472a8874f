"""Intervals and tests on paired differences: SciPy's numbers, the level that is stated, and what no p can be below."""
import itertools

import numpy as np
import pytest
from scipy import stats

from cb_vit.analysis import statistics
from cb_vit.analysis.statistics import holm, sign_flip_p, smallest_p, t_interval


@pytest.mark.parametrize("n, level", [(2, 0.95), (5, 0.9), (12, 0.99)])
def test_the_interval_is_scipys(n, level):
    one, other = np.random.default_rng(n).normal([[0.3], [0]], 1, (2, n))
    expected = stats.ttest_rel(one, other).confidence_interval(level)
    np.testing.assert_allclose(t_interval(one - other, level), expected, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_test_is_scipys(n):
    for values in (np.random.default_rng(n).normal(0.4, 1, n), np.random.default_rng(n).integers(-3, 4, n) / 360):
        found = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf) if n > 1 \
            else None
        by_hand = np.mean([abs(np.dot(signs, values)) >= abs(values.sum()) - 1e-12
                           for signs in itertools.product((1, -1), repeat=n)])
        assert sign_flip_p(values) == by_hand
        assert found is None or found.pvalue == pytest.approx(by_hand)


def test_differences_that_are_equal_up_to_rounding_are_ties():
    exact = np.array([1, 1, 1, 1, -2]) / 360  # flipping the last and two others changes nothing
    assert sign_flip_p(exact) == sign_flip_p(exact.astype(np.float32).astype(float)) == sign_flip_p(exact * (1 + 1e-12))
    assert sign_flip_p(np.zeros(5)) == 1


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10, 20])
def test_no_p_is_below_the_smallest(n):
    assert sign_flip_p(np.ones(n)) == smallest_p(n) == 2 / 2**n
    assert smallest_p(5) == 0.0625


def test_many_pairs_are_drawn_and_the_add_one_rule_holds(monkeypatch):
    values = np.random.default_rng(0).normal(0.4, 1, 14)
    exact = sign_flip_p(values)
    monkeypatch.setattr(statistics, "EXACT", 13)
    drawn = sign_flip_p(values)
    assert drawn == sign_flip_p(values) and drawn == pytest.approx(exact, abs=4 * np.sqrt(exact / statistics.DRAWS))
    assert sign_flip_p(np.ones(30)) == smallest_p(30) == 1 / (1 + statistics.DRAWS)


def test_under_the_null_it_is_wrong_as_often_as_it_says():
    """1 000 sweeps of two equal arms and eight seeds, whose values share what the seed does to both."""
    rng = np.random.default_rng(0)
    seeds, noise = rng.normal(0, 2, (1000, 1, 8)), rng.standard_t(3, (1000, 2, 8))
    differences = np.diff(seeds + noise, axis=1)[:, 0]
    signs = np.array(list(itertools.product((1, -1), repeat=8)))
    sums = np.abs(differences @ signs.T)
    ps = np.mean(sums >= sums[:, :1] - 1e-9, axis=1)  # the first is the one without a flip
    assert [sign_flip_p(row) for row in differences[:50]] == ps[:50].tolist()
    for level in (0.05, 0.1, 0.3):
        assert np.mean(ps <= level) <= level + 3 * np.sqrt(level * (1 - level) / 1000)
        assert np.mean(ps <= level) >= level - 1 / 128 - 3 * np.sqrt(level / 1000)
    normal = rng.normal(0, 1, (1000, 5))
    held = np.mean([low <= 0 <= high for low, high in (t_interval(row, 0.9) for row in normal)])
    assert held == pytest.approx(0.9, abs=3 * np.sqrt(0.09 / 1000))


def test_three_comparisons_under_the_null_are_wrong_together_as_often_as_one():
    rng = np.random.default_rng(1)
    wrong = sum(min(holm([sign_flip_p(arm - arms[0]) for arm in arms[1:]])) <= 0.1
                for arms in rng.normal(0, 1, (300, 4, 7)))
    assert wrong / 300 <= 0.1 + 3 * np.sqrt(0.09 / 300)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    assert holm([0.04, 0.01]) == pytest.approx([0.04, 0.02])
