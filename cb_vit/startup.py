"""What stands between a config and the first step: the experiment, its evaluators, and the state it begins with."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cb_vit import dist, experiment, io
from cb_vit import workdir as workdir_lib
from cb_vit.checkpoint import Checkpointer
from cb_vit.checkpoint_reading import Mismatch, Reader
from cb_vit.config import ConfigError
from cb_vit.damage import Damaged
from cb_vit.datasets.contents import describe
from cb_vit.experiment import Experiment
from cb_vit.model_init import fit, open_init, with_model_of
from cb_vit.settings import Settings, check_addresses
from cb_vit.stream import check_stream
from cb_vit.train_state import TrainState
from cb_vit.workers import check_workers

logger = logging.getLogger(__name__)
# The settings that make up the arrays of a train state.
STATE = ("model_name", "model", "num_classes", "optax_name", "optax", "schedule", "ema")


def build(settings: Settings, workdir: str | os.PathLike) -> Experiment:
    """The experiment, and a look at what it would begin from, before anything is written.

    Raises:
        ConfigError: as for `experiment.build`; or where `config.resume` or `config.model_init` points to, there is
            nothing, or parameters of another model.
    """
    known = weights = None
    check_addresses(settings)
    if Reader(io.as_path(workdir) / "checkpoints").steps():
        begun = workdir
    elif begun := settings.resume:
        resume_folder(begun)
    if begun:
        known, settings = recorded_classes(begun), _with_its_norms(with_model_of_run(settings, begun), begun)
    elif settings.model_init:
        weights = open_init(settings)
        known, settings = weights.class_names, with_model_of(settings, weights)
    run = experiment.build(settings, known_classes=known)
    check_workers(settings.input.num_workers, settings.input.prefetch, run.example_spec, len(run.pipeline.rows))
    for line in describe("config.input.data", run.pipeline.source):
        logger.info("%s", line)
    return dataclasses.replace(run, begin=fit(run, weights)) if weights else run


def recorded_classes(workdir: str | os.PathLike) -> tuple[str, ...] | None:
    """What the classes of the run in `workdir` are called, as its newest checkpoint says, or else `run.json`.

    Returns:
        One name for each class of the head; None: not known.
    """
    for recorded in _recorded(workdir):
        if stream := recorded.get("stream"):
            return stream["class_names"] and tuple(stream["class_names"])
    return dist.together(lambda: workdir_lib.recorded_classes(workdir))


def _recorded(workdir: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """What is noted in the checkpoints of a run, the newest first."""
    reader = Reader(io.as_path(workdir) / "checkpoints")
    for step in reversed(reader.steps()):
        with contextlib.suppress(Damaged):  # damage is told of where a checkpoint is restored
            yield reader.patiently(step, functools.partial(reader.meta, step))


def with_model_of_run(settings: Settings, workdir: str | os.PathLike) -> Settings:
    """`settings`, whose model is that of the run in `workdir` in all that they leave to a `model_init`."""
    if not settings.model_init:
        return settings
    trained = next((recorded["model"] for recorded in _recorded(workdir) if "model" in recorded), None)
    trained = trained or (dist.together(lambda: workdir_lib.read_run(workdir)) or {}).get("model") or {}
    return settings.with_model(trained)


def _with_its_norms(settings: Settings, workdir: str | os.PathLike) -> Settings:
    """`settings`, in which LAMB's norms are those that the run in `workdir` has had, unless they say otherwise.

    Checkpoints from before there was a choice do not say which; they had one a parameter.
    """
    if not settings.lamb or settings.lamb_fused_qkv is not None:
        return settings
    fused = next(_recorded(workdir), {}).get("lamb_fused_qkv", False)
    if not fused:
        logger.info("config.lamb_fused_qkv: this run keeps LAMB's norms of query, key and value apart, as it began; "
                    "new runs have one over the three, as timm: --config.lamb_fused_qkv=True")
    return dataclasses.replace(settings, lamb_fused_qkv=fused)


def restore_or_create(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The state a run begins with, and the notes beside it.

    In this order: own workdir, `config.resume`, `config.model_init`, scratch.

    Raises:
        ConfigError: the run would go on with other data or another model, or past its end.
    """
    if restored := _restore(run, workdir, checkpointer):
        return restored
    if run.settings.resume:
        directory = resume_folder(run.settings.resume)
        with contextlib.closing(Checkpointer(directory, read_only=True)) as other:
            if restored := _restore(run, run.settings.resume, other):
                return restored
        raise ConfigError("config.resume", f"{directory} holds no checkpoint; give the workdir of a run that has one")
    if run.settings.model_init:
        return (run.begin or fit(run, open_init(run.settings)))()
    return run.create_state(), {}


def _restore(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]] | None:
    if checkpointer.latest_step() is None:
        return None
    with telling_settings(run.settings, workdir):
        restored = checkpointer.restore_latest(run.shapes, run.scan)
    if restored is None:
        return None
    step = int(restored[0].step)
    dist.together(lambda: check_stream(run, restored[1].get("stream"), workdir))
    if step > run.total_steps:
        raise ConfigError(f"config.total_{run.settings.total.unit}", f"the run ends at step {run.total_steps}, but the "
                          f"checkpoint in {checkpointer.directory} is of step {step}; use another workdir")
    logger.info("resumed from step %d of %s", step, checkpointer.directory)
    return restored


@contextlib.contextmanager
def telling_settings(settings: Settings, workdir: str | os.PathLike) -> Iterator[None]:
    """A `Mismatch` raised inside begins with what the run in `workdir` has set otherwise."""
    try:
        yield
    except Mismatch as error:
        before = workdir_lib.read_config(workdir) or {}
        told = [f"config.{key} is {was} there and {now} here"
                for key, was, now in workdir_lib.differences(_of_state(before), _of_state(settings.raw))]
        raise Mismatch(error.path, ": ".join(filter(None, (", ".join(told), error.message)))) from None


def _of_state(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that make up the arrays of a train state."""
    return {key: value for key, value in config.items() if key in STATE}


def resume_folder(workdir: str) -> epath.Path:
    """The checkpoints of `config.resume`.

    Raises:
        ConfigError: the folder does not exist.
    """
    folder = io.as_path(workdir) / "checkpoints"
    if not io.exists(folder):
        raise ConfigError("config.resume", f"{folder} does not exist; give the workdir of a run")
    return folder


def open_checkpoints(run: Experiment, workdir: str | os.PathLike) -> Checkpointer:
    """The checkpoints of a run's own workdir, kept as its config says."""
    settings = run.settings
    return Checkpointer(io.as_path(workdir) / "checkpoints", keep_last=settings.keep_last,
                        keep_every=run.steps(settings.keep_ckpt, "keep_ckpt"), keep_best=settings.keep_best)
