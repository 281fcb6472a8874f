"""ImageNet as Kaggle gives it: class folders in train, and in val 50 000 images whose classes a file tells.

    ILSVRC/Data/CLS-LOC/train/n01440764/*.JPEG
    ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG …
    LOC_val_solution.csv
"""
from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from cb_vit.config import ConfigError
from cb_vit.datasets.label_table import Keys, read_rows
from cb_vit.datasets.labelled import part_of
from cb_vit.datasets.labels import in_order
from cb_vit.datasets.layouts import TRAIN, ClassFolders, Parts, folders_in

INSIDE = ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where the splits are, from what people give
SOLUTION, VAL, FILE = "LOC_val_solution.csv", "val", "ILSVRC2012_val_"


class Kaggle(ClassFolders):
    """A `Layout` of class folders, but for val.

    Args:
        root: the folder that holds the splits.
        path: where the block of the data stands, for errors.
    """

    def __init__(self, root: str, path: str):
        super().__init__(root, [name for name in folders_in(root) if name in (TRAIN, VAL)], path)

    def find(self, names: Sequence[str]) -> Parts:
        """See `Layout`."""
        others, rows = [name for name in names if name != VAL], []
        if VAL in names:
            solution = self._solution()
            rows = read_rows(solution, Keys(), self.path)
        if TRAIN in self.splits:
            classes, parts = super().find(others)
        else:
            classes, parts = in_order({row.label for row in rows}), {}
        if rows:
            numbers = {name: number for number, name in enumerate(classes)}
            listed = {row.file for row in rows}
            parts[VAL] = part_of(os.path.join(self.root, VAL), rows, numbers, solution, VAL, listed, set())
        return classes, {name: parts[name] for name in names}

    def missing(self, error: ConfigError) -> ConfigError:
        """See `Layout`."""
        return ConfigError(error.path, f"{error.message} (ImageNet as Kaggle gives it: its test has no labels)")

    def _solution(self) -> str:
        above = [os.path.abspath(os.path.join(self.root, *[".."] * up)) for up in range(4)]
        for folder in above:
            if os.path.exists(file := os.path.join(folder, SOLUTION)):
                return file
        raise ConfigError(f"{self.path}.root", f"the images in {os.path.join(self.root, VAL)} are in no class folders, "
                                               f"and there is no {SOLUTION}, which tells their classes, there nor "
                                               f"further up to {above[-1]}; put it beside ILSVRC")


def find_splits(root: str) -> str:
    """The folder that holds ImageNet's splits, where a root holds that; otherwise the root."""
    folders = (os.path.normpath(os.path.join(root, inside)) for inside in INSIDE)
    return next((folder for folder in folders
                 if any(os.path.isdir(os.path.join(folder, split)) for split in (TRAIN, VAL))), root)


def has_flat_val(root: str) -> bool:
    """Whether images of ImageNet's val lie in that folder itself."""
    if not os.path.isdir(os.path.join(root, VAL)):
        return False
    with os.scandir(os.path.join(root, VAL)) as entries:
        return any(entry.name.startswith(FILE) for entry in itertools.islice(entries, 1000))
