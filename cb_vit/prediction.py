"""From image files to classes: which files, decoded ahead by threads, in batches of one size."""
from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cb_vit import io, retry
from cb_vit.analysis.attention_maps import View
from cb_vit.config import ConfigError, Failure
from cb_vit.models.vit import patch_grid
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess
from cb_vit.registry import parse_calls
from cb_vit.weights import Weights
from cb_vit.weights.loading import LABEL_OPS

T, U = TypeVar("T"), TypeVar("U")
THREADS = min(16, os.cpu_count() or 1)
EXAMPLE = "decode|resize_small(256)|central_crop(224)"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One file, and what a model says of it.

    Attributes:
        path: path of the file.
        error: reason why the file could not be read; None: it was, and the rest is there.
        image: image as the model saw it, before its pixels were normalised.
        classes: numbers of the most probable classes, the most probable first.
        probabilities: probabilities of these classes, by a softmax over all.
        maps: attention maps, as `View.maps` gives them; None: none were asked for.
    """

    path: str
    error: str | None = None
    image: UInt8[np.ndarray, "y x c"] | None = None
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    maps: Float[np.ndarray, "maps gy gx"] | None = None


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files as a model takes them.

    Attributes:
        preprocess: preprocessing, from the function `preprocessing`.
        shape: shape of the images that the model is given, [y x c].
    """

    preprocess: Preprocess
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, weights: Weights, preprocess: Preprocess) -> Images:
        """The images for a model.

        Raises:
            ConfigError: it cannot take the images that `preprocess` makes.
        """
        return cls(preprocess, _image_shape(weights, preprocess))

    def through(
        self, function: Callable[[UInt8[np.ndarray, "b y x c"]], Any], paths: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Prediction], Any]]:
        """What a function makes of the images, batch by batch, and the images themselves.

        Args:
            function: function of a batch, to which the device goes on while results are fetched.
            paths: paths of image files.
            batch_size: number of images at once; the last batch is filled up, so that one size is compiled. Rows that
                hold no image, as the file could not be read, are black.

        Returns:
            The files of each batch, with `image` or `error`, and the function's result on the host.
        """
        read = ahead(self.read, paths, THREADS, 2 * batch_size)
        running: collections.deque[tuple[list[Prediction], Any]] = collections.deque()
        while batch := list(itertools.islice(read, batch_size)):
            images = np.zeros((batch_size, *self.shape), np.uint8)
            for row, found in enumerate(batch):
                if not found.error:
                    images[row] = found.image
            running.append((batch, function(images)))
            if len(running) > 1:  # the device works on while results are fetched
                batch, outputs = running.popleft()
                yield batch, jax.device_get(outputs)
        for batch, outputs in running:
            yield batch, jax.device_get(outputs)

    def read(self, path: str) -> Prediction:
        """One file, with `image` or `error`."""
        try:
            # The same draws for every file, should there be a random op.
            with io.open_regular(path) as file:
                data = file.read()
            image = self.preprocess.host({"image": data}, np.random.default_rng(0))["image"]
        except OSError as error:
            return Prediction(path, error=error.strerror or str(error))
        except Exception as error:  # as the input pipeline: ops raise whatever they stumble over
            return Prediction(path, error=retry.reason(error))
        if image.shape != self.shape:
            (height, width, _), wanted = image.shape, self.shape[:2]
            return Prediction(path, error=f"{height}×{width} pixels, where the model takes {wanted[0]}×{wanted[1]}; "
                                          f"to resize, give --pp='{_resizing(self.preprocess, wanted)}'")
        return Prediction(path, image=image)


