"""What every data source offers, and how a config block becomes one.

A source is a list of examples in a fixed order, read at random: `source[i]` is the same example on every machine
and in every process. Order, batching and decoding are the pipeline's. Sources travel to worker processes by
pickling, so they hold paths and numbers and open their files on first use; they need no JAX.
"""
from __future__ import annotations

import bisect
import dataclasses
import difflib
import importlib
import itertools
import operator
import re
import resource
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import ml_collections

from cb_vit.config import ConfigError, convert, plain
from cb_vit.datasets.contents import DataError
from cb_vit.datasets.relabel import by_index
from cb_vit.registry import suggest

__all__ = ["DataError", "Source", "SourceConfig", "Span", "Spans", "allow_open_files", "check_source",
           "check_split", "open_source", "select", "splits_of"]

# name in the config -> module of this room; any other name is a dataset of TFDS.
KINDS = {"digits": "digits", "fake": "fake", "folder": "folder", "idx": "idx", "first_of": "first_of",
         "real": "real", "objectnet": "objectnet"}
Block = Mapping[str, Any] | ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every block of data may say; each kind of source adds to it.

    Attributes:
        name: the kind of data ("digits", "fake", "folder", "idx", "first_of", "real", "objectnet"), or the name of a
            dataset of TFDS.
        split: the examples to take, e.g. "train[:90%]".
        labels: what tells classes: "name", so that two sources, or a source and a model, mean the same class by a name;
            or "index", the class's number alone, which of a folder called "17" is 17.
    """

    name: str
    split: str
    labels: Literal["name", "index"] = "name"

    def __post_init__(self):
        check_split(self.split)


@runtime_checkable
class Source(Protocol):
    """A data set, or a part of one, read at random.

    Attributes:
        num_classes: number of classes; labels are 0 … num_classes - 1.
        class_names: a name for each class; None: nobody named them.

    A source that knows more of itself without reading its examples says so in `contents`, a `Contents`.
    """

    num_classes: int
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Example `index`, 0 … len - 1.

        Returns:
            "image": the encoded file as bytes (JPEG, PNG …), or pixels as uint8 [h, w, 3]; "label": int, -1 where
            there is none; "id": str, the example's name in messages: a path, "shard#record", or the data set's own.

        Raises:
            IndexError: the index is outside 0 … len - 1.
            DataError: the stored bytes cannot be read. Images that do not decode are found by the reader.
        """


def check_source(block: Block, path: str) -> Any:
    """Check the block of a data source and return it as its frozen dataclass; touches no file.

    Args:
        block: the config's block, `data=dict(name="imagenet2012", split="train[:99%]", …)`; `name` decides which keys
            there are.
        path: where the block stands, for errors, e.g. "config.input.data".

    Raises:
        ConfigError: a key is unknown, a value of the wrong type, or the split cannot be read.
    """
    block = plain(block)
    if not isinstance(block, dict):
        raise ConfigError(path, f"expected a block of settings, got {block!r}")
    name = None if block.get("name") is None else convert(block["name"], str, f"{path}.name")
    return _kind(name, path).check(block, path)


def open_source(block: SourceConfig | Block, path: str) -> Source:
    """Open a data source.

    Args:
        block: its settings, or a block of them, to be checked as by `check_source`.
        path: where they stand, for errors.

    Raises:
        Absent: there is no such data: no folder, or none that is prepared.
        ConfigError: a setting is wrong: there is no such split, or it selects nothing.
        DataError: the stored data is damaged.
    """
    config = block if isinstance(block, SourceConfig) else check_source(block, path)
    source = _kind(config.name, path).open_source(config, path)
    return by_index(source, path) if config.labels == "index" else source


def _kind(name: str | None, path: str) -> ModuleType:
    if not name:
        raise ConfigError(f"{path}.name", f"required: {', '.join(KINDS)}, or a dataset of TFDS; got {name!r}")
    near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.7)
    if name not in KINDS and near:
        raise ConfigError(f"{path}.name", f"unknown kind of data {name!r}; did you mean {near[0]}?")
    # Imported by name, so that a source's packages are needed only where it is used.
    return importlib.import_module(f"cb_vit.datasets.{KINDS.get(name, 'tfds')}")


