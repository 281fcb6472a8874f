"""Accuracy when patches of the images are missing or out of place (Naseer et al., arXiv 2105.10497).

Of an image's patches, those of the model, a share is hidden: at random, from the middle outwards or from the rim
inwards, the most salient first or the least. Or the image is cut into tiles that are shuffled. What is hidden is black,
as in the paper's code (`evaluate.py` of IPViT: pixels 0 before normalisation). There a batch shares one choice of
patches and salience is a DINO model's; here every image has its own choice, the same at every share, and salience is
the measured model's own.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from cb_vit import dist
from cb_vit.config import ConfigError
from cb_vit.datasets import DataError
from cb_vit.datasets.chosen import some
from cb_vit.evaluators.attack import example_keys
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_folder, have_one_name, over_batches
from cb_vit.evaluators.mistakes import table
from cb_vit.evaluators.patches import Looks, draw_looks, hidden, hide, shuffle
from cb_vit.input_pipeline import Pipeline, load_example
from cb_vit.monitor.contact_sheet import Line, Tile, draw_sheet
from cb_vit.monitor.occlusion import draw_occlusion
from cb_vit.train_state import TrainState

Way = Literal["random", "centre", "outer", "salient", "non_salient"]
SHOWN_SHARE = 0.5  # of the patches that the examples on the sheet are shown without, or the nearest to it
SHOWN, SIDE = 3, 128  # images on the sheet, and the pixels of their longer side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of missing patches.

    Attributes:
        ways: names of the orders in which patches are hidden: "random"; "centre", from the middle outwards; "outer",
            from the rim inwards; "salient", those first that the model attends to most; "non_salient", least.
        ratios: shares of the patches that are hidden, from 0 to 1; rounded down to whole patches.
        shuffle: numbers of rows and columns of the tiles that are shuffled; empty: none are.
        fill: what is seen in the place of a hidden patch: "black", or "mean", the pixel that normalising takes to 0.
        examples: number of examples, drawn by lot; None, or more than there are: all.
        seed: seed of what is drawn.
    """

    ways: tuple[Way, ...] = ("random", "salient", "non_salient")
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    shuffle: tuple[int, ...] = ()
    fill: Literal["black", "mean"] = "black"
    examples: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_folder(self)
        for name in ("ways", "ratios", "shuffle"):
            values = getattr(self, name)
            if have_one_name(values):
                raise ConfigError(name, f"must be different, got {values}")
        if not (self.ways and self.ratios) and not self.shuffle:
            raise ConfigError("ways", "and ratios, or shuffle, say what is measured, and all are empty")
        for ratio in self.ratios:
            if not 0 <= ratio <= 1:
                raise ConfigError("ratios", f"are shares from 0 to 1, got {ratio}")
        for tiles in self.shuffle:
            if tiles < 1:
                raise ConfigError("shuffle", f"is a number of rows and columns, at least 1; got {tiles}")
        if self.examples is not None and self.examples < 1:
            raise ConfigError("examples", f"must be at least 1, got {self.examples}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be in [0, 2³²), got {self.seed}")


class Condition(NamedTuple):
    """What is done to the images.

    Attributes:
        way: order in which patches are hidden, or "shuffle": tiles are shuffled; "clean": nothing is done.
        share: share of the patches that is hidden.
        tiles: number of rows and columns of the tiles that are shuffled; 0: none are.
    """

    way: str
    share: float = 0.0
    tiles: int = 0

    @property
    def name(self) -> str:
        """The beginning of the names of its metrics."""
        return {"clean": "clean", "shuffle": f"shuffle/{self.tiles}"}.get(self.way, f"{self.way}/{self.share:g}")


