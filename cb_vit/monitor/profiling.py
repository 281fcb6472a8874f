"""A `jax.profiler` trace of a few training steps, for xprof or Perfetto."""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax

from cb_vit import io
from cb_vit.config import ConfigError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The steps to trace.

    Attributes:
        start_step: number of the first traced step, from 1; step 1 compiles, so a few steps later says more.
        num_steps: number of traced steps.
    """

    start_step: int
    num_steps: int = 5

    def __post_init__(self):
        if self.start_step < 1:
            raise ConfigError("start_step", f"steps count from 1, got {self.start_step}; 10 is a good choice")
        if self.num_steps < 1:
            raise ConfigError("num_steps", f"must be 1 or more, got {self.num_steps}; for no profile unset the block")


class Profiler:
    """Traces the steps that `cfg` asks for into `workdir/profile`; a context manager.

    Args:
        cfg: the steps to trace; None: none.
        workdir: the run's folder, local or in a bucket.
        primary: whether this process traces; one of a run is enough.
    """

    def __init__(self, cfg: ProfileConfig | None, workdir: str | os.PathLike, primary: bool = True):
        self._steps = range(cfg.start_step, cfg.start_step + cfg.num_steps) if cfg and primary else range(0)
        self.folder = io.as_path(workdir) / "profile"
        self._active = False

    def step(self, step: int, pending: Any = None) -> contextlib.AbstractContextManager:
        """Call it right before step number `step` (from 1) is dispatched; run the step inside the result.

        Starts or stops the trace when this is the step for it. The context it returns marks the step in the
        trace, which is what xprof's step-time pages count; elsewhere it does nothing and costs nothing.
        A run that resumes within the asked steps traces the rest of them, one that resumes after them none.

        Args:
            step: number of the step about to run, from 1.
            pending: the arrays to wait for before starting or stopping, e.g. the train state: steps are dispatched
                ahead of the device, and without it the trace's ends would not be the steps' ends.
        """
        wanted = step in self._steps
        if wanted != self._active:
            jax.block_until_ready(pending)
            self._start() if wanted else self.close()
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if wanted else contextlib.nullcontext()

    def close(self) -> None:
        """Stop an open trace and write what it has; a run that ends early keeps its profile."""
        if not self._active:
            return
        self._active = False  # first: where writing fails, `close` must not stop the trace a second time
        with self._writing():
            jax.profiler.stop_trace()
        logger.info("profile written to %s; open it with `pip install xprof; xprof --logdir %s`, or drop its "
                    "*.trace.json.gz on https://ui.perfetto.dev", self.folder, self.folder)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _start(self) -> None:
        logger.info("profiling steps %d to %d", self._steps[0], self._steps[-1])
        with self._writing():
            jax.profiler.start_trace(os.fspath(self.folder))
        self._active = True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A failure of the storage, which JAX tells as one of its own, as an `io.CannotWrite`."""
        try:
            with io.writing(self.folder):
                yield
        except jax.errors.JaxRuntimeError as error:
            raise io.cannot_write(self.folder, error) from None
