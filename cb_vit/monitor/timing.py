"""Clocks and speeds: images a second, time to go, core hours, model FLOPs utilisation, memory.

Metric names are big_vision's (`img/sec`, `img/sec/core`, `core_hours`, `examples_seen`, `epoch`, `uptime`,
`z/secs/…`); a "core" is one JAX device. Nothing here waits for a device.
"""
from __future__ import annotations

import collections
import contextlib
import datetime
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

GIB = 2**30
MINUTE = 60.0  # seconds of training that a rate is the mean of, where there are so many
LONG_WAIT = 0.1  # share of the time; below it, waiting for data is not worth a word in the log

# Peak dense bf16 TFLOP/s of one JAX device, by its whole `device_kind`; the first match wins. A partition of
# a chip (NVIDIA MIG adds "MIG 1g.10gb" to the name) matches nothing on purpose: its peak is not the chip's.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    # Google Cloud TPU system architecture pages, docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}.
    # Those give a chip; on v2, v3 and TPU7x one JAX device is one of the chip's two cores, so half of it.
    (r"TPU v2", 45 / 2),
    (r"TPU v3", 123 / 2),
    (r"TPU v4", 275),
    (r"TPU v5( lite|e)", 197),
    (r"TPU v5p?", 459),
    (r"TPU v6( lite|e)", 918),
    (r"TPU7x", 2307 / 2),
    # NVIDIA data sheets of each product, without sparsity (they print twice these numbers, "with sparsity",
    # from A100 on). V100 and T4 have no bf16: their fp16 tensor-core peak stands in for it.
    (r"NVIDIA B200", 2250),
    (r"NVIDIA H100 PCIe", 756),
    (r"NVIDIA H[12]00 NVL", 835.5),
    (r"NVIDIA (H100 80GB HBM3|H200|GH200 \w+)", 989.4),
    (r"NVIDIA A100-(SXM4|PCIE)-\w+|NVIDIA A100 80GB PCIe", 312),
    (r"NVIDIA L40S", 362),
    (r"NVIDIA L4", 121),
    (r"NVIDIA A10", 125),
    (r"(Tesla|NVIDIA) V100-SXM\d-\w+", 125),
    (r"(Tesla|NVIDIA) V100-PCIE-\w+", 112),
    (r"(Tesla|NVIDIA) T4", 65),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one JAX device of this kind; None where it is not known (as for a CPU)."""
    return next((peak * 1e12 for kind, peak in PEAK_TFLOPS if re.fullmatch(kind, device_kind)), None)


def mfu(flops_per_step: float, seconds_per_step: float, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation, a fraction of the devices' peak (PaLM, arXiv 2204.02311, appendix B).

    Args:
        flops_per_step: FLOPs of one step of the whole run, a multiplication and an addition counted as two.
        seconds_per_step: time of one step in seconds.
        devices: all JAX devices of the run, of every process.

    Returns:
        The fraction; None where no time has passed, or the peak of some device is not known.
    """
    peaks = [peak_flops(device.device_kind) for device in devices]
    if not peaks or None in peaks or not seconds_per_step > 0:
        return None
    return flops_per_step / seconds_per_step / sum(peaks)


def speed_text(images_per_second: float) -> str:
    """Images a second to read: "5821 img/s", "12.3 img/s"."""
    return f"{images_per_second:.0f} img/s" if images_per_second >= 100 else f"{images_per_second:.3g} img/s"


def time_text(seconds: float) -> str:
    """A time to read: "0:01:12"."""
    return str(datetime.timedelta(seconds=round(seconds)))


def wait_text(share: float) -> str:
    """The share of the time that went into waiting for data, to read: "waiting for data 12 %"."""
    return f"waiting for data {100 * share:.0f} %"


