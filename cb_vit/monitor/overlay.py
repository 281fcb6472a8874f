"""Several runs in one picture, a panel for each metric."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from cb_vit.monitor.panels import draw_curve, figure, kind_of, step_axis, style
from cb_vit.monitor.style import FAINT, Look, plain, short, to_png
from cb_vit.records import Series

LEARNT = r"training_loss|(.*/)?(loss|prec@1)"  # what a run has come to
DRAWN = rf"{LEARNT}|img/sec"  # what is drawn unless one chooses
COLUMNS = 3  # of panels; of names below them, two each


def draw_overlay(runs: Mapping[str, Mapping[str, Series]], metrics: Sequence[str]) -> bytes:
    """The runs' curves over each other as a PNG; a noisy one is smoothed, and a ring marks an evaluator's best value.

    Args:
        runs: history of each run by its name: `(steps, values)` of each metric.
        metrics: names of those that are drawn, at least one.
    """
    from matplotlib.lines import Line2D
    columns = 2 if len(metrics) == 4 else min(COLUMNS, len(metrics))  # without holes
    picture, axes = figure(-(-len(metrics) // columns), columns, width=5.2, height=3.6)
    looks = {run: Look.number(index) for index, run in enumerate(runs)}
    headings = short(metrics, 48)
    for ax, metric in zip(axes.flat, metrics, strict=False):
        for run, history in runs.items():
            if metric in history:
                draw_curve(ax, history[metric], looks[run], kind_of(metric), raw=False)
        style(ax, plain(headings[metric]), kind_of(metric))
    for ax in axes.flat[len(metrics):]:
        ax.set_axis_off()
    last = max(int(history[metric][0][-1]) for history in runs.values() for metric in metrics if metric in history)
    # The scale is shared, but below the last panel of each column the numbers have to be shown again.
    for ax in axes.flat[:len(metrics)][-columns:]:
        step_axis(ax, last)
        ax.tick_params(labelbottom=True)
    lines = [Line2D([], [], color=look.colour, ls=look.dash, lw=1.6) for look in looks.values()]
    names = short(looks, 40)
    picture.legend(lines, [plain(names[run]) for run in looks], loc="outside lower left", ncols=2 * columns,
                   frameon=False, fontsize=9, labelcolor=FAINT, handlelength=3.5)
    return to_png(picture)
