"""The density of attention as a table, `density.csv`, and as a picture: by block, for one model or several."""
from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cb_vit.monitor.panels import Kind, label_ends, style
from cb_vit.monitor.style import FAINT, INK, Look, plain, short, to_png

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
MARKERS = "os^Dv<P>"  # one a model, so that they are told apart without colours
HEADINGS = {  # of the panels, by measure
    "entropy": "entropy, nats", "entropy_normalised": "entropy / ln N", "effective_tokens": "effective tokens",
    "top_k_mass": "mass of the k strongest keys", "distance_from_uniform": "distance from uniform",
    "attention_distance": "attention distance, pixels", "rank": "rank of the map", "jacobian": "‖∂p/∂z‖² of softmax"}
REFERENCES = {  # heights of lines, by measure, for N keys
    "entropy": {"uniform": math.log, "one-hot": lambda n: 0},
    "entropy_normalised": {"uniform": lambda n: 1, "one-hot": lambda n: 0},
    "effective_tokens": {"uniform": float, "one-hot": lambda n: 1}, "top_k_mass": {"one-hot": lambda n: 1},
    "distance_from_uniform": {"uniform": lambda n: 0, "one-hot": lambda n: 1 - 1 / n},
    "rank": {"uniform": lambda n: 1}, "jacobian": {"uniform": lambda n: (n - 1) / n**2, "one-hot": lambda n: 0}}


class Row(NamedTuple):
    """A row of `density.csv`: one measure of one block and head, over the images.

    Attributes:
        block: number of the block, from 0.
        head: number of the head, from 0, or "all": of each image the mean over heads.
        queries: the tokens that attend: "all", "patches", or "prefix", those before the patches.
        keys: the tokens among which attention is shared out: "all" or "patches".
        measure: its name.
        mean, std, q05, q25, q50, q75, q95: over images; NaN: it is not defined for any.
    """

    block: int
    head: str
    queries: str
    keys: str
    measure: str
    mean: float
    std: float
    q05: float
    q25: float
    q50: float
    q75: float
    q95: float


WORDS = Row._fields.index("mean")  # columns before the numbers
LARGEST = 1e9  # magnitude that no measure reaches: pixels and tokens are fewer
DIGITS = 3  # of the number of a block


