"""The folder of a run: one run in it at a time, and a note of what it was."""
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from cb_vit import io, workdir
from cb_vit.config import ConfigError

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
    with pytest.raises(ConfigError, match=rf"^workdir: cannot write in {tmp_path}/file/x: Not a directory$"):
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
    assert workdir.check_changes(OLD, changed(layers=(1, 2), extra=None, total_epochs=90), False) == []


def test_changes_are_listed_a_line_each():
    new = changed(lr=0.2, total_epochs=None, model={"depth": 3}, input__num_workers=4)
    assert workdir.check_changes(OLD, new, False) == [
        "config.input.num_workers: 0 -> 4", "config.lr: 0.1 -> 0.2", "config.model.depth: (not set) -> 3",
        "config.total_epochs: 90.0 -> (not set)"]


@pytest.mark.parametrize("change, field", [
    (dict(seed=1), "seed: was 0 when this run began, now 1"),
    (dict(input__batch_size=32), "input.batch_size: was 64 when this run began, now 32"),
    (dict(input__pp="decode|flip_lr"), "input.pp: was 'decode' when this run began, now 'decode.flip_lr'"),
    (dict(input__data__split="test"), "input.data.split: was 'train' when this run began, now 'test'"),
    (dict(input__data__data_dir="/x"), r"input.data.data_dir: was \(not set\) when this run began, now '/x'"),
])
def test_another_stream_of_batches_is_refused_unless_allowed(change, field):
    with pytest.raises(ConfigError, match=rf"^config\.{field}.*--config.allow_changed_data=True$"):
        workdir.check_changes(OLD, changed(**change), False)
    assert len(workdir.check_changes(OLD, changed(**change), True)) == 1


def test_names_that_only_begin_like_the_stream_are_free():
    assert len(workdir.check_changes(OLD, changed(seed_of_noise=1, input__pp_backend="x"), False)) == 2


def test_notes_are_written_and_read(tmp_path):
    path = tmp_path / "new"
    assert workdir.read_config(path) is None
    workdir.write_notes(path, {"b": (1, 2), "a": {"x": None}}, {"format": 1})
    assert workdir.read_config(path) == {"a": {"x": None}, "b": [1, 2]}
    assert json.loads((path / "run.json").read_text()) == {"format": 1}
    assert workdir.check_changes(workdir.read_config(path), {"b": (1, 2), "a": {"x": None}}, False) == []
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=rf"^workdir: {path}/config.json is not JSON .*; delete it or use another"):
        workdir.read_config(path)
