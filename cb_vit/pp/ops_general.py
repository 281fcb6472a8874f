"""What an op is; the ops that touch keys and labels; and the settings of those that run on the device.

An op is a frozen dataclass: its fields are the arguments of the string, checked when it is made, and it
pickles, so that it can be sent to worker processes. `register_op` enters it in `OPS`. Nothing here imports
jax: the arithmetic of device ops stands in `ops_device.py` and is imported when they are first called.
"""
from __future__ import annotations

import abc
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cb_vit.config import ConfigError, convert, plain
from cb_vit.registry import Registry

Features = dict[str, Any]
MASK = "_mask"  # marks the padding of a last batch; it belongs to the pipeline and survives every `keep`
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class Op:
    """An op with checked settings: subclasses are frozen dataclasses, and extend `check`."""

    def __post_init__(self):
        try:
            self.check()
        except ConfigError as error:  # from a table of choices
            raise ValueError(str(error)) from None

    def check(self) -> None:
        """Refuse settings that cannot work together, with a `ValueError`."""


class HostOp(Op, abc.ABC):
    """Runs on one example, in a worker process: `op(features, rng) -> features`."""

    @abc.abstractmethod
    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        """The features with this op applied; the input dict is left as it is."""


class DeviceOp(Op, abc.ABC):
    """Runs on a batch, inside the jitted step: `op(batch) -> batch`."""

    @abc.abstractmethod
    def __call__(self, batch: Features) -> Features:
        """The batch with this op applied; the input dict is left as it is."""


OPS: Registry[Callable[..., Op]] = Registry("preprocessing op")


def register_op(name: str) -> Callable[[type[Op]], type[Op]]:
    """Class decorator: enter an op in `OPS`, as a factory that takes its fields as a string writes them.

    The factory converts each argument to the type of its field (a list to a tuple, 1 to 1.0) and raises a
    `ValueError` that names the field where that cannot be.

    Args:
        name: what the op is called in a string.
    """

    def enter(op: type[Op]) -> type[Op]:
        fields = dataclasses.fields(op)
        signature = inspect.Signature([
            inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=(
                inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default)) for f in fields])

        def make(*args, **kwargs):
            hints = typing.get_type_hints(op)
            given = signature.bind(*args, **kwargs).arguments
            return op(**{key: read_argument(value, hints[key], key) for key, value in given.items()})

        make.__signature__ = signature  # what errors show
        OPS.register(name)(make)
        return op

    return enter


