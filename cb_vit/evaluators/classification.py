"""Top-1 and top-5 accuracy and loss, each example counted once on any number of devices."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cb_vit import dist
from cb_vit.datasets.core import Source
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn
from cb_vit.input_pipeline import InputConfig, Pipeline, to_device
from cb_vit.losses import LOSSES
from cb_vit.pp.builder import Preprocess
from cb_vit.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of a classification evaluator.

    Attributes:
        loss_name: the loss that is averaged.
    """

    loss_name: str = "softmax_xent"

    def __post_init__(self):
        super().__post_init__()
        LOSSES.pick(self.loss_name, "loss_name")


class Evaluator:
    """Accuracy and loss over a data source.

    Labels may be multi-hot, as in big_vision: a prediction is right if its class is among them (so
    ReaL works), and an example without any label is left out of numerator and denominator.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, source: Source, preprocess: Preprocess,
                 sharding: NamedSharding):
        self.config, self.source, self._sharding = config, source, sharding
        self._rows = dist.local_rows(sharding, config.batch_size)
        settings = InputConfig(data=config.data, batch_size=config.batch_size, pp=config.pp_fn,
                               skip_errors=config.skip_errors)
        self._pipeline = Pipeline(settings, source, preprocess, self._rows)
        loss = LOSSES[config.loss_name]

        def sums(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            batch = preprocess.device(batch)
            logits, _ = predict_fn(state, batch["image"])
            return batch_sums(logits, batch["labels"], batch["_mask"], loss(logits, batch["labels"]))

        self._sums = jax.jit(sums, out_shardings=dist.replicated(sharding.mesh))

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `prec@1`, `prec@5` and `loss`, means over all labelled examples.

        `prec@5` is left out where there are no more than five classes.
        """
        batches = to_device(self._pipeline.evaluate(), self._rows, self._sharding, self.config.batch_size)
        total: dict[str, float] = {}
        previous = None
        for batch in batches:
            current = self._sums(train_state, batch)
            total = _add(total, previous)  # of the batch before: the device is never waited for
            previous = current
        total = _add(total, previous)
        seen = total.pop("seen", 0.0)
        for name, value in total.items():
            yield name, value / seen if seen else float("nan")


def batch_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array, losses: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, to be divided by "seen".

    Args:
        logits: [b c].
        labels: [b c], positive where a class is right; a row without any is not counted.
        mask: bool [b], False where a row is padding.
        losses: [b].
    """
    mask = mask & jnp.any(labels > 0, axis=1)
    ranked = jax.lax.top_k(logits, min(5, logits.shape[1]))[1]
    hits = jnp.take_along_axis(labels, ranked, axis=1) > 0
    sums = {"prec@1": hits[:, 0] & mask, "loss": jnp.where(mask, losses, 0.0), "seen": mask}
    if logits.shape[1] > 5:
        sums["prec@5"] = jnp.any(hits, axis=1) & mask
    return {name: jnp.sum(value, dtype=jnp.float32) for name, value in sums.items()}


def _add(total: dict[str, float], sums: dict[str, jax.Array] | None) -> dict[str, float]:
    values = {} if sums is None else {name: float(value) for name, value in jax.device_get(sums).items()}
    return {name: total.get(name, 0.0) + values[name] for name in values} or total

