"""Training: one loop, from a config to a trained model.

At completed step k, in this order: evaluate if due; save if due; stop at the end; next batch; dispatch
the next step; then fetch and log the metrics of step k, so that the device never waits for the host.
"""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from cb_vit import dist, experiment, io, startup
from cb_vit import optax as cb_optax
from cb_vit import workdir as workdir_lib
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import Failure
from cb_vit.datasets import DataError
from cb_vit.evaluators.common import EMA, measure
from cb_vit.experiment import Experiment
from cb_vit.first_batch import FirstBatch
from cb_vit.input_pipeline import to_device
from cb_vit.monitor.metric_writer import MetricWriter
from cb_vit.monitor.profiling import Profiler
from cb_vit.monitor.progress import LiveLine
from cb_vit.monitor.timing import Chrono, memory_stats, peak_flops, speed_text
from cb_vit.monitor.wandb_run import check_login
from cb_vit.settings import check
from cb_vit.skip_errors import Judge
from cb_vit.stream import check_hosts, stream_of
from cb_vit.train_state import TrainState

logger = logging.getLogger(__name__)


class NonFinite(Failure):
    """Loss, gradients or parameters stopped being finite numbers."""


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any], workdir: str | os.PathLike, terminal: Any = None
) -> dict[str, float]:
    """Train as `config` says, from scratch or from where `workdir` stands.

    Args:
        config: the settings of the run, see `settings.Settings`.
        workdir: the run's folder, local or in a bucket.
        terminal: stream on which the log is shown, for a line below it that says how far the run is; None, or what is
            no terminal: there is no such line.

    Returns:
        `step`, the number of complete steps, and the last value of every metric recorded (on the first process;
        elsewhere only `step`).

    Raises:
        ConfigError: the config cannot work, by itself or with what the workdir holds; nothing of that is changed.
        DataError: an example cannot be read, or with `skip_errors` more of them than that allows.
        CannotWrite: the storage of the run has failed; names the last good step.
        NonFinite: training has diverged.
    """
    dist.check_jax()
    settings = check(config)
    dist.together(lambda: workdir_lib.check_writable(workdir))
    dist.together(lambda: workdir_lib.check_contents(workdir))
    primary = jax.process_index() == 0
    dist.together(lambda: check_login(settings.wandb) if primary else None)
    run = startup.build(settings, workdir)
    evals = run.open_evaluators()
    check_hosts(run, evals)
    with contextlib.ExitStack() as stack:
        dist.together(lambda: stack.enter_context(workdir_lib.lock(workdir, primary)))
        stack.enter_context(run.active_mesh())
        checkpointer = startup.open_checkpoints(run, workdir)
        stack.enter_context(name_last_good(checkpointer))
        stack.enter_context(contextlib.closing(checkpointer))
        logger.info("%s", run)
        state, meta = startup.restore_or_create(run, workdir, checkpointer)
        writer = stack.enter_context(dist.together(lambda: MetricWriter(
            workdir, settings, resume_step=checkpointer.latest_step(), run_config=settings.raw,
            primary=primary)))
        notes = run.notes(evals, meta.get("model_init"))
        dist.together(lambda: workdir_lib.write_notes(workdir, settings.raw, notes) if primary else None)
        chrono = Chrono(run.total_steps, run.settings.input.batch_size, devices=run.mesh.devices.ravel().tolist(),
                        examples_per_epoch=run.pipeline.examples_per_epoch)
        if "chrono" in meta:
            chrono.restore(meta["chrono"])
        profiler = stack.enter_context(Profiler(run.settings.profile, workdir, primary))
        stop = stack.enter_context(stop_signal(checkpointer))
        judge = Judge(run.pipeline, "config.input.skip_errors", run.settings.seed, **meta.get("errors", {}))
        accuracy = next((f"{evaluator.config.prefix}prec@1" for evaluator in evals.values()
                         if evaluator.config.type == "classification"), None)
        live = stack.enter_context(LiveLine(
            chrono, writer, step=int(state.step), metric=accuracy, device=jax.local_devices()[0],
            stream=terminal if primary else None))
        loop = Loop(run, workdir, evals, checkpointer, writer, chrono, profiler, live, stop, judge,
                    meta.get("examples_skipped", 0), meta.get("model_init"))
        state = loop.run(state)
        return {"step": int(state.step), **{name: float(values[-1]) for name, (_, values) in writer.history().items()}}


