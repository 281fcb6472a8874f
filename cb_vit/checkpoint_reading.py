"""Reading what lies in a folder of checkpoints: patiently, and giving up none on suspicion.

Every process reads for itself, and what one of them meets counts for all: they succeed, try again or fail together.
"""
from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from cb_vit import damage, dist, io, retry
from cb_vit.checkpoint_arrays import checksums, describe
from cb_vit.config import ConfigError
from cb_vit.damage import Damaged, Unreadable, Verdict
from cb_vit.texts import first_few, parse_json
from cb_vit.tree import names

T = TypeVar("T")
Tree = Any
Item = Literal["params", "opt", "ema"]
FORMAT = 1
STEP = re.compile("0|[1-9][0-9]*")
META, COMMITTED = "metadata", "commit_success.txt"  # Orbax's names


class Mismatch(ConfigError):
    """A sound checkpoint that holds another model or optimiser than the config describes."""


class Reader:
    """Reads a folder of checkpoints.

    Args:
        directory: the folder `checkpoints` of a workdir; it need not be there.
    """

    def __init__(self, directory: epath.Path):
        self.directory, self._handlers = directory, handlers()

    def folder(self, step: int) -> epath.Path:
        """The folder of the checkpoint of a step."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Steps in the folder, ascending.

        Raises:
            ConfigError: something else is in the place of the folder, or of a checkpoint.
            Unreadable: the folder cannot be listed, which Orbax would take for an empty one.
        """
        return self.patiently(None, lambda: self._locally(None, self._list))

    def _list(self) -> list[int]:
        local = io.is_local(self.directory)
        try:
            found = sorted(int(path.name) for path in self.directory.iterdir() if STEP.fullmatch(path.name))
        except (FileNotFoundError, NotADirectoryError):
            if local and os.path.lexists(self.directory):
                raise ConfigError("workdir", f"{self.directory} is not a folder; move it away") from None
            return []
        for folder in map(self.folder, found if local else ()):
            if (what := io.kind(folder)) not in (None, io.FOLDER):
                raise ConfigError("workdir", f"{folder} is {what}, and so no checkpoint; move it away")
        return found

    def compare(self, steps: list[int], manager: ocp.CheckpointManager) -> None:
        """See to it that Orbax's manager has found all checkpoints; in a bucket, what is half written does not count.

        A run whose manager misses one would begin anew, or save over it.

        Args:
            steps: the steps in the folder, as `steps` gives them.
            manager: Orbax's manager of the same folder.

        Raises:
            Unreadable: the manager does not find one of them.
        """
        def look() -> None:
            missed = set(steps) - set(manager.all_steps())
            if there := list(filter(self._is_complete, missed)):
                manager.reload()
                raise TimeoutError(f"Orbax does not find {there}")

        self.patiently(None, lambda: self._locally(None, look))

    def _is_complete(self, step: int) -> bool:
        """Whether the checkpoint is there: a living run may have deleted it, and in a bucket it may be half written."""
        try:
            names = [path.name for path in self.folder(step).iterdir()]
        except FileNotFoundError:
            return False
        # Locally Orbax renames a finished folder, which is atomic; a bucket has no such rename, so that a file written
        # last tells that the rest is there.
        return io.is_local(self.directory) or COMMITTED in names

    def meta(self, step: int) -> dict[str, Any]:
        """The notes beside the arrays of a checkpoint; to be called in `patiently`."""
        return self._locally(step, lambda: self._parse(step, (self.folder(step) / "meta" / META).read_bytes()))

    def _parse(self, step: int, content: bytes) -> dict[str, Any]:
        try:
            meta = parse_json(content)
        except ValueError as error:
            raise Damaged(f"its notes are not JSON: {error}") from None
        if not isinstance(meta, dict):
            raise Damaged(f"its notes are {meta!r:.40}")
        # Before anything else is believed: the notes hold the checksums that prove damage of the arrays.
        if meta.pop("digest", None) != digest(meta):
            raise Damaged("its notes have changed")
        if meta.get("format") != FORMAT:
            raise Mismatch("workdir", f"checkpoint {step} in {self.directory} has format {meta.get('format')!r:.40}, "
                                      f"this version reads {FORMAT}; read it with the version that wrote it")
        if wrong := _malformed(meta):
            raise Damaged(f"its notes say {wrong!r:.80}, where a run notes something else")
        return meta

    def arrays(self, step: int, meta: Mapping[str, Any], target: Mapping[Item, Tree]) -> dict[str, Tree]:
        """Items of a checkpoint, their checksums verified; to be called in `patiently`.

        Args:
            step: the checkpoint's step.
            meta: the checkpoint's notes.
            target: shapes, dtypes and shardings of the items to read, in loop layout.

        Raises:
            Damaged: a checksum does not match, or storage holds something else than was written.
            Unreadable: storage has trouble.
        """
        # Not through Orbax's manager: its barriers would keep the others waiting for a process whose reading fails.
        arrays = self._locally(step, lambda: {
            item: self._handlers[item].restore(self.folder(step) / item, args=ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)))
            for item, tree in target.items()})
        for name, value in zip(names(arrays), checksums(arrays), strict=True):
            if meta["arrays"][name][-1] != value:
                raise Damaged(f"checksum of {name} does not match")
        return arrays

    def patiently(self, step: int | None, read: Callable[[], T]) -> T:
        """What `read()` returns; trouble is given time to pass, and damage a second look.

        Args:
            step: the step of the checkpoint that is read; None: the list of checkpoints is read.
            read: the function to call, made of `meta` and `arrays`, so that it succeeds or fails alike on all
                processes.

        Raises:
            Damaged: the checkpoint is proved damaged.
            Unreadable: the trouble stays.
        """
        def attempt() -> T:
            try:
                return read()
            except Damaged:
                folder = self.directory if step is None else self.folder(step)
                whole = functools.partial(damage.read_whole, folder)
                # A read that was cut short looks like damage: so all bytes must be readable, and wrong a second time.
                self._locally(step, whole, suspicion=Verdict.PASSING)
                return read()

        return retry.call(attempt, lambda error: isinstance(error, Unreadable) and error.passing,
                          lambda flag: bool(dist.worst(flag)))

    def _locally(self, step: int | None, read: Callable[[], T], suspicion: Verdict = Verdict.DAMAGED) -> T:
        """What `read()` returns on this process; if it fails on any, that is what it does on all of them.

        Args:
            step: the step of the checkpoint that is read; None: the list of checkpoints is read.
            read: the function to call; it waits for no other process.
            suspicion: the verdict where it fails in a way that damage would explain.
        """
        try:
            result, error = read(), None
        except Exception as found:  # whatever a library raises at a broken file, or at a network that is down
            result, error = None, found
        verdict = damage.judge(error)
        verdict = suspicion if verdict == Verdict.DAMAGED else verdict
        worst = Verdict(dist.worst(verdict))
        if worst == Verdict.SOUND:
            return result
        # After the exchange, which all processes must reach.
        if verdict == Verdict.FOREIGN:
            raise error
        reason = retry.reason(damage.unwrap(error)) if verdict == worst else "another process says why"
        if worst == Verdict.DAMAGED:
            raise Damaged(reason)
        what = self.directory if step is None else f"checkpoint {step} in {self.directory}"
        raise Unreadable(f"{what} cannot be read ({reason}); nothing is changed", worst == Verdict.PASSING)


