"""Paths and files, local or in a bucket (`gs://…`, with etils' epath), and what it means that one cannot be written."""
from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from etils import epath

from cb_vit import retry
from cb_vit.config import ConfigError, Failure

logger = logging.getLogger(__name__)
T = TypeVar("T")
FILE, FOLDER, LINK, DEVICE = "a file", "a folder", "a link to what is not there", "neither a file nor a folder"
# The library that opens such an address, and how it is installed.
BUCKETS = {"gs": ("gcsfs", "cb_vit[gcs]"), "s3": ("s3fs", "s3fs"), "az": ("adlfs", "adlfs")}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # whatever was being written, there is no room for it
GONE = "it was removed, moved or unmounted; put it back"
IN_THE_WAY = "something else is in its way there"
WAYS_OUT = {
    errno.ENOSPC: "free some space there", errno.EDQUOT: "free some of the quota", errno.EFBIG: "raise ulimit -f",
    errno.EROFS: "mount it writable", errno.EACCES: "make it writable", errno.EPERM: "make it writable",
    errno.ENOENT: GONE, errno.ESTALE: GONE, errno.ENOTDIR: IN_THE_WAY, errno.EISDIR: IN_THE_WAY}


class CannotWrite(Failure):
    """What was to be left behind could not be written: names the place, the reason and the way out."""


def as_path(path: str | os.PathLike) -> epath.Path:
    """`path` as an epath; works for local folders and for `gs://` and `s3://` alike.

    A local path is made absolute, `~` expanded: Orbax takes no other.
    """
    return epath.Path(os.path.abspath(os.path.expanduser(path)) if is_local(path) else path)


def is_local(path: str | os.PathLike) -> bool:
    """Whether `path` lies on a file system of this machine."""
    return "://" not in os.fspath(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is something at `path`; a link to nowhere is nothing.

    Raises:
        Failure: storage does not say, which `Path.exists` takes for a no.
    """
    path = as_path(path)
    return kind(path) not in (None, LINK) if is_local(path) else _asked(path, path.exists)


def is_taken(path: str | os.PathLike) -> bool:
    """Whether something would have to make way for a new file there; a link to nowhere would."""
    path = as_path(path)
    return os.path.lexists(path) if is_local(path) else _asked(path, path.exists)


def kind(path: str | os.PathLike) -> str | None:
    """What is at a path of this machine: `FILE`, `FOLDER`, a `LINK` to nothing, a `DEVICE` or the like, or None.

    Raises:
        Failure: storage does not say.
    """
    def look() -> str | None:
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return LINK if os.path.lexists(path) else None
        return FOLDER if stat.S_ISDIR(mode) else FILE if stat.S_ISREG(mode) else DEVICE

    return _asked(as_path(path), look)


def read(path: str | os.PathLike) -> bytes | None:
    """The content of a file; None where there is none.

    Raises:
        Failure: there is something at `path`, and it cannot be read.
    """
    path = as_path(path)
    if is_local(path) and kind(path) == DEVICE:  # to open a pipe is to wait
        raise Failure(f"{path} is {DEVICE}; move it away")
    try:
        return _asked(path, path.read_bytes)
    except FileNotFoundError:
        if is_local(path) and os.path.lexists(path):
            raise Failure(f"{path} is {LINK}; delete it, or bring that back") from None
        return None


def open_regular(path: str | os.PathLike, buffering: int = -1) -> IO[bytes]:
    """A file, local or in a bucket, open for reading; never a pipe, for which opening alone may wait for ever.

    Raises:
        OSError: as `open` does, and for what is neither a file nor a folder.
    """
    if not is_local(path):
        return as_path(path).open("rb")
    # Opened without waiting and then looked at, in this order: looked at first, it could be exchanged in between.
    file = open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ESPIPE, "it is a pipe or a device, no regular file", os.fspath(path))
    return file


def _asked(path: os.PathLike, question: Callable[[], T]) -> T:
    try:
        return retry.call(question)
    except (FileNotFoundError, ImportError):
        raise
    except IsADirectoryError:
        raise Failure(f"{path} is a folder, where a file should be; move it away") from None
    except Exception as error:  # of whatever library reads there
        raise Failure(f"{path} cannot be read ({retry.reason(error)}); nothing is changed") from None


def check_address(path: str | os.PathLike, field: str) -> None:
    """Refuse an address that nothing here can open, before it is needed.

    Args:
        path: a local path, or an address such as "gs://bucket/folder".
        field: where it stands in the config, for errors.

    Raises:
        ConfigError: at `field`.
    """
    if is_local(path):
        return
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in BUCKETS:
        known = ", ".join(f"{name}://" for name in BUCKETS)
        raise ConfigError(field, f"{os.fspath(path)}: unknown kind of address {scheme}://; choices: {known}, or a path")
    module, package = BUCKETS[scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(field, f"{os.fspath(path)} needs {module}: pip install '{package}', or use a local path")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A failure of the storage inside becomes a `CannotWrite` that names `path`; a bucket's may be any exception."""
    try:
        yield
    except (ConfigError, Failure):
        raise
    except Exception as error:
        if is_local(path) and not isinstance(error, OSError):
            raise
        raise cannot_write(path, error) from None


def told_errno(text: str) -> int | None:
    """The number of a system's error, out of an error text of TensorStore's."""
    told = re.search(r"os_error_code='(\d+)'", text)
    return told and int(told[1])


def cannot_write(path: str | os.PathLike, error: BaseException) -> CannotWrite:
    """`error`, whatever library raised it, as a `CannotWrite` that names `path`."""
    text = str(error) or repr(error)
    # TensorStore and Orbax raise errors of their own, in whose text alone the system's number or words stand.
    number = getattr(error, "errno", None) or told_errno(text) or next(
        (known for known in WAYS_OUT if os.strerror(known) in text), None)
    reason = os.strerror(number) if number else text.splitlines()[0][:200]
    return CannotWrite(f"{os.fspath(path)} cannot be written: {reason}; {WAYS_OUT.get(number, 'see to the storage')}")


def try_to_write(folder: str | os.PathLike, files: Iterable[tuple[str, str | bytes]]) -> None:
    """Write files that nothing depends on, such as pictures: where making or writing one fails, that is a warning.

    Args:
        folder: where they go; made if it is not there.
        files: name and content of each, which are made as they are asked for.
    """
    folder = as_path(folder)
    try:
        for name, content in files:
            with writing(folder / name):
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / name, content)
    except Exception as error:  # of whatever draws or stores them
        logger.warning("not all that belongs into %s was written: %s", folder, retry.reason(error))


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file whole or not at all: a reader, or a crash, never sees half of it."""
    path = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    if not is_local(path):  # an object store publishes an object only when it is complete
        path.write_bytes(data)
        return
    # In the same folder, since a rename is atomic only within one file system; with a name that no other writer has.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            # Before the rename: after a loss of power the new name might otherwise stand for an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
