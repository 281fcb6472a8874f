"""NumPy's `.npz`: a zip archive of arrays, each a file of its own.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. Nothing is ever unpickled. bfloat16
has no name in NumPy: it stands in files as two bytes without a type, "V2".
"""
from __future__ import annotations

import contextlib
import io
import os
import weakref
import zipfile
from collections.abc import Mapping

import numpy as np

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

SUFFIX = ".npy"
HARMLESS = 1 << 30  # bytes; what may be unpacked from however small a file
MAX_RATIO = 100  # of all arrays to the file; float32 weights hardly shrink, and deflate ends at 1032
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def open_npz(path: str) -> WeightFile:
    """Read the headers of all arrays of an `.npz`, compressed or not; the file stays open while its arrays may be read.

    Raises:
        FormatError: the archive is damaged, would unpack to an absurd size, or holds something else than numbers.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_binary(path))
        with reading(path):
            archive = zipfile.ZipFile(file)
        tensors = _tensors(archive, file.seek(0, os.SEEK_END), path)
        weakref.finalize(archive, stack.pop_all().close)  # with the last of its arrays
    return WeightFile(path, "npz", tensors)


def _tensors(archive: zipfile.ZipFile, size: int, path: str) -> dict[str, Tensor]:
    """The arrays of an archive of `size` bytes."""
    members = archive.infolist()
    if sum(member.file_size for member in members) > max(HARMLESS, MAX_RATIO * size):
        raise FormatError(f"{path}: would unpack to over {MAX_RATIO} times its size; this is no file of weights")
    tensors: dict[str, Tensor] = {}
    for member in members:
        name = member.filename.removesuffix(SUFFIX)
        if name in tensors:
            raise FormatError(f"{path}: {show(name)} is in it twice; the file is damaged")
        # Other compressions have no bound on what a few bytes may unpack to.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{path}: {show(name)} is compressed in a way that NumPy does not use; save it anew")
        tensors[name] = _tensor(archive, member, path)
    return tensors


def _tensor(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: str) -> Tensor:
    where = f"{path}: {show(member.filename.removesuffix(SUFFIX))}"
    with reading(path), archive.open(member) as file:
        shape, fortran, stored = _header(file, where)
        needed = count_bytes(shape, dtype := _dtype(stored), where)
        if (there := member.file_size - file.tell()) != needed:
            raise FormatError(f"{where} needs {needed} bytes and has {there}; the file is damaged")

    def read() -> np.ndarray:
        with reading(path), archive.open(member) as file:
            _header(file, where)
            # In Fortran's order the bytes are those of the transpose.
            array = read_array(file, shape[::-1] if fortran else shape, stored)
            array = array.view(dtype) if stored.kind == "V" else array.astype(dtype, copy=False)
            return array.transpose() if fortran else array

    return Tensor(shape, dtype, read)


def _header(file: io.IOBase, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype as stored; `file` then stands at the values."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:  # later ones differ only for records with names
        raise FormatError(f"{where} has version {version} of the format, which is not supported; save it anew")
    try:
        shape, fortran, dtype = HEADERS[version](file)
    except MemoryError:  # what Python's parser calls it when there are too many brackets or signs
        raise FormatError(f"{where} has a header that cannot be parsed; the file is damaged") from None
    return tuple(map(int, shape)), fortran, dtype


def _dtype(stored: np.dtype) -> np.dtype:
    """The dtype of an array whose file says `stored`, in the byte order of this machine."""
    return BFLOAT16 if stored == np.dtype("V2") else stored.newbyteorder("=")


def write_npz(path: str | os.PathLike, tensors: Mapping[str, Tensor | np.ndarray], overwrite: bool = False) -> None:
    """Write arrays as an uncompressed `.npz`, whole or not at all; the same arrays always give the same bytes.

    Args:
        path: the path of the file to write.
        tensors: the arrays by name; a `Tensor` is read only when its turn comes.
        overwrite: whether a file that is there may be replaced.

    Raises:
        FormatError: the file is there, cannot be written, or the format cannot hold what was given.
    """
    if any("\0" in name for name in tensors):  # a zip would cut the name there
        raise FormatError(f"{path}: a name must not hold a zero byte; rename the array")
    with replacing(path, overwrite) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            # As large as it may be: zipfile does not know the size in advance.
            with archive.open(name + SUFFIX, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, to_write(name, tensor, path), allow_pickle=False)
