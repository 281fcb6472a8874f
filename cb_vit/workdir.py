"""The folder of a run: one run in it at a time, and a note of what it was."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import IO, Any

from etils import epath

import cb_vit
from cb_vit import io
from cb_vit.config import ConfigError
from cb_vit.datasets.contents import pad
from cb_vit.texts import parse_json

logger = logging.getLogger(__name__)
NOTES = ("config.json", "run.json")
MOST_CLASSES = 10**7  # a larger head is a slip of the pen, and a list of so many names fills the memory
# What a run keeps in its workdir, and does with it.
CONTENTS = {
    **dict.fromkeys(NOTES, (io.FILE, os.R_OK)), "metrics.jsonl": (io.FILE, os.R_OK | os.W_OK),
    **dict.fromkeys((".lock", "first_batch.png", "training_curves.png", "wandb_run.txt"), (io.FILE, 0)),
    **dict.fromkeys(("checkpoints", "damaged_checkpoints", "tensorboard", "profile"),
                    (io.FOLDER, os.R_OK | os.W_OK | os.X_OK))}


class Locked(ConfigError):
    """Another process that is alive has the lock of a folder."""


@contextlib.contextmanager
def lock(workdir: str | os.PathLike, primary: bool = True) -> Iterator[IO[str] | None]:
    """Keep a second run out of a local workdir; the system lets go of the lock however the run ends.

    Args:
        workdir: the run's folder; one in a bucket is not locked, as buckets have no locks.
        primary: whether this process holds the lock; one of a run is enough.

    Yields:
        The file that is locked, until it is closed here and in all processes that have inherited it; None: none is.

    Raises:
        Locked: another run is in the folder.
        ConfigError: it cannot be written.
    """
    if not primary or not io.is_local(workdir):
        yield None
        return
    import fcntl  # which Windows does not have

    path = io.as_path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a")
    except OSError as error:
        raise ConfigError("workdir", f"cannot write in {path}: {error.strerror} ({error.filename})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked("workdir", f"another run is in {path}; wait for it, or use another folder") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("cannot lock %s (%s): see to it that no second run uses it", path, error.strerror)
        yield file


def check_writable(workdir: str | os.PathLike) -> None:
    """Refuse a workdir that cannot be made or written, before time is spent.

    Raises:
        ConfigError: the folder or one above it cannot be written, or what a bucket needs is not installed.
    """
    io.check_address(workdir, "workdir")
    if not io.is_local(workdir):
        return
    folder = existing = os.path.abspath(os.path.expanduser(workdir))
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError("workdir", f"cannot write in {folder}: {existing} is not a writable folder")


def check_contents(workdir: str | os.PathLike) -> None:
    """Refuse a local workdir in which something else is in the place of what a run keeps there.

    Raises:
        ConfigError: a file or folder of the run is something else, or may not be used; the message names it.
        Failure: one of `NOTES` cannot be read.
    """
    for name, (kind, access) in CONTENTS.items() if io.is_local(workdir) else ():
        path = io.as_path(workdir) / name
        if (found := io.kind(path)) not in (None, kind):
            raise ConfigError("workdir", f"{path} is {found}, and a run keeps {kind} there; move it away")
        if found and not os.access(path, access):
            raise ConfigError("workdir", f"{path} cannot be used; see to its permissions")
    for name in NOTES:
        read_json(io.as_path(workdir) / name)


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The config the run in `workdir` was last started with; None if there is none.

    Raises:
        ConfigError: `config.json` is not a config.
        Failure: `config.json` cannot be read.
    """
    return read_json(io.as_path(workdir) / "config.json")


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """What `config.json` or `run.json` says; None if there is none.

    Raises:
        ConfigError: the file is nothing that a run has written.
        Failure: the file cannot be read.
    """
    if (data := io.read(path)) is None:
        return None
    try:
        content = parse_json(data)
    except ValueError as error:
        raise ConfigError("workdir", f"{path} is not JSON ({error}); move it away, or use another workdir") from None
    if not isinstance(content, dict):
        raise ConfigError("workdir", f"{path} holds {content!r:.40}, no settings; move it away, or use another workdir")
    return content


