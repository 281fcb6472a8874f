"""The folder of a run: one run in it at a time, and a note of what it was."""
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from etils import epath

from cb_vit import io, retry, workdir
from cb_vit.config import ConfigError, Failure

HOLDER = textwrap.dedent("""
    import sys
    from cb_vit import workdir
    with workdir.lock(sys.argv[1]):
        print("locked", flush=True)
        sys.stdin.read()
""")


def hold(path):
    """A process that has the lock of `path`, until its stdin closes."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_lock_keeps_a_second_process_out_until_the_first_ends_or_is_killed(tmp_path):
    path = tmp_path / "runs" / "x"
    with hold(path) as first:
        with pytest.raises(ConfigError, match=rf"^workdir: another run is in {path}; wait for it, or use another"):
            with workdir.lock(path):
                raise AssertionError("two runs in one workdir")
        with workdir.lock(tmp_path / "runs" / "y"), workdir.lock(path, primary=False):
            pass  # another folder, and the other processes of the same run
        first.stdin.close()
    with hold(path) as second:
        os.kill(second.pid, signal.SIGKILL)
    with workdir.lock(path):
        pass


def test_the_lock_goes_with_its_run_even_when_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), workdir.lock(tmp_path):
        1 / 0  # noqa: B018
    with workdir.lock(tmp_path):
        with pytest.raises(ConfigError, match="another run"), workdir.lock(tmp_path):
            pass


def test_buckets_have_no_lock_and_are_not_tried(monkeypatch):
    monkeypatch.setattr(io.importlib.util, "find_spec", lambda name: name)
    with workdir.lock("gs://bucket/x"):
        workdir.check_writable("gs://bucket/x")


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with workdir.lock(tmp_path):
        pass
    assert "Function not implemented" in caplog.text


def test_check_writable_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a" / "b", "c/d", tmp_path, "~/x"):
        workdir.check_writable(path)
    assert os.listdir(tmp_path) == []


def test_check_writable_names_what_is_in_the_way(tmp_path, monkeypatch):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "nowhere")
    for path, culprit in ((file, file), (file / "x" / "y", file), (link, link), (link / "x", link)):
        with pytest.raises(ConfigError, match=rf"^workdir: cannot write in {path}: {culprit} is not a writable"):
            workdir.check_writable(path)
    # A superuser may write anywhere, so permission is asked of a stand-in.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=rf"^workdir: cannot write in {tmp_path}/x: {tmp_path} is not a writable"):
        workdir.check_writable(tmp_path / "x")


def test_a_folder_that_cannot_be_made_after_all(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"^workdir: cannot write in {tmp_path}/file/x: Not a directory "):
        with workdir.lock(tmp_path / "file" / "x"):
            pass


OLD = {"seed": 0, "lr": 0.1, "total_epochs": 90.0, "layers": [1, 2], "resume": None,
       "input": {"batch_size": 64, "pp": "decode", "num_workers": 0, "data": {"name": "digits", "split": "train"}}}


def changed(**changes):
    new = json.loads(json.dumps(OLD))
    for name, value in changes.items():
        *parents, key = name.split("__")
        block = new
        for parent in parents:
            block = block[parent]
        block[key] = value
    return new


def test_the_same_config_has_no_changes():
    assert workdir.changes(OLD, changed(layers=(1, 2), extra=None, total_epochs=90)) == []


def test_changes_are_listed_a_line_each():
    new = changed(lr=0.2, total_epochs=None, model={"depth": 3}, input__num_workers=4)
    assert workdir.changes(OLD, new) == [
        "config.input.num_workers: 0 -> 4", "config.lr: 0.1 -> 0.2", "config.model.depth: (not set) -> 3",
        "config.total_epochs: 90.0 -> (not set)"]


RECORD = {"config": OLD, "class_names": ["cat", "dog"], "examples": 9, "fingerprint": "f"}


@pytest.mark.parametrize("now, message", [
    (dict(config=changed(seed=1)), "seed: was 0 when this run began, now 1"),
    (dict(config=changed(input__pp="decode|flip_lr")), "input.pp: was 'decode' when .*, now 'decode.flip_lr'"),
    (dict(config=changed(input__data__split="test")), "input.data.split: was 'train' when this run began, now 'test'"),
    (dict(config=changed(input__data__data_dir="/x")), r"input.data.data_dir: was \(not set\) when .*, now '/x'"),
    (dict(class_names=["cat", "emu"]), "input.data: class 1 is 'emu', and was 'dog' when this run began"),
    (dict(class_names=["dog", "cat"]), "input.data: class 0 is 'dog', and was 'cat'"),
    (dict(class_names=["cat", "dog", "emu"]), "input.data: class 2 is 'emu', and was not there"),
    (dict(class_names=["cat"]), "input.data: class 1 is not there, and was 'dog'"),
    (dict(class_names=None), "input.data: names its classes no longer"),
    (dict(examples=10), "input.data: has 10 examples, 9 when this run began"),
    (dict(fingerprint="g"), "input.data: is not what this run began with: other files, or files of another size")])
def test_another_stream_of_batches_is_refused_unless_allowed(now, message):
    assert workdir.check_stream(RECORD, RECORD, False) == []
    with pytest.raises(ConfigError, match=rf"^config\.{message}.*--config.allow_changed_data=True$"):
        workdir.check_stream(RECORD, RECORD | now, False)
    assert len(workdir.check_stream(RECORD, RECORD | now, True)) == 1


def test_what_was_not_recorded_is_not_compared():
    other = {"config": changed(seed=1), "class_names": ["x"], "examples": 1, "fingerprint": "g"}
    assert workdir.check_stream({}, other, False) == []
    with pytest.raises(ConfigError, match="class 0 is 'x'"):
        workdir.check_stream({"class_names": ["cat"]}, other, False)


def test_notes_are_written_and_read(tmp_path):
    path = tmp_path / "new"
    assert workdir.read_config(path) is None
    workdir.write_notes(path, {"b": (1, 2), "a": {"x": None}}, {"format": 1})
    assert workdir.read_config(path) == {"a": {"x": None}, "b": [1, 2]}
    assert json.loads((path / "run.json").read_text()) == {"format": 1}
    assert workdir.changes(workdir.read_config(path), {"b": (1, 2), "a": {"x": None}}) == []


NONSENSE = [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe\x00", b"\x89PNG\r\n", b"[" * 100_000,
            b'{"a": ' * 600 + b"1" + b"}" * 600, b'{"a": ' + b"9" * 10_000 + b"}"]


@pytest.mark.parametrize("content", NONSENSE, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_notes_that_are_none_are_refused_and_left(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^workdir: {path} (is not JSON|holds) .*; move it away, or use") as error:
        workdir.check_contents(tmp_path)
    assert "\n" not in str(error.value) and path.read_bytes() == content


FILES = ("config.json", "run.json", "metrics.jsonl", "wandb_run.txt", "first_batch.png", "training_curves.png",
         ".lock")
FOLDERS = ("checkpoints", "damaged_checkpoints", "tensorboard", "profile")


def test_what_a_run_itself_has_made_is_in_nobodys_way(tmp_path):
    workdir.check_contents(tmp_path / "new")
    for name in FILES:
        (tmp_path / name).write_text("{}")
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    workdir.check_contents(tmp_path)


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_something_else_in_the_place_of_what_a_run_keeps_is_named(tmp_path, monkeypatch, name):
    path, kind = tmp_path / name, "a file" if name in FILES else "a folder"
    other = path.mkdir if name in FILES else path.touch
    for make, found in ((lambda: path.symlink_to("nowhere"), io.LINK), (lambda: path.symlink_to(name), io.LINK),
                        (lambda: os.mkfifo(path), io.DEVICE), (other, io.FOLDER if name in FILES else io.FILE)):
        make()
        with pytest.raises(ConfigError, match=f"^workdir: {path} is {found}, and a run keeps {kind} there; move it aw"):
            workdir.check_contents(tmp_path)
        assert os.path.lexists(path)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir() if name in FOLDERS else (tmp_path / name).write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode)  # a superuser may read anything
    with pytest.raises(ConfigError, match=f"^workdir: {tmp_path}/{name} cannot be used; see to its permissions$"):
        workdir.check_contents(tmp_path)


def test_notes_are_read_patiently(tmp_path, monkeypatch):
    workdir.write_notes(tmp_path, {"a": 1}, {})
    errors, read = [OSError(5, "Input/output error")] * 2, epath.gpath.PosixGPath.read_bytes

    def broken(self):
        if errors:
            raise errors.pop()
        return read(self)

    monkeypatch.setattr(epath.gpath.PosixGPath, "read_bytes", broken)
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(sleep=lambda seconds: None))
    assert workdir.read_config(tmp_path) == {"a": 1}
    errors += [OSError(5, "Input/output error")] * 5
    with pytest.raises(Failure, match=f"^{tmp_path}/config.json cannot be read .*Input/output error.; nothing is chan"):
        workdir.read_config(tmp_path)
