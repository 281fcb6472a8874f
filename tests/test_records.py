"""What becomes of the records of a run that begins again: none that cannot be made up is lost."""
import errno
import math
import os

import pytest
from etils import epath

from cb_vit import records, retry
from cb_vit.config import ConfigError, Failure

ONE, TWO = b'{"step": 1, "lr": 0.5}\n', b'{"step": 2, "lr": null}\n'


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path / "metrics.jsonl")


def reopen(path, content, resume_step=9):
    path.write_bytes(content)
    lines = records.reopen(path, resume_step)
    assert b"".join(line for line, _ in lines) == (path.read_bytes() if path.exists() else b"")
    return lines


def test_no_file_is_an_empty_one(path):
    assert records.reopen(path, None) == records.reopen(path, 3) == [] and not path.exists()
    assert reopen(path, b"") == reopen(path, b"", None) == []


def test_records_of_later_steps_are_made_up_again(path, caplog):
    [(line, record)] = reopen(path, ONE + TWO, 1)
    assert line == ONE and record == {"step": 1, "lr": 0.5} and "dropped 1 records of steps after 1" in caplog.text
    assert math.isnan(reopen(path, TWO)[0][1]["lr"])


@pytest.mark.parametrize("torn", [
    b"{", b'{"ste', b'{"step": 3', b'{"step": 3, "lr": 0.', b'{"step": 3, "l\0\0\0', b"\0\0"])
@pytest.mark.parametrize("resume_step", [None, 9])
def test_a_torn_last_line_goes_without_a_word(path, caplog, torn, resume_step):
    assert reopen(path, torn, resume_step) == [] and path.read_bytes() == b""
    assert [line for line, _ in reopen(path, ONE + torn, 9)] == [ONE]
    assert caplog.text == ""


NONSENSE = [b"oops", b"[2]", b"3", b'{"step": 2, "lr": NaN}', b'{"step": 2, "lr": 1' + 400 * b"0" + b"}", b"\xff\xfe\0",
            b'{"step": "2"}', b'{"step": true}', b'{"step": -1}', b'{"step": 9007199254740993}',
            b"[" * 100_000, b"9" * 10_000, b'{"step": 1, "x": "word"}', b"",
            b"\x89PNG"]


@pytest.mark.parametrize("line", NONSENSE, ids=lambda line: repr(line[:20]))
def test_lines_of_somebody_stay_as_they_are(path, caplog, line):
    for content in (ONE + line + b"\n" + TWO, line + b"\n" + ONE):
        assert [record is None for _, record in reopen(path, content)].count(True) == 1
        assert path.read_bytes() == content and "is not a record, and is left as it is" in caplog.text
    if line:
        reopen(path, ONE + line)
        assert path.read_bytes() == ONE + line + b"\n"


@pytest.mark.parametrize("line", NONSENSE, ids=lambda line: repr(line[:20]))
@pytest.mark.parametrize("resume_step", [None, 9])
def test_a_file_without_a_record_is_not_ours(path, line, resume_step):
    for content in (line + b"\n", line + b"\n" + line) + (line,) * bool(line):
        with pytest.raises(ConfigError, match=f"^workdir: {path} holds no record of a run .*; move it away$") as error:
            reopen(path, content, resume_step)
        assert path.read_bytes() == content and "\n" not in str(error.value)


def test_a_fresh_start_keeps_what_earlier_ones_have_recorded(path, caplog):
    for number in (1, 2):
        assert reopen(path, ONE + TWO, None) == [] and not path.exists()
        assert (path.parent / f"metrics.{number}.jsonl").read_bytes() == ONE + TWO
        assert f"kept as {path.parent}/metrics.{number}.jsonl" in caplog.text


def test_what_cannot_be_read_is_not_emptied(path, monkeypatch):
    path.write_bytes(ONE)
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(sleep=lambda seconds: None))

    def broken(self):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(Failure, match=f"{path} cannot be read .*Input/output error"):
        patch.setattr(type(path), "read_bytes", broken)
        records.reopen(path, None)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == ONE


def test_what_a_run_has_recorded_is_read_without_a_change(path, caplog):
    content = ONE + TWO + b'{"step": 1, "val/prec@1": 0.5}\n{"step": 1, "lr": 0.25}\n{"step": 3, "l'
    path.write_bytes(content)
    history = records.read(path.parent, "RUN")
    steps, values = history.series()["lr"]
    assert steps.tolist() == [1, 2] and values[0] == 0.25 and math.isnan(values[1])
    assert history.at(1) == {"lr", "val/prec@1"} and history.highest("lr") == 0.25 and history.highest("loss") is None
    assert path.read_bytes() == content and caplog.text == ""


@pytest.mark.parametrize("content, error", [
    (None, "does not exist; give the workdir of a run"),
    (b"", "holds no record of a run; give the workdir of one that has logged a step"),
    (b'{"st', "holds no record of a run; give the workdir of one that has logged a step"),
    (b'{"x": 1}\n', "holds no record of a run (b'{\"x\": 1}'); give the workdir of one that has logged a step")])
def test_what_is_no_run_is_told_where_it_was_given(path, content, error):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        records.read(path.parent, "RUN")
    assert str(caught.value) == f"RUN: {path} {error}"
