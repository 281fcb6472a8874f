"""DeiT-III's augmentation: pixels against numpy, draws against their laws (fixed seeds, level ALPHA a test)."""
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cb_vit.config import ConfigError
from cb_vit.pp import three_augment
from cb_vit.pp.builder import build

ALPHA = 1e-3
PATH = "config.input.pp"


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(h=30, w=40, c=3):
    return rng().integers(0, 256, (h, w, c), dtype=np.uint8)


def run(text, image, seed=0):
    return build(text, PATH).host({"image": image}, rng(seed))["image"]


def draw(text, count):
    op, generator, image = build(text, PATH).host_ops[0][1], rng(1), Image.new("RGB", (4, 4))
    for _ in range(count):
        op.transform(image, generator)


@pytest.mark.parametrize("text, fragment", [
    ("color_jitter(-0.1)", "brightness must be 0 or more, got -0.1"),
    ("color_jitter(hue=0.6)", "hue is a share of the circle, at most 0.5, got 0.6"),
    ("color_jitter(0.3, color=0.3)", "unexpected keyword argument 'color'"),
    ("simple_random_crop(0)", "size must be positive"),
    ("three_augment(3)", "too many positional arguments"),
])
def test_wrong_arguments_fail_when_the_config_is_checked(text, fragment):
    with pytest.raises(ConfigError) as error:
        build(text, PATH)
    assert error.value.path == PATH and fragment in str(error.value)


@pytest.mark.parametrize("text", ["three_augment", "color_jitter(0.3, 0.3, 0.3, 0.1)", "simple_random_crop(24)"])
def test_the_generator_decides_alone_and_the_input_stays(text):
    pp, image = build(text, PATH), pixels()
    kept, opened = image.copy(), Image.fromarray(image)
    outputs = [pp.host({"image": opened}, rng(seed))["image"] for seed in range(12)]
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(opened, kept)
    again = pickle.loads(pickle.dumps(pp))
    assert again == pp
    for seed, output in enumerate(outputs):
        np.testing.assert_array_equal(again.host({"image": image}, rng(seed))["image"], output)
    assert len({output.tobytes() for output in outputs}) > 3


def test_three_augment_is_exactly_one_of_three(monkeypatch):
    image = pixels(8, 9)
    opened = Image.fromarray(image)
    grey = np.asarray(opened.convert("L"))[..., None].repeat(3, -1)
    solarized = np.where(image < 128, image, 255 - image)
    radii, gaussian = [], three_augment.ImageFilter.GaussianBlur
    monkeypatch.setattr(three_augment.ImageFilter, "GaussianBlur", lambda r: radii.append(r) or gaussian(r))
    op, generator, counts = build("three_augment", PATH).host_ops[0][1], rng(2), Counter()
    for _ in range(3000):
        blurs, out = len(radii), np.asarray(op.transform(opened, generator))
        if len(radii) > blurs:
            counts["blur"] += 1
            np.testing.assert_array_equal(out, opened.filter(gaussian(radii[-1])))
        else:
            counts["grey" if (out == grey).all() else "solarized" if (out == solarized).all() else "other"] += 1
    assert set(counts) == {"grey", "solarized", "blur"} and stats.chisquare(list(counts.values())).pvalue > ALPHA
    assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > ALPHA


def test_three_augment_on_grey_images():
    for seed in range(6):
        assert run("decode(1)|three_augment|color_jitter(0.3, 0.3, 0.3, 0.1)", pixels(c=1), seed).shape == (30, 40, 1)


def test_jitter_factors_and_their_order(monkeypatch):
    seen = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(three_augment, f"adjust_{name}",
                            lambda image, factor, name=name: seen.append((name, factor)) or image)
    draw("color_jitter(0.3, 0.4, 1.5)", 1200)
    orders = Counter(tuple(name for name, _ in seen[i:i + 3]) for i in range(0, 3600, 3))
    assert len(orders) == 6 and stats.chisquare(list(orders.values())).pvalue > ALPHA
    for name, low, high in [("brightness", 0.7, 1.3), ("contrast", 0.6, 1.4), ("saturation", 0, 2.5)]:
        factors = [factor for called, factor in seen if called == name]
        assert stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > ALPHA
    seen.clear()
    draw("color_jitter(hue=0.2)", 400)
    assert {name for name, _ in seen} == {"hue"}
    assert stats.kstest([factor for _, factor in seen], stats.uniform(-0.2, 0.4).cdf).pvalue > ALPHA


def test_jitter_multiplies():
    """To 1 grey level where the product is cut off to whole levels, 2 where grey is rounded before."""
    image = pixels()
    opened, grey = Image.fromarray(image), image @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(three_augment.adjust_brightness(opened, 1.2), (image * 1.2).clip(0, 255), atol=1)
    np.testing.assert_allclose(three_augment.adjust_contrast(opened, 0.7), grey.mean() * 0.3 + image * 0.7, atol=2)
    np.testing.assert_allclose(
        three_augment.adjust_saturation(opened, 0.7), grey[..., None] * 0.3 + image * 0.7, atol=2)
    grey = Image.fromarray(image[..., 0])
    np.testing.assert_array_equal(three_augment.adjust_hue(grey, 0.3), grey)
    turned = np.asarray(three_augment.adjust_hue(Image.new("RGB", (1, 1), (200, 0, 0)), 85 / 255))
    np.testing.assert_allclose(turned, [[[0, 200, 0]]], atol=3)  # a third of the circle


def test_simple_random_crop_is_a_place_in_the_padded_image():
    image = pixels(20, 30)
    resized = np.asarray(Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC))
    padded = np.pad(resized, [(4, 4), (4, 4), (0, 0)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (16, 16), (0, 1)).transpose(0, 1, 3, 4, 2)
    pp, generator, places = build("simple_random_crop(16)", PATH), rng(3), set()
    for _ in range(150):
        out = pp.host({"image": image}, generator)["image"]
        place, = np.argwhere((windows == out).all((2, 3, 4)))
        places.add(tuple(place))
    assert pp.image_size == (16, 16)
    ys, xs = zip(*places, strict=True)
    assert (min(ys), max(ys), min(xs), max(xs)) == (0, 8, 0, 16)


def test_the_recipe_reads():
    recipe = "decode|simple_random_crop(24)|flip_lr|three_augment|color_jitter(0.3, 0.3, 0.3)|vgg_value_range"
    assert build(recipe, PATH).image_size == (24, 24) and run(recipe, pixels()).shape == (24, 24, 3)
