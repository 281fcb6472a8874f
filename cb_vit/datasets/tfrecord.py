"""TFRecord files read at random, without TensorFlow.

A TFRecord file is a chain of records (https://www.tensorflow.org/tutorials/load_data/tfrecord): length, uint64
little-endian; masked CRC-32C of these 8 bytes; payload; masked CRC-32C of the payload. Nothing says where the n-th
record starts, so the headers of a file are walked once, and the offsets kept in the user's cache folder.
"""
from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cb_vit.datasets.contents import DataError
from cb_vit.datasets.core import allow_open_files
from cb_vit.io import as_path, is_local, open_regular, write_atomic

logger = logging.getLogger(__name__)
HEADER, FOOTER = 12, 4  # bytes round each payload
THREADS = 16
CACHE_VERSION = 1
_PARSING = threading.Lock()  # NumPy has Python parse a header, and Python 3.11's parser can fail in two threads at once
Read = Callable[[int, int], bytes]  # (number of bytes, offset) -> bytes, fewer at the end of the file


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data`, rotated and offset as TFRecord stores it."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def index_file(path: str) -> np.ndarray:
    """Offsets of the records of one file, read from its headers alone.

    Returns:
        The byte at which each of the n records starts, and the size of the file, int64 [n + 1].

    Raises:
        DataError: the file is truncated, or a header's checksum is wrong; names file and record.
    """
    with _open(path) as file:
        read, size = _reader(file, path), file.seek(0, io.SEEK_END)
        offsets = [0]
        while (offset := offsets[-1]) < size:
            header = read(HEADER, offset)
            if len(header) < HEADER:
                raise DataError(f"{path}: record {len(offsets) - 1} at byte {offset}: the file is truncated")
            length, crc = struct.unpack("<QI", header)
            # A wrong length would send the walk to a wrong place, and every record from there on would be wrong.
            if masked_crc(header[:8]) != crc:
                raise DataError(f"{path}: record {len(offsets) - 1} at byte {offset}: "
                                f"the header is corrupt, or this is no TFRecord file")
            if (end := offset + HEADER + length + FOOTER) > size:
                raise DataError(f"{path}: record {len(offsets) - 1} at byte {offset}: "
                                f"the file is truncated, {end - size} bytes are missing")
            offsets.append(end)
    return np.array(offsets, np.int64)


def index_files(paths: Sequence[str], counts: Sequence[int]) -> list[np.ndarray]:
    """Offsets of the records of many files, from the cache where it is up to date.

    Args:
        paths: the paths of the files.
        counts: number of records that each file should hold, from the data set's metadata.

    Raises:
        DataError: a file is missing, truncated or damaged, or holds another number of records.
    """
    started = reported = time.monotonic()
    indexes = []
    with ThreadPoolExecutor(min(THREADS, max(1, len(paths)))) as pool:
        try:
            for index in pool.map(_cached_index, paths, counts):
                indexes.append(index)
                if time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    logger.info("indexing TFRecord files: %d of %d, %.0f s; done once, then cached in %s",
                                len(indexes), len(paths), reported - started, cache_folder())
        except BaseException:
            # Else leaving the pool would wait until every other file is indexed.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return indexes


class TFRecords:
    """The records of several files, by file and number; files open on first use, in each process for itself.

    Args:
        paths: the paths of the files.
        offsets: offsets of the records of each file, as `index_file` returns them.

    Attributes:
        sizes: sizes of the files, in bytes.
    """

    def __init__(self, paths: Sequence[str], offsets: Sequence[np.ndarray]):
        self.paths, self.offsets = tuple(paths), tuple(offsets)
        self.sizes = tuple(int(ends[-1]) for ends in offsets)
        self._files: dict[int, Any] = {}
        self._lock = threading.Lock()

    # Open files and locks cannot be sent to a worker process.
    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "offsets": self.offsets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, file: int, record: int) -> bytes:
        """The payload of one record; safe to call from several threads.

        Args:
            file: number of the file in `paths`.
            record: number of the record in that file.

        Raises:
            DataError: the record cannot be read, or its checksum is wrong; names file and record.
        """
        start, end = map(int, self.offsets[file][record:record + 2])
        where = f"{self.paths[file]}: record {record} at byte {start}"
        try:
            data = self._read(file, end - start, start)
        except OSError as error:
            raise DataError(f"{where}: {error}") from error
        if len(data) < end - start:
            raise DataError(f"{where}: the file is truncated")
        payload = data[HEADER:-FOOTER]
        if int.from_bytes(data[:8], "little") != len(payload):
            raise DataError(f"{where}: the header is corrupt, or the file has changed since it was indexed")
        if int.from_bytes(data[-FOOTER:], "little") != masked_crc(payload):
            raise DataError(f"{where}: the payload is corrupt, its checksum is wrong")
        return payload

    def _read(self, file: int, size: int, offset: int) -> bytes:
        path = self.paths[file]
        if not is_local(path):  # a position of its own for each thread
            with _open(path) as handle:
                return _reader(handle, path)(size, offset)
        if file not in self._files:
            with self._lock:
                if not self._files:
                    allow_open_files(len(self.paths))
                if file not in self._files:
                    self._files[file] = _open(path)
        return _reader(self._files[file], path)(size, offset)


def _open(path: str) -> Any:
    return open_regular(path, 0)


def _reader(file: Any, path: str) -> Read:
    if is_local(path):
        # `pread` takes its offset along, so that threads can share one open file.
        return lambda size, offset: os.pread(file.fileno(), size, offset)

    def read(size: int, offset: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read


def cache_folder() -> Path:
    """The folder where indexes are kept, `$XDG_CACHE_HOME/cb_vit/tfrecord`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cb_vit" / "tfrecord"


def _cached_index(path: str, count: int) -> np.ndarray:
    # One cache file a path, so that a changed file replaces its old index; size and time of change stand inside.
    where = os.path.abspath(path) if is_local(path) else path
    cache = cache_folder() / f"{hashlib.blake2b(os.fsencode(where), digest_size=16).hexdigest()}.npy"
    try:
        stamp = np.array([CACHE_VERSION, *_size_and_time(path)], np.int64)
        offsets = _load_cache(cache, stamp)
        if offsets is None or len(offsets) - 1 != count:
            offsets = index_file(path)
            _save_cache(cache, np.concatenate([stamp, offsets]))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; is the prepared copy complete?") from None
    if len(offsets) - 1 != count:
        raise DataError(f"{path}: holds {len(offsets) - 1} records, but dataset_info.json says {count}")
    return offsets


def _size_and_time(path: str) -> tuple[int, int]:
    """Size in bytes, and when the file last changed (in ns if local)."""
    if is_local(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    stat = as_path(path).stat()
    return stat.length, int(stat.mtime)


def _load_cache(cache: Path, stamp: np.ndarray) -> np.ndarray | None:
    """The offsets, or None if the file is absent, stale or broken."""
    try:
        with open_regular(cache) as file:
            content = io.BytesIO(file.read())
        with _PARSING:
            stored = np.lib.format.read_array(content, allow_pickle=False)
    except Exception:  # NumPy evaluates a header as Python, which fails in many ways
        return None
    size = stamp[1]
    sound = stored.dtype == np.int64 and stored.ndim == 1 and len(stored) > 3 and (stored[:3] == stamp).all()
    if not sound or stored[3] != 0 or stored[-1] != size or (np.diff(stored[3:]) < HEADER + FOOTER).any():
        return None
    return stored[3:].copy()


def _save_cache(cache: Path, stored: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, stored, allow_pickle=False)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, buffer.getvalue())
    except OSError as error:
        logger.warning("cannot keep the index of TFRecord files, so the next start makes it again: %s", error)