@dataclasses.dataclass
class Loop:
    """The loop and what it talks to.

    Attributes:
        experiment: the parts of the run: model, data, optimiser, mesh.
        workdir: the run's folder, for pictures and tables.
        evals: evaluators by name.
        checkpointer: checkpoints of the run's own workdir.
        writer: writer of the metrics.
        chrono: clock of the run.
        profiler: profiler that traces some of the steps.
        live: line on the terminal that says how far the run is.
        stop: function asked at every step, in order: whether to save and end there.
        judge: judge of whether too many examples of the present epoch are unreadable.
        examples_skipped: number of unreadable examples met since the run began.
        model_init: note on where the first parameters came from, as `model_init.fit` gives it; None: they were drawn.
    """

    experiment: Experiment
    workdir: str | os.PathLike
    evals: dict[str, Any]
    checkpointer: Checkpointer
    writer: MetricWriter
    chrono: Chrono
    profiler: Profiler
    live: LiveLine
    stop: Callable[[int], bool]
    judge: Judge
    examples_skipped: int = 0
    model_init: Mapping[str, Any] | None = None

    def __post_init__(self):
        run = self.experiment
        self.log_steps = run.steps(run.settings.log_training, "log_training")
        self.ckpt_steps = run.steps(run.settings.ckpt, "ckpt")
        self.eval_steps = {name: run.steps(evaluator.config.log, f"evals.{name}.log")
                           for name, evaluator in self.evals.items()}
        self.lr_names = experiment.label_regexes(run.schedules)
        self.stream = stream_of(run)

    def run(self, state: TrainState) -> TrainState:
        """Train to the last step, or to where the run is told to stop."""
        first, total = int(state.step), self.experiment.total_steps
        with self.live.doing("compiling"):
            train_step = self._compile() if first < total else None
        teacher = self.experiment.read_teacher()
        metrics = None  # those of the last step, until they are logged
        self.chrono.start(first)
        with (contextlib.closing(self._batches(first)) as batches,
              FirstBatch(self.experiment, self.workdir, self.writer.image) as picture):
            for step in range(first, total + 1):
                stopping = self.stop(step)
                # Told to stop, there may be seconds left: the run that goes on from here makes an evaluation up.
                evaluate = [] if stopping else self._due_evaluators(step, first)
                save = stopping or self._due(step, self.ckpt_steps) or self._judges(evaluate)
                if metrics and (evaluate or save):  # only a finite state is evaluated or saved
                    self._log(step, metrics)
                    metrics = None
                scores = self._evaluate(step, state, evaluate)
                if save:
                    self._save(step, state, scores)
                if stopping or step == total:
                    break
                with self.chrono.waiting():
                    batch = next(batches)
                if step == first and self.experiment.settings.plot:
                    picture.draw(batch, step)
                with self.profiler.step(step + 1, state):
                    state, following = train_step(state, batch, teacher)
                if metrics:
                    self._log(step, metrics)
                metrics = following
                self.chrono.tick(step + 1)
                self.live.update(step + 1)
        self.checkpointer.wait()
        self._say_goodbye(step, first, stopping)
        return state

    def _compile(self) -> Callable:
        run = self.experiment
        compiled = run.jit_train_step().lower(*run.step_shapes()).compile()
        if peak_flops(run.mesh.devices.flat[0].device_kind):
            self.chrono.flops_per_step = run.flops_per_step()
        return compiled

    def _batches(self, first: int) -> Generator[dict[str, jax.Array], None, None]:
        run, cfg = self.experiment, self.experiment.settings
        return to_device(run.pipeline.train(cfg.seed, first, run.total_steps), run.pipeline.rows, run.batch_sharding,
                         cfg.input.batch_size, cfg.input.prefetch)

    def _due(self, step: int, every: int | None) -> bool:
        last = step == self.experiment.total_steps
        return step > 0 and (last or (every is not None and step % every == 0))

    def _due_evaluators(self, step: int, first: int) -> list[str]:
        """Evaluators due at `step`; where a run goes on, those that had their turn there before it stopped are not."""
        due = [name for name, every in self.eval_steps.items() if self._due(step, every)]
        if step > first:
            return due
        recorded = self.writer.recorded(step)
        return [name for name in due
                if not dist.agree(any(metric.startswith(self.evals[name].config.prefix) for metric in recorded))]

    def _judges(self, names: list[str]) -> bool:
        """Whether one of these evaluators measures what `keep_best` goes by: what it finds may be worth keeping."""
        best = self.experiment.settings.keep_best
        return best is not None and any(
            best.metric.removeprefix(EMA).startswith(self.evals[name].config.prefix) for name in names)

    def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch the metrics of `step`; stop if they are not finite, record them if due."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            raise self._diverged(step, values)
        self._count_errors(step, values.pop("examples_skipped"))
        self.checkpointer.check()
        if not self._due(step, self.log_steps):
            return
        run = self.experiment
        rate = cb_optax.peak_lr(run.settings, run.settings.input.batch_size)
        # `step` is the number of updates made; the schedule of the last of them was that of step - 1.
        values |= {self.lr_names[regex]: rate * float(s(step - 1)) for regex, s in run.schedules.items()}
        if run.settings.input.skip_errors:
            values["examples_skipped"] = self.examples_skipped
        values |= self.chrono.measure(step) | memory_stats(jax.local_devices()[0])
        self.writer.write(step, values)
        logger.info(self.chrono.progress_line(step, values))
        self.writer.plot()

    def _count_errors(self, step: int, skipped: int) -> None:
        """Count the unreadable examples of `step`; stop if there are too many of them."""
        self.examples_skipped += skipped
        try:
            self.judge.add(step, skipped)
        except DataError as error:
            self.checkpointer.wait()
            raise DataError(f"step {step}: {error}; {self.checkpointer.last_good()}") from None

    def _evaluate(self, step: int, state: TrainState, names: list[str]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name in names:
            evaluator = self.evals[name]
            with self.chrono.paused("evaluate"), self.live.doing(f"evaluating {name}"):
                found = measure(evaluator, state, self.workdir)
            self.writer.write(step, found)
            logger.info("step %d  %s", step, "  ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
            scores |= found
        return scores

    def _save(self, step: int, state: TrainState, scores: dict[str, float]) -> None:
        """Save; `_log` has seen that the state is finite."""
        if step == 0:
            return
        with self.chrono.paused("checkpoint"):
            self.writer.flush()
            meta = {"chrono": self.chrono.state(), "examples_skipped": self.examples_skipped,
                    "errors": self.judge.state(), "model_init": self.model_init, "stream": self.stream,
                    "model": dataclasses.asdict(self.experiment.settings.model),
                    "lamb_fused_qkv": self.experiment.settings.lamb_fused_qkv is not False}
            self.checkpointer.save(state, meta, scores)

    def _say_goodbye(self, step: int, first: int, stopping: bool) -> None:
        if stopping:
            logger.info("told to stop: %s; the same command goes on from there",
                        f"saved at step {step}" if step else "not a step is done")
        else:
            logger.info("%s at step %d", "done" if first < step else "this run is already complete,", step)
        if "img/sec" in (history := self.writer.history()):
            logger.info("%s in the median of the run", speed_text(float(np.median(history["img/sec"][1]))))

    def _diverged(self, step: int, values: dict[str, float]) -> NonFinite:
        shown = ", ".join(f"{name} {values[name]:g}" for name in ("training_loss", "l2_grads", "l2_params"))
        self.checkpointer.wait()
        return NonFinite(f"step {step} is not finite ({shown}); {self.checkpointer.last_good()}. A lower lr, a longer "
                         "warm-up or grad_clip_norm may help")


@contextlib.contextmanager
def name_last_good(checkpointer: Checkpointer) -> Iterator[None]:
    """A `CannotWrite` raised inside says what the run can go on from."""
    try:
        yield
    except io.CannotWrite as error:
        raise io.CannotWrite(f"{error}, then give the same command again; {checkpointer.last_good()}") from None


@contextlib.contextmanager
def stop_signal(checkpointer: Checkpointer) -> Iterator[Callable[[int], bool]]:
    """`stop(step)`: whether to save and end now, because SIGTERM came, or Ctrl-C, the second of which ends at once.

    SIGHUP, of a terminal that closes, counts as SIGTERM, unless it is ignored, as `nohup` has it. One process keeps its
    own flag; several agree on a step through Orbax, which needs `jax.distributed` and knows SIGTERM alone.
    """
    flag, several = threading.Event(), jax.process_count() > 1

    def stop(number: int, frame: Any) -> None:
        flag.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.info("stopping after this step; Ctrl-C again ends at once, without saving")

    handlers = {signal.SIGHUP: lambda *_: signal.raise_signal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        handlers.clear()
    if not several:
        handlers |= {signal.SIGTERM: stop, signal.SIGINT: stop}
    if threading.current_thread() is not threading.main_thread():  # a notebook's worker: no signals there
        handlers.clear()
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield checkpointer.reached_preemption if several else lambda step: flag.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: installed by a library in C
