"""Corruptions against closed forms, SciPy, Pillow and loops; their evaluator against numpy, on any devices."""
import colorsys
import csv
import io
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Numbered
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from cb_vit import dist
from cb_vit.config import ConfigError
from cb_vit.datasets import labels as label_lists
from cb_vit.datasets.core import DataError
from cb_vit.evaluators import common
from cb_vit.evaluators import corruptions as evaluator_module
from cb_vit.evaluators.corruptions import ALEXNET, ALEXNET_CLEAN, Evaluator, mean_corruption_error
from cb_vit.input_pipeline import Pipeline
from cb_vit.monitor import progress
from cb_vit.monitor.progress import counted
from cb_vit.pp import corruption_ops, corruptions
from cb_vit.pp.builder import build
from cb_vit.pp.corruptions import BUILT_IN, CORRUPTIONS, SEVERITIES, corrupt
from cb_vit.train_state import TrainState

# The published constants themselves do not make every step a stronger one: the elastic transform changes its manner,
# frost takes off more of the image, snow falls in larger flakes, and some blurs are as wide as at the severity before.
UNEVEN = {"elastic_transform", "frost", "glass_blur", "motion_blur", "snow"}


@pytest.fixture(scope="module", autouse=True)
def frost(tmp_path_factory):
    """Pictures in place of those that the extra brings."""
    folder, rng = tmp_path_factory.mktemp("pictures") / "frost", np.random.default_rng(0)
    folder.mkdir()
    for name in corruption_ops.FROSTS:
        Image.fromarray(rng.integers(150, 256, (60, 90, 3), np.uint8)).save(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corruptions, "frost_folder", lambda: folder)
        yield folder
    corruption_ops._frost.cache_clear()


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(load_sample_image("china.jpg"))


def generator(seed=0):
    return np.random.default_rng(seed)


# The ops.


@pytest.mark.parametrize("size, mode", [((128, 96), "RGB"), ((32, 32), "RGB"), ((40, 32), "L")], ids=str)
def test_every_corruption_keeps_shape_and_type_and_grows_with_severity(photograph, size, mode):
    image = photograph.resize(size).convert(mode)
    clean = np.asarray(image).reshape(size[1], size[0], -1)
    for name in CORRUPTIONS:
        distances = []
        for severity in SEVERITIES:
            host = build(f"corrupt('{name}', {severity})", "pp").host
            found = host({"image": clean}, generator(3))["image"]
            assert found.dtype == np.uint8 and found.shape == clean.shape
            np.testing.assert_array_equal(found, host({"image": image}, generator(3))["image"])
            distances.append(np.abs(found.astype(float) - clean).mean())
        assert min(distances) > 0.5, name
        if name not in UNEVEN:
            assert (np.diff(distances) > 0).all(), f"{name}: {distances}"
        elif name != "elastic_transform":
            assert distances[4] > 1.1 * distances[0], f"{name}: {distances}"


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 1), (3, 2, 3), (8, 8, 3), (97, 200, 1)], ids=str)
def test_images_of_any_size_smaller_than_a_kernel_too(shape):
    image = generator().integers(0, 256, shape, np.uint8)
    for name in CORRUPTIONS:
        for severity in (1, 5):
            assert corrupt(image, name, severity, generator()).shape == shape


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_stay_in_range(level):
    image = np.full((32, 32, 3), level, np.uint8)
    for name in CORRUPTIONS:
        made = corrupt(image, name, 5, generator())  # a warning, as of a division by 0, is an error here
        assert made.dtype == np.uint8 and made.shape == image.shape, name