def memory_stats(device: Any) -> dict[str, float]:
    """Memory in GiB: `hbm_gib`, `hbm_peak_gib`, `hbm_limit_gib` of a JAX device where it tells, `host_peak_gib`.

    Args:
        device: a JAX device of this process.
    """
    wanted = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use", "hbm_limit_gib": "bytes_limit"}
    told = device.memory_stats() or {}  # CPU devices tell nothing
    stats = {name: told[key] / GIB for name, key in wanted.items() if key in told}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    stats["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return stats


class Chrono:
    """Times a training run; its clock is an argument.

    `start` it at the step the run begins from, `tick` after every step, `measure` when metrics are logged.
    Training time runs from `start` on and stands still inside `paused`; what of it passes inside `waiting` went into
    waiting for data. Rates are means over its last minute, without the first step, which compiles. Steps are
    dispatched ahead of the device, so times hold where each step's tick waits for a value of the one before.

    Args:
        total_steps: number of steps of the whole run.
        batch_size: number of examples in a global batch.
        examples_per_epoch: number of examples in one epoch; None: the source has no length.
        devices: all JAX devices of the run, of every process.
        flops_per_step: FLOPs of one step of the whole run, for `mfu`; may be set later, once they are known.
        clock: function that gives the time in seconds from any origin; not the time of day, which may be set back.
    """

    def __init__(self, total_steps: int, batch_size: int, *, examples_per_epoch: int | None = None,
                 devices: Sequence[Any] = (), flops_per_step: float | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self.total_steps, self.batch_size, self.examples_per_epoch = total_steps, batch_size, examples_per_epoch
        self.devices, self.flops_per_step = tuple(devices), flops_per_step
        self._clock = clock
        self._born = self._started = clock()
        self._paused = self._waited = 0.0  # seconds since start
        self._pauses: list[float] = []  # when each open pause began, outermost first
        self._seconds: dict[str, float] = {}
        self._carried_core_hours = 0.0
        self._first_step = 0
        self._timed: tuple[int, float] | None = None  # step, clock after the first step
        # Of the ticks of the last minute: step, training time, and how much of that was waiting.
        self._minute: collections.deque[tuple[int, float, float]] = collections.deque()

    def start(self, step: int = 0) -> None:
        """Begin (or go on) training; what came before is not training time.

        Args:
            step: number of steps that are complete.
        """
        self._first_step, self._started, self._paused, self._waited = step, self._clock(), 0.0, 0.0
        self._timed = None
        self._minute.clear()

    def tick(self, step: int) -> None:
        """Say that `step` steps are complete. Rates begin with the first one after `start`."""
        # A step is counted once: `measure` ticks as well.
        if step <= (self._minute[-1][0] if self._minute else self._first_step):
            return
        now = self._training_time()
        self._timed = self._timed or (step, self._clock())
        self._minute.append((step, now, self._waited))
        # The two newest stay, so that there is a rate also where one step takes longer than a minute.
        while len(self._minute) > 2 and self._minute[1][1] <= now - MINUTE:
            self._minute.popleft()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the run waits for its next batch; the devices may still be at work on the step before."""
        begin = self._training_time()
        yield
        self._waited += self._training_time() - begin

    @contextlib.contextmanager
    def paused(self, activity: str) -> Iterator[None]:
        """Inside, training time stands still. Pauses may be nested.

        Args:
            activity: what the seconds count for, as `z/secs/<activity>`.
        """
        begin = self._clock()
        self._pauses.append(begin)
        try:
            yield
        finally:
            self._pauses.pop()
            seconds = self._clock() - begin
            self._seconds[activity] = self._seconds.get(activity, 0.0) + seconds
            if not self._pauses:  # the outermost pause holds the time of those within
                self._paused += seconds

    def measure(self, step: int) -> dict[str, float]:
        """Metrics at `step` complete steps.

        Returns:
            `uptime` [s, since this object was made], `examples_seen`, `epoch`, `core_hours` [device hours of
            training, pauses left out, compilation not, earlier runs included], `z/secs/<activity>` [s, earlier
            runs included], and from the second step on, as means over the last minute of training, `img/sec`,
            `img/sec/core`, `data_wait` [fraction of the time that was waiting for data] and `mfu` [fraction]. `epoch`
            and `mfu` are left out where they are not known.
        """
        self.tick(step)
        metrics = {"uptime": self._clock() - self._born, "examples_seen": step * self.batch_size}
        if self.examples_per_epoch:
            metrics["epoch"] = self.epoch(step)
        metrics["core_hours"] = self.core_hours()
        metrics |= {f"z/secs/{activity}": seconds for activity, seconds in self._seconds.items()}
        steps, seconds, waited = self._last_minute()
        if seconds > 0:
            metrics["img/sec"] = steps * self.batch_size / seconds
            metrics["img/sec/core"] = metrics["img/sec"] / self._device_count()
            metrics["data_wait"] = waited / seconds
            utilisation = mfu(self.flops_per_step, seconds / steps, self.devices) if self.flops_per_step else None
            metrics |= {} if utilisation is None else {"mfu": utilisation}
        return metrics

    def epoch(self, step: int) -> float | None:
        """Epochs in `step` steps; None where the source has no length."""
        return step * self.batch_size / self.examples_per_epoch if self.examples_per_epoch else None

    def core_hours(self) -> float:
        """Device hours of training so far, those of earlier runs included."""
        return self._carried_core_hours + self._training_time() * self._device_count() / 3600

    def eta(self, step: int) -> float | None:
        """Seconds to the last step at the mean pace since the first step, pauses included; None before that."""
        if self._timed is None or step <= self._timed[0]:
            return None
        pace = (self._clock() - self._timed[1]) / (step - self._timed[0])
        return pace * max(self.total_steps - step, 0)

    def progress_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """One line for the console; what `metrics` lacks is left out, and so is a short wait for data.

        `step 1200/2250 (53.3%) epoch 42.1 | loss 0.132 | lr 8.2e-04 | 5821 img/s | MFU 31.2 % | ETA 0:01:12`

        Args:
            step: number of completed steps.
            metrics: the metrics of this step, by name.
        """
        line = f"step {step}/{self.total_steps} ({step / max(self.total_steps, 1):.1%})"
        if self.examples_per_epoch:
            line += f" epoch {self.epoch(step):.1f}"
        shown = {"training_loss": lambda v: f"loss {v:#.3g}", "lr": lambda v: f"lr {v:.1e}",
                 "img/sec": speed_text,
                 "mfu": lambda v: f"MFU {100 * v:.1f} %"}
        parts = [line, *(show(metrics[name]) for name, show in shown.items() if name in metrics)]
        if metrics.get("data_wait", 0) >= LONG_WAIT:
            parts.append(wait_text(metrics["data_wait"]))
        seconds = self.eta(step)
        if seconds is not None:
            parts.append(f"ETA {time_text(seconds)}")
        return " | ".join(parts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON values: `core_hours` and `seconds` by activity."""
        return {"core_hours": self.core_hours(), "seconds": dict(self._seconds)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the sums of an earlier run, from its `state()`; call it before `start`."""
        self._carried_core_hours = float(state["core_hours"])
        self._seconds = {activity: float(seconds) for activity, seconds in state["seconds"].items()}

    def _last_minute(self) -> tuple[int, float, float]:
        """Its steps, its seconds of training, and how many of those were waiting; nothing before two steps."""
        if not self._minute:
            return 0, 0.0, 0.0
        begin, end = self._minute[0], self._minute[-1]
        return tuple(last - first for first, last in zip(begin, end, strict=True))

    def _device_count(self) -> int:
        return max(len(self.devices), 1)

    def _training_time(self) -> float:
        now = self._pauses[0] if self._pauses else self._clock()
        return now - self._started - self._paused
