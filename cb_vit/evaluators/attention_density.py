"""How dense the attention of each block and head is: entropy, reach, rank and more, over a data source.

The measures are those of `analysis/attention_measures.py`; `docs/density.md` has the formulas. Labels are not looked
at, and a model without a head will do.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cb_vit import dist
from cb_vit.analysis.attention_measures import Density, by_block
from cb_vit.analysis.density import as_csv, draw_density
from cb_vit.analysis.density_sums import DensitySums
from cb_vit.config import ConfigError
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_folder, over_batches
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState

NEEDS_CLASSES = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of the attention's density.

    Attributes:
        top_k: number of keys whose attention is summed in `top_k_mass`, the strongest of each query.
    """

    top_k: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.top_k < 1:
            raise ConfigError("top_k", f"is a number of keys, at least 1, got {self.top_k}")
        check_folder(self)


class Evaluator:
    """Density of attention over a data source; `files` has every block and head of the last run."""

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding):
        self.config, self.source = config, pipeline.source
        self._predict_fn, self._pipeline, self._sharding = predict_fn, pipeline, sharding
        self._made: tuple[Density, Callable[..., dict[str, jax.Array]]] | None = None
        self._step, self._sums = 0, None

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields the mean of each measure over images, blocks and heads, and the entropy of each block.

        All tokens are queries and keys, but for `attention_distance`, which is from patches to patches.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows.
        """
        if self._made is None:
            self._made = self._make(train_state)
        density, numbers = self._made
        self._step, self._sums = int(train_state.step), DensitySums(density)
        for batch in over_batches(lambda batch: numbers(train_state, batch), self._pipeline, self._sharding):
            self._sums.add(batch["values"][batch["counted"]])
        yield from self._sums.metrics()

    def files(self) -> Iterator[tuple[str, str | bytes]]:
        """The table and the picture of the last run, by the names of their files."""
        rows = self._sums.rows()
        yield "density.csv", as_csv(rows)
        yield "density.png", draw_density(
            {f"step {self._step}": rows}, f"attention over {self._sums.images:,} images; k = {self.config.top_k}")

    def _make(self, state: TrainState) -> tuple[Density, Callable[..., dict[str, jax.Array]]]:
        """The measures for the model's tokens, and the function from a batch to the numbers of its images."""
        preprocess, (shape, _) = self._pipeline.preprocess, self._pipeline.spec["image"]
        _, out = jax.eval_shape(self._predict_fn, state, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        density = Density.of(out, shape[:2], self.config.top_k)

        def numbers(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            batch = preprocess.device(batch)
            _, out = self._predict_fn(state, batch["image"], attention=density)
            return {"values": by_block(out["encoder"]), "counted": batch["_mask"],
                    "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}

        # A few numbers an image, which all processes get; maps and pixels stay where they are.
        return density, jax.jit(numbers, out_shardings=dist.replicated(self._sharding.mesh))
