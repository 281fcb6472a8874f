"""What classes are called, so that a label means the same thing on both sides: names are compared, not numbers.

ImageNet-1k's 1 000 classes have three kinds of names in public lists, which are one vocabulary here: WordNet's numbers
("n01440764"), words ("tench", or all synonyms, "tench, Tinca tinca") and their places, 0 … 999, in the order of
ILSVRC-2012. `imagenet.txt` is that list (the lines of LOC_synset_mapping.txt, which ILSVRC publishes). Everywhere else
a name is itself, and a whole number its value.
"""
from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Collection, Iterable, Sequence

from cb_vit.texts import first_few

Names = Sequence[str]


class Unmatched(ValueError):
    """Two lists of classes that are not about the same things: names the first class that differs."""


def match(
    ours: Names | None, theirs: Names | None, count: int, occurs: Sequence[bool] | None = None
) -> tuple[int, ...] | None:
    """Where each class of ours stands among the `count` classes of another list.

    A list of 1 000 classes without names is taken for ImageNet's, in its order, where ours are classes of ImageNet: no
    published model has another.

    Args:
        ours: the names of our classes; None: not known.
        theirs: the names in the other list; None: not known.
        count: number of classes in the other list.
        occurs: whether there are examples of each of our classes: the others need no place; None: there are of all.

    Returns:
        For each class of ours its number in the other list, -1 where it has none and needs none. None: one of the
        lists has no names, so that only their order is left to go by.

    Raises:
        Unmatched: a class has no place in the other list, or several, or shares one with another.
    """
    if ours is None or (theirs is None and not assumes_imagenet(ours, theirs, count)):
        return None
    ours, theirs = tuple(ours), wnids() if theirs is None else tuple(theirs)
    if ours == theirs:
        return tuple(range(count))
    find = _Finder(ours, theirs)
    places = [find(i, must=occurs is None or bool(occurs[i])) for i in range(len(ours))]
    owners: dict[int, int] = {}
    for i, place in enumerate(places):
        if place >= 0 and (other := owners.setdefault(place, i)) != i:
            raise Unmatched(f"classes {ours[other]!r} and {ours[i]!r} are both {theirs[place]!r} there")
    return tuple(places)


def assumes_imagenet(ours: Names | None, theirs: Names | None, count: int) -> bool:
    """Whether `match` takes a list without names for ImageNet's 1 000 classes."""
    return theirs is None and ours is not None and count == len(wnids()) and all(_ids(ours, numbers=True))


def are_numbers(names: Collection[str]) -> bool:
    """Whether all of these are whole numbers, and different ones."""
    return all(map(_is_number, names)) and len(set(map(int, names))) == len(names)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Different names in the order of their classes: sorted, as numbers where all are."""
    return tuple(sorted(names, key=int if are_numbers(names) else None))


@functools.cache
def wnids() -> tuple[str, ...]:
    """WordNet's numbers of ImageNet-1k's classes, in the order of ILSVRC-2012."""
    return tuple(line.split(" ", 1)[0] for line in _lines())


def imagenet_ids(name: str, numbers: bool) -> frozenset[int]:
    """The classes of ImageNet-1k, 0 … 999, that a name may stand for; two or more where words are ambiguous.

    What stands in published lists (a wnid, the first synonym, or all of them) comes before the other synonyms.

    Args:
        name: the name as it stands in a list; "_" is a space.
        numbers: whether "17" is class 17.
    """
    if _is_number(name):
        return frozenset({int(name)} if numbers and int(name) < len(wnids()) else ())
    words = name.replace("_", " ").strip()
    return next((table[fold(words)] for fold, table in _tables() if fold(words) in table), frozenset())


class _Finder:
    """Finds the places of one list's classes in another."""

    def __init__(self, ours: Names, theirs: Names):
        self._ours, self._theirs = ours, theirs
        self._whole = _is_whole(theirs)
        # A number is a class of ImageNet only where one side has all of these.
        numbers = self._whole or _is_whole(ours)
        self._ids = [_ids(names, numbers) for names in (theirs, ours)]
        self._places: dict[str, list[int]] = {}
        for place, name in enumerate(theirs):
            self._places.setdefault(_key(name), []).append(place)

    def __call__(self, number: int, must: bool) -> int:
        """The place of class `number`; -1 if it has none and `must` not have one."""
        try:
            return self._find(number)
        except Unmatched:
            if must:
                raise
            return -1

    def _find(self, number: int) -> int:
        name, (their_ids, our_ids) = self._ours[number], self._ids
        own, meant = self._places.get(_key(name), []), our_ids[number]
        if len(own) == 1 and not self._whole:
            return own[0]
        places = [place for place, ids in enumerate(their_ids) if ids & meant] or own
        if not places:
            raise Unmatched(f"class {name!r} is not among {first_few(self._theirs)}")
        meant |= frozenset().union(*(their_ids[place] for place in places))
        if len(places) == 1 and len(meant) == 1:
            return places[0]
        if len(meant) > 1:
            which = " and ".join(wnids()[i] for i in sorted(meant))
            raise Unmatched(f"class {name!r} stands for {which} of ImageNet; call it by the one that is meant")
        raise Unmatched(f"class {name!r} stands {len(places)} times among {first_few(self._theirs)}")


def _is_whole(names: Names) -> bool:
    """Whether a list is that of ImageNet-1k's classes, all of them, in any order."""
    # The length first: most lists are settled by it, without a look at the names.
    return len(names) == len(wnids()) and set().union(*_ids(names, numbers=True)) == set(range(len(names)))


def _ids(names: Names, numbers: bool) -> list[frozenset[int]]:
    """The classes of ImageNet that each name may stand for.

    Words that stand for two are settled where the list is that of all classes in the order of ILSVRC.
    """
    found = [imagenet_ids(name, numbers) for name in names]
    if len(names) == len(wnids()) and all(place in ids for place, ids in enumerate(found)):
        return [frozenset({place}) for place in range(len(names))]
    return found


@functools.cache
def _lines() -> tuple[str, ...]:
    text = importlib.resources.files(__package__).joinpath("imagenet.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@functools.cache
def _tables() -> tuple[tuple[Callable[[str], str], dict[str, frozenset[int]]], ...]:
    """(how a name is spelt, spelling → classes), the more certain first: published names, then further synonyms."""
    published, further = [], []
    for number, line in enumerate(_lines()):
        wnid, words = line.split(" ", 1)
        first, *others = words.split(", ")
        published += [(name, number) for name in (wnid, words, first)]
        further += [(name, number) for name in others]
    return tuple((fold, _table(entries, fold)) for entries in (published, further) for fold in (str, str.casefold))


def _table(entries: Iterable[tuple[str, int]], fold: Callable[[str], str]) -> dict[str, frozenset[int]]:
    table: dict[str, frozenset[int]] = {}
    for name, number in entries:
        table[fold(name)] = table.get(fold(name), frozenset()) | {number}
    return table


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _key(name: str) -> str:
    return str(int(name)) if _is_number(name) else name
