"""Mixup, cutmix and erasing: closed forms, and distributions against NumPy and SciPy.

A test of a distribution has a fixed seed, so that it always passes or always fails, and a level of 1e-4: a correct
program given another stream of numbers would fail it once in 10 000 times.
"""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from cb_vit import augment
from cb_vit.augment import ErasingConfig, MixupConfig
from cb_vit.config import ConfigError, parse

LEVEL = 1e-4
BOTH = MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
rng = np.random.default_rng(0)
mix = jax.jit(augment.mix, static_argnames=("cfg", "group_size"))
apply_mix = jax.jit(augment.apply_mix, static_argnames="group_size")
erase = jax.jit(augment.erase, static_argnames="cfg")
erase_boxes = jax.jit(augment.erase_boxes, static_argnums=(1, 2, 3, 4))


def images_of(rows, height=8, width=6):
    return jax.random.normal(jax.random.key(7), (rows, height, width, 3))


def mix_rows(cfg, group_size, rows=64, seed=0, images=None, valid=None):
    """Images before and after, and who is in whom: entry [i, j] is the share of row j in the target of row i."""
    images = images_of(rows) if images is None else images
    valid = jnp.ones(rows, bool) if valid is None else valid
    mixed, shares = mix(jax.random.key(seed), images, jnp.eye(rows), valid, cfg=cfg, group_size=group_size)
    return np.asarray(images), np.asarray(mixed), np.asarray(shares)


def partners(rows, group_size):
    return np.array([i - i % group_size + group_size - 1 - i % group_size for i in range(rows)])


def mode(name, cfg=BOTH):
    return dataclasses.replace(cfg, mode=name)


# Settings.


@pytest.mark.parametrize("schema, block, field, text", [
    (MixupConfig, {}, "mixup_alpha", "nothing would be mixed"),
    (MixupConfig, {"mixup_alpha": -0.1}, "mixup_alpha", "must be 0 .off. or more, got -0.1"),
    (MixupConfig, {"mixup_alpha": 1, "cutmix_alpha": -1}, "cutmix_alpha", "got -1.0"),
    (MixupConfig, {"cutmix_alpha": float("inf")}, "cutmix_alpha", "got inf"),
    (MixupConfig, {"cutmix_alpha": 1, "prob": 1.5}, "prob", "is a probability, 0 to 1, got 1.5"),
    (MixupConfig, {"cutmix_alpha": 1, "switch_prob": -1}, "switch_prob", "is a probability"),
    (MixupConfig, {"cutmix_alpha": 1, "mode": "half"}, "mode", "Choices: batch, pair, elem"),
    (ErasingConfig, {"prob": -0.5}, "prob", "is a probability"),
    (ErasingConfig, {"count": 0}, "count", "must be 1 or more, got 0"),
    (ErasingConfig, {"area_min": 0}, "area_min", "0 < area_min <= area_max <= 1, got 0.0"),
    (ErasingConfig, {"area_min": 0.5}, "area_min", "got 0.5, 0.333"),
    (ErasingConfig, {"area_max": 2}, "area_min", "got 0.02, 2.0"),
    (ErasingConfig, {"ratio_min": 0}, "ratio_min", "must be in .0, 1., got 0.0"),
    (ErasingConfig, {"ratio_min": 3}, "ratio_min", "got 3.0"),
])
def test_settings_that_cannot_work(schema, block, field, text):
    with pytest.raises(ConfigError, match=rf"^config\.x\.{field}: .*{text}"):
        parse(schema, block, "config.x")


def test_rows_of_a_group():
    assert BOTH.rows(1024, 256) == 256
    assert dataclasses.replace(BOTH, group_size=64).rows(1024, 256) == 64


@pytest.mark.parametrize("group_size, batch_size, default, text", [
    (48, 64, 16, "^group_size: 48 must be even.* divide batch_size 64; take one of 2, 4, 8, 16, 32, 64$"),
    (5, 30, 2, "^group_size: 5 must be even.*; take one of 2, 6, 10, 30$"),
    (0, 8, 2, "^group_size: 0 must be even"), (-2, 8, 2, "^group_size: -2 must be even"),
    (None, 12, 3, r"^group_size: 3 \(batch_size / virtual_ranks\) must be even.*; take one of 2, 4, 6, 12$"),
    (None, 9, 9, "mixing needs an even batch size$"),
])
def test_groups_that_do_not_make_up_the_batch(group_size, batch_size, default, text):
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(BOTH, group_size=group_size).rows(batch_size, default)


