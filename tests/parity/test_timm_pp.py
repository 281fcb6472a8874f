"""Preprocessing against timm and torchvision: pixels for the same parameters, and the laws of random draws.

Pixels are equal, not close. Draws are compared by two-sample Kolmogorov-Smirnov tests at level ALPHA, seeds fixed.
"""
import io
import math
import random

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")

from timm.data import auto_augment, create_transform  # noqa: E402
from timm.data.transforms import RandomResizedCropAndInterpolation  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import functional  # noqa: E402

from cb_vit.pp import randaug, three_augment  # noqa: E402
from cb_vit.pp.builder import build  # noqa: E402
from cb_vit.pp.ops_image import InceptionCrop, ResizeSmall  # noqa: E402
from cb_vit.pp.randaug_ops import INCREASING, PLAIN, TRANSFORMS, Sampling  # noqa: E402

ALPHA = 1e-3
PATH = "config.input.pp"
DEIT = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
RECIPE = dict(input_size=224, is_training=True, color_jitter=0.3, auto_augment=DEIT, interpolation="bicubic",
              re_prob=0.25, re_mode="pixel", re_count=1)


def photo(h=375, w=500, seed=0):
    """Something like a photograph: slow waves, edges, noise, and all the grey levels."""
    y, x = np.mgrid[:h, :w]
    waves = np.stack([128 + 110 * np.sin(x / (9 + 5 * k) + seed) * np.cos(y / (23 - 4 * k)) for k in range(3)], -1)
    waves[h // 3:h // 2, w // 4:w // 2] = (250, 20, 90)
    noise = np.random.default_rng(seed).normal(0, 12, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def same(got, want):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


# ---- RandAugment ---------------------------------------------------------------------------------------------------

@pytest.fixture(params=[1, -1])
def sign(request, monkeypatch):
    """The sign that timm's next draws give: its rule is `random() > 0.5` for minus."""
    monkeypatch.setattr(random, "random", lambda: 0.4 if request.param == 1 else 0.6)
    return request.param


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_arguments_are_timms(name, sign):
    level_to_argument = auto_augment.LEVEL_TO_ARG[name]
    for m in np.linspace(0, 20, 81).tolist():
        want = level_to_argument(m, {}) if level_to_argument else (None,)
        got = TRANSFORMS[name].argument(m / 10, sign)
        assert got == pytest.approx(want[0], abs=1e-12) and type(got) is type(want[0]), m


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_pixels_are_timms(name, sign, resample):
    image = photo(224, 200)
    for m in (0, 0.7, 3, 5, 8.37, 9, 10, 13.1):
        argument = TRANSFORMS[name].argument(m / 10, sign)
        got = TRANSFORMS[name].apply(image, argument, Sampling(resample, FILL))
        arguments = () if argument is None else (argument,)
        same(got, auto_augment.NAME_TO_OP[name](image, *arguments, fillcolor=FILL, resample=resample))


@pytest.mark.parametrize("text", [DEIT, "rand", "rand-m5-n3", "rand-p0.3-inc0-mstd101-m7", "rand-mmax20-m15-inc1",
                                  "rand-n1-p1.0-t3a", "rand-t3aw", "rand-m9-tweights-mstd1-n4"])
def test_strings_mean_the_same_to_timm(text):
    policy, want = randaug.read_policy(text), auto_augment.rand_augment_transform(text)
    assert policy.names == tuple(op.name for op in want.ops) and policy.n == want.num_layers
    if want.choice_weights is None:
        assert policy.weights is None
    else:
        np.testing.assert_allclose(policy.weights, want.choice_weights)
    op = want.ops[0]
    assert (policy.m, policy.p, policy.mmax) == (op.magnitude, op.prob, op.magnitude_max or 10)
    assert (math.inf if policy.mstd > 100 else policy.mstd) == op.magnitude_std


@pytest.mark.parametrize("text", [DEIT, "rand-m9-mstd101", "rand-m9-tweights-mstd1-p0.7"])
def test_draws_have_the_same_law_as_timms(text, monkeypatch):
    """Which ops are applied, how often none, and with which arguments."""
    ours, theirs = [], []
    for name, kind in TRANSFORMS.items():
        monkeypatch.setitem(TRANSFORMS, name, kind._replace(
            apply=lambda image, argument, sampling, name=name: ours.append((name, argument)) or image))
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, lambda image, argument=None, *, name=name, **_: (
            theirs.append((name, argument)) or image))
    random.seed(0)
    np.random.seed(0)
    image, rng = Image.new("RGB", (4, 4)), np.random.default_rng(0)
    op, transform = build(f"randaug({text!r})", PATH).host_ops[0][1], auto_augment.rand_augment_transform(text)
    for _ in range(4000):
        op.transform(image, rng)
        transform(image)
    policy = randaug.read_policy(text)
    table = [[sum(called == name for called, _ in calls) for name in policy.names] + [4000 * policy.n - len(calls)]
             for calls in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > ALPHA
    for name in ("Rotate", "ShearX", "TranslateYRel"):
        arguments = [[argument for called, argument in calls if called == name] for calls in (ours, theirs)]
        assert stats.ks_2samp(*arguments).pvalue > ALPHA


# ---- crops and the evaluation --------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(375, 500), (500, 333), (90, 120)])
def test_random_resized_crop_of_the_same_box(h, w, monkeypatch):
    image, theirs = photo(h, w), RandomResizedCropAndInterpolation(224, interpolation="bicubic")
    for seed in range(6):
        left, top, right, bottom = InceptionCrop(224).box(h, w, np.random.default_rng(seed))
        monkeypatch.setattr(theirs, "get_params", lambda *_: (top, left, bottom - top, right - left))  # noqa: B023
        same(build("inception_crop(224)", PATH).host({"image": image}, np.random.default_rng(seed))["image"],
             theirs(image))


@pytest.mark.parametrize("h, w", [(375, 500), (500, 333), (200, 500)])
def test_random_resized_crop_has_the_same_law(h, w):
    random.seed(1)
    image, rng, op = Image.new("L", (w, h)), np.random.default_rng(1), InceptionCrop(224)
    theirs = np.array([RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                       for _ in range(4000)]).T
    left, top, right, bottom = np.array([op.box(h, w, rng) for _ in range(4000)]).T
    ours = np.array([top, left, bottom - top, right - left])
    for measure in (lambda y, x, h, w: h * w, lambda y, x, h, w: w / h, lambda y, x, h, w: y, lambda y, x, h, w: x):
        assert stats.ks_2samp(measure(*ours), measure(*theirs)).pvalue > ALPHA


@pytest.mark.parametrize("h, w", [(20, 500), (500, 20), (1, 300), (300, 300)])
def test_the_fallback_is_timms(h, w, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: math.inf if low == 0.08 else 0.0)  # nothing fits
    monkeypatch.setattr(math, "sqrt", lambda value: 10**6)
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(
        Image.new("L", (w, h)), (0.08, 1.0), (3 / 4, 4 / 3))
    assert InceptionCrop(224).box(h, w, np.random.default_rng(0)) == (left, top, left + width, top + height)


@pytest.mark.parametrize("h, w", [(375, 500), (500, 333), (224, 1000), (231, 257), (60, 50)])
@pytest.mark.parametrize("size, crop, resized", [(224, 0.875, 256), (224, 0.9, 248), (384, 1.0, 384)])
def test_evaluation_pixels_are_timms(h, w, size, crop, resized):
    image = Image.open(io.BytesIO(jpeg(photo(h, w))))
    transform = create_transform(size, interpolation="bicubic", crop_pct=crop, use_prefetcher=True)
    got = build(f"decode|resize_small({resized})|central_crop({size})", PATH).host(
        {"image": jpeg(photo(h, w))}, np.random.default_rng(0))["image"]
    same(got, transform(image).permute(1, 2, 0))


def test_normalised_images_are_timms():
    """The device's arithmetic too, to 1 ulp of float32 around 3."""
    file, rng = jpeg(photo()), np.random.default_rng(0)
    pp = build("decode|resize_small(256)|central_crop(224)|vgg_value_range", PATH)
    got = pp.device({"image": jnp.asarray(pp.host({"image": file}, rng)["image"])[None]})["image"][0]
    want = create_transform(224, interpolation="bicubic", crop_pct=0.875)(Image.open(io.BytesIO(file)))
    np.testing.assert_allclose(np.asarray(got), want.permute(1, 2, 0).numpy(), atol=1e-6)


# ---- DeiT-III ------------------------------------------------------------------------------------------------------

def test_three_augment_pixels():
    image, rng = photo(), np.random.default_rng(0)
    same(three_augment.to_grey(image, rng), transforms.Grayscale(3)(image))
    same(three_augment.solarize(image, rng), functional.solarize(image, 128))
    radius = np.random.default_rng(5).uniform(0.1, 2.0)
    same(three_augment.blur(image, np.random.default_rng(5)), auto_augment.gaussian_blur(image, radius))


@pytest.mark.parametrize("grey", [False, True])
def test_jitter_pixels(grey):
    image = photo().convert("L" if grey else "RGB")
    for factor in (0.0, 0.7, 0.93, 1.0, 1.3, 2.5):
        same(three_augment.adjust_brightness(image, factor), functional.adjust_brightness(image, factor))
        same(three_augment.adjust_contrast(image, factor), functional.adjust_contrast(image, factor))
        same(three_augment.adjust_saturation(image, factor), functional.adjust_saturation(image, factor))
    for turn in (-0.5, -0.31, -0.001, 0.0, 0.02, 0.499):
        same(three_augment.adjust_hue(image, turn), functional.adjust_hue(image, turn))


def test_jitter_draws_have_torchvisions_law(monkeypatch):
    """By what the jitter does to the mean of an image, all three properties and their order together."""
    torch.manual_seed(0)
    image, rng = photo(24, 24), np.random.default_rng(0)
    op, theirs = build("color_jitter(0.3, 0.3, 0.3)", PATH).host_ops[0][1], transforms.ColorJitter(0.3, 0.3, 0.3)
    for measure in (np.mean, np.std):
        samples = [[measure(transform(image)) for _ in range(1500)]
                   for transform in (lambda image: op.transform(image, rng), theirs)]
        assert stats.ks_2samp(*samples).pvalue > ALPHA


@pytest.mark.parametrize("h, w", [(375, 500), (500, 333), (50, 60)])
def test_simple_random_crop_pixels(h, w, monkeypatch):
    image = photo(h, w)
    resized = transforms.Resize(224, transforms.InterpolationMode.BICUBIC)(image)
    same(ResizeSmall(224).transform(image, np.random.default_rng(0)), resized)
    padded = functional.pad(resized, 4, padding_mode="reflect")
    got = build("simple_random_crop(224)", PATH).host({"image": image}, np.random.default_rng(3))["image"]
    rng = np.random.default_rng(3)
    left, top = int(rng.integers(padded.width - 223)), int(rng.integers(padded.height - 223))
    same(got, functional.crop(padded, top, left, 224, 224))


# ---- whole recipes -------------------------------------------------------------------------------------------------

def test_deits_recipe_has_timms_ops_in_timms_order():
    steps = create_transform(**RECIPE).transforms
    assert [type(step).__name__ for step in steps] == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment",
        "MaybeToTensor", "Normalize", "RandomErasing"]  # no ColorJitter; the last three are the accelerator's
    pp = build(f"decode|inception_crop(224)|flip_lr|randaug({DEIT!r})|vgg_value_range", PATH)
    _, crop, flip, augment = (op for _, op in pp.host_ops)
    assert (crop.area_min / 100, crop.area_max / 100) == steps[0].scale and (224, 224) == steps[0].size
    assert (crop.ratio_min, crop.ratio_max) == steps[0].ratio
    assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC
    assert crop.method == augment.method == "bicubic" and crop.antialias
    assert steps[1].p == 0.5
    assert augment.policy.names == tuple(op.name for op in steps[2].ops) == INCREASING
    for op in steps[2].ops:
        assert op.kwargs == dict(fillcolor=augment.fill, resample=Image.Resampling.BICUBIC)
        assert (op.magnitude, op.magnitude_std, op.prob) == (augment.policy.m, augment.policy.mstd, augment.policy.p)
    np.testing.assert_allclose(steps[4].mean * 255, pp.device_ops[0][1].mean, rtol=1e-6)
    np.testing.assert_allclose(steps[4].std * 255, pp.device_ops[0][1].std, rtol=1e-6)


def test_without_inc_the_ops_are_timms():
    assert tuple(op.name for op in auto_augment.rand_augment_transform("rand-m9").ops) == PLAIN
