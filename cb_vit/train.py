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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections

from cb_vit import dist, experiment, io
from cb_vit import workdir as workdir_lib
from cb_vit.checkpoint import Checkpointer
from cb_vit.evaluators import common as evaluators
from cb_vit.experiment import Experiment
from cb_vit.input_pipeline import to_device
from cb_vit.metric_writer import MetricWriter
from cb_vit.optax import peak_lr
from cb_vit.profiling import Profiler
from cb_vit.timing import Chrono, memory_stats
from cb_vit.train_state import TrainState

logger = logging.getLogger(__name__)


class NonFinite(RuntimeError):
    """Loss, gradients or parameters stopped being finite numbers."""


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any], workdir: str | os.PathLike
) -> dict[str, float]:
    """Train as `config` says, from scratch or from where `workdir` stands.

    Args:
        config: see `experiment.TrainConfig`.
        workdir: the run's folder, local or in a bucket.

    Returns:
        The last value of every metric recorded (on the first process; elsewhere only `step`).

    Raises:
        ConfigError: the config cannot work; raised before anything is written.
        DataError: an example cannot be read.
        NonFinite: training has diverged.
    """
    settings = experiment.check(config)
    workdir_lib.check_writable(workdir)
    run = experiment.build(settings)
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.lock(workdir, primary))
        stack.enter_context(run.context())
        checkpointer = stack.enter_context(contextlib.closing(_checkpointer(run, workdir)))
        _compare_with_last_start(run, workdir, checkpointer)
        state, meta = restore_or_create(run, checkpointer)
        first = int(state.step)
        if primary:
            workdir_lib.write_notes(workdir, settings.raw, run_notes(run))
        writer = stack.enter_context(MetricWriter(
            workdir, settings.train, resume_step=first if first else None, run_config=settings.raw, primary=primary))
        chrono = Chrono(run.total_steps, run.cfg.input.batch_size, devices=run.mesh.devices.ravel(),
                        examples_per_epoch=len(run.pipeline.source))
        if "chrono" in meta:
            chrono.restore(meta["chrono"])
        profiler = stack.enter_context(Profiler(run.cfg.profile, workdir, primary))
        stop = stack.enter_context(stop_signal(checkpointer))
        Loop(run, checkpointer, writer, chrono, profiler, stop).run(state)
        return {"step": first, **{name: float(values[-1]) for name, (_, values) in writer.history().items()}}


