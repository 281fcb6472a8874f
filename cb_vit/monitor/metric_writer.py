"""Where metrics go: `metrics.jsonl` always, and TensorBoard, Weights & Biases and a picture where asked for.

`metrics.jsonl` holds one JSON object a line, `step` first and then scalars; a step may have several lines, one
for training and one for each evaluation. It is strict JSON: a value that is not finite is written as null, and
read back as NaN. Floats are written so that a float32 comes back bit for bit.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cb_vit import io, records
from cb_vit.config import ConfigError
from cb_vit.monitor import tensorboard, wandb_run
from cb_vit.monitor.curves import draw_curves
from cb_vit.monitor.wandb_run import WandbConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written next to `metrics.jsonl`.

    Attributes:
        tensorboard: whether event files are written in `workdir/tensorboard`; needs tensorboardX.
        wandb: the Weights & Biases run to log to, which needs wandb and an account; None: none.
        plot: whether `training_curves.png` and `first_batch.png` are drawn in the workdir; needs matplotlib.
    """

    tensorboard: bool = False
    wandb: WandbConfig | None = None
    plot: bool = True


class Pace:
    """Keeps side work to a share of wall time: it is due once its last cost is a small part of the time since.

    Args:
        interval: smallest number of seconds between two pieces of work.
        share: largest fraction of wall time that the work may take.
        clock: function that gives the time in seconds from any origin.
    """

    def __init__(self, interval: float, share: float, clock: Callable[[], float]):
        self._interval, self._share, self._clock = interval, share, clock
        self._next = -math.inf

    def due(self) -> bool:
        """Whether it is time to work again."""
        return self._clock() >= self._next

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` now and set the time from which it is due again."""
        begin = self._clock()
        work()
        end = self._clock()
        self._next = end + max(self._interval, (end - begin) * (1 / self._share - 1))


class MetricWriter:
    """Writes a run's scalars; a context manager.

    Args:
        workdir: the run's folder, local or in a bucket.
        cfg: the settings of what is written besides `metrics.jsonl`.
        resume_step: the step the run goes on from: a torn last line and all records of later steps are dropped.
            None starts afresh; what an earlier attempt has left is kept beside it, as `metrics.1.jsonl` and so on.
        run_config: the run's settings, shown by Weights & Biases.
        primary: whether this process writes. The others check `cfg` alike, write nothing and record nothing.
        clock: function that gives the time in seconds from any origin.

    Raises:
        ConfigError: a package that `cfg` needs is not installed, on every process; or `metrics.jsonl` is something
            else.
        Failure: `metrics.jsonl` cannot be read.
    """

    def __init__(self, workdir: str | os.PathLike, cfg: LoggingConfig, *, resume_step: int | None,
                 run_config: Mapping[str, Any], primary: bool = True, clock: Callable[[], float] = time.monotonic):
        check_installed(cfg)
        self._primary, self._draws, self._closed = primary, primary and cfg.plot, False
        self._workdir = io.as_path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._local = io.is_local(workdir)
        self._history = records.History()
        self._lines: list[bytes] = []  # of a remote file, which can only be written whole
        self._tensorboard = self._wandb = None
        # A bucket's file is written whole each time: as often as lines come, it would cost more the longer a run is.
        self._upload_pace, self._plot_pace = Pace(10, 0.05, clock), Pace(10, 0.05, clock)
        self._painter, self._drawing = ThreadPoolExecutor(1, "curves"), None  # its thread starts with the first drawing
        if not primary:
            return
        with io.writing(self._path):
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._open_file(resume_step)
        if cfg.tensorboard:
            with self._writing_tensorboard() as folder:
                self._tensorboard = tensorboard.open_writer(folder, resume_step)
        if cfg.wandb:
            self._wandb = wandb_run.open_run(self._workdir, cfg.wandb, resume_step, run_config)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record `scalars` at `step`.

        Args:
            step: number of completed steps.
            scalars: host numbers by name: Python's, NumPy's, or fetched JAX scalars.

        Raises:
            ValueError: a scalar is called "step" or is not one number, or the writer is closed.
            CannotWrite: the storage fails, or the file is not there any more.
        """
        if self._closed:
            raise ValueError("the metric writer is closed")
        if not self._primary:
            return
        scalars = {name: _number(name, value) for name, value in scalars.items()}
        self._history.add(step, scalars)
        # JSON has no NaN; Python would write one that other readers refuse.
        line = json.dumps({"step": int(step), **{n: v if math.isfinite(v) else None for n, v in scalars.items()}},
                          allow_nan=False) + "\n"
        if self._local:
            with io.writing(self._path):
                _append(self._path, line)
        else:
            self._lines.append(line.encode())
        if self._tensorboard:
            with self._writing_tensorboard():
                tensorboard.write_scalars(self._tensorboard, step, scalars)
        if self._upload_pace.due():
            self.flush()
        self._tell_wandb(lambda run: run.log(scalars, step=int(step)))

    def image(self, name: str, png: bytes, step: int) -> None:
        """Show a picture in TensorBoard and in Weights & Biases, where they are on.

        Args:
            name: what it is called there.
            png: the bytes of a PNG.
            step: number of completed steps.

        Raises:
            CannotWrite: the storage fails.
        """
        if self._tensorboard:
            with self._writing_tensorboard():
                tensorboard.write_image(self._tensorboard, step, name, png)
        self._tell_wandb(lambda run: run.log({name: wandb_run.as_image(png)}, step=int(step)))

    def recorded(self, step: int) -> set[str]:
        """Names of the scalars recorded at `step`, so that an evaluation there is not repeated.

        Only the primary process knows; where processes must agree, broadcast its answer.
        """
        return self._history.at(step)

    def best(self, name: str) -> float | None:
        """The highest value recorded of a metric; None: there is none."""
        return self._history.highest(name)

    def history(self) -> dict[str, records.Series]:
        """`(steps, values)` of each scalar, in the order of steps; the last record of a step counts."""
        return self._history.series()

    def plot(self) -> bool:
        """Bring `training_curves.png` up to date in a thread of its own, in at most 5 % of wall time.

        Returns:
            Whether a drawing has begun; one at a time, and of what is recorded now.
        """
        under_way = self._drawing and not self._drawing.done()
        if not self._draws or under_way or not self._plot_pace.due():
            return False
        self._begin_drawing()
        return True

    def flush(self) -> None:
        """Put everything written so far where a later process finds it, e.g. before a checkpoint.

        Raises:
            CannotWrite: the storage fails.
        """
        self._upload_pace.run(self._upload)

    def close(self, failed: bool = False) -> None:
        """Draw and write what is left. Harmless when repeated.

        Args:
            failed: whether the Weights & Biases run is marked as failed.

        Raises:
            CannotWrite: the storage fails.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._draws:
                self._begin_drawing()
            self._painter.shutdown()  # when all is drawn
            if self._primary:
                self.flush()
            if self._tensorboard:
                with self._writing_tensorboard():
                    self._tensorboard.close()
        finally:
            self._tell_wandb(lambda run: run.finish(exit_code=int(failed)))

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        full = kind is not None and issubclass(kind, io.CannotWrite)
        self._draws = self._draws and not full
        with contextlib.suppress(*[io.CannotWrite] * full):  # it has been told
            self.close(failed=kind is not None)

    def _open_file(self, resume_step: int | None) -> None:
        lines = records.reopen(self._path, resume_step)
        self._history = records.History.of(lines)
        if not self._local:
            self._lines = [line for line, _ in lines]
        elif not io.exists(self._path):
            self._path.touch()

    def _tell_wandb(self, call: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # of wandb's own kinds; not worth a run: metrics.jsonl has the numbers
            logger.warning("Weights & Biases fails (%s); the run goes on without it", str(error).splitlines()[0])
            self._wandb = None

    def _begin_drawing(self) -> None:
        self._drawing = self._painter.submit(self._plot_pace.run, functools.partial(self._draw, self._history.copy()))

    def _draw(self, history: records.History) -> None:
        """Draw the curves; runs in the painter's thread. After a failure no more are drawn."""
        path = self._workdir / "training_curves.png"
        try:
            if self._draws:  # not if the drawing before this one has failed
                picture = draw_curves(history.series(), title=self._workdir.name)
                with io.writing(path):
                    io.write_atomic(path, picture)
        except io.CannotWrite as error:  # a picture is not worth a run: metrics.jsonl has the numbers
            logger.warning("%s; no more curves are drawn", error)
            self._draws = False
        except Exception:
            logger.exception("training_curves.png could not be drawn; no more are")
            self._draws = False

    def _upload(self) -> None:
        if self._lines:
            with io.writing(self._path):
                io.write_atomic(self._path, b"".join(self._lines))
        if self._tensorboard:
            with self._writing_tensorboard():
                self._tensorboard.flush()

    @contextlib.contextmanager
    def _writing_tensorboard(self) -> Iterator[Any]:
        """The folder of the event files; that they cannot be written is a `CannotWrite`."""
        folder = self._workdir / "tensorboard"
        with io.writing(folder):
            yield folder


def check_installed(cfg: LoggingConfig) -> None:
    """Refuse settings whose package is missing, without importing it.

    Raises:
        ConfigError: a package is not installed; names the setting and the package.
    """
    wanted = {"tensorboard": (cfg.tensorboard, "tensorboardX", "cb_vit[tensorboard]"),
              "wandb": (cfg.wandb is not None, "wandb", "cb_vit[wandb]"),
              "plot": (cfg.plot, "matplotlib", "matplotlib")}
    for field, (asked, module, package) in wanted.items():
        if asked and importlib.util.find_spec(module) is None:
            raise ConfigError(f"config.{field}",
                              f"{module} is not installed; pip install '{package}', or leave {field} off")


def _append(path: os.PathLike, line: str) -> None:
    """Add a line to a file that is there: one held open would take it even after its folder has gone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(line)


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError("a scalar cannot be called 'step': that is the record's own")
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if type(value) is int else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"scalar {name!r} is not one number: {value!r}") from None
