"""Fine-tuning from an earlier run: what it begins with, on any layout, what it trains; a stop changes nothing."""
import contextlib
import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import named, saved, timeless

from cb_vit import startup
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import ConfigError
from cb_vit.model_init import open_init, with_model_of
from cb_vit.models.common import to_loop
from cb_vit.models.resample import resample_posemb
from cb_vit.settings import check
from cb_vit.train import train_and_evaluate

FSDP = ((".*", "fsdp(axis='data', min_size_to_shard_mb=0)"),)
FROZEN = (("embedding/.*|pos_embedding|Transformer/.*/Dense_0/.*", None), (".*", dict(decay_type="constant")))
SIZES = dict(patch_size=4, width=16, depth=1, mlp_dim=16, num_heads=2, context="cb")


def config(size=8, classes=3, model=(), **changes):
    """A run of 3 steps on images of `size` pixels."""
    data = dict(name="fake", split="train", num_examples=32, image_size=size, num_classes=classes)
    return dict(
        seed=0, total_steps=3, lr=1e-2, schedule=dict(decay_type="constant"), log_training_steps=1, plot=False,
        input=dict(data=data, batch_size=8, pp=f"value_range(-1, 1)|onehot({classes})"),
        model=SIZES | dict(model)) | changes


def finetune(source, **changes):
    """A run of 4 steps on larger images of other classes, that begins from another."""
    return config(**dict(dict(size=12, classes=5, seed=1, total_steps=4, model_init=str(source)), **changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run with averaged parameters, and checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train_and_evaluate(config(ema=dict(decay=0.5), ckpt_steps=1, keep_last=2), folder)
    return folder


def stored(folder, kind="raw", step=None):
    """Parameters in a checkpoint, by name."""
    checkpointer = Checkpointer(folder / "checkpoints", read_only=True)
    step, shapes = checkpointer.params_shapes(step, kind)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    params = checkpointer.restore_params(step, like, kind)
    checkpointer.close()
    return named(params)


def begin(settings, folder):
    """The state before the first step, and the experiment."""
    run = startup.build(check(settings), folder)
    with run.active_mesh(), contextlib.closing(startup.open_checkpoints(run, folder)) as checkpointer:
        state, _ = startup.restore_or_create(run, folder, checkpointer)
    return state, run


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("kind, at", [("raw", ""), ("raw", "@2"), ("ema", ""), ("raw", "/checkpoints/")])
def test_a_run_begins_with_what_it_was_told_to(source, tmp_path, kind, at):
    load = dict(params="ema") if kind == "ema" else dict(posemb_resize="linear")
    state, run = begin(finetune(f"{source}{at}", model_load=load, ema=dict(decay=0.9)), tmp_path)
    found, loaded = named(state.params), stored(source, kind, 2 if at == "@2" else 3)
    assert found.keys() == loaded.keys()
    fresh = named(run.create_state().params)
    for name in found:
        if name == "pos_embedding":
            method = "bicubic_antialias" if kind == "ema" else "linear"
            expected = resample_posemb(jnp.asarray(loaded[name]), (3, 3), method)
            np.testing.assert_allclose(found[name], expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(found[name], (fresh if name.startswith("head") else loaded)[name], name)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert int(state.step) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(jax.device_get(state.opt)))


def test_scan_and_fsdp_get_what_a_loop_on_whole_arrays_gets(source, tmp_path):
    many = dict(classes=24)  # so that the new head is sharded along them, as the old one could not be
    plain, _ = begin(finetune(source, **many), tmp_path / "plain")
    for name, changes in (("scan", {}), ("fsdp", dict(sharding_strategy=FSDP))):
        model = dict(scan=name == "scan")
        state, run = begin(finetune(source, model=model, **many, **changes), tmp_path / name)
        jax.tree.map(lambda x, like: np.testing.assert_equal(x.sharding.is_equivalent_to(like.sharding, x.ndim), True),
                     state, run.shapes)
        found, expected = named(to_loop(state.params)), named(plain.params)
        assert found.keys() == expected.keys()
        for name in found.keys() - {"head/kernel", "head/bias"}:  # their draws depend on the layout
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6, err_msg=name)


def test_fine_tuning_part_of_the_parameters_and_a_stop_changes_nothing(source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before, earlier = snapshot(source), tmp_path / "earlier"
    shutil.copytree(source, earlier)
    settings = finetune(earlier, schedule=FROZEN, sharding_strategy=FSDP, ckpt_steps=2, keep_last=9)
    train_and_evaluate(settings, tmp_path / "whole")

    found, loaded = stored(tmp_path / "whole"), stored(source)
    for name in found.keys() - {"pos_embedding", "head/kernel", "head/bias"}:
        frozen = name.startswith("embedding") or "Dense_0" in name
        assert np.array_equal(found[name], loaded[name]) == frozen, name
    expected = resample_posemb(jnp.asarray(loaded["pos_embedding"]), (3, 3))
    np.testing.assert_allclose(found["pos_embedding"], expected, atol=1e-6)

    notes = json.loads((tmp_path / "whole" / "run.json").read_text())["model_init"]
    assert (notes["path"], notes["step"], notes["params"]) == (str(earlier), 3, "raw")
    assert notes["report"][1:] == ["pos_embedding: resampled from 2×2 to 3×3, bicubic_antialias",
                                   "begun anew, the file's being of another size: head/bias, head/kernel"]
    assert all(f"parameters of step 3 of {earlier}: {line}" in caplog.text for line in notes["report"])

    # A run killed after its checkpoint of step 2; meanwhile the run it began from is gone.
    shutil.rmtree(earlier)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "4")
    (tmp_path / "part" / "run.json").unlink()
    train_and_evaluate(settings, tmp_path / "part")
    assert "resumed from step 2" in caplog.text and timeless(tmp_path / "part") == timeless(tmp_path / "whole")
    assert json.loads((tmp_path / "part" / "run.json").read_text())["model_init"] == notes
    one, other = (saved(tmp_path / name, 4) for name in ("part", "whole"))
    assert one.keys() == other.keys() and any("opt" in name for name in one)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
    assert snapshot(source) == before


OPEN = dict.fromkeys((*SIZES, "pool_type"))


@pytest.mark.parametrize("model, expected", [
    (OPEN, {}),  # all as there
    (OPEN | dict(context="none", gelu="erf"), dict(context="none", gelu="erf")),
    (OPEN | dict(variant="mu/4"), dict(variant="mu/4", width=32, mlp_dim=128, num_heads=2)),
    (OPEN | dict(depth=1, scan=True, dtype_mm="bfloat16"), dict(scan=True, dtype_mm="bfloat16"))])
def test_what_a_config_leaves_open_of_the_model_is_as_in_the_weights(tmp_path, model, expected):
    """All but how it was trained: that is the config's own, or the default."""
    function = dict(SIZES, patch_size=(4, 4), pool_type="tok", layer_scale=0.5, gelu="tanh", layer_norm_eps=1e-4)
    training = dict(drop_path=0.2, dtype_mm="float16", init="deit", scan=True)
    train_and_evaluate(config(model=function | training, total_steps=1), tmp_path / "source")
    weights = open_init(check(finetune(tmp_path / "source", model=model)))
    found = dataclasses.asdict(with_model_of(check(finetune(tmp_path / "source", model=model)), weights).model)
    own = dict(drop_path=0.0, dtype_mm="float32", init="big_vision", scan=False, head_zeroinit=True)
    wanted = function | own | expected
    assert {name: found[name] for name in wanted} == wanted


def test_a_run_goes_on_with_its_model_whatever_became_of_the_weights(tmp_path):
    first = config(model=dict(pool_type="tok"), total_steps=1)
    train_and_evaluate(first, tmp_path / "source")
    settings = finetune(tmp_path / "source", model=OPEN, ckpt_steps=2)
    train_and_evaluate(settings | dict(total_steps=2), tmp_path / "run")
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "run" / "run.json").unlink()
    assert train_and_evaluate(settings, tmp_path / "run")["step"] == 4
    notes = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (notes["model"]["pool_type"], notes["model"]["context"], notes["model"]["width"]) == ("tok", "cb", 16)


