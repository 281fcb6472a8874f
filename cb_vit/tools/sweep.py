"""Many runs of one experiment: a grid of values, each cell of which is an ordinary run in a folder of its own.

    cb-vit sweep --config=digits --grid context=none,cb,cb_s --grid seed=0,1,2,3,4 --workdir=sweeps/digits \\
        --metric=val/prec@1 --baseline=context=none
    cb-vit sweep --config=digits --grid lr=1e-3,2e-3 --grid model.drop_path=0,0.1 --workdir=sweeps/lr --dry_run

A name of the grid is an argument of the config file if it takes one of that name, else a setting, without "config.";
other settings, --config.key=value, are those of all cells. The same command again goes on: what is complete is skipped,
what was stopped goes on from its last checkpoint. Values may be added to a grid; what all cells share stays as it is.
Ctrl-C once, or SIGTERM, lets the runs save and end. On several machines with one file system, give the same command on
each: they share the cells. What a run says is in sweep.log in its folder.
"""
from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

from cb_vit import io
from cb_vit.analysis.sweeps import Sweep
from cb_vit.config import ConfigError, Failure
from cb_vit.tools import cli

logger = logging.getLogger(__name__)


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_config()
    parser.add_argument("--grid", action="append", metavar="NAME=VALUE,…", help="Values of one argument or setting; "
                                                                                "give it once for each.")
    parser.add_argument("--workdir", help="Folder of the sweep, which others may share: a folder for each cell.")
    parser.add_argument("--parallel", type=cli.at_least_one, default=1, metavar="N",
                        help="How many runs at once. They share the processors, and the accelerators, of the machine; "
                             "on a TPU there can be one. [1]")
    parser.add_argument("--metric", metavar="NAME", help="The metric that the sweep is to be judged by, such as "
                                                         "val/prec@1; to be chosen before the first run begins.")
    parser.add_argument("--baseline", metavar="NAME=VALUE", help="The arm that others are to be compared with.")
    parser.add_argument("--dry_run", action="store_true", help="Say what each cell would do, and write nothing.")


def main(args: argparse.Namespace) -> None:
    """Plan, check every cell, and run what is not complete."""
    workdir = cli.required(args.workdir, "--workdir", "sweeps/digits")
    config = cli.required(args.config, "--config", "digits")
    _check_place(workdir)

    from cb_vit.tools import cells, scheduler, sweep_plan  # with what they bring: the schema of all settings

    plan = sweep_plan.Plan(config, args.overrides, sweep_plan.read_grid(args.grid or (), args.overrides, config))
    sweep = plan.sweep(args.metric, args.baseline)
    jobs = [cells.Job(name, io.as_path(workdir) / name,
                      [*plan.words(cell.grid), f"--workdir={os.path.join(workdir, name)}"], cell.config)
            for name, cell in sweep.cells.items()]
    if args.dry_run:
        plan.merged(workdir, sweep)
        cli.show(*_overview(workdir, jobs))
        return
    plan.record(workdir, sweep)
    outcome = scheduler.run_all(jobs, workdir, args.parallel, sys.stdout)
    cli.show(*_summary(args, workdir, outcome, sweep))
    if outcome.failed:
        raise Failure(f"{len(outcome.failed)} of {len(jobs)} cells failed, the first of them {outcome.failed[0].name}; "
                      "the same command tries them again")


def _check_place(workdir: str) -> None:
    """Refuse a place in which cells cannot be shared.

    Raises:
        ConfigError: it is no folder of this machine, or that of a run; or the processes here belong together.
    """
    if not io.is_local(workdir):
        raise ConfigError("--workdir", f"{workdir} is in a bucket, where cells can be neither locked nor logged; give "
                                       "a folder, and copy it there afterwards")
    if os.path.lexists(io.as_path(workdir) / "config.json"):
        raise ConfigError("--workdir", f"{workdir} is the folder of a run; give one for the sweep alone")
    for name, together in (("JAX_COORDINATOR_ADDRESS", bool), ("TPU_WORKER_HOSTNAMES", lambda hosts: "," in hosts)):
        if together(os.environ.get(name, "")):
            raise ConfigError(name, "is set: these processes are one run together, and each cell of a sweep is a run "
                                    "of one process; unset it, or train the cells one by one")


def _overview(workdir: str, jobs: Sequence) -> Iterator[str]:
    """What each cell would do, and how one would be started."""
    from cb_vit.tools import cells

    width = max(len(job.name) for job in jobs) + 2
    yield from (f"{job.name:<{width}}{cells.standing(job, workdir)}" for job in jobs)
    yield f"each an ordinary run, such as  {shlex.join([*cli.called('train', 'train'), *jobs[0].words])}"


def _summary(args: argparse.Namespace, workdir: str, outcome, sweep: Sweep) -> Iterator[str]:
    """The end of a sweep in a few lines, the last of them a command: to compare, or to go on."""
    counts = {"complete": outcome.complete, "failed": outcome.failed, "stopped before their end": outcome.stopped,
              "run by others": outcome.elsewhere, "not begun here": outcome.left}
    yield ""
    yield f"cells     {', '.join(f'{len(jobs)} {what}' for what, jobs in counts.items() if jobs)}"
    yield from (f"failed    {job.name}: {job.last_words()}" for job in outcome.failed)
    if len(outcome.complete) == len(sweep.cells):
        metric = [] if sweep.metric else ["--metric=NAME"]
        yield f"next      {shlex.join([*cli.called('compare', 'compare'), workdir, *metric])}"
    else:
        yield f"to go on  {shlex.join([*cli.called(), *words_of(args)])}"


def words_of(args: argparse.Namespace) -> list[str]:
    """What the command line says, to say it again."""
    words = [*cli.words_of(args), *(f"--grid={text}" for text in args.grid)]
    named = (("parallel", args.parallel if args.parallel > 1 else None), ("metric", args.metric),
             ("baseline", args.baseline))
    return words + [f"--{name}={value}" for name, value in named if value is not None]


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