class Span(NamedTuple):
    """Examples `start` … `stop - 1` of the split or file called `name`.

    Attributes:
        name: name of the split or path of the file.
        start: number of the first example.
        stop: number of the first example after the last.
    """

    name: str
    start: int
    stop: int


class Spans:
    """Spans laid end to end; answers where the i-th example of the whole lies.

    Args:
        spans: the spans, in order; empty ones are dropped.
    """

    def __init__(self, spans: Iterable[Span]):
        self.spans = tuple(span for span in spans if span.stop > span.start)
        self._ends = list(itertools.accumulate(span.stop - span.start for span in self.spans))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: SupportsIndex) -> tuple[int, int]:
        """`(number of the span, index within what the span names)` of the example `index`."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        # A search, since ImageNet's splits are a thousand files, and this runs for every example.
        number = bisect.bisect_right(self._ends, index)
        return number, index - self._ends[number] + self.spans[number].stop

    def refine(self, parts: Mapping[str, Sequence[tuple[str, int]]]) -> Spans:
        """The same examples as spans of parts.

        Args:
            parts: the files that hold each split, in order, as `(file, number of examples)`.
        """
        refined = []
        for name, start, stop in self.spans:
            first = 0
            for part, length in parts[name]:
                refined.append(Span(part, max(start - first, 0), min(stop - first, length)))
                first += length
        return Spans(refined)


def check_split(spec: str, path: str = "split") -> None:
    """Refuse a split that cannot be read, whatever the data.

    Args:
        spec: the split, e.g. "train[:90%]".
        path: where the split is set, for errors.

    Raises:
        ConfigError: at `path`.
    """
    if not re.fullmatch(r"[\w-]+", spec):  # a plain name needs no import of TFDS
        _instruction(spec, path)


def splits_of(spec: str, available: Iterable[str], path: str) -> tuple[str, ...]:
    """The names of the splits that a split such as "train[:90%]+test" draws from.

    Args:
        spec: the split.
        available: names of the splits that there are.
        path: where the split is set, for errors.

    Raises:
        ConfigError: at `path`, when one of them does not exist.
    """
    available = tuple(available)
    names = [part.strip().split("[")[0] for part in spec.split("+")]
    if "all" in names and "all" not in available:
        return available
    for name in names:
        if name not in available:
            listed = ", ".join(available) or "none"
            raise ConfigError(path, f"no split {name!r} in {spec!r}{suggest(name, available)} Splits: {listed}")
    return tuple(dict.fromkeys(names))


def select(spec: str, lengths: Mapping[str, Sequence[int]], path: str) -> Spans:
    """The examples that a split like `train[:99%]`, `train[10%:20%]+test` or `train` names.

    The language and its rounding are TFDS's (https://www.tensorflow.org/datasets/splits), for every kind of source.

    Args:
        spec: the split.
        lengths: the number of examples in each shard of each split, by the split's name.
        path: where the split is set, for errors.

    Raises:
        ConfigError: at `path`: the split is unknown, its slice does not fit, or it selects nothing.
    """
    if spec in lengths:
        spans = [Span(spec, 0, sum(lengths[spec]))]
    else:
        splits_of(spec, lengths, path)
        # All that TFDS looks at in a split, so that its language serves data that it has not prepared.
        sizes = {k: SimpleNamespace(num_examples=sum(v), shard_lengths=list(v)) for k, v in lengths.items()}
        try:
            parts = _instruction(spec, path).to_absolute(sizes)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(path, f"cannot take {spec!r}: {error}") from None
        total = {k: v.num_examples for k, v in sizes.items()}
        spans = [Span(p.splitname, p.from_ or 0, total[p.splitname] if p.to is None else p.to) for p in parts]
    chosen = Spans(spans)
    if not len(chosen):
        sizes_text = ", ".join(f"{name} {sum(length)}" for name, length in lengths.items())
        raise ConfigError(path, f"{spec!r} selects no example; examples in each split: {sizes_text}")
    return chosen


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files so that `count` files fit (the usual limit is 1024)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _instruction(spec: str, path: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.core.ReadInstruction.from_spec(spec)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "not a split"
        raise ConfigError(path, f"cannot read {spec!r}: {reason}; write it as 'train[:99%]' or 'train+test'") from None
