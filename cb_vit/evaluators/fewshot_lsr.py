"""Linear regression on the features of a few examples a class, as big_vision's `evaluators/fewshot_lsr.py` has it.

Features are brought to mean 0 and spread 1 over the chosen examples, a constant is added for the bias, and a matrix is
fitted to one-hot targets of -1 and 1 by least squares with an L2 penalty; a test example is of the class with the
highest output. Two differences: everything is fitted in float64, and only the chosen examples are read.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from cb_vit import dist
from cb_vit.config import ConfigError, Read
from cb_vit.datasets import check_source
from cb_vit.datasets.chosen import Chosen
from cb_vit.datasets.contents import DataError, class_name
from cb_vit.datasets.core import SourceConfig
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_finite, have_one_name, over_batches
from cb_vit.evaluators.features import check_layer, check_single, labelled_features
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState

NEEDS_CLASSES = False
BIAS = 100.0  # the constant feature: so large that its weight is hardly penalised
LEAST_SPREAD = 1e-5  # added to the spread of a feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of few-shot regression.

    Attributes:
        train_data: block of the data that the shots are chosen from; its classes are those that count.
        shots: numbers of examples of each class.
        l2_reg: strengths of the penalty, above 0; each is measured. big_vision's configs have 2^10.
        seeds: number of choices of the shots, of which the mean is reported.
        representation_layer: name of the model's intermediate that the regression is on, one vector an example.
    """

    train_data: Annotated[SourceConfig, Read(Any, check_source)]
    shots: tuple[int, ...] = (1, 5, 10)
    l2_reg: tuple[float, ...] = (1024.0,)
    seeds: int = 3
    representation_layer: str = "pre_logits"

    def __post_init__(self):
        super().__post_init__()
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ConfigError("shots", f"must be different numbers of at least 1, got {self.shots}")
        if not self.l2_reg or not 0 < min(self.l2_reg) <= max(self.l2_reg) < float("inf") or have_one_name(
                self.l2_reg):
            raise ConfigError("l2_reg", f"must be different numbers above 0, got {self.l2_reg}")
        if self.seeds < 1:
            raise ConfigError("seeds", f"must be at least 1, got {self.seeds}")

    @property
    def further(self) -> dict[str, SourceConfig]:
        """The data that the shots are chosen from."""
        return {"train_data": self.train_data}


class Regression(NamedTuple):
    """What is fitted to some examples.

    Attributes:
        mean: mean of each feature, [d].
        std: spread of each feature, [d].
        weights: the matrix by strength of the penalty, [r d+1 c]; the last row is the bias's.
    """

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray


