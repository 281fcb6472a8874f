"""From files of many examples to a prepared data set: checked first, then written in the same order."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cb_vit.config import ConfigError
from cb_vit.datasets import parquet, preparing, tars
from cb_vit.datasets.contents import DataError
from cb_vit.datasets.incoming import Example, Incoming
from cb_vit.datasets.labels import in_order

FORMS = {parquet.ENDING: parquet.Parquet, tars.ENDING: tars.Tars}
MAX_CLASSES = 1_000_000  # above, a number is an id
Progress = Callable[[str, int, Iterator[Example]], Iterator[Example]]  # (split, number of examples, examples)


def open_incoming(src: str, image_key: str | None, label_key: str | None) -> Incoming:
    """The files of a folder, or one file, in the form that they have.

    Args:
        src: path of the folder or file.
        image_key: what holds the images; None: what can.
        label_key: what holds the labels; None: what is known.

    Raises:
        ConfigError: at "SRC", "--image_key" or "--label_key".
        DataError: a file is damaged.
    """
    root = os.path.abspath(os.path.expanduser(src))
    if not os.path.exists(root):
        raise ConfigError("SRC", f"{root} is not there; give a folder of {' or '.join(FORMS)} files")
    found = [ending for ending in FORMS if parquet.by_split(root, ending)]
    if len(found) != 1:
        fault = f"holds {' and '.join(found)} files" if found else (
            f"holds no {' or '.join(FORMS)} file (image folders need no import: --config=folder:root=…)")
        raise ConfigError("SRC", f"{root} {fault}; give a folder of one kind")
    return FORMS[found[0]](root, image_key, label_key)


def import_data(
    incoming: Incoming, home: str, class_names: Sequence[str] | None, check_image: Callable[[bytes], None],
    progress: Progress,
) -> None:
    """Write all examples, under the numbers of their classes.

    Labels are read first, and alone: whether they are of one kind, and which there are.

    Args:
        incoming: the files.
        home: the folder of the data set to write.
        class_names: names of the classes; None: those that the files tell, or else the labels themselves.
        check_image: raises a `ValueError` for what is no image.
        progress: passes examples on, and shows how many have passed.

    Raises:
        DataError: an example cannot be right; names file and place.
        CannotWrite: the disk is full, or the like.
    """
    given = class_names or incoming.class_names
    counts, names = _survey(incoming, given)
    numbers = {name: number for number, name in enumerate(names)}

    def examples(split: str) -> Iterator[Example]:
        for file in incoming.splits[split]:
            for example in incoming.examples(file, images=True):
                try:
                    check_image(example.image)
                except ValueError as error:
                    raise DataError(f"{example.where}: {error}") from None
                label = numbers[example.label] if isinstance(example.label, str) else example.label
                yield example._replace(label=label)

    preparing.write(home, {split: progress(split, counts[split], examples(split)) for split in incoming.splits}, names)


def _survey(incoming: Incoming, given: Sequence[str] | None) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """Number of examples of each split, and the names of the classes."""
    counts, kinds, labels = {}, {}, {}
    for split, files in incoming.splits.items():
        counts[split] = 0
        for file in files:
            for example in incoming.examples(file, images=False):
                counts[split] += 1
                kinds.setdefault(type(example.label), example)
                labels.setdefault(example.label, example)
                if len(kinds) > 1:
                    first, other = kinds.values()
                    raise DataError(f"{other.where}: label {other.label!r} is of another kind than {first.label!r} in "
                                    f"{first.where}; labels are all numbers or all names")
        if not counts[split]:
            raise DataError(f"{files[0]}: {split} holds no example")
    return counts, _names(labels, given)


def _names(labels: Mapping[int | str, Example], given: Sequence[str] | None) -> tuple[str, ...]:
    numbers = [label for label in labels if isinstance(label, int)]
    most = len(given) if given else MAX_CLASSES
    for label, example in labels.items():
        if isinstance(label, str) and given and label not in given:
            raise DataError(f"{example.where}: class {label!r} is not among the {most} classes that are named")
        # -1 stands for a label that is not public.
        if isinstance(label, int) and not -1 <= label < most:
            raise DataError(f"{example.where}: label {label} is outside 0 … {most - 1}")
    names = tuple(given or (map(str, range(max(numbers) + 1)) if numbers else in_order(labels)))
    if not names:
        raise ConfigError("--classes", "no example has a label, so the classes are to be named; give a file of names")
    if len(set(names)) < len(names):
        raise ConfigError("--classes", "the names of classes are not different ones")
    if odd := [name for name in names if not _is_storable(name)]:
        raise ConfigError("--classes", f"class {odd[0]!r} is empty, no text, has spaces at an end or several lines; "
                                       "rename it")
    return names


def _is_storable(name: str) -> bool:
    """Whether a name comes back from a file with a name a line."""
    return name == name.strip() and len(name.splitlines()) == 1 and name == name.encode(errors="replace").decode()


def block_of(name: str, data_dir: str, split: str) -> dict[str, Any]:
    """The block of a config that reads an import."""
    return dict(name=name, data_dir=data_dir, split=split, id_key="id")
