"""What an accuracy hides: how each class fares, what is taken for what, and which images are got wrong."""
from __future__ import annotations

import collections
import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float

from cb_vit import dist
from cb_vit.config import ConfigError
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_folder, over_batches
from cb_vit.input_pipeline import Pipeline
from cb_vit.monitor.confusion import draw_confusion
from cb_vit.monitor.contact_sheet import Line, Tile, draw_sheet
from cb_vit.monitor.style import FAINT, RIGHT, WRONG
from cb_vit.texts import printable
from cb_vit.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of mistakes.

    Attributes:
        images: number of images on each contact sheet.
    """

    images: int = 32

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.images <= 64:
            raise ConfigError("images", f"must be from 1 to 64, as more would be too small to see, got {self.images}")
        check_folder(self.prefix, "mistakes")


class Guess(NamedTuple):
    """What the model says of one example.

    Attributes:
        index: number of the example in the source.
        true: class that it is.
        predicted: class that the model finds most probable.
        probability: probability of that class, by a softmax over all.
        loss: minus the logarithm of the probability of the true class.
        margin: how much more probable the first class is than the second.
    """

    index: int
    true: int
    predicted: int
    probability: float
    loss: float
    margin: float


class Evaluator:
    """Mistakes over a data source; `files` shows those of the last run.

    Labels may be multi-hot, as in `classification`: a prediction is right if its class is among them, and an example
    counts as the one of its classes that the model finds most probable. One without any label is left out.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding):
        self.config, self.source = config, pipeline.source
        self._pipeline, self._sharding = pipeline, sharding
        self._step, self._names, self._pairs = 0, (), collections.Counter()
        self._wrong: list[Guess] = []
        self._unsure: list[Guess] = []

        def guesses(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            batch = pipeline.preprocess.device(batch)
            logits, _ = predict_fn(state, batch["image"])
            return {**batch_guesses(logits, batch["labels"], batch["_mask"]), "classes": jnp.int32(logits.shape[1]),
                    "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}

        # A few numbers a row, which all processes get: pixels and logits stay where they are.
        self._guesses = jax.jit(guesses, out_shardings=dist.replicated(sharding.mesh))

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `mean_class_acc`, the mean of the classes' accuracies, and `worst_class_acc`, the lowest of them.

        Classes without an example are left out.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows.
        """
        self._step, self._pairs, self._wrong, self._unsure = int(train_state.step), collections.Counter(), [], []
        classes = 0
        batches = over_batches(lambda batch: self._guesses(train_state, batch), self._pipeline, self._sharding)
        for number, batch in enumerate(batches):
            classes = int(batch.pop("classes"))
            rows = np.flatnonzero(batch.pop("counted"))
            first = number * self.config.batch_size
            self._pairs.update(zip(batch["true"][rows].tolist(), batch["predicted"][rows].tolist(), strict=True))
            wrong = rows[batch["true"][rows] != batch["predicted"][rows]]
            self._wrong = self._most(self._wrong, wrong, batch, first, lambda guess: -guess.loss)
            self._unsure = self._most(self._unsure, rows, batch, first, lambda guess: guess.margin)
        known = self.source.class_names or ()
        self._names = (*known, *(f"class {number}" for number in range(len(known), classes)))
        accuracies = [correct / examples for examples, correct in self._counts() if examples]
        yield "mean_class_acc", float(np.mean(accuracies)) if accuracies else float("nan")
        yield "worst_class_acc", min(accuracies, default=float("nan"))

    def files(self) -> Iterator[tuple[str, str | bytes]]:
        """Tables and pictures of the last run, by the names of their files; images are read again for them."""
        names, step, counts = self._names, f"step {self._step}", self._counts()
        confused = self._most_confused()
        yield "per_class.csv", table(
            ("class", "examples", "correct", "accuracy", "most confused with", "times"),
            ((names[number], examples, correct, f"{correct / examples:.4f}" if examples else "",
              *((names[confused[number][0]], confused[number][1]) if number in confused else ("", 0)))
             for number, (examples, correct) in enumerate(counts)))
        yield "confusion.csv", table(("true", "predicted", "examples"), (
            (names[true], names[predicted], number) for (true, predicted), number in sorted(self._pairs.items())))
        examples, correct = sum(number for number, _ in counts), sum(right for _, right in counts)
        yield "confusion.png", draw_confusion(
            self._pairs, names, f"{step}: {correct:,} of {examples:,} right")
        yield "most_wrong.png", draw_sheet(
            self._tiles(self._wrong), f"{step}: the most wrong of {examples - correct:,} mistakes",
            "where the true class was given the least probability")
        yield "least_sure.png", draw_sheet(
            self._tiles(self._unsure), f"{step}: the least sure of {examples:,} images",
            "where the two most probable classes are closest")

    def _most(self, best: list[Guess], rows: np.ndarray, batch: dict[str, np.ndarray], first: int, key: Any
              ) -> list[Guess]:
        """The first of `best` and of these rows by `key`, as many as a sheet shows."""
        columns = [batch[field][rows].tolist() for field in Guess._fields[1:]]
        found = map(Guess, (first + rows).tolist(), *columns)
        return sorted([*best, *found], key=lambda guess: (key(guess), guess.index))[:self.config.images]

    def _counts(self) -> list[tuple[int, int]]:
        """(examples, how many of them are right) of each class."""
        examples = collections.Counter()
        for (true, _), number in self._pairs.items():
            examples[true] += number
        return [(examples[number], self._pairs[number, number]) for number in range(len(self._names))]

    def _most_confused(self) -> dict[int, tuple[int, int]]:
        """By class, the one it is most often taken for, and how often; classes without a mistake are left out."""
        found: dict[int, tuple[int, int]] = {}
        for (true, predicted), number in sorted(self._pairs.items()):
            if true != predicted and number > found.get(true, (0, 0))[1]:
                found[true] = predicted, number
        return found

    def _tiles(self, guesses: Sequence[Guess]) -> list[Tile]:
        tiles = []
        for guess in guesses:
            features = self.source[guess.index]
            image = self._pipeline.preprocess.host(features, np.random.default_rng(0))["image"]
            colour = RIGHT if guess.true == guess.predicted else WRONG
            tiles.append(Tile(image, [
                Line(f"is {self._names[guess.true]}"),
                Line(f"says {self._names[guess.predicted]}", f"  {guess.probability:.0%}", colour),
                Line(str(features.get("id", guess.index)), colour=FAINT)]))
        return tiles


def batch_guesses(
    logits: Float[Array, "b c"], labels: Float[Array, "b c"], mask: Bool[Array, " b"]
) -> dict[str, jax.Array]:
    """The fields of a `Guess` but its index, [b] each, and "counted": whether a row has an example with a label.

    Args:
        logits: logits of the classes.
        labels: labels, positive where a class is right.
        mask: booleans, False where a row is padding.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jnp.argmax(jnp.where(labels > 0, log_p, -jnp.inf), axis=1)
    top, ranked = jax.lax.top_k(log_p, min(2, logits.shape[1]))
    p = jnp.exp(top)
    return {"counted": mask & jnp.any(labels > 0, axis=1), "true": true, "predicted": ranked[:, 0],
            "probability": p[:, 0], "loss": -jnp.take_along_axis(log_p, true[:, None], axis=1)[:, 0],
            "margin": p[:, 0] - (p[:, 1] if logits.shape[1] > 1 else 0)}


def table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV; what could do more in a terminal than be read is escaped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows([printable(cell) for cell in row] for row in rows)
    return text.getvalue()
