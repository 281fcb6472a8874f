"""scikit-learn's digits: 1 797 real scans of handwritten digits, 8×8 pixels, prepared as a TFDS data set on first use.

The images are the test part of the "Optical Recognition of Handwritten Digits" set of the UCI repository (E. Alpaydin
and C. Kaynak, Boğaziçi University, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0): 13 people's digits, scanned as
32×32 bitmaps and reduced to 8×8 counts, 0 … 16, of inked pixels. scikit-learn carries them, so nothing is downloaded.

Here a count x is the grey level round(x·255/16), stored as a PNG [8, 8, 1]; the id of an example is its number in
`sklearn.datasets.load_digits()`, with four digits. The set has no split of its own. Ours: the first 360 entries of
`np.random.RandomState(0).permutation(1797)` are "test", the other 1 437 "train".
"""
from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cb_vit.config import ConfigError, parse
from cb_vit.datasets import tfds as prepared
from cb_vit.datasets.contents import fingerprint
from cb_vit.datasets.core import SourceConfig
from cb_vit.datasets.preparing import lock
from cb_vit.io import as_path, is_local

logger = logging.getLogger(__name__)
NAME, VERSION = "sklearn_digits", "1.0.0"
NUM_TEST = 360


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig(SourceConfig):
    """scikit-learn's digits: "digits", of the splits "train" (1 437 images) and "test" (360).

    Attributes:
        data_dir: folder of the prepared copy; None: with TFDS's other data sets.
    """

    data_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.data_dir and not is_local(self.data_dir):
            raise ConfigError("data_dir", f"digits is prepared on a local or mounted disk, got {self.data_dir!r}")


def check(block: Mapping[str, Any], path: str) -> DigitsConfig:
    """The block as a checked `DigitsConfig`."""
    return parse(DigitsConfig, block, path)


def open_source(config: DigitsConfig, path: str) -> prepared.TfdsSource:
    """Open the prepared copy, after preparing it if there is none.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        ConfigError: under `path`: the folder cannot be written, or the split is unknown.
    """
    data_dir = os.fspath(as_path(config.data_dir or prepared.default_data_dir()))
    if not is_local(data_dir):
        raise ConfigError(f"{path}.data_dir", f"digits is prepared on a local disk and TFDS_DATA_DIR is {data_dir}; "
                                              f"set {path}.data_dir")
    if not _complete(data_dir):
        try:
            prepare(data_dir)
        except OSError as error:
            raise ConfigError(f"{path}.data_dir", f"cannot prepare digits in {data_dir}: {error.strerror or error}; "
                                                  f"set {path}.data_dir to a folder that can be written") from None
    reading = prepared.TfdsConfig(name=f"{NAME}:{VERSION}", split=config.split, data_dir=data_dir, id_key="id")
    source = prepared.open_folder(as_path(_folder(data_dir)), reading, path)
    # What is in the files is known; how long they are is up to the versions of what wrote them.
    source.contents = dataclasses.replace(source.contents, fingerprint=fingerprint([NAME, VERSION]))
    return source


def prepare(data_dir: str) -> None:
    """Write the data set into `data_dir` unless it is there, whole or not at all.

    Safe for several processes at once: one works, the others wait. What a killed one left behind is removed.

    Args:
        data_dir: the folder of prepared data sets, on a local disk.

    Raises:
        OSError: the folder cannot be written.
    """
    os.makedirs(data_dir, exist_ok=True)
    with lock(os.path.join(data_dir, f".{NAME}.lock")) as alone:
        if _complete(data_dir):  # another process may have prepared it while this one waited for the lock
            return
        # Without a lock, what looks like a leftover may be the work of another process.
        if alone:
            _remove_leftovers(data_dir)
        try:
            _build(data_dir)
        except Exception:
            if not _complete(data_dir):  # without a lock, another process may have been first
                raise


def _folder(data_dir: str) -> str:
    return os.path.join(data_dir, NAME, VERSION)


def _complete(data_dir: str) -> bool:
    # TFDS works in a folder "incomplete.…" and renames it at the end: one with this name is whole.
    return os.path.exists(os.path.join(_folder(data_dir), "dataset_info.json"))


def _remove_leftovers(data_dir: str) -> None:
    home = os.path.join(data_dir, NAME)
    for name in os.listdir(home) if os.path.isdir(home) else []:
        if name.startswith("incomplete.") or name == VERSION:
            shutil.rmtree(os.path.join(home, name))


def _build(data_dir: str) -> None:
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_digits

    class Info(tfds.core.DatasetInfo):
        """Without asking a bucket for a description: that leaves an empty folder in $TMPDIR, and needs a network."""

        def initialize_from_bucket(self) -> None:
            """Nothing to ask for."""

    class SklearnDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)
        name = NAME
        url_infos = None  # nothing is downloaded; looking for checksums needs importlib_resources

        def _info(self) -> tfds.core.DatasetInfo:
            return Info(builder=self, description=__doc__, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                "id": tfds.features.Text()}))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            # RandomState, whose draws NumPy keeps the same in every version; a Generator's may change.
            order = np.random.RandomState(0).permutation(1797)
            return {"train": self._generate_examples(order[NUM_TEST:]),
                    "test": self._generate_examples(order[:NUM_TEST])}

        def _generate_examples(self, numbers: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
            digits = load_digits()
            for number in numbers:
                name = f"{number:04d}"
                image = _png(np.round(digits.images[number] * 255 / 16).astype(np.uint8))
                yield name, {"image": image, "label": int(digits.target[number]), "id": name}

    tfds.disable_progress_bar()  # it takes a second
    logger.info("preparing scikit-learn's digits in %s", _folder(data_dir))
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints of downloads; there are none
        SklearnDigits(data_dir=data_dir).download_and_prepare(file_format="array_record")


def _png(image: np.ndarray) -> io.BytesIO:
    """A file object, for TFDS encodes arrays with TensorFlow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    buffer.seek(0)
    return buffer
