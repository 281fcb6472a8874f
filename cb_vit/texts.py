"""What others wrote: how it is shown to people, and the one way in which JSON is read."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

MAX_DEPTH = 64  # of lists and objects in each other; all that reads it afterwards may recurse
# What a terminal obeys or cannot encode: controls, ends of lines, directions of writing, halves of pairs (so Python has
# the bytes of a file name that are no UTF-8).
_UNSHOWN = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: Any) -> str:
    """`text` in one line for a terminal, a log or a picture: whatever could do more there than be read is escaped."""
    return _UNSHOWN.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def first_few(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names in one line, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short_names(places: Sequence[str]) -> list[str]:
    """The ends of some paths that differ: as many of their parts as tell all of them apart, or else the paths."""
    parts = [tuple(part for part in place.split("/") if part) for place in places]
    ends = (["/".join(path[-count:]) for path in parts] for count in range(1, 1 + max(map(len, parts), default=0)))
    return next((names for names in ends if len(set(names)) == len(names)), list(places))


def parse_json(content: bytes, encodable: bool = False) -> Any:
    """What a JSON text from anywhere says.

    Args:
        content: the text, in UTF-8 with or without a byte order mark, or in UTF-16 or -32.
        encodable: whether names that hold half of a surrogate pair, which could never be printed or written, are
            refused.

    Raises:
        ValueError: it is not JSON, nested too deep, says a name twice or has a number that nothing can hold.
    """
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Python keeps the last of two and other readers may keep the first: the file would mean two things.
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice")
        if encodable:
            "".join(found).encode()
        return found

    try:
        found = json.loads(content, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Few brackets cannot be deep, so most texts need no walk.
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH:
        _check_depth(found)
    return found


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _check_depth(tree: Any) -> None:
    # Level by level, as a function that calls itself would meet the limit of recursion that it is to guard against.
    level, depth = [tree], 0
    while level := [item for node in level if isinstance(node, dict | list)
                    for item in (node.values() if isinstance(node, dict) else node)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
