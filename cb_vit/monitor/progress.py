"""One line at the foot of a terminal that says how far a run is; what is logged goes above it.

Where there is no terminal, as in a pipe or a log file, there is no line, and nothing of what is logged changes.
"""
from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cb_vit.monitor.metric_writer import MetricWriter
from cb_vit.monitor.timing import Chrono, memory_stats, speed_text, time_text, wait_text
from cb_vit.texts import printable

INTERVAL = 0.5  # seconds between two drawings of the line
BAR, BAR_WIDTH = "{percentage:3.0f}%|{bar:8}| ", 15  # what stands before the words


class LiveLine:
    """The line of a run; a context manager, and there from the beginning of it to its end.

    `53%|████▎   | 1200/2250 | epoch 42.7 of 80.1 | 5821 img/s | ETA 0:17:30 | best val/prec@1 0.9361 | …`

    What is not known yet is left out, and so is all that a narrow terminal has no room for.

    Args:
        chrono: clock of the run.
        writer: writer of its metrics, for the best value of `metric`.
        step: number of steps that are complete.
        metric: name of the metric whose best value is shown; None: none.
        device: a JAX device of this process, for its memory.
        stream: where the log is written too; None, or what is no terminal: there is no line.
    """

    def __init__(self, chrono: Chrono, writer: MetricWriter, *, step: int, metric: str | None, device: Any,
                 stream: Any):
        self._chrono, self._writer, self._metric, self._device = chrono, writer, metric, device
        self._step, self._activity = step, ""
        self._stack = contextlib.ExitStack()
        self._settings = dict(total=chrono.total_steps, initial=step, stream=stream)

    def __enter__(self) -> LiveLine:
        self._bar = self._stack.enter_context(Bar(self._words, **self._settings))
        if not self._bar.disable:
            self._stack.enter_context(logging_redirect_tqdm(tqdm_class=Bar))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def update(self, step: int) -> None:
        """Say that `step` steps are complete; the line is drawn anew now and then."""
        done, self._step = step - self._step, step
        self._bar.update(done)

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Inside, the line says what the run does in place of training."""
        self._activity = activity
        self._bar.refresh()
        try:
            yield
        finally:
            self._activity = ""

    def _words(self, room: int) -> str:
        return fitting(self._parts(), room)

    def _parts(self) -> list[str]:
        """What the line says, the most important first."""
        chrono, step = self._chrono, self._step
        now = chrono.measure(step) | memory_stats(self._device)
        epoch, left = chrono.epoch(step), chrono.eta(step)
        best = self._writer.best(self._metric) if self._metric else None
        parts = [self._activity, f"{step}/{chrono.total_steps}"]
        if epoch is not None:
            parts.append(f"epoch {epoch:.1f} of {chrono.epoch(chrono.total_steps):.1f}")
        if "img/sec" in now:
            parts.append(speed_text(now["img/sec"]))
        if left is not None:
            parts.append(f"ETA {time_text(left)}")
        if best is not None:
            parts.append(f"best {self._metric} {best:.4f}")
        if "data_wait" in now:
            parts.append(wait_text(now["data_wait"]))
            if epoch is not None:
                parts.append(f"{time_text(chrono.examples_per_epoch / now['img/sec'])} an epoch")
        parts.append(f"device {now['hbm_gib']:.1f} GiB" if "hbm_gib" in now else f"host {now['host_peak_gib']:.1f} GiB")
        return parts


def fitting(parts: Iterable[str], room: int) -> str:
    """As many of the parts as there is room for in so many columns; half a number would be another number."""
    words, *parts = filter(None, map(printable, parts))
    for part in parts:
        words += f" | {part}" if len(words) + 3 + len(part) <= room else ""
    return words


@contextlib.contextmanager
def counted(total: int, stream: Any) -> Iterator[Callable[[str], None]]:
    """A line that counts the parts of something long, and is gone at its end.

    Args:
        total: number of parts.
        stream: the terminal; None, or what is no terminal: there is no line.

    Yields:
        A function to be called as each part is done, with words for what is under way.
    """
    begun, doing, done = time.monotonic(), "", 0

    def words(room: int) -> str:
        left = (time.monotonic() - begun) / done * (total - done) if done else None
        return fitting([f"{done}/{total}", doing, "" if left is None else f"ETA {time_text(left)}"], room)

    def tell(text: str) -> None:
        nonlocal doing, done
        doing, done = text, done + 1
        bar.update()

    with Bar(words, total=total, initial=0, stream=stream) as bar:
        yield tell


class Bar(tqdm):
    """tqdm's bar with words of ours, which are found only when it is drawn: a function of the columns that there are.
    """

    monitor_interval = 0  # seconds: no thread looks after it

    def __init__(self, words: Callable[[int], str], *, total: int, initial: int, stream: Any):
        self._words = words
        # Some terminals know nothing of their size, where tqdm finds no row to write in: `nrows` is any that has one.
        super().__init__(total=total, initial=initial, file=stream, mininterval=INTERVAL, miniters=1, leave=False,
                         bar_format=BAR + "{words}", nrows=24, disable=stream is None or not stream.isatty())

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the line is made of."""
        # Not tqdm's width, which is negative there.
        width = shutil.get_terminal_size().columns - 1
        return super().format_dict | {"words": self._words(width - BAR_WIDTH), "ncols": width}


Bar.set_lock(threading.RLock())  # not tqdm's own, with which a process for semaphores would begin
