"""Mixup, cutmix and random erasing, on prepared images and labels inside the jitted step.

Every draw is addressed by (key, row), or (key, group): no result depends on the number of devices, nor a row's on the
number of rows after it. The semantics are timm's (`Mixup`, `RandomErasing`), which DeiT trains with; DeiT erases first.

A box is four pixel numbers (top, bottom, left, right), the lower and right ends not included; top = bottom is empty.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, Shaped

from cb_vit.config import ConfigError
from cb_vit.losses import smooth_labels

TRIES = 10  # timm looks so often for a box that fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """The block `config.mixup`: mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899); DeiT has 0.8 and 1.0.

    Attributes:
        mixup_alpha: α of mixup's λ ~ Beta(α, α); 0: no mixup.
        cutmix_alpha: α of cutmix's λ ~ Beta(α, α); 0: no cutmix.
        prob: probability that anything is mixed.
        switch_prob: probability of cutmix rather than mixup, where both are on.
        mode: rows that share one draw: all of a group ("batch"), the two that are mixed with each other ("pair"), or
            none ("elem").
        group_size: number of rows among which partners are found, which stands for the batch of one process in
            PyTorch; None: `input.batch_size / input.virtual_ranks`.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    group_size: int | None = None

    def __post_init__(self):
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, f"must be 0 (off) or more, got {getattr(self, name)}")
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ConfigError("mixup_alpha", "0, and so is cutmix_alpha: nothing would be mixed; give one of them, "
                                             "or leave out the block")
        for name in ("prob", "switch_prob"):
            _check_probability(name, getattr(self, name))

    def rows(self, batch_size: int, default: int) -> int:
        """Number of rows in a group.

        Args:
            batch_size: number of examples in a global batch.
            default: the number where `group_size` is not set.

        Raises:
            ConfigError: at "group_size" when `batch_size` is not a whole number of groups of an even size.
        """
        size = default if self.group_size is None else self.group_size
        if size < 2 or size % 2 or batch_size % size:
            sizes = [n for n in range(2, batch_size + 1, 2) if batch_size % n == 0]
            source = "" if self.group_size is not None else " (batch_size / virtual_ranks)"
            way = f"take one of {', '.join(map(str, sizes))}" if sizes else "mixing needs an even batch size"
            raise ConfigError("group_size", f"{size}{source} must be even, so that each row has a partner, and divide "
                                            f"batch_size {batch_size}; {way}")
        return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErasingConfig:
    """The block `config.random_erasing` (arXiv 1708.04896); the defaults are DeiT's.

    Attributes:
        prob: probability that an image loses anything.
        mode: filling of the boxes: a draw of N(0, 1) for each value ("pixel") or for each box and channel ("rand"), or
            0 ("const").
        count: largest number of boxes in an image; the number is drawn from 1 to `count`, and they share the area.
        area_min: smallest share of the image that is erased; the share is drawn uniformly.
        area_max: largest share of the image that is erased.
        ratio_min: smallest height / width of a box, drawn log-uniformly up to 1 / `ratio_min`.
    """

    prob: float = 0.25
    mode: Literal["pixel", "rand", "const"] = "pixel"
    count: int = 1
    area_min: float = 0.02
    area_max: float = 1 / 3
    ratio_min: float = 0.3

    def __post_init__(self):
        _check_probability("prob", self.prob)
        if self.count < 1:
            raise ConfigError("count", f"must be 1 or more, got {self.count}; for no erasing leave out the block")
        if not 0 < self.area_min <= self.area_max <= 1:
            raise ConfigError("area_min", f"needs 0 < area_min <= area_max <= 1, got {self.area_min}, {self.area_max}")
        if not 0 < self.ratio_min <= 1:
            raise ConfigError("ratio_min", f"must be in (0, 1], got {self.ratio_min}; the largest is its inverse")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(name, f"is a probability, 0 to 1, got {value}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What training does to a prepared batch: label smoothing and random erasing, then mixup, in DeiT's order.

    Attributes:
        label_smoothing: share of each target that is spread evenly over all classes.
        erasing: settings of random erasing; None: nothing is erased.
        mixup: settings of mixup and cutmix; None: nothing is mixed.
        mixup_group: number of rows that are mixed among themselves.
    """

    label_smoothing: float
    erasing: ErasingConfig | None
    mixup: MixupConfig | None
    mixup_group: int

    def __call__(self, key: Key[Array, ""], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch with "image" and "labels" augmented; rows that "_mask" leaves out are mixed into no other."""
        images, labels = batch["image"], smooth_labels(batch["labels"], self.label_smoothing)
        erasing, mixing = jax.random.split(key)
        if self.erasing:
            images = erase(erasing, images, self.erasing)
        if self.mixup:
            images, labels = mix(mixing, images, labels, batch["_mask"], self.mixup, self.mixup_group)
        return {**batch, "image": images, "labels": labels}


def mix(
    key: Key[Array, ""],
    images: Float32[Array, "b y x c"],
    labels: Float32[Array, "b classes"],
    valid: Bool[Array, " b"],
    cfg: MixupConfig,
    group_size: int,
) -> tuple[Float32[Array, "b y x c"], Float32[Array, "b classes"]]:
    """Mix each row with its partner: row i of a group of g with row g - 1 - i.

    Args:
        key: the random key of this step.
        images: the prepared images.
        labels: the targets of the images, already smoothed.
        valid: whether each row may be a partner; a row whose partner may not be stays as it is.
        cfg: the settings of mixup and cutmix.
        group_size: g, the number of rows among which partners are found, see `MixupConfig.rows`.

    Returns:
        The mixed images and targets.
    """
    rows, height, width, _ = images.shape
    # A group stands for the batch of one process in PyTorch: there, partners and λ never cross processes.
    row = jnp.arange(rows, dtype=jnp.int32)
    place = row % group_size
    # Rows that share a draw have it from one address, the first of these rows.
    first = {"batch": row - place, "pair": jnp.minimum(row, row + group_size - 1 - 2 * place), "elem": row}[cfg.mode]
    draws = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (6,), jnp.float32))(first)

    both = cfg.mixup_alpha > 0 and cfg.cutmix_alpha > 0
    # Where only one of the two is on, `cut` is the same in every row, so that λ is never drawn with an α of 0.
    cut = draws[:, 1] < (cfg.switch_prob if both else float(cfg.cutmix_alpha > 0))
    lam = symmetric_beta(draws[:, 2:4], jnp.where(cut, jnp.float32(cfg.cutmix_alpha), jnp.float32(cfg.mixup_alpha)))
    centre = jnp.floor(draws[:, 4:] * jnp.array([[height, width]], jnp.float32)).astype(jnp.int32)
    whole = jnp.array([[0, height, 0, width]], jnp.int32)
    box = jnp.where(cut[:, None], cutmix_box(lam, centre, height, width), whole)
    mixed = (draws[:, 0] < cfg.prob) & partner(valid, group_size)
    return apply_mix(images, labels, jnp.where(cut, 0.0, lam), jnp.where(mixed[:, None], box, 0), group_size)