def test_draws_are_addressed_by_the_generator_alone(photograph):
    image = np.asarray(photograph.resize((32, 32)))
    drawn = set()
    for name in CORRUPTIONS:
        first, again, other = (corrupt(image, name, 2, generator(seed)) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        if (first != other).any():
            drawn.add(name)
    assert set(CORRUPTIONS) - drawn == {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate",
                                        "jpeg_compression"}


def test_the_shorter_side_chooses_the_constants():
    for name, corruption in CORRUPTIONS.items():
        assert len(corruption.imagenet) == len(corruption.cifar) == 5, name
    contrast = CORRUPTIONS["contrast"].constants
    assert [contrast(shape, 5) for shape in ((95, 300, 3), (300, 95, 1), (96, 96, 3))] == [(0.15,), (0.15,), (0.05,)]
    image = np.tile(np.uint8([[[0], [200]]]), (100, 50, 1))
    np.testing.assert_array_equal(np.unique(corrupt(image, "contrast", 1, generator())), [60, 140])
    np.testing.assert_array_equal(np.unique(corrupt(image[:90, :90], "contrast", 1, generator())), [25, 175])


def test_noise_has_the_moments_of_its_law():
    flat = np.full((200, 200, 3), 0.4)
    shot = corruption_ops.shot_noise(flat, generator(), 12)
    assert shot.mean() == pytest.approx(0.4, rel=0.01) and shot.var() == pytest.approx(0.4 / 12, rel=0.03)
    normal = corruption_ops.gaussian_noise(flat, generator(), 0.18) - flat
    assert abs(normal.mean()) < 0.002 and normal.std() == pytest.approx(0.18, rel=0.02)
    impulse = corruption_ops.impulse_noise(flat, generator(), 0.27)
    for value, share in ((0, 0.135), (1, 0.135), (0.4, 0.73)):
        assert (impulse == value).mean() == pytest.approx(share, rel=0.03)


def test_brightness_raises_the_value_of_hsv(photograph):
    image = np.asarray(photograph.resize((9, 7))).copy()
    image[0, 0] = 0
    expected = np.empty(image.shape)
    for place in np.ndindex(7, 9):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[place] / 255)
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
    np.testing.assert_allclose(corrupt(image, "brightness", 4, generator()), expected * 255, atol=0.5 + 1e-6)


def test_what_pillow_does_itself(photograph):
    image = photograph.resize((128, 96))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=15)
    np.testing.assert_array_equal(corrupt(np.asarray(image), "jpeg_compression", 3, generator()),
                                  np.asarray(Image.open(file)))
    blocks = np.asarray(image, float).reshape(48, 2, 64, 2, 3).mean((1, 3))
    found = corrupt(np.asarray(image), "pixelate", 2, generator())
    np.testing.assert_allclose(found, blocks.repeat(2, 0).repeat(2, 1), atol=1)  # it rounds after either axis


@pytest.mark.parametrize("radius, softness", [(0.3, 0.4), (1.5, 0.1), (3, 0.1), (6, 0.5), (10, 0.5)])
def test_defocus_convolves_with_a_disk_of_sum_one(radius, softness):
    kernel = corruption_ops.disk(radius, softness)
    assert kernel.sum() == pytest.approx(1, abs=1e-12) and kernel.min() >= 0
    for turned in (kernel.T, kernel[::-1], kernel[:, ::-1]):
        np.testing.assert_allclose(turned, kernel, atol=1e-15)
    area = (kernel > kernel.max() / 2).sum()
    assert area == pytest.approx(max(np.pi * radius**2, 1), rel=0.35, abs=1.5)
    image = generator().random((30, 40, 3))
    expected = ndimage.correlate(image, kernel[:, :, None], mode="mirror")
    np.testing.assert_allclose(corruption_ops.defocus_blur(image, generator(), radius, softness), expected, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, 1.13, 1.3, 4.5])
def test_zoom_is_that_of_scipy(factor):
    image = generator().random((31, 44, 3))
    cut = [int(np.ceil(length / factor)) for length in (31, 44)]
    top, left = (31 - cut[0]) // 2, (44 - cut[1]) // 2
    large = ndimage.zoom(image[top:top + cut[0], left:left + cut[1]], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - 31) // 2, (large.shape[1] - 44) // 2
    np.testing.assert_allclose(corruption_ops.zoom(image, factor), large[top:top + 31, left:left + 44], atol=1e-12)


