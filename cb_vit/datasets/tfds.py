"""Image classification sets that TFDS has prepared, as array_record or TFRecord; read without TensorFlow.

Everything is read from the prepared folder (`NAME/[CONFIG/]VERSION` with its dataset_info.json and features.json), so
neither the code of the data set nor TensorFlow is needed. Images stay encoded; pipelines decode them.
"""
from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from etils import epath

from cb_vit import retry
from cb_vit.config import ConfigError, parse
from cb_vit.datasets.arrayrecord import ArrayRecords
from cb_vit.datasets.contents import Absent, Contents, DataError, fingerprint
from cb_vit.datasets.core import KINDS, SourceConfig, Spans, select
from cb_vit.datasets.tfrecord import TFRecords, index_files
from cb_vit.io import as_path, check_address, open_regular
from cb_vit.registry import suggest
from cb_vit.texts import parse_json

Records = ArrayRecords | TFRecords  # one interface: `paths`, `sizes`, `read(number of file, number of record)`
VERSION = re.compile(r"\d+\.\d+\.\d+")
NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d*]+\.[\d*]+\.[\d*]+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsConfig(SourceConfig):
    """A data set of TFDS, such as "imagenet2012", "imagenet2012:5.1.0" or "imagenet_v2/matched-frequency:3.0.0".

    Without a version it is the newest that is prepared; `*` stands for any number.

    Attributes:
        data_dir: folder of prepared data sets, local or in a bucket; None: $TFDS_DATA_DIR, else
            ~/tensorflow_datasets.
        image_key: name of the feature that holds the image.
        label_key: name of the feature that holds the class.
        id_key: name of a text feature that names the example, such as "file_name"; None: shard and record name it.
    """

    data_dir: str | None = None
    image_key: str = "image"
    label_key: str = "label"
    id_key: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not NAME.fullmatch(self.name):
            raise ConfigError("name", f"cannot read {self.name!r}; write NAME, NAME/CONFIG or NAME:1.2.3")


def check(block: Mapping[str, Any], path: str) -> TfdsConfig:
    """The block as a checked `TfdsConfig`."""
    return parse(TfdsConfig, block, path)


def default_data_dir() -> str:
    """The folder where TFDS keeps prepared data sets."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))


def open_source(config: TfdsConfig, path: str) -> TfdsSource:
    """Open a prepared data set.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        ConfigError: under `path`: the data is not prepared, the split is unknown, or it is no image classification.
        DataError: files are missing or damaged.
    """
    check_address(config.data_dir or default_data_dir(), f"{path}.data_dir")
    return open_folder(find_folder(config, path), config, path)


def open_folder(folder: epath.Path, config: TfdsConfig, path: str) -> TfdsSource:
    """Open what TFDS has prepared in a folder, whatever the folder's name.

    Args:
        folder: the folder with dataset_info.json and features.json.
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        ConfigError: under `path`: the split is unknown, or it is no image classification.
        DataError: files are missing or damaged.
    """
    import tensorflow_datasets as tfds

    try:
        for name in ("dataset_info.json", "features.json"):  # TFDS would wait for a pipe, and recurse into what is deep
            with open_regular(folder / name) as file:
                parse_json(file.read())
        info = tfds.builder_from_directory(folder).info
        features, splits = info.features, info.splits
        lengths = {name: list(map(int, split.shard_lengths)) for name, split in splits.items()}
    except Exception as error:  # TFDS makes classes of what stands there, and raises what they stumble over
        raise DataError(f"{folder}: the description of the prepared data, dataset_info.json and features.json, cannot "
                        f"be read: {retry.reason(error)}") from error
    label = _check_features(features, folder, config, path)
    spans = select(config.split, lengths, f"{path}.split").refine({
        name: list(zip(map(os.fspath, split.filepaths), split.shard_lengths, strict=True))
        for name, split in splits.items()})
    counts = {os.fspath(file): count for split in splits.values()
              for file, count in zip(split.filepaths, split.shard_lengths, strict=True)}
    # Only the files that the split needs are opened, and counted into the fingerprint.
    files = list(dict.fromkeys(span.name for span in spans.spans))
    held = [counts[file] for file in files]
    records = _open_records(info.file_format.value, files, held, folder, path)
    return TfdsSource(folder, spans, records, held, config, label.num_classes, tuple(label.names))


class TfdsSource:
    """A `core.Source` over prepared files of TFDS.

    Args:
        folder: the prepared folder, for the description of features.
        spans: the records to take, of each file.
        records: the reader of those files.
        counts: number of records in each of those files.
        config: the checked block, which names the features to read.
        num_classes: number of classes.
        class_names: a name for each class.
    """

    def __init__(self, folder: epath.Path, spans: Spans, records: Records, counts: Sequence[int], config: TfdsConfig,
                 num_classes: int, class_names: tuple[str, ...] | None):
        self.folder, self.spans, self.records, self.config = os.fspath(folder), spans, records, config
        self.num_classes, self.class_names = num_classes, class_names
        # Sizes and numbers, for contents would take long to read; names without folders, so that a copy elsewhere is
        # the same data.
        shards = zip(records.paths, records.sizes, counts, strict=True)
        self.contents = Contents(fingerprint((os.path.basename(path), *shard) for path, *shard in shards))
        numbers = {file: number for number, file in enumerate(records.paths)}
        self._files = [numbers[span.name] for span in spans.spans]
        self._features = None

    # TFDS's features need not pickle; each worker process makes its own.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        span, record = self.spans.locate(index)
        file = self._files[span]
        data = self.records.read(file, record)
        where = f"{os.path.basename(self.records.paths[file])}#{record}"
        try:
            example = self._parse(data)
            image, label = example[self.config.image_key], int(example[self.config.label_key])
            if not isinstance(image, bytes):
                raise ValueError(f"{self.config.image_key} is no encoded image but {type(image).__name__}")
            if not -1 <= label < self.num_classes:  # TFDS writes -1 where the label is not public
                raise ValueError(f"{self.config.label_key} {label} is outside 0 … {self.num_classes - 1}")
        except Exception as error:  # the parser raises what it stumbles over in damaged bytes
            raise DataError(f"{os.path.join(self.folder, where)}: {type(error).__name__}: {error}") from error
        name = example[self.config.id_key] if self.config.id_key else where
        return {"image": image, "label": label, "id": name.decode() if isinstance(name, bytes) else str(name)}

    def _parse(self, data: bytes) -> dict[str, Any]:
        if self._features is None:
            import tensorflow_datasets as tfds

            every = tfds.features.FeatureConnector.from_config(self.folder)
            keys = [self.config.image_key, self.config.label_key, self.config.id_key]
            # Only these are parsed: other features may be large, or need TensorFlow.
            features = tfds.features.FeaturesDict({key: every[key] for key in keys if key})
            self._features = features, {self.config.image_key: tfds.decode.SkipDecoding()}
        features, decoders = self._features
        return features.deserialize_example_np(data, decoders=decoders)


def _open_records(form: str, files: list[str], counts: list[int], folder: epath.Path, path: str) -> Records:
    if form == "tfrecord":
        return TFRecords(files, index_files(files, counts))
    if form != "array_record":
        raise ConfigError(f"{path}.name", f"{folder} is stored as {form}; array_record and tfrecord can be read")
    return ArrayRecords(files)


def _check_features(features: Any, folder: epath.Path, config: TfdsConfig, path: str) -> Any:
    """The label's feature, if image and label are what image classification needs."""
    import tensorflow_datasets as tfds

    there = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    wanted = {"image_key": tfds.features.Image, "label_key": tfds.features.ClassLabel, "id_key": object}
    for setting, kind in wanted.items():
        key = getattr(config, setting)
        if key is not None and not (key in features and isinstance(features[key], kind)):
            needs = f"no feature {key!r}" if kind is object else f"no {kind.__name__} feature {key!r}"
            raise ConfigError(f"{path}.{setting}", f"{folder} has {needs}; it has {there}")
    if features[config.image_key].np_dtype != "uint8":
        raise ConfigError(f"{path}.image_key", f"{config.image_key!r} holds {features[config.image_key].np_dtype} "
                                               f"pixels; only uint8 images can be read")
    if features[config.label_key].num_classes is None:
        raise ConfigError(f"{path}.label_key", f"{config.label_key!r} does not say how many classes there are")
    return features[config.label_key]


