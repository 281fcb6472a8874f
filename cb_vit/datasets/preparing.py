"""Data sets written as TFDS prepares them, array_record with its description, in the order in which they come."""
from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cb_vit.config import ConfigError
from cb_vit.datasets.incoming import Example
from cb_vit.io import cannot_write, writing
from cb_vit.texts import parse_json

logger = logging.getLogger(__name__)
VERSION = "1.0.0"
INCOMPLETE = "incomplete."
SHARD_BYTES = 256 << 20
ABOUT = "Imported by cb-vit import-data, images as they were."


@contextlib.contextmanager
def lock(path: str) -> Iterator[bool]:
    """Hold a lock that the system frees when its owner dies; False if the disk cannot lock."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): several processes may prepare the same data at once", path, error)
            yield False
        else:
            yield True


def check_target(home: str, overwrite: bool) -> None:
    """Refuse what is there already, and above all what was never imported.

    Args:
        home: the folder of the data set, `DATA_DIR/NAME`.
        overwrite: whether an earlier import may be replaced.

    Raises:
        ConfigError: at "--name".
    """
    if not os.path.lexists(home):
        return
    there = [name for name in os.listdir(home) if not name.startswith(INCOMPLETE)] if os.path.isdir(home) else [home]
    if not there:
        return
    if there != [VERSION] or not _is_import(os.path.join(home, VERSION)):
        raise ConfigError("--name", f"{home} is there, and is no import of this program's; choose another name")
    if not overwrite:
        raise ConfigError("--name", f"{home} is already there; choose another name, or --overwrite it")


def write(home: str, splits: Mapping[str, Iterable[Example]], class_names: Sequence[str]) -> None:
    """Write a data set, whole or not at all, in place of an earlier one.

    Args:
        home: the folder of the data set, `DATA_DIR/NAME`.
        splits: examples of each split, labelled by numbers.
        class_names: names of the classes.

    Raises:
        CannotWrite: the disk is full, or the like.
    """
    import tensorflow_datasets as tfds

    with writing(home):
        os.makedirs(home, exist_ok=True)
        place = os.path.join(home, VERSION)
        with lock(os.path.join(os.path.dirname(home), f".{os.path.basename(home)}.lock")) as alone:
            # Without a lock, what looks like a leftover may be the work of another process.
            for name in os.listdir(home) if alone else ():
                if name.startswith(INCOMPLETE):
                    shutil.rmtree(os.path.join(home, name))
            temporary = os.path.join(home, f"{INCOMPLETE}{uuid.uuid4().hex[:8]}")
            os.mkdir(temporary)
            try:
                features = tfds.features.FeaturesDict({
                    "image": tfds.features.Image(shape=(None, None, 3)), "id": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(class_names))})
                shards = {split: _write_split(temporary, os.path.basename(home), split, examples, features)
                          for split, examples in splits.items()}
                _describe(temporary, os.path.basename(home), features, shards)
                _move(temporary, place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                with contextlib.suppress(OSError):  # unless there is an earlier import
                    os.rmdir(home)


def _write_split(
    folder: str, name: str, split: str, examples: Iterable[Example], features: Any
) -> list[tuple[int, int]]:
    """(number of examples, bytes) of each shard."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    shards: list[list[int]] = []
    part = os.path.join(folder, f"{split}.part-{{}}")
    writer = None

    def close() -> None:
        if writer:
            with _full(folder):
                writer.close()

    for example in examples:
        if writer is None or shards[-1][1] >= SHARD_BYTES:
            close()
            with _full(folder):  # one record a group: they are read one by one, in random order
                writer = ArrayRecordWriter(part.format(len(shards)), "group_size:1")
            shards.append([0, 0])
        data = serializer.serialize_example(features.encode_example(
            {"image": io.BytesIO(example.image), "label": example.label, "id": example.id}))
        with _full(folder):
            writer.write(data)
        shards[-1][0] += 1
        shards[-1][1] += len(data)
    close()
    for number in range(len(shards)):
        os.rename(part.format(number), os.path.join(
            folder, f"{name}-{split}.array_record-{number:05d}-of-{len(shards):05d}"))
    return [(count, size) for count, size in shards]


def _describe(folder: str, name: str, features: Any, shards: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """Write dataset_info.json and features.json."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, file_adapters, naming

    identity = dataset_info.DatasetIdentity(name=name, version=tfds.core.Version(VERSION), data_dir=folder,
                                            module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=ABOUT)
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.splits.SplitDict([
        tfds.core.SplitInfo(name=split, shard_lengths=[count for count, _ in of_split],
                            num_bytes=sum(size for _, size in of_split),
                            filename_template=naming.ShardedFileTemplate(
                                dataset_name=name, data_dir=folder, split=split, filetype_suffix="array_record"))
        for split, of_split in shards.items()]))
    info.write_to_directory(folder)


def _move(temporary: str, place: str) -> None:
    """Put a finished folder in place, where an earlier one makes way at the last moment."""
    old = os.path.join(os.path.dirname(place), f"{INCOMPLETE}{uuid.uuid4().hex[:8]}")
    if os.path.lexists(place):
        os.rename(place, old)
    os.rename(temporary, place)
    shutil.rmtree(old, ignore_errors=True)


def _is_import(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "dataset_info.json"), "rb") as file:
            return parse_json(file.read()).get("description") == ABOUT
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _full(folder: str) -> Iterator[None]:
    """What array_record says of a disk, as an error of the disk."""
    try:
        yield
    except RuntimeError as error:
        raise cannot_write(folder, error) from None
