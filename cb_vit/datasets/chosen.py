"""Some examples of a source, as a source; and which, where they are drawn by lot."""
from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np


class Chosen:
    """A `core.Source` of some examples of another.

    Args:
        source: the source of the examples.
        indices: numbers of the examples in that source, in the order that they have here.
    """

    def __init__(self, source: Any, indices: Sequence[int] | np.ndarray):
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.num_classes, self.class_names = source.num_classes, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} is outside 0 … {len(self) - 1}")
        return self.source[int(self.indices[number])]


def some(source: Any, examples: int | None, seed: int) -> Chosen:
    """So many examples of a source, drawn by lot.

    Args:
        source: the source.
        examples: number of examples; None, or more than there are: all.
        seed: seed of the lots, from 0.
    """
    return Chosen(source, draw(len(source), min(examples or len(source), len(source)), seed))


def draw(total: int, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` of `total` examples, int64, ascending: a pure function of its arguments.

    By lot, since neither the first examples nor every n-th are like all: sources are in the order of classes, or go
    through them in turn.

    Args:
        total: number of examples.
        count: number of those to draw, at most `total`.
        seed: the seed, from 0.
    """
    # Keyed, not seeded: what a counter-based generator gives for a key is the same in every version of NumPy.
    lots = np.random.Philox(key=np.array([seed, total], np.uint64)).random_raw(total)
    return np.sort(np.argsort(lots, kind="stable")[:count])
