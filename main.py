"""Train a Vision Transformer with Context Broadcasting.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --config=configs/vit_i1k.py:variant=S/16,context=cb --workdir=gs://BUCKET/vit_s16 --config.seed=1
    python main.py --config=list

The same command again goes on from the last checkpoint. SIGTERM, SIGHUP (not under nohup) or Ctrl-C once saves and
ends. On a pod, run it on every host.
"""
from __future__ import annotations

import os
import shlex
import sys

from cb_vit.tools import cli


def main(config) -> None:
    """Train, and say where everything lies."""
    workdir = cli.require_workdir()

    import jax

    from cb_vit import dist, train

    dist.initialize()
    metrics = train.train_and_evaluate(config, workdir)
    if jax.process_index() == 0:
        cli.show(*summary(metrics, workdir).split("\n"))


def summary(metrics: dict[str, float], workdir: str) -> str:
    """The end of a run in a few lines, the last of them a command: to evaluate, or to go on."""
    from cb_vit.workdir import read_run

    lines = [(name, f"{value:.4f}") for name, value in metrics.items() if name.endswith(("/prec@1", "/loss"))]
    lines += [(what, os.path.join(workdir, name)) for what, name in (
        ("checkpoints", "checkpoints"), ("metrics", "metrics.jsonl"), ("curves", "training_curves.png"))]
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else "python"
    total = read_run(workdir)["total_steps"]
    ended = metrics["step"] == total
    program = ["-m", "cb_vit.tools.eval_only"] if ended else [os.path.relpath(sys.argv[0])]
    config, *overrides = cli.config_arguments()
    command = [python, *program, config, f"--workdir={workdir}", *overrides]
    if not ended:
        lines.append(("stopped", f"at step {metrics['step']:.0f} of {total}"))
    lines.append(("next" if ended else "to go on", shlex.join(command)))
    width = max(len(what) for what, _ in lines) + 2
    return "\n" + "\n".join(f"{what:<{width}}{text}" for what, text in lines)


if __name__ == "__main__":
    cli.define(workdir="Folder of the run, local or gs://: checkpoints, metrics and plots go there.")
    cli.run(main, __doc__)
