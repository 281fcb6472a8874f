"""Images whose classes a file tells, or several by split: the layout of `labels_file`."""
from __future__ import annotations

import collections
import os
import posixpath
import re
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cb_vit.config import ConfigError
from cb_vit.datasets.contents import Absent, DataError
from cb_vit.datasets.label_table import Keys, Row, read_rows
from cb_vit.datasets.labels import in_order
from cb_vit.datasets.layouts import SPLITS, THREADS, TO_EVALUATE, TRAIN, HeldOut, Layout, Parts
from cb_vit.datasets.listing import Part, images_in, place_of

ANY = "{split}"


class Labelled:
    """Images under a root, in whatever folders, and one file or several that tell their classes.

    Args:
        root: the folder that paths are relative to; or, where they are not there, the folder in it that is called as
            the split.
        files: the files of labels: by split, or one alone by None, whose rows say the split.
        keys: names of their columns.
        path: where the block of the data stands, for errors.

    Raises:
        ConfigError: under `path`: columns are not clear.
        DataError: a line cannot be right.
    """

    def __init__(self, root: str, files: Mapping[str | None, str], keys: Keys, path: str):
        self.root, self.files, self.keys, self.path = root, files, keys, path
        self._rows: dict[str, list[Row]] = {}
        self.tells_splits = True
        if None not in files:
            self.splits = sorted(files)
            return
        for row in read_rows(files[None], keys, path):
            self._rows.setdefault(row.split or self._only_split(), []).append(row)
            self.tells_splits = row.split is not None
        self.splits = sorted(self._rows)

    def find(self, names: Sequence[str]) -> Parts:
        """See `Layout`."""
        given_by = [TRAIN] if TRAIN in self.splits else self.splits
        classes = in_order({row.label for split in given_by for row in self.rows(split)})
        numbers = {name: number for number, name in enumerate(classes)}
        listed = {row.file for split in {*names, *self._rows} for row in self.rows(split)}
        counted: set[str] = set()
        return classes, {name: part_of(self._folder(name), self.rows(name), numbers, self.file(name), name, listed,
                                       counted) for name in names}

    def missing(self, error: ConfigError) -> ConfigError:
        """See `Layout`."""
        where = os.path.basename(self.files.get(None, ""))
        told = f"those of {where}" if where else f"the files that {self.path}.labels_file stands for"
        if not self.tells_splits:
            told = f"{where} has no column of splits; with holdout=0.1 they are train and val"
        return ConfigError(error.path, f"{error.message} ({told})")

    def rows(self, split: str) -> list[Row]:
        """The rows of a split."""
        if split not in self._rows:
            self._rows[split] = read_rows(self.files[split], self.keys, self.path)
            if self._rows[split][0].split is not None:
                raise ConfigError(f"{self.path}.labels_file", f"{self.files[split]} has a column of splits; give its "
                                                              f"own name, without {ANY}")
        return self._rows[split]

    def file(self, split: str) -> str:
        """The file of labels that tells of a split."""
        return self.files.get(None) or self.files[split]

    def _only_split(self) -> str:
        """What the only split is called: as the file, if that is how splits are called."""
        stem = os.path.splitext(os.path.basename(self.files[None]))[0]
        return stem if stem in SPLITS else TRAIN

    def _folder(self, split: str) -> str:
        inner, first = os.path.join(self.root, split), self.rows(split)[0].file
        if os.path.isdir(inner) and not _Images(self.root).find(first) and _Images(inner).find(first):
            return inner
        return self.root


def labelled(root: str, labels_file: str, keys: Keys, share: float | None, seed: int, path: str) -> Layout:
    """The layout of images whose classes a file tells.

    Args:
        root: the folder of the images.
        labels_file: path of the file, absolute or relative to the root; `{split}` in its name stands for any.
        keys: names of its columns.
        share: share of each class to hold out where there is no split to evaluate on; None: nothing is.
        seed: seed of what is held out.
        path: where the block of the data stands, for errors.

    Raises:
        Absent: under `path`: there is no such file.
        ConfigError: under `path`: its columns are not clear.
        DataError: a line cannot be right.
    """
    file = os.path.normpath(os.path.join(root, os.path.expanduser(labels_file)))
    files = _by_split(file) if ANY in labels_file else {None: file}
    if not files or not all(map(os.path.exists, files.values())):
        raise Absent(f"{path}.labels_file", f"there is no file {file}; give its path, absolute or relative to root")
    layout = Labelled(root, files, keys, path)
    if share and not layout.tells_splits:
        return HeldOut(layout, layout.splits[0], share, seed)
    if share and TRAIN in layout.splits and not TO_EVALUATE.intersection(layout.splits):
        return HeldOut(layout, TRAIN, share, seed)
    return layout


