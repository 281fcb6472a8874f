"""The runs of a sweep as processes: so many at once, shared with other machines by locks, and ended as they should be.

A cell is claimed by a lock in the sweep's folder, which the process of its run inherits: whichever of the two lives on
keeps it, so that a cell is never started twice, and is free again as soon as both have gone.
"""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from tqdm.contrib.logging import logging_redirect_tqdm

from cb_vit import io
from cb_vit.analysis.sweeps import LOG
from cb_vit.monitor.progress import Bar, fitting
from cb_vit.monitor.timing import time_text
from cb_vit.tools import cli
from cb_vit.tools.cells import Job, beginning, claim, is_complete, share

logger = logging.getLogger(__name__)
POLL, LOOK = 0.2, 5.0  # seconds between looks at whether runs have ended, and at how far they are
# By which a run would take itself for a part of one that several processes do together.
TOGETHER = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@dataclasses.dataclass
class Outcome:
    """What became of the cells.

    Attributes:
        complete: those whose runs have come to their last step, now or before.
        failed: those whose runs have ended in an error.
        stopped: those whose runs were told to end before their last step.
        elsewhere: those that another process is running.
        left: those that were not begun, as the sweep was told to stop.
    """

    complete: list[Job] = dataclasses.field(default_factory=list)
    failed: list[Job] = dataclasses.field(default_factory=list)
    stopped: list[Job] = dataclasses.field(default_factory=list)
    elsewhere: list[Job] = dataclasses.field(default_factory=list)
    left: list[Job] = dataclasses.field(default_factory=list)


def run_all(jobs: Sequence[Job], workdir: str | os.PathLike, parallel: int, terminal: Any) -> Outcome:
    """Run every cell that is not complete and that nobody else runs.

    Args:
        jobs: the cells.
        workdir: the sweep's folder.
        parallel: number of runs at once.
        terminal: stream on which a line says how far the sweep is; where it is no terminal, there is none.

    Raises:
        KeyboardInterrupt: Ctrl-C has come twice; all runs have ended.
        CannotWrite: the log of a cell cannot be written; all runs have been told to end, and have ended.
    """
    with _signals() as told, contextlib.ExitStack() as stack:
        scheduler = Scheduler(jobs, workdir, parallel, told)
        stack.callback(scheduler.end)
        bar = stack.enter_context(Bar(scheduler.line, total=len(jobs), initial=0, stream=terminal))
        if not bar.disable:
            stack.enter_context(logging_redirect_tqdm(tqdm_class=Bar))
        while scheduler.work():
            bar.update(len(scheduler.outcome.complete) - bar.n)
            bar.refresh()
            time.sleep(POLL)
    if told.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
    return scheduler.outcome


class Running(NamedTuple):
    """A run that is under way.

    Attributes:
        process: its process.
        claim: the lock of its cell.
    """

    process: subprocess.Popen
    claim: contextlib.ExitStack


