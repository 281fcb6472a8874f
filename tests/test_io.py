"""Paths, and files that are written whole or not at all."""
import errno
import os
import pathlib

import pytest
from etils import epath

from cb_vit import io, retry
from cb_vit.config import Failure


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
