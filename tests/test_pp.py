"""Preprocessing: pixels against Pillow and an independent resampler, crops against their laws, texts of errors."""
import io
import math
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cb_vit.config import ConfigError
from cb_vit.datasets import listing
from cb_vit.pp import builder, images, ops_device
from cb_vit.pp.builder import build
from cb_vit.pp.ops_image import InceptionCrop

ALPHA = 1e-3
PATH = "config.input.pp"
TRAIN = "decode|inception_crop(24)|flip_lr|value_range(-1,1)|onehot(10)|keep('image','labels')"


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(h=40, w=60, c=3, seed=0, low=64, high=192):
    """Noise that stays clear of 0 and 255, where Pillow clips between its two passes."""
    return rng(seed).integers(low, high, (h, w, c), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def run(text, image, seed=0, **features):
    return build(text, PATH).host({"image": image, **features}, rng(seed))


# ---- decode --------------------------------------------------------------------------------------------------------

def test_decode_png_is_lossless_and_jpeg_is_pillows():
    image = pixels()
    np.testing.assert_array_equal(run("decode", encoded(image))["image"], image)
    jpeg = encoded(image, "JPEG", quality=90)
    np.testing.assert_array_equal(run("decode", jpeg)["image"], np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("mode, format", [
    ("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG")])
def test_decode_gives_rgb_or_grey_from_every_mode(mode, format):
    stored = Image.fromarray(pixels()).convert(mode)
    data = encoded(stored, format)
    want = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(run("decode", data)["image"], np.asarray(want))
    grey = run("decode(channels=1)", data)["image"]
    assert grey.shape == (40, 60, 1) and grey.dtype == np.uint8
    np.testing.assert_allclose(grey[..., 0], np.asarray(want.convert("L")), atol=1)


def test_decode_drops_transparency_of_palettes_without_a_warning(recwarn):
    image = Image.fromarray(pixels()).quantize(8)
    data = encoded(image, transparency=bytes(range(8)))
    np.testing.assert_array_equal(run("decode", data)["image"], np.asarray(image.convert("RGB")))
    assert not recwarn.list


def test_decode_scales_16_bits_down():
    deep = rng().integers(0, 2**16, (5, 7), dtype=np.uint16)
    np.testing.assert_array_equal(run("decode(1)", encoded(deep))["image"][..., 0], deep // 256)
    with pytest.raises(ValueError, match="mode F have no fixed range"):
        run("decode", encoded(rng().random((5, 7), dtype=np.float32), "TIFF"))


def test_exif_orientation_is_ignored_unless_asked_for():
    image = Image.fromarray(np.dstack([np.indices((16, 32)).sum(0) * 5] * 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    data = encoded(image, "JPEG", quality=95, exif=exif)
    plain, turned = run("decode", data)["image"], run("decode(exif=True)", data)["image"]
    assert plain.shape == (16, 32, 3) and turned.shape == (32, 16, 3)
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode_of_damaged_files_says_what_is_wrong(monkeypatch):
    jpeg = encoded(pixels(), "JPEG")
    damaged = [(jpeg[: len(jpeg) // 2], "truncated"), (encoded(pixels())[:200], "truncated"), (jpeg[:30], ""),
               (b"", "no image format"), (b"<html>", "no image format")]
    for data, reason in damaged:
        with pytest.raises(ValueError, match=f"^decode: cannot decode {len(data)} bytes .*{reason}"):
            run("decode", data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # the image has 2400: Pillow itself only warns
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS|decompression bomb"):
        run("decode", jpeg)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb"):
        run("decode", jpeg)


def test_arrays_need_no_decode():
    for shape, out in [((8, 9, 3), (8, 9, 3)), ((8, 9, 1), (8, 9, 1)), ((8, 9), (8, 9, 1)), ((8, 9, 4), (8, 9, 4))]:
        image = rng().integers(0, 256, shape, dtype=np.uint8)
        for text in ("", "resize((8, 9))"):
            np.testing.assert_array_equal(run(text, image)["image"], image.reshape(out))
    assert run("decode|resize(4)", pixels(c=3))["image"].shape == (4, 4, 3)
    assert run("decode", pixels()[..., 0])["image"].shape == (40, 60, 3)
    assert run("", pixels(c=3).repeat(3, axis=2))["image"].shape == (40, 60, 9)


# ---- resize and crops ----------------------------------------------------------------------------------------------

def reference(image, size, method, antialias):
    """jax.image's resampler: written apart from Pillow, in float32, by the same definitions (Keys' cubic, a = -0.5)."""
    out = jax.image.resize(image.astype(np.float32), (*size, image.shape[2]), method, antialias=antialias)
    return np.rint(out).clip(0, 255)


@pytest.mark.parametrize("size", [(20, 30), (13, 71), (88, 92), (7, 9)])
@pytest.mark.parametrize("method, jax_method, antialias", [
    ("bicubic", "bicubic", True), ("bilinear", "bilinear", True), ("lanczos", "lanczos3", True),
    ("bilinear", "bilinear", False), ("nearest", "nearest", False)])
def test_resize_equals_an_independent_resampler_to_one_grey_level(size, method, jax_method, antialias):
    image = pixels()
    got = run(f"resize({size}, method={method!r}, antialias={antialias})", image)["image"]
    np.testing.assert_allclose(got, reference(image, size, jax_method, antialias), atol=1)


def test_antialias_is_the_default_and_matters():
    image = pixels()
    assert run("resize(8, method='bilinear')", image)["image"].std() < 0.5 * pixels().std()
    assert run("resize(8, method='bilinear', antialias=False)", image)["image"].std() > 0.5 * pixels().std()


def test_area_is_the_mean_of_blocks():
    got = run("resize((10, 20), method='area')", pixels())["image"]
    np.testing.assert_allclose(got, pixels().reshape(10, 4, 20, 3, 3).mean((1, 3)), atol=1)


def test_evaluation_pixels_are_those_of_timm():
    """torchvision's Resize(32) then CenterCrop(28), written out with Pillow's calls."""
    image = Image.fromarray(pixels(41, 57))
    resized = image.resize((int(32 * 57 / 41), 32), Image.Resampling.BICUBIC)
    left, top = int(round((resized.width - 28) / 2.0)), int(round((resized.height - 28) / 2.0))
    want = resized.crop((left, top, left + 28, top + 28))
    np.testing.assert_array_equal(run("decode|resize_small(32)|central_crop(28)", encoded(image))["image"], want)


@pytest.mark.parametrize("h, w, out", [(100, 133, (32, 42)), (133, 100, (42, 32)), (9, 9, (32, 32)), (1, 3, (32, 96))])
def test_resize_small_cuts_off_the_longer_side(h, w, out):
    assert run("resize_small(32)", pixels(h, w))["image"].shape[:2] == out  # 32 * 133 / 100 = 42.56


@pytest.mark.parametrize("margin, before", [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
def test_central_crop_splits_odd_margins_as_torchvision(margin, before):
    image = pixels(8, 10 + margin)
    np.testing.assert_array_equal(run("central_crop((8, 10))", image)["image"], image[:, before:before + 10])


def test_crops_larger_than_the_image_name_both_sizes():
    for text in ("central_crop(50)", "random_crop((41, 60))", "random_crop(50, padding=4)"):
        with pytest.raises(ValueError, match=r"4[08] x 6[08] \(h x w\), is smaller than the crop, (50 x 50|41 x 60)"):
            run(text, pixels())
    assert run("random_crop(50, padding=5)", pixels())["image"].shape == (50, 50, 3)


def test_random_crop_is_uniform_over_all_places():
    image = np.arange(6 * 7, dtype=np.uint8).reshape(6, 7)
    generator, pp = rng(1), build("random_crop((4, 4))", PATH)
    corners = []
    for _ in range(1200):
        crop = pp.host({"image": image}, generator)["image"][..., 0]
        y, x = divmod(int(crop[0, 0]), 7)
        np.testing.assert_array_equal(crop, image[y:y + 4, x:x + 4])
        corners.append(y * 4 + x)
    assert stats.chisquare(np.bincount(corners, minlength=12)).pvalue > ALPHA


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
@pytest.mark.parametrize("channels", [1, 3])
def test_random_crop_pads_every_side(mode, channels):
    image = pixels(8, 8, channels)
    got = run(f"random_crop(14, padding=3, padding_mode={mode!r})", image)["image"]
    np.testing.assert_array_equal(got, np.pad(image, [(3, 3), (3, 3), (0, 0)], mode=mode))


def boxes(op, h, w, count=3000):
    generator = rng(2)
    left, top, right, bottom = np.array([op.box(h, w, generator) for _ in range(count)]).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= w).all() and (bottom <= h).all()
    return left, top, right - left, bottom - top


def test_inception_crop_area_and_log_ratio_are_uniform():
    """Areas so small that every box fits: then nothing is rejected, and both are uniform and independent."""
    _, _, w, h = boxes(InceptionCrop(8, area_min=10, area_max=50), 4000, 4000)
    area, log_ratio = w * h / 4000**2, np.log(w / h)
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > ALPHA
    assert stats.kstest(log_ratio, stats.uniform(math.log(3 / 4), 2 * math.log(4 / 3)).cdf).pvalue > ALPHA
    assert stats.spearmanr(area, log_ratio).pvalue > ALPHA


def test_inception_crop_ratio_is_width_over_height():
    _, _, w, h = boxes(InceptionCrop(8, area_min=10, area_max=20, ratio_min=2, ratio_max=3), 1000, 1000, count=100)
    assert (1.98 < w / h).all() and (w / h < 3.02).all()


def test_inception_crop_default_is_8_to_100_percent():
    _, _, w, h = boxes(InceptionCrop(8), 3000, 4000)
    area = w * h / (3000 * 4000)
    assert 0.0799 < area.min() < 0.09 and 0.9 < area.max() <= 1
    assert 0.749 < (w / h).min() < 0.76 and 1.32 < (w / h).max() < 1.334


def test_inception_crop_position_is_uniform():
    left, top, w, h = boxes(InceptionCrop(8, area_min=8, area_max=20), 3000, 4000)
    assert stats.kstest(left / (4000 - w), "uniform").pvalue > ALPHA
    assert stats.kstest(top / (3000 - h), "uniform").pvalue > ALPHA


@pytest.mark.parametrize("h, w, box", [
    (10, 100, (43, 0, 56, 10)), (100, 10, (0, 43, 10, 56)), (100, 100, (0, 0, 100, 100)), (1, 1, (0, 0, 1, 1))])
def test_inception_crop_falls_back_to_the_middle(h, w, box):
    impossible = InceptionCrop(8, tries=1)
    object.__setattr__(impossible, "tries", 0)
    assert impossible.box(h, w, rng()) == box


def test_inception_crop_of_a_thin_image_uses_the_fallback():
    """At 1:50 no box of 8 % within the ratios fits, so every draw ends in the fallback."""
    op = InceptionCrop(8)
    assert {op.box(10, 500, rng(seed)) for seed in range(20)} == {(243, 0, 256, 10)}


def test_inception_crop_cuts_before_it_resizes():
    """Pixels just outside the box must not blend in (as they would with Pillow's `resize(box=...)`)."""
    op, image = InceptionCrop((16, 20), area_min=20, area_max=30), Image.fromarray(pixels(100, 120))
    box = op.box(100, 120, rng(3))
    want = image.crop(box).resize((20, 16), Image.Resampling.BICUBIC)
    got = run("inception_crop((16, 20), area_min=20, area_max=30)", np.asarray(image), seed=3)["image"]
    np.testing.assert_array_equal(got, want)
    assert (got != np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC, box=box))).any()


def test_flip_is_a_fair_coin():
    image, generator, pp = pixels(3, 4), rng(4), build("flip_lr", PATH)
    flipped = 0
    for _ in range(1000):
        got = pp.host({"image": image}, generator)["image"]
        assert (got == image).all() or (got == image[:, ::-1]).all()
        flipped += int((got == image[:, ::-1]).all())
    assert stats.binomtest(flipped, 1000).pvalue > ALPHA


# ---- what leaves the host ------------------------------------------------------------------------------------------

def test_host_delivers_numbers_only_and_leaves_its_input_alone():
    features = {"image": encoded(pixels()), "label": 3, "id": "train/7", "raw": b"x", "none": None, "weight": 0.5,
                "boxes": np.zeros((2, 4)), "big": np.int64(5)}
    before = dict(features)
    out = build("decode|flip_lr", PATH).host(features, rng())
    assert features == before
    assert {k: (v.dtype, v.shape) for k, v in out.items()} == {
        "image": (np.uint8, (40, 60, 3)), "label": (np.int32, ()), "weight": (np.float32, ()),
        "boxes": (np.float32, (2, 4)), "big": (np.int32, ())}
    assert out["image"].flags.c_contiguous and out["label"] == 3


@pytest.mark.parametrize("image, text, fragment", [
    (np.zeros((4, 4, 3), np.float32), "flip_lr", "flip_lr: the image has float32 pixels, but hosts deliver uint8"),
    (np.zeros((4, 4, 3), np.float32), "", "float32 pixels, but hosts deliver uint8"),
    (np.zeros((4, 4, 3), np.int64), "", "int64 pixels"),
    (np.zeros(4, np.uint8), "", r"must be \[h w\] or \[h w c\]"),
    (np.zeros((4, 4, 5), np.uint8), "flip_lr", "1 to 4 channels"),
    (np.zeros((4, 4), np.uint8), "keep('image', 'labels')", "keep.*: no 'labels' here; there is image, n"),
    (np.zeros((4, 4), np.uint8), "onehot(3)", "no 'label' here"),
])
def test_host_errors_on_examples(image, text, fragment):
    with pytest.raises(ValueError, match=fragment):
        run(text, image, n=1)


def test_host_refuses_what_the_device_cannot_hold():
    with pytest.raises(ValueError, match="time: 4294967296 does not fit into int32"):
        run("", pixels(), time=2**32)
    with pytest.raises(ValueError, match="labels: rows of unequal length; pad them"):
        run("", pixels(), labels=[[1], [1, 2]])


@pytest.mark.parametrize("text", ["inception_crop(8)|value_range(-1,1)", "value_range(-1,1)", ""])
def test_encoded_images_without_decode_name_the_op_that_is_missing(text):
    with pytest.raises(ConfigError, match=r"^config\.input\.pp: .*encoded.*write 'decode\|"):
        run(text, encoded(pixels()))


def test_keys():
    features = dict(n=1, m=2, _mask=1)
    assert set(run("keep('image', 'n')", pixels(), **features)) == {"image", "n", "_mask"}
    assert set(run("drop('image', 'n')", pixels(), **features)) == {"m", "_mask"}
    assert run("copy('m', 'k')", pixels(), **features)["k"] == 2


def test_same_generator_state_same_output():
    text, data = "decode|inception_crop(24)|flip_lr|random_crop(20, padding=2)", encoded(pixels())
    first = [run(text, data, seed=s)["image"] for s in range(8)]
    for s, image in enumerate(first):
        np.testing.assert_array_equal(run(text, data, seed=s)["image"], image)
    assert len({image.tobytes() for image in first}) == 8


def test_pickles_and_works_without_jax():
    pp = build(TRAIN, PATH)
    assert pickle.loads(pickle.dumps(pp)) == pp
    script = (
        "import pickle, sys, numpy as np, cb_vit.pp.builder as b\n"
        f"b.build({TRAIN!r}, 'pp')\n"
        "pp, image = pickle.load(sys.stdin.buffer)\n"
        "out = pp.host({'image': image, 'label': 3}, np.random.default_rng(5))\n"
        "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)\n"
        "sys.stdout.buffer.write(out['image'].tobytes())")
    data = encoded(pixels())
    got = subprocess.run([sys.executable, "-c", script], input=pickle.dumps((pp, data)),
                         capture_output=True, cwd=Path(__file__).parents[1])
    assert got.returncode == 0, got.stderr.decode()
    assert got.stdout == pp.host({"image": data, "label": 3}, rng(5))["image"].tobytes()


# ---- device ops ----------------------------------------------------------------------------------------------------

def batch(**features):
    return {"image": jnp.asarray(rng().integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)), **features}


def test_value_range():
    data = batch()
    x = np.asarray(data["image"], np.float64)
    for text, want in [("value_range(-1,1)", x / 127.5 - 1), ("value_range", x / 127.5 - 1),
                       ("value_range(0,1)", x / 255), ("value_range(2, 4, in_min=50, in_max=100)", (x - 50) / 25 + 2),
                       ("value_range(2, 4, 50, 100, clip_values=True)", ((x - 50) / 25 + 2).clip(2, 4))]:
        got = jax.jit(build(text, PATH).device)(data)["image"]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_vgg_value_range_is_torchvisions_normalize():
    data = batch()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = (np.asarray(data["image"]) / 255 - mean) / std
    got = jax.jit(build("vgg_value_range", PATH).device)(data)["image"]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match="has 1 channels, the image 3"):
        build("vgg_value_range([127.5], [127.5])", PATH).device(data)


def test_onehot_of_one_label_and_of_several():
    got = ops_device.onehot(jnp.array([2, 0, -1]), 3)
    np.testing.assert_array_equal(got, [[0, 0, 1], [1, 0, 0], [0, 0, 0]])
    several = jnp.array([[2, 0], [1, 1], [1, -1], [-1, -1]])
    np.testing.assert_array_equal(ops_device.onehot(several, 3), [[1, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(ops_device.onehot(several, 3, multi=False), np.eye(4)[np.asarray(several)][..., :3])
    np.testing.assert_allclose(ops_device.onehot(jnp.array([1]), 3, on=0.9, off=0.05), [[0.05, 0.9, 0.05]])
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("text, before, read, written", [
    ("onehot(4)", {"label"}, "label", "labels"),
    ("onehot(4)", {"labels"}, "labels", "labels"),
    ("onehot(4)", {"label", "labels"}, "label", "labels"),
    ("onehot(4, key='label', key_result='labels')", {"label"}, "label", "labels"),
    ("onehot(4, None, None)", {"label"}, "label", "labels"),
    ("onehot(4, key='fine')", {"fine", "label"}, "fine", "fine"),
])
def test_onehot_keys(text, before, read, written):
    data = {key: jnp.array([3 if key == read else 0]) for key in before}
    pp = build(text, PATH)
    out = pp.device(data)
    np.testing.assert_array_equal(out[written], [[0, 0, 0, 1]])
    assert set(out) == before | {written} and (pp.labels_key, pp.num_classes) == (written, 4)


@pytest.mark.parametrize("label", [10, -2, np.array([3, 10, -1]), 2**31, 3.0])
def test_labels_out_of_range_are_refused_on_the_host(label):
    with pytest.raises(ValueError, match=r"^onehot\(10\): label (10|-2|2147483648) is outside 0 to 9|class numbers"):
        run("onehot(10)", pixels(), label=label)


def test_labels_in_range_pass():
    for label in (0, 9, -1, np.array([9, 0, -1]), np.uint8(9)):
        np.testing.assert_array_equal(run("onehot(10)", pixels(), label=label)["label"], label)


def test_split_between_host_and_device():
    text = "decode|keep('image','label')|flip_lr|value_range(-1,1)|keep('image','label')|onehot(10)|keep('labels')"
    pp = build(text, PATH)
    assert [name for name, _ in pp.host_ops] == ["decode", "keep('image', 'label')", "flip_lr", "onehot(10)"]
    host = pp.host({"image": encoded(pixels()), "label": 3}, rng())
    assert set(host) == {"image", "label"} and host["image"].dtype == np.uint8
    stacked = {k: jnp.asarray(v)[None] for k, v in host.items()} | {"_mask": jnp.ones(1)}
    out = jax.jit(pp.device)(stacked)
    assert set(out) == {"labels", "_mask"} and out["labels"][0, 3] == 1
    with pytest.raises(ValueError, match="no 'id' here; there is image"):
        build("value_range|keep('image','id')", PATH).device(batch())


# ---- what is known when the string is read -------------------------------------------------------------------------

@pytest.mark.parametrize("text, size, channels", [
    (TRAIN, (24, 24), 3),
    ("decode", None, 3),
    ("", None, None),
    ("decode(channels=1)|resize_small(256)|central_crop((224, 192))|flip_lr", (224, 192), 1),
    ("resize((20, 41))|resize_small(10)", (10, 20), None),
    ("decode|resize_small(256)", None, 3),
    ("resize(36)|random_crop(32, padding=4)", (32, 32), None),
])
def test_image_size_and_channels(text, size, channels):
    pp = build(text, PATH)
    assert (pp.image_size, pp.channels, pp.text) == (size, channels, text)


def test_image_size_is_what_comes_out():
    for text in ("resize((20, 41))|resize_small(10)", "inception_crop((5, 7))", "resize(9)|random_crop((5, 7))"):
        assert run(text, pixels())["image"].shape[:2] == build(text, PATH).image_size


@pytest.mark.parametrize("text, fragment", [
    ("decode|inception_corp(224)", "unknown preprocessing op 'inception_corp'; did you mean inception_crop?"),
    ("decode|inception_crop()", "missing a required argument: 'size'. It takes inception_crop(size, area_min=8.0,"),
    ("inception_crop(224, area=8)", "unexpected keyword argument 'area'"),
    ("decode(|", "cannot read"),
    ("decode(x)", "arguments must be plain values"),
    ("decode(channels=2)", "channels: unknown value 2"),
    ("resize(0)", "size must be positive, got 0"),
    ("resize((8, -1))", "size must be positive"),
    ("resize((8, 8, 3))", "size: expected a whole number or (a whole number, a whole number), got (8, 8, 3)"),
    ("resize('big')", "size: expected"),
    ("resize(None)", "size: expected"),
    ("resize_small(22.5)", "smaller_size: expected a whole number, got 22.5"),
    ("resize(8, method='bicubc')", "unknown resampling method 'bicubc'; did you mean bicubic?"),
    ("resize(8, method='lanczos', antialias=False)", "antialias=False works with nearest, bilinear, bicubic"),
    ("inception_crop(8, area_min=60, area_max=50)", "area_min <= area_max"),
    ("inception_crop(8, area_min=0.08)", "write 8 for 8 %"),
    ("inception_crop(8, area_max=101)", "got 8.0 and 101.0"),
    ("inception_crop(8, ratio_min=2)", "ratio_min <= ratio_max"),
    ("inception_crop(8, tries=0)", "tries must be 1 or more"),
    ("random_crop(8, padding=-1)", "padding must be 0 or more"),
    ("random_crop(8, padding_mode='wrap')", "padding_mode: unknown value 'wrap'"),
    ("resize(8)|central_crop(9)", "'central_crop(9)': the image, 8 x 8 (h x w), is smaller than the crop, 9 x 9"),
    ("flip_lr|decode", "'decode' stands after 'flip_lr'; decode comes first"),
    ("decode|value_range(-1,1)|flip_lr", "'flip_lr' runs on the host but stands after 'value_range(-1, 1)'"),
    ("decode|value_range(-1,1)|flip_lr", "move 'value_range(-1, 1)' to the end"),
    ("value_range(1, -1)", "vmin must be below vmax"),
    ("value_range(0, 1, 5, 5)", "in_min must be below in_max"),
    ("vgg_value_range([1, 2], [3])", "one value a channel, got 2 and 1"),
    ("vgg_value_range([1], [0])", "std must be positive"),
    ("decode(channels=1)|vgg_value_range", "has 3 channels, the image 1"),
    ("onehot(0)", "depth must be positive, got 0"),
    ("keep()", "names no key"),
    ("keep(3)", "keys[0]: expected a string, got 3"),
])
def test_bad_strings_fail_when_read_and_say_how_to_mend_them(text, fragment):
    with pytest.raises(ConfigError) as error:
        build(text, PATH)
    assert error.value.path == PATH and fragment in str(error.value) and "\n" not in str(error.value)


# ---- files of others -----------------------------------------------------------------------------------------------

OTHERS = {
    "EPS": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n",
            b"\xc5\xd0\xd3\xc6" + bytes(30)],
    "HEIC": [b"\0\0\0\x18ftyp" + brand + bytes(4) + b"mif1" + brand for brand in (b"heic", b"heix", b"hevc", b"mif1")],
    "AVIF": [b"\0\0\0\x1cftypavif\0\0\0\0", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf"],
    "PDF": [b"%PDF-1.7\n"], "SVG": [b"<svg xmlns='x'/>", b"<?xml version='1.0'?>\n<!-- a -->\n<svg/>",
                                    b"<!DOCTYPE svg PUBLIC 'x'>"],
    "HTML": [b"<!DOCTYPE html><p>", b"\n<html>"], "text": [b"hello\n", "héllo 猫".encode()], "empty": [b""],
    "zeros": [bytes(99)], "video": [b"\0\0\0\x18ftypmp42" + bytes(9)], "archive": [b"PK\3\4x"],
    "Photoshop": [b"8BPS\0\1"],
    "JPEG 2000": [b"\0\0\0\x0cjP  \r\n\x87\n"], "JPEG XL": [b"\xff\x0a"], "Git LFS": [b"version https://git-lfs.x\n"],
    "damaged or truncated": [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"], "known here": [bytes(range(128, 256))],
}


@pytest.mark.parametrize("words, data", [(words, data) for words, files in OTHERS.items() for data in files])
def test_content_that_is_no_image_is_named(words, data):
    begin = f"^decode: cannot decode {len(data)} bytes that begin .*no image format"
    with pytest.raises(ValueError, match=f"{begin}.*{words}") as caught:
        run("decode", data)
    assert "\n" not in str(caught.value)


def test_formats_are_those_of_the_files_that_are_listed():
    known = Image.registered_extensions()
    assert set(images.FORMATS) == {known[ending] for ending in listing.EXTENSIONS}
    for form in (*images.FORMATS, "MPO"):
        more = dict(save_all=True, append_images=[Image.new("RGB", (9, 8))]) if form in ("MPO", "GIF") else {}
        assert run("decode", encoded(Image.new("RGB", (9, 8)), form, **more))["image"].shape == (8, 9, 3)
    for form in ("PPM", "ICO", "PCX", "TGA", "JPEG2000", "AVIF"):  # Pillow would
        with pytest.raises(ValueError, match="no image format that is read here"):
            run("decode", encoded(Image.new("RGB", (16, 16)), form))


def test_images_that_would_fill_the_memory(recwarn):
    line = encoded(Image.new("L", (60_000, 1)), "PNG")
    assert run("decode|central_crop((1, 9))", line)["image"].shape == (1, 9, 3)
    with pytest.raises(ValueError, match=r"^resize_small\(256\): 3932160000 pixels, over the limit of 89478485"):
        run("decode|resize_small(256)", line)
    with pytest.raises(ConfigError, match=r"^pp: 'resize\(99999\)': 9999800001 pixels, over the limit"):
        builder.build("decode|resize(99999)", "pp")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    images._hush_pillow.cache_clear()  # pytest has other filters in every test
    for side in (10_000, 50_000):  # over the limit, and over twice that
        chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = header[:-4] + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\x09IDAT" + bytes(13)
        with pytest.raises(ValueError, match="^decode: cannot decode .* pixels.*limit of"):
            run("decode", data)
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


@pytest.mark.parametrize("text, filled", [
    ("onehot", "onehot(7)"), ("onehot()|keep('labels')", "onehot(7)|keep('labels')"),
    ("onehot(None, 'label', 'labels', on=0.9)", "onehot(7, key='label', key_result='labels', on=0.9)"),
    ("onehot(key='a')|onehot(3, key='b')", "onehot(7, key='a')|onehot(3, key='b')")])
def test_the_number_of_classes_may_be_left_to_the_data(text, filled):
    preprocess = build(text, PATH)
    found = preprocess.for_classes(7)
    assert found.text == filled and found.path == PATH and found == build(filled, PATH)
    assert found.for_classes(9) is found
