"""Training curves as a picture: what one looks at before reading `metrics.jsonl`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cb_vit.monitor.panels import RING, draw_curve, figure, kind_of, label_ends, step_axis, style, thousands
from cb_vit.monitor.style import FAINT, Look, plain, short, to_png
from cb_vit.records import Series

SCORES = ("/loss", "/prec@1")  # of an evaluator, after its name


def draw_curves(history: Mapping[str, Series], title: str = "") -> bytes:
    """The training curves as a PNG: losses, accuracies, speed, learning rate, gradient norm, waiting for data.

    A noisy curve is drawn in grey under its running mean; every line carries its name and the height of its end, and
    those of evaluators a ring at their best value.

    Args:
        history: `(steps, values)` of each metric, by its name; NaN leaves a gap.
        title: text above the panels, before the step reached.
    """
    evals = _evaluators(history)
    looks = {"train": Look(), "": Look()} | {name: Look.number(i) for i, name in enumerate(evals)}
    panels = (  # heading, metric by the name of its curve
        (f"loss ({RING} lowest)", {"train": "training_loss"} | {name: f"{name}/loss" for name in evals}),
        (f"top-1 accuracy ({RING} best)", {name: f"{name}/prec@1" for name in evals}),
        ("images a second", {"": "img/sec"}),
        ("learning rate", {"": "lr"}),
        ("gradient norm", {"": "l2_grads"}),
        ("share of time waiting for data", {"": "data_wait"}),
    )
    last = max((int(steps[-1]) for steps, _ in history.values() if len(steps)), default=0)
    epochs = [(s, e) for s, e in zip(*history.get("epoch", ((), ())), strict=True) if s > 0 and e > 0]
    picture, axes = figure(2, 3, width=5.6, height=3.6)
    labels = short(looks)
    for ax, (heading, names) in zip(axes.flat, panels, strict=True):
        kind = kind_of(next(iter(names.values()), "prec@1"))
        drawn = {label: draw_curve(ax, history[name], looks[label], kind_of(name))
                 for label, name in names.items() if name in history}
        style(ax, heading, kind, pad=20 if epochs and ax in axes[0] else 7)
        label_ends(ax, [(plain(f"{labels[label]} {end[1]}".strip()), end[0], looks[label].colour)
                        for label, end in drawn.items() if end])
    for ax in axes[0] if epochs else ():
        _epoch_axis(ax, steps_per_epoch=epochs[-1][0] / epochs[-1][1])
    for ax in axes[1]:
        step_axis(ax, last)
    reached = [f"step {thousands(last)}"] + ([f"epoch {epochs[-1][1]:.1f}"] if epochs else [])
    picture.suptitle("  \u00b7  ".join(filter(None, [plain(title), *reached])), x=0.01, ha="left", fontsize=11)
    return to_png(picture)


def _evaluators(history: Mapping[str, Series]) -> list[str]:
    """Names of those that have measured something, each followed by what it found of the averaged parameters."""
    names = {name.removesuffix(score) for name in history for score in SCORES if name.endswith(score)}
    return sorted(names, key=lambda name: (name.removeprefix("ema/"), name.startswith("ema/")))


def _epoch_axis(ax: Any, steps_per_epoch: float) -> None:
    top = ax.secondary_xaxis("top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch))
    top.tick_params(length=0, colors=FAINT, labelsize=8)
    top.spines["top"].set_visible(False)
    top.set_xlabel("epoch", color=FAINT, fontsize=9, loc="right")
