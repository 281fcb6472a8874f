"""Training curves as a picture: what one looks at before reading `metrics.jsonl`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cb_vit.monitor.panels import RING, draw_curve, figure, kind_of, label_ends, step_axis, style, thousands
from cb_vit.monitor.style import FAINT, Look, plain, short, to_png
from cb_vit.records import Series

SCORES = ("/loss", "/prec@1")  # of an evaluator, after its name
MOST = 10  # curves of evaluators in a panel: there is no room for the names of more


def draw_curves(history: Mapping[str, Series], title: str = "") -> bytes:
    """The training curves as a PNG: losses, accuracies, speed, learning rate, gradient norm, waiting for data.

    A noisy curve is drawn in grey under its running mean; every line carries its name and the height of its end, and
    those of evaluators a ring at their best value.

    Args:
        history: `(steps, values)` of each metric, by its name; NaN leaves a gap.
        title: text above the panels, before the step reached.
    """
    lone = ("", Look())
    panels = (  # heading, and by the name of each metric what its curve is called and how it looks
        (f"loss ({RING} lowest)", {"training_loss": ("training", Look())} | _evaluations(history, "/loss")),
        (f"top-1 accuracy ({RING} best)", _evaluations(history, "/prec@1")),
        ("images a second", {"img/sec": lone}),
        ("learning rate", {"lr": lone}),
        ("gradient norm", {"l2_grads": lone}),
        ("share of time waiting for data", {"data_wait": lone}),
    )
    last = max((int(steps[-1]) for steps, _ in history.values() if len(steps)), default=0)
    ratios = [s / e for s, e in zip(*history.get("epoch", ((), ())), strict=True) if s > 0 and e > 0]
    per_epoch = ratios[-1] if ratios else None
    picture, axes = figure(2, 3, width=5.6, height=3.6)
    for ax, (heading, curves) in zip(axes.flat, panels, strict=True):
        ends = []
        for metric, (label, look) in curves.items():
            if metric in history and (end := draw_curve(ax, history[metric], look, kind_of(metric))):
                ends.append((plain(f"{label} {end[1]}".strip()), end[0], look.colour))
        style(ax, heading, kind_of(next(iter(curves), "")), pad=20 if per_epoch and ax in axes[0] else 7)
        label_ends(ax, ends)
    for ax in axes[0] if per_epoch else ():
        _epoch_axis(ax, per_epoch)
    for ax in axes[1]:
        step_axis(ax, last)
    reached = [f"step {thousands(last)}"] + ([f"epoch {last / per_epoch:.1f}"] if per_epoch else [])
    picture.suptitle("  \u00b7  ".join(filter(None, [plain(title), *reached])), x=0.01, ha="left", fontsize=11)
    return to_png(picture)


def _evaluations(history: Mapping[str, Series], score: str) -> dict[str, tuple[str, Look]]:
    """What every evaluator's curve of one score is called, and how it looks, by the name of the metric.

    What was measured with the averaged parameters follows what was measured with those that are trained. Of many, such
    as accuracies under many attacks, those with the fewest parts to their names are kept.
    """
    names = {name.removesuffix(ending) for name in history for ending in SCORES if name.endswith(ending)}
    names = sorted(names, key=lambda name: (name.removeprefix("ema/"), name.startswith("ema/")))
    kept = sorted(names, key=lambda name: name.removeprefix("ema/").count("/"))[:MOST]
    names = [name for name in names if name in kept]
    return {f"{name}{score}": (label, Look.number(index)) for index, (name, label) in enumerate(short(names).items())}


def _epoch_axis(ax: Any, steps_per_epoch: float) -> None:
    top = ax.secondary_xaxis("top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch))
    top.tick_params(length=0, colors=FAINT, labelsize=8)
    top.spines["top"].set_visible(False)
    top.set_xlabel("epoch", color=FAINT, fontsize=9, loc="right")
