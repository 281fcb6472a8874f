"""Which example stands where in the global order: repeated augmentation, and the rows that one process loads."""
from __future__ import annotations

import dataclasses

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
