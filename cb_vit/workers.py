"""Processes that load data: what they need, how long they live, and what they ended of."""
from __future__ import annotations

import dataclasses
import logging
import math
import mmap
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping

import numpy as np

from cb_vit.config import ConfigError
from cb_vit.datasets import DataError

SHARED = "/dev/shm"  # where Linux keeps shared memory


def check_workers(
    num_workers: int, prefetch: int, spec: Mapping[str, tuple[tuple[int, ...], np.dtype]], rows: int
) -> None:
    """Refuse more worker processes than the machine's shared memory can pass batches of.

    Args:
        num_workers: number of processes, `config.input.num_workers`.
        prefetch: number of batches that are made ahead.
        spec: shape and dtype of each array of an example.
        rows: number of rows of a batch that this process loads.

    Raises:
        ConfigError: the shared memory is too small; the message says how much is needed, and how much there is.
    """
    if not num_workers or not os.path.isdir(SHARED):
        return
    arrays = [rows, *(rows * math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in spec.values())]
    batch = sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in arrays)
    # Counted in runs: queues on both sides of a worker and what changes hands, what waits for the devices; semaphores.
    needed = ((2 * num_workers + 1) * prefetch + 2 * num_workers + 5) * batch + 2**20
    free = shutil.disk_usage(SHARED).free
    if needed > free:
        raise ConfigError("config.input.num_workers", f"{num_workers} processes pass batches through {SHARED} "
                          f"and need {needed / 2**20:,.1f} MiB there, of which {free / 2**20:,.1f} are free; make it "
                          "larger (docker run --shm-size=…), or take fewer workers or a smaller prefetch; 0 needs none")


def why_ended(status: int) -> DataError:
    """Why a worker process has ended, as far as its exit status tells."""
    reasons = {-signal.SIGBUS: f"{SHARED} is full: make it larger (docker run --shm-size=…), or lower "
                               "config.input.num_workers or prefetch",
               -signal.SIGKILL: "killed, as the system does when memory runs out; lower config.input.num_workers"}
    return DataError(f"a process that loads data has ended (exit status {status}): "
                     + reasons.get(status, "what it said stands above; config.input.num_workers=0 loads without it"))


@dataclasses.dataclass(frozen=True)
class LiveWithParent:
    """Makes a worker live just as long as its parent.

    Grain's own workers outlive a parent that was killed; and they would die of a signal that schedulers
    and terminals send to every process of a job, while the parent still needs batches up to a good step to stop.
    """

    parent: int

    def __call__(self, worker: int, workers: int) -> None:
        logging.basicConfig(level=logging.WARNING)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(0.5)
        os._exit(1)


def allow_unparsed_flags() -> None:
    """Grain hands its absl flags to its workers, which unparsed ones would end; nothing here parses them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
