"""Models from files and runs: what `load` and `merge` give, and what they say where they cannot."""
import functools
import json
import logging
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same

import cb_vit
from cb_vit import experiment, model_init, startup, weights
from cb_vit.config import ConfigError
from cb_vit.model_init import fit, open_init
from cb_vit.pp import builder
from cb_vit.pp.normalisation import HALF, IMAGENET
from cb_vit.settings import check
from cb_vit.train import train_and_evaluate
from cb_vit.tree import flatten_with_names
from cb_vit.weights.containers import FormatError, write_npz, write_safetensors
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.conversion import describe
from cb_vit.weights.dialects.timm import to_timm

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

CLASSES = 5
PP = f"value_range(-1, 1)|onehot({CLASSES})"
DATA = dict(name="fake", split="train", num_examples=32, image_size=8, num_classes=CLASSES)
SIZES = dict(patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2, pool_type="tok", context="cb_s", gelu="erf")


def config(**changes):
    return dict(seed=0, total_steps=2, lr=0.01, input=dict(data=DATA, batch_size=8, pp=PP), model=SIZES, plot=False,
                ckpt_steps=1, keep_last=9, ema=dict(decay=0.5)) | changes


@pytest.fixture(scope="module")
def model():
    return cb_vit.Model(CLASSES, **SIZES)


