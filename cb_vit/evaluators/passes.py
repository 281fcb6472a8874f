"""Several passes over the same examples, each preprocessed in its own way, as one stream of batches.

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


class Repeated:
    """A `core.Source`: another one several times over; `PASS` of an example says which time it is.

    Args:
        source: the source of the examples.
        passes: number of passes.
    """

    def __init__(self, source: Any, passes: int):
        self.source, self.passes = source, passes
        self.num_classes, self.class_names = source.num_classes, source.class_names

    def __len__(self) -> int:
        return self.passes * len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} is outside 0 … {len(self) - 1}")
        number, index = divmod(number, len(self.source))
        return {**self.source[index], PASS: number}


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


def in_passes(pipeline: Pipeline, passes: Sequence[Preprocess]) -> Pipeline:
    """A pipeline that goes through its examples once with each of several ways of preprocessing them.

    Args:
        pipeline: the pipeline.
        passes: preprocessing of each pass, which differ on the host alone.
    """
    first = {field.name: getattr(passes[0], field.name) for field in dataclasses.fields(Preprocess)}
    return dataclasses.replace(pipeline, source=Repeated(pipeline.source, len(passes)),
                               preprocess=EachPass(**first, passes=tuple(passes)))
