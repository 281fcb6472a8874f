"""Paths, and files that are written whole or not at all."""
import errno
import os
import pathlib
import re

import pytest
from etils import epath

from cb_vit import io, retry
from cb_vit.config import ConfigError, Failure


def test_paths_expand_and_know_where_they_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(io.as_path("~/runs")) == str(io.as_path("runs")) == str(io.as_path("./x/../runs")) == f"{tmp_path}/runs"
    assert str(io.as_path("gs://bucket/x") / "y") == "gs://bucket/x/y"
    assert io.is_local("runs/x") and io.is_local(tmp_path) and io.is_local(pathlib.Path("/x"))
    assert not io.is_local("gs://bucket/x") and not io.is_local(epath.Path("gs://bucket/x"))


@pytest.mark.parametrize("content, expected", [("ä\n", "ä\n".encode()), (b"\0\1", b"\0\1"), ("", b"")])
def test_write_atomic_writes_and_replaces(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_text("old")
    io.write_atomic(path, content)
    io.write_atomic(str(tmp_path / "new"), content)
    assert path.read_bytes() == (tmp_path / "new").read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["file", "new"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    def fail(*args):
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        io.write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_text("old")
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(("fsync", path.read_text())), fsync(fd)))

    def spy(source, target):
        seen.append(("replace", pathlib.Path(source).read_text(), path.read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    io.write_atomic(path, "new")
    assert seen == [("fsync", "old"), ("replace", "new", "old")]
    assert path.read_text() == "new"


@pytest.mark.parametrize("number, way_out", [
    (errno.ENOSPC, "free some space there"), (errno.EDQUOT, "free some of the quota"), (errno.ENOENT, io.GONE),
    (errno.EACCES, "make it writable"), (errno.EROFS, "mount it writable"), (errno.ESTALE, io.GONE),
    (errno.EIO, "see to the storage")])
def test_whoever_says_that_storage_fails_it_ends_in_one_line(number, way_out):
    """The system itself; TensorStore, which gives its number; and XLA, which gives its words."""
    told = os.strerror(number)
    for error in (OSError(number, told, "x.tmp"), ValueError(f"UNKNOWN: x\ny: {told} [os_error_code='{number}']")):
        with pytest.raises(io.CannotWrite, match=rf"^/a/b cannot be written: {told}; {way_out}$"):
            raise io.cannot_write("/a/b", error)
    with pytest.raises(io.CannotWrite, match=rf"; {way_out}$"):
        raise io.cannot_write("/a/b", RuntimeError(f"INTERNAL: /a/b/c; {told}"))


def test_only_what_the_storage_raises_is_its_fault():
    for path, error, expected in (
            ("/a", OSError(28, ""), io.CannotWrite), ("/a", KeyError("x"), KeyError),
            ("gs://a", KeyError("x"), io.CannotWrite), ("gs://a", ConfigError("a", "b"), ConfigError)):
        with pytest.raises(expected), io.writing(path):
            raise error


@pytest.mark.parametrize("path, error", [
    ("/a/b", None), ("gs://b/x", "gs://b/x needs gcsfs: pip install 'cb_vit[gcs]', or use a local path"),
    ("s3://b/x", "s3://b/x needs s3fs: pip install 's3fs', or use a local path"),
    ("http://b/x", "http://b/x: unknown kind of address http://; choices: gs://, s3://, az://, or a path")])
def test_an_address_needs_what_opens_it(monkeypatch, path, error):
    monkeypatch.setattr(io.importlib.util, "find_spec", lambda name: None)
    if error is None:
        io.check_address(path, "workdir")
        return
    with pytest.raises(ConfigError, match=f"^{re.escape(f'workdir: {error}')}$"):
        io.check_address(path, "workdir")
    monkeypatch.setattr(io.importlib.util, "find_spec", lambda name: name)
    if "needs" in error:
        io.check_address(path, "workdir")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.write_atomic(tmp_path / "no" / "file", "x")
    assert os.listdir(tmp_path) == []


def test_what_is_there_and_what_is_in_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "ring").symlink_to("ring")
    os.mkfifo(tmp_path / "pipe")
    kinds = dict(folder=io.FOLDER, file=io.FILE, link=io.LINK, ring=io.LINK, pipe=io.DEVICE, nothing=None)
    assert {name: io.kind(tmp_path / name) for name in kinds} == kinds
    assert [name for name in kinds if io.exists(tmp_path / name)] == ["folder", "file", "pipe"]
    assert io.read(tmp_path / "file") == b"x" and io.read(tmp_path / "nothing") is None
    for name, reason in (("folder", "is a folder, where a file should be; move it"), ("link", f"is {io.LINK}; delete")):
        with pytest.raises(Failure, match=f"^{tmp_path}/{name} {reason}"):
            io.read(tmp_path / name)


@pytest.mark.parametrize("ask, call", [(io.exists, "stat"), (io.kind, "stat"), (io.read, "read_bytes")])
def test_what_cannot_be_told_is_not_taken_for_a_no(tmp_path, monkeypatch, ask, call):
    def broken(*args):
        raise OSError(errno.ESTALE, "Stale file handle")

    slept = []
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(sleep=slept.append))
    monkeypatch.setattr(os if call == "stat" else epath.gpath.PosixGPath, call, broken)
    with pytest.raises(Failure, match=f"^{tmp_path}/x cannot be read .*Stale file handle.; nothing is changed$"):
        ask(tmp_path / "x")
    assert slept == [1, 2, 4, 8]