def read_run(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What `run.json` says of the run in `workdir`; None if there is none.

    Raises:
        ConfigError: the file is nothing that a run has written.
        Failure: the file cannot be read.
    """
    return read_json(io.as_path(workdir) / "run.json")


def class_names(run: Mapping[str, Any], workdir: str | os.PathLike) -> tuple[str, ...] | None:
    """The names of the head's classes in what `run.json` says; None: not known.

    Args:
        run: the content of `run.json`.
        workdir: the run's folder, for errors.

    Raises:
        ConfigError: "class_names" or "num_classes" is not what a run writes.
    """
    names, count = run.get("class_names"), run.get("num_classes")
    if not names:
        return None
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or type(count) is not int or not len(names) <= count <= MOST_CLASSES:
        raise ConfigError("workdir", f"class_names in run.json of {workdir} are no names of {count} classes: "
                                     f"{names!r:.60}")
    return pad(names, count)


def recorded_classes(workdir: str | os.PathLike) -> tuple[str, ...] | None:
    """The names of the head's classes in the `run.json` of a run; None: not known."""
    notes = read_run(workdir)
    return notes and class_names(notes, workdir)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested configs, a line each."""
    return [f"config.{key}: {was} -> {now}" for key, was, now in differences(old, new)]


def check_stream(before: Mapping[str, Any], now: Mapping[str, Any], allow_changed_data: bool) -> list[str]:
    """What differs between two streams of batches, a line each.

    Args:
        before: the record of the stream in the checkpoint: nested settings under "config", "class_names", "examples"
            and "fingerprint". What was not recorded is not compared.
        now: the same record of the run as it would go on.
        allow_changed_data: whether the run may go on although the streams differ.

    Raises:
        ConfigError: the streams differ, and that is not allowed.
    """
    lines = []
    if "config" in before:
        lines += [(f"config.{key}", f"was {was} when this run began, now {is_now}")
                  for key, was, is_now in differences(before["config"], now["config"])]
    # One line on the data: what differs first explains the rest, as other names do another fingerprint.
    data = "config.input.data"
    if "class_names" in before and (was := before["class_names"]) != (is_now := now["class_names"]):
        lines.append((data, _renamed(was, is_now)))
    elif "examples" in before and before["examples"] != now["examples"]:
        lines.append((data, f"has {now['examples']:,} examples, {before['examples']:,} when this run began"))
    elif "fingerprint" in before and before["fingerprint"] != now["fingerprint"]:
        lines.append((data, "is not what this run began with: other files, or files of another size"))
    if lines and not allow_changed_data:
        path, message = lines[0]
        raise ConfigError(path, f"{message}: it would go on with other batches. Set it back, use another workdir, or "
                                "allow it with --config.allow_changed_data=True")
    return [f"{path}: {message}" for path, message in lines]


def _renamed(was: Sequence[str] | None, now: Sequence[str] | None) -> str:
    """What became of the names of the classes, by the first that differs."""
    if was is None or now is None:
        return f"names its classes {'no longer' if now is None else 'now'}, unlike when this run began"
    pairs = enumerate(itertools.zip_longest(was, now))
    number, (before, after) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    one, other = (repr(name) if name is not None else "not there" for name in (before, after))
    return f"class {number} is {other}, and was {one} when this run began"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(dotted name, value before, value after) of what differs between two nested configs, in words."""
    before, after, missing = flatten(old), flatten(new), object()
    for key in sorted(before.keys() | after.keys()):
        values = before.get(key, missing), after.get(key, missing)
        if values[0] != values[1]:
            yield key, *("(not set)" if value is missing else repr(value) for value in values)


def run_notes(
    model_name: str, model: Any, num_classes: int | None, class_names: Sequence[str] | None,
    image_shape: Sequence[int], pp: str, *, pp_evals: Mapping[str, str], total_steps: int,
    model_init: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None, devices: str | None = None,
) -> dict[str, Any]:
    """What `run.json` says: all that one needs beside the parameters to use the model; and where those began.

    Args:
        model_name: name of the model's module, as in `config.model_name`.
        model: resolved settings of the model, a dataclass.
        num_classes: width of the head; None: no head.
        class_names: names of the head's classes; None: not known.
        image_shape: shape of the images in training, [y x c].
        pp: the preprocessing string of training.
        pp_evals: the preprocessing string of each evaluator, by its name.
        total_steps: length of the run in steps.
        model_init: where the first parameters came from; None: they were drawn.
        data: what each source holds, as `datasets.contents.report` gives it; None: not known.
        devices: number and kind of the devices, in words; None: not known.
    """
    return {
        "format": 1, "model_name": model_name, "model": dataclasses.asdict(model), "num_classes": num_classes,
        "class_names": list(class_names) if class_names else None, "image_shape": list(image_shape), "pp": pp,
        "pp_evals": dict(pp_evals), "total_steps": total_steps, "model_init": model_init, "data": data,
        "versions": versions(), "devices": devices,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run hang on, by name."""
    found = {"cb_vit": cb_vit.__version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # as where somebody has put a folder on the path
            found[name] = metadata.version(name)
    return found


def write_notes(workdir: str | os.PathLike, config: Mapping[str, Any] | None, run: Mapping[str, Any]) -> None:
    """Write `config.json` and `run.json`.

    Args:
        workdir: the run's folder; made if it is not there.
        config: the run's config; None: no config made the run, and `config.json` is not written.
        run: the content of `run.json`, as `run_notes` gives it.

    Raises:
        CannotWrite: the storage fails.
    """
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
    # As JSON has it: what was written to a file and read again must equal what was not.
    return {prefix: json.loads(json.dumps(tree))}
