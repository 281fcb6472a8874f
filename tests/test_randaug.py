"""RandAugment: strings, pixels against numpy, draws against their laws (fixed seeds, level ALPHA a test)."""
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cb_vit.config import ConfigError
from cb_vit.pp import randaug
from cb_vit.pp.builder import build
from cb_vit.pp.randaug_ops import INCREASING, PLAIN, TRANSFORMS, Sampling

ALPHA = 1e-3
PATH = "config.input.pp"
DEIT = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
BICUBIC = Sampling(Image.Resampling.BICUBIC, FILL)


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(h=30, w=40, c=3, seed=0):
    return rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)


def smooth(h=30, w=40):
    """Slow waves, clear of 0 and 255: clipping and rounding in a resampler then stay below one grey level."""
    y, x = np.mgrid[:h, :w]
    return np.stack([128 + 60 * np.sin(x / 5 + k) * np.cos(y / 7 - k) for k in range(3)], -1).astype(np.uint8)


def run(text, image, seed=0):
    return build(text, PATH).host({"image": image}, rng(seed))["image"]


def apply(name, argument, image, sampling=BICUBIC):
    return np.asarray(TRANSFORMS[name].apply(Image.fromarray(image), argument, sampling))


# ---- the string ----------------------------------------------------------------------------------------------------

def test_deits_string():
    policy = randaug.read_policy(DEIT)
    assert (policy.m, policy.mstd, policy.mmax, policy.n, policy.p) == (9, 0.5, 10, 2, 0.5)
    assert policy.names == INCREASING and policy.weights is None
    assert len(INCREASING) == len(PLAIN) == 15
    assert {a.removesuffix("Increasing") for a in INCREASING} == set(PLAIN) and set(INCREASING) <= set(TRANSFORMS)


def test_every_part_and_any_order():
    policy = randaug.read_policy("rand-p0.25-n3-mmax20-inc0-mstd1.5-m12")
    assert (policy.m, policy.mstd, policy.mmax, policy.n, policy.p) == (12, 1.5, 20, 3, 0.25)
    assert policy.names == PLAIN
    assert randaug.read_policy("rand") == randaug.Policy(PLAIN, None)
    assert randaug.read_policy("rand-t3a").names == ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
    weighted = randaug.read_policy("rand-mstd1-tweights-mmax30")
    assert len(weighted.names) == 15 and weighted.weights[0] == pytest.approx(3 / 10.1)
    assert sum(weighted.weights) == pytest.approx(1)


@pytest.mark.parametrize("text, fragment", [
    ("rnd-m9", "'rnd-m9' must begin with 'rand', as in 'rand-m9-mstd0.5-inc1', got 'rnd'"),
    ("", "must begin with 'rand'"),
    ("rand-mag9", "'rand-mag9': unknown part of a RandAugment string 'mag'; Choices: inc, m, mmax"),
    ("rand-w0", "unknown part of a RandAugment string 'w'; Choices: inc, m, mmax, mstd, n, p, t"),
    ("rand--m9", "unknown part of a RandAugment string ''"),
    ("rand-m9.5", "'rand-m9.5': in 'm9.5', m is the magnitude, a whole number of 0 or more"),
    ("rand-m", "in 'm', m is the magnitude"),
    ("rand-m9-inc", "in 'inc', inc is 1 for ops that grow stronger"),
    ("rand-inc2", "in 'inc2', inc is 1"),
    ("rand-p2", "in 'p2', p is the probability that a chosen op is applied, 0 to 1"),
    ("rand-n0", "in 'n0', n is how many ops"),
    ("rand-mmax0", "in 'mmax0', mmax is the largest"),
    ("rand-tweigths", "in 'tweigths', t is a set of transforms, one of 3a, 3aw, weights"),
    ("rand-m9-m8", "'rand-m9-m8': m is given twice"),
    ("rand-n15-t3aw", "n15 draws without replacement from the 14 ops of t3aw"),
])
def test_typos_fail_when_the_config_is_checked(text, fragment):
    with pytest.raises(ConfigError) as error:
        build(f"decode|randaug({text!r})", PATH)
    assert error.value.path == PATH and fragment in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, fragment", [
    ("randaug", "missing a required argument: 'config_str'"),
    ("randaug('rand-m9', method='bicubc')", "method: unknown value 'bicubc'; did you mean bicubic?"),
    ("randaug('rand-m9', fill=(1, 2))", "fill: expected (a whole number, a whole number, a whole number)"),
    ("randaug('rand-m9', fill=(1, 2, 256))", "fill must have values from 0 to 255, got (1, 2, 256)"),
])
def test_arguments(text, fragment):
    with pytest.raises(ConfigError) as error:
        build(text, PATH)
    assert fragment in str(error.value)