def apply_mix(
    images: Float32[Array, "b y x c"],
    labels: Float32[Array, "b classes"],
    keep: Float32[Array, " b"],
    box: Int32[Array, "b 4"],
    group_size: int,
) -> tuple[Float32[Array, "b y x c"], Float32[Array, "b classes"]]:
    """Within `box`, take `keep` of the row's own pixels and 1 - `keep` of its partner's; targets by share of the image.

    Mixup is `keep` = λ in a box of the whole image, cutmix is `keep` = 0 in a smaller one, and an empty box is neither.

    Args:
        images: the prepared images.
        labels: the targets of the images.
        keep: the share of a row's own pixels inside its box.
        box: the box of each row.
        group_size: number of rows among which partners are found.
    """
    height, width = images.shape[1:3]
    own = jnp.where(inside(box, height, width), keep[:, None, None, None], 1.0)
    # From the box itself: one that lies partly outside the image, or was rounded down, takes less than its λ says.
    area = ((box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])).astype(jnp.float32) / (height * width)
    lam = (1 - (1 - keep) * area)[:, None]
    return (own * images + (1 - own) * partner(images, group_size),
            lam * labels + (1 - lam) * partner(labels, group_size))


def partner(x: Shaped[Array, " b *rest"], group_size: int) -> Shaped[Array, " b *rest"]:
    """Each row's partner: the groups, each in reverse order."""
    return jnp.flip(x.reshape(-1, group_size, *x.shape[1:]), 1).reshape(x.shape)


def symmetric_beta(uniform: Float32[Array, "b 2"], alpha: Float[Array, " b"]) -> Float32[Array, " b"]:
    """Beta(α, α) of two uniform numbers in [0, 1).

    It is (1 + t / √(2α + t²)) / 2 of Student's t with 2α degrees of freedom, which has a polar form (R. W. Bailey,
    Mathematics of Computation 62, 1994). `jax.random.beta` rejects in a loop that devices would have to agree to leave.
    """
    w = (1 - uniform[:, 0]) ** (1 / alpha)
    cos = jnp.cos(2 * jnp.pi * uniform[:, 1])
    return 0.5 + 0.5 * cos * jnp.sqrt((1 - w) / (w + (1 - w) * cos**2))