# Mixing, given λ and box.


def test_mixup_is_a_box_of_the_whole_image():
    images, labels = images_of(4), jnp.eye(4)
    whole = jnp.broadcast_to(jnp.array([0, 8, 0, 6]), (4, 4))
    mixed, targets = apply_mix(images, labels, jnp.full(4, 0.3), whole, group_size=4)
    np.testing.assert_allclose(mixed, 0.3 * images + 0.7 * images[::-1], atol=1e-6)
    np.testing.assert_allclose(targets, 0.3 * labels + 0.7 * labels[::-1], atol=1e-7)


def test_cutmix_moves_the_box_and_nothing_else():
    images, labels = images_of(4), jnp.eye(4)
    box = jnp.array([[2, 5, 1, 6], [0, 1, 0, 1], [0, 0, 3, 4], [0, 8, 0, 6]])
    mixed, targets = apply_mix(images, labels, jnp.zeros(4), box, group_size=2)
    expected = np.array(images)
    for row, (top, bottom, left, right) in enumerate(np.asarray(box)):
        expected[row, top:bottom, left:right] = images[row ^ 1, top:bottom, left:right]
    np.testing.assert_array_equal(mixed, expected)
    a, b, c, d = np.array([15, 1, 0, 48]) / 48
    expected = [[1 - a, a, 0, 0], [b, 1 - b, 0, 0], [0, 0, 1 - c, c], [0, 0, d, 1 - d]]
    np.testing.assert_allclose(targets, expected, atol=1e-7)


def test_nothing_is_mixed_at_lambda_1_or_in_an_empty_box():
    images, labels = images_of(2), jnp.eye(2)
    for keep, box in [(1.0, [0, 8, 0, 6]), (0.0, [0, 0, 0, 0])]:
        mixed, targets = apply_mix(images, labels, jnp.full(2, keep), jnp.array([box, box]), group_size=2)
        np.testing.assert_array_equal(mixed, images)
        np.testing.assert_array_equal(targets, labels)


@pytest.mark.parametrize("lam, centre, box", [
    (1.0, (3, 3), [3, 3, 3, 3]),  # nothing
    (0.0, (10, 5), [0, 20, 0, 10]),  # everything
    (0.75, (10, 5), [5, 15, 3, 8]),  # half of each side; 5 columns, the odd one to the right
    (0.91, (10, 5), [7, 13, 4, 7]),  # √0.09 = 0.3: 6 by 3, √ just below 0.3 in float32 or not
    (0.75, (0, 9), [0, 5, 7, 10]),  # what falls outside is lost
])
def test_cutmix_box(lam, centre, box):
    lam = np.nextafter(np.float32(lam), np.float32(0))  # a product that should be whole is not rounded down
    np.testing.assert_array_equal(augment.cutmix_box(jnp.array([lam]), jnp.array([centre]), 20, 10), [box])


# Mixing as drawn.


@pytest.mark.parametrize("name", ["batch", "pair", "elem"])
def test_targets_tell_what_the_images_hold(name):
    rows, size = 64, 8
    before, after, shares = mix_rows(mode(name), size)
    partner = partners(rows, size)
    lam = np.diag(shares)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    expected = np.diag(lam)
    expected[np.arange(rows), partner] = 1 - lam
    np.testing.assert_allclose(shares, expected, atol=1e-6)  # so partners are found in the group, and one each
    kinds = set()
    for row in range(rows):
        own, others = (after[row] == before[row]).all(-1), (after[row] == before[partner[row]]).all(-1)
        if (own ^ others).all():
            kinds.add("cutmix")
            np.testing.assert_allclose(lam[row], own.mean(), atol=1e-6)
        else:
            kinds.add("mixup")
            np.testing.assert_allclose(after[row], lam[row] * before[row] + (1 - lam[row]) * before[partner[row]],
                                       atol=1e-5)
    assert kinds == {"cutmix", "mixup"}


