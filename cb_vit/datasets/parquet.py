"""Hugging Face's parquet files: a column of images, one of labels, and the names of classes in the schema."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from cb_vit.config import ConfigError
from cb_vit.datasets.contents import DataError
from cb_vit.datasets.incoming import Example, by_split, to_label
from cb_vit.io import open_regular
from cb_vit.texts import parse_json

ENDING = ".parquet"
ROWS = 32  # held at a time, beside what the library holds of a row group


class Parquet:
    """An `Incoming` of parquet files.

    Args:
        root: the folder of the files, or one file.
        image_key: the column of images; None: the only one that can be.
        label_key: the column of labels; None: "label", or the only one that is declared as classes.

    Raises:
        ConfigError: it is not clear which columns are meant, or files are missing.
        DataError: a file cannot be read, or is of another kind than the first.
    """

    def __init__(self, root: str, image_key: str | None, label_key: str | None):
        self.splits = by_split(root, ENDING)
        files = [file for files in self.splits.values() for file in files]
        schema = _open(files[0]).schema_arrow
        classes = _class_names(schema, files[0])
        images = [name for name in schema.names if _holds_images(schema.field(name).type)]
        labels = ["label"] if "label" in schema.names else list(classes)
        self.image_key = _choose("--image_key", image_key, images, schema, files[0])
        self.label_key = _choose("--label_key", label_key, labels, schema, files[0])
        self.class_names = classes.get(self.label_key)
        for file in files[1:]:
            other = _open(file).schema_arrow
            if _class_names(other, file).get(self.label_key) != self.class_names or any(
                    key not in other.names or other.field(key).type != schema.field(key).type
                    for key in (self.image_key, self.label_key)):
                raise DataError(f"{file}: has other columns or classes than {files[0]}; give files of one data set")

    def examples(self, file: str, images: bool) -> Iterator[Example]:
        """See `Incoming`."""
        columns = [self.label_key] + [self.image_key] * images
        number = 0
        try:
            for batch in _open(file).iter_batches(batch_size=ROWS if images else 8192, columns=columns):
                for row in batch.to_pylist():
                    where = f"{file}: row {number}"
                    image, name = self._image(row[self.image_key], where) if images else (None, None)
                    yield Example(where, name or f"{os.path.basename(file)}#{number}",
                                  to_label(row[self.label_key], where), image)
                    number += 1
        except _errors() as error:
            raise DataError(f"{file}: cannot be read after row {number}: {_words(error)}; copy it anew") from None

    def _image(self, value: Any, where: str) -> tuple[bytes, str | None]:
        data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None:
            linked = f", only the path {name!r}; embed the images" if name else ""
            raise DataError(f"{where}: {self.image_key!r} holds no image{linked}")
        return data, name if isinstance(name, str) else None


def _open(file: str) -> Any:
    import pyarrow.parquet

    open_regular(file).close()  # what cannot be opened is another matter than what is damaged
    try:
        return pyarrow.parquet.ParquetFile(file)
    except _errors() as error:
        raise DataError(f"{file}: is no whole parquet file: {_words(error)}; copy it anew") from None


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return pyarrow.ArrowException, OSError, UnicodeDecodeError


def _words(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:200]


def _class_names(schema: Any, file: str) -> dict[str, tuple[str, ...]]:
    """Names of classes by column, as Hugging Face's library notes them."""
    noted = (schema.metadata or {}).get(b"huggingface")
    if noted is None:
        return {}
    try:
        features = parse_json(noted, encodable=True)["info"]["features"]
        names = {key: feature["names"] for key, feature in features.items()
                 if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
        if not all(isinstance(name, str) for listed in names.values() for name in listed):
            raise ValueError("a name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: what it notes of its features cannot be read: {error}") from None
    return {key: tuple(listed) for key, listed in names.items()}


def _holds_images(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _choose(flag: str, key: str | None, candidates: list[str], schema: Any, file: str) -> str:
    columns = ", ".join(f"{field.name} ({'struct' if field.type.num_fields else field.type})" for field in schema)
    if key is None and len(candidates) == 1:
        return candidates[0]
    if key is None or key not in schema.names:
        fault = f"no column {key!r}" if key else "which column is meant?"
        raise ConfigError(flag, f"{fault} {file} has {columns}; set {flag} to one of them")
    if flag == "--image_key" and key not in candidates:
        raise ConfigError(flag, f"column {key!r} holds no encoded images; {file} has {columns}")
    return key