def cutmix_box(lam: Float32[Array, " b"], centre: Int32[Array, "b 2"], height: int, width: int) -> Int32[Array, "b 4"]:
    """The box that leaves λ of an image of `height` by `width`, but for rounding down and for what falls outside.

    Args:
        lam: λ, the share of the image that is left.
        centre: (y, x) of the box's centre, any pixel of the image.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    size = jnp.array([[height, width]], jnp.int32)
    cut = (jnp.sqrt(1 - lam)[:, None] * size).astype(jnp.int32)
    low, high = jnp.maximum(centre - cut // 2, 0), jnp.minimum(centre + (cut + 1) // 2, size)
    return jnp.stack([low, high], axis=-1).reshape(-1, 4)


def inside(box: Int32[Array, "b 4"], height: int, width: int) -> Bool[Array, "b y x 1"]:
    """Whether a pixel is in its row's box."""
    top, bottom, left, right = (box[:, i, None] for i in range(4))
    y, x = (jnp.arange(side, dtype=jnp.int32)[None] for side in (height, width))
    return ((y >= top) & (y < bottom))[:, :, None, None] & ((x >= left) & (x < right))[:, None, :, None]


def erase(key: Key[Array, ""], images: Float32[Array, "b y x c"], cfg: ErasingConfig) -> Float32[Array, "b y x c"]:
    """Fill random boxes of some images. Noise is N(0, 1): made for images that are normalised to that.

    Args:
        key: the random key of this step; another than the one for `mix`.
        images: the prepared images.
        cfg: the settings of random erasing.
    """
    rows, height, width, channels = images.shape
    place, noise = jax.random.split(key)
    boxes = erase_boxes(place, rows, height, width, cfg)
    fill = {
        "pixel": lambda: normal_noise(noise, images.shape)[:, None],
        "rand": lambda: jax.random.normal(noise, (rows, cfg.count, 1, 1, channels), jnp.float32),
        "const": lambda: jnp.zeros((rows, 1, 1, 1, 1), jnp.float32),
    }[cfg.mode]()
    return apply_erase(images, boxes, fill)


def apply_erase(
    images: Float32[Array, "b y x c"], boxes: Int32[Array, "b k 4"], fill: Float32[Array, " b #k #y #x #c"]
) -> Float32[Array, "b y x c"]:
    """The images with `fill` where their boxes are; where boxes overlap, the last one's.

    Args:
        images: the prepared images.
        boxes: k boxes for each image; empty ones change nothing.
        fill: the values to put there; any axis may have length 1.
    """
    rows, height, width, channels = images.shape
    count = boxes.shape[1]
    fill = jnp.broadcast_to(fill, (rows, count, height, width, channels))
    for i in range(count):
        images = jnp.where(inside(boxes[:, i], height, width), fill[:, i], images)
    return images


def erase_boxes(key: Key[Array, ""], rows: int, height: int, width: int, cfg: ErasingConfig) -> Int32[Array, "b k 4"]:
    """Boxes to erase: `cfg.count` an image, those that are not wanted or never fitted empty."""
    draws = jax.random.uniform(key, (rows, cfg.count, TRIES + 2, 2), jnp.float32)
    # All tries are drawn and the first that fits is taken: a loop until one fits would have no fixed length.
    tries, place, image = draws[:, :, :TRIES], draws[:, :, TRIES], draws[:, 0, TRIES + 1]
    count = jnp.where(image[:, :1] < cfg.prob, 1 + jnp.floor(image[:, 1:] * cfg.count), 0)

    area = cfg.area_min + (cfg.area_max - cfg.area_min) * tries[..., 0]
    area = area * height * width / jnp.maximum(count, 1)[:, :, None]
    ratio = jnp.exp((1 - 2 * tries[..., 1]) * math.log(cfg.ratio_min))
    tall, wide = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    taken = fits & (jnp.cumsum(fits, axis=-1) == 1) & (jnp.arange(cfg.count, dtype=jnp.int32)[None] < count)[:, :, None]
    tall, wide = (jnp.sum(jnp.where(taken, side, 0), axis=-1).astype(jnp.int32) for side in (tall, wide))

    top = jnp.floor(place[..., 0] * (height - tall + 1)).astype(jnp.int32)
    left = jnp.floor(place[..., 1] * (width - wide + 1)).astype(jnp.int32)
    return jnp.stack([top, top + tall, left, left + wide], axis=-1)


def normal_noise(key: Key[Array, ""], shape: tuple[int, int, int, int]) -> Float32[Array, "b y x c"]:
    """Numbers of N(0, 1): a hash of random words of (row, y) and of (row, x, c).

    A word for each number, as `jax.random.normal` has it, costs a TPU core five times the cycles for noise of which
    4 % is looked at. MurmurHash3's finaliser (A. Appleby, 2011) is a permutation in which each bit moves all others.
    """
    rows, height, width, channels = shape
    lines, columns = jnp.split(jax.random.bits(key, (rows, height + width * channels), jnp.uint32), [height], axis=1)
    word = lines[:, :, None, None] ^ columns.reshape(rows, 1, width, channels)
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    word ^= word >> 16
    # The middles of 2^23 equal parts of (-1, 1), which float32 has exactly.
    return math.sqrt(2) * jax.lax.erf_inv(((word >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1)