def _matters(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


# Through which Orbax tells of its every step, and warns of what is so on purpose: a page for each `cb_vit.load`.
logging.getLogger("absl").addFilter(_matters)


def _malformed(meta: Mapping[str, Any]) -> Any:
    """What of the notes is not as `Checkpointer.save` writes it, however well their digest fits; None: nothing."""
    arrays, metrics, stream = meta.get("arrays"), meta.get("metrics"), meta.get("stream")
    for block in (arrays, metrics, {} if stream is None else stream):
        if not isinstance(block, dict):
            return {"block": block}
    for name, entry in arrays.items():
        try:
            shape, dtype, _ = entry
            sound = all(type(side) is int and 0 <= side < 1 << 63 for side in shape) and jnp.dtype(dtype)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            return {name: entry}
    return next(({name: value} for name, value in metrics.items() if not isinstance(value, int | float)), None)


def handlers() -> dict[str, Any]:
    """Orbax's readers and writers of the items.

    The first replica of an array writes it. Orbax's default, a slice of it from each replica, compiles a
    program for every shape on every device before the first save.
    """
    arrays = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)))
    return {"meta": ocp.JsonCheckpointHandler(filename=META), **{
        item: ocp.PyTreeCheckpointHandler(type_handler_registry=arrays) for item in get_args(Item)}}


def digest(meta: Mapping[str, Any]) -> str:
    """A hash of a checkpoint's notes, which is kept among them."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def check_fit(where: str, meta: Mapping[str, Any], target: Tree) -> None:
    """Refuse a checkpoint whose arrays are not those of `target`.

    Args:
        where: what the checkpoint is called in errors.
        meta: the checkpoint's notes.
        target: shapes and dtypes of the wanted arrays, in loop layout.

    Raises:
        Mismatch: an array is missing, left over, or of another shape or dtype; names it.
    """
    another = "it is of another model or optimiser; use another workdir, or the config it was made with"
    saved, here = {name: what[:-1] for name, what in meta["arrays"].items()}, describe(target)
    for title, some in (("lacks", here.keys() - saved.keys()), ("has besides", saved.keys() - here.keys())):
        if some:
            raise Mismatch("workdir", f"{where} {title} {first_few(sorted(some), 3)}: {another}")
    for name, (shape, dtype) in here.items():
        if saved[name] != [shape, dtype]:
            was = f"{saved[name][1]} {saved[name][0]}"
            raise Mismatch("workdir", f"{name} is {was} in {where} and {dtype} {shape} in this config: {another}")
