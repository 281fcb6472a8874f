"""Top-1 and top-5 accuracy and loss, each example counted once on any number of devices."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cb_vit import datasets, dist
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, over_batches
from cb_vit.input_pipeline import Pipeline
from cb_vit.losses import LOSSES
from cb_vit.train_state import TrainState

METRICS = ("prec@1", "prec@5", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of a classification evaluator.

    Attributes:
        loss_name: name of the loss that is averaged.
        only_data_classes: whether only classes that the data has compete, as ImageNet-A and -R are scored, which have
            200 of ImageNet's: the logits of others are left out before all that is measured.
    """

    loss_name: str = "softmax_xent"
    only_data_classes: bool = False

    def __post_init__(self):
        super().__post_init__()
        LOSSES.pick(self.loss_name, "loss_name")


class Evaluator:
    """Accuracy and loss over a data source.

    Labels may be multi-hot, as in big_vision: a prediction is right if its class is among them (so
    ReaL works), and an example without any label is left out of numerator and denominator.

    Attributes:
        counted: number of examples of the last run that had a label.
        image_size: (height, width) of what the model sees.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding):
        self.config, self.source = config, pipeline.source
        self._pipeline, self._sharding = pipeline, sharding
        self.counted, self.image_size = 0, pipeline.spec["image"][0][:2]
        loss, classes = LOSSES[config.loss_name], None
        if config.only_data_classes:
            classes = datasets.classes_of(pipeline.source, "data", bool(config.skip_errors))

        def sums(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            batch = pipeline.preprocess.device(batch)
            logits, labels = predict_fn(state, batch["image"])[0], batch["labels"]
            if classes is not None:
                logits, labels = logits[:, classes], labels[:, classes]
            found = batch_sums(logits, labels, batch["_mask"], loss(logits, labels))
            return {**found, "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}

        self._sums = jax.jit(sums, out_shardings=dist.replicated(sharding.mesh))

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `prec@1`, `prec@5` and `loss`, means over all labelled examples.

        `prec@5` is left out where there are no more than five classes.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows.
        """
        total: dict[str, float] = {}
        for sums in over_batches(lambda batch: self._sums(train_state, batch), self._pipeline, self._sharding):
            total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
        seen = total.pop("seen", 0.0)
        self.counted = round(seen)
        for name, value in total.items():
            yield name, value / seen if seen else float("nan")


def batch_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array, losses: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, to be divided by "seen".

    Args:
        logits: logits of the classes, [b c].
        labels: labels [b c], positive where a class is right; a row without any is not counted.
        mask: booleans [b], False where a row is padding.
        losses: loss of each row, [b].
    """
    mask = mask & jnp.any(labels > 0, axis=1)
    ranked = jax.lax.top_k(logits, min(5, logits.shape[1]))[1]
    hits = jnp.take_along_axis(labels, ranked, axis=1) > 0
    sums = {"prec@1": hits[:, 0] & mask, "loss": jnp.where(mask, losses, 0.0), "seen": mask}
    if logits.shape[1] > 5:
        sums["prec@5"] = jnp.any(hits, axis=1) & mask
    return {name: jnp.sum(value, dtype=jnp.float32) for name, value in sums.items()}
