"""The panels that pictures of metrics are made of: how each kind of metric is drawn, its axes, its labels."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cb_vit.monitor.style import FAINT, GRID, INK, RAW, Look
from cb_vit.records import Series

LONG = 60  # values of a noisy curve from which on it is drawn smoothed
FEW = 12  # values up to which each has a point of its own: they would not show as lines
LARGEST = 1e100  # magnitude up to which values are drawn: matplotlib's arithmetic overflows before float64 does
RING = "\u25cb"  # of a best value, on the curve and in words


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a metric is drawn.

    Attributes:
        text: function from a value to its words.
        noisy: whether a long curve is smoothed.
        log: whether the axis may be logarithmic.
        best: function that picks the index of the best of some values, which is marked; None: none is.
    """

    text: Callable[[float], str] = "{:.4g}".format
    noisy: bool = True
    log: bool = False
    best: Callable[[np.ndarray], Any] | None = None


KINDS = (  # by the whole name; the first match wins
    (r"(.*/)?prec@\d+", Kind("{:.1%}".format, noisy=False, best=np.nanargmax)),
    (r"(.*/)?error", Kind("{:.1%}".format, noisy=False, best=np.nanargmin)),
    (r"(.*/)?loss", Kind("{:#.3g}".format, noisy=False, log=True, best=np.nanargmin)),
    (r"training_loss|l2_.*", Kind("{:#.3g}".format, log=True)),
    (r"lr(/.*)?", Kind("{:.2g}".format, noisy=False)),
    (r"img/sec.*", Kind(lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}")),
    (r"data_wait|mfu", Kind("{:.1%}".format)),
    (r".*", Kind()))


def kind_of(name: str) -> Kind:
    """How the metric of this name is drawn."""
    return next(kind for names, kind in KINDS if re.fullmatch(names, name, re.DOTALL))


def thousands(value: float) -> str:
    """A number to read: "12 500"."""
    return f"{value:,.6g}".replace(",", "\u2009") if abs(value) < 1e6 else f"{value:,.0f}".replace(",", "\u2009")


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """A figure and its panels, `[rows, columns]`, whose steps are on one scale; sizes in inches, of one panel."""
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    made = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained", facecolor="white")
    made.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
    return made, made.subplots(rows, columns, sharex=True, squeeze=False)


def draw_curve(ax: Any, curve: Series, look: Look, kind: Kind, raw: bool = True) -> tuple[float, str] | None:
    """Draw the curve, and where it is noisy and long a smoothed one over it.

    Args:
        ax: the panel.
        curve: steps and values; NaN leaves a gap, and so does what is as good as infinite.
        look: how it is to look.
        kind: kind of the metric.
        raw: whether the curve itself shows under the smoothed one, in grey.

    Returns:
        The height at which it ends, and that in words with the best value if that is another; None: it has no value.
    """
    steps, values = curve
    finite = np.abs(values) <= LARGEST  # false for NaN
    if not finite.any():
        return None
    values = np.where(finite, values, np.nan)
    if kind.noisy and len(values) > LONG:
        if raw:
            ax.plot(steps, values, color=RAW, lw=0.7, zorder=1.5)
        values = running_mean(values, max(len(values) // 40, 5))
    ax.plot(steps, values, color=look.colour, ls=look.dash, lw=1.6, marker="o" if len(values) <= FEW else None, ms=3.5,
            clip_on=False)
    end = float(values[finite][-1])
    text = kind.text(end)
    if kind.best:
        best = kind.best(values)
        ax.plot(steps[best], values[best], "o", ms=8, mfc="none", mec=look.colour, mew=1.4, clip_on=False)
        if (words := kind.text(values[best])) != text:
            text += f"  {RING} {words}"
    return end, text


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a centred window; NaN stays where it is."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    # Divided by the number of finite values in the window, so that neither a gap nor an end pulls the mean to 0.
    total = np.convolve(np.where(finite, values, 0), kernel, mode="same")
    return np.where(finite, total / np.maximum(np.convolve(finite, kernel, mode="same"), 1), np.nan)


def style(ax: Any, heading: str, kind: Kind, pad: float = 7) -> None:
    """The heading, grid and heights of a panel in which all curves are drawn; `pad` is points above it."""
    from matplotlib.ticker import NullFormatter
    ax.set_title(heading, loc="left", fontsize=10, fontweight="bold", color=INK, y=1, pad=pad)
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0, colors=FAINT, labelsize=8)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    if not ax.lines:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=FAINT, fontsize=9)
        return
    low, high = ax.dataLim.intervaly
    # Where the values span so much, nearly all of the curve would lie at the bottom of a linear axis.
    if kind.log and 0 < 30 * low < high:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    percent = kind.text(1).endswith("%")
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g}%" if percent else thousands(y))


def step_axis(ax: Any, last: int) -> None:
    """Steps from 0 to `last`, at whole numbers."""
    from matplotlib.ticker import MaxNLocator
    ax.set_xlim(0, max(last, 1))
    ax.set_xlabel("step", color=FAINT, fontsize=9, loc="right")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 5, 10)))
    ax.xaxis.set_major_formatter(lambda x, _: thousands(x))


def label_ends(ax: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write `(text, height, colour)` right of the panel at that height, pushed apart where they would touch."""
    ax.autoscale_view()  # limits are set lazily, and the transform would use the old ones
    to_axes = ax.transScale + ax.transLimits
    ends = sorted((to_axes.transform((0, height))[1], text, colour) for text, height, colour in ends)
    gap, places = 0.065, []
    for wanted, *_ in ends:  # upwards, then back down from the top of the panel
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    limit = 0.98
    for index in reversed(range(len(places))):
        places[index] = limit = min(places[index], limit)
        limit -= gap
    for place, (_, text, colour) in zip(places, ends, strict=True):
        ax.text(1.025, place, text, transform=ax.transAxes, va="center", color=colour, fontsize=8.5)