def find_folder(config: TfdsConfig, path: str) -> epath.Path:
    """The folder of the prepared data set, `DATA_DIR/NAME/[CONFIG/]VERSION`.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        Absent: there is no such folder; names the command that prepares it.
    """
    name, sub, version = NAME.fullmatch(config.name).group("name", "config", "version")
    data_dir = as_path(config.data_dir or default_data_dir())
    home = data_dir / name
    if sub is None and not _versions(home, None):
        sub = _default_config(home)
    versions = _versions(home / sub if sub else home, version)
    if not versions:
        raise Absent(f"{path}.name", _not_prepared(config, data_dir, home, path))
    return (home / sub if sub else home) / versions[-1]


def _versions(folder: epath.Path, pattern: str | None) -> list[str]:
    """Prepared versions, oldest first."""
    names = [entry for entry in _entries(folder) if VERSION.fullmatch(entry) and fnmatch.fnmatch(entry, pattern or "*")]
    names = [name for name in names if (folder / name / "features.json").exists()]
    # As numbers: as text, 10.0.0 comes before 9.0.0.
    return sorted(names, key=lambda name: [int(number) for number in name.split(".")])


def _entries(folder: epath.Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _default_config(home: epath.Path) -> str | None:
    """The configuration that TFDS noted as the data set's default, if any."""
    try:
        with open_regular(home / ".config" / "metadata.json") as file:
            name = parse_json(file.read()).get("default_config_name")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) else None


def _not_prepared(config: TfdsConfig, data_dir: epath.Path, home: epath.Path, path: str) -> str:
    there = [entry for entry in _entries(home) if (home / entry).is_dir() and not entry.startswith(".")]
    versions = [f"{config.name.split(':')[0]}:{entry}" for entry in there if VERSION.fullmatch(entry)]
    configs = [f"{home.name}/{entry}" for entry in there if not VERSION.fullmatch(entry)]
    found = f"; found there: {', '.join(versions + configs)}" if there else ""
    tars = (f" First put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {data_dir}/downloads/manual."
            if home.name == "imagenet2012" else "")
    return (f"{config.name!r} is not prepared in {data_dir}{found}{suggest(config.name, KINDS)} "
            f"Prepare it once, where TensorFlow may be installed: pip install tensorflow importlib_resources && "
            f"tfds build {config.name.split(':')[0]} --file_format=array_record --data_dir={data_dir}.{tars} "
            f"A copy elsewhere: set {path}.data_dir or TFDS_DATA_DIR")