class Scheduler:
    """Which cells run, wait and are done; `outcome` and `running` say so.

    Args:
        jobs: the cells.
        workdir: the sweep's folder.
        parallel: number of runs at once.
        told: signals that have come, in their order; the first stops the sweep, and each goes on to the runs.
    """

    def __init__(self, jobs: Sequence[Job], workdir: str | os.PathLike, parallel: int, told: list[int]):
        self.outcome = Outcome()
        self._workdir, self._parallel, self._told = workdir, parallel, told
        self.running: dict[Job, Running] = {}
        self._passed_on, self._next_look, self._next_share = 0, 0.0, 0.0
        self._waiting, self._others = list(jobs), set()
        for job in jobs:
            if is_complete(job):
                self._waiting.remove(job)
                self.outcome.complete.append(job)
        if skipped := len(self.outcome.complete):
            logger.info("%d of %d cells are complete already", skipped, len(jobs))
        self._all, self._shares = list(jobs), {job: share(job) for job in jobs}
        self._began, self._at_first = time.monotonic(), sum(self._shares.values())

    def work(self) -> bool:
        """See what has ended, pass signals on, start what there is room for; whether there is more to do."""
        self._reap()
        self._pass_signals_on()
        if self._told:
            self.outcome.left, self._waiting = [*self.outcome.left, *self._waiting], []
        elif self._waiting and len(self.running) < self._parallel and time.monotonic() >= self._next_look:
            self._fill()
        if not self.running:
            self.outcome.elsewhere, self._waiting = self._waiting, []
        return bool(self.running)

    def end(self) -> None:
        """Tell the runs that are left to save and end, and wait for them."""
        for one in self.running.values():
            one.process.terminate()
        while self.running:
            self._reap()
            time.sleep(POLL)

    def line(self, room: int) -> str:
        """How far the sweep is, in so many columns."""
        if time.monotonic() >= self._next_share:
            self._shares |= {job: share(job) for job in self.running}
            self._next_share = time.monotonic() + LOOK
        done, spent = sum(self._shares.values()), time.monotonic() - self._began
        parts = [f"{len(self.outcome.complete)}/{len(self._all)} cells", f"{len(self.running)} running"]
        if failed := len(self.outcome.failed):
            parts.append(f"{failed} failed")
        if self._told:
            parts.append("stopping")
        elif done > self._at_first:
            parts.append(f"ETA {time_text(spent * (len(self._all) - done) / (done - self._at_first))}")
        return fitting([*parts, *(job.name for job in self.running)], room)

    def _fill(self) -> None:
        """Start what there is room for. What others run is looked at again later: they may have given it up."""
        for job in list(self._waiting):
            if len(self.running) == self._parallel:
                return
            if (claimed := claim(self._workdir, job)) is None:
                if job not in self._others:
                    logger.info("%s  run by others", job.name)
                self._others.add(job)
                continue
            stack, file = claimed
            self._waiting.remove(job)
            with stack:
                if is_complete(job):  # by another process, by now
                    self._complete(job)
                    continue
                how = beginning(job)
                process = _start(job, file)
                self.running[job] = Running(process, stack.pop_all())
                logger.info("%s  %s", job.name, how)
        self._next_look = time.monotonic() + LOOK

    def _reap(self) -> None:
        for job, one in list(self.running.items()):
            if (status := one.process.poll()) is None:
                continue
            del self.running[job]
            one.claim.close()
            self._next_look = 0.0
            if is_complete(job):
                self._complete(job)
            elif status == 0 or (self._told and (status < 0 or status > 128)):  # told to stop: well, or by the signal
                logger.info("%s  stopped; the same command goes on with it", job.name)
                self.outcome.stopped.append(job)
            else:
                how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
                logger.info("%s  FAILED (%s): %s", job.name, how, job.last_words())
                self.outcome.failed.append(job)

    def _complete(self, job: Job) -> None:
        self.outcome.complete.append(job)
        self._shares[job] = 1.0
        logger.info("%s  complete", job.name)

    def _pass_signals_on(self) -> None:
        for number in self._told[self._passed_on:]:
            self._passed_on += 1
            again = "; Ctrl-C again ends them at once, without saving" * (number == signal.SIGINT)
            if self._passed_on == 1:
                logger.info("told to stop: the runs save and end%s", again)
            for one in self.running.values():
                one.process.send_signal(number)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that tell a sweep to stop, as they come. SIGHUP counts as SIGTERM, unless it is ignored."""
    told: list[int] = []
    handlers = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = signal.SIGTERM
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    previous = {number: signal.signal(number, lambda *_, meant=meant: told.append(meant))
                for number, meant in handlers.items()}
    try:
        yield told
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _start(job: Job, lock: IO[str] | None) -> subprocess.Popen:
    """The process of a cell's run, in a session of its own: a terminal's Ctrl-C comes to it through the sweep alone."""
    command = [sys.executable, "-m", "cb_vit.tools", "train", *job.words]
    now = datetime.datetime.now().isoformat(" ", "seconds")
    with io.writing(job.folder / LOG):
        job.folder.mkdir(parents=True, exist_ok=True)
        log = open(job.folder / LOG, "ab")
    with log:
        with io.writing(job.folder / LOG):
            log.write(f"--- {now}  {shlex.join([*cli.called('train', 'train'), *job.words])}\n".encode())
            log.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            pass_fds=[lock.fileno()] if lock else [],
            env={name: value for name, value in os.environ.items() if name not in TOGETHER})
