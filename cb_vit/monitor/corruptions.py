"""A picture of errors by corruption and severity: a number in every cell, darker where it is higher."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cb_vit.monitor.style import FAINT, INK, WRONG, plain, to_png

CELL, WIDTH = (0.62, 0.3), 5.2  # inches: of a cell, and of the picture at least, for the words above
DARK = 0.33  # error from which on letters are white


def draw_errors(errors: Mapping[str, Sequence[float]], severities: Sequence[int], clean: float, title: str) -> bytes:
    """The errors as a PNG: a row a corruption, a column a severity, and the means of both.

    Args:
        errors: errors of each corruption, from 0 to 1, in the order of the severities; NaN: not known.
        severities: the severities.
        clean: the error without a corruption; NaN: not known.
        title: text above.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    values = np.array([*errors.values()], float)
    values = np.vstack([values, values.mean(0)])
    values = np.hstack([values, values.mean(1, keepdims=True)])
    rows, columns = [*errors, "mean"], [*map(str, severities), "mean"]
    size = max(2.2 + CELL[0] * len(columns), WIDTH), 1.1 + CELL[1] * len(rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    ax = figure.subplots()
    ax.imshow(values, LinearSegmentedColormap.from_list("", ["white", WRONG, INK]), vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ax.text(column, row, f"{value:.1%}" if value == value else "", ha="center", va="center", fontsize=8,
                color="white" if value >= DARK else INK)
    ax.set_yticks(range(len(rows)), [plain(name) for name in rows], fontsize=8.5, color=INK)
    ax.set_xticks(range(len(columns)), columns, fontsize=8.5, color=INK)
    ax.xaxis.set_ticks_position("top")
    ax.set_xlabel("severity", color=FAINT, fontsize=9)
    ax.xaxis.set_label_position("top")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for axis, line in ((ax.axhline, len(rows)), (ax.axvline, len(columns))):
        axis(line - 1.5, color="white", lw=4)  # sets the means apart
    words = f"top-1 error, {plain(title)}" + (f"; clean {clean:.1%}" if clean == clean else "")
    figure.suptitle(words, x=0.01, ha="left", fontsize=9.5)
    return to_png(figure)
