"""webdataset's tar files: entries that share a name up to the first dot are one example."""
from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from cb_vit.datasets.contents import DataError
from cb_vit.datasets.incoming import MAX_IMAGE, Example, by_split, read_classes, to_label
from cb_vit.datasets.listing import EXTENSIONS
from cb_vit.io import open_regular
from cb_vit.texts import parse_json

ENDING = ".tar"
IMAGES = {extension[1:] for extension in EXTENSIONS}
TEXTS = ("cls", "txt", "json")


class Tars:
    """An `Incoming` of tar files.

    Args:
        root: the folder of the files, or one file; names of classes stand in `classnames.txt` beside them, if anywhere.
        image_key: the extension of images; None: any that is one.
        label_key: what holds the label: "cls", "txt", or a key of the JSON; None: "cls" if there, or else the key
            "label".

    Raises:
        ConfigError: files are missing.
    """

    def __init__(self, root: str, image_key: str | None, label_key: str | None):
        self.splits = by_split(root, ENDING)
        self.images = {image_key.removeprefix(".").lower()} if image_key else IMAGES
        self.label_key = label_key
        folder = root if os.path.isdir(root) else os.path.dirname(root)
        names = os.path.join(folder, "classnames.txt")
        self.class_names = read_classes(names) if os.path.exists(names) else None

    def examples(self, file: str, images: bool) -> Iterator[Example]:
        """See `Incoming`."""
        seen = set()
        for key, entries in _samples(file, self.images if images else set()):
            where = f"{file}: {key}"
            if key in seen:
                raise DataError(f"{where} stands there twice, with other entries between")
            seen.add(key)
            found = sorted(self.images & entries.keys())
            if len(found) != 1:
                raise DataError(f"{where} has {' and '.join(found) or 'no image'} (its entries are "
                                f"{', '.join(entries)}); each example has one image, which --image_key can choose")
            name = os.fsencode(key).decode(errors="replace")  # a name need not be UTF-8, and an id must
            yield Example(where, name, self._label(entries, where), entries[found[0]])

    def _label(self, entries: dict[str, bytes | None], where: str) -> int | str:
        key = self.label_key or ("cls" if "cls" in entries else "label")
        try:
            if key not in ("cls", "txt"):
                told = parse_json(entries.get("json") or b"{}", encodable=True)
                value = told.get(key) if isinstance(told, dict) else None
            else:
                text = (entries.get(key) or b"").decode("utf-8-sig").strip()
                value = int(text) if text.removeprefix("-").isdecimal() and text.isascii() else text
        except ValueError as error:
            raise DataError(f"{where}: its label cannot be read: {error}") from None
        if value in (None, ""):
            raise DataError(f"{where}: no label {key!r} (its entries are {', '.join(entries)}); set --label_key to "
                            "cls, txt or a key of the JSON")
        return to_label(value, where)


def _samples(file: str, images: set[str]) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(name, content by extension) of each example; of images only those asked for are read."""
    current, entries = None, {}
    for name, content in _entries(file, images):
        folder, base = os.path.split(name)
        key, extension = os.path.join(folder, base.partition(".")[0]), _extension(name)
        if key != current:
            if current is not None:
                yield current, entries
            current, entries = key, {}
        if extension in entries:
            raise DataError(f"{file}: {name} stands there twice")
        entries[extension] = content
    if current is not None:
        yield current, entries


def _extension(name: str) -> str:
    """What stands after the first dot of a name, as webdataset has it: "input.png"."""
    return os.path.basename(name).partition(".")[2].lower()


def _entries(file: str, images: set[str]) -> Iterator[tuple[str, bytes | None]]:
    with open_regular(file) as opened:
        try:
            yield from _members(opened, file, images)
        except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: is no whole tar file: {error}; copy it anew") from None


def _members(opened: IO[bytes], file: str, images: set[str]) -> Iterator[tuple[str, bytes | None]]:
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # which would hold all that there were
            name = member.name.removeprefix("./")
            if member.isdir() or os.path.basename(name).startswith("."):
                continue
            _check_member(member, file)
            wanted = _extension(name) in {*TEXTS, *images}
            yield name, tar.extractfile(member).read() if wanted else None
        # A tar ends with blocks of zeros; where it was cut between two entries, or is damaged, there are none.
        opened.seek(tar.offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{file}: is truncated or damaged at byte {tar.offset}; copy it anew")


def _check_member(member: Any, file: str) -> None:
    if not member.isreg():
        raise DataError(f"{file}: {member.name} is a link or a device; pack the files themselves")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{file}: {member.name} lies outside; pack with names below one folder")
    if member.size > MAX_IMAGE:
        raise DataError(f"{file}: {member.name} is of {member.size:,} bytes, more than an image can be")
