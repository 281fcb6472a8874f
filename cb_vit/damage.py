"""What proves that a checkpoint is damaged, and what only shows that storage has trouble.

Proof is what was really read and is not what was written: a checksum, a digest, bytes that no parser takes, a file
that is missing from a folder that can be read. A time-out, a stale handle, a missing permission, a server's error or
an error nobody has heard of prove nothing: the checkpoint may be sound, and whoever gave it up would lose it.
"""
from __future__ import annotations

import enum
import os
import re
import shlex
from collections.abc import Iterator

import jax
from etils import epath

from cb_vit import io, retry
from cb_vit.config import ConfigError, Failure


class Damaged(Exception):
    """A checkpoint is not as it was written."""


class Unreadable(Failure):
    """What is there cannot be read, which says nothing of whether it is sound.

    Args:
        message: what cannot be read and why, in one line.
        passing: whether it may be read soon.
    """

    def __init__(self, message: str, passing: bool):
        super().__init__(message)
        self.passing = passing


class Verdict(enum.IntEnum):
    """What an error says of a checkpoint; of several, the highest counts.

    Trouble stands above damage: where storage fails on one process, damage that another one sees may come of the same.
    """

    SOUND = 0
    DAMAGED = 1
    PASSING = 2  # trouble that may pass
    LASTING = 3  # trouble that will stay
    FOREIGN = 4  # no fault of the checkpoint, nor of its storage


# Of absl, with which TensorStore's errors begin. Those that stand neither here nor there may pass.
PROOF = {"NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION"}  # the last of what cannot be unpacked
REFUSED = {"PERMISSION_DENIED", "UNAUTHENTICATED"}
STATUS = re.compile(
    r"\b(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|"
    r"RESOURCE_EXHAUSTED|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS): ")


def unwrap(error: BaseException) -> BaseException:
    """The error that `error` was made of, where it says no more than that there was one."""
    while type(error) in (Exception, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def judge(error: BaseException | None) -> Verdict:
    """What an error that was raised while a checkpoint was read says of it; None says that it is sound.

    Damage is a suspicion only, see `read_whole`.
    """
    return max(map(_judge, _chain(error)), default=Verdict.SOUND)


def _judge(error: BaseException) -> Verdict:
    if isinstance(error, (ConfigError, Failure, MemoryError, jax.errors.JaxRuntimeError)):
        return Verdict.FOREIGN
    text = str(error)
    # TensorStore tells of a system's error in words; its number says more than the status that it was put under.
    if not isinstance(error, OSError) and (number := io.told_errno(text)):
        error = OSError(number, text)
    if isinstance(error, (Damaged, FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return Verdict.DAMAGED
    if not isinstance(error, OSError) and (status := set(STATUS.findall(text))):
        return Verdict.DAMAGED if status <= PROOF else Verdict.LASTING if status & REFUSED else Verdict.PASSING
    if retry.passes(error):
        return Verdict.PASSING
    return Verdict.DAMAGED if isinstance(error, retry.PARSING) else Verdict.LASTING


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the system's errors that it came of, and those it stands for."""
    yield from [unwrap(error)] if error is not None and not isinstance(error, BaseExceptionGroup) else []
    for inner in getattr(error, "exceptions", ()):
        yield from _chain(inner)
    # Libraries wrap a time-out in errors of their own that sound like damage; the system's own word counts as well.
    while error is not None and (error := error.__cause__ or error.__context__):
        if isinstance(error, OSError):
            yield error


def read_whole(folder: epath.Path) -> None:
    """Read every file under `folder`. Where that works, an error that stays is a fault of what they hold.

    Args:
        folder: the folder of a checkpoint, or of all of them.

    Raises:
        Exception: whatever listing a folder or reading a file raises.
    """
    for path in folder.iterdir():
        if path.is_dir():
            read_whole(path)
            continue
        with path.open("rb") as file:
            # In pieces, as a checkpoint's files may be larger than the memory.
            while file.read(1 << 24):
                pass


def move_command(source: os.PathLike, target: os.PathLike) -> str:
    """The command that moves something aside, for people to type.

    Args:
        source: what is to be moved, locally or in a bucket.
        target: where to move it.
    """
    one, other, folder = (shlex.quote(os.fspath(path)) for path in (source, target, os.path.dirname(target)))
    if os.fspath(source).startswith("gs://"):
        return f"gcloud storage mv {one} {other}"
    return f"mkdir -p {folder} && mv {one} {other}"
