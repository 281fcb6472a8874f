"""What proves damage, and what does not."""
import errno
import json
import os
import subprocess
import zlib

import jax
import pytest
from etils import epath

from cb_vit import damage
from cb_vit.config import ConfigError
from cb_vit.damage import Verdict, judge


def status(code, text="Error opening \"zarr\" driver: Error reading local file"):
    return ValueError(f"{code}: {text} [tensorstore_spec='{{}}']")


def wrapped(error):
    try:
        try:
            raise error
        except Exception as found:
            raise Exception("Encountered error while reading array index") from found
    except Exception as found:
        return found


def while_handling(error, outer):
    try:
        try:
            raise error
        except Exception:
            raise outer  # noqa: B904
    except Exception as found:
        return found


CASES = {
    Verdict.DAMAGED: [
        damage.Damaged("checksum"), json.JSONDecodeError("x", "", 0), UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
        KeyError("params"), TypeError(), AttributeError(), RecursionError(), OverflowError(), zlib.error("x"),
        EOFError(), FileNotFoundError(), NotADirectoryError(), IsADirectoryError(), status("NOT_FOUND"),
        status("DATA_LOSS"), status("OUT_OF_RANGE"), status("FAILED_PRECONDITION", "Truncated Zstd-compressed stream"),
        ValueError("Error decoding b-tree node"), wrapped(status("DATA_LOSS")),
        ExceptionGroup("", [KeyError("x"), EOFError()])],
    Verdict.PASSING: [
        *(OSError(number, "x") for number in (errno.EIO, errno.ESTALE, errno.EMFILE)), TimeoutError(),
        ConnectionError(), OSError("HTTP 503"), RuntimeError("x"), Exception("x"), wrapped(OSError(errno.EIO, "x")),
        *map(status, ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED", "INTERNAL", "RESOURCE_EXHAUSTED",
                      "CANCELLED", "UNIMPLEMENTED")), wrapped(status("ABORTED")),
        ValueError("Error reading [os_error_code='22']"), status("NOT_FOUND", "Error [os_error_code='19']"),
        status("NOT_FOUND", "UNAVAILABLE: HTTP 503"), while_handling(OSError(errno.EIO, "x"), KeyError("x")),
        ExceptionGroup("", [KeyError("x"), TimeoutError()])],
    Verdict.LASTING: [
        PermissionError(), OSError(errno.ELOOP, "x"), status("PERMISSION_DENIED"), status("UNAUTHENTICATED"),
        ImportError(), ValueError("Error [os_error_code='13']")],
    Verdict.FOREIGN: [ConfigError("a", "b"), MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory")],
}


@pytest.mark.parametrize("verdict", CASES)
def test_what_an_error_says_of_a_checkpoint(verdict):
    assert {repr(error): judge(error).name for error in CASES[verdict]} == {
        repr(error): verdict.name for error in CASES[verdict]}
    assert judge(None) == Verdict.SOUND


def test_a_folder_is_read_whole_or_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x" * 1000)
    damage.read_whole(epath.Path(tmp_path))
    (tmp_path / "a" / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="a/link"):
        damage.read_whole(epath.Path(tmp_path))
    with pytest.raises(FileNotFoundError):
        damage.read_whole(epath.Path(tmp_path / "gone"))


def test_the_command_that_sets_aside_can_be_typed(tmp_path):
    source, target = tmp_path / "a b" / "12", tmp_path / "new" / "12"
    source.mkdir(parents=True)
    subprocess.run(damage.move_command(source, target), shell=True, check=True)
    assert os.listdir(tmp_path / "new") == ["12"] and not source.exists()
    assert damage.move_command(epath.Path("gs://b/x"), epath.Path("gs://b/y")) == "gcloud storage mv gs://b/x gs://b/y"
