"""How steep softmax is where attention is dense: norms of its gradients in closed form, and their picture.

With p = softmax(z), J = ∂p/∂z = diag(p) - ppᵀ. `docs/density.md` derives what is here, and says what follows and what
does not.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from cb_vit.analysis.density import MARKERS, Row, number_of_keys, pick
from cb_vit.monitor.panels import Kind, style
from cb_vit.monitor.style import DASHES, FAINT, INK, RAW, Look, plain, short, to_png

TOKENS = 197  # of a ViT of 224 pixels in patches of 16, where no model says how many there are
POINTS = 400  # of a curve
STEEPEST = 60.0  # temperature⁻¹ at which a family is one-hot


def entropy(p: Float[np.ndarray, "*b n"]) -> Float[np.ndarray, "*b"]:
    """Entropy in nats."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def jacobian_norm(p: Float[np.ndarray, "*b n"]) -> Float[np.ndarray, "*b"]:
    """‖J‖_F, the square root of Σp² - 2 Σp³ + (Σp²)²: how far probabilities move with the logits."""
    square, cube = np.sum(p**2, axis=-1), np.sum(p**3, axis=-1)
    return np.sqrt(np.maximum(square - 2 * cube + square**2, 0))


def relative_jacobian_norm(p: Float[np.ndarray, "*b n"]) -> Float[np.ndarray, "*b"]:
    """‖J‖_F / ‖p‖: the same as a share of what is there to move."""
    return jacobian_norm(p) / np.linalg.norm(p, axis=-1)


def spectral_bounds(p: Float[np.ndarray, "*b n"]) -> tuple[Float[np.ndarray, "*b"], Float[np.ndarray, "*b"]]:
    """The least and the greatest that ‖J‖₂, the greatest eigenvalue, can be: max p(1 - p), and twice that or max p."""
    variance = np.max(p * (1 - p), axis=-1)
    return variance, np.minimum(2 * variance, np.max(p, axis=-1))


def entropy_gradient_norm(p: Float[np.ndarray, "*b n"]) -> Float[np.ndarray, "*b"]:
    """‖∂H/∂z‖ = ‖p (log p + H)‖: how far the entropy moves with the logits."""
    return np.linalg.norm(p * (np.log(np.where(p > 0, p, 1)) + entropy(p)[..., None]), axis=-1)


def families(n: int) -> dict[str, Float[np.ndarray, "t n"]]:
    """Distributions over n keys from uniform to one-hot, in several ways, by their names."""
    def softmax(z: Float[np.ndarray, "t n"]) -> Float[np.ndarray, "t n"]:
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    steep = np.concatenate([[0], np.geomspace(1e-3, STEEPEST, POINTS - 1)])[:, None]
    normal = stats.norm.ppf((np.arange(n) + 0.5) / n)[None]
    return {"uniform over m of N keys": np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None],
            "one logit above the rest": softmax(steep * np.eye(1, n)),
            "normal logits, ever steeper": softmax(steep * normal)}


PANELS = {  # heading, and what is drawn
    "‖J‖: change of p": jacobian_norm,
    "‖J‖ / ‖p‖: relative change of p": relative_jacobian_norm,
    "‖∂H/∂z‖: change of the entropy": entropy_gradient_norm}


def draw_gradient(runs: Mapping[str, Sequence[Row]], title: str = "Softmax: change with its logits") -> bytes:
    """Norms of softmax's gradients against entropy as a PNG; in the first panel the heads of each model as marks.

    Args:
        runs: rows of `density.csv` of each model, by its name; there may be none.
        title: text above the panels.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    from matplotlib.lines import Line2D
    n = max(filter(None, map(number_of_keys, runs.values())), default=TOKENS)
    figure = Figure(figsize=(12.6, 4.6), dpi=110, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(1, len(PANELS))
    curves = families(n)
    for ax, (heading, norm) in zip(axes, PANELS.items(), strict=True):
        for dash, p in zip(DASHES, curves.values(), strict=False):
            ax.plot(entropy(p), norm(p), color=INK, ls=dash, lw=1.3)
        style(ax, heading, Kind("{:.3g}".format))
        ax.axvline(np.log(n), color=RAW, lw=1)
        ax.set_xlabel(f"entropy, nats (0 one-hot, {np.log(n):.2f} uniform over N = {n})", color=FAINT, fontsize=9)
    lines = [Line2D([], [], color=INK, ls=dash, lw=1.3) for dash, _ in zip(DASHES, curves, strict=False)]
    for index, rows in enumerate(runs.values()):
        colour, marker = Look.number(index).colour, MARKERS[index % len(MARKERS)]
        entropies, squares = ({(row.block, row.head): row.mean for row in pick(rows, name, heads=True)}
                              for name in ("entropy", "jacobian"))
        both = sorted(entropies.keys() & squares.keys())
        axes[0].plot([entropies[key] for key in both], [squares[key] ** 0.5 for key in both], marker, color=colour,
                     ms=4, mfc="none", mew=0.9, alpha=0.8)
        lines.append(Line2D([], [], color=colour, ls="", marker=marker, mfc="none", ms=5))
    figure.legend(lines, [*curves, *(f"heads of {plain(name)}" for name in short(runs, 40).values())],
                  loc="outside lower left", ncols=3, frameon=False, fontsize=9, labelcolor=INK, handlelength=3.5)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    return to_png(figure)
