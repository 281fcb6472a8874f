"""The folder of `cb-vit predict --attention`: a picture of where the model looks for each image, and an index."""
from __future__ import annotations

import collections
import os
from collections.abc import Collection, Sequence

from cb_vit import io
from cb_vit.analysis.attention_maps import View
from cb_vit.analysis.attention_pictures import draw_index, draw_maps
from cb_vit.config import ConfigError
from cb_vit.monitor.contact_sheet import Line
from cb_vit.monitor.style import FAINT, INK, RIGHT, WRONG
from cb_vit.prediction import Prediction
from cb_vit.texts import printable

INDEX = "index.png"
MOST = 64  # images in the index


class AttentionFolder:
    """Pictures of the attention of some images.

    Folders that differ are kept, and `a.jpg` becomes `a.png`; where two would meet, they keep their extensions too.

    Args:
        folder: where the pictures go.
        files: the images.
        overwrite: whether pictures that are there may be replaced.

    Attributes:
        pictures: path of the picture of each image.

    Raises:
        ConfigError: a picture would take the place of an image or of another file; raised at "--attention".
    """

    def __init__(self, folder: str, files: Sequence[str], overwrite: bool):
        common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        inside = {file: os.path.relpath(file, common) for file in files}
        names = _unique_pictures(set(inside.values()))
        self._index = os.path.join(folder, INDEX)
        self.pictures = {file: os.path.join(folder, names[name]) for file, name in inside.items()}
        self._found: list[tuple[Prediction, View, list[Line]]] = []
        places = [*self.pictures.values(), *[self._index] * (len(files) > 1)]
        if eaten := set(map(os.path.realpath, places)) & set(map(os.path.realpath, files)):
            raise ConfigError("--attention", f"{min(eaten)} is one of the images; choose another folder for the "
                                             "pictures")
        there = next(filter(os.path.lexists, places), None)
        if there and not overwrite:
            raise ConfigError("--attention", f"{there} is already there; choose another folder, or give --overwrite")

    def add(self, found: Prediction, view: View, labels: Sequence[str]) -> None:
        """Draw the picture of one image.

        Args:
            found: what the model says of it, with maps.
            view: which maps these are.
            labels: names of the classes.
        """
        said, probability, name = labels[found.classes[0]], found.probabilities[0], os.path.basename(found.path)
        true = true_label(found.path, labels)
        title = f"{said}   {probability:.1%}" + (f"   (true label: {true})" if true else "")
        _write(self.pictures[found.path], draw_maps(
            found.image, dict(zip(view.titles, found.maps, strict=True)), printable(title),
            printable(f"attention of {view.who}  \u00b7  {name}"), view.apart))
        if len(self._found) < MOST:
            colour = INK if true is None else RIGHT if said == true else WRONG
            lines = [Line(said, f"  {probability:.1%}", colour), Line(name, colour=FAINT)]
            self._found.append((found, view, [lines[0], *[Line(f"true label: {true}")] * bool(true), lines[1]]))

    def finish(self) -> None:
        """Draw the index, where there are several images."""
        if len(self.pictures) == 1 or not self._found:
            return
        view, more = self._found[0][1], len(self.pictures) > len(self._found)
        _write(self._index, draw_index(
            [found.image for found, *_ in self._found], [found.maps[view.mean] for found, *_ in self._found],
            [lines for *_, lines in self._found],
            f"Where the model looks: {'the first ' * more}{len(self._found)} of {len(self.pictures)} images",
            f"{view.titles[view.mean]}, attention of {view.who}"))


def true_label(path: str, labels: Sequence[str]) -> str | None:
    """The class that the folder of an image is called after; None: not known."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return folder if folder in labels else None


def _unique_pictures(names: Collection[str]) -> dict[str, str]:
    """`a/b.jpg` → `a/b.png`, or `a/b.jpg.png` where another image, or the index, has that already."""
    pictures = {name: f"{os.path.splitext(name)[0]}.png" for name in names}
    while max((counts := collections.Counter([*pictures.values(), INDEX])).values()) > 1:
        pictures = {name: f"{name}.png" if counts[picture] > 1 else picture for name, picture in pictures.items()}
    return pictures


def _write(path: str, png: bytes) -> None:
    with io.writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        io.write_atomic(path, png)
