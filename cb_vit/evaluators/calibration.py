"""Whether a model's probabilities can be believed: calibration errors, NLL and Brier score, and temperature scaling.

The confidence of an example is the probability of the class that is predicted; a model is calibrated where, of the
examples with confidence p, a share p is right.
"""
from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float
from scipy.optimize import brentq
from scipy.special import softmax

from cb_vit import dist
from cb_vit.config import ConfigError, Read
from cb_vit.datasets import DataError, check_source
from cb_vit.datasets.chosen import Chosen, draw, some
from cb_vit.datasets.core import SourceConfig
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_finite, check_folder, over_batches
from cb_vit.evaluators.mistakes import table
from cb_vit.input_pipeline import Pipeline
from cb_vit.monitor.reliability import Bin, draw_reliability
from cb_vit.train_state import TrainState

HOTTEST = 100.0  # temperatures are sought between this and its inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of calibration.

    A temperature is fitted where `holdout` or `fit` says on what, never on examples that are measured.

    Attributes:
        bins: number of bins, M.
        holdout: share of the examples, drawn by lot, that a temperature is fitted on; the others are measured. None:
            all are measured.
        fit: block of other data that a temperature is fitted on.
        fit_examples: number of examples that a temperature is fitted on, at most: their logits are kept on every host.
        seed: seed of the lots.
    """

    bins: int = 15
    holdout: float | None = None
    fit: Annotated[SourceConfig, Read(Any, check_source)] | None = None
    fit_examples: int = 10_000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_folder(self)
        for name in ("bins", "fit_examples"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ConfigError("holdout", f"is a share between 0 and 1, got {self.holdout}; unset, nothing is fitted")
        if self.holdout is not None and self.fit is not None:
            raise ConfigError("fit", "and holdout both say what the temperature is fitted on; keep one")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be in [0, 2³²), got {self.seed}")

    @property
    def further(self) -> dict[str, SourceConfig]:
        """The data that a temperature is fitted on, where it is other data."""
        return {} if self.fit is None else {"fit": self.fit}


class Evaluator:
    """Calibration over a data source; `files` shows that of the last run.

    The host keeps the confidence of every example and whether it is right, and the logits of those of the fit.

    Labels may be multi-hot, as in `classification`: a prediction is right if its class is among them, and one without
    any label is left out. NLL and Brier score take an example's labels as equally probable.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding,
                 fit: Pipeline | None = None):
        self.config, self.source, self.fit = config, pipeline.source, fit
        self._sharding, self._step, self._reliability = sharding, 0, {}
        self._measured, self._fitted = _divide(config, pipeline, fit)

        def predict(state: TrainState, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            batch = pipeline.preprocess.device(batch)
            labels = batch["labels"] > 0
            counted = batch["_mask"] & jnp.any(labels, axis=1)
            return predict_fn(state, batch["image"])[0].astype(jnp.float32), {
                "labels": labels, "counted": counted, "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}

        def scores(state: TrainState, batch: dict[str, jax.Array], temperature: jax.Array) -> dict[str, jax.Array]:
            logits, found = predict(state, batch)
            labels = found.pop("labels")
            scaled = batch_scores(logits / temperature, labels)
            return {**found, **batch_scores(logits, labels), **{f"scaled_{name}": x for name, x in scaled.items()}}

        def logits(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            logits, found = predict(state, batch)
            targets = _targets(found.pop("labels"))
            return {**found, "logits": logits, "true": jnp.sum(targets * logits, axis=1)}

        # What all processes get: a few numbers a row; of the examples of the fit, logits.
        replicated = dist.replicated(sharding.mesh)
        self._scores, self._logits = (jax.jit(function, out_shardings=replicated) for function in (scores, logits))

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `ece` and `ece_mass`, `nll` and `brier`; and if one is fitted `temperature` and the same `scaled/`.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows, or none of the fit has a label.
        """
        self._step, self._reliability = int(train_state.step), {}
        temperature = None if self._fitted is None else self._fit(train_state)
        divisor = np.float32(1 if temperature is None else temperature)
        kept: list[dict[str, np.ndarray]] = []
        sums: collections.Counter[str] = collections.Counter()
        for batch in over_batches(lambda batch: self._scores(train_state, batch, divisor), self._measured,
                                  self._sharding):
            counted = batch.pop("counted")
            for name in [name for name in batch if name.endswith(("nll", "brier"))]:
                sums[name] += float(np.sum(batch.pop(name)[counted], dtype=np.float64))
            kept.append({name: values[counted] for name, values in batch.items()})
        found = {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}
        yield from self._metrics(found, sums, "", "")
        if temperature is not None:
            yield "temperature", temperature
            yield from self._metrics(found, sums, "scaled_", "scaled/")

    def files(self) -> Iterator[tuple[str, str | bytes]]:
        """Tables and a picture of the last run, by the names of their files."""
        for scaled, bins in self._reliability.items():
            rows = ((kind, f"{one.low:.6f}", f"{one.high:.6f}", one.examples, f"{one.confidence:.6f}",
                     f"{one.accuracy:.6f}") for kind, found in bins.items() for one in found if one.examples)
            yield f"reliability{'_scaled' if scaled else ''}.csv", table(
                ("bins", "low", "high", "examples", "confidence", "accuracy"), rows)
        yield "reliability.png", draw_reliability(
            {scaled or "as trained": bins for scaled, bins in self._reliability.items()}, f"step {self._step}")

    def _fit(self, train_state: TrainState) -> float:
        logits, true = [], []
        for batch in over_batches(lambda batch: self._logits(train_state, batch), self._fitted, self._sharding):
            logits.append(batch["logits"][batch["counted"]])
            true.append(batch["true"][batch["counted"]])
        if not sum(map(len, true)):
            raise DataError("no example that the temperature would be fitted on has a label")
        return fit_temperature(np.concatenate(logits), np.concatenate(true))

    def _metrics(self, found: dict[str, np.ndarray], sums: Mapping[str, float], which: str, prefix: str
                 ) -> Iterator[tuple[str, float]]:
        confidence, right = found[f"{which}confidence"].astype(np.float64), found["right"]
        bins = {"width": width_bins(confidence, right, self.config.bins),
                "mass": mass_bins(confidence, right, self.config.bins)}
        self._reliability["after temperature scaling" if which else ""] = bins
        yield f"{prefix}ece", calibration_error(bins["width"])
        yield f"{prefix}ece_mass", calibration_error(bins["mass"])
        for name in ("nll", "brier"):
            yield prefix + name, sums[which + name] / len(right) if len(right) else float("nan")


def _divide(config: Config, pipeline: Pipeline, fit: Pipeline | None) -> tuple[Pipeline, Pipeline | None]:
    """What is measured, and what a temperature is fitted on."""
    if fit is not None:
        return pipeline, dataclasses.replace(fit, source=some(fit.source, config.fit_examples, config.seed))
    if config.holdout is None:
        return pipeline, None
    total = len(pipeline.source)
    if total < 2:
        raise ConfigError("holdout", f"divides the examples, and there is {total}; give more, or leave it unset")
    held = draw(total, min(max(round(config.holdout * total), 1), total - 1), config.seed)
    fitted = held[draw(len(held), min(len(held), config.fit_examples), config.seed)]
    return tuple(dataclasses.replace(pipeline, source=Chosen(pipeline.source, indices))
                 for indices in (np.setdiff1d(np.arange(total), held), fitted))


def _targets(labels: Bool[Array, "b c"]) -> Float[Array, "b c"]:
    return labels / jnp.maximum(jnp.sum(labels, axis=1, keepdims=True, dtype=jnp.float32), 1)


def batch_scores(logits: Float[Array, "b c"], labels: Bool[Array, "b c"]) -> dict[str, jax.Array]:
    """What calibration is about, [b] each: "confidence", "right", "nll", "brier".

    With p the softmax of the logits and y the labels as a distribution, NLL is -Σ_c y_c log p_c, and the Brier score
    Σ_c (p_c - y_c)², from 0 to 2, as Brier (1950) has it.

    Args:
        logits: logits of the classes.
        labels: whether each class is right.
    """
    log_p, targets = jax.nn.log_softmax(logits), _targets(labels)
    predicted = jnp.argmax(logits, axis=1, keepdims=True)
    return {"confidence": jnp.exp(jnp.max(log_p, axis=1)),
            "right": jnp.take_along_axis(labels, predicted, axis=1)[:, 0],
            # A class of probability 0 that is not right counts 0, not 0 · ∞.
            "nll": -jnp.sum(jnp.where(labels, targets * log_p, 0), axis=1),
            "brier": jnp.sum((jnp.exp(log_p) - targets) ** 2, axis=1)}


def width_bins(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int) -> list[Bin]:
    """Bins of equal width, ((m - 1) / M, m / M], as Guo et al. have them (arXiv 1706.04599, equation 3).

    Args:
        confidence: probability of the predicted class.
        right: whether that class is right.
        bins: number of bins, M.
    """
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [Bin.of(confidence[number == m], right[number == m], m / bins, (m + 1) / bins) for m in range(bins)]


def mass_bins(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int) -> list[Bin]:
    """Bins of as many examples each, in the order of their confidence (Nguyen and O'Connor, arXiv 1508.05154).

    Examples of one confidence that fall into two bins count in both with the mean accuracy of all of them, so that
    their order makes no difference.

    Args:
        confidence, right, bins: as for `width_bins`; there are no more bins than examples.
    """
    values, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    shares = np.repeat(np.bincount(group, right, len(values)) / np.maximum(counts, 1), counts)
    ordered, parts = np.repeat(values, counts), min(bins, max(len(confidence), 1))
    return [Bin.of(part, share, part[0], part[-1]) for part, share in zip(
        np.array_split(ordered, parts), np.array_split(shares, parts), strict=True) if len(part)]


def calibration_error(bins: list[Bin]) -> float:
    """Σ_m n_m / n |accuracy_m - confidence_m|, the expected calibration error; NaN without examples."""
    total = sum(one.examples for one in bins)
    gaps = sum(one.examples * abs(one.accuracy - one.confidence) for one in bins if one.examples)
    return gaps / total if total else float("nan")


def fit_temperature(logits: Float[np.ndarray, "n c"], true: Float[np.ndarray, " n"]) -> float:
    """The temperature T for which softmax(z / T) has the least NLL, from 0.01 to 100.

    The NLL is convex in β = 1 / T, and its derivative, the mean of Σ_c p_c z_c - Σ_c y_c z_c, is 0 at one β alone. It
    is nowhere where all are right (T is then the least), or the logits say nothing (the greatest; if they are all alike
    any will do, and it is 1).

    Args:
        logits: logits z of the classes.
        true: Σ_c y_c z_c of each example: the logit of its class.

    Raises:
        Failure: logits are not finite.
    """
    check_finite(bool(np.isfinite(logits).all()))
    highest = logits.max(axis=1, keepdims=True)
    logits, true = (logits - highest).astype(np.float64), np.float64(true) - highest[:, 0]

    def slope(log_beta: float) -> float:
        return float(np.mean(np.sum(softmax(np.exp(log_beta) * logits, axis=1) * logits, axis=1) - true))

    if not logits.any():
        return 1.0
    low, high = -np.log(HOTTEST), np.log(HOTTEST)
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return 1 / HOTTEST
    return float(np.exp(-brentq(slope, low, high, xtol=1e-10)))
