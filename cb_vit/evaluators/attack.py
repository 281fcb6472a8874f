"""Accuracy under attack: images changed by at most ε a pixel so that the model's loss grows.

FGSM (Goodfellow et al., arXiv 1412.6572) takes one step x + ε sign(∇L); PGD (Madry et al., arXiv 1706.06083) several
smaller ones from a random place in the ball |x' - x| ≤ ε, each brought back into it. ε is in units of a pixel from 0 to
255, before any normalisation: gradients go through the device's part of the preprocessing, so that an ε means the same
for every model. Changed pixels stay in [0, 255], but are not rounded.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key, Num

from cb_vit import dist
from cb_vit.config import ConfigError
from cb_vit.datasets.chosen import some
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, have_one_name, over_batches
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator under attack.

    Attributes:
        attacks: names of the attacks, "fgsm" and "pgd".
        eps: how far a pixel may be moved, each ε from 0 to 255.
        steps: number of steps of PGD, each as dear as a step of training.
        step_size: length of a step of PGD, in pixels; None: 2.5 ε / steps, as Madry et al. have it, so that any point
            of the ball can be reached from any other.
        examples: number of examples that are attacked, drawn by lot; None, or more than there are: all.
        seed: seed of the lots and of where PGD begins.
    """

    attacks: tuple[Literal["fgsm", "pgd"], ...] = ("fgsm", "pgd")
    eps: tuple[float, ...] = (1.0, 2.0, 4.0)
    steps: int = 10
    step_size: float | None = None
    examples: int | None = 1000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("attacks", "eps"):
            values = getattr(self, name)
            if not values or have_one_name(values):
                raise ConfigError(name, f"must be different, and at least one; got {values}")
        for eps in self.eps:
            if not 0 <= eps <= 255:
                raise ConfigError("eps", f"is in units of a pixel from 0 to 255, got {eps}")
        if max(self.eps) and max(self.eps) < 0.1:
            raise ConfigError("eps", f"is in units of a pixel from 0 to 255, got {max(self.eps)}: 8 / 255 is written 8")
        for name in ("steps", "examples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(name, f"must be at least 1, got {value}")
        if self.step_size is not None and not 0 < self.step_size <= 255:
            raise ConfigError("step_size", f"is in units of a pixel, above 0 and at most 255; got {self.step_size}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be in [0, 2³²), got {self.seed}")


class Attack(NamedTuple):
    """How images are attacked; with a leading axis, in how many ways.

    Attributes:
        eps: radius of the ball in pixels, float32 [].
        step_size: length of a step in pixels, float32 [].
        steps: number of steps, int32 [].
        random: whether it begins at a random place in the ball, bool [].
    """

    eps: Any
    step_size: Any
    steps: Any
    random: Any


class Evaluator:
    """Accuracy under attack, over a data source.

    Labels may be multi-hot, as in `classification`; the loss that is driven up is the cross-entropy with an example's
    labels as equally probable. An example counts as right if it is right under the attack.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding):
        self.config, self.source = config, pipeline.source
        self._pipeline = dataclasses.replace(pipeline, source=some(pipeline.source, config.examples, config.seed))
        self._sharding, self._attacks = sharding, _attacks(config)
        attacks = Attack(*(np.stack(parts) for parts in zip(*self._attacks.values(), strict=True)))

        def loss(pixels: jax.Array, state: TrainState, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            seen = pipeline.preprocess.device({**batch, "image": pixels})
            return losses(predict_fn(state, seen["image"])[0], seen["labels"])

        def measure(state: TrainState, batch: dict[str, jax.Array], first: jax.Array) -> dict[str, jax.Array]:
            labels = pipeline.preprocess.device(batch)["labels"] > 0
            counted = batch["_mask"] & jnp.any(labels, axis=1)
            keys = example_keys(config.seed, first, len(counted))
            slope = jax.grad(lambda pixels: jnp.sum(jnp.where(counted, loss(pixels, state, batch)[0], 0)))

            def of_one(attack: Attack) -> dict[str, jax.Array]:
                pixels = perturb(batch["image"].astype(jnp.float32), slope, attack, keys)
                values, right = loss(pixels, state, batch)
                return {"prec@1": jnp.sum(right & counted, dtype=jnp.float32),
                        "loss": jnp.sum(jnp.where(counted, values, 0))}

            return {**jax.lax.map(of_one, attacks), "seen": jnp.sum(counted, dtype=jnp.float32),
                    "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}

        self._measure = jax.jit(measure, out_shardings=dist.replicated(sharding.mesh))

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `clean/prec@1` and `clean/loss` of the examples, and the same of `fgsm/eps_1` and so on.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows.
        """
        firsts = itertools.count(step=self._pipeline.config.batch_size)
        total: dict[str, Any] = {}
        for sums in over_batches(lambda batch: self._measure(train_state, batch, np.int32(next(firsts))),
                                 self._pipeline, self._sharding):
            total = {name: total.get(name, 0.0) + value.astype(np.float64) for name, value in sums.items()}
        seen = total.pop("seen", 0.0)
        for number, attack in enumerate(self._attacks):
            for name, value in total.items():
                yield f"{attack}/{name}", float(value[number] / seen) if seen else float("nan")


def _attacks(config: Config) -> dict[str, Attack]:
    """The attacks by the names of their metrics; the first one leaves images as they are."""
    found = {"clean": (0.0, 0.0, 0, False)}
    for name in config.attacks:
        for eps in config.eps:
            step = 2.5 * eps / config.steps if config.step_size is None else config.step_size
            found[f"{name}/eps_{eps:g}"] = (eps, eps, 1, False) if name == "fgsm" else (eps, step, config.steps, True)
    dtypes = np.float32, np.float32, np.int32, np.bool_
    return {name: Attack(*(dtype(value) for dtype, value in zip(dtypes, values, strict=True)))
            for name, values in found.items()}


def losses(logits: Float[Array, "b c"], labels: Num[Array, "b c"]) -> tuple[Float[Array, " b"], Array]:
    """Cross-entropy of each example with its labels as equally probable, and whether the predicted class is among them.

    Args:
        logits: logits of the classes.
        labels: labels, positive where a class is right; the loss of a row without any is 0.
    """
    hit = labels > 0
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.sum(jnp.where(hit, log_p, 0), axis=1) / jnp.maximum(jnp.sum(hit, axis=1, dtype=jnp.float32), 1)
    return loss, jnp.take_along_axis(hit, jnp.argmax(logits, axis=1, keepdims=True), axis=1)[:, 0]


def example_keys(seed: int, first: Int[Array, ""], count: int) -> Key[Array, " b"]:
    """A key for each row of a batch: that of the example's place in the order of the evaluator.

    Args:
        seed: the seed.
        first: place of the first row.
        count: number of rows, b.
    """
    return jax.vmap(lambda place: jax.random.fold_in(jax.random.key(seed), place))(
        first + jnp.arange(count, dtype=jnp.int32))


def perturb(image: Float[Array, "b y x c"], slope: Any, attack: Attack, keys: Key[Array, " b"]
            ) -> Float[Array, "b y x c"]:
    """Images under attack, within ε of what they were and in [0, 255].

    Args:
        image: pixels from 0 to 255.
        slope: function from pixels to the gradient of the loss.
        attack: how they are attacked.
        keys: a key for each image, that its first place is drawn from.
    """
    low, high = jnp.maximum(image - attack.eps, 0), jnp.minimum(image + attack.eps, 255)
    noise = jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:], jnp.float32, -1, 1))(keys)
    begin = jnp.clip(image + jnp.where(attack.random, attack.eps, 0) * noise, low, high)

    def step(_: Int[Array, ""], pixels: Array) -> Array:
        return jnp.clip(pixels + attack.step_size * jnp.sign(slope(pixels)), low, high)

    return jax.lax.fori_loop(0, attack.steps, step, begin)