class Evaluator:
    """Accuracy by how much is hidden, over a data source; `files` shows that of the last run.

    Salience is the attention of the class token in the last block, averaged over heads; of a model without one it is
    the gradient of the predicted class's logit, |∂z/∂x| summed over the pixels of a patch (Simonyan et al., arXiv
    1312.6034). Labels may be multi-hot, as in `classification`.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding):
        self.config, self.source = config, pipeline.source
        height, width, channels = pipeline.spec["image"][0]
        for tiles in config.shuffle:
            if height % tiles or width % tiles:
                raise ConfigError("shuffle", f"{tiles} rows and columns of tiles do not divide images of "
                                             f"{height}×{width} pixels")
        self._pipeline = dataclasses.replace(pipeline, source=some(pipeline.source, config.examples, config.seed))
        self._sharding, self._step, self._seen = sharding, 0, 0
        self._conditions, self._accuracies = _conditions(config), []
        self._shown: Looks | None = None
        mean = pipeline.preprocess.normalisation(channels).mean if config.fill == "mean" else (0.0,) * channels
        self._fill = np.clip(255 * np.array(mean), 0, 255).astype(np.float32)

        def predict(pixels: jax.Array, state: TrainState, batch: dict[str, jax.Array], **options: Any) -> Any:
            return predict_fn(state, pipeline.preprocess.device({**batch, "image": pixels})["image"], **options)

        def sums(state: TrainState, batch: dict[str, jax.Array], first: jax.Array) -> dict[str, Any]:
            labels = pipeline.preprocess.device(batch)["labels"] > 0
            counted = batch["_mask"] & jnp.any(labels, axis=1)
            pixels, keys = batch["image"].astype(jnp.float32), example_keys(config.seed, first, len(counted))
            model = functools.partial(predict, state=state, batch=batch)
            looks = draw_looks(config.ways, config.shuffle, model, pixels, keys, has_class_token="cls" in state.params)
            change = _changes(self._conditions, looks, self._fill)

            def hits(number: jax.Array) -> jax.Array:
                logits, _ = model(change(pixels, number))
                predicted = jnp.argmax(logits, axis=1, keepdims=True)
                return jnp.sum(jnp.take_along_axis(labels, predicted, axis=1)[:, 0] & counted, dtype=jnp.int32)

            return {"hits": jax.lax.map(hits, jnp.arange(len(self._conditions), dtype=jnp.int32)),
                    "seen": jnp.sum(counted, dtype=jnp.int32), "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32),
                    "shown": jax.tree.map(lambda leaf: leaf[:SHOWN], looks)}

        self._sums = jax.jit(sums, out_shardings=dist.replicated(sharding.mesh))

    def check(self, logits: Any, out: Any) -> None:
        """Refuse a model that is not known to see patches."""
        if "stem" not in out:
            raise ConfigError("type", "'occlusion' hides patches, and the model does not say what its patches are")

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `clean/prec@1`, that of `random/0.5` and so on, and that of `shuffle/4` and so on.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows.
        """
        self._step, self._shown, hits, self._seen = int(train_state.step), None, 0, 0
        firsts = itertools.count(step=self._pipeline.config.batch_size)
        for found in over_batches(lambda batch: self._sums(train_state, batch, np.int32(next(firsts))),
                                  self._pipeline, self._sharding):
            hits, self._seen = hits + found["hits"].astype(np.int64), self._seen + int(found["seen"])
            self._shown = self._shown or found["shown"]
        accuracies = hits / self._seen if self._seen else np.full(len(self._conditions), np.nan)
        self._accuracies = accuracies.tolist()
        for condition, accuracy in zip(self._conditions, self._accuracies, strict=True):
            yield f"{condition.name}/prec@1", accuracy

    def files(self) -> Iterator[tuple[str, str | bytes]]:
        """A table and pictures of the last run, by the names of their files; images are read again for them."""
        measured = list(zip(self._conditions, self._accuracies, strict=True))
        yield "occlusion.csv", table(("way", "ratio", "tiles", "examples", "prec@1"), (
            (way, "" if tiles else f"{share:g}", tiles or "", self._seen, f"{accuracy:.6f}")
            for (way, share, tiles), accuracy in measured))
        (_, clean), *others = measured
        yield "occlusion.png", draw_occlusion(
            {way: [(0.0, clean), *((c.share, accuracy) for c, accuracy in others if c.way == way and c.share)]
             for way in dict.fromkeys(c.way for c, _ in others if not c.tiles)},
            [(c.tiles, accuracy) for c, accuracy in others if c.tiles], f"step {self._step}: {self._seen:,} images")
        shares = {c.share for c, _ in others if c.share}
        share = min(shares, key=lambda share: abs(share - SHOWN_SHARE), default=0)
        shown = [number for number, (c, _) in enumerate(measured) if c.way in ("clean", "shuffle") or c.share == share]
        yield "occluded.png", draw_sheet(
            list(self._tiles(shown)), f"step {self._step}: what the model sees",
            "under each image the accuracy on all that are changed so", side=SIDE, columns=len(shown))

    def _tiles(self, shown: Sequence[int]) -> Iterator[Tile]:
        """The first images, each under the conditions with these numbers."""
        rows, images = [], []
        for row in range(min(len(self._pipeline.source), SHOWN, self.config.batch_size)):
            # What `skip_errors` let pass is not shown.
            with contextlib.suppress(DataError):
                images.append(load_example(self._pipeline.source, self._pipeline.preprocess, row,
                                           np.random.default_rng(0))["image"])
                rows.append(row)
        if not rows:
            return
        looks = jax.tree.map(lambda leaf: jnp.asarray(leaf[np.array(rows)]), self._shown)
        change = jax.jit(_changes(self._conditions, looks, self._fill))
        changed = [np.uint8(np.rint(change(jnp.float32(np.stack(images)), jnp.int32(number)))) for number in shown]
        for row in range(len(rows)):
            for number, pictures in zip(shown, changed, strict=True):
                yield Tile(pictures[row], [Line(self._conditions[number].name, f"  {self._accuracies[number]:.1%}")])


def _conditions(config: Config) -> list[Condition]:
    """What is done to the images, first nothing."""
    without = [Condition(way, share) for way in config.ways for share in config.ratios]
    return [Condition("clean"), *without, *(Condition("shuffle", tiles=tiles) for tiles in config.shuffle)]


def _changes(conditions: Sequence[Condition], looks: Looks, fill: np.ndarray) -> Any:
    """A function from (images, number of a condition) to the images under it."""
    ways, tiles = list(looks.ranks), [0, *looks.places]
    patches = math.prod(next(iter(looks.ranks.values())).shape[1:]) if ways else 0
    # Nothing is hidden under "clean", whichever the order.
    which = np.array([ways.index(c.way) if c.way in ways else 0 for c in conditions], np.int32)
    counts = np.array([hidden(c.share, patches) for c in conditions], np.int32)
    kinds = np.array([tiles.index(c.tiles) for c in conditions], np.int32)

    def change(pixels: Float[Array, "b y x c"], number: Int[Array, ""]) -> Float[Array, "b y x c"]:
        def hide_some(pixels: Array) -> Array:
            if not ways:
                return pixels
            ranks = jnp.stack(list(looks.ranks.values()))[jnp.asarray(which)[number]]
            return hide(pixels, ranks < jnp.asarray(counts)[number], fill)

        branches = [hide_some, *(functools.partial(shuffle, places=places, tiles=number)
                                 for number, places in looks.places.items())]
        return jax.lax.switch(jnp.asarray(kinds)[number], branches, pixels)

    return change
