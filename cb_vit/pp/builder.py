"""Preprocessing from a string such as `"decode|inception_crop(224)|flip_lr|value_range(-1,1)|onehot(1000)"`.

The language and the names of the ops are big_vision's (`pp/builder.py` there). What differs: the ops at the end
that do arithmetic (`value_range`, `vgg_value_range`, `onehot`) are split off when the string is read, to run on
whole batches inside the jitted step, so that hosts deliver uint8. The ops are listed in `ops_general.py`,
`ops_image.py`, `randaug.py`, `three_augment.py` and `corruptions.py`; an op of one's own is a dataclass entered with
`register_op`.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from cb_vit.config import ConfigError
from cb_vit.pp import corruptions, randaug, three_augment  # noqa: F401  they enter their ops
from cb_vit.pp.images import as_uint8, is_encoded
from cb_vit.pp.normalisation import Normalisation
from cb_vit.pp.ops_general import (
    OPS,
    DeviceOp,
    Features,
    HostOp,
    KeyOp,
    LabelCheck,
    OneHot,
    Op,
    ValueRange,
    VggValueRange,
)
from cb_vit.pp.ops_image import Decode, ImageOp, PixelOp
from cb_vit.registry import parse_calls


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """A preprocessing string, read and checked. It pickles, and its host part does not import jax.

    Attributes:
        text: the preprocessing string.
        path: where the string stands in the config, for errors.
        host_ops: `(how it was written, op)` for each op that runs on the host.
        device_ops: `(how it was written, op)` for each op that runs on the device.
        image_size: (h, w) of the images; None: the ops do not fix it.
        channels: channels of the images; None: the ops do not fix them.
        num_classes: depth of the last `onehot`; None: there is none, or it leaves the number to the data.
        labels_key: the key that the last `onehot` writes; None: there is none.
    """

    text: str
    path: str
    host_ops: tuple[tuple[str, HostOp | KeyOp], ...]
    device_ops: tuple[tuple[str, DeviceOp | KeyOp], ...]
    image_size: tuple[int, int] | None
    channels: int | None
    num_classes: int | None
    labels_key: str | None

    def host(self, features: Features, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One example through the host ops.

        Args:
            features: the example: "image" as encoded bytes or a uint8 array [h w] or [h w c], "label" as an int, and
                others; left as it is.
            rng: the generator that random ops draw from; the same state gives the same output.

        Returns:
            The numeric features as arrays (text and bytes, such as "id", are dropped), "image" as uint8 [h w c].

        Raises:
            ValueError: names the op and what is wrong with the example; the caller knows which example it is.
            ConfigError: the images are encoded and the string does not decode them.
        """
        for text, op in self.host_ops:
            if isinstance(op, PixelOp):
                self._refuse_encoded(features)
            try:
                features = op(features, rng)
            except ValueError as error:
                raise ValueError(f"{text}: {error}") from error
        if "image" in features:
            self._refuse_encoded(features)
            features = {**features, "image": as_uint8(features["image"])}
        arrays = {key: _array(key, value) for key, value in features.items()}
        return {key: array for key, array in arrays.items() if array is not None}

    def device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One batch through the device ops: pure, and may be jitted.

        Args:
            batch: the examples that `host` delivered, stacked: "image" uint8 [b h w c], "label" int32 [b] or [b n], …

        Returns:
            The batch with "image" as float32 if the string asks for a value range, and labels as float32 [b c] if
            it asks for `onehot`. `_mask` always passes.
        """
        for _, op in self.device_ops:
            batch = op(batch)
        return batch

    def for_classes(self, count: int) -> Preprocess:
        """The same for data of so many classes: every `onehot` that leaves the number open has it."""
        if all(not isinstance(op, OneHot) or op.depth for _, op in self.device_ops):
            return self
        texts = []
        for call in parse_calls(self.text, self.path):
            op = call.bind(OPS[call.name], self.path)
            if isinstance(op, OneHot) and op.depth is None:
                said = (f"{field.name}={value!r}" for field in dataclasses.fields(op)
                        if (value := getattr(op, field.name)) != field.default)
                texts.append(f"onehot({', '.join([str(count), *said])})")
            else:
                texts.append(call.text)
        return build("|".join(texts), self.path)

    def with_op(self, text: str) -> Preprocess:
        """The same with one more op, such as "corrupt('fog', 3)", as the last one on the host."""
        calls = [call.text for call in parse_calls(self.text, self.path)]
        split = len(calls) - len(self.device_ops)
        return build("|".join([*calls[:split], text, *calls[split:]]), self.path)

    def normalisation(self, channels: int) -> Normalisation:
        """What the device makes of pixels.

        Args:
            channels: number of channels of the images.
        """
        import jax.numpy as jnp  # not at the top: worker processes import this module, and need no JAX
        # The ops are linear in a pixel, so black and white tell all there is to know.
        batch = {"image": jnp.broadcast_to(jnp.array([0, 255], jnp.uint8)[:, None, None, None], (2, 1, 1, channels))}
        for _, op in self.device_ops:
            if isinstance(op, ValueRange | VggValueRange):
                batch = op(batch)
        low, high = np.asarray(batch["image"], np.float64).reshape(2, channels)
        with np.errstate(all="ignore"):  # what is no number is refused by who needs one
            std = 1 / (high - low)
            return Normalisation(tuple((-low * std).tolist()), tuple(std.tolist()))

    def _refuse_encoded(self, features: Features) -> None:
        if is_encoded(features.get("image")):
            raise ConfigError(self.path, f"the images are encoded (bytes) and {self.text!r} does not decode them; "
                                         f"write 'decode|{self.text}'")


def build(text: str, path: str) -> Preprocess:
    """Read a preprocessing string.

    Args:
        text: the ops, first to last, divided by "|"; their arguments are Python literals.
        path: where the string stands, for errors, e.g. "config.input.pp".

    Raises:
        ConfigError: at `path`: an op is unknown, arguments do not fit or are impossible, or the order is wrong.
    """
    ops = [(call.text, call.bind(OPS.pick(call.name, path), path)) for call in parse_calls(text, path)]
    split = next((i for i, (_, op) in enumerate(ops) if isinstance(op, DeviceOp)), len(ops))
    host, device = tuple(ops[:split]), tuple(ops[split:])
    _check_order(host, device, path)
    size, channels = _trace(host, device, path)
    onehots = [(name, op) for name, op in device if isinstance(op, OneHot)]
    # Checked on the host: on the device a label out of range would light nothing, and no error could be raised.
    checks = tuple((name, LabelCheck(op.depth, op.key)) for name, op in onehots if op.depth)
    last = onehots[-1][1] if onehots else None
    return Preprocess(
        text=text, path=path, host_ops=host + checks, device_ops=device, image_size=size, channels=channels,
        num_classes=last and last.depth, labels_key=last and last.result)


def _check_order(host: tuple[tuple[str, Op], ...], device: tuple[tuple[str, Op], ...], path: str) -> None:
    for name, op in device:
        if not isinstance(op, DeviceOp | KeyOp):
            raise ConfigError(path, f"{name!r} runs on the host but stands after {device[0][0]!r}, which runs on the "
                                    f"device, on whole batches; move {device[0][0]!r} to the end")
    images = [(name, op) for name, op in host if isinstance(op, ImageOp)]
    for name, op in images[1:]:
        if isinstance(op, Decode):
            raise ConfigError(path, f"{name!r} stands after {images[0][0]!r}; decode comes first, and once")


def _trace(
    host: tuple[tuple[str, Op], ...], device: tuple[tuple[str, Op], ...], path: str
) -> tuple[tuple[int, int] | None, int | None]:
    """Follow the size and the channels of the image through the ops, as far as the ops fix them."""
    size = channels = None
    for name, op in host:
        if isinstance(op, ImageOp):
            try:
                size, channels = op.size_after(size), op.channels_after(channels)
            except ValueError as error:
                raise ConfigError(path, f"{name!r}: {error}") from None
    for name, op in device:
        if isinstance(op, VggValueRange) and channels not in (None, len(op.mean)):
            raise ConfigError(path, f"{name!r}: has {len(op.mean)} channels, the image {channels}; "
                                    f"give mean and std with one value a channel")
    return size, channels


def _array(key: str, value: Any) -> np.ndarray | None:
    """A numeric value as an array of a type that devices have (at most 32 bits); None for text and the like."""
    if isinstance(value, Image.Image):
        return as_uint8(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{key}: rows of unequal length; pad them (labels with -1)") from None
    if array.dtype.kind not in "biuf":
        return None
    if array.dtype.itemsize <= 4:
        return array
    # JAX would narrow 64 bits in silence, and an id would become another number.
    narrow = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    if array.dtype.kind != "f" and (narrow != array).any():
        raise ValueError(f"{key}: {value!r} does not fit into int32, the widest integer on the device; drop('{key}')")
    return narrow
