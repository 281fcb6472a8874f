"""The cells of a sweep as they stand: complete, begun, or somebody else's."""
from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

from etils import epath

from cb_vit import io
from cb_vit import workdir as workdir_lib
from cb_vit.analysis.runs import Run, read_run
from cb_vit.analysis.sweeps import LOG
from cb_vit.checkpoint_reading import STEP
from cb_vit.config import ConfigError
from cb_vit.texts import parse_json

CLAIMS = ".claims"  # folder of the locks, in that of the sweep
TAIL = 4096  # bytes at the end of a log, or of records, in which the last line is


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A cell that is to be run.

    Attributes:
        name: name of the cell.
        folder: folder of its run.
        words: what its command line says.
        config: its whole config, as it was checked.
    """

    name: str
    folder: epath.Path
    words: Sequence[str]
    config: Mapping[str, Any]

    def last_words(self) -> str:
        """The last line that its run has said."""
        lines = [line for line in _tail(self.folder / LOG).splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it has said nothing"


def claim(workdir: str | os.PathLike, job: Job) -> tuple[contextlib.ExitStack, IO[str] | None] | None:
    """The lock of a cell and its file; None: somebody else has it, or runs the cell by hand."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(workdir_lib.lock(io.as_path(workdir) / CLAIMS / job.name))
            with workdir_lib.lock(job.folder):
                pass
        except workdir_lib.Locked:
            return None
        return stack.pop_all(), file


def is_claimed(workdir: str | os.PathLike, job: Job) -> bool:
    """Whether somebody runs a cell; nothing is written."""
    for folder in (io.as_path(workdir) / CLAIMS / job.name, job.folder):
        try:
            if os.path.lexists(folder / ".lock"):
                with workdir_lib.lock(folder):
                    pass
        except workdir_lib.Locked:
            return True
    return False


def is_complete(job: Job) -> bool:
    """Whether a run has come to its last step, as it would find itself: saved there, and evaluated by all it has.

    A run that was told to stop just there has saved, and makes its evaluation up when it goes on.

    Raises:
        ConfigError: the folder holds the run of another config, or what no run has written.
    """
    run = _read(job)
    return run is not None and run.finished and run.total_steps in saved_steps(job)


def _read(job: Job) -> Run | None:
    """The run in a cell's folder; None: none has begun there.

    Raises:
        ConfigError: as for `is_complete`.
    """
    config = workdir_lib.read_config(job.folder)
    if config is not None and (changed := workdir_lib.changes(config, job.config)):
        raise ConfigError("--workdir", f"{job.folder} holds a run of another config ({changed[0]}); move it away")
    return None if config is None else read_run(job.name, job.folder, config, "--workdir")


def saved_steps(job: Job) -> set[int]:
    """Steps of the checkpoints of a cell's run. Not asked of Orbax, which would take hold of the accelerator."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return {int(name) for name in os.listdir(job.folder / "checkpoints") if STEP.fullmatch(name)}
    return set()


def share(job: Job) -> float:
    """How much of a cell's run is done, from 0 to 1, as far as it has recorded it."""
    total = (workdir_lib.read_run(job.folder) or {}).get("total_steps")
    for line in reversed(_tail(job.folder / "metrics.jsonl").splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError):  # a torn line, or somebody's
            return min(parse_json(line.encode())["step"] / total, 1.0)
    return 0.0


def standing(job: Job, workdir: str | os.PathLike) -> str:
    """What a sweep would do with a cell, in words."""
    if is_complete(job):
        return "complete"
    if is_claimed(workdir, job):
        return "run by others"
    return beginning(job)


def beginning(job: Job) -> str:
    """Where a cell's run would begin, in words."""
    saved = saved_steps(job)
    return f"goes on from step {max(saved):,}" if saved else "begins"


def _tail(path: epath.Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