def test_glass_moves_pixels_as_the_published_statement_does():
    image, reach = generator().random((9, 12, 3)), 2
    found = corruption_ops.glass_blur(image, generator(5), 0, reach, 2)
    expected, rng = image.copy(), generator(5)
    for _ in range(2):
        down, right = rng.integers(-reach, reach, (2, (9 - 2 * reach) * (12 - 2 * reach)))
        steps = iter(zip(down, right, strict=True))
        for y in range(9 - reach, reach, -1):
            for x in range(12 - reach, reach, -1):
                dy, dx = next(steps)
                expected[y, x], expected[y + dy, x + dx] = expected[y + dy, x + dx], expected[y, x]
    np.testing.assert_array_equal(found, expected)
    assert (found != image).any()


def test_movement_is_half_a_gaussian_along_its_line():
    point = np.zeros((61, 61, 1))
    point[30, 30] = 1
    weights = np.exp(-np.arange(21) ** 2 / 50) / np.exp(-np.arange(21) ** 2 / 50).sum()
    np.testing.assert_allclose(corruption_ops.move(point, 10, 5, 0)[30, 30:9:-1, 0], weights, atol=1e-15)
    np.testing.assert_allclose(corruption_ops.move(point, 10, 5, -90)[30:51, 30, 0], weights, atol=1e-15)
    slanted = corruption_ops.move(point, 10, 5, 30)
    assert slanted.sum() == pytest.approx(1)
    y, x = (30 - (slanted[:, :, 0] * places).sum() for places in np.indices((61, 61)))
    assert np.degrees(np.arctan2(y, x)) == pytest.approx(30, abs=4)


def test_clouds_fill_their_range_and_fit_together_at_the_borders():
    clouds = corruption_ops.plasma(64, 2, generator())
    assert clouds.min() == 0 and clouds.max() == 1
    within = np.abs(np.diff(clouds, axis=0)).mean()
    assert np.abs(clouds[0] - clouds[-1]).mean() < 2 * within < np.abs(clouds[0] - clouds[32]).mean()


def test_an_elastic_transform_that_moves_nothing_changes_nothing():
    image = generator().random((20, 30, 3))
    np.testing.assert_allclose(corruption_ops.elastic_transform(image, generator(), 0, 0.1, 0), image, atol=1e-10)


def test_frost_is_a_part_of_a_picture(frost):
    black = np.zeros((50, 40, 3))
    found = corruption_ops.frost(black, generator(), 1, 1, 1)
    assert any((np.lib.stride_tricks.sliding_window_view(np.asarray(Image.open(frost / name).convert("RGB")) / 255,
                                                         (50, 40, 3)) == found).all((-1, -2, -3)).any()
               for name in corruption_ops.FROSTS)
    assert corruption_ops.frost(np.zeros((200, 40, 1)), generator(), 1, 1, 1).shape == (200, 40, 1)


@pytest.mark.parametrize("text, message", [
    ("corrupt('gausian_noise', 3)", "did you mean gaussian_noise?"),
    ("corrupt('fog', 0)", "severity goes from 1 to 5, got 0"), ("corrupt('fog', 6)", "severity goes from 1 to 5"),
    ("corrupt('fog', 2.5)", "severity: expected a whole number"), ("corrupt('fog')", "missing a required argument"),
    ("value_range(-1, 1)|corrupt('fog', 2)", "runs on the host but stands after 'value_range(-1, 1)'")])
def test_impossible_strings_are_refused(text, message):
    with pytest.raises(ConfigError, match="^pp: ") as error:
        build(text, "pp")
    assert message in str(error.value)


def test_images_that_cannot_be_corrupted_are_refused():
    host = build("corrupt('fog', 2)", "pp").host
    for image, message in ((np.zeros((8, 8, 4), np.uint8), "takes grey or RGB images, got one of mode RGBA"),
                           (np.zeros((8, 8, 3), np.float32), "float32 pixels, but hosts deliver uint8")):
        with pytest.raises(ValueError) as error:
            host({"image": image}, generator())
        assert str(error.value).startswith("corrupt('fog', 2): ") and message in str(error.value)