class Predictor:
    """A model that takes image files.

    Args:
        weights: the model, whose parameters are read when prediction begins.
        preprocess: preprocessing, from the function `preprocessing`.
        top: number of classes to name, at most all.
        layers: numbers (from 0) of the blocks whose attention is looked at; None: no attention maps.
        rollout: whether attention rollout is looked at too.

    Attributes:
        images: the images that the model is given.
        view: description of the attention maps that are made; None: none are.

    Raises:
        ConfigError: the model does not classify, or cannot take the images that `preprocess` makes.
    """

    def __init__(self, weights: Weights, preprocess: Preprocess, top: int = 5, layers: tuple[int, ...] | None = None,
                 rollout: bool = False):
        config, classes = weights.model.config, weights.model.num_classes
        if not classes or config.pool_type == "none":
            what = "classifies every token on its own" if classes else "has no head, so it has no classes"
            raise ConfigError("--weights", f"{weights} {what}; fine-tune it first (config.model_init)")
        self.weights, self.top = weights, min(top, classes)
        self.images = Images.of(weights, preprocess)
        grid = patch_grid(config, self.images.shape[:2])
        self.view = None if layers is None else View(config, grid, layers, rollout)
        self._apply = jax.jit(self._forward)

    def __call__(self, paths: Sequence[str], batch_size: int) -> Iterator[Prediction]:
        """One prediction for each file, in their order; what cannot be read has an `error`.

        Args:
            paths: paths of image files.
            batch_size: number of images at once.

        Raises:
            Failure: the model's output is not finite.
        """
        params = self.weights.read()
        for batch, outputs in self.images.through(lambda images: self._apply(params, images), paths, batch_size):
            yield from _finish(batch, outputs)

    def _forward(
        self, params: Any, images: UInt8[Array, "b y x c"]
    ) -> tuple[Float[Array, "b k"], Int[Array, "b k"], Float[Array, "b maps gy gx"] | None]:
        images = self.images.preprocess.device({"image": images})["image"]
        logits, out = self.weights.model.apply({"params": params}, images, attention=self.view is not None)
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), self.top)
        return probabilities, classes, self.view and self.view.maps(out["encoder"])


def _finish(batch: list[Prediction], outputs: Any) -> Iterator[Prediction]:
    probabilities, classes, maps = outputs
    for row, found in enumerate(batch):
        if found.error:
            yield found
            continue
        if not np.isfinite(probabilities[row]).all():
            raise Failure(f"{found.path}: the model's output is not finite; are these weights whole?")
        yield dataclasses.replace(found, classes=tuple(classes[row].tolist()), maps=None if maps is None else maps[row],
                                  probabilities=tuple(probabilities[row].tolist()))


def preprocessing(weights: Weights, pp: str | None = None) -> Preprocess:
    """The preprocessing that takes a file's bytes to the model's images.

    Args:
        weights: the model that the images are for.
        pp: preprocessing string to use in place of what the weights say. It may leave out decoding; if it leaves out
            normalising, that is done as in training.

    Raises:
        ConfigError: the string is wrong, or what it takes to make it is not known of the model.
    """
    text = weights.pp if pp is None else pp
    if text is None and weights.normalisation is not None:
        raise ConfigError("--pp", f"{weights} does not say what is done to its images; give --pp='{EXAMPLE}'")
    calls = [call for call in parse_calls(text or "", "--pp") if call.name not in LABEL_OPS]
    if not calls or calls[0].name != "decode":
        calls[:0] = parse_calls(f"decode({weights.channels})", "--pp")
    text = "|".join(call.text for call in calls)
    preprocess = builder.build(text, "--pp")
    if preprocess.device_ops:
        return preprocess
    if weights.normalisation is None:
        raise ConfigError("--pp", f"{weights} does not say how its pixels were normalised; end --pp in "
                                  "value_range(-1, 1) for Google's ViTs, in vgg_value_range for DeiT's: "
                                  f"--pp='{EXAMPLE}|vgg_value_range'")
    return builder.build(f"{text}|{weights.normalisation.op}", "--pp")


def ahead(function: Callable[[T], U], items: Iterable[T], threads: int, most: int) -> Iterator[U]:
    """`function` of each item, in order, worked out by threads, at most so many items ahead."""
    pool, waiting = ThreadPoolExecutor(threads), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _image_shape(weights: Weights, preprocess: Preprocess) -> tuple[int, int, int]:
    """What images are like, [y x c], checked to be what the model takes."""
    config, patch, channels = weights.model.config, weights.model.config.patch_size, weights.channels
    own = weights.grid and tuple(count * side for count, side in zip(weights.grid, patch, strict=True))
    size = preprocess.image_size or own
    if size is None:
        raise ConfigError("--pp", f"{preprocess.text!r} leaves the size of the images open, and {weights} takes any; "
                                  f"give --pp='{EXAMPLE}'")
    divides = not any(side % p for side, p in zip(size, patch, strict=True))
    if not divides or preprocess.channels != channels or (config.posemb == "learn" and size != own):
        sizes = "multiples of {}×{}".format(*patch) if config.posemb != "learn" else "{}×{}".format(*own)
        raise ConfigError("--pp", f"{preprocess.text!r} makes images of {size[0]}×{size[1]} with {preprocess.channels} "
                                  f"channels; {weights} takes {sizes} with {channels}")
    return (*size, channels)


def _resizing(preprocess: Preprocess, size: tuple[int, int]) -> str:
    decode, *rest = (call.text for call in parse_calls(preprocess.text, "--pp"))
    return "|".join([decode, f"resize({size})", *rest])
