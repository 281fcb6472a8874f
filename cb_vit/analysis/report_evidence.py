"""Sections of a report on what evaluators and other commands have left below the runs: a picture, and its numbers."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from cb_vit import io
from cb_vit.analysis import density as density_lib
from cb_vit.analysis.comparison_tables import number
from cb_vit.analysis.page import paragraph, picture, side_by_side, table
from cb_vit.analysis.report_files import Subject, below, mean_scores, pick, read_table, read_text, scores_of
from cb_vit.analysis.report_pictures import draw_bars, draw_reliability
from cb_vit.analysis.runs import Run
from cb_vit.texts import first_few

RELIABILITY = ("bins", "low", "high", "examples", "confidence", "accuracy")
BINS = {"width": "bins of equal width", "mass": "bins of equally many examples"}
PHOTOGRAPHS = 8  # of which attention is shown
WORST = 5  # classes
CORRUPTION = r"[^/]+/(?!severity_)([^/]+)/error"
WHOLE = r"[^/]+/(error|relative_mce|mce|clean/prec@1)"  # metrics over all corruptions, or of images as they are
WAYS = {  # words for what the bars of a way are, the names of the ways, the bars
    "attack": ("size", r"([^/]+)/eps_[^/]+/prec@1$", "eps_([^/]+)"),
    "occlusion": ("share of patches dropped", r"([^/]+)/[\d.]+/prec@1$", r"([\d.]+)")}
Rows = list[Mapping[str, str]]


def _of_arms(subject: Subject, name: str) -> Iterator[tuple[str, Run, epath.Path]]:
    """The first file of that name below the runs of each arm: what the arm is called, the run, the file."""
    for arm in subject.arms:
        found = next(((run, path) for run in arm.runs.values() for path in below(run.folder, name)), None)
        if found:
            yield subject.name(arm), *found


def _read(subject: Subject, name: str, read: Callable[[str], Any]) -> dict[str, tuple[Run, Any]]:
    """What the first file of that name below each arm says; what cannot be read is noted as missing."""
    found = {}
    for label, run, path in _of_arms(subject, re.escape(name)):
        try:
            found[label] = run, read(read_text(path))
        except ValueError as error:
            subject.missing.append(f"{path} is left out: it {error}")
    if found and (without := [subject.name(arm) for arm in subject.arms if subject.name(arm) not in found]):
        subject.missing.append(f"{name} of {first_few(without)}")
    return found


def _from(found: Mapping[str, tuple[Run, Any]]) -> str:
    return "; ".join(f"{label}: from {run.name}" for label, (run, _) in found.items() if label != run.name)


def density(subject: Subject) -> str:
    """How dense the attention of each block is."""
    found = _read(subject, "density.csv", density_lib.read_density)
    if not found:
        subject.missing.append("density of attention: no density.csv below the runs; the evaluator attention_density "
                               "writes it")
        return ""
    rows = {label: rows for label, (_, rows) in found.items()}
    drawn = picture(density_lib.draw_density(rows), "measures of attention by block", _from(found))
    return drawn + "".join(_density_tables(rows))


def _density_tables(runs: Mapping[str, list[density_lib.Row]]) -> Iterator[str]:
    """The means of all measures over all heads and tokens, by block; distances are of patches alone."""
    for measure, heading in density_lib.HEADINGS.items():
        means = {label: {row.block: row.mean for row in density_lib.pick(rows, measure)}
                 for label, rows in runs.items()}
        blocks = sorted({block for found in means.values() for block in found})
        if blocks:
            yield table([(f"{heading}, by block", *map(str, blocks)), *(
                (label, *(number(found.get(block, float("nan"))) for block in blocks))
                for label, found in means.items())])


def attention(subject: Subject) -> str:
    """Attention over the same photographs, model by model."""
    folders: dict[str, dict[str, epath.Path]] = {}
    for arm in subject.arms:
        for run in arm.runs.values():
            home = run.folder / "attention"
            there = {str(path)[len(str(home)) + 1:]: path for path in below(home, r".*\.png")
                     if path.name != "index.png"}
            if there:
                folders[subject.name(arm)] = there
                break
    common = [name for name in next(iter(folders.values()), {}) if all(name in there for there in folders.values())]
    if not common:
        why = "the runs have no photograph in common" if folders else "no pictures in RUN/attention"
        subject.missing.append(f"attention maps: {why}; cb-vit predict --weights=RUN --attention=RUN/attention "
                               "PHOTOGRAPHS writes them")
        return ""
    body = ""
    for name in common[:PHOTOGRAPHS]:
        body += "".join(_png(subject, there[name], f"attention on {name}", f"{label}: {name}")
                        for label, there in folders.items())
    more = len(common) - PHOTOGRAPHS
    return body + (paragraph(f"and {more} more photographs, in the folder attention of each run", "note")
                   if more > 0 else "")


def _png(subject: Subject, path: epath.Path, description: str, caption: str) -> str:
    try:
        return picture(io.read(path) or b"", description, caption)
    except ValueError as error:
        subject.missing.append(f"{path} is left out: {error}")
        return ""


def robustness(subject: Subject) -> str:
    """Errors under corruptions, and accuracies under attack and occlusion."""
    body = ""
    for kind in ("corruptions", "attack", "occlusion"):
        if not (scores := _mean_by_arm(subject, kind)):
            subject.missing.append(f"robustness: no metrics of an evaluator {kind!r}, neither at the last step nor in "
                                   "a metrics.csv below the runs")
            continue
        panels = {heading: {label: pick(found, pattern) for label, found in scores.items()}
                  for heading, pattern in _panels(kind, scores)}
        if panels:
            body += picture(draw_bars(panels), f"{kind}: {', '.join(panels)}")
        for heading, panel in panels.items():
            groups = list(dict.fromkeys(group for found in panel.values() for group in found))
            body += table([(heading, *groups), *((label, *(number(found.get(group)) for group in groups))
                                                 for label, found in panel.items())])
        whole = [name for name in next(iter(scores.values())) if re.fullmatch(WHOLE, name)]
        if whole:
            rows = [(name, *(number(found.get(name)) for found in scores.values())) for name in whole]
            body += table([("metric", *scores), *rows], f"{kind}: over all of them, or of images as they are")
    return body


def _panels(kind: str, scores: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """What is shown of one kind: a heading, and the names of the metrics, of which a group is that of the bar."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    if kind == "corruptions":
        found = [("error by severity", r"severity_(\d+)/error"), ("error by corruption", CORRUPTION)]
        return [(heading, pattern) for heading, pattern in found if any(pick(scores[one], pattern) for one in scores)]
    words, way, group = WAYS[kind]
    ways = dict.fromkeys(match[1] for name in names if (match := re.search(way, name)))
    return [(f"{one}: top-1 accuracy by {'tiles a side' if one == 'shuffle' else words}",
             f"{re.escape(one)}/{group}/prec@1") for one in ways]