def test_frost_without_its_pictures_names_the_extra(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(corruptions, "frost_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'cb_vit\[corruptions\]'"):
        build("corrupt('frost', 1)", "pp")


def test_the_pictures_are_found_without_an_import(tmp_path, monkeypatch):
    finder = corruptions.importlib.util
    monkeypatch.setattr(finder, "find_spec", lambda name: types.SimpleNamespace(submodule_search_locations=[tmp_path]))
    assert FROST_FOLDER() is None
    (tmp_path / "frost").mkdir()
    assert FROST_FOLDER() == pathlib.Path(tmp_path / "frost")
    monkeypatch.setattr(finder, "find_spec", lambda name: None)
    assert FROST_FOLDER() is None and "imagecorruptions" not in sys.modules


FROST_FOLDER = corruptions.frost_folder  # before a fixture takes its place


# The evaluator.

N, CLASSES = 21, 3


class Noisy(Numbered):
    """Example i is an image of its own, 10 x 12 pixels."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"image": generator(index).integers(0, 256, (10, 12, 3), np.uint8)}


def predict(state, images):
    """Logits that are linear in the image's pixels."""
    return images.reshape(len(images), -1) @ state.params["kernel"], {}


KERNEL = np.random.default_rng(1).normal(size=(10 * 12 * 3, CLASSES)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, CLASSES, N)


def evaluate(labels=LABELS, devices=1, batch_size=8, broken=(), ema=None, names=None, pp="", **settings):
    """(evaluator, state)."""
    mesh = dist.create_mesh([("data", -1)], devices=jax.devices()[:devices])
    config = common.read_evaluator(dict(
        type="corruptions", log_steps=5, data=dict(name="fake", split="test"), batch_size=batch_size, num_workers=0,
        pp_fn=f"{pp}value_range(-1, 1)|onehot({CLASSES})|keep('image', 'labels')", prefix="robust/", num_threads=2,
        prefetch=2) | settings, "val")
    sharding = dist.batch_sharding(mesh, "data")
    source = Noisy(labels, CLASSES, broken)
    source.class_names = names
    pipeline = Pipeline(config, source, config.pp_fn, dist.local_rows(sharding, batch_size))
    state = TrainState(jnp.int32(7), {"kernel": jnp.asarray(KERNEL)}, (), jnp.asarray(True), ema)
    return (Evaluator(predict, config=config, pipeline=pipeline, sharding=sharding),
            jax.device_put(state, dist.replicated(mesh)))


def wrong(examples, name=None, severity=0, labels=LABELS):
    """The error by hand, of a corruption that draws nothing, in float64."""
    source, errors = Noisy(labels, CLASSES), []
    for index in examples:
        image = source[index]["image"]
        image = corrupt(image, name, severity, generator()) if name else image
        guess = ((image / 127.5 - 1).reshape(-1) @ KERNEL.astype(float)).argmax()
        errors.append(guess not in np.atleast_1d(labels[index]))
    return np.mean(errors)


PLAIN = ("contrast", "brightness", "pixelate")


def test_errors_are_those_of_numpy():
    evaluator, state = evaluate(corruptions=PLAIN, severities=(2, 5))
    expected = {name: [wrong(range(N), name, severity) for severity in (2, 5)] for name in PLAIN}
    metrics = dict(evaluator.run(state))
    assert metrics == pytest.approx({
        "error": np.mean([*expected.values()]), **{f"{name}/error": np.mean(expected[name]) for name in PLAIN},
        "severity_2/error": np.mean([values[0] for values in expected.values()]),
        "severity_5/error": np.mean([values[1] for values in expected.values()]), "clean/error": wrong(range(N))})
    assert len(set(metrics.values())) > 4
    files = dict(evaluator.files())
    rows = list(csv.DictReader(io.StringIO(files["corruptions.csv"])))
    assert [(row["corruption"], row["severity"], row["examples"]) for row in rows] == [
        ("clean", "0", str(N)), *((name, severity, str(N)) for name in PLAIN for severity in "25")]
    assert [float(row["error"]) for row in rows[1:]] == pytest.approx(sum(expected.values(), []), abs=1e-6)
    assert Image.open(io.BytesIO(files["corruptions.png"])).format == "PNG"


def test_batches_and_devices_change_nothing_and_the_seed_does():
    noise = dict(corruptions=("gaussian_noise", "impulse_noise"), severities=(5,))
    first, *others = (dict(evaluator.run(state)) for evaluator, state in (
        evaluate(**noise), evaluate(devices=3, batch_size=6, **noise), evaluate(devices=8, batch_size=32, **noise)))
    assert all(other == first for other in others)
    assert len({dict(evaluator.run(state))["error"] for evaluator, state in (
        evaluate(seed=seed, **noise) for seed in range(4))}) > 1

    def images(batch_size, seed):
        evaluator, _ = evaluate(batch_size=batch_size, **noise)
        found = [batch["image"] for batch in evaluator._pipeline.evaluate(seed)]
        return np.concatenate(found)[:3 * N].reshape(3, N, 10, 12, 3)

    first, same, other = images(4, 0), images(17, 0), images(4, 1)
    np.testing.assert_array_equal(first, same)
    np.testing.assert_array_equal(first[0], [Noisy(LABELS, CLASSES)[i]["image"] for i in range(N)])
    assert (first[1:] != other[1:]).any(axis=(2, 3, 4)).all()


def test_some_examples_several_labels_none_and_broken_ones():
    labels = np.stack([LABELS, np.roll(LABELS, 1)], 1)
    labels[[0, 9]] = -1
    evaluator, state = evaluate(labels, broken=(3, 11), skip_errors=0.2, corruptions=("contrast",), severities=(5,))
    rest = sorted(set(range(N)) - {0, 9, 3, 11})
    assert dict(evaluator.run(state))["error"] == pytest.approx(wrong(rest, "contrast", 5, labels))
    assert "contrast,5," in dict(evaluator.files())["corruptions.csv"].replace("\n", " ")

    for count, seed in ((5, 0), (5, 1), (100, 0)):
        evaluator, state = evaluate(examples=count, seed=seed, corruptions=("contrast",), severities=(5,))
        chosen = evaluator._pipeline.source.sources[0].indices
        assert len(chosen) == min(count, N) == len(set(chosen))
        assert dict(evaluator.run(state))["error"] == pytest.approx(wrong(chosen, "contrast", 5))

    evaluator, state = evaluate(np.full(N, -1), corruptions=("contrast",))
    assert np.isnan(list(dict(evaluator.run(state)).values())).all()
    assert sorted(dict(evaluator.files())) == ["corruptions.csv", "corruptions.png"]
    evaluator, state = evaluate(broken=(3,), corruptions=("contrast",))
    with pytest.raises(DataError, match="example 3 is broken"):
        dict(evaluator.run(state))
    evaluator, state = evaluate(broken=(3, 11), skip_errors=0.01, corruptions=("contrast",))
    with pytest.raises(DataError, match="12 of 126 examples could not be read"):
        dict(evaluator.run(state))


def test_the_op_stands_at_the_end_of_the_host_part():
    evaluator, _ = evaluate(pp="resize(16)|", corruptions=("fog",), severities=(3,))
    assert evaluator._pipeline.preprocess.passes[1].text == (
        f"resize(16)|corrupt('fog', 3)|value_range(-1, 1)|onehot({CLASSES})|keep('image', 'labels')")
    assert build("value_range(-1, 1)", "pp").with_op("flip_lr").text == "flip_lr|value_range(-1, 1)"
    assert build("resize(8)|keep('image')", "pp").with_op("flip_lr").text == "resize(8)|keep('image')|flip_lr"


def test_which_corruptions_are_measured():
    assert [*evaluate()[0]._passes] == [("clean", 0), *((name, s) for name in BUILT_IN for s in SEVERITIES)]
    assert evaluate(corruptions=["all"])[0].config.names == tuple(CORRUPTIONS) == tuple(ALEXNET)
    assert set(CORRUPTIONS) - set(BUILT_IN) == {"frost"}


@pytest.mark.parametrize("settings, message", [
    (dict(corruptions=["fogg"]), "corruptions: unknown corruption 'fogg'; did you mean fog?"),
    (dict(corruptions=["fog", "all"]), "corruptions: unknown corruption 'all'"),
    (dict(corruptions=[]), "corruptions: must be different, and at least one; got ()"),
    (dict(corruptions=["fog", "snow", "fog"]), "corruptions: must be different"),
    (dict(corruptions="fog"), "corruptions: expected a list"),
    (dict(severities=[]), "severities: must be different, and at least one"),
    (dict(severities=[1, 1]), "severities: must be different"), (dict(severities=[0]), "severities: go from 1 to 5"),
    (dict(severities=[1, 6]), "severities: go from 1 to 5, got 6"), (dict(examples=0), "examples: must be at least 1"),
    (dict(seed=-1), "seed: must be in [0, 2³²), got -1"), (dict(prefix="../"), "prefix: '../' is to be a folder"),
    (dict(prefix="checkpoints/"), "prefix: 'checkpoints/' is to be a folder")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        evaluate(**settings)
    assert str(error.value).startswith(f"val.{message}")


def test_images_of_other_channels_are_refused(monkeypatch):
    monkeypatch.setattr(Noisy, "__getitem__", lambda self, index: {"image": np.zeros((8, 8, 4), np.uint8), "label": 0})
    with pytest.raises(ConfigError, match="^pp_fn: makes images of 4 channels, and corruptions take 1 or 3"):
        evaluate()


def test_frost_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(corruptions, "frost_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"^val.corruptions: .*pip install 'cb_vit\[corruptions\]'"):
        evaluate(corruptions=["all"])


def test_files_go_where_the_metrics_are_called(tmp_path):
    evaluator, state = evaluate(ema={"kernel": jnp.asarray(-KERNEL)}, corruptions=("contrast",), severities=(1,))
    found = common.measure(evaluator, state, tmp_path)
    assert found.keys() == {f"{ema}robust/{metric}error" for ema in ("", "ema/")
                            for metric in ("", "severity_1/", "contrast/", "clean/")}
    for folder in ("robust", "ema/robust"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["corruptions.csv", "corruptions.png"]


def test_mean_corruption_error_is_one_for_alexnet_itself():
    errors = {name: [value] * 5 for name, value in ALEXNET.items()}
    assert mean_corruption_error(errors, ALEXNET_CLEAN) == pytest.approx((1, 1))
    assert mean_corruption_error({name: [value / 2] * 5 for name, value in ALEXNET.items()}, ALEXNET_CLEAN / 2) == (
        pytest.approx((0.5, 0.5)))
    # By hand, for one that errs as often whatever the corruption.
    mce, relative = mean_corruption_error({name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in ALEXNET}, 0.2)
    assert mce == pytest.approx(np.mean([0.3 / value for value in ALEXNET.values()]))
    assert relative == pytest.approx(np.mean([0.1 / (value - 0.43478) for value in ALEXNET.values()]))
    for broken in ({"fog": [0.1] * 4}, {"fogg": [0.1] * 5}):
        with pytest.raises(ValueError, match="15 corruptions at five severities each; not so fog"):
            mean_corruption_error(errors | broken, 0.1)


def test_mce_is_of_imagenet_at_its_full_alone(monkeypatch):
    names = label_lists.wnids()

    def metrics(**settings):
        evaluator, state = evaluate(**dict(corruptions=["all"], names=names) | settings)
        monkeypatch.setattr(Evaluator, "_count", lambda self, state: dict.fromkeys(self._passes, (3, 4)))
        return dict(evaluator.run(state)).keys()

    assert "mce" not in metrics()  # images of ten pixels have CIFAR-10-C's constants
    monkeypatch.setattr(evaluator_module, "SMALL", 10)
    assert {"mce", "relative_mce"} <= metrics()
    assert not {"mce", "relative_mce"} & metrics(severities=(1, 2, 3, 4))
    assert not {"mce", "relative_mce"} & metrics(corruptions=None)
    assert not {"mce", "relative_mce"} & metrics(names=tuple(f"class {number}" for number in range(1000)))
    assert not {"mce", "relative_mce"} & metrics(names=None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_counts_the_parts_and_is_gone_in_the_end(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress, "INTERVAL", 0)
    with counted(2, stream) as tell:
        for words in ("clean", "fog 1"):
            tell(words)
    assert all(text in stream.getvalue() for text in ("0/2", "1/2", "| clean", "2/2", "| fog 1"))
    assert stream.getvalue().rstrip("\r").split("\r")[-1].strip() == ""
    for silent in (None, io.StringIO()):
        with counted(2, silent) as tell:
            tell("clean")
        assert silent is None or silent.getvalue() == ""
