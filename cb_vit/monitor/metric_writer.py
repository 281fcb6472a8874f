"""Where metrics go: `metrics.jsonl` always, and TensorBoard, Weights & Biases and a picture where asked for.

`metrics.jsonl` holds one JSON object a line, `step` first and then scalars; a step may have several lines, one
for training and one for each evaluation. It is strict JSON: a value that is not finite is written as null, and
read back as NaN. Floats are written so that a float32 comes back bit for bit.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from cb_vit import io, records
from cb_vit.config import ConfigError
from cb_vit.monitor.curves import Series, draw_curves

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases files the run: the arguments of `wandb.init` of the same names.

    Attributes:
        project: name of the project.
        name: name of the run; None: Weights & Biases makes one up.
        entity: user or team that the run belongs to; None: the account's own.
        group: name of a group of runs; None: no group.
        tags: words to find the run by.
        mode: "online", "offline" (to be sent later with `wandb sync`), or "disabled".
    """

    project: str
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] = "online"


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written next to `metrics.jsonl`.

    Attributes:
        tensorboard: whether event files are written in `workdir/tensorboard`; needs tensorboardX.
        wandb: the Weights & Biases run to log to, which needs wandb and an account; None: none.
        plot: whether `workdir/training_curves.png` is drawn; needs matplotlib.
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
        self._series: dict[str, dict[int, float]] = {}
        self._lines: list[bytes] = []  # of a remote file, which can only be written whole
        self._tensorboard = self._wandb = None
        # A bucket's file is written whole each time: as often as lines come, it would cost more the longer a run is.
        self._upload_pace, self._plot_pace = Pace(10, 0.05, clock), Pace(10, 0.05, clock)
        if not primary:
            return
        with io.writing(self._path):
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._open_file(resume_step)
        if cfg.tensorboard:
            with io.writing(self._workdir / "tensorboard"):
                self._tensorboard = _open_tensorboard(self._workdir / "tensorboard", resume_step)
        if cfg.wandb:
            self._wandb = _open_wandb(self._workdir, cfg.wandb, resume_step, run_config)

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
        self._remember(step, scalars)
        # JSON has no NaN; Python would write one that other readers refuse.
        line = json.dumps({"step": int(step), **{n: v if math.isfinite(v) else None for n, v in scalars.items()}},
                          allow_nan=False) + "\n"
        if self._local:
            with io.writing(self._path):
                _append(self._path, line)
        else:
            self._lines.append(line.encode())
        if self._tensorboard:
            with io.writing(self._workdir / "tensorboard"):
                _write_tensorboard(self._tensorboard, step, scalars)
        if self._upload_pace.due():
            self.flush()
        self._tell_wandb(lambda run: run.log(scalars, step=int(step)))

    def recorded(self, step: int) -> set[str]:
        """Names of the scalars recorded at `step`, so that an evaluation there is not repeated.

        Only the primary process knows; where processes must agree, broadcast its answer.
        """
        return {name for name, values in self._series.items() if step in values}

    def history(self) -> dict[str, Series]:
        """`(steps, values)` of each scalar, in the order of steps; the last record of a step counts."""
        return {name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)], float))
                for name, values in self._series.items()}

    def plot(self, force: bool = False) -> bool:
        """Bring `training_curves.png` up to date, in at most 5 % of wall time.

        Args:
            force: whether to draw at once, whatever the time.

        Returns:
            Whether it was drawn.
        """
        if not self._draws or not (force or self._plot_pace.due()):
            return False
        try:
            self._plot_pace.run(self._draw)
        except io.CannotWrite as error:  # a picture is not worth a run: metrics.jsonl has the numbers
            logger.warning("%s; no more curves are drawn", error)
            self._draws = False
        except Exception:
            logger.exception("training_curves.png could not be drawn; no more are")
            self._draws = False
        return self._draws

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
            if self._primary:
                self.plot(force=True)
                self.flush()
            if self._tensorboard:
                with io.writing(self._workdir / "tensorboard"):
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
        for _, record in lines:
            if record:
                self._remember(record["step"], {name: v for name, v in record.items() if name != "step"})
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

    def _draw(self) -> None:
        picture, path = draw_curves(self.history(), title=self._workdir.name), self._workdir / "training_curves.png"
        with io.writing(path):
            io.write_atomic(path, picture)

    def _upload(self) -> None:
        if self._lines:
            with io.writing(self._path):
                io.write_atomic(self._path, b"".join(self._lines))
        if self._tensorboard:
            with io.writing(self._workdir / "tensorboard"):
                self._tensorboard.flush()

    def _remember(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._series.setdefault(name, {})[int(step)] = value


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


def check_login(cfg: LoggingConfig) -> None:
    """Refuse to file a run with Weights & Biases where nobody has logged in; at a terminal it asks.

    Raises:
        ConfigError: at "config.wandb": no API key is known, or Weights & Biases refuses it.
    """
    if cfg.wandb is None or cfg.wandb.mode != "online":
        return
    import wandb
    try:
        known = wandb.login(verify=False)
    except Exception as error:  # of wandb's own kinds
        raise _no_wandb(error) from None
    if not known:
        raise _no_wandb("no API key is known")


def _no_wandb(reason: Any) -> ConfigError:
    return ConfigError("config.wandb", f"{str(reason).splitlines()[0]}; run `wandb login`, or set "
                                        "config.wandb.mode='offline' and `wandb sync` later")


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError("a scalar cannot be called 'step': that is the record's own")
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if type(value) is int else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"scalar {name!r} is not one number: {value!r}") from None


def _open_tensorboard(folder: os.PathLike, resume_step: int | None) -> Any:
    # Not FileWriter: its thread dies of a full disk unheard, and then nobody empties the queue that it reads.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    first = 0 if resume_step is None else resume_step + 1
    try:  # the suffix because names differ by the second only, and a restart within it would overwrite
        folder.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(os.fspath(folder / "events"), filename_suffix=f".{first:09d}")
    except ImportError as error:  # its own client for buckets is missing
        raise ConfigError("config.tensorboard", f"cannot write to {folder}: {error}") from None
    # TensorBoard hides what earlier event files hold from this step on.
    now = time.time()
    writer.write_event(Event(wall_time=now, step=first, file_version="brain.Event:2"))
    writer.write_event(Event(wall_time=now, step=first, session_log=SessionLog(status=SessionLog.START)))
    return writer


def _write_tensorboard(writer: Any, step: int, scalars: Mapping[str, float]) -> None:
    # Not SummaryWriter.add_scalar, which would file "val/prec@1" as "val/prec_1".
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    summary = Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in scalars.items()])
    writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))


def _open_wandb(workdir: Any, cfg: WandbConfig, resume_step: int | None, run_config: Mapping[str, Any]) -> Any:
    import wandb
    # Kept, so that a resumed run goes on with the same curves rather than beginning others.
    id_file = workdir / "wandb_run.txt"
    known = None if resume_step is None else io.read(id_file)
    if known is None:
        known = uuid.uuid4().hex[:8].encode() + b"\n"
        with io.writing(id_file):
            io.write_atomic(id_file, known)
    if not re.fullmatch(rb"[\w-]+\s*", known):
        raise ConfigError("workdir", f"{id_file} holds no name of a Weights & Biases run ({known!r:.40}); move it away")
    try:
        return wandb.init(**dataclasses.asdict(cfg), id=known.decode().strip(), resume="allow",
                          config=dict(run_config), dir=os.fspath(workdir) if io.is_local(workdir) else None)
    except Exception as error:  # of wandb's own kinds: no network, no such entity, …
        raise _no_wandb(error) from None
