"""Which example stands where in the global order: classes evened out, repeated augmentation, one process's rows."""
from __future__ import annotations

import dataclasses
import sys
import threading
from typing import Any

import grain
import numpy as np


@dataclasses.dataclass(frozen=True)
class RepeatedOrder:
    """DeiT's order of repeated augmentation (`RASampler`, `samplers.py` there), batch after batch.

    Rank p of R takes every R-th place of a permuted epoch in which each example stands `repeats` times in a row: its
    k-th sample is `permutation[(p + R·k) // repeats]`. Of the epoch's N examples it takes as many samples as if there
    were no repeats, N rounded down to a multiple of 256 and shared by R; what is left of a batch is dropped. A global
    batch holds the ranks one after the other.

    Attributes:
        examples: N, the number of examples in the data.
        batch_size: number of examples in a global batch.
        ranks: R, the number of processes whose order is reproduced, however many really run.
        repeats: number of times that each example stands in an epoch.
    """

    examples: int
    batch_size: int
    ranks: int
    repeats: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; 0 if the data is too small for one."""
        # 256 stands in DeiT's sampler whatever the batch size is; without it epochs would have another length.
        return self.examples // 256 * 256 // self.ranks // (self.batch_size // self.ranks)

    def __call__(self, position: int) -> int:
        """Where the example of a global position stands in the endless row of permuted epochs without repeats.

        A pure function of the position: any process can ask for any row, and a resumed run for any step.

        Args:
            position: place in the global order, from 0.
        """
        step, row = divmod(position, self.batch_size)
        epoch, step = divmod(step, self.steps_per_epoch)
        rank, sample = divmod(row, self.batch_size // self.ranks)
        sample += step * (self.batch_size // self.ranks)
        return epoch * self.examples + (rank + self.ranks * sample) // self.repeats


class BalancedOrder(grain.MapDataset):
    """Endless permuted epochs of as many examples as there are, in which rare classes stand more often.

    A class of n examples has a share of each epoch that grows with n^(1 - balance): with balance 1 all classes have the
    same. An epoch holds exactly that, rounded to whole examples, in random order; a class goes through all its
    examples, permuted, before one comes again, from epoch to epoch. A pure function of seed and position.

    Args:
        labels: the class of each example, [n]; those of -1, which have none, do not come.
        balance: from 0, as the classes are, to 1, all alike.
        seed: seed of the permutations.
    """

    def __init__(self, labels: np.ndarray, balance: float, seed: int):
        super().__init__()
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
        self._quotas = _shares(np.array([len(found) for found in self._members]) ** (1 - balance), len(labels))
        self._length, self._seed = len(labels), seed
        self._epochs, self._lock = {}, threading.Lock()  # loader threads ask for rows of several epochs

    def __len__(self) -> int:
        return sys.maxsize

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_epochs", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _epochs={}, _lock=threading.Lock())

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._length)
        with self._lock:
            if (order := self._epochs.get(epoch)) is None:
                order = self._order(epoch)
                # Two, since a batch may hold the end of one and the beginning of the next.
                self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: order}
        return int(order[place])

    def _order(self, epoch: int) -> np.ndarray:
        drawn = [self._draws(number, epoch * quota, (epoch + 1) * quota)
                 for number, quota in enumerate(self._quotas.tolist())]
        return np.random.default_rng((self._seed, epoch)).permutation(np.concatenate(drawn))

    def _draws(self, number: int, start: int, stop: int) -> np.ndarray:
        """Examples that a class gives from its `start`-th draw to before its `stop`-th."""
        members = self._members[number]
        first, last = start // len(members), -(-stop // len(members))
        rounds = [np.random.default_rng((self._seed, number, again)).permutation(members)
                  for again in range(first, last)]
        return np.concatenate([members[:0], *rounds])[start - first * len(members):stop - first * len(members)]


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, as near to the proportions of `weights` as they can be: largest remainders."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[:total - whole.sum()]] += 1
    return whole


class Reordered(grain.MapDataset):
    """An endless dataset in another order.

    Args:
        parent: the dataset.
        order: the place in `parent` of each position here.
    """

    def __init__(self, parent: grain.MapDataset, order: RepeatedOrder):
        super().__init__(parent)
        self._order = order

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        # Grain takes `dataset[first:]` for a dataset that begins there, which is how a run resumes.
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[self._order(index)]


class Rows(grain.MapDataset):
    """Of an endless global order, the rows that one process loads, batch after batch.

    Args:
        parent: the dataset in its global order.
        rows: the numbers of the rows of each batch that this process loads, ascending.
        batch_size: number of rows in a global batch.
        steps: number of batches.
    """

    def __init__(self, parent: grain.MapDataset, rows: np.ndarray, batch_size: int, steps: int):
        super().__init__(parent)
        self._rows, self._batch_size, self._steps = rows, batch_size, steps

    def __len__(self) -> int:
        return self._steps * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[step * self._batch_size + int(self._rows[row])]
