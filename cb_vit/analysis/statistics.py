"""The numbers of a comparison by pairs: an interval, a permutation test by flips of signs, and Holm's correction."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

EXACT = 20  # pairs up to which all flips of signs are tried: 2²⁰ of them
DRAWS = 99_999  # flips of signs that are drawn beyond
SEED = 0  # of what is drawn, so that the same runs have the same p
TIES = 1e-7  # of the sum of magnitudes: what is closer counts as equal, as values may be single precision


def t_interval(differences: Float[np.ndarray, " n"], level: float) -> tuple[float, float]:
    """The interval of Student's t for the mean of paired differences, which it takes to be about normal.

    Args:
        differences: one difference a pair, two or more.
        level: share of such intervals that hold the true mean, in (0, 1).
    """
    from scipy.special import stdtrit  # half a second, which the other commands need not wait
    n = len(differences)
    half = stdtrit(n - 1, (1 + level) / 2) * np.std(differences, ddof=1) / np.sqrt(n)
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def sign_flip_p(differences: Float[np.ndarray, " n"]) -> float:
    """Two-sided p of the hypothesis that each paired difference could as well have the other sign.

    The statistic is the magnitude of the mean. Up to `EXACT` pairs all 2ⁿ flips are tried and p is exact; beyond,
    `DRAWS` flips are drawn and p is (1 + those at least as extreme) / (1 + DRAWS), which is never too small (Phipson &
    Smyth, "Permutation P-values Should Never Be Zero", 2010).

    Args:
        differences: one difference a pair, one or more.
    """
    n, bound = len(differences), abs(differences.sum()) - TIES * np.abs(differences).sum()
    if n > EXACT:
        signs = np.random.default_rng(SEED).integers(0, 2, (DRAWS, n), np.int8) * 2 - 1
        return (1 + int(np.count_nonzero(np.abs(signs @ differences) >= bound))) / (1 + DRAWS)
    sums = differences[:1]  # the other half of the flips has the same magnitudes
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= bound))


def smallest_p(pairs: int) -> float:
    """The smallest p that `sign_flip_p` can find with so many pairs, whatever their values."""
    return 2.0 ** (1 - pairs) if pairs <= EXACT else 1 / (1 + DRAWS)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of each of several tests, adjusted for their number (Holm, "A Simple Sequentially Rejective …", 1979)."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted
