"""Train a Vision Transformer with Context Broadcasting.

    cb-vit train --config=digits --workdir=runs/digits
    cb-vit train --config=vit_i1k:variant=S/16,context=cb --workdir=gs://BUCKET/vit_s16 --config.seed=1
    cb-vit train --config=list

The same command again goes on from the last checkpoint. SIGTERM, SIGHUP (not under nohup) or Ctrl-C once saves and
ends. On a pod, run it on every host.
"""
from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator

from cb_vit.tools import cli


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_config()
    parser.add_argument("--workdir", help="Folder of the run, local or gs://: checkpoints, metrics and plots go there.")


def main(args: argparse.Namespace) -> None:
    """Train, and say where everything lies."""
    workdir = cli.required(args.workdir, "--workdir", "runs/digits")
    config = cli.config_of(args)

    # What the command line gets wrong is said before a second goes by.
    import jax

    from cb_vit import dist, train

    dist.initialize()
    metrics = train.train_and_evaluate(config, workdir, terminal=sys.stdout)
    if jax.process_index() == 0:
        cli.show("", *summary(metrics, args))


def summary(metrics: dict[str, float], args: argparse.Namespace) -> Iterator[str]:
    """The end of a run in a few lines, the last of them a command: to evaluate, or to go on."""
    from cb_vit import io
    from cb_vit.workdir import read_config, read_run

    lines = [(name, f"{value:.4f}") for name, value in metrics.items() if name.endswith(("/prec@1", "/loss"))]
    evals = (read_config(args.workdir) or {}).get("evals") or {}
    lines += [(what, os.path.join(args.workdir, name)) for what, name in (
        ("checkpoints", "checkpoints"), ("metrics", "metrics.jsonl"), ("curves", "training_curves.png"),
        ("first batch", "first_batch.png"), *((name, block.get("prefix") or name) for name, block in evals.items()))
        if io.exists(io.as_path(args.workdir) / name)]
    total = read_run(args.workdir)["total_steps"]
    if metrics["step"] == total:
        lines.append(("next", shlex.join([*cli.called("eval", "eval_only"), f"--workdir={args.workdir}"])))
    else:
        lines += [("stopped", f"at step {metrics['step']:.0f} of {total}"),
                  ("to go on", shlex.join([*cli.called(), *cli.words_of(args)]))]
    width = max(len(what) for what, _ in lines) + 2
    return (f"{what:<{width}}{text}" for what, text in lines)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