@dataclasses.dataclass
class Loop:
    """The loop and what it talks to."""

    experiment: Experiment
    checkpointer: Checkpointer
    writer: MetricWriter
    chrono: Chrono
    profiler: Profiler
    stop: Callable[[int], bool]

    def __post_init__(self):
        run = self.experiment
        steps = lambda name: run.steps(getattr(run.cfg, name), name)  # noqa: E731
        self.log_steps, self.ckpt_steps = steps("log_training"), steps("ckpt")
        self.evaluators = {
            name: (evaluators.build(name, config, predict_fn=run.predict, sharding=run.batch_sharding,
                                    batch_size=run.cfg.input.batch_size, num_classes=run.num_classes),
                   run.steps(config.log, f"evals.{name}.log"))
            for name, config in run.settings.evals.items()}
        self.lr_names = experiment.label_regexes(run.schedules)

    def run(self, state: TrainState) -> TrainState:
        """Train to the last step, or to where the run is told to stop."""
        first = int(state.step)
        total = self.experiment.total_steps
        metrics: dict[str, jax.Array] = {}
        for step in range(first, total + 1):
            if step == first:
                train_step, batches = self._compile(state) if first < total else (None, None)
                self.chrono.start(first)
            stopping = self.stop(step)
            evaluate = [name for name, (_, every) in self.evaluators.items() if self._due(step, every)]
            save = stopping or self._due(step, self.ckpt_steps)
            logged = bool(metrics) and bool(evaluate or save)
            if logged:
                self._log(step, metrics)
            scores = self._evaluate(step, state, evaluate)
            if save:
                self._save(step, state, scores)
            if stopping or step == total:
                break
            batch = next(batches)
            with self.profiler.step(step + 1, state):
                state, following = train_step(state, batch)
            if metrics and not logged:
                self._log(step, metrics)
            metrics = following
            self.chrono.tick(step + 1)
        self._finish(step, first)
        return state

    def _compile(self, state: TrainState) -> tuple[Callable, Iterator]:
        run, batch_size = self.experiment, self.experiment.cfg.input.batch_size
        compiled = run.jit_train_step().lower(run.shapes, run.batch_shapes()).compile()
        # XLA counts the FLOPs of one device's program.
        flops = (compiled.cost_analysis() or {}).get("flops", 0)
        self.chrono.flops_per_step = flops * run.mesh.size if flops > 0 else None
        batches = run.pipeline.train(run.cfg.seed, int(state.step), run.total_steps)
        return compiled, to_device(batches, run.pipeline.rows, run.batch_sharding, batch_size, run.cfg.input.prefetch)

    def _due(self, step: int, every: int | None) -> bool:
        last = step == self.experiment.total_steps
        return step > 0 and (last or (every is not None and step % every == 0))

    def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch the metrics of `step`; record them if due; stop if they are not finite."""
        if not metrics["finite"]:
            self._diverged(step, metrics)
        if not self._due(step, self.log_steps):
            return
        values = {name: value.item() for name, value in jax.device_get(metrics).items() if name != "finite"}
        run = self.experiment
        rate = peak_lr(run.cfg, run.cfg.input.batch_size)
        # `step` is the number of updates made; the schedule of the last of them was that of step - 1.
        values |= {self.lr_names[regex]: rate * float(s(step - 1)) for regex, s in run.schedules.items()}
        if values.pop("examples_skipped"):
            values["examples_skipped"] = int(jax.device_get(metrics["examples_skipped"]))
        values |= self.chrono.measure(step) | memory_stats(jax.local_devices()[0])
        self.writer.write(step, values)
        logger.info(self.chrono.progress_line(step, values))
        self.writer.plot()

    def _evaluate(self, step: int, state: TrainState, names: list[str]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name in names:
            evaluator, _ = self.evaluators[name]
            prefix = evaluator.config.prefix
            recorded = self.writer.recorded(step)
            if dist.agree(any(metric.startswith(prefix) for metric in recorded)):
                continue
            with self.chrono.paused("evaluate"):
                found = {f"{prefix}{metric}": value for metric, value in evaluator.run(state)}
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
            self.checkpointer.save(state, {"chrono": self.chrono.state()}, scores)

    def _finish(self, step: int, first: int) -> None:
        self.checkpointer.wait()
        if step == self.experiment.total_steps:
            logger.info("%s at step %d", "done" if first < step else "this run is already complete,", step)
        else:
            logger.info("told to stop: saved at step %d; the same command goes on from there", step)

    def _diverged(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        shown = ", ".join(f"{name} {values[name]:g}" for name in ("training_loss", "l2_grads", "l2_params"))
        self.checkpointer.wait()
        good = self.checkpointer.latest_step()
        kept = f"the last good checkpoint is step {good} in {self.checkpointer.directory}" if good is not None else \
            "there is no checkpoint yet"
        raise NonFinite(f"step {step} is not finite ({shown}); {kept}. A lower lr, a longer warm-up or grad_clip_norm "
                        "may help")


def restore_or_create(run: Experiment, checkpointer: Checkpointer) -> tuple[TrainState, dict[str, Any]]:
    """The state a run begins with, and the notes beside it: own workdir, else `config.resume`, else scratch."""
    scan = getattr(run.settings.model, "scan", False)
    if restored := checkpointer.restore_latest(run.shapes, scan):
        logger.info("resumed from step %d of %s", restored[0].step, checkpointer.directory)
        return restored
    if run.cfg.resume:
        directory = io.as_path(run.cfg.resume) / "checkpoints"
        if not directory.exists():
            raise experiment.ConfigError("config.resume", f"{directory} does not exist; give the workdir of a run")
        with contextlib.closing(Checkpointer(directory, read_only=True)) as other:
            if restored := other.restore_latest(run.shapes, scan):
                logger.info("resumed from step %d of %s", restored[0].step, directory)
                return restored
        raise experiment.ConfigError("config.resume", f"{directory} holds no checkpoint")
    return run.create_state(), {}


def run_notes(run: Experiment) -> dict[str, Any]:
    """What `run.json` says: all that one needs beside the parameters to use the model."""
    source = run.pipeline.source
    return {
        "format": 1,
        "model_name": run.cfg.model_name,
        "model": dataclasses.asdict(run.settings.model),
        "num_classes": run.num_classes,
        "class_names": list(source.class_names) if source.class_names else None,
        "image_shape": list(run.example_spec["image"][0]),
        "pp": run.cfg.input.pp,
        "pp_evals": {name: config.pp_fn for name, config in run.settings.evals.items()},
        "total_steps": run.total_steps,
    }


@contextlib.contextmanager
def stop_signal(checkpointer: Checkpointer) -> Iterator[Callable[[int], bool]]:
    """`stop(step)`: whether to save and end now, because SIGTERM came.

    One process keeps its own flag; several agree on a step through Orbax, which needs `jax.distributed`.
    """
    if jax.process_count() > 1:
        yield checkpointer.reached_preemption
        return
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # a notebook's worker: no signals there
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: flag.set())
    try:
        yield lambda step: flag.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)


def _checkpointer(run: Experiment, workdir: str | os.PathLike) -> Checkpointer:
    cfg = run.cfg
    return Checkpointer(io.as_path(workdir) / "checkpoints", keep_last=cfg.keep_last,
                        keep_every=run.steps(cfg.keep_ckpt, "keep_ckpt"), keep_best=cfg.keep_best)


def _compare_with_last_start(run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer) -> None:
    old = workdir_lib.read_config(workdir)
    if old is None or checkpointer.latest_step() is None:
        return
    for line in workdir_lib.check_changes(old, run.settings.raw, run.cfg.allow_changed_data):
        logger.warning("changed since the last start: %s", line)
