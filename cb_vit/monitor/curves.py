"""Training curves as a picture: what one looks at before reading `metrics.jsonl`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cb_vit.monitor.style import FAINT, GRID, INK, PALETTE, to_png
from cb_vit.records import Series


def draw_curves(history: Mapping[str, Series], title: str = "") -> bytes:
    """The training curves as a PNG: losses, accuracies, learning rate, gradient norm over steps and epochs.

    A noisy curve is drawn faintly under its running mean; every line carries its name and the height of its end.

    Args:
        history: `(steps, values)` of each metric, by its name; NaN leaves a gap.
        title: text above the panels, before the step reached.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    evals = sorted({name.rpartition("/")[0] for name in history if name.endswith(("/loss", "/prec@1"))})
    colours = {"train": INK, "": INK} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(evals)}
    panels = (  # heading, metric by label, format of the line's end, of the axis
        ("loss", {"train": "training_loss"} | {e: f"{e}/loss" for e in evals}, "{:#.3g}", "{:.4g}"),
        ("top-1 accuracy", {e: f"{e}/prec@1" for e in evals}, "{:.1%}", "percent"),
        ("learning rate", {"": "lr"}, "{:.2g}", "{:.4g}"),
        ("gradient norm", {"": "l2_grads"}, "{:#.3g}", "{:.4g}"),
    )
    last = max((int(steps[-1]) for steps, _ in history.values() if len(steps)), default=0)
    epochs = [(s, e) for s, e in zip(*history.get("epoch", ((), ())), strict=True) if s > 0 and e > 0]
    figure = Figure(figsize=(11.5, 7), dpi=120, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
    axes = figure.subplots(2, 2, sharex=True)
    for ax, (heading, names, end_format, tick_format) in zip(axes.flat, panels, strict=True):
        curves = {label: history[name] for label, name in names.items() if name in history}
        heights = {label: _draw_curve(ax, curve, colours[label], smooth=heading != "learning rate")
                   for label, curve in curves.items()}
        ends = [(f"{label} {end_format.format(height)}".strip(), height, colours[label])
                for label, height in heights.items() if height is not None]
        _style(ax, heading, tick_format, empty=not ends)
        ax.set_title(heading, loc="left", fontsize=10, fontweight="bold", color=INK, y=1,
                     pad=20 if epochs and ax in axes[0] else 7)
        _label_ends(ax, ends)
    for ax in axes[0] if epochs else ():
        _epoch_axis(ax, steps_per_epoch=epochs[-1][0] / epochs[-1][1])
    for ax in axes[1]:
        ax.set_xlim(0, max(last, 1))
        ax.set_xlabel("step", color=FAINT, fontsize=9, loc="right")
        ax.xaxis.set_major_formatter(lambda x, _: _thousands(x))
    reached = [f"step {_thousands(last)}"] + ([f"epoch {epochs[-1][1]:.1f}"] if epochs else [])
    figure.suptitle("  \u00b7  ".join(filter(None, [title, *reached])), x=0.01, ha="left", fontsize=11, color=INK)
    return to_png(figure)


def _thousands(value: float) -> str:
    return f"{value:,.6g}".replace(",", "\u2009") if abs(value) < 1e6 else f"{value:,.0f}".replace(",", "\u2009")


def _draw_curve(ax: Any, curve: Series, colour: str, smooth: bool) -> float | None:
    """Draw the curve; returns the height at which it ends, None where it has no finite value."""
    steps, values = curve
    finite = np.isfinite(values)
    if not finite.any():
        return None
    values = np.where(finite, values, np.nan)
    if smooth and len(values) > 200:
        ax.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
        values = _running_mean(values, len(values) // 60)
    few = len(values) <= 30  # points of their own, which would not show as lines
    ax.plot(steps, values, color=colour, lw=1.6, marker="o" if few else None, ms=3.5, clip_on=False)
    return float(values[finite][-1])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a centred window; NaN stays where it is."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    # Divided by the number of finite values in the window, so that neither a gap nor an end pulls the mean to 0.
    total = np.convolve(np.where(finite, values, 0), kernel, mode="same")
    return np.where(finite, total / np.maximum(np.convolve(finite, kernel, mode="same"), 1), np.nan)


def _style(ax: Any, heading: str, tick_format: str, empty: bool) -> None:
    from matplotlib.ticker import NullFormatter
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0, colors=FAINT, labelsize=8)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    if empty:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=FAINT, fontsize=9)
        return
    low, high = ax.dataLim.intervaly
    # Where the values span so much, nearly all of the curve would lie at the bottom of a linear axis.
    if heading in ("loss", "gradient norm") and 0 < 30 * low < high:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    percent = tick_format == "percent"
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g}%" if percent else tick_format.format(y))


def _epoch_axis(ax: Any, steps_per_epoch: float) -> None:
    top = ax.secondary_xaxis("top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch))
    top.tick_params(length=0, colors=FAINT, labelsize=8)
    top.spines["top"].set_visible(False)
    top.set_xlabel("epoch", color=FAINT, fontsize=9, loc="right")


def _label_ends(ax: Any, ends: list[tuple[str, float, str]]) -> None:
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
        ax.text(1.015, place, text, transform=ax.transAxes, va="center", color=colour, fontsize=8.5)