# ---- from magnitude to argument ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, at_0, at_9, at_10", [
    ("Rotate", 0, 27, 30), ("ShearX", 0, 0.27, 0.3), ("ShearY", 0, 0.27, 0.3),
    ("TranslateXRel", 0, 0.405, 0.45), ("TranslateYRel", 0, 0.405, 0.45),
    ("PosterizeIncreasing", 4, 1, 0), ("Posterize", 0, 3, 4),
    ("SolarizeIncreasing", 256, 26, 0), ("Solarize", 0, 230, 256), ("SolarizeAdd", 0, 99, 110),
    ("ColorIncreasing", 1, 1.81, 1.9), ("SharpnessIncreasing", 1, 1.81, 1.9), ("Brightness", 0.1, 1.72, 1.9),
    ("Desaturate", 0.5, 0.95, 1), ("GaussianBlur", 0.1, 1.81, 2)])
def test_arguments_at_the_ends_and_at_nine(name, at_0, at_9, at_10):
    got = [TRANSFORMS[name].argument(m / 10, 1) for m in (0, 9, 10)]
    assert got == pytest.approx([at_0, at_9, at_10])


def test_signs_and_what_lies_above_ten():
    def argument(name, m, sign=-1):
        return TRANSFORMS[name].argument(m / 10, sign)

    assert argument("Rotate", 9) == -27 and argument("TranslateXRel", 9) == pytest.approx(-0.405)
    assert argument("ContrastIncreasing", 9) == pytest.approx(0.19)
    assert argument("ContrastIncreasing", 20) == 0.1 and argument("ContrastIncreasing", 20, 1) == pytest.approx(2.8)
    assert argument("SolarizeIncreasing", 20) == 0 and argument("SolarizeAdd", 20) == 128
    assert argument("GaussianBlur", 20) == 2


# ---- pixels --------------------------------------------------------------------------------------------------------

