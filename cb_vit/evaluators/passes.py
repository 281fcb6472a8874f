"""Several passes over examples, each of its own data or preprocessed in its own way, as one stream of batches.

Threads and worker processes start once, and the device never waits between two passes.
"""
from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.input_pipeline import Pipeline
from cb_vit.pp.builder import Preprocess

PASS = "_pass"  # number of an example's pass, from 0


class InTurn:
    """A `core.Source`: others one after the other; `PASS` of an example says which of them it is from.

    Args:
        sources: the sources, of the same classes.

    Attributes:
        ends: number of examples up to the end of each source.
    """

    def __init__(self, sources: Sequence[Any]):
        self.sources, self.ends = sources, np.cumsum([len(source) for source in sources])
        self.num_classes, self.class_names = sources[0].num_classes, sources[0].class_names

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is outside 0 … {len(self) - 1}")
        number = self.pass_of(index)
        source = self.sources[number]
        return {**source[index - int(self.ends[number]) + len(source)], PASS: number}

    def pass_of(self, index: int) -> int:
        """Number of the pass that an example is of."""
        return int(np.searchsorted(self.ends, index, side="right"))


@dataclasses.dataclass(frozen=True)
class EachPass(Preprocess):
    """Preprocessing whose part on the host depends on the pass; that on the device is the first one's.

    Attributes:
        passes: preprocessing of each pass.
    """

    passes: tuple[Preprocess, ...] = ()

    def host(self, features: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One example through the host ops of its pass, and `PASS`; see `Preprocess.host`."""
        rest = {name: value for name, value in features.items() if name != PASS}
        return {**self.passes[features[PASS]].host(rest, rng), PASS: np.asarray(features[PASS], np.int32)}


def in_passes(passes: Sequence[Pipeline]) -> Pipeline:
    """One pipeline that goes through the examples of several, one after the other.

    Args:
        passes: the pipelines, whose preprocessing differs on the host alone; how they load is as in the first.
    """
    preprocess = passes[0].preprocess
    first = {field.name: getattr(preprocess, field.name) for field in dataclasses.fields(Preprocess)}
    each = EachPass(**first, passes=tuple(one.preprocess for one in passes))
    return dataclasses.replace(passes[0], source=InTurn([one.source for one in passes]), preprocess=each)
