"""`first_batch.png`: images of the first step as the model sees them, after all augmentation, and their targets."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from cb_vit import dist, io, train_step
from cb_vit.experiment import Experiment
from cb_vit.monitor.contact_sheet import Line, Tile, draw_sheet
from cb_vit.monitor.style import FAINT, WRONG

NAME = "first_batch.png"
MOST = 32  # images
SHOWN = 0.005  # weight from which a class is named, as two decimals show it


class FirstBatch:
    """The picture of the batch that a run begins with, or goes on with; a context manager, at whose end it is there.

    What prepares and augments in the train step is compiled once more, without the model. One process does that in a
    thread while it trains; several run their programs in one order, and so do it at once.

    Args:
        run: the experiment.
        workdir: the run's folder.
        show: function of (name, PNG, step) that shows the picture elsewhere as well.
    """

    def __init__(self, run: Experiment, workdir: str | os.PathLike,
                 show: Callable[[str, bytes, int], None] = lambda *_: None):
        self._run, self._workdir, self._show = run, workdir, show
        self._thread = ThreadPoolExecutor(1, "first_batch")

    def __enter__(self) -> FirstBatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._thread.shutdown()

    def draw(self, batch: dict[str, jax.Array], step: int) -> None:
        """Draw the batch: all processes take part, the first writes, and failing is a warning.

        Args:
            batch: the global batch as the host delivers it.
            step: the number of completed steps.
        """
        if jax.process_count() > 1:
            self._draw(batch, step)
        else:
            self._thread.submit(self._draw, batch, step)

    def _draw(self, batch: dict[str, jax.Array], step: int) -> None:
        def pictures() -> Iterator[tuple[str, bytes]]:
            samples = jax.device_get(self._compile()(batch, jnp.int32(step)))
            if jax.process_index() == 0:
                note = f"{len(samples['image'])} images of a batch of {batch['_mask'].shape[0]}, after all augmentation"
                picture = draw_batch(**samples, class_names=self._run.class_names,
                                     title=f"What the model sees at step {step + 1}", note=note)
                yield NAME, picture
                self._show(NAME.removesuffix(".png"), picture, step)

        io.try_to_write(self._workdir, pictures())

    def _compile(self) -> Callable[..., dict[str, jax.Array]]:
        run = self._run
        # Replicated, so that each process holds all of the few samples, whoever holds their rows of the batch.
        shardings = dict(in_shardings=(run.batch_sharding, None), out_shardings=dist.replicated(run.mesh))
        lowered = jax.jit(sampler(run), **shardings).lower(run.batch_shapes(), jax.ShapeDtypeStruct((), jnp.int32))
        # Run once, it need not be fast: on CPUs, a third of the time to compile.
        cpu = run.mesh.devices.flat[0].platform == "cpu"
        return lowered.compile({"xla_backend_optimization_level": "0"} if cpu else None)


def sampler(run: Experiment) -> Callable[..., dict[str, jax.Array]]:
    """The pure function (batch, completed steps) → `MOST` rows spread over the batch, as `draw_batch` takes them.

    Pixels are as before normalisation. Label smoothing is taken off, which is one and the same for all images and would
    name every class.

    Args:
        run: the experiment whose train step sees such batches.
    """
    settings, (*_, channels) = run.settings, run.example_spec["image"][0]
    mean, std = (np.asarray(part, np.float32).reshape(1, 1, 1, -1)
                 for part in settings.input.pp.normalisation(channels))
    size, smoothing = settings.input.batch_size, settings.label_smoothing
    rows = np.linspace(0, size - 1, min(size, MOST)).round().astype(np.int32)

    def samples(batch: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
        seen = train_step.augmented(batch, step, prepare=settings.input.pp.device, augment=settings.recipe,
                                    seed=settings.seed)
        image, labels, readable = (x[rows] for x in (seen["image"], seen["labels"], batch["_mask"]))
        pixels = jnp.round(255 * jnp.clip(image * std + mean, 0, 1)).astype(jnp.uint8)
        return {"image": pixels, "weights": (labels - smoothing / labels.shape[1]) / (1 - smoothing),
                "readable": readable}

    return samples


def draw_batch(
    image: UInt8[np.ndarray, "b y x c"], weights: Float[np.ndarray, "b classes"], readable: Bool[np.ndarray, " b"], *,
    class_names: Sequence[str] | None, title: str, note: str,
) -> bytes:
    """A contact sheet of images and their targets, as a PNG.

    Args:
        image: pixels of the images.
        weights: weights of the classes in each image's target, without label smoothing.
        readable: whether each row holds an image at all.
        class_names: names of the classes; None: not known.
        title: text above the images.
        note: a smaller line below the title.
    """
    names = class_names or [f"class {number}" for number in range(weights.shape[1])]
    tiles = [Tile(pixels, _caption(row, names) if there else [Line("could not be read", colour=WRONG)])
             for pixels, row, there in zip(image, weights, readable, strict=True)]
    return draw_sheet(tiles, title, note)


def _caption(weights: Float[np.ndarray, " classes"], names: Sequence[str]) -> list[Line]:
    """The two classes of most weight, and how many there are besides."""
    there = [int(number) for number in np.argsort(-weights, kind="stable") if weights[number] >= SHOWN]
    if not there:
        return [Line("no label", colour=FAINT)]
    if len(there) == 1 and weights[there[0]] > 1 - SHOWN:
        return [Line(names[there[0]])]
    lines = [Line(names[number], f"  {weights[number]:.2f}") for number in there[:2]]
    return lines + [Line(f"and {len(there) - 2} more", colour=FAINT)] * (len(there) > 2)
