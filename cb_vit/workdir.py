"""The folder of a run: one run in it at a time, and a note of what it was."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cb_vit import io
from cb_vit.config import ConfigError

logger = logging.getLogger(__name__)
# Changing one of these would continue with other batches than the run began with.
STREAM = ("seed", "input.data", "input.pp", "input.batch_size", "input.repeats", "input.virtual_ranks")


@contextlib.contextmanager
def lock(workdir: str | os.PathLike, primary: bool = True) -> Iterator[None]:
    """Keep a second run out of a local workdir; the system lets go of the lock however the run ends.

    Raises:
        ConfigError: another run is in it, or it cannot be written.
    """
    if not primary or not io.is_local(workdir):
        yield
        return
    import fcntl

    path = io.as_path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a")
    except OSError as error:
        raise ConfigError("workdir", f"cannot write in {path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("workdir", f"another run is in {path}; wait for it, or use another folder") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("cannot lock %s (%s): see to it that no second run uses it", path, error.strerror)
        yield


def check_writable(workdir: str | os.PathLike) -> None:
    """Refuse a workdir that cannot be made or written, before time is spent.

    Raises:
        ConfigError: names the folder that is in the way, or what is not installed for a bucket.
    """
    io.check_address(workdir, "workdir")
    if not io.is_local(workdir):
        return
    folder = existing = os.path.abspath(os.path.expanduser(workdir))
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError("workdir", f"cannot write in {folder}: {existing} is not a writable folder")


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The config the run in `workdir` was last started with; None if there is none."""
    path = io.as_path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError("workdir", f"{path} is not JSON ({error}); delete it or use another workdir") from None


def check_changes(old: Mapping[str, Any], new: Mapping[str, Any], allow_changed_data: bool) -> list[str]:
    """What differs between two configs of one run, a line each.

    Raises:
        ConfigError: what makes up the stream of batches has changed and that is not allowed.
    """
    before, after = flatten(old), flatten(new)
    missing = object()
    lines = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, missing), after.get(key, missing)
        if was == now:
            continue
        words = ["(not set)" if value is missing else repr(value) for value in (was, now)]
        lines.append(f"config.{key}: {words[0]} -> {words[1]}")
        if any(key == field or key.startswith(field + ".") for field in STREAM) and not allow_changed_data:
            raise ConfigError(f"config.{key}", f"was {words[0]} when this run began, now {words[1]}: it would go on "
                                               "with other batches. Set it back, use another workdir, or allow it "
                                               "with --config.allow_changed_data=True")
    return lines


def run_notes(
    model_name: str, model: Any, num_classes: int | None, class_names: Sequence[str] | None,
    image_shape: Sequence[int], pp: str, *, pp_evals: Mapping[str, str], total_steps: int,
    model_init: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `run.json` says: all that one needs beside the parameters to use the model; and where those began.

    Args:
        model_name: the module of the model.
        model: its resolved settings, a dataclass.
        num_classes: width of the head; None: no head.
        class_names: None: not known.
        image_shape: of the images in training, [y x c].
        pp: preprocessing in training.
        pp_evals: preprocessing of each evaluator.
        total_steps: length of the run.
        model_init: where its first parameters came from; None: drawn.
    """
    return {
        "format": 1, "model_name": model_name, "model": dataclasses.asdict(model), "num_classes": num_classes,
        "class_names": list(class_names) if class_names else None, "image_shape": list(image_shape), "pp": pp,
        "pp_evals": dict(pp_evals), "total_steps": total_steps, "model_init": model_init,
    }


def write_notes(workdir: str | os.PathLike, config: Mapping[str, Any] | None, run: Mapping[str, Any]) -> None:
    """Write `config.json`, where a config made the run, and `run.json`, as `run_notes` gives it."""
    path = io.as_path(workdir)
    for name, content in (("config.json", config), ("run.json", run)):
        if content is not None:
            with io.writing(path / name):
                path.mkdir(parents=True, exist_ok=True)
                io.write_atomic(path / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; unset (None) entries are dropped, tuples become lists."""
    if isinstance(tree, Mapping):
        parts = [flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in tree.items()]
        return {name: value for part in parts for name, value in part.items()}
    if tree is None:
        return {}
    return {prefix: json.loads(json.dumps(tree))}