@pytest.mark.parametrize("changes, message", [
    (dict(model_init="/nowhere"), "config.model_init: /nowhere does not exist; give a run's workdir"),
    (dict(model_init="{source}@7"), "config.model_init: {source}/.* holds checkpoints of steps 2, 3, none of step 7"),
    (dict(model_init="{empty}"), "config.model_init: {empty}/checkpoints holds no checkpoint"),
    (dict(model=dict(width=32)), r"config.model_init: step 3 of {source}: .* another shape of .*\(\[16\], here \[32\]"),
    (dict(model=OPEN | dict(num_heads=3)), "config.model.num_heads: 3 does not divide width 16"),
    (dict(model=OPEN | dict(variant="mu/5")), "config.model.variant: 'mu/5' has patch 5×5, which does not divide"),
    (dict(model=OPEN, model_init=None), "config.model.width: not set"),
    (dict(model=dict(depth=2)), "config.model_init: step 3 of {source}: it lacks Transformer/encoderblock_1/"),
    (dict(model_load=dict(dont_load=["haed/.*"])), r"config.model_load.dont_load\[0\]: .*'haed/.\*' matches no"),
    (dict(model_load=dict(posemb_resize="cubic")), "config.model_load.posemb_resize: unknown way .*'cubic'"),
    (dict(model_load=dict(params="mean")), "config.model_load.params: unknown value 'mean'"),
    (dict(model_init=None, model_load=dict(params="ema")), "config.model_load: .*set model_init")])
def test_what_cannot_be_begun_from_is_said_before_anything_is_written(source, tmp_path, changes, message):
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    shutil.copy(source / "run.json", empty)
    before, paths = snapshot(tmp_path), dict(source=source, empty=empty)
    if changes.get("model_init"):
        changes = changes | dict(model_init=changes["model_init"].format(**paths))
    with pytest.raises(ConfigError, match="^" + message.format(**paths)) as error:
        train_and_evaluate(finetune(source, **changes), tmp_path / "run")
    assert "\n" not in str(error.value) and snapshot(tmp_path) == before
