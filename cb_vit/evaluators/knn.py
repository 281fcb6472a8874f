"""k nearest neighbours among the features of a training set: what a representation knows without a head.

The votes are those of DINO's evaluation (Caron et al., arXiv 2104.14294; `eval_knn.py` of its code, after Wu et
al., arXiv 1805.01978): the k training examples of the highest cosine similarity s vote for their classes with weight
exp(s / τ).
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from cb_vit import dist
from cb_vit.config import ConfigError, Read
from cb_vit.datasets import DataError, check_source
from cb_vit.datasets.core import SourceConfig
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_finite, over_batches
from cb_vit.evaluators.features import check_layer, check_single, labelled_features
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState

NEEDS_CLASSES = False
NOBODY = -1  # label of a row of the bank that is no neighbour


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of nearest neighbours.

    Attributes:
        train_data: block of the data whose examples are the neighbours; its classes are those that count.
        k: numbers of neighbours.
        temperature: τ, above 0.
        representation_layer: name of the model's intermediate that is compared, one vector an example.
    """

    train_data: Annotated[SourceConfig, Read(Any, check_source)]
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    representation_layer: str = "pre_logits"

    def __post_init__(self):
        super().__post_init__()
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise ConfigError("k", f"must be different numbers of at least 1, got {self.k}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError("temperature", f"must be above 0, got {self.temperature}")

    @property
    def further(self) -> dict[str, SourceConfig]:
        """The data whose examples are the neighbours."""
        return {"train_data": self.train_data}


class Evaluator:
    """Accuracy of nearest neighbours.

    The features of the whole training part, float32 [n d], stay on the devices while it runs, each device keeping its
    rows: 4 n d bytes in all, 2 GB for the 1.28 million images of ImageNet with d = 384. Examples of `data` are
    compared with one batch of them at a time.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding,
                 train_data: Pipeline):
        self.config, self.source, self.train_data = config, pipeline.source, train_data
        self._pipeline, self._sharding = pipeline, sharding
        most, have = max(config.k), len(train_data.source)
        if most > have:
            raise ConfigError("k", f"{most} neighbours are more than the {have:,} examples of train_data; give less")
        rows = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        everywhere = dist.replicated(sharding.mesh)
        steps, batch_size = -(-have // train_data.config.batch_size), train_data.config.batch_size

        def normalised(state: TrainState, batch: dict[str, jax.Array], whose: Pipeline) -> dict[str, jax.Array]:
            found = labelled_features(predict_fn, config.representation_layer, whose, state, batch)
            length = jnp.linalg.norm(found["features"], axis=1, keepdims=True)
            odd = found["counted"] & ~jnp.all(jnp.isfinite(found["features"]), axis=1)
            return {**found, "features": found["features"] / jnp.maximum(length, 1e-12),
                    "odd": jnp.sum(odd, dtype=jnp.int32)}

        def begin(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            width = jax.eval_shape(lambda: normalised(state, batch, train_data))["features"].shape[1]
            return {"features": jnp.zeros((steps, batch_size, width)),
                    "label": jnp.full((steps, batch_size), NOBODY, jnp.int32)}

        def store(bank: Any, state: TrainState, batch: dict[str, jax.Array], step: jax.Array) -> tuple[Any, Any]:
            found = normalised(state, batch, train_data)
            label = jnp.where(found["counted"], jnp.argmax(found["labels"], axis=1), NOBODY)
            bank = {name: jax.lax.dynamic_update_index_in_dim(bank[name], values, step, 0)
                    for name, values in (("features", found["features"]), ("label", label.astype(jnp.int32)))}
            labels = jnp.where(batch["_mask"], jnp.sum(found["labels"], axis=1, dtype=jnp.int32), 0)
            return bank, {"masked": found["masked"], "counted": jnp.sum(found["counted"], dtype=jnp.int32),
                          "labels": jnp.sum(labels, dtype=jnp.int32), "odd": found["odd"]}

        def sums(state: TrainState, bank: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = normalised(state, batch, pipeline)
            neighbours = nearest(found["features"], bank, most, everywhere)
            labels = found["labels"] & found["counted"][:, None]
            seen = jnp.sum(found["counted"], dtype=jnp.int32)
            return {"masked": found["masked"], "seen": seen, "odd": found["odd"]} | {
                f"k_{k}/{name}": value
                for k, votes in votes_of(*neighbours, config.k, config.temperature, labels.shape[1]).items()
                for name, value in batch_hits(votes, labels, k).items()}

        self._begin = jax.jit(begin, out_shardings=rows)
        self._store = jax.jit(store, donate_argnums=0, out_shardings=(rows, everywhere))
        self._sums = jax.jit(sums, out_shardings=everywhere)

    def check(self, logits: Any, out: Any) -> None:
        """Refuse a layer that the model does not have."""
        check_layer(out, self.config.representation_layer)

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `k_20/prec@1` and the like; and `k_20/prec@5` with more than five classes and k of at least 5.

        For `prec@5` a class that got no vote is never among the five, which it may be in DINO's code.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows, or the training part has fewer examples
                with a label than neighbours are asked for, or some with several.
        """
        bank, total = self._fill(train_state), {}
        for sums in over_batches(lambda batch: self._sums(train_state, bank, batch), self._pipeline, self._sharding):
            total = {name: total.get(name, 0) + int(value) for name, value in sums.items()}
        seen = total.pop("seen", 0)
        check_finite(not total.pop("odd", 0))
        for k in self.config.k:
            for name in (f"k_{k}/prec@1", f"k_{k}/prec@5"):
                if name in total:
                    yield name, total[name] / seen if seen else float("nan")

    def _fill(self, train_state: TrainState) -> dict[str, jax.Array]:
        """The features and labels of all training examples: "features" [s b d] and "label" [s b]."""
        bank, steps = None, itertools.count()

        def store(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            nonlocal bank
            bank = self._begin(train_state, batch) if bank is None else bank
            bank, counts = self._store(bank, train_state, batch, next(steps))
            return counts

        counted = 0
        for counts in over_batches(store, self.train_data, self._sharding):
            counted += int(counts["counted"])
            check_finite(not counts["odd"])
            check_single(int(counts["labels"]), int(counts["counted"]), "train_data")
        if counted < max(self.config.k):
            raise DataError(f"train_data: {max(self.config.k)} neighbours are asked for, and {counted:,} examples have "
                            "a label")
        return bank


def nearest(
    queries: Float[Array, "b d"], bank: dict[str, Array], k: int, everywhere: NamedSharding
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The highest similarities to the rows of a bank, the highest first, and these rows' labels.

    Of equal ones the row that comes first is nearer.

    Args:
        queries: vectors of length 1.
        bank: "features" [s n d], vectors of length 1, and their "label" [s n]; `NOBODY` is no neighbour of anybody.
        k: number of neighbours.
        everywhere: sharding of what every device has whole, which one of the s parts is at a time.
    """
    def closer(best: tuple[Array, Array], part: dict[str, Array]) -> tuple[tuple[Array, Array], None]:
        keys, label = (jax.lax.with_sharding_constraint(part[name], everywhere) for name in ("features", "label"))
        # At full precision, as TPUs would multiply in bfloat16.
        similarity = jnp.einsum("bd,nd->bn", queries, keys, precision="highest")
        label = jnp.broadcast_to(label, similarity.shape)
        found = jnp.concatenate([best[0], jnp.where(label == NOBODY, -jnp.inf, similarity)], axis=1)
        labels = jnp.concatenate([best[1], label], axis=1)
        found, places = jax.lax.top_k(found, k)
        return (found, jnp.take_along_axis(labels, places, axis=1)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), NOBODY, jnp.int32)
    return jax.lax.scan(closer, none, bank)[0]


def votes_of(
    similarity: Float[Array, "b n"], label: Int[Array, "b n"], ks: tuple[int, ...], temperature: float, classes: int
) -> dict[int, Float[Array, "b c"]]:
    """The logarithm of the votes for each class, by the number of neighbours that vote; -∞: there is none.

    Args:
        similarity: similarities of the neighbours, the highest first.
        label: classes of the neighbours.
        ks: numbers of neighbours that vote.
        temperature: τ.
        classes: number of classes, c.
    """
    # As logarithms, since exp(1 / τ) overflows for a small τ.
    def vote(number: Int[Array, ""], votes: Array) -> Array:
        own = jax.nn.one_hot(label[:, number], classes, dtype=bool)
        return jnp.logaddexp(votes, jnp.where(own, similarity[:, number, None] / temperature, -jnp.inf))

    votes, found, begin = jnp.full((len(label), classes), -jnp.inf), {}, 0
    for k in sorted(ks):
        votes = found[k] = jax.lax.fori_loop(begin, k, vote, votes)
        begin = k
    return {k: found[k] for k in ks}


def batch_hits(votes: Float[Array, "b c"], labels: Array, k: int) -> dict[str, jax.Array]:
    """Numbers of examples whose class has the most votes, or is among the five that have.

    Args:
        votes: logarithm of the votes for each class.
        labels: whether a class is right, bool [b c]; none is where the row does not count.
        k: number of neighbours that voted.
    """
    most, ranked = jax.lax.top_k(votes, min(5, votes.shape[1]))
    hits = jnp.take_along_axis(labels, ranked, axis=1) & (most > -jnp.inf)
    found = {"prec@1": hits[:, 0]}
    if votes.shape[1] > 5 and k >= 5:
        found["prec@5"] = jnp.any(hits, axis=1)
    return {name: jnp.sum(value, dtype=jnp.int32) for name, value in found.items()}
