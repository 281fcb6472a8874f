"""A trained model made to fit, a file's or a run's: for images of another size, of other channels, without its head."""
import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cb_vit
from cb_vit import dist, sharding
from cb_vit.config import ConfigError
from cb_vit.experiment import build
from cb_vit.model_init import fit, open_init
from cb_vit.models.resample import adapt_channels, resample_posemb
from cb_vit.pp import builder
from cb_vit.pp.normalisation import HALF, IMAGENET
from cb_vit.settings import check
from cb_vit.tree import flatten_with_names
from cb_vit.weights import open_weights, refit
from cb_vit.weights.containers import write_npz, write_safetensors
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.conversion import describe
from cb_vit.weights.dialects.timm import to_timm
from cb_vit.weights.export import export

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

CLASSES = 5
SIZES = dict(patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2, pool_type="tok", gelu="erf", distilled=True)
MODEL = cb_vit.Model(CLASSES, **SIZES)


@pytest.fixture(scope="module")
def params():
    """Random parameters; no leaf is zero, or one."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def files(tmp_path_factory, params):
    """The same parameters in files of two kinds and a run, each by the normalisation that it says."""
    folder = tmp_path_factory.mktemp("files")
    host = jax.device_get(params)
    for name, normalisation in (("half", HALF), ("imagenet", IMAGENET)):
        write_safetensors(folder / f"{name}.safetensors", to_timm(host, MODEL.config),
                          describe(MODEL.config, normalisation))
    write_npz(folder / "bv.npz", to_big_vision(host))
    export(open_weights(folder / "imagenet.safetensors", ""), str(folder / "run"))
    return folder


GIVEN = {"bv.npz": dict(gelu="erf", distilled=True, pool_type="tok")}
SOURCES = ["half.safetensors", "imagenet.safetensors", "bv.npz", "run"]
GREY = jnp.asarray(np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1)) / 255, jnp.float32)
RGB = jnp.repeat(GREY, 3, -1)


def stem(params, pixels, normalisation):
    """What the patch embedding makes of pixels from 0 to 1; all that follows it is as it was."""
    mean, std = (np.asarray(values, np.float32) for values in normalisation)
    patches = ((np.asarray(pixels) - mean) / std).reshape(3, 2, 4, 2, 4, -1)
    kernel, bias = (np.asarray(params["embedding"][name]) for name in ("kernel", "bias"))
    return np.einsum("bypxqc,pqcd->byxd", patches, kernel) + bias


def assert_rest_is_the_same(found, params, but="embedding/"):
    rest = dict(flatten_with_names(params)[0])
    for name, leaf in flatten_with_names(found)[0]:
        if not name.startswith(but):
            np.testing.assert_array_equal(leaf, rest[name], err_msg=name)


@pytest.mark.parametrize("source", SOURCES)
def test_grey_pixels_give_what_they_gave_three_times_over(files, params, source):
    given = GIVEN.get(source, {})
    found, trained = (open_weights(files / source, "path", channels=n, **given) for n in (1, None))
    assert found.shapes["embedding"]["kernel"].shape == (4, 4, 1, 16) and len(found.normalisation[0]) == 1
    tree, expected = found.read(), stem(params, RGB, trained.normalisation)
    np.testing.assert_allclose(stem(tree, GREY, found.normalisation), expected, rtol=1e-4, atol=1e-5)
    assert_rest_is_the_same(tree, params)
    _, tree = cb_vit.load(files / source, channels=1, normalisation=((0.1,), (0.3,)), **given)
    np.testing.assert_allclose(stem(tree, GREY, ((0.1,), (0.3,))), expected, rtol=1e-4, atol=1e-5)
    assert any("three channels are summed" in note for note in found.notes)
    folded = any("is folded into the embedding" in note for note in found.notes)
    assert folded == (len(set(trained.normalisation[0])) > 1)


def test_timms_rule_in_full():
    kernel = jnp.asarray(np.arange(24).reshape(2, 2, 3, 2), jnp.float32)
    np.testing.assert_array_equal(adapt_channels(kernel, 1), np.asarray(kernel).sum(2, keepdims=True))
    for channels, order in ((2, [0, 1]), (4, [0, 1, 2, 0]), (7, [0, 1, 2, 0, 1, 2, 0])):
        expected = np.asarray(kernel)[:, :, order] * (3 / channels)
        np.testing.assert_allclose(adapt_channels(kernel, channels), expected, rtol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_four_channels(files, params, source):
    found = open_weights(files / source, "path", channels=4, **GIVEN.get(source, {}))
    trained = open_weights(files / source, "path", **GIVEN.get(source, {})).normalisation
    assert found.normalisation == tuple((*values, values[0]) for values in trained)
    tree = found.read()
    np.testing.assert_allclose(tree["embedding"]["kernel"], adapt_channels(params["embedding"]["kernel"], 4), rtol=1e-6)
    assert_rest_is_the_same(tree, params)
    assert jax.eval_shape(found.model.apply, {"params": tree}, jnp.ones((1, 8, 8, 4)))[0].shape == (1, CLASSES)
    assert any("not the same function" in note for note in found.notes) and found.pp is None


def test_what_is_not_known_or_not_asked_for(files, params):
    unknown = dataclasses.replace(open_weights(files / "half.safetensors", "path"), normalisation=None)
    unknown = refit.with_channels(unknown, 1)
    assert unknown.normalisation is None
    np.testing.assert_allclose(unknown.read()["embedding"]["kernel"],
                               params["embedding"]["kernel"].sum(2, keepdims=True), rtol=1e-5, atol=1e-6)
    same = open_weights(files / "half.safetensors", "path", channels=3, num_classes=CLASSES)
    assert same.notes == open_weights(files / "half.safetensors", "path").notes
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match=f"^channels: {wrong!r} is asked for, but .* is of images with 3; only"):
            cb_vit.load(files / "half.safetensors", channels=wrong)
    with pytest.raises(ConfigError, match=r"^normalisation: .* such as \(\(0.5,\), \(0.5,\)\)"):
        cb_vit.load(files / "half.safetensors", channels=1, normalisation=HALF)


def test_a_file_of_grey_images(files, tmp_path):
    grey = open_weights(files / "half.safetensors", "path", channels=1)
    write_safetensors(tmp_path / "grey.safetensors", to_timm(jax.device_get(grey.read()), MODEL.config),
                      describe(MODEL.config, grey.normalisation))
    found = open_weights(tmp_path / "grey.safetensors", "path")
    assert found.pp.startswith("decode(1)|") and found.pp.endswith("vgg_value_range((127.5,), (127.5,))")
    with pytest.raises(ConfigError, match="channels: 3 is asked for, but .*grey.* is of images with 1; only"):
        open_weights(tmp_path / "grey.safetensors", "path", channels=3)


@pytest.mark.parametrize("source", SOURCES)
def test_no_classes_leave_the_heads(files, params, source):
    found = open_weights(files / source, "path", num_classes=0, **GIVEN.get(source, {}))
    tree = found.read()
    assert not found.model.num_classes and "head" not in tree and "head_dist" not in tree
    assert any("its 5 classes are left there with head and head_dist" in note for note in found.notes)
    assert_rest_is_the_same(tree, params)
    assert jax.eval_shape(found.model.apply, {"params": tree}, jnp.ones((1, 8, 8, 3)))[0].shape == (1, 16)
    assert jax.tree.structure(tree) == jax.tree.structure(jax.eval_shape(
        lambda: found.model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]))
    for wrong in (4, 1, -1):
        with pytest.raises(ConfigError, match=f"^num_classes: {wrong!r} is asked for, but .* has 5 classes; 0 leaves"):
            open_weights(files / source, "path", num_classes=wrong, **GIVEN.get(source, {}))


def test_a_file_without_a_head(files, tmp_path):
    bare = open_weights(files / "half.safetensors", "path", num_classes=0)
    write_safetensors(tmp_path / "bare", to_timm(jax.device_get(bare.read()), MODEL.config), describe(MODEL.config))
    assert cb_vit.load(tmp_path / "bare", num_classes=0)[0].num_classes is None
    with pytest.raises(ConfigError, match="num_classes: 5 is asked for, but .* has 0 classes"):
        cb_vit.load(tmp_path / "bare", num_classes=5)


@pytest.mark.parametrize("source, size, grid", [
    (source, *size) for source, size in zip(SOURCES, [(12, (3, 3)), ((8, 16), (2, 4))] * 2, strict=True)])
def test_images_of_another_size(files, params, source, size, grid):
    found = open_weights(files / source, "path", image_size=size, **GIVEN.get(source, {}))
    tree = found.read()
    expected = resample_posemb(params["pos_embedding"], grid)
    np.testing.assert_allclose(tree["pos_embedding"], expected, atol=1e-6)
    assert_rest_is_the_same(tree, params, but="pos_embedding")
    assert found.grid == grid and builder.build(found.pp, "pp").image_size == tuple(4 * side for side in grid)
    assert f"its positions are resampled from 2×2 to {grid[0]}×{grid[1]}, as image_size asks" in found.notes
    images = jnp.ones((1, 4 * grid[0], 4 * grid[1], 3))
    assert jax.eval_shape(found.model.apply, {"params": tree}, images)[0].shape == (1, CLASSES)


def test_images_of_the_same_size_and_of_none(files, params):
    path = files / "half.safetensors"
    plain, same = (open_weights(path, "path", image_size=size) for size in (None, (8, 8)))
    assert (plain.notes, plain.pp, plain.grid) == (same.notes, same.pp, same.grid)
    assert_rest_is_the_same(same.read(), params, but="nothing")
    for wrong in (0, -4, "8", True, 8.0, (8,), (8, 8, 8), (8, None), [[8], 8], 1 << 40):
        with pytest.raises(ConfigError, match=r"^image_size: expected pixels, such as 224 or \(224, 320\), got "):
            refit.with_image_size(plain, wrong)
    for wrong, near in ((9, "8×8"), ((8, 3), "8×4"), (1, "4×4")):
        with pytest.raises(ConfigError, match=f"^image_size: .* patches of .* are 4×4, which .* it; take {near}"):
            cb_vit.load(path, image_size=wrong)


def test_fixed_positions_are_for_any_size(tmp_path):
    model = cb_vit.Model(CLASSES, **SIZES | dict(distilled=False, posemb="sincos2d"))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    tree = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    write_npz(tmp_path / "fixed.npz", to_big_vision(jax.device_get(tree)))
    found = open_weights(tmp_path / "fixed.npz", "path", image_size=(12, 20), gelu="erf", pool_type="tok")
    assert found.grid == (3, 5) and not any("resampled" in note for note in found.notes)
    assert_rest_is_the_same(found.read(), tree, but="nothing")


def test_a_card_for_images_of_another_size_than_the_positions_are_for(files, tmp_path, caplog):
    """As that of DINOv2, which is trained on 518 pixels and prepares 224."""
    card = dict(image_processor_type="BitImageProcessor", size=dict(shortest_edge=14), image_mean=[0.5] * 3,
                crop_size=dict(height=12, width=12), image_std=[0.5] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(card))
    (tmp_path / "model.safetensors").write_bytes((files / "half.safetensors").read_bytes())
    note = "its images are prepared in 12×12 pixels, its positions are for 8×8: give image_size=12, or the other"
    found = open_weights(tmp_path, "path")
    assert found.other_size() == (note,) and builder.build(found.pp, "pp").image_size == (12, 12)
    for size, steps in ((12, "resize_small(14, 'bicubic')|central_crop((12, 12))"),
                        (24, "resize_small(28)|central_crop(24)"), (8, "resize_small(9)|central_crop(8)")):
        found = open_weights(tmp_path, "path", image_size=size)
        assert found.other_size() == () and f"decode|{steps}|" in found.pp
    caplog.set_level(logging.INFO)
    cb_vit.load(tmp_path)
    assert note in caplog.text


@pytest.mark.parametrize("source", ["imagenet.safetensors", "run"])
def test_all_at_once_and_straight_into_shards(files, params, source):
    mesh = dist.create_mesh([("data", -1)])
    place = lambda shapes: sharding.place(shapes, [(".*", "fsdp(axis='data', min_size_to_shard_mb=0)")], mesh)  # noqa: E731
    _, tree = cb_vit.load(files / source, channels=4, num_classes=0, image_size=16, place=place)
    shapes = open_weights(files / source, "path", channels=4, num_classes=0, image_size=16).shapes
    for (name, leaf), wanted in zip(flatten_with_names(tree)[0], jax.tree.leaves(place(shapes)), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.shape == wanted.shape, name
    np.testing.assert_allclose(tree["embedding"]["kernel"], adapt_channels(params["embedding"]["kernel"], 4), rtol=1e-6)
    np.testing.assert_allclose(tree["pos_embedding"], resample_posemb(params["pos_embedding"], (4, 4)), atol=1e-6)


def test_merging_into_a_model_of_grey_images(files):
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"])
    init = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    expected = open_weights(files / "imagenet.safetensors", "path", channels=1).read()
    for channels in (None, 1):
        merged, report = cb_vit.merge(init, files / "imagenet.safetensors", MODEL.config, channels=channels)
        np.testing.assert_array_equal(merged["embedding"]["kernel"], expected["embedding"]["kernel"])
        assert any("three channels are summed" in line for line in report.lines)
    with pytest.raises(ConfigError, match=r"another shape of embedding/kernel"):
        cb_vit.merge(init, files / "imagenet.safetensors", MODEL.config, channels=3)


def test_fine_tuning_on_grey_images_begins_as_the_same_function(tmp_path, params, caplog):
    """From part of a file."""
    arrays = {f"net.{name}": array for name, array in to_timm(jax.device_get(params), MODEL.config).items()}
    write_safetensors(tmp_path / "x", arrays | {"loss.weight": np.ones(2)}, describe(MODEL.config, IMAGENET))
    pp = f"decode(1)|value_range(-1, 1)|onehot({CLASSES})"
    data = dict(name="fake", split="train", num_examples=16, image_size=8, num_classes=CLASSES)
    settings = check(dict(seed=0, total_steps=1, lr=0.1, input=dict(data=data, batch_size=8, pp=pp), model=SIZES,
                          model_init=str(tmp_path / "x"), model_load=dict(prefix="net"), plot=False))
    run = build(settings)
    with run.active_mesh(), caplog.at_level(logging.INFO, "cb_vit"):
        state, notes = fit(run, open_init(settings))()
    np.testing.assert_allclose(stem(state.params, GREY, ((0.5,), (0.5,))), stem(params, RGB, IMAGENET),
                               rtol=1e-4, atol=1e-5)
    assert_rest_is_the_same(state.params, params)
    for words in ("three channels are summed", "1 of the file's 24 arrays are not under 'net'"):
        assert any(words in line for line in notes["model_init"]["report"]) and words in caplog.text
    json.dumps(notes)
