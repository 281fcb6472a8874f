"""Labels brought to a model's numbers, by the names of the classes; and what is refused as training data."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from cb_vit.config import ConfigError
from cb_vit.datasets import labels
from cb_vit.datasets.contents import DataError, class_name, contents_of, describe_left_out, pad
from cb_vit.datasets.rare_classes import labels_of
from cb_vit.texts import first_few

logger = logging.getLogger(__name__)
MAX_CLASSES = 100_000  # above, a number in a name is a date or an id
BY_INDEX = "labels='index' takes classes by their numbers, whatever their names"


class Relabelled:
    """A `core.Source` whose labels are other numbers.

    Args:
        source: the source of the examples.
        places: the label here of each class of that source; -1: it has none.
        num_classes: number of classes here.
        class_names: a name for each class here; None: nobody named them.
        by_index: whether classes count by their numbers, whatever their names.
    """

    def __init__(self, source: Any, places: Sequence[int], num_classes: int, class_names: tuple[str, ...] | None,
                 by_index: bool = False):
        self.source, self.places = source, tuple(places)
        self.num_classes, self.class_names, self.by_index = num_classes, class_names, by_index
        contents = contents_of(source)
        if (counts := contents.counts) is not None:
            moved = np.zeros(num_classes, np.int64)
            np.add.at(moved, [place for place in self.places if place >= 0],
                      [count for place, count in zip(self.places, counts, strict=True) if place >= 0])
            counts = moved
        self.contents = dataclasses.replace(contents, counts=counts)

    def __len__(self) -> int:
        return len(self.source)

    def all_labels(self, skip_errors: bool) -> np.ndarray:
        """See `labels_of`; a class that is none here is no label."""
        # The last of the places is for -1, no label.
        return np.array([*self.places, -1])[labels_of(self.source, skip_errors)]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        example = self.source[index]
        label = example["label"]
        if np.ndim(label):
            return {**example, "label": np.array([*self.places, -1])[label]}
        if label >= 0 and (label := self.places[label]) < 0:
            name = class_name(self.source.class_names, example["label"])
            raise DataError(f"{example['id']}: is of class {name}, which the model does not have")
        return {**example, "label": label}


def by_index(source: Any, path: str) -> Any:
    """A source whose labels count by their numbers alone; where classes are called by numbers, by those.

    Args:
        source: the source of the examples.
        path: where the block of the source stands, for errors.

    Raises:
        ConfigError: under `path`: the numbers are too large to be classes.
    """
    names = source.class_names
    if not names or not labels.are_numbers(names):
        return Relabelled(source, range(source.num_classes), source.num_classes, names, by_index=True)
    places = [int(name) for name in names]
    if (most := max(places)) >= MAX_CLASSES:
        raise ConfigError(f"{path}.labels", f"'index' makes class {most} of the name {most}, which is no number of a "
                                            "class; leave it at 'name'")
    return Relabelled(source, places, most + 1, tuple(map(str, range(most + 1))), by_index=True)


def known_names(source: Any) -> tuple[str, ...] | None:
    """The names that a source's classes are known by; None: they count by their numbers."""
    return None if _by_index(source) else source.class_names


def classes_of(source: Any, path: str, skip_errors: bool = False) -> np.ndarray:
    """The numbers of the classes that data has, of those of the model that it is aligned with: int64, ascending.

    They are those that the data names; or where it names all of the model's, as copies of ImageNet-A by TFDS do, those
    that an example is of.

    Args:
        source: the source of the examples, from `align`.
        path: where its block stands, for errors.
        skip_errors: whether examples that cannot be read are left out.

    Raises:
        ConfigError: at `path`: the data does not name its classes, or has none.
        DataError: an example cannot be read.
    """
    if source.class_names is None:
        raise ConfigError(path, "does not name its classes, so that it is not known which of the model's it has; "
                                "leave out only_data_classes")
    places = sorted({place for place in getattr(source, "places", range(source.num_classes)) if place >= 0})
    if len(places) == source.num_classes:
        counts = contents_of(source).counts
        places = np.unique(labels_of(source, skip_errors)) if counts is None else np.flatnonzero(counts)
    found = np.asarray(places, np.int64)
    if not np.any(found >= 0):
        raise ConfigError(path, "has no example with a class")
    return found[found >= 0]


def _by_index(source: Any) -> bool:
    return isinstance(source, Relabelled) and source.by_index


