"""A report on runs: what they have measured and left behind, on one page, and what is not there said in words."""
from __future__ import annotations

import collections
import datetime
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import cb_vit
from cb_vit.analysis import comparison_tables as tables
from cb_vit.analysis import report_evidence as evidence
from cb_vit.analysis.arms import Arm, group
from cb_vit.analysis.comparison import Comparison, compare_found
from cb_vit.analysis.page import Section, bullets, code, page, paragraph, picture, table
from cb_vit.analysis.report_files import Subject, first_line
from cb_vit.analysis.report_pictures import draw_comparison
from cb_vit.analysis.runs import Run, find_runs
from cb_vit.analysis.sweeps import LOG
from cb_vit.config import ConfigError
from cb_vit.monitor.curves import draw_curves
from cb_vit.monitor.overlay import LEARNT, draw_overlay
from cb_vit.records import EMA, Series
from cb_vit.texts import first_few
from cb_vit.workdir import flatten

FIELD = "RUN"
PANELS = 9  # of curves in a picture


def write_page(folders: Sequence[str | os.PathLike], **choices: Any) -> str:
    """The report on some runs, as HTML.

    Args:
        folders: folders of runs and of sweeps.
        **choices: how they are compared, as for `comparison.compare`: metric, baseline, better, level, allow_missing.

    Raises:
        ConfigError: a folder is neither; or the runs cannot be compared as was asked.
        Failure: a file cannot be read.
    """
    found = find_runs(folders, FIELD)
    try:
        arms = group(found, FIELD)
    except ConfigError:
        arms = [Arm({"run": run.name}, {0: run}) for run in found.runs]
    subject = Subject(found, arms, [])
    sections: dict[str, tuple[str, Callable[[Subject], str]]] = {
        "comparison": ("Comparison", lambda subject: _comparison(subject, choices)),
        "runs": ("Runs", _runs), "curves": ("Curves", _curves),
        "density": ("How dense attention is", evidence.density),
        "attention": ("Where the models look", evidence.attention),
        "robustness": ("Robustness", evidence.robustness),
        "calibration": ("Calibration", evidence.calibration),
        "mistakes": ("Mistakes", evidence.mistakes), "made": ("How it was made", _made)}
    parts = [Section(name, title, body) for name, (title, make) in sections.items() if (body := make(subject))]
    if subject.missing:
        parts.append(Section("missing", "What is missing", bullets(dict.fromkeys(subject.missing))))
    title = ", ".join(os.path.basename(os.path.normpath(os.fspath(folder))) for folder in folders[:4])
    more = f" and {len(folders) - 4} more" if len(folders) > 4 else ""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    count = f"{len(found.runs)} runs" if len(found.runs) != 1 else "one run"
    return page(f"Report on {title}{more}", f"{count}; written on {now} by cb_vit {cb_vit.__version__}", parts)


def _comparison(subject: Subject, choices: Mapping[str, Any]) -> str:
    if len(subject.found.runs) < 2:
        return ""
    try:
        comparison = compare_found(subject.found, **choices)
    except ConfigError as error:
        if any(value is not None and value is not False for name, value in choices.items() if name != "level"):
            raise
        return paragraph(f"The runs are not compared. {error}")
    body = paragraph(tables.heading(comparison))
    try:
        body += picture(draw_comparison(comparison), f"{comparison.primary.metric} of each arm, and their differences")
    except (ValueError, ArithmeticError) as error:  # of numbers that no axis holds
        subject.missing.append(f"the picture of the comparison: its numbers cannot be drawn ({error})")
    body += table(tables.score_rows(comparison))
    if comparison.primary.differences:
        body += table(tables.difference_rows(comparison.primary))
    return body + bullets(list(tables.notes(comparison))) + _others(comparison)


def _others(comparison: Comparison) -> str:
    if not comparison.exploratory:
        return ""
    rows = tables.exploratory_rows(comparison)
    return table(rows, "exploratory: other metrics, not chosen beforehand, so not tested", left=2)


def _runs(subject: Subject) -> str:
    scores = sorted(dict.fromkeys(name for run in subject.found.runs for name in run.measured()), key=_parts)
    shown = [name for name in scores if re.fullmatch(r"(.*/)?(prec@1|loss)", name)][:6] or scores[:6]
    rows = [("run", "seed", "steps", *shown)]
    for run in subject.found.runs:
        rows.append((run.name, "" if run.seed is None else run.seed, run.standing().removeprefix("at step "),
                     *(tables.number(run.final(name)) for name in shown)))
        if not run.finished:
            subject.missing.append(f"{run.name} is not finished: {run.standing()}")
    return table(rows, "values at the last step of each run")


