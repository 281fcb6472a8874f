"""Safetensors files.

The format (https://huggingface.co/docs/safetensors): the length of the header, uint64 little-endian; the header, JSON
of `{name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {string: string}}`; the
arrays, in C order, little-endian, without gaps. It is parsed here, for the library's NumPy side long had no bfloat16.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from cb_vit import texts
from cb_vit.weights.containers.files import (
    BFLOAT16,
    FormatError,
    Tensor,
    WeightFile,
    count_bytes,
    open_binary,
    read_array,
    reading,
    replacing,
    show,
    to_write,
)

MAX_HEADER = 100_000_000  # bytes; the library's own limit
METADATA = "__metadata__"
DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": BFLOAT16,
          "I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1"),
          "U64": np.dtype("u8"), "U32": np.dtype("u4"), "U16": np.dtype("u2"), "U8": np.dtype("u1"),
          "BOOL": np.dtype("?")}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def open_safetensors(path: str) -> WeightFile:
    """Read the header of one safetensors file.

    Raises:
        FormatError: the header is damaged, does not fit the file, or names a dtype that is not supported.
    """
    with open_binary(path) as file, reading(path):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if length > MAX_HEADER or start > size:
            raise FormatError(f"{path}: declares a header of {length} bytes, and has {size} in all; the file is "
                              f"truncated or damaged, fetch it again")
        header = parse_json(file.read(length), path)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: its {METADATA} should be strings by name; the file is damaged")
    spans = {name: _span(entry, f"{path}: {show(name)}") for name, entry in header.items()}
    end = 0
    for name, (begin, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != end:  # the format leaves no room for gaps, where anything could hide, nor for overlaps
            raise FormatError(f"{path}: {show(name)} begins at byte {begin} of the arrays, not at {end}; "
                              f"the file is damaged")
        end = stop
    if start + end != size:
        raise FormatError(f"{path}: its header declares {start + end} bytes and the file has {size}; "
                          f"it is truncated or damaged, fetch it again")
    tensors = {name: _tensor(path, start + begin, shape, dtype) for name, (begin, _, shape, dtype) in spans.items()}
    return WeightFile(path, "safetensors", tensors, metadata)


def _span(entry: Any, where: str) -> tuple[int, int, tuple[int, ...], np.dtype]:
    """Begin and end, shape and dtype of one entry of the header, checked against each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} should have dtype, shape and data_offsets; the file is damaged")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):  # True is an int, too
            raise FormatError(f"{where}: shape and data_offsets should be lists of whole numbers; the file is damaged")
    if not isinstance(code, str) or code not in DTYPES:
        raise FormatError(f"{where} is {show(code)}, which is not supported; supported are {', '.join(DTYPES)}")
    needed = count_bytes(tuple(shape), DTYPES[code], where)
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise FormatError(f"{where}: its data_offsets do not span the {needed} bytes that its shape and dtype need; "
                          f"the file is damaged")
    return offsets[0], offsets[1], tuple(shape), DTYPES[code]


def _tensor(path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def read() -> np.ndarray:
        with open_binary(path) as file, reading(path):
            file.seek(offset)
            array = read_array(file, shape, dtype.newbyteorder("<"))
            return array.astype(dtype, copy=False)

    return Tensor(shape, dtype, read)


def parse_json(content: bytes, path: str, what: str = "its header") -> dict[str, Any]:
    """A JSON object in which no name stands twice.

    Args:
        content: the JSON text.
        path: the file that it stands in, for errors.
        what: what the text is called in errors.

    Raises:
        FormatError: the text is something else.
    """
    try:
        parsed = texts.parse_json(content, encodable=True)
    except ValueError as error:
        raise FormatError(f"{path}: {what} is not JSON ({str(error)[:100]!r}); the file is damaged") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: {what} is no JSON object; the file is damaged")
    return parsed


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor | np.ndarray],
                      metadata: Mapping[str, str] | None = None, overwrite: bool = False) -> None:
    """Write arrays as one safetensors file, whole or not at all; a `Tensor` is read only when its turn comes.

    Args:
        path: the path of the file to write.
        tensors: the arrays by name.
        metadata: strings by name that the file says of itself; None: none.
        overwrite: whether a file that is there may be replaced.

    Raises:
        FormatError: the file is there, cannot be written, or the format cannot hold what was given.
    """
    if METADATA in tensors:
        raise FormatError(f"{path}: an array cannot be called {METADATA}; rename it")
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    # The library's order: widest dtypes first, so that each array is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        shape, dtype = tensors[name].shape, tensors[name].dtype.newbyteorder("=")
        end = offset + count_bytes(shape, dtype, f"{path}: {show(name)}")
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the arrays, too, begin at a multiple of 8 bytes
    with replacing(path, overwrite) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(memoryview(to_write(name, tensors[name], path).reshape(-1).view(np.uint8)))
