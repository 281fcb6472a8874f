"""What stands between an experiment and its first step: evaluators, and the state it begins with."""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from typing import Any

from etils import epath

from cb_vit import io
from cb_vit import workdir as workdir_lib
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import ConfigError
from cb_vit.evaluators import common as evaluators
from cb_vit.experiment import Experiment
from cb_vit.train_state import TrainState

logger = logging.getLogger(__name__)


def build_evaluators(run: Experiment) -> dict[str, Any]:
    """The evaluators of `config.evals`, by name, their data opened.

    Raises:
        ConfigError: an evaluator that cannot work.
    """
    evals = {name: evaluators.build(name, config, predict_fn=run.predict, state_shapes=run.shapes,
                                    sharding=run.batch_sharding, batch_size=run.cfg.input.batch_size,
                                    num_classes=run.num_classes)
             for name, config in run.settings.evals.items()}
    owners: dict[str, str] = {}
    for name, evaluator in evals.items():
        if (other := owners.setdefault(evaluator.config.prefix, name)) != name:
            raise ConfigError(f"config.evals.{name}.prefix", f"{evaluator.config.prefix!r} is that of {other} too: "
                                                             "their metrics would have the same names")
    best = run.cfg.keep_best
    if best and not best.metric.startswith(tuple(owners)):
        prefixes = ", ".join(map(repr, owners)) or "(config.evals is empty)"
        raise ConfigError("config.keep_best.metric", f"{best.metric!r} is of no evaluator; names of their metrics "
                                                     f"begin with {prefixes}")
    return evals


def restore_or_create(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The state a run begins with, and the notes beside it: own workdir, else `config.resume`, else scratch.

    Raises:
        ConfigError: where the run should go on, it would do so with other data, with another model, or past its end.
    """
    if restored := _restore(run, workdir, checkpointer):
        return restored
    if run.cfg.resume:
        directory = resume_folder(run.cfg.resume)
        with contextlib.closing(Checkpointer(directory, read_only=True)) as other:
            if restored := _restore(run, run.cfg.resume, other):
                return restored
        raise ConfigError("config.resume", f"{directory} holds no checkpoint")
    return run.create_state(), {}


def _restore(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]] | None:
    if checkpointer.latest_step() is None:
        return None
    if old := workdir_lib.read_config(workdir):
        for line in workdir_lib.check_changes(old, run.settings.raw, run.cfg.allow_changed_data):
            logger.warning("changed since the last start: %s", line)
    restored = checkpointer.restore_latest(run.shapes, run.scan)
    if restored is None:
        return None
    step = int(restored[0].step)
    if step > run.total_steps:
        raise ConfigError(f"config.total_{run.cfg.total.unit}", f"the run ends at step {run.total_steps}, but the "
                          f"checkpoint in {checkpointer.directory} is of step {step}; use another workdir")
    logger.info("resumed from step %d of %s", step, checkpointer.directory)
    return restored


def resume_folder(workdir: str) -> epath.Path:
    """The checkpoints of `config.resume`.

    Raises:
        ConfigError: there are none.
    """
    folder = io.as_path(workdir) / "checkpoints"
    if not folder.exists():
        raise ConfigError("config.resume", f"{folder} does not exist; give the workdir of a run")
    return folder


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


def open_checkpoints(run: Experiment, workdir: str | os.PathLike) -> Checkpointer:
    """The checkpoints of a run's own workdir, kept as its config says."""
    cfg = run.cfg
    return Checkpointer(io.as_path(workdir) / "checkpoints", keep_last=cfg.keep_last,
                        keep_every=run.steps(cfg.keep_ckpt, "keep_ckpt"), keep_best=cfg.keep_best)