def _by_split(file: str) -> dict[str | None, str]:
    """The files that a path with `{split}` stands for, by split."""
    folder, name = os.path.split(file)
    known = re.compile(re.escape(name).replace(re.escape(ANY), r"([\w-]+)", 1))
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return {found[1]: os.path.join(folder, name) for name in names if (found := known.fullmatch(name))}


def part_of(folder: str, rows: Sequence[Row], numbers: Mapping[str, int], source: str, split: str, listed: set[str],
            counted: set[str]) -> Part:
    """The images of a split.

    Args:
        folder: absolute path of the folder that paths are relative to.
        rows: what the file of labels says of the split.
        numbers: number of each class, by name.
        source: path of that file.
        split: name of the split.
        listed: paths of all images that the file tells of, in whatever split.
        counted: folders whose other entries are counted already; those looked through here are added.

    Raises:
        DataError: a row is of an unknown class, or of an image that there is not.
    """
    images = _Images(folder)
    images.scan({posixpath.dirname(row.file) for row in rows})
    files, absent, lines = [], [], {}
    for row in rows:
        if row.label not in numbers:
            raise DataError(f"{source}: line {row.line}: class {row.label!r} of {split} is not in train, which gives "
                            "the classes")
        found = images.find(row.file)
        if len(found) > 1:
            raise DataError(f"{source}: line {row.line}: {row.file!r} may be {found[0]} or {found[1]}; write which")
        if not found:
            absent.append(row)
            continue
        if (first := lines.setdefault(found[0], row.line)) != row.line:
            raise DataError(f"{source}: line {row.line}: {row.file!r} stands in line {first} already; take one out")
        name = os.fsencode(found[0])
        files.append((place_of(row.label, name), numbers[row.label], name, images.sizes[found[0]]))
    if absent:
        raise _absent(absent, images, source)
    return Part(folder, False, sorted(files), images.left_out(listed, counted, source))


def _absent(rows: Sequence[Row], images: _Images, source: str) -> DataError:
    """The error that there are no images for these rows."""
    first, count = rows[0], len(rows) - 1
    more = f", nor are those of {count:,} other lines" if count else ""
    names = "; if the line names columns, set image_key and label_key" if first.line == 1 else ""
    return DataError(f"{source}: line {first.line}: {first.file!r} is no image in {images.root}"
                     f"{images.hint(first.file)}{more}; bring it back, take the line out, or set root to the folder "
                     f"that it is relative to{names}")


class _Images:
    """The images under a folder, by their paths; each folder is looked through once."""

    def __init__(self, root: str):
        self.root = root
        self.sizes: dict[str, int] = {}
        self._others: dict[str, collections.Counter[str]] = {}
        self._stems: dict[str, list[str]] | None = None  # of paths, made on first use: a list of a million needs none

    def scan(self, folders: set[str]) -> None:
        """Look through folders, given relative to the root."""
        new = sorted(folders - self._others.keys())
        with ThreadPoolExecutor(THREADS) as pool:  # on network disks the time goes into waiting
            found = list(pool.map(lambda folder: images_in(os.path.join(self.root, folder)), new))
        for folder, (images, others) in zip(new, found, strict=True):
            self._others[folder] = others
            prefix = folder and f"{folder}/"
            for name, size in sorted(images):
                self.sizes[prefix + os.fsdecode(name)] = size
        self._stems = None

    def find(self, path: str) -> list[str]:
        """The image at a path; or, where there is none, those that have it as their name without extension."""
        if path not in self.sizes and (folder := posixpath.dirname(path)) not in self._others:
            self.scan({folder})
        if path in self.sizes:
            return [path]
        if self._stems is None:
            self._stems = {}
            for other in self.sizes:
                self._stems.setdefault(other.rpartition(".")[0], []).append(other)
        return self._stems.get(path, [])

    def hint(self, path: str) -> str:
        """What may be the matter with a path that is not there, in words for an error."""
        if os.path.lexists(os.path.join(self.root, path)):
            return ", but something else, or hidden"
        alike = next((other for other in self.sizes if _alike(other) == _alike(path)), None)
        return f" (there is {alike!r}, written otherwise)" if alike else ""

    def left_out(self, listed: set[str], counted: set[str], source: str) -> collections.Counter[str]:
        """What else than images and the file of labels is there, by reason, in folders that are not counted yet."""
        new = {folder for folder in self._others if os.path.join(self.root, folder) not in counted}
        counted.update(os.path.join(self.root, folder) for folder in new)
        total = sum((self._others[folder] for folder in new), collections.Counter())
        if os.path.relpath(os.path.dirname(source), self.root).removeprefix(".") in new:
            total[os.path.splitext(source)[1].lower() or "without extension"] -= 1
        unlisted = sum(path not in listed and path.rpartition(".")[0] not in listed
                       and posixpath.dirname(path) in new for path in self.sizes)
        return total + collections.Counter({f"not in {os.path.basename(source)}": unlisted})


def _alike(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