def _mean_by_arm(subject: Subject, kind: str) -> dict[str, dict[str, float]]:
    found = {subject.name(arm): mean_scores([scores_of(run, kind, subject.missing) for run in arm.runs.values()])
             for arm in subject.arms}
    return {label: scores for label, scores in found.items() if scores}


def calibration(subject: Subject) -> str:
    """Whether the models are as sure as they are right."""
    found = _read(subject, "reliability.csv", lambda text: read_table(text, RELIABILITY))
    scores = _mean_by_arm(subject, "calibration")
    if not found and not scores:
        subject.missing.append("calibration: no reliability.csv below the runs; the evaluator calibration writes it")
        return ""
    drawn, listed = [], ""
    for bins, words in BINS.items():
        try:
            lines = {label: {float(row["confidence"]): float(row["accuracy"]) for row in rows
                             if row["bins"] == bins and row["confidence"] and row["accuracy"]}
                     for label, (_, rows) in found.items()}
            lines = {label: dict(sorted(line.items())) for label, line in lines.items() if line}
            tabled = [_reliability_table(label, words, [row for row in rows if row["bins"] == bins])
                      for label, (_, rows) in found.items()]
        except ValueError as error:
            subject.missing.append(f"calibration: reliability.csv cannot be read ({error})")
            continue
        if lines:
            drawn.append(picture(draw_reliability(lines, words), f"accuracy over confidence, {words}"))
            listed += "".join(tabled)
    summary = ""
    if scores:
        names = dict.fromkeys(name for one in scores.values() for name in one)
        summary = table([("metric", *scores), *((name, *(number(one.get(name)) for one in scores.values()))
                                                for name in names)], "mean over the seeds of each arm")
    note = paragraph(_from(found), "note") if _from(found) else ""
    return side_by_side(drawn) + note + summary + listed


def _reliability_table(label: str, words: str, rows: Rows) -> str:
    listed = [[row[name] if name == "examples" else number(float(row[name] or "nan")) for name in RELIABILITY[1:]]
              for row in rows]
    return table([("from", "to", *RELIABILITY[3:]), *listed], f"{label}, {words}", left=0)


def mistakes(subject: Subject) -> str:
    """What is taken for what."""
    body = ""
    for label, run, path in _of_arms(subject, r"confusion\.png"):
        figures = [_png(subject, path, f"confusion matrix of {label}", f"{label}: from {run.name}")]
        if io.exists(worst := path.parent / "most_wrong.png"):
            figures.append(_png(subject, worst, f"the most wrong images of {label}", f"{label}: the most wrong"))
        body += "".join(figures) + _worst_classes(subject, label, path.parent / "per_class.csv")
    if not body:
        subject.missing.append("mistakes: no confusion.png below the runs; the evaluator mistakes writes it")
    return body


def _worst_classes(subject: Subject, label: str, path: epath.Path) -> str:
    if not io.exists(path):
        return ""
    try:
        columns = ("class", "examples", "correct", "accuracy", "most confused with", "times")
        rows = sorted((row for row in read_table(read_text(path), columns) if row["accuracy"]),
                      key=lambda row: float(row["accuracy"]))[:WORST]
    except ValueError as error:
        subject.missing.append(f"{path} is left out: it {error}")
        return ""
    return table([columns, *(tuple(row.values()) for row in rows)], f"{label}: the classes it finds hardest")
