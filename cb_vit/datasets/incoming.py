"""What an import reads: files of many examples, by split; and what is alike whatever their form."""
from __future__ import annotations

import collections
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from cb_vit.config import ConfigError
from cb_vit.datasets.contents import DataError
from cb_vit.datasets.layouts import SPLITS
from cb_vit.io import open_regular
from cb_vit.texts import first_few

ONLY = "train"  # the split of files that name none
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?")
MAX_IMAGE = 1 << 30  # bytes; no image is larger, and a damaged header may claim so


class Example(NamedTuple):
    """An example as it is stored.

    Attributes:
        where: file and place, for errors.
        id: its name.
        label: its class, by number or name.
        image: the encoded image; None: it was not asked for.
    """

    where: str
    id: str
    label: int | str
    image: bytes | None


@runtime_checkable
class Incoming(Protocol):
    """Files of one form.

    Attributes:
        splits: the files of each split, in order.
        class_names: names of the classes by number; None: the files do not say.
    """

    splits: dict[str, list[str]]
    class_names: tuple[str, ...] | None

    def examples(self, file: str, images: bool) -> Iterator[Example]:
        """The examples of a file, one by one in its order.

        Args:
            file: path of the file.
            images: whether images are wanted.

        Raises:
            DataError: the file is damaged, or an example is not of the form; names file and place.
        """


def by_split(root: str, ending: str) -> dict[str, list[str]]:
    """The files below a folder, by the split that their names or their folders tell.

    Args:
        root: a folder, or one file.
        ending: how names of the files end, such as ".tar".

    Raises:
        ConfigError: some files tell their split and others do not; there are several sets; or a file of those that are
            counted is not there. Raised at "SRC".
        OSError: a folder cannot be read.
    """
    found = collections.defaultdict(list)
    for file in _files(root, ending):
        split, group = _split_of(file, root, ending)
        found[split].append((group, file))
    if None in found and len(found) > 1:
        raise ConfigError("SRC", f"{found[None][0][1]} does not tell its split, and other files do; give a folder of "
                                 "one kind")
    for split, files in found.items():
        if len(groups := sorted({group for group, _ in files})) > 1:
            raise ConfigError("SRC", f"{root} holds {split or ONLY} {len(groups)} times: {first_few(groups)}; give the "
                                     "folder of one of them")
        _check_count([file for _, file in files], ending)
    return {split or ONLY: [file for _, file in files] for split, files in found.items()}


def to_label(value: object, where: str) -> int | str:
    """A stored label, if it is one.

    Raises:
        DataError: it is missing, or neither a whole number nor a name.
    """
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: " + ("no label" if value in (None, "") else f"label {value!r} is no number or name"))
    return value


def read_classes(path: str) -> tuple[str, ...]:
    """The names of classes in a file, one a line.

    Raises:
        ConfigError: it cannot be read; raised at "--classes".
    """
    try:
        with open_regular(path) as file:
            names = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--classes", f"{path}: {getattr(error, 'strerror', None) or error}; give a text file in "
                                       "UTF-8 with a name a line") from None
    return tuple(name.strip() for name in names)


def _files(root: str, ending: str) -> list[str]:
    if os.path.isfile(root):
        return [root] if root.endswith(ending) else []

    def stop(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(folder, name) for name in names if name.endswith(ending) and name[0] != "."]
    return sorted(found, key=_by_number)


def _split_of(file: str, root: str, ending: str) -> tuple[str | None, str]:
    """The split of a file, if it tells, and what the files of one set share."""
    folder, name = os.path.split(file)
    stem, parent = name.removesuffix(ending), os.path.basename(folder)
    parent = parent if folder != root and parent.lower() in SPLITS else None
    shard = SHARD.fullmatch(stem)
    named = shard and re.fullmatch(r"\w+", shard["name"])  # as Hugging Face's library calls its files
    if named and not (parent and shard["name"].lower() not in SPLITS):  # a folder called as splits are tells it better
        told = [shard["name"]]
    else:
        told = [word.lower() for word in re.split(r"[^A-Za-z]+", stem) if word.lower() in SPLITS]
    told = list(dict.fromkeys([*told, parent.lower()] if parent else told))
    if len(told) > 1:
        raise ConfigError("SRC", f"{file} tells of two splits, {told[0]} and {told[1]}; rename it")
    return (told[0] if told else None), folder


def _by_number(file: str) -> list[str | int]:
    """A key to sort names by in which 10 comes after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file)]


def _check_count(files: Sequence[str], ending: str) -> None:
    """Refuse files of which some are missing, as far as their names tell."""
    shards = [SHARD.fullmatch(os.path.basename(file).removesuffix(ending)) for file in files]
    if not all(shards):
        return
    numbers, counts = {int(shard["number"]) for shard in shards}, {int(shard["count"]) for shard in shards}
    absent = sorted(set(range(min(max(counts), 100_000))) - numbers)
    if len(counts) > 1 or absent or len(numbers) < len(files):
        fault = (f"number {absent[0]} of {max(counts)} is not there" if absent and len(counts) == 1 else
                 "their numbers are not of one set")
        raise ConfigError("SRC", f"{files[0]} and its kin: {fault}; fetch them anew")