def test_who_shares_a_draw():
    def lambdas(name):
        return np.diag(mix_rows(mode(name, MixupConfig(mixup_alpha=1.0)), 8)[2]).reshape(8, 8)

    batch, pair, elem = map(lambdas, ("batch", "pair", "elem"))
    np.testing.assert_array_equal(batch, batch[:, :1].repeat(8, axis=1))
    np.testing.assert_array_equal(pair, pair[:, ::-1])
    assert [len(np.unique(x)) for x in (batch, pair, elem)] == [8, 32, 64]


def test_a_pair_shares_its_box():
    before, after, _ = mix_rows(mode("pair", MixupConfig(cutmix_alpha=1.0)), 2)
    moved = (after != before).any(-1).reshape(32, 2, 8, 6)
    np.testing.assert_array_equal(moved[:, 0], moved[:, 1])
    assert moved.any()


@pytest.mark.parametrize("name", ["batch", "elem"])
def test_a_row_that_is_not_valid_is_nobodys_partner(name):
    valid = jnp.ones(64, bool).at[jnp.array([3, 16])].set(False)
    images, after, shares = mix_rows(mode(name), 8, valid=valid)
    _, expected, shares_expected = mix_rows(mode(name), 8)
    for row in (4, 23):  # their partners
        np.testing.assert_array_equal(after[row], images[row])
        assert shares[row, row] == 1
    others = np.delete(np.arange(64), [4, 23])
    np.testing.assert_array_equal(after[others], expected[others])
    np.testing.assert_array_equal(shares[others], shares_expected[others])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 5.0])
def test_symmetric_beta(alpha):
    draws = augment.symmetric_beta(jax.random.uniform(jax.random.key(1), (20_000, 2)), jnp.full(20_000, alpha))
    # Below α = 1 the density is infinite at 0 and 1, where float32 has but so many numbers: the ends are cut off.
    draws, expected = (np.clip(np.float64(x), 1e-5, 1 - 1e-5) for x in (draws, rng.beta(alpha, alpha, size=200_000)))
    assert stats.ks_2samp(draws, expected).pvalue > LEVEL


@pytest.mark.parametrize("alpha", [0.01, 1.0, 100.0])
def test_symmetric_beta_of_extreme_numbers_is_in_its_range(alpha):
    most = 1 - 2**-23
    corners = jnp.array([[0, 0], [0, 0.25], [0, 0.5], [most, 0], [most, 0.25], [most, most]])
    lam = np.asarray(augment.symmetric_beta(corners, jnp.full(len(corners), alpha)))
    assert ((lam >= 0) & (lam <= 1)).all()


def test_lambda_of_mixup_is_beta_for_each_group():
    _, _, shares = mix_rows(MixupConfig(mixup_alpha=0.8), 2, rows=2000, images=jnp.zeros((2000, 1, 1, 1)))
    assert stats.kstest(np.diag(shares)[::2], stats.beta(0.8, 0.8).cdf).pvalue > LEVEL


