"""Draws `docs/context.png`, the README's figure of Context Broadcasting.

    python docs/draw_context.py
"""
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cb_vit.models.context import broadcast_context  # noqa: E402

INK, FAINT, BLUE, WARM = "#2b2f36", "#8a9099", "#1f6fb4", "#d1603d"


def draw_block(ax):
    """The MLP half of a block, read upwards."""
    ax.set_xlim(0, 10), ax.set_ylim(0, 10), ax.axis("off")
    boxes = [(1.3, "LayerNorm", INK), (3.0, "MLP", INK), (4.7, "Context Broadcasting", BLUE),
             (6.4, "LayerScale, DropPath", FAINT)]
    for y, text, colour in boxes:
        ax.add_patch(FancyBboxPatch((2.2, y), 5.6, 1.0, boxstyle="round,pad=0.02,rounding_size=0.18", linewidth=1.4,
                                    edgecolor=colour, facecolor="#eaf2fa" if colour == BLUE else "white"))
        ax.text(5, y + 0.5, text, ha="center", va="center", fontsize=9, color=colour,
                fontweight="bold" if colour == BLUE else "normal")
    arrow = dict(arrowstyle="-|>", color=INK, lw=1.2, shrinkA=0, shrinkB=0)
    for low, high in [(0.0, 1.28), (2.32, 2.98), (4.02, 4.68), (5.72, 6.38), (7.42, 8.2), (8.8, 9.9)]:
        ax.annotate("", (5, high), (5, low), arrowprops=arrow)
    ax.plot([5, 0.9, 0.9, 4.7], [0.55, 0.55, 8.5, 8.5], color=INK, lw=1.2)
    ax.text(5, 8.5, "+", ha="center", va="center", fontsize=12, color=INK,
            bbox=dict(boxstyle="circle,pad=0.16", facecolor="white", edgecolor=INK, linewidth=1.2))
    ax.set_title("at the end of every MLP", loc="left", fontsize=10, fontweight="bold", color=INK)


def draw_matrix(ax, figure):
    """CB as a token-mixing matrix, ½(I + 11ᵀ/n)."""
    n = 8
    image = ax.imshow(np.asarray(broadcast_context(jnp.eye(n)[None])[0]), cmap="Blues", vmin=0, vmax=0.65)
    ax.set_xticks([]), ax.set_yticks([])
    ax.set_xlabel("from token", color=FAINT, fontsize=9), ax.set_ylabel("to token", color=FAINT, fontsize=9)
    for spine in ax.spines.values():
        spine.set_color(FAINT)
    bar = figure.colorbar(image, ax=ax, shrink=0.75, ticks=[1 / (2 * n), 0.5 + 1 / (2 * n)])
    bar.ax.set_yticklabels(["1/(2n)", "1/2 + 1/(2n)"], fontsize=8, color=FAINT)
    bar.outline.set_visible(False)
    ax.set_title("half itself, half uniform attention", loc="left", fontsize=10, fontweight="bold", color=INK)


def draw_tokens(ax):
    """Two channels of a few tokens, before and after."""
    angle = np.linspace(0, 2 * np.pi, 9, endpoint=False) + 0.3
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * np.random.default_rng(1).uniform(0.55, 1.0, (9, 1))
    y = np.asarray(broadcast_context(jnp.asarray(x, jnp.float32)[None])[0])
    for before, after in zip(x, y, strict=True):
        ax.annotate("", after, before, arrowprops=dict(arrowstyle="-|>", color=FAINT, lw=0.9, shrinkA=4, shrinkB=4))
    ax.plot(*x.T, "o", color=FAINT, ms=5, label="tokens")
    ax.plot(*y.T, "o", color=BLUE, ms=5, label="after CB")
    ax.plot(*x.mean(0), "P", color=WARM, ms=8, label="their mean, kept")
    ax.set_xticks([]), ax.set_yticks([]), ax.set_xlim(-1.1, 1.6), ax.set_ylim(-1.1, 1.1)
    for spine in ax.spines.values():
        spine.set_color(FAINT)
    ax.legend(fontsize=8, frameon=False, loc="upper right", labelcolor=INK)
    ax.set_title("each token moves halfway to the mean", loc="left", fontsize=10, fontweight="bold", color=INK)


def main():
    """Draw the figure."""
    figure = Figure(figsize=(11.5, 3.7), dpi=130, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3, width_ratios=[0.85, 1.05, 1.1])
    draw_block(left), draw_matrix(middle, figure), draw_tokens(right)
    figure.savefig(HERE / "context.png")


if __name__ == "__main__":
    main()