@pytest.fixture(scope="module")
def params(model):
    """Random parameters; no leaf is zero, or one."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3)), jnp.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model, params):
    """The same parameters in files of two kinds, and a run."""
    folder = tmp_path_factory.mktemp("files")
    host = jax.device_get(params)
    write_safetensors(folder / "timm.safetensors", to_timm(host, model.config), describe(model.config, HALF, (2, 2)))
    write_safetensors(folder / "bare.safetensors", to_timm(host, model.config))
    write_npz(folder / "bv.npz", to_big_vision(host))
    train_and_evaluate(config(), folder / "run")
    return folder


def logits(model, params, images):
    return model.apply({"params": params}, images)[0]


def normalised(images, normalisation):
    mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in normalisation)
    return (images / 255.0 - mean) / std


def test_files_of_ours_come_back_bit_for_bit(files, model, params, images):
    for name, given in (("timm.safetensors", {}), ("bv.npz", dict(gelu="erf", pool_type="tok")),
                        ("bare.safetensors", dict(num_heads=2))):
        loaded, tree = cb_vit.load(files / name, **given)
        assert_same(tree, params)
        np.testing.assert_array_equal(logits(loaded, tree, images / 255.0), logits(model, params, images / 255.0))


def test_a_run_comes_back_with_its_model(files, caplog):
    run = files / "run"
    with caplog.at_level(logging.INFO):
        last, tree = cb_vit.load(run)
    assert not [record for record in caplog.records if record.name == "absl"]  # Orbax would have a page of them
    assert last.config.context == "cb_s" and last.num_classes == CLASSES
    first, average = cb_vit.load(f"{run}@1")[1], cb_vit.load(run, params="ema")[1]
    assert_same(cb_vit.load(f"{run}/checkpoints@2")[1], tree)
    leaf = lambda tree: np.asarray(tree["head"]["kernel"])  # noqa: E731
    assert (leaf(first) != leaf(tree)).any() and (leaf(average) != leaf(tree)).any()
    state = experiment.build(check(config()))
    with pytest.raises(ConfigError, match="path: .*holds checkpoints of steps 1, 2, none of step 7"):
        cb_vit.load(f"{run}@7")
    found = weights.open_weights(run, "path")
    assert str(found) == f"step 2 of {run}" and found.grid == (2, 2)
    np.testing.assert_allclose(found.normalisation, HALF, rtol=1e-6)
    assert state.num_classes == CLASSES


def test_folding_is_the_same_function(model, params, images):
    folded = HALF.fold(params, IMAGENET)
    np.testing.assert_allclose(logits(model, folded, normalised(images, HALF)),
                               logits(model, params, normalised(images, IMAGENET)), rtol=1e-4, atol=1e-5)
    changed = [name for (name, a), b in zip(flatten_with_names(folded)[0], jax.tree.leaves(params), strict=True)
               if (np.asarray(a) != np.asarray(b)).any()]
    assert changed == ["embedding/bias", "embedding/kernel"]


def test_load_folds_for_the_images_that_there_will_be(files, model, params, images):
    loaded, tree = cb_vit.load(files / "timm.safetensors", normalisation=IMAGENET)
    np.testing.assert_allclose(logits(loaded, tree, normalised(images, IMAGENET)),
                               logits(model, params, normalised(images, HALF)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="does not say how its pixels were normalised"):
        cb_vit.load(files / "bare.safetensors", normalisation=IMAGENET, num_heads=2)


@pytest.mark.parametrize("pp", ["vgg_value_range", "value_range(-1, 1)", "value_range(0, 1)"])
def test_an_adapter_undoes_another_normalisation(files, pp, images):
    found = weights.open_weights(files / "timm.safetensors", "path")
    preprocess = builder.build(pp, "pp")
    adapted = found.adapter(preprocess)(preprocess.device({"image": images})["image"])
    np.testing.assert_allclose(adapted, normalised(images, HALF), rtol=1e-4, atol=1e-5)


def test_merging_a_file_into_a_model_of_another_size(files, model, params):
    larger = cb_vit.Model(7, **SIZES)
    init = larger.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    merged, report = cb_vit.merge(init, files / "timm.safetensors", larger.config)
    assert merged["pos_embedding"].shape == (1, 16, 16)
    assert_same(merged["head"], init["head"])
    assert_same(merged["Transformer"], params["Transformer"])
    assert any("resampled from 2×2 to 4×4" in line for line in report.lines)
    assert any("head" in line and "another size" in line for line in report.lines)


@pytest.mark.parametrize("pp", [PP, f"vgg_value_range|onehot({CLASSES})"])
def test_fine_tuning_from_a_file_begins_as_the_same_function(files, tmp_path, params, model, images, pp):
    settings = check(config(model_init=str(files / "timm.safetensors"), input=dict(data=DATA, batch_size=8, pp=pp)))
    run = startup.build(settings, tmp_path)
    with run.active_mesh():
        state, notes = fit(run, open_init(settings))()
    shown = settings.input.pp.device({"image": images, "label": jnp.zeros(3, jnp.int32)})["image"]
    np.testing.assert_allclose(run.predict(state, shown)[0], logits(model, params, normalised(images, HALF)),
                               rtol=1e-4, atol=1e-5)
    folded = any("folded" in line for line in notes["model_init"]["report"])
    assert folded == ("vgg" in pp)


def test_fine_tuning_needs_to_know_the_normalisation_as_prediction_does(files, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "open_weights", functools.partial(weights.open_weights, num_heads=2, grid=(2, 2)))
    monkeypatch.setattr(model_init, "open_weights", weights.open_weights)
    bare = config(model_init=str(files / "bare.safetensors"))
    with pytest.raises(ConfigError, match="^config.model_init: .*bare.safetensors does not say how its pixels we"):
        startup.build(check(bare), tmp_path)
    startup.build(check(bare | dict(model_load=dict(dont_load=["embedding/.*"]))), tmp_path)  # none was trained


@pytest.mark.parametrize("change", [
    dict(gelu="tanh"), dict(layer_norm_eps=1e-3), dict(context="cb"), dict(context="none"), dict(context_at="msa_end")])
def test_settings_that_change_the_function_but_no_shape_are_said(files, tmp_path, model, change):
    path, (name, here) = files / "plain.safetensors", *change.items()
    trained = cb_vit.Model(CLASSES, **SIZES | dict(context="none" if here == "cb" else "cb"))
    tree = trained.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    arrays = to_timm(jax.device_get(tree), trained.config)
    write_safetensors(path, arrays, describe(trained.config, HALF), overwrite=True)
    line = f"{name}: trained with {getattr(trained.config, name)!r}, {here!r} here"
    settings = check(config(model_init=str(path), model=SIZES | dict(context="cb") | change))
    run = startup.build(settings, tmp_path)
    with run.active_mesh():
        _, notes = fit(run, open_init(settings))()
    assert [said for said in notes["model_init"]["report"] if "trained with" in said] == [line]
    _, report = cb_vit.merge(tree, path, settings.model)
    assert line in report.lines


def test_load_warns_of_what_it_takes_for_granted(files, tmp_path):
    guessed = r"layer_norm_eps=1e-06, gelu='erf', pool_type='tok', grid=\(2, 2\)"
    with pytest.warns(UserWarning, match=f"bare.safetensors: {guessed} assumed"):
        cb_vit.load(files / "bare.safetensors", num_heads=2)
    with pytest.warns(UserWarning, match="timm.safetensors: gelu='tanh' as asked for, where its metadata say 'erf'"):
        cb_vit.load(files / "timm.safetensors", gelu="tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cb_vit.load(files / "timm.safetensors")
        cb_vit.load(files / "bv.npz", gelu="erf")


@pytest.mark.parametrize("pp", ["vgg_value_range((0, 0, 0), (1, 1, 0))", "vgg_value_range((1e999, 0, 0), (1, 1, 1))",
                                "vgg_value_range((0, 0, 0), (1, 1, 1e999))", "vgg_value_range((0, 0), (1, 1))"])
def test_a_normalisation_that_cannot_be_in_a_run(files, tmp_path, pp):
    notes = json.loads((files / "run" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(notes | dict(pp=pp)))
    with pytest.raises(ConfigError, match="run.json does not describe a model"):
        cb_vit.load(tmp_path)


def test_a_run_of_before_has_the_norms_that_there_were(files, tmp_path):
    shutil.copytree(files / "run", tmp_path / "run")
    notes = json.loads((tmp_path / "run" / "run.json").read_text())
    del notes["model"]["layer_norm_eps"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(notes))
    assert cb_vit.load(tmp_path / "run")[0].config.layer_norm_eps == 1e-6


def test_a_file_teaches_as_well(files):
    run = experiment.build(check(config(
        model=SIZES | dict(distilled=True), distillation=dict(teacher=str(files / "timm.safetensors")))))
    assert run.teacher.weights.format == "timm" and run.read_teacher() is not None


def test_what_is_not_there_or_not_understood(files, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, kind, match in (
            (tmp_path / "nothing", ConfigError, "path: .*nothing does not exist; give a run's workdir, a file"),
            (tmp_path / "empty", ConfigError, "is not the workdir of a run: it has no run.json; nor has it a file"),
            ("hf://only-one-part", FormatError, "write hf://ORG/NAME")):
        with pytest.raises(kind, match=match):
            cb_vit.load(path)
    with pytest.raises(ConfigError, match="is a run, which knows its model; leave out depth"):
        cb_vit.load(files / "run", depth=3)
    for wrong in (((0.5,) * 3, (0.0,) * 3), ((0.5,) * 2, (0.1,) * 3), ((float("nan"),), (1.0,))):
        with pytest.raises(ConfigError, match=r"normalisation: expected \(mean, std\) with a number for each channel"):
            cb_vit.load(files / "timm.safetensors", normalisation=wrong)
    with pytest.raises(ConfigError, match="only those keep an average"):
        cb_vit.load(files / "bv.npz", params="ema")
    with pytest.raises(FormatError, match="depth=3 is asked for, but the file has 2"):
        cb_vit.load(files / "timm.safetensors", depth=3)
    (tmp_path / "run.json").write_text(json.dumps({"model_name": "vit"}))
    with pytest.raises(ConfigError, match="run.json does not describe a model"):
        cb_vit.load(tmp_path)