def test_cutmix_takes_what_an_independent_cutmix_takes():
    rows, height, width = 4000, 12, 20
    cfg = mode("elem", MixupConfig(cutmix_alpha=1.0))
    before, after, shares = mix_rows(cfg, 2, rows, images=images_of(rows, height, width)[..., :1])
    taken = (before != after)[..., 0]
    expected = np.zeros((8000, height, width), bool)
    for image in expected:
        ratio = np.sqrt(1 - rng.beta(1.0, 1.0))
        (top, bottom), (left, right) = (
            (max(c - cut // 2, 0), c + (cut + 1) // 2)
            for side in (height, width) for c, cut in [(rng.integers(side), int(side * ratio))])
        image[top:bottom, left:right] = True
    assert stats.ks_2samp(taken.mean((1, 2)), expected.mean((1, 2))).pvalue > LEVEL
    p, q = taken.mean(0), expected.mean(0)
    spread = np.sqrt(q * (1 - q) * (1 / len(taken) + 1 / len(expected)))
    assert np.abs((p - q) / spread).max() < stats.norm.isf(LEVEL / 2 / p.size)  # each pixel as often


def test_how_often():
    """With boxes of about 7 by 7 pixels of 10 by 10; mixup hardly ever has λ in whole hundredths, cutmix always."""
    cfg = MixupConfig(mixup_alpha=1000.0, cutmix_alpha=1000.0, prob=0.6, switch_prob=0.3)
    _, _, shares = mix_rows(cfg, 2, rows=4000, images=jnp.zeros((4000, 10, 10, 1)))
    lam = np.diag(shares)[::2]
    mixed, cut = lam < 1, np.abs(lam * 100 - np.round(lam * 100)) < 1e-4
    assert stats.binomtest(int(mixed.sum()), lam.size, 0.6).pvalue > LEVEL
    assert stats.binomtest(int((mixed & cut).sum()), int(mixed.sum()), 0.3).pvalue > LEVEL


# Erasing.


def test_given_boxes_are_filled_the_last_on_top():
    images = images_of(2)
    boxes = jnp.array([[[1, 4, 2, 5], [3, 8, 0, 3]], [[0, 0, 0, 0], [7, 8, 5, 6]]])
    fill = jnp.arange(12.0).reshape(2, 2, 1, 1, 3)
    expected = np.array(images)
    expected[0, 1:4, 2:5], expected[0, 3:8, 0:3], expected[1, 7, 5] = [0, 1, 2], [3, 4, 5], [9, 10, 11]
    np.testing.assert_array_equal(augment.apply_erase(images, boxes, fill), expected)


def erasing(cfg, images, height, width):
    """Boxes (height, width, top, left), image for image; an independent reading of timm's rules."""
    found = []
    for _ in range(images):
        boxes = []
        if rng.random() < cfg.prob:
            count = rng.integers(1, cfg.count + 1)
            for _ in range(count):
                for _ in range(10):
                    area = rng.uniform(cfg.area_min, cfg.area_max) * height * width / count
                    ratio = np.exp(rng.uniform(np.log(cfg.ratio_min), -np.log(cfg.ratio_min)))
                    h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
                    if h < height and w < width:
                        boxes.append((h, w, rng.integers(height - h + 1), rng.integers(width - w + 1)))
                        break
        found.append(boxes)
    return found


@pytest.mark.parametrize("cfg, height, width", [
    (ErasingConfig(prob=0.8), 64, 64), (ErasingConfig(prob=1.0, count=3), 40, 64),
    (ErasingConfig(prob=1.0, area_min=0.3, area_max=0.6, ratio_min=0.2), 32, 32)], ids=["deit", "three", "few fit"])
def test_boxes_are_those_of_an_independent_erasing(cfg, height, width):
    boxes = np.asarray(erase_boxes(jax.random.key(2), 8_000, height, width, cfg))
    tall, wide = boxes[..., 1] - boxes[..., 0], boxes[..., 3] - boxes[..., 2]
    there = tall * wide > 0
    expected = erasing(cfg, 8_000, height, width)
    flat = np.array([box for image in expected for box in image])
    # Whole numbers have ties, which make KS tests shy of rejecting: their levels are upper bounds.
    ours = np.stack([tall, wide, boxes[..., 0], boxes[..., 2]], axis=-1)[there]
    for name, of in {"area": lambda x: x[:, 0] * x[:, 1], "aspect": lambda x: np.log(x[:, 0] / x[:, 1]),
                     "top": lambda x: x[:, 2], "left": lambda x: x[:, 3],
                     "room below": lambda x: height - x[:, 0] - x[:, 2]}.items():
        assert stats.ks_2samp(of(ours), of(flat)).pvalue > LEVEL, name
    numbers = [np.bincount(n, minlength=cfg.count + 1) for n in (there.sum(1), [len(image) for image in expected])]
    table = np.array(numbers)
    assert stats.chi2_contingency(table[:, table.any(0)]).pvalue > LEVEL
    assert (boxes[..., 0] >= 0).all() and (boxes[..., 1] <= height).all() and (boxes[..., 3] <= width).all()
    assert (tall[there] < height).all() and (wide[there] < width).all()


def test_a_box_that_never_fits_is_none():
    cfg = ErasingConfig(prob=1.0, area_min=1.0, area_max=1.0, ratio_min=1.0)
    images = images_of(4)
    np.testing.assert_array_equal(erase(jax.random.key(0), images, cfg=cfg), images)


def test_one_image_in_four_is_erased():
    boxes = np.asarray(erase_boxes(jax.random.key(3), 4000, 224, 224, ErasingConfig()))
    erased = (boxes[..., 1] > boxes[..., 0]).any(1)
    assert stats.binomtest(int(erased.sum()), 4000, 0.25).pvalue > LEVEL


def test_what_boxes_are_filled_with():
    nan = jnp.full((64, 32, 32, 3), jnp.nan)
    filled = {}
    for name in ("pixel", "rand", "const"):
        after = np.asarray(erase(jax.random.key(4), nan, cfg=ErasingConfig(prob=1.0, mode=name)))
        filled[name] = [image[~np.isnan(image).any(-1)] for image in after]
        assert all(len(pixels) > 0 for pixels in filled[name])
    assert all((pixels == 0).all() for pixels in filled["const"])
    assert all((pixels == pixels[0]).all() for pixels in filled["rand"])
    colours = np.stack([pixels[0] for pixels in filled["rand"]])
    assert stats.kstest(colours.ravel(), stats.norm.cdf).pvalue > LEVEL
    assert np.unique(colours).size == colours.size
    assert stats.kstest(np.concatenate(filled["pixel"]).ravel(), stats.norm.cdf).pvalue > LEVEL


def test_noise_is_normal_and_independent():
    first, second = (np.asarray(augment.normal_noise(jax.random.key(seed), (8, 64, 64, 3))) for seed in (0, 1))
    n = first.size
    assert stats.kstest(first.ravel(), stats.norm.cdf).pvalue > LEVEL
    assert np.isfinite(first).all() and 4.2 < np.abs(first).max() < 6
    assert np.unique(first).size > 0.9 * n
    square = (first**2 - 1) / np.sqrt(2)
    products = {"steps": first * second, "corners": first[:, :-1, :-1] * first[:, 1:, :-1] * first[:, :-1, 1:]
                * first[:, 1:, 1:]}  # the words of four corners cancel, before the hash
    for x, name in ((first, "value"), (square, "square")):
        for axis in range(4):
            products[f"{name} {axis}"] = x * np.roll(x, 1, axis)
    for name, product in products.items():
        assert abs(product.mean()) * np.sqrt(product.size) < stats.norm.isf(LEVEL / 2 / len(products)), name


# Keys and devices.


@functools.partial(jax.jit, static_argnames=("cfg", "group_size"))
def augmented(key, images, labels, valid, cfg, group_size):
    erasing, mixing = jax.random.split(key)
    images = augment.erase(erasing, images, ErasingConfig(prob=0.5))
    return augment.mix(mixing, images, labels, valid, cfg, group_size)


BATCH = images_of(32), jnp.eye(32), jnp.arange(32) != 3  # 4 rows on each of 8 devices
CASES = pytest.mark.parametrize("name, group_size", [("batch", 4), ("pair", 16)])


def test_a_key_decides_everything():
    first, again, other = (augmented(jax.random.key(seed), *BATCH, BOTH, 4) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_a_row_does_not_depend_on_rows_of_later_groups():
    full, part = (augmented(jax.random.key(0), *(x[:rows] for x in BATCH), BOTH, 4) for rows in (32, 16))
    for all_rows, rows in zip(full, part, strict=True):
        np.testing.assert_allclose(rows, all_rows[:16], atol=1e-6)


@functools.cache
def sharded(name, group_size):
    """What comes out on 8 devices, and what the devices send each other, (kind, shape)."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    args = jax.device_put((jax.random.key(5), *BATCH), (everywhere, rows, rows, rows))
    compiled = augmented.lower(*args, mode(name), group_size).compile()
    sent = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
                      compiled.as_text())
    sent = [(kind, tuple(int(n) for n in dims.split(",") if n))
            for shapes, kind in sent for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
    return compiled(*args), sent


@CASES
def test_the_number_of_devices_changes_nothing(name, group_size):
    one = augmented(jax.random.key(5), *BATCH, mode(name), group_size)
    for a, b in zip(one, sharded(name, group_size)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # a product and a sum may be rounded once or twice


@CASES
def test_devices_send_rows_to_one_partner_or_nothing_at_all(name, group_size):
    _, sent = sharded(name, group_size)
    if group_size <= 4:  # rows of a device
        assert not sent
    else:
        assert {kind for kind, _ in sent} == {"collective-permute"}
        sizes = {4 * 8 * 6 * 3, 4 * 32, 4}  # images, labels and valid of a device
        assert {int(np.prod(shape)) for _, shape in sent} <= sizes
