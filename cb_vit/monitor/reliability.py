"""Reliability diagrams: how often predictions of each confidence are right. Drawn by matplotlib."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cb_vit.monitor.style import FAINT, GRID, INK, PALETTE, RAW, plain, to_png

HEADINGS = {"width": "bins of equal width", "mass": "bins of equally many examples"}


class Bin(NamedTuple):
    """Examples whose confidence is alike.

    Attributes:
        low: where the bin begins.
        high: where it ends.
        examples: number of examples.
        confidence: mean probability of the predicted class; NaN without examples.
        accuracy: share of the examples whose predicted class is right; NaN without examples.
    """

    low: float
    high: float
    examples: int
    confidence: float
    accuracy: float

    @classmethod
    def of(cls, confidence: np.ndarray, right: np.ndarray, low: float, high: float) -> Bin:
        """The bin of these examples, [n] each."""
        means = (float(np.mean(x)) if len(confidence) else float("nan") for x in (confidence, right))
        return cls(float(low), float(high), len(confidence), *means)


def draw_reliability(models: Mapping[str, Mapping[str, Sequence[Bin]]], title: str) -> bytes:
    """Accuracy by confidence, and below it the number of examples, as a PNG.

    Args:
        models: by what they are called, one or two models' bins by kind, "width" and "mass".
        title: text above.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    columns = [(name, kind, bins) for name, kinds in models.items() for kind, bins in kinds.items()]
    figure = Figure(figsize=(3.5 * len(columns), 4.9), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    for (above, below), (name, kind, bins) in zip(axes.T, columns, strict=True):
        bins = [one for one in bins if one.examples]
        above.set_title(f"{plain(name)}\n{HEADINGS[kind]}\n{_error(bins)}", loc="left", fontsize=9, color=INK)
        _diagram(above, bins)
        _bars(below, bins, [one.examples for one in bins], PALETTE[0])
        for ax in (above, below):
            ax.grid(color=GRID, lw=0.8)
            ax.set_axisbelow(True)
            ax.tick_params(length=0, colors=FAINT, labelsize=8)
            for side, spine in ax.spines.items():
                spine.set_visible(side == "bottom")
                spine.set_color(FAINT)
        below.set_xlabel("confidence", color=FAINT, fontsize=9)
    axes[0, 0].set(xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel("accuracy", color=FAINT, fontsize=9)
    axes[1, 0].set_ylabel("examples", color=FAINT, fontsize=9)
    axes[0, 0].legend(loc="upper left", fontsize=8, frameon=False, labelcolor=INK)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    return to_png(figure)


def _diagram(ax: Any, bins: Sequence[Bin]) -> None:
    ax.plot([0, 1], [0, 1], color=INK, lw=1, ls=(0, (4, 3)), zorder=4)
    _bars(ax, bins, [one.accuracy for one in bins], PALETTE[0], label="accuracy")
    for number, one in enumerate(bins):
        left, width = _extent(one)
        ax.bar(left, one.confidence - one.accuracy, width, one.accuracy, align="edge", color="none", hatch="////",
               edgecolor=PALETTE[1], lw=0.8, zorder=3, label=None if number else "gap to confidence")


def _bars(ax: Any, bins: Sequence[Bin], heights: Sequence[float], colour: str, label: str | None = None) -> None:
    lefts, widths = zip(*map(_extent, bins), strict=True) if bins else ((), ())
    ax.bar(lefts, heights, widths, align="edge", color=RAW, edgecolor=colour, lw=0.9, zorder=2, label=label)


def _extent(one: Bin) -> tuple[float, float]:
    """Left end and width: a bin of nearly one confidence is drawn wide enough to be seen."""
    width = max(one.high - one.low, 0.006)
    return min(one.low, 1 - width), width


def _error(bins: Sequence[Bin]) -> str:
    total = sum(one.examples for one in bins)
    if not total:
        return "no example"
    return f"ECE {sum(one.examples * abs(one.accuracy - one.confidence) for one in bins) / total:.2%}"
