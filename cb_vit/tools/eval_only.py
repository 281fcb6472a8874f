"""The evaluators of a config on the last checkpoint of a run. Writes nothing.

    python -m cb_vit.tools.eval_only --config=configs/digits.py --workdir=runs/digits
"""
from __future__ import annotations

import contextlib
import time

import jax
import ml_collections

from cb_vit import dist, experiment, io
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import ConfigError
from cb_vit.evaluators.common import measure
from cb_vit.settings import check
from cb_vit.startup import build_evaluators
from cb_vit.tools import cli


def main(config: ml_collections.ConfigDict) -> None:
    """Print every metric of every evaluator."""
    settings = check(config)
    if not settings.evals:
        raise ConfigError("config.evals", "has no evaluator")
    directory = io.as_path(cli.require_workdir()) / "checkpoints"
    if not directory.exists():
        raise ConfigError("--workdir", f"{directory} does not exist; give the workdir of a run")
    dist.initialize()
    run = experiment.build(settings)
    with run.context(), contextlib.closing(Checkpointer(directory, read_only=True)) as checkpointer:
        restored = checkpointer.restore_latest(run.shapes, run.scan)
        if restored is None:
            raise ConfigError("--workdir", f"{directory} holds no checkpoint")
        state, _ = restored
        if jax.process_index() == 0:
            print(f"step {int(state.step)} of {directory}")
        for name, evaluator in build_evaluators(run).items():
            start = time.monotonic()
            values = measure(evaluator, state)
            if jax.process_index() == 0:
                for metric, value in values.items():
                    print(f"{metric:<24}{value:.4f}")
                print(f"{name + ' took':<24}{time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    cli.define(workdir="Folder of the run whose last checkpoint is evaluated.")
    cli.run(main, __doc__)
