"""What a source holds, as far as that is known without reading an image: to report it, and to know it again."""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cb_vit import io
from cb_vit.config import ConfigError, Failure
from cb_vit.datasets import labels


class DataError(Failure):
    """Stored data that cannot be read: the message names the file and the record."""


class Absent(ConfigError):
    """Data that is not there at all, as against what is damaged or of another form."""

    def under(self, prefix: str) -> Absent:
        """The same error, with its path taken as relative to `prefix`."""
        return Absent(f"{prefix}.{self.path}", self.message)


def no_folder(root: str, path: str, expected: str) -> ConfigError:
    """The error that there is no folder `root`: `Absent` where nothing is, but not where something else is.

    Args:
        root: path of the folder.
        path: the setting that names it.
        expected: what it should hold, in words.
    """
    kind = Absent if io.kind(root) in (None, io.LINK) else ConfigError
    return kind(path, f"{root} is no folder; {expected}")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is known of a selection of examples.

    Attributes:
        fingerprint: hash of the stored data: the same for a copy elsewhere, another when files come, go or change in
            size; None: not known.
        counts: number of examples of each class, int64 [c]; None: not known, as the labels have not been read.
        left_out: number of files that are no examples, by extension or by another reason.
        empty: number of files that hold nothing, and will not decode.
        held_out: share of each class that was held out of a folder by rule, and the rule's seed; None: none was.
    """

    fingerprint: str | None = None
    counts: np.ndarray | None = None
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    empty: int = 0
    held_out: Mapping[str, float] | None = None


def contents_of(source: Any) -> Contents:
    """What a source knows of itself; nothing, if it does not say."""
    return getattr(source, "contents", Contents())


def fingerprint(parts: Iterable[Any]) -> str:
    """A hash of the texts of all parts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")  # else "ab", "c" would be "a", "bc"
    return digest.hexdigest()[:32]


def report(source: Any) -> dict[str, Any]:
    """A source in numbers, as JSON has them: what `run.json` keeps."""
    contents, found = contents_of(source), {"examples": len(source), "classes": source.num_classes}
    if contents.counts is not None and len(contents.counts):
        for name, number in (("fewest", contents.counts.argmin()), ("most", contents.counts.argmax())):
            found[name] = [class_name(source.class_names, int(number)), int(contents.counts[number])]
    if contents.held_out:
        found["held_out"] = dict(contents.held_out)
    return found | {"left_out": dict(contents.left_out), "fingerprint": contents.fingerprint}


def describe(name: str, source: Any) -> Iterator[str]:
    """A source in numbers, in lines to print.

    Args:
        name: what the source is called in each line.
        source: the source.
    """
    found, contents = report(source), contents_of(source)
    a_class = ""
    if "fewest" in found:
        (few, fewest), (many, most) = found["fewest"], found["most"]
        a_class = f", {fewest:,} a class" if fewest == most else f", {fewest:,} ({few}) to {most:,} ({many}) a class"
    left_out = describe_left_out(contents.left_out)
    yield f"{name}: {found['examples']:,} examples of {found['classes']:,} classes{a_class}{left_out}"
    if contents.held_out:
        share, seed = contents.held_out["share"], contents.held_out["seed"]
        yield (f"{name}: held out as val: {share:.4g} of the images of each class, by a hash of their names and seed "
               f"{seed}")
    if contents.empty:
        yield f"{name}: files that are empty, and will not decode: {contents.empty:,}"
    if numbering := _numbering(source.class_names or ()):
        yield f"{name}: {numbering}"


def _numbering(names: Sequence[str]) -> str | None:
    """A word on classes that are called by numbers, where something else could be expected."""
    if not labels.are_numbers(names):
        return None
    odd = next((i for i, name in enumerate(names) if int(name) != i), None)
    if odd is not None:
        return (f"classes are called by numbers and sorted as such: {names[odd]!r} is class {odd}; labels='index' "
                f"makes it class {int(names[odd])}")
    return None if list(names) == sorted(names) else "classes are called by numbers and sorted as such"


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """The end of a line that tells of left-out files, such as "; left out: 3 .txt, 1 hidden"; empty without any."""
    parts = [f"{count:,} {reason}" for reason, count in sorted(left_out.items())]
    return f"; left out: {', '.join(parts)}" if parts else ""


def pad(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Names of `count` classes, of which the last are never seen in training."""
    return (*names, *(f"(unused {number})" for number in range(len(names), count)))


def class_name(names: Sequence[str] | None, number: int) -> str:
    """The name of class `number`; "class 3" and the like where classes have none."""
    return names[number] if names else f"class {number}"