def align(source: Any, names: Sequence[str] | None, count: int, path: str) -> Any:
    """A source with the labels of a model.

    Args:
        source: the source of the examples.
        names: the names of the model's classes; None: not known.
        count: number of the model's classes.
        path: where the block of the source stands, for errors.

    Raises:
        ConfigError: at `path`: the source has a class that the model does not have.
    """
    ours, counts = known_names(source), contents_of(source).counts
    try:
        places = labels.match(ours, names, count, None if counts is None else (counts > 0).tolist())
    except labels.Unmatched as error:
        raise ConfigError(path, f"{error}. Give the names of the model's classes, or leave the class out; "
                                f"{BY_INDEX}") from None
    if places is None:
        fits = source.num_classes <= count if ours is None else source.num_classes == count
        if not fits:
            raise ConfigError(path, f"has {source.num_classes} classes, the model {count}, and " + (
                f"the names of the model's are not known to compare. {BY_INDEX}" if ours else
                "only numbers to go by; use data of the model's classes"))
        if ours or _by_index(source):
            why = "labels='index'" if _by_index(source) else "the names of the model's classes are not known"
            logger.info("%s: classes are taken by their numbers (%s)%s", path, why, _told(source, names))
        return source
    if names is None:
        logger.info("%s: the model's 1,000 classes are taken for ImageNet's, in its order; they have no names", path)
    if places == tuple(range(count)):
        return source
    return _by_name(source, places, tuple(names or labels.wnids()), path)


def _by_name(source: Any, places: Sequence[int], names: tuple[str, ...], path: str) -> Relabelled:
    """A source whose classes have been found among `names`, which is said."""
    ours, place = next((pair for pair in zip(source.class_names, places, strict=True) if pair[1] >= 0), (None, None))
    logger.info("%s: classes are taken by their names: %r is class %s of %s, %r", path, ours, place, len(names),
                None if place is None else names[place])
    return Relabelled(source, places, len(names), names)


def _told(source: Any, names: Sequence[str] | None) -> str:
    """": cat → dog", what classes taken by their numbers become."""
    if not (source.class_names and names):
        return ""
    pairs = [f"{ours} → {theirs}" for ours, theirs in zip(source.class_names, names, strict=False)]
    return f": {first_few(pairs)}"


def for_head(
    source: Any, count: int, known: Sequence[str] | None, allow_unused: bool, path: str, count_path: str
) -> Any:
    """Training data with the labels of a head of `count` classes; its names are the head's.

    Where the head is that of a model whose classes are known, or ImageNet's, examples keep their numbers there: the
    data may be a part of its classes, or have them in another order.

    Args:
        source: the source of the examples.
        count: width of the head.
        known: the names of the classes of the model that training goes on or begins from; None: not known.
        allow_unused: whether classes may be without examples.
        path: where the block of the source stands, for errors.
        count_path: where the width of the head is set, for errors.

    Raises:
        ConfigError: a class has no examples, there is one class alone, or the head is of another size than the data.
    """
    _check_counts(source.source if _by_index(source) else source, allow_unused, path)
    if count < source.num_classes:
        raise ConfigError(count_path, f"makes {count} classes, the data has {source.num_classes}; make it so "
                                     f"many{_twice(source)}")
    for names in (known, labels.wnids()):
        if names is None or len(names) != count:
            continue
        try:
            places = labels.match(known_names(source), names, count)
        except labels.Unmatched:
            continue
        if places is not None:
            return source if places == tuple(range(count)) else _by_name(source, places, tuple(names), path)
    have, way_out = source.num_classes, f"make it {source.num_classes}{_twice(source)}"
    if _by_index(source):
        have, way_out = len(source.places), "leave labels at 'name'"
    if count > have and not allow_unused and not _is_part_of_imagenet(source, count):
        raise ConfigError(count_path, f"makes {count} classes and the data has {have}, which are not known to be among "
                                      f"them; {way_out}, or set config.allow_unused_classes=True")
    if count == source.num_classes:
        return source
    names = source.class_names and pad(source.class_names, count)
    return Relabelled(source, range(source.num_classes), count, names, _by_index(source))


def _twice(source: Any) -> str:
    count = source.num_classes
    return f", also in every onehot (both at once where the config file takes the argument classes={count})"


def _is_part_of_imagenet(source: Any, count: int) -> bool:
    """Whether examples keep numbers that are, by the names of their folders, places among ImageNet's classes."""
    numbers = _by_index(source) and source.source.class_names
    return count == len(labels.wnids()) and bool(numbers) and labels.are_numbers(numbers)


def _check_counts(source: Any, allow_unused: bool, path: str) -> None:
    contents = contents_of(source)
    counts = contents.counts
    present = range(source.num_classes) if counts is None else np.flatnonzero(counts)
    if len(present) == 1:
        name = class_name(source.class_names, int(present[0]))
        raise ConfigError(path, f"holds one class alone, {name}: there is nothing to tell apart; give it a second")
    if counts is not None and not allow_unused and len(present) < len(counts):
        empty = [class_name(source.class_names, int(i)) for i in np.flatnonzero(counts == 0)]
        more = f", nor have {len(empty) - 1} other classes" if len(empty) > 1 else ""
        left_out = describe_left_out(contents.left_out)
        raise ConfigError(path, f"class {empty[0]!r} has no image that can be used in this split{more}{left_out}. "
                                "Take it out, give it some, or set config.allow_unused_classes=True")
