"""Pictures of a report: arms and their differences, bars and reliability; told apart in grey as well."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cb_vit.analysis.comparison import Comparison
from cb_vit.monitor.style import FAINT, GRID, INK, PALETTE, Look, plain, short, to_png

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
Lines = Mapping[str, Mapping[float, float]]  # value at each place, by the name of what is drawn


def _figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Any, np.ndarray]:
    """A figure and its panels [rows x columns]; sizes in inches, of one panel."""
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    made = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained", facecolor="white")
    made.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.05)
    return made, made.subplots(rows, columns, squeeze=False)


def _style(ax: Any, heading: str, grid: str = "y") -> None:
    ax.set_title(plain(heading), loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.grid(axis=grid, color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0, colors=INK, labelsize=8.5)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def draw_comparison(comparison: Comparison) -> bytes:
    """The runs of each arm, and each arm's difference to its baseline with its interval, as a PNG."""
    scores, differences = comparison.primary.scores, comparison.primary.differences
    rows = max(len(scores), len(differences))
    figure, axes = _figure(1 + bool(differences), 5.4, 1.1 + 0.42 * rows)
    names = short([one.arm for one in scores], 40)
    ax = axes[0, 0]
    for row, one in enumerate(scores):
        ax.plot(one.values, [row] * len(one.values), ls="", marker=MARKERS[row % len(MARKERS)], ms=6, mfc="none",
                mec=PALETTE[row % len(PALETTE)], mew=1.3)
        ax.plot([one.mean] * 2, [row - 0.28, row + 0.28], color=INK, lw=2.2)
    _style(ax, f"{comparison.primary.metric}: runs, and their mean (bar)", "x")
    _rows(ax, [names[one.arm] for one in scores])
    if differences:
        ax = axes[0, 1]
        ax.axvline(0, color=FAINT, lw=1.2, ls=(0, (4, 2)))
        for row, one in enumerate(differences):
            if one.interval:
                ax.plot(one.interval, [row] * 2, color=INK, lw=2.2, solid_capstyle="butt")
            ax.plot(one.values, [row + 0.22] * len(one.values), ls="", marker="|", ms=7, color=FAINT)
            ax.plot([one.mean], [row], "o", ms=7, color=INK)
        level = f"{100 * comparison.level:.4g} %"
        _style(ax, f"difference to the baseline, {level} interval (ticks: pairs)", "x")
        _rows(ax, [names[one.arm] for one in differences])
    return to_png(figure)


def _rows(ax: Any, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """A panel for each heading, groups of bars by name, as a PNG.

    Args:
        panels: by heading, the height of each bar by the name of the group within the name of what is drawn.
    """
    from matplotlib.patches import Patch
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    figure, axes = _figure(1, 10.8, 2.9, len(panels))
    for ax, (heading, bars) in zip(axes.flat, panels.items(), strict=True):
        groups = list(dict.fromkeys(group for heights in bars.values() for group in heights))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            heights = [bars.get(name, {}).get(group, math.nan) for group in groups]
            places = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
            ax.bar(places, heights, width * 0.9, color=_fill(number), edgecolor=INK, lw=0.6,
                   hatch=HATCHES[number % len(HATCHES)])
        _style(ax, heading)
        turned = max(map(len, groups)) * len(groups) > 90
        ax.set_xticks(range(len(groups)), [plain(group) for group in groups], rotation=35 * turned,
                      ha="right" if turned else "center")
        ax.set_xlim(-0.6, len(groups) - 0.4)
    shown = short(names, 40)
    boxes = [Patch(fc=_fill(at), ec=INK, hatch=HATCHES[at % len(HATCHES)]) for at in range(len(names))]
    figure.legend(boxes, [plain(shown[name]) for name in names], loc="outside lower left", ncols=4, frameon=False,
                  fontsize=9)
    return to_png(figure)


def _fill(number: int) -> str:
    return ("#c9d6e2", "#8fa9c0", "#e6d3c4", "#b5cdbd", "#d8cbe0", "#e3d9b5", "#bcd9dd", "#e0bccb")[number % 8]


def draw_reliability(lines: Lines, heading: str) -> bytes:
    """Accuracy over confidence of each name, with the line of those who know what they know, as a PNG."""
    figure, axes = _figure(1, 5.4, 4.6)
    ax, names = axes[0, 0], list(lines)
    ax.plot([0, 1], [0, 1], color=FAINT, lw=1.2, ls=(0, (4, 2)))
    for name, line in lines.items():
        look, marker = _look(names, name)
        ax.plot(list(line), list(line.values()), color=look.colour, ls=look.dash, marker=marker, ms=5, lw=1.5)
    _style(ax, heading, "both")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02))
    ax.set_xlabel("confidence", color=FAINT, fontsize=9, loc="right")
    ax.set_ylabel("accuracy", color=FAINT, fontsize=9, loc="top")
    _legend(figure, names)
    return to_png(figure)


def _look(names: Sequence[str], name: str) -> tuple[Look, str]:
    number = names.index(name)
    return Look.number(number), MARKERS[number % len(MARKERS)]


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    shown, looks = short(names, 40), [_look(names, name) for name in names]
    lines = [Line2D([], [], color=look.colour, ls=look.dash, marker=marker, lw=1.5) for look, marker in looks]
    figure.legend(lines, [plain(shown[name]) for name in names], loc="outside lower left", ncols=3, frameon=False,
                  fontsize=9, labelcolor=INK, handlelength=3.5)