def test_tables():
    image = pixels().astype(int)
    for name, argument, want in [
            ("Invert", None, 255 - image), ("Solarize", 100, np.where(image < 100, image, 255 - image)),
            ("Solarize", 0, 255 - image), ("Solarize", 256, image),
            ("SolarizeAdd", 99, np.where(image < 128, np.minimum(image + 99, 255), image)),
            ("Posterize", 1, image // 128 * 128), ("Posterize", 4, image // 16 * 16), ("Posterize", 9, image),
            ("Posterize", 0, 0 * image), ("PosterizeIncreasing", -4, 0 * image)]:
        np.testing.assert_array_equal(apply(name, argument, image.astype(np.uint8)), want, err_msg=name)


def test_autocontrast_and_equalize_against_their_definitions():
    image = (pixels() // 3 + 60).astype(np.uint8)
    image[..., 1] //= 2
    low, high = image.min((0, 1)).astype(float), image.max((0, 1))
    np.testing.assert_allclose(apply("AutoContrast", None, image), (image - low) * 255 / (high - low), atol=1)
    equalized = apply("Equalize", None, image)
    for c in range(3):
        counts = np.bincount(image[..., c].ravel(), minlength=256)
        below = np.cumsum(counts) - counts
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        np.testing.assert_array_equal(equalized[..., c], ((step // 2 + below) // step).clip(0, 255)[image[..., c]])


@pytest.mark.parametrize("factor", [0.1, 0.19, 1.0, 1.81])
def test_enhancers_move_away_from_a_plainer_image(factor):
    """To 2 grey levels, for Pillow rounds the plainer image before `factor` stretches the difference."""
    image = pixels().astype(float)
    grey = image @ [0.299, 0.587, 0.114]
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    blurred = image.copy()  # Pillow leaves the border as it is
    blurred[1:-1, 1:-1] = sum(kernel[i, j] * image[i:28 + i, j:38 + j] for i in range(3) for j in range(3))
    for name, plainer in [("Brightness", 0 * image), ("Contrast", np.full_like(image, grey.mean())),
                          ("Color", np.stack([grey] * 3, -1)), ("Sharpness", blurred)]:
        want = (plainer + factor * (image - plainer)).clip(0, 255)
        for variant in (name, f"{name}Increasing"):
            np.testing.assert_allclose(apply(variant, factor, pixels()), want, atol=2, err_msg=variant)


def sample(image, xs, ys):
    """Keys' cubic with a = -1, Pillow's for `transform`, at pixel centres (xs, ys); FILL where those lie outside."""
    def taps(at):
        distance = np.abs(at[..., None] - (np.floor(at)[..., None] + np.arange(-1, 3)))
        near, far = 1 - 2 * distance**2 + distance**3, 4 - 8 * distance + 5 * distance**2 - distance**3
        return np.where(distance <= 1, near, far), (np.floor(at).astype(int)[..., None] + np.arange(-1, 3))

    h, w = image.shape[:2]
    (wx, ix), (wy, iy) = taps(xs), taps(ys)
    around = image.astype(float)[iy.clip(0, h - 1)[..., :, None], ix.clip(0, w - 1)[..., None, :]]
    value = np.einsum("hwyxc,hwy,hwx->hwc", around, wy, wx)
    inside = (xs >= -0.5) & (xs < w - 0.5) & (ys >= -0.5) & (ys < h - 0.5)
    return np.where(inside[..., None], value, FILL)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate"])
def test_affine_ops_against_an_independent_resampler(name, sign):
    image, (h, w) = smooth(), (30, 40)
    y, x = np.mgrid[:h, :w].astype(float)
    argument = TRANSFORMS[name].argument(0.87, sign)
    angle = math.radians(argument)
    u, v = x + 0.5 - w / 2, y + 0.5 - h / 2
    xs, ys = {
        "ShearX": (x + argument * (y + 0.5), y), "ShearY": (x, y + argument * (x + 0.5)),
        "TranslateXRel": (x + argument * w, y), "TranslateYRel": (x, y + argument * h),
        "Rotate": (math.cos(angle) * u - math.sin(angle) * v + w / 2 - 0.5,  # counter-clockwise about the centre
                   math.sin(angle) * u + math.cos(angle) * v + h / 2 - 0.5)}[name]
    got, want = apply(name, argument, image), sample(image, xs, ys)
    assert (want == FILL).all(-1).mean() > 0.03 and (want != FILL).any(-1).mean() > 0.5
    np.testing.assert_allclose(got, want, atol=1)


def test_blur_and_desaturate():
    image = pixels()
    np.testing.assert_array_equal(apply("Desaturate", 1.0, image)[..., 0], Image.fromarray(image).convert("L"))
    spot = np.zeros((41, 41, 3), np.uint8)
    spot[20, 20] = 255
    profile = apply("GaussianBlur", 1.5, spot).astype(float)[..., 0].sum(0)
    spread = np.average((np.arange(41) - 20) ** 2, weights=profile)
    assert spread == pytest.approx(1.5**2, rel=0.15)


def test_grey_images_get_every_op_and_the_mean_of_the_fill():
    grey = pixels(c=1)[..., 0]
    for name, kind in TRANSFORMS.items():
        argument = kind.argument(0.9, 1)
        got = np.asarray(kind.apply(Image.fromarray(grey), argument, Sampling(Image.Resampling.BICUBIC, 115)))
        want = apply(name, argument, np.dstack([grey] * 3), Sampling(Image.Resampling.BICUBIC, (115, 115, 115)))
        np.testing.assert_allclose(got, want[..., 0], atol=1, err_msg=name)
    shifted = run("decode(1)|randaug('rand-m10-n9-p1.0')", grey[..., None])
    assert shifted.shape == (30, 40, 1)
    with pytest.raises(ValueError, match=r"^randaug\('rand'\): takes grey or RGB images, got one of mode RGBA"):
        run("randaug('rand')", pixels(c=4))


# ---- draws ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def calls(monkeypatch):
    """What reaches the ops: (name, level, sign, sampling) a call; the images stay as they are."""
    seen = []
    for name in TRANSFORMS:
        monkeypatch.setitem(TRANSFORMS, name, randaug.TRANSFORMS[name]._replace(
            argument=lambda level, sign: (level, sign),
            apply=lambda image, argument, sampling, name=name: seen.append((name, *argument, sampling)) or image))
    return seen


def draw(text, count, mode="RGB"):
    op, generator, image = build(text, PATH).host_ops[0][1], rng(1), Image.new(mode, (4, 4))
    for _ in range(count):
        op.transform(image, generator)


def test_ops_are_uniform_and_fire_half_of_the_time(calls):
    per_image, pp, generator = [], build(f"randaug({DEIT!r})", PATH), rng(1)
    for _ in range(4000):
        before = len(calls)
        pp.host({"image": pixels(4, 4)}, generator)
        per_image.append(len(calls) - before)
    counts = Counter(name for name, *_ in calls)
    assert set(counts) == set(INCREASING) and stats.chisquare(list(counts.values())).pvalue > ALPHA
    assert stats.binomtest(len(calls), 8000, 0.5).pvalue > ALPHA
    assert stats.chisquare(np.bincount(per_image), [1000, 2000, 1000]).pvalue > ALPHA
    signs = Counter(sign for _, _, sign, _ in calls)
    assert set(signs) == {1, -1} and stats.binomtest(signs[1], len(calls)).pvalue > ALPHA
    assert {sampling for *_, sampling in calls} == {BICUBIC}


def test_magnitudes_are_normal_and_clipped_at_ten(calls):
    draw(f"randaug({DEIT!r})", 4000)
    levels = np.array([level for _, level, _, _ in calls])
    assert levels.max() == 1.0
    clipped = int((levels == 1.0).sum())
    assert stats.binomtest(clipped, len(levels), stats.norm.sf(2)).pvalue > ALPHA
    law = stats.truncnorm(-np.inf, 2, loc=0.9, scale=0.05)
    assert stats.kstest(levels[levels < 1], law.cdf).pvalue > ALPHA


def test_ops_magnitudes_and_signs_are_independent_and_with_replacement(calls):
    draw("randaug('rand-m5-mstd1-inc1-p1.0')", 3000)
    first, second = calls[::2], calls[1::2]
    twice = sum(a[0] == b[0] for a, b in zip(first, second, strict=True))
    assert stats.binomtest(twice, 3000, 1 / 15).pvalue > ALPHA
    levels = np.array([[a[1], b[1]] for a, b in zip(first, second, strict=True)])
    assert stats.spearmanr(*levels.T).pvalue > ALPHA
    same = sum(a[2] == b[2] for a, b in zip(first, second, strict=True))
    assert stats.binomtest(same, 3000).pvalue > ALPHA


@pytest.mark.parametrize("mstd", ["101", "inf"])
def test_a_large_mstd_is_uniform(calls, mstd):
    draw(f"randaug('rand-m8-mstd{mstd}-p1.0')", 1000)
    assert stats.kstest([level for _, level, _, _ in calls], stats.uniform(0, 0.8).cdf).pvalue > ALPHA


def test_without_mstd_the_magnitude_is_fixed_and_mmax_raises_the_limit(calls):
    draw("randaug('rand-m15-n3-p1.0')", 2)
    draw("randaug('rand-m15-mmax20-n3-p1.0')", 2)
    assert [level for _, level, _, _ in calls] == [1.0] * 6 + [1.5] * 6


def test_weighted_ops_are_drawn_without_replacement(calls):
    draw("randaug('rand-m9-tweights-p1.0')", 4000)
    assert all(a[0] != b[0] for a, b in zip(calls[::2], calls[1::2], strict=True))
    policy = randaug.read_policy("rand-tweights")
    p = np.array(policy.weights)
    # Either of two draws without replacement: first i, or first j and then i.
    either = p + np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(15) if j != i) for i in range(15)])
    counts = Counter(name for name, *_ in calls)
    observed = np.array([counts[name] for name in policy.names])
    for i in range(15):
        assert stats.binomtest(int(observed[i]), 4000, either[i]).pvalue > ALPHA / 15


def test_method_and_fill(calls):
    draw("randaug('rand-p1.0', method='random')", 500)
    draw("randaug('rand-p1.0', method=None)", 500)
    counts = Counter(sampling.resample for *_, sampling in calls)
    assert stats.binomtest(counts[Image.Resampling.BICUBIC], 2000).pvalue > ALPHA
    assert set(counts) == {Image.Resampling.BICUBIC, Image.Resampling.BILINEAR}
    calls.clear()
    draw("randaug('rand-p1.0', fill=(1, 2, 3), method='bilinear')", 3)
    assert {sampling for *_, sampling in calls} == {Sampling(Image.Resampling.BILINEAR, (1, 2, 3))}
    calls.clear()
    draw("randaug('rand-p1.0')", 3, mode="L")
    assert {sampling for *_, sampling in calls} == {Sampling(Image.Resampling.BICUBIC, 115)}


@pytest.mark.parametrize("text", [f"randaug({DEIT!r})", "randaug('rand-m9-n4-p1.0-t3aw', method=None)"])
def test_the_generator_decides_alone_and_the_input_stays(text):
    pp, image = build(text, PATH), pixels()
    kept, opened = image.copy(), Image.fromarray(image)
    outputs = [pp.host({"image": opened}, rng(seed))["image"] for seed in range(12)]
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(opened, kept)
    again = pickle.loads(pickle.dumps(pp))  # after use, with what it may have cached
    assert again == pp == build(text, PATH)
    for seed, output in enumerate(outputs):
        np.testing.assert_array_equal(again.host({"image": image}, rng(seed))["image"], output)
    assert len({output.tobytes() for output in outputs}) > 3