def as_csv(rows: Iterable[Row]) -> str:
    """The rows as a table; a number that is not defined is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows([*row[:WORDS], *(f"{x:.7g}" if math.isfinite(x) else "" for x in row[WORDS:])] for row in rows)
    return text.getvalue()


def read_density(text: str) -> list[Row]:
    """The rows of a `density.csv`.

    Raises:
        ValueError: it is none; names the line, as in "is no density.csv (line 1: …)".
    """
    lines = csv.reader(io.StringIO(text), strict=True)
    rows: list[Row] = []
    try:
        if tuple(next(lines, ())) != Row._fields:
            raise ValueError(f"its columns are not {', '.join(Row._fields)}")
        for line in lines:
            block, head, *words = line[:WORDS]
            numbers = [float(cell or "nan") for cell in line[WORDS:]]
            numbered = block.isdecimal() and len(block) <= DIGITS and (head == "all" or head.isdecimal())
            good = numbered and len(line) == len(Row._fields)
            if not good or any(abs(number) > LARGEST for number in numbers):
                raise ValueError(f"it is {','.join(line):.100}")
            rows.append(Row(int(block), head, *words, *numbers))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"is no density.csv (line {lines.line_num}: {error})") from None
    return rows


def pick(rows: Iterable[Row], measure: str, heads: bool = False, queries: str = "all", keys: str = "all") -> list[Row]:
    """The rows of one measure, of the mean over heads or of the single ones; distances are of patches alone."""
    if measure == "attention_distance":
        queries = keys = "patches"
    return [row for row in rows if (row.measure, row.queries, row.keys) == (measure, queries, keys)
            and (row.head != "all") == heads and math.isfinite(row.mean)]


def number_of_keys(rows: Iterable[Row]) -> int | None:
    """How many tokens there are, as entropy / ln N tells; None: there is no entropy."""
    shares = {row.block: row.mean for row in pick(rows, "entropy_normalised") if row.mean > 0}
    logs = [row.mean / shares[row.block] for row in pick(rows, "entropy") if row.block in shares]
    return round(math.exp(min(np.median(logs), math.log(LARGEST)))) if logs else None


def draw_density(runs: Mapping[str, Sequence[Row]], title: str = "") -> bytes:
    """Every measure by block as a PNG: the mean over heads as a line, heads as faint marks, their range as a band.

    Lines say where uniform and one-hot attention lie.

    Args:
        runs: rows of each model, by its name.
        title: text above the panels.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter
    measures = [name for name in HEADINGS if any(pick(rows, name) for rows in runs.values())]
    columns = max(1, -(-len(measures) // 2))
    figure = Figure(figsize=(3.9 * columns, 6.9), dpi=110, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.03)
    axes = figure.subplots(2, columns, squeeze=False)
    sizes = sorted({size for rows in runs.values() if (size := number_of_keys(rows))})
    for ax, name in zip(axes.flat, measures, strict=False):
        for index, rows in enumerate(runs.values()):
            draw_blocks(ax, rows, name, index)
        style(ax, HEADINGS[name], Kind("{:.3g}".format))
        means = [row.mean for rows in runs.values() for heads in (False, True) for row in pick(rows, name, heads)]
        if name in ("effective_tokens", "rank") and max(means) > 10 * max(min(means), 1e-6):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        draw_references(ax, REFERENCES.get(name, {}), sizes)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("block", color=FAINT, fontsize=9, loc="right")
    for ax in axes.flat[len(measures):]:
        ax.set_axis_off()
    names, looks = short(runs, 40), [Look.number(index) for index in range(len(runs))]
    lines = [Line2D([], [], color=look.colour, ls=look.dash, lw=1.6, marker=MARKERS[index % len(MARKERS)], ms=5)
             for index, look in enumerate(looks)]
    figure.legend(lines, [plain(names[run]) for run in runs], loc="outside lower left", ncols=columns, frameon=False,
                  fontsize=9, labelcolor=INK, handlelength=4)
    title = f"{title}; " * bool(title) + "line: mean over heads; dots: heads; band: their range"
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    return to_png(figure)


def draw_blocks(ax: Any, rows: Sequence[Row], measure: str, index: int) -> None:
    """One model's curve in one panel.

    Args:
        ax: the panel.
        rows: rows of the model.
        measure: name of the measure.
        index: number of the model, which says how it looks.
    """
    look, marker = Look.number(index), MARKERS[index % len(MARKERS)]
    line, heads = pick(rows, measure), pick(rows, measure, heads=True)
    blocks, means = (np.array([row[at] for row in line], float) for at in (0, WORDS))
    by_number: dict[int, list[float]] = {}
    for row in heads:
        by_number.setdefault(row.block, []).append(row.mean)
    single = [by_number.get(int(block), [mean]) for block, mean in zip(blocks, means, strict=True)]
    ax.fill_between(blocks, [*map(min, single)], [*map(max, single)], color=look.colour, alpha=0.13, lw=0)
    ax.plot([row.block for row in heads], [row.mean for row in heads], marker, color=look.colour, ms=2.6, alpha=0.35,
            mew=0)
    ax.plot(blocks, means, color=look.colour, ls=look.dash, lw=1.6, marker=marker, ms=4)


def draw_references(ax: Any, lines: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Lines across a panel, and right of it what they are.

    Args:
        ax: the panel.
        lines: functions from the number of keys to the height of a line, by their words.
        sizes: numbers of keys of the models.
    """
    heights = {(words, float(height(size))): size for words, height in lines.items() for size in sizes}
    ends = []
    for (words, height), size in heights.items():
        several = sum(other == words for other, _ in heights) > 1
        ax.axhline(height, color=FAINT, lw=0.9, ls=(0, (1, 2)), zorder=1)
        ends.append((f"{words}, N={size}" if several else words, height, FAINT))
    label_ends(ax, ends)
