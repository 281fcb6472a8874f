"""Paths and files, local or in a bucket (`gs://…`, with etils' epath)."""
from __future__ import annotations

import os
import uuid

from etils import epath


def as_path(path: str | os.PathLike) -> epath.Path:
    """`path` as an epath; works for local folders and for `gs://` and `s3://` alike.

    A local path is made absolute, `~` expanded: Orbax takes no other.
    """
    return epath.Path(os.path.abspath(os.path.expanduser(path)) if is_local(path) else path)


def is_local(path: str | os.PathLike) -> bool:
    """Whether `path` lies on a file system of this machine."""
    return "://" not in os.fspath(path)


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file whole or not at all: a reader, or a crash, never sees half of it."""
    path = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    if not is_local(path):  # an object store publishes an object only when it is complete
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