def _curves(subject: Subject) -> str:
    runs = [run for run in subject.found.runs if run.history]
    if not runs:
        subject.missing.append("curves: no run has recorded anything")
        return ""
    if len(runs) == 1:
        return picture(draw_curves(runs[0].history, runs[0].name), f"training curves of {runs[0].name}") + table(
            [("metric", "first", "last"), *((name, tables.number(float(values[0])), tables.number(float(values[-1])))
                                            for name, (_, values) in runs[0].history.items() if len(values))])
    arms = {subject.name(arm): mean_history([run for run in arm.runs.values() if run.history]) for arm in subject.arms}
    arms = {name: history for name, history in arms.items() if history}
    known = dict.fromkeys(name for history in arms.values() for name, (steps, _) in history.items() if len(steps) > 1)
    metrics = sorted((name for name in known if re.fullmatch(LEARNT, name)), key=_parts)[:PANELS]
    if not metrics:
        subject.missing.append("curves: the runs of no arm have two steps in common")
        return ""
    several = any(len(arm.runs) > 1 for arm in subject.arms)
    rows = [("metric", *arms)] + [
        (name, *(tables.number(float(history[name][1][-1])) if name in history else "" for history in arms.values()))
        for name in metrics]
    caption = "mean over the seeds of each arm, at the steps that all of them have recorded" if several else ""
    return picture(draw_overlay(arms, metrics), f"curves of {first_few(metrics)}", caption) + table(
        rows, "where the curves end")


def _parts(name: str) -> int:
    """How many parts a metric's name has: of accuracies under many attacks, each has more than that without one."""
    return name.removeprefix(EMA).count("/")


def mean_history(runs: Sequence[Run]) -> dict[str, Series]:
    """The mean of each metric over some runs, at the steps that all of them have recorded."""
    found = {}
    for name in runs[0].history if runs else ():
        if all(name in run.history for run in runs):
            steps = runs[0].history[name][0]
            for run in runs[1:]:
                steps = np.intersect1d(steps, run.history[name][0])
            columns = [values[np.isin(at, steps)] for at, values in (run.history[name] for run in runs)]
            if len(steps):
                found[name] = steps, np.mean(columns, axis=0)
    return found


def _made(subject: Subject) -> str:
    body = ""
    for folder, sweep in subject.found.sweeps.items():
        given = [f"--config={sweep.config}", *(f"--config.{name}" + ("" if value is None else f"={value}")
                                               for name, value in sweep.settings)]
        grid = [f"--grid={name}={','.join(values)}" for name, values in sweep.grid.items()]
        chosen = [f"--{name}={value}" for name in ("metric", "baseline") if (value := getattr(sweep, name))]
        body += paragraph(f"Sweep {folder}, {len(sweep.cells)} cells:")
        body += code(shlex.join(["cb-vit", "sweep", *given, *grid, *chosen, f"--workdir={folder}"]))
    commands = [line for run in subject.found.runs if (line := _command(run))]
    body += "".join(map(code, commands[:3]))
    if len(commands) > 3:
        body += paragraph(f"and {len(commands) - 3} more like these, in the {LOG} of each run", "note")
    return body + _versions(subject) + _settings(subject)


def _command(run: Run) -> str:
    """The command of a run, as the log of its sweep says it; empty where there is none."""
    first = first_line(run.folder / LOG)
    return first.removeprefix("--- ") if first.startswith("--- ") else ""


def _versions(subject: Subject) -> str:
    """Versions and devices, and how many of the runs had each."""
    found: dict[str, collections.Counter[str]] = {}
    unknown = []
    for run in subject.found.runs:
        versions = run.notes.get("versions")
        if not isinstance(versions, Mapping):
            unknown.append(run.name)
            continue
        for name, value in {"devices": run.notes.get("devices"), **versions}.items():
            if value is not None:
                found.setdefault(str(name), collections.Counter())[str(value)] += 1
    if unknown:
        subject.missing.append(f"versions: not recorded by {first_few(unknown)}")
    rows = [(name, value, count) for name, values in found.items() for value, count in values.items()]
    heading = "versions and devices, and how many of the runs had them"
    return table([("", "value", "runs"), *rows], heading, left=2) if rows else ""


def _settings(subject: Subject) -> str:
    """Settings that all runs share, and those in which they differ."""
    configs = {run.name: flatten(run.config) for run in subject.found.runs}
    names = sorted({name for config in configs.values() for name in config})
    values = {name: list(dict.fromkeys(str(config.get(name, "(not set)")) for config in configs.values()))
              for name in names}
    rows = [(f"config.{name}", first_few(found, 12)) for name, found in values.items()]
    differing = [row for row, found in zip(rows, values.values(), strict=True) if len(found) > 1]
    shared = [row for row, found in zip(rows, values.values(), strict=True) if len(found) == 1]
    body = table([("setting", "values"), *differing], "in which the runs differ", left=2) if differing else ""
    return body + (table([("setting", "value"), *shared], "that all runs share", left=2) if shared else "")
