"""A comparison in words: as lines for a terminal, as CSV, as a table for LaTeX."""
from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from cb_vit.analysis import statistics
from cb_vit.analysis.comparison import Comparison, Difference, Result
from cb_vit.texts import printable

CHOSEN = {
    "sweep": "named in sweep.json before the first run began",
    "given": "named on the command line; whether before the runs were seen, only you know",
    "only": "the only one that all runs have",
    "against": "EXPLORATORY: the sweep had named another before it began, so its p proves nothing"}
MOST = 12  # other metrics that a terminal shows
_LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#",
          "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}


def number(value: float | None, sign: bool = False) -> str:
    """A number to read; a dash where there is none."""
    if value is None or value != value:
        return "\u2014"
    value = 0.0 if abs(value) < 1e-12 else value  # rounding's
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:+.4f}" if plain and sign else f"{value:.4f}" if plain else f"{value:{'+' * sign}.3g}"


def lines(comparison: Comparison) -> Iterator[str]:
    """The comparison as a terminal shows it."""
    yield f"metric  {heading(comparison)}"
    yield ""
    yield from table(score_rows(comparison))
    if comparison.primary.differences:
        yield ""
        yield from table(difference_rows(comparison.primary))
    yield ""
    yield from (f"* {note}" for note in notes(comparison))
    if comparison.exploratory:
        yield ""
        yield "exploratory: other metrics, not chosen beforehand, so not tested"
        yield from table(exploratory_rows(comparison, MOST))
        if (more := len(comparison.exploratory) - MOST) > 0:
            yield f"and {more} more metrics; --csv has them all"


def heading(comparison: Comparison) -> str:
    """The metric that is tested, in a line."""
    better = "higher" if comparison.higher_is_better else "lower"
    return (f"{comparison.primary.metric}, {better} is better; at the last step of each run, not the best on the way; "
            f"{CHOSEN[comparison.chosen]}")


