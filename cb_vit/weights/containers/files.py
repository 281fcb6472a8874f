"""What all containers share: arrays read when asked for, and files written whole or not at all."""
from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import reprlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

import ml_dtypes
import numpy as np

from cb_vit.config import Failure
from cb_vit.io import FILE, LINK, as_path, is_local, is_taken, kind, open_regular, write_atomic

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What a file may hold. Nothing else is needed for weights; objects, above all, would have to be unpickled.
DTYPES = frozenset(map(np.dtype, ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"))) | {BFLOAT16}
MAX_DIMENSIONS = 32
CHUNK = 1 << 20  # bytes read in one go, so that a compressed array is never there twice
_names = reprlib.Repr()
_names.maxstring = 120
Kind = Literal["safetensors", "npz", "torch"]


class FormatError(Failure):
    """A weight file that cannot be read or written: the file, what is wrong with it and the fix, in one line."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file; only `read` touches its values.

    Attributes:
        shape: the array's shape.
        dtype: the array's dtype, in the byte order of this machine; bfloat16 is that of ml_dtypes.
        read: the function that reads the array, and nothing else of the file, into memory of its own; raises
            FormatError.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def map(self, function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Tensor:
        """`function` of this array, computed when it is read.

        Args:
            function: the function from the array to one of the same dtype.
            shape: shape of the result.
        """
        return dataclasses.replace(self, shape=shape, read=lambda: function(self.read()))


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """An open weight file.

    Attributes:
        path: the path as it was given.
        kind: the kind of file that it proved to be.
        tensors: the arrays of the file, by name.
        metadata: what else the file says of itself: the strings of a safetensors file, or the JSON values of an index.
    """

    path: str
    kind: Kind
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def show(name: Any) -> str:
    """A name out of a file, for an error: quoted, on one line and not too long, whatever the file says."""
    return _names.repr(name)


def count_bytes(shape: tuple[int, ...], dtype: np.dtype, where: str) -> int:
    """Number of bytes of an array that a file declares.

    Args:
        shape: the declared shape.
        dtype: the declared dtype.
        where: the file and the name of the array, with which the error begins.

    Raises:
        FormatError: NumPy could not make such an array.
    """
    if dtype not in DTYPES:
        raise FormatError(f"{where} is {dtype}, which is not supported; weights are numbers or bfloat16")
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise FormatError(f"{where} has an impossible shape; the file is damaged")
    # An empty axis does not make the others harmless: NumPy multiplies the rest all the same.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise FormatError(f"{where} declares more than 2^63 bytes; the file is damaged")
    return math.prod(shape) * dtype.itemsize


def read_array(file: io.IOBase, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next bytes of a file as an array; no memory is needed beyond the array itself.

    Args:
        file: the open file.
        shape: the array's shape.
        dtype: the array's dtype, in the byte order of the file.

    Raises:
        EOFError: the file ends before the array does.
    """
    array = np.empty(shape, dtype)
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = file.readinto(rest[:CHUNK])
        if not count:
            raise EOFError("the file is truncated")
        rest = rest[count:]
    return array


def open_binary(path: str) -> io.IOBase:
    """`path`, local or in a bucket, open for reading.

    Raises:
        FormatError: there is no such file, it may not be read, or it is something else than a file.
    """
    with reading(path):
        target = as_path(path)
        if is_local(path) and os.path.exists(target) and not os.path.isfile(target):
            raise FormatError(f"{path}: this is no file; give a .safetensors, .npz, .pth or .bin file")
        return open_regular(target)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong inside, in code that is not ours, becomes a FormatError: damage has very many faces.

    zipfile alone raises nine kinds of exceptions for damaged files, and PyTorch any.
    """
    try:
        yield
    except (FormatError, MemoryError):
        raise
    except (OSError, ImportError) as error:  # an import: what a bucket needs is not installed
        raise FormatError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(f"{path}: cannot be read ({words}); it is damaged or incomplete, fetch it again") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, overwrite: bool) -> Iterator[io.IOBase]:
    """A file to write that takes the place of `path` at the end; however it ends before, `path` stays as it was.

    A link is replaced itself: what it leads to may belong to a run, or to the cache of a hub.

    Args:
        path: the path to write to.
        overwrite: whether a file that is there may be replaced.

    Raises:
        FormatError: there is something at `path` that may not be replaced, or the system refuses.
    """
    target = as_path(path)
    try:
        if is_taken(path):
            replaceable = not is_local(path) or kind(path) in (FILE, LINK)
            if not overwrite or not replaceable:
                raise FormatError(f"{path}: is already there; choose another name" +
                                  " or give overwrite=True" * replaceable)
        if not is_local(path):  # an object store would publish what was written before a failure
            yield (content := io.BytesIO())
            write_atomic(target, content.getvalue())
            return
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                yield file
                # Before the rename, or the new name might stand for an empty file after a loss of power.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FormatError(f"{path}: cannot be written: {error.strerror or error}") from None


def to_write(name: str, tensor: Tensor | np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """The values of an array as they go into a file: C order, lowest byte first.

    Args:
        name: the array's name, for errors.
        tensor: the array, or one that is read now.
        path: the file that is written, for errors.

    Raises:
        FormatError: the array has a dtype that files do not hold.
    """
    array = tensor.read() if isinstance(tensor, Tensor) else tensor
    assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), f"{name} was declared otherwise"
    array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    count_bytes(array.shape, array.dtype.newbyteorder("="), f"{path}: {show(name)}")
    return array
