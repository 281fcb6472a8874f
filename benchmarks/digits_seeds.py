"""Trains a config from several seeds, each in a process of its own, and prints what came of it as Markdown.

    python benchmarks/digits_seeds.py
    python benchmarks/digits_seeds.py --seeds=0,1 --workdir=runs/seeds --config.total_epochs=50

Top-1 of the last evaluation for every seed, their mean, smallest and spread; seconds from the start of a process to
its end, and those its processor worked. Whatever else is given goes to `main.py`. The lines printed are those of
`benchmarks/README.md`; the runs stay in `--workdir`, if one is given.
"""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
METRIC = "val/prec@1"


def train(config: str, seed: int, workdir: Path, overrides: list[str]) -> dict[str, float]:
    """Train one seed: the last value of each of its metrics, and what it took in seconds."""
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", f"--config.seed={seed}"]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    last = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    return {**last, "wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def table(runs: dict[int, dict[str, float]]) -> list[str]:
    """A line a seed, and one for all of them."""
    names = [name for name in (f"ema/{METRIC}", METRIC) if all(name in run for run in runs.values())]
    head = ["seed", *(f"`{name}`, %" for name in names), "seconds", "processor seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for seed, run in runs.items():
        scores = (f"{100 * run[name]:.2f}" for name in names)
        lines.append(f"| {' | '.join([str(seed), *scores, *(f'{run[kind]:.0f}' for kind in ('wall', 'cpu'))])} |")
    means = (f"{100 * statistics.mean(run[name] for run in runs.values()):.2f}" for name in names)
    times = (f"{statistics.mean(run[kind] for run in runs.values()):.0f}" for kind in ("wall", "cpu"))
    return [*lines, f"| mean | {' | '.join([*means, *times])} |"]


def reading(scores: list[float]) -> str:
    """Mean, spread and the smallest in a sentence."""
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return (f"Mean {100 * statistics.mean(scores):.2f} %, standard deviation {100 * spread:.2f}, "
            f"from {100 * min(scores):.2f} to {100 * max(scores):.2f} %.")


def processor() -> str:
    """What this machine computes on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def main() -> None:
    """Train them one after the other and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py", help="the config file, with its arguments")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds, with commas between them")
    parser.add_argument("--workdir", help="folder for the runs; not given: a temporary one")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.workdir or scratch).absolute()
        runs = {}
        for seed in map(int, args.seeds.split(",")):
            runs[seed] = train(args.config, seed, folder / str(seed), overrides)
            print(f"seed {seed}: {runs[seed][METRIC]:.4f}", file=sys.stderr, flush=True)
    print(f"{datetime.date.today()}, {processor()}, Python {platform.python_version()}, jax {jax.__version__}:\n")
    print("\n".join(table(runs)))
    name = f"ema/{METRIC}" if all(f"ema/{METRIC}" in run for run in runs.values()) else METRIC
    print("\n" + reading([run[name] for run in runs.values()]))


if __name__ == "__main__":
    main()
