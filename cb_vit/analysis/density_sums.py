"""Numbers of many images, summed up in memory that does not grow: mean, spread and quantiles of each measure."""
from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from cb_vit.analysis.attention_measures import DISTANCE, MEASURES, Density, Series
from cb_vit.analysis.density import QUANTILES, Row

BINS = 512  # of the histogram of each number, even on the scale of its measure


class Spread:
    """Mean, standard deviation and quantiles of several series over images.

    Values that are inf do not count; one that is NaN makes all of its series NaN.

    Args:
        series: what the last axis of the values is.
    """

    def __init__(self, series: Sequence[Series]):
        self._series = series
        self._count = self._mean = self._squares = np.float64(0)  # the squares are those of the deviations
        self._bins: np.ndarray | None = None  # int64 [… s BINS]

    def add(self, values: Float[np.ndarray, "i *e s"]) -> None:
        """Take in the values of some images."""
        counted = values != np.inf
        values = np.where(counted, values, 0).astype(np.float64)
        count = counted.sum(0)
        mean = values.sum(0) / np.maximum(count, 1)
        squares = (np.square(values - mean) * counted).sum(0)
        # Two sums of squares of deviations put together (Chan, Golub & LeVeque, 1983): no digits cancel.
        total, apart = self._count + count, mean - self._mean
        self._squares = self._squares + squares + np.square(apart) * self._count * count / np.maximum(total, 1)
        self._mean = self._mean + apart * count / np.maximum(total, 1)
        self._count = total
        if self._bins is None:
            self._bins = np.zeros((*values.shape[1:], BINS), np.int64)
        finite = counted & np.isfinite(values)
        self._count_bins(values, finite)

    @property
    def mean(self) -> Float[np.ndarray, "*e s"]:
        """The means; NaN where nothing counts."""
        return np.where(self._count > 0, self._mean, np.nan)

    @property
    def std(self) -> Float[np.ndarray, "*e s"]:
        """The standard deviations (of the images themselves: divided by their number)."""
        return np.sqrt(np.where(self._count > 0, self._squares, np.nan) / np.maximum(self._count, 1))

    def quantile(self, q: float) -> Float[np.ndarray, "*e s"]:
        """The quantiles, between the two values that numpy's lie between; off by less than a bin.

        Args:
            q: the share of the images that lie below.
        """
        at = (np.maximum(self._count, 1) - 1) * q
        first = np.floor(at).astype(np.int64)
        low, high = self._value(first), self._value(np.minimum(first + 1, np.maximum(self._count, 1) - 1))
        return np.where(np.isfinite(self.mean), low + (at - first) * (high - low), np.nan)

    def _count_bins(self, values: np.ndarray, counted: np.ndarray) -> None:
        for number, series in enumerate(self._series):
            low, high = series.scale.forth((series.low, series.high))
            inside = np.clip(values[..., number], series.low, series.high)
            place = (series.scale.forth(inside) - low) / max(high - low, np.finfo(np.float64).tiny)
            bins = np.minimum(BINS * np.where(counted[..., number], place, 0), BINS - 1).astype(np.int64)
            image, *where = np.nonzero(counted[..., number])
            np.add.at(self._bins, (*where, number, bins[(image, *where)]), 1)

    def _value(self, rank: np.ndarray) -> np.ndarray:
        """The value that so many are below, as if those of a bin were spread evenly over it."""
        upto = np.cumsum(self._bins, axis=-1)
        bins = np.minimum((upto <= rank[..., None]).sum(-1), BINS - 1)
        inside = np.take_along_axis(self._bins, bins[..., None], -1)[..., 0]
        before = np.take_along_axis(upto, bins[..., None], -1)[..., 0] - inside
        place = (bins + (rank - before + 0.5) / np.maximum(inside, 1)) / BINS
        found = np.empty(place.shape)
        for number, series in enumerate(self._series):
            low, high = series.scale.forth((series.low, series.high))
            found[..., number] = series.scale.back(low + (high - low) * place[..., number])
        return found


class DensitySums:
    """What `Density` gives of many images, summed up.

    Args:
        density: the measures.

    Attributes:
        images: number of images so far.
    """

    def __init__(self, density: Density):
        self.images = 0
        self._series, self._spread = density.series, Spread(density.series)

    def add(self, values: Float[np.ndarray, "i l h s"]) -> None:
        """Take in the numbers of some images, of each block and head."""
        self.images += len(values)
        has = values != np.inf
        mean = np.where(has, values, 0).sum(2, dtype=np.float64) / np.maximum(has.sum(2), 1)
        over_heads = np.where(has.any(2), mean, np.inf)[:, :, None]
        self._spread.add(np.concatenate([values, over_heads], axis=2))

    def rows(self) -> list[Row]:
        """The rows of `density.csv`, by block; of each number those of the heads, and then that of their mean."""
        if not self.images:
            return []
        spread = self._spread
        columns = np.stack([spread.mean, spread.std, *map(spread.quantile, QUANTILES.values())], -1)
        blocks, heads = columns.shape[0], columns.shape[1] - 1
        return [Row(block, "all" if head == heads else str(head), series.queries, series.keys, series.measure,
                    *columns[block, head, number].tolist())
                for block, (number, series), head in itertools.product(
                    range(blocks), enumerate(self._series), range(heads + 1))]

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Yields each measure, over all tokens, as the mean over images, heads and blocks; and each block's entropy.

        Distances are from patches to patches. Of blocks it is `block00/entropy_normalised`, …
        """
        whole = {series.measure: number for number, series in enumerate(self._series)
                 if (series.queries, series.keys) == ("all", "all") or series.measure == DISTANCE}
        means = self._spread.mean[:, -1] if self.images else np.full((0, len(self._series)), np.nan)
        for name in (*MEASURES, DISTANCE):
            yield name, float(means[:, whole[name]].mean()) if len(means) else float("nan")
        for block, value in enumerate(means[:, whole["entropy_normalised"]].tolist()):
            yield f"block{block:02d}/entropy_normalised", value
