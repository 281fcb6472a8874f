"""Asking again what did not answer: storage has bad moments that pass."""
from __future__ import annotations

import dataclasses
import errno
import logging
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

# What a parser raises at bytes that it does not understand; they will be the same the next time.
PARSING = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RecursionError,
           EOFError, zlib.error)
# What asking again does not change; without a number, as fsspec raises them, the type must do.
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
LASTING_NUMBERS = {errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
                   errno.ESPIPE, errno.ENXIO}


@dataclasses.dataclass(frozen=True)
class Patience:
    """How often and how long to ask.

    Attributes:
        attempts: largest number of attempts.
        wait: seconds before the second attempt, doubled before each further one.
        limit: seconds from the first attempt after which no further one begins.
        clock: function that gives the time in seconds from any origin.
        sleep: function that waits for a number of seconds.
    """

    attempts: int = 5
    wait: float = 1.0
    limit: float = 120.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


PATIENCE = Patience()


def passes(error: BaseException) -> bool:
    """Whether what raised `error` may do better soon: a time-out, a stale handle, a server's 503, or the unknown."""
    if isinstance(error, OSError):
        # By number as well: Python makes a subclass of OSError only for some of them.
        return not isinstance(error, LASTING) and error.errno not in LASTING_NUMBERS
    return isinstance(error, Exception) and not isinstance(error, (*PARSING, ImportError, MemoryError))


def call(attempt: Callable[[], T], passing: Callable[[Exception], bool] = passes,
         agree: Callable[[bool], bool] = bool, patience: Patience | None = None) -> T:
    """What `attempt()` returns; asked again, with growing pauses, while what it raises is `passing`.

    Args:
        attempt: the function to call; where several processes ask together, it must succeed on all of them, or raise
            what is alike passing.
        passing: the function that says whether an error is worth another attempt.
        agree: the function that says whether a flag is set on any of the processes that ask together.
        patience: how often and how long to ask; None: `PATIENCE`.

    Raises:
        Exception: what the last attempt raised.
    """
    patience = patience or PATIENCE
    begin, wait = patience.clock(), patience.wait
    for left in reversed(range(patience.attempts)):
        try:
            return attempt()
        except Exception as error:
            # Clocks differ between processes: were each to go by its own, one might ask again alone and wait for ever.
            if not passing(error) or not left or agree(patience.clock() - begin > patience.limit):
                raise
            logger.warning("%s; trying again in %g s", reason(error), wait)
        patience.sleep(wait)
        wait *= 2


def reason(error: BaseException) -> str:
    """An error in one line of at most about 300 characters."""
    text = repr(error) if isinstance(error, LookupError) else str(error).strip()  # a KeyError says but the key
    # TensorStore adds the whole description of the array that it was asked for.
    text = (text or repr(error)).splitlines()[0].partition(" [tensorstore_spec")[0]
    return text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"