class Evaluator:
    """Accuracy of few-shot regression; the host keeps the features of the chosen examples alone."""

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding,
                 train_data: Pipeline):
        self.config, self.source, self.train_data = config, pipeline.source, train_data
        self._pipeline, self._sharding = pipeline, sharding
        # Chosen before anything is computed: too few of a class is said at once.
        self._shots = choose(train_data, max(config.shots), config.seeds)
        self._indices = np.unique(np.concatenate([one for seed in self._shots for one in seed]))
        self._chosen = dataclasses.replace(train_data, source=Chosen(train_data.source, self._indices))
        layer = config.representation_layer

        def features(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = labelled_features(predict_fn, layer, train_data, state, batch)
            labels = found.pop("labels")
            return {**found, "label": jnp.argmax(labels, axis=1),
                    "labels": jnp.where(found["counted"], jnp.sum(labels, axis=1, dtype=jnp.int32), 0),
                    "classes": jnp.int32(labels.shape[1])}

        def hits(state: TrainState, batch: dict[str, jax.Array], fitted: Regression) -> dict[str, jax.Array]:
            found = labelled_features(predict_fn, layer, pipeline, state, batch)
            labels, counted = found["labels"], found["counted"]

            def of_one(one: Regression) -> jax.Array:
                scores = outputs(found["features"], one)
                right = jnp.take_along_axis(labels[None], jnp.argmax(scores, axis=2)[..., None], axis=2)[..., 0]
                return jnp.sum(right & counted[None], axis=1, dtype=jnp.int32)

            return {"masked": found["masked"], "seen": jnp.sum(counted, dtype=jnp.int32),
                    "hits": jax.lax.map(of_one, fitted)}

        everywhere = dist.replicated(sharding.mesh)
        self._features = jax.jit(features, out_shardings=everywhere)
        self._hits = jax.jit(hits, out_shardings=everywhere)

    def check(self, logits: Any, out: Any) -> None:
        """Refuse a layer that the model does not have."""
        check_layer(out, self.config.representation_layer)

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `shots_5/prec@1`, the mean over the seeds, and `shots_5/std`, the standard deviation of one seed.

        With several strengths of the penalty they are called `shots_5/l2_1024/prec@1` and so on; with one seed there is
        no deviation.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows, or a chosen one has several labels.
        """
        config = self.config
        fitted = dist.first(self._fit(train_state))
        hits, seen = 0, 0
        batches = over_batches(lambda batch: self._hits(train_state, batch, fitted), self._pipeline, self._sharding)
        for batch in batches:
            hits, seen = hits + batch["hits"].astype(np.int64), seen + int(batch["seen"])
        shares = hits / seen if seen else np.full(hits.shape, np.nan)
        shares = shares.reshape(len(config.shots), config.seeds, len(config.l2_reg))
        for number, shots in enumerate(config.shots):
            for place, strength in enumerate(config.l2_reg):
                name = f"shots_{shots}/" + (f"l2_{strength:g}/" if len(config.l2_reg) > 1 else "")
                yield f"{name}prec@1", float(np.mean(shares[number, :, place]))
                if config.seeds > 1:
                    yield f"{name}std", float(np.std(shares[number, :, place], ddof=1))

    def _fit(self, train_state: TrainState) -> Regression:
        """The regressions of all shots and seeds, stacked, float32."""
        kept = list(over_batches(lambda batch: self._features(train_state, batch), self._chosen, self._sharding))
        classes = int(kept[0]["classes"])
        features, label, labels, counted = (np.concatenate([batch[name] for batch in kept])
                                            for name in ("features", "label", "labels", "counted"))
        check_single(int(labels.sum()), int(counted.sum()), "train_data")
        check_finite(bool(np.isfinite(features[counted]).all()))
        fitted = []
        for shots in self.config.shots:
            for seed in self._shots:
                rows = np.searchsorted(self._indices, np.concatenate([one[:shots] for one in seed]))
                rows = rows[counted[rows]]  # what `skip_errors` let pass is missing
                if not len(rows):
                    raise DataError("train_data: not one of the chosen examples could be read")
                fitted.append(regress(features[rows], label[rows], classes, self.config.l2_reg))
        return Regression(*(np.stack(parts).astype(np.float32) for parts in zip(*fitted, strict=True)))


def choose(pipeline: Pipeline, shots: int, seeds: int) -> list[list[np.ndarray]]:
    """Numbers of examples of each class, by seed; the first few of a class are the choice for fewer shots.

    Args:
        pipeline: loader of the examples, whose labels are read.
        shots: number of examples a class.
        seeds: number of choices.

    Raises:
        ConfigError: at "shots": a class has fewer examples.
    """
    source, labels = pipeline.source, pipeline.labels
    members = [np.flatnonzero(labels == label) for label in range(source.num_classes)]
    for label, found in enumerate(members):
        if len(found) < shots:
            name = class_name(source.class_names, label)
            raise ConfigError("shots", f"{shots} are more than the {len(found)} examples of {name!r} in train_data; "
                                       "give less, or more data")
    return [[np.random.default_rng((seed, label)).permutation(found)[:shots] for label, found in enumerate(members)]
            for seed in range(seeds)]


def regress(
    features: Float[np.ndarray, "n d"], label: Int[np.ndarray, " n"], classes: int, strengths: Sequence[float]
) -> Regression:
    """Least squares with an L2 penalty: W minimises |X W - Y|² + λ |W|², X with a constant column, Y of -1 and 1.

    One eigendecomposition serves all penalties: of XᵀX = Q diag(e) Qᵀ, W = Q diag(1 / (e + λ)) Qᵀ Xᵀ Y; with fewer
    examples than features of XXᵀ, W = Xᵀ Q diag(1 / (e + λ)) Qᵀ Y.

    Args:
        features: features of the examples.
        label: classes of the examples.
        classes: number of classes, c.
        strengths: penalties λ, [r].
    """
    x = features.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0) + LEAST_SPREAD
    x = np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)
    y = 2 * np.eye(classes)[label] - 1
    if len(x) >= x.shape[1]:
        eigenvalues, q = np.linalg.eigh(x.T @ x)
        left, right = q, q.T @ (x.T @ y)
    else:
        eigenvalues, q = np.linalg.eigh(x @ x.T)
        left, right = x.T @ q, q.T @ y
    # Rounding leaves what should be 0 a little below it.
    scales = [1 / (np.maximum(eigenvalues, 0) + strength) for strength in strengths]
    return Regression(mean, std, np.stack([(left * scale) @ right for scale in scales]))


def outputs(features: Float[jax.Array, "b d"], fitted: Regression) -> Float[jax.Array, "r b c"]:
    """What a regression says of examples, by strength of its penalty."""
    x = (features - fitted.mean[None]) / fitted.std[None]
    weights, bias = fitted.weights[:, :-1], fitted.weights[:, -1]
    # At full precision, as TPUs would multiply in bfloat16.
    return jnp.einsum("bd,rdc->rbc", x, weights, precision="highest") + BIAS * bias[:, None]
