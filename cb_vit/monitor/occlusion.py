"""Pictures of accuracy by how much of the images is hidden, or into how many tiles they are shuffled."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cb_vit.monitor.style import FAINT, GRID, INK, Look, plain, to_png

Points = Sequence[tuple[float, float]]  # (how much, accuracy)
MARKERS = "osD^v"


def draw_occlusion(ways: Mapping[str, Points], tiles: Points, title: str) -> bytes:
    """Accuracy by the share of hidden patches, by way, and by the number of shuffled tiles, as a PNG.

    Args:
        ways: (share, accuracy) by the name of the way; may be empty.
        tiles: (number of rows and columns of tiles, accuracy); may be empty.
        title: text above.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    panels = [panel for panel, has in ((_hidden, ways), (_shuffled, tiles)) if has]
    figure = Figure(figsize=(5.4 * len(panels), 3.6), dpi=110, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        ax.set_ylim(0, 1)
        panel(ax, ways if panel is _hidden else tiles)
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")
        ax.grid(color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, colors=FAINT, labelsize=8)
        for side, spine in ax.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(FAINT)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    return to_png(figure)


def _hidden(ax: Any, ways: Mapping[str, Points]) -> None:
    for number, (way, points) in enumerate(ways.items()):
        points, look = sorted(points), Look.number(number)
        ax.plot(*zip(*points, strict=True), color=look.colour, ls=look.dash, lw=1.6, clip_on=False,
                marker=MARKERS[number % len(MARKERS)], ms=4, label=plain(way))
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}%")
    ax.set_title("top-1 accuracy, patches hidden", loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.set_xlabel("share of the patches that is hidden", color=FAINT, fontsize=9, loc="right")
    # A line with its mark, as colours alone are lost in grey.
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8.5, frameon=False, labelcolor=INK, handlelength=3.4)


def _shuffled(ax: Any, tiles: Points) -> None:
    names = [f"{count:g}×{count:g}" for count, _ in tiles]
    ax.bar(names, [accuracy for _, accuracy in tiles], 0.6, color=Look.number(0).colour)
    for number, (_, accuracy) in enumerate(tiles):
        ax.annotate(f"{accuracy:.1%}", (number, accuracy), (0, 3), textcoords="offset points", ha="center", fontsize=8,
                    color=INK)
    ax.set_title("top-1 accuracy, tiles shuffled", loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.set_xlabel("rows and columns of tiles", color=FAINT, fontsize=9, loc="right")