def read_argument(value: Any, hint: Any, name: str) -> Any:
    """An argument of a string, converted to the type of its field.

    Args:
        value: the argument as it was written, a Python literal.
        hint: the type of the field.
        name: the name of the field, for errors.

    Raises:
        ValueError: the argument cannot be converted.
    """
    if value is None and type(None) in typing.get_args(hint):
        return None
    try:
        return convert(plain(value), hint, name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class KeyOp(Op):
    """Chooses among keys, on the host or on the device alike: `op(features[, rng]) -> features`.

    Attributes:
        keys: the keys that are named.
        dropped: whether these are dropped; else they are kept, and all others dropped.
    """

    keys: tuple[str, ...]
    dropped: bool

    def check(self) -> None:
        """Refuse no keys at all."""
        if not self.keys:
            raise ValueError("names no key; write for example keep('image', 'labels')")

    def __call__(self, features: Features, rng: np.random.Generator | None = None) -> Features:
        """The features with the keys kept, or dropped; a key that is not there is an error."""
        find_keys(features, self.keys)
        return {k: v for k, v in features.items() if k == MASK or (k in self.keys) != self.dropped}


@OPS.register("keep")
def keep(*keys: Any) -> KeyOp:
    """Keep these keys, and `_mask`; big_vision's op ignores missing keys, this one names them."""
    return KeyOp(read_argument(keys, tuple[str, ...], "keys"), dropped=False)


@OPS.register("drop")
def drop(*keys: Any) -> KeyOp:
    """Drop these keys, never `_mask`; as with `keep`, a missing key is an error."""
    return KeyOp(read_argument(keys, tuple[str, ...], "keys"), dropped=True)


@register_op("copy")
@dataclasses.dataclass(frozen=True)
class Copy(HostOp):
    """`features[outkey] = features[inkey]`, as in big_vision; host only.

    Attributes:
        inkey: the key to copy from.
        outkey: the key to copy to.
    """

    inkey: str
    outkey: str

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        """The features with one more key."""
        find_keys(features, [self.inkey])
        return {**features, self.outkey: features[self.inkey]}


@register_op("value_range")
@dataclasses.dataclass(frozen=True)
class ValueRange(DeviceOp):
    """Pixels from [in_min, in_max] to [vmin, vmax], linearly; see `ops_device.value_range`.

    Attributes:
        vmin: value that `in_min` becomes.
        vmax: value that `in_max` becomes.
        in_min: lower end of the input range.
        in_max: upper end of the input range.
        clip_values: whether the result is clipped to [vmin, vmax].
    """

    vmin: float = -1.0
    vmax: float = 1.0
    in_min: float = 0.0
    in_max: float = 255.0
    clip_values: bool = False

    def check(self) -> None:
        """Refuse ranges that do not run upwards."""
        if not self.vmin < self.vmax:
            raise ValueError(f"vmin must be below vmax, got {self.vmin} and {self.vmax}")
        if not self.in_min < self.in_max:
            raise ValueError(f"in_min must be below in_max, got {self.in_min} and {self.in_max}")

    def __call__(self, batch: Features) -> Features:
        """The batch with `image` [b h w c] as float32."""
        from cb_vit.pp import ops_device
        find_keys(batch, ["image"])
        return {**batch, "image": ops_device.value_range(batch["image"], **dataclasses.asdict(self))}


@register_op("vgg_value_range")
@dataclasses.dataclass(frozen=True)
class VggValueRange(DeviceOp):
    """`(image - mean) / std` per channel, both in units of 0 to 255; see `ops_device.vgg_value_range`.

    Attributes:
        mean: mean of each channel; ImageNet's unless given.
        std: standard deviation of each channel; ImageNet's unless given.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def check(self) -> None:
        """Refuse anything but one positive std for each mean."""
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean and std need one value a channel, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def __call__(self, batch: Features) -> Features:
        """The batch with `image` [b h w c] as float32."""
        from cb_vit.pp import ops_device
        find_keys(batch, ["image"])
        return {**batch, "image": ops_device.vgg_value_range(batch["image"], mean=self.mean, std=self.std)}


@register_op("onehot")
@dataclasses.dataclass(frozen=True)
class OneHot(DeviceOp):
    """Class numbers as rows of `depth` values, `on` and `off`; see `ops_device.onehot`.

    `key` None reads "label", or "labels" where there is no "label", and writes "labels". With a `key`
    the result goes to `key_result`, or back to `key`: big_vision's rule, where `key` defaults to
    "labels". Labels are checked on the host (`LabelCheck`), for on a device a wrong one would pass silently.

    Attributes:
        depth: number of classes; None: as many as the data has, which `Preprocess.for_classes` fills in.
        key: the key that is read; None: "label" or "labels".
        key_result: the key that is written; None: `key`, or "labels".
        multi: whether several labels of one example share one row.
        on: value at a label.
        off: value elsewhere.
    """

    depth: int | None = None
    key: str | None = None
    key_result: str | None = None
    multi: bool = True
    on: float = 1.0
    off: float = 0.0

    def check(self) -> None:
        """Refuse a depth without classes."""
        if self.depth is not None and self.depth <= 0:
            raise ValueError(f"depth must be positive, got {self.depth}")

    @property
    def result(self) -> str:
        """The key that is written."""
        return self.key_result or self.key or "labels"

    def __call__(self, batch: Features) -> Features:
        """The batch with the labels spread out, [b c]."""
        from cb_vit.pp import ops_device
        labels = batch[label_key(batch, self.key)]
        rows = ops_device.onehot(labels, self.depth, multi=self.multi, on=self.on, off=self.off)
        return {**batch, self.result: rows}


@dataclasses.dataclass(frozen=True)
class LabelCheck(HostOp):
    """Refuses a label that `onehot(depth)` could not show; -1 means "no label" and passes.

    Attributes:
        depth: number of classes.
        key: the key that is read; None: "label" or "labels".
    """

    depth: int
    key: str | None = None

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        """The features, unchanged."""
        key = label_key(features, self.key)
        labels = np.asarray(features[key])
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{key} must hold class numbers, got {features[key]!r}")
        wrong = labels[(labels < -1) | (labels >= self.depth)]
        if wrong.size:
            raise ValueError(f"{key} {wrong.flat[0]} is outside 0 to {self.depth - 1}; "
                             f"give onehot the number of classes of this data (-1 means no label)")
        return features


def label_key(features: Features, key: str | None) -> str:
    """The key of the class numbers: `key`, or if that is None "label", or "labels" where there is no "label"."""
    if key is None and "label" not in features and "labels" in features:
        return "labels"
    find_keys(features, [key or "label"])
    return key or "label"


def find_keys(features: Features, keys: Iterable[str]) -> None:
    """Refuse features without one of `keys`, with a `ValueError` that names it and what there is."""
    for key in keys:
        if key not in features:
            raise ValueError(f"no {key!r} here; there is {', '.join(features) or 'nothing'}")
