"""array_record files (https://github.com/google/array_record) read at random: what TFDS should prepare for us."""
from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cb_vit.datasets.contents import DataError
from cb_vit.datasets.core import allow_open_files
from cb_vit.io import as_path

THREADS = 16


class ArrayRecords:
    """The records of several files, by file and number; readers open on first use, in each process for itself.

    Args:
        paths: the paths of the files.

    Attributes:
        sizes: sizes of the files, in bytes.

    Raises:
        DataError: one of the files is missing.
    """

    def __init__(self, paths: Sequence[str]):
        # In a bucket each size is a request of its own, and a data set has a thousand files.
        with ThreadPoolExecutor(THREADS) as pool:
            self.sizes = tuple(pool.map(_size, paths))
        self._close(paths)

    def _close(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._readers: dict[int, Any] = {}
        self._lock, self._pid = threading.Lock(), os.getpid()

    # Readers hold open files, which cannot be sent to a worker process: only paths and sizes travel.
    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.sizes = state["sizes"]
        self._close(state["paths"])

    def read(self, file: int, record: int) -> bytes:
        """One record.

        Args:
            file: number of the file in `paths`.
            record: number of the record in that file.

        Raises:
            DataError: the record cannot be read; names it and its file.
        """
        try:
            return self._reader(file).read([record])[0]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise DataError(f"{self.paths[file]}: record {record}: {error}") from error

    def _reader(self, file: int) -> Any:
        if self._pid != os.getpid():  # a reader's threads do not survive a fork
            self._close(self.paths)
        if file not in self._readers:
            # Imported on first use: a package of its own, which other sources do not need.
            from array_record.python.array_record_module import ArrayRecordReader

            with self._lock:
                if not self._readers:
                    allow_open_files(len(self.paths))
                if file not in self._readers:
                    # No read-ahead: records are read one by one, in random order.
                    self._readers[file] = ArrayRecordReader(
                        self.paths[file], options="readahead_buffer_size:0", file_reader_buffer_size=32768)
        return self._readers[file]


def _size(path: str) -> int:
    try:
        return as_path(path).stat().length
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; is the prepared copy complete?") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