def score_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each arm, under a heading."""
    rows = [("arm", "runs", "mean", "std", "seeds and values")]
    for scores in comparison.primary.scores:
        mark = "  (baseline)" * (scores.arm in comparison.baselines)
        values = "  ".join(f"{seed}: {number(value)}" for seed, value in zip(scores.seeds, scores.values, strict=True))
        rows.append((scores.arm + mark, str(len(scores.values)), number(scores.mean), number(scores.std), values))
    return rows


def difference_rows(result: Result) -> list[tuple[str, ...]]:
    """A row for each difference, under a heading."""
    level = f"{100 * result.differences[0].level:.4g} % interval"
    rows = [("difference", "pairs", "mean", level, "p", "p (Holm)")]
    for one in result.differences:
        rows.append((f"{one.arm} \u2212 {one.baseline}", str(len(one.values)), number(one.mean, sign=True),
                     interval(one), number(one.p), number(one.p_holm)))
    return rows


def interval(one: Difference) -> str:
    """The interval of a difference, in brackets."""
    ends = one.interval
    return "[{}, {}]".format(*(number(end, sign=True) for end in ends)) if ends else "\u2014"


def exploratory_rows(comparison: Comparison, most: int | None = None) -> list[tuple[str, ...]]:
    """A row for each arm and other metric, under a heading."""
    rows = [("metric", "arm", "mean", "std", "difference")]
    for result in comparison.exploratory[:most]:
        differences = {one.arm: one for one in result.differences}
        for index, scores in enumerate(result.scores):
            one = differences.get(scores.arm)
            rows.append((result.metric if index == 0 else "", scores.arm, number(scores.mean), number(scores.std),
                         number(one and one.mean, sign=True) if one else ""))
    return rows


def notes(comparison: Comparison) -> Iterator[str]:
    """What is to be known of the numbers, in sentences."""
    yield from comparison.notes
    differences = comparison.primary.differences
    if len(comparison.primary.scores) == 1:
        yield "there is one arm, so nothing to compare it with"
    elif not differences:
        yield "no arm is named as the one to compare with, so nothing is tested; --baseline=NAME=VALUE names it"
    for one in differences:
        if len(one.factors) > 1:
            yield (f"{one.arm} and {one.baseline} differ in more than one thing ({', '.join(one.factors)}): their "
                   "difference cannot be put down to one of them")
        if len(one.values) < 2:
            yield (f"{one.arm} has pairs with {one.baseline}: {len(one.values)}, so no spread, and neither interval "
                   "nor test")
    tested = [one for one in differences if one.p is not None]
    if tested:
        yield (f"interval: Student's t at {100 * comparison.level:.4g} % on the differences paired by seed, each by "
               "itself; it takes them to be about normal")
    for pairs in sorted({len(one.values) for one in tested}):
        how = (f"all 2^{pairs} flips" if pairs <= statistics.EXACT else
               f"{statistics.DRAWS:,} drawn flips (seed {statistics.SEED}, add-one rule)")
        yield (f"p of {pairs} pairs: two-sided, of {how} of the signs of the differences; none is below "
               f"{statistics.smallest_p(pairs):.4g}, whatever the runs say")
    if len(tested) > 1:
        least = len(tested) * min(statistics.smallest_p(len(one.values)) for one in tested)
        yield f"p (Holm): adjusted for {len(tested)} comparisons; the smallest of them is not below {min(1, least):.4g}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in columns, numbers to the right: names are in the first column, and in those that are no numbers."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, len(widths) - 1} if rows[0][-1] == "seeds and values" else {0, 1} if rows[0][1] == "arm" else {0}
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" if at in left else f"{cell:>{width}}"
                        for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()


def as_csv(comparison: Comparison) -> str:
    """Everything, a line for each metric and arm; what there is not is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("metric", "role", "arm", "baseline", "runs", "mean", "std", "pairs", "difference", "low", "high",
                     "level", "p", "p_holm"))
    role = "exploratory" if comparison.chosen == "against" else "primary"
    for result, said in ((comparison.primary, role), *((one, "exploratory") for one in comparison.exploratory)):
        differences = {one.arm: one for one in result.differences}
        for scores in result.scores:
            row = [printable(result.metric), said, printable(scores.arm)]
            numbers = [len(scores.values), scores.mean, scores.std]
            if one := differences.get(scores.arm):
                compared = [len(one.values), one.mean, *(one.interval or (None, None)), one.level, one.p, one.p_holm]
                writer.writerow([*row, printable(one.baseline), *map(_cell, [*numbers, *compared])])
            else:
                writer.writerow([*row, "", *map(_cell, numbers), *[""] * 7])
    return file.getvalue()


def _cell(value: float | None) -> str | float:
    return "" if value is None or value != value else value


def as_latex(comparison: Comparison) -> str:
    """The metric that is tested as a table for LaTeX, with booktabs; what is to be known of it as comments."""
    differences = {one.arm: one for one in comparison.primary.differences}
    head = ["arm", "runs", "mean", "std.\\ dev."]
    if differences:
        head += ["difference", rf"{100 * comparison.level:.4g}\,\% interval", "$p$", "$p$ (Holm)"]
    comments = [f"% {printable(text)}" for text in (heading(comparison), *notes(comparison))]
    body = []
    for scores in comparison.primary.scores:
        cells = [latex(scores.arm), str(len(scores.values)), _maths(number(scores.mean)), _maths(number(scores.std))]
        if differences:
            one = differences.get(scores.arm)
            cells += [*map(_maths, (number(one.mean, sign=True), interval(one), number(one.p), number(one.p_holm)))] \
                if one else ["baseline", "", "", ""]
        body.append(" & ".join(cells) + r" \\")
    return "\n".join([*comments, rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule",
                      " & ".join(head) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Words of others as LaTeX prints them."""
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


def _maths(text: str) -> str:
    text = re.sub(r"e([+-])0*(\d+)", lambda found: rf" \times 10^{{{found[1].replace('+', '')}{found[2]}}}", text)
    return "--" if text == "\u2014" else f"${text}$"
