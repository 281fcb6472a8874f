"""Asking again: as often as it may help, for as long as is bearable."""
import errno
import json

import pytest

from cb_vit import retry


class Clock:
    """Time that passes in sleep, and as long as every attempt takes."""

    def __init__(self, attempt=0.0):
        self.now, self.attempt, self.slept = 0.0, attempt, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def patience(self, **settings):
        return retry.Patience(clock=lambda: self.now, sleep=self.sleep, **settings)

    def ask(self, *errors, **settings):
        """(what the last attempt returned, how many there were), each of the first raising an error."""
        rest, attempts = list(errors), []

        def attempt():
            self.now += self.attempt
            attempts.append(1)
            if rest:
                raise rest.pop(0)
            return "answer"

        try:
            return retry.call(attempt, patience=self.patience(**settings)), len(attempts)
        except Exception as error:
            return error, len(attempts)


BUSY = OSError(errno.EIO, "busy")


def test_it_is_asked_again_with_growing_pauses_until_it_answers():
    clock = Clock()
    assert clock.ask(BUSY, BUSY, BUSY) == ("answer", 4) and clock.slept == [1, 2, 4]


def test_attempts_and_time_are_bounded():
    assert Clock().ask(*[BUSY] * 9) == (BUSY, 5)
    assert Clock(attempt=70).ask(*[BUSY] * 9) == (BUSY, 2)


@pytest.mark.parametrize("error", [
    BUSY, OSError(errno.ESTALE, "stale"), TimeoutError(), ConnectionResetError(), OSError("no number: a library's"),
    RuntimeError("503"), type("HttpError", (Exception,), {})("429")], ids=repr)
def test_what_may_pass(error):
    assert retry.passes(error) and Clock().ask(error) == ("answer", 2)


@pytest.mark.parametrize("error", [
    FileNotFoundError(), PermissionError(), IsADirectoryError(), NotADirectoryError(), OSError(errno.ELOOP, "links"),
    OSError(errno.EROFS, "read-only"), ImportError("gcsfs"), json.JSONDecodeError("x", "", 0), KeyError("x"),
    TypeError(), RecursionError(), MemoryError()], ids=repr)
def test_what_stays_is_asked_once(error):
    assert not retry.passes(error) and Clock().ask(error) == (error, 1)


def test_those_who_ask_together_give_up_together():
    """One whose time is up ends it for all."""
    seen = []

    def agree(flag):
        seen.append(flag)
        return len(seen) == 2

    with pytest.raises(OSError, match="busy"):
        retry.call(lambda: (_ for _ in ()).throw(BUSY), agree=agree, patience=Clock().patience())
    assert seen == [False, False]


def test_a_reason_is_one_line():
    assert retry.reason(KeyError("x")) == "KeyError('x')" and retry.reason(ValueError("a\nb")) == "a"
    assert retry.reason(ValueError("a [tensorstore_spec='{}']")) == "a" and retry.reason(ValueError()) == "ValueError()"
    assert len(retry.reason(ValueError(100 * "long "))) < 310
