"""`eval_only --weights`: any trained model on the evaluators of any config."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, refusal, tool

import cb_vit
from cb_vit import sharding
from cb_vit.tools import eval_only
from cb_vit.weights import open_weights
from cb_vit.weights.containers import write_npz, write_safetensors
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.timm import to_timm
from cb_vit.weights.export import export
from configs import debug

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOTE = "are brought to the model's own mean and std"
# No training data; the same pixels in two normalisations.
CONFIG = """
import configs.debug as base

def get_config():
    config = base.get_config()
    config.input.data = dict(name="folder", root="/no/such/folder", split="train")
    config.input.pp = "decode|resize(16)|" + config.evals.val.pp_fn
    config.evals.val.pp_fn = "value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
    config.evals.vgg = config.evals.val.copy_and_resolve_references()
    config.evals.vgg.pp_fn = "vgg_value_range|onehot(10)|keep('image', 'labels')"
    config.model.width = 64
    config.mesh = [("replica", 2), ("data", -1)]
    config.sharding_strategy = [("params/.*", "fsdp(axis='data', min_size_to_shard_mb=0)"), ("opt/.*", "replicate")]
    config.sharding_rules = [("act_batch", ("replica", "data"))]
    return config
"""


def metrics(out):
    return {name: float(value) for name, value in re.findall(r"^((?:val|vgg)/\S+) +(\S+)$", out, re.MULTILINE)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = debug.get_config()
    config.total_steps, config.plot = 3, False
    found = cb_vit.train_and_evaluate(config, folder / "run")
    weights = open_weights(folder / "run", "")
    export(weights, str(folder / "timm.safetensors"))
    export(weights, str(folder / "bv.npz"))
    params = jax.device_get(weights.read())
    write_safetensors(folder / "bare.safetensors", to_timm(params, weights.model.config))
    return folder, found


@pytest.mark.parametrize("args, which", [
    (["run"], ""), (["run", "--ema"], "ema/"), (["timm.safetensors"], ""), (["bv.npz", "--model=context=cb"], "")])
def test_a_run_and_its_files_score_what_training_found(trained, args, which):
    folder, found = trained
    code, out, err = tool("eval_only", f"--config={ROOT}/configs/debug.py", f"--weights={args[0]}", *args[1:],
                          cwd=folder)
    assert code == 0 and not err, err
    assert metrics(out) == {name: pytest.approx(found[which + name], abs=6e-5)
                            for name in ("val/loss", "val/prec@1", "val/prec@5")}
    assert NOTE not in out and "val took" in out


def test_without_training_data_on_eight_devices_and_in_any_normalisation(trained, tmp_path):
    folder, found = trained
    (tmp_path / "mine.py").write_text(CONFIG)
    code, out, err = tool(
        "eval_only",
        "--config=mine.py", f"--weights={folder / 'timm.safetensors'}", cwd=tmp_path,
        JAX_NUM_CPU_DEVICES="8")
    assert code == 0 and not err, err
    got = metrics(out)
    for metric in ("loss", "prec@1", "prec@5"):  # the model's own is the first
        assert got[f"val/{metric}"] == pytest.approx(found[f"val/{metric}"], abs=6e-5)
        assert got[f"vgg/{metric}"] == pytest.approx(found[f"val/{metric}"], abs=1e-3)
    assert out.count(NOTE) == 1 and f"vgg_value_range|onehot(10)|keep('image', 'labels') {NOTE}" in out


def test_what_cannot_be_scored_ends_in_one_line(trained, tmp_path):
    folder, _ = trained
    model = cb_vit.Model(5, variant="mu/4", context="cb")
    for name, classes in (("five", 5), ("none", None)):
        model = cb_vit.Model(classes, variant="mu/4")
        params = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
        write_npz(tmp_path / f"{name}.npz", to_big_vision(params))
    config = "--config=debug"
    for args, error in (
            ([config, f"--weights={tmp_path}/five.npz"], "config.evals.val.pp_fn: onehot has 10 classes, the model 5"),
            ([config, f"--weights={tmp_path}/none.npz"],
             "config.evals.val.type: 'classification' scores classes of the model, which has no head; what needs none"),
            ([config, f"--weights={folder}/bare.safetensors", "--model=num_heads=2", "--model=gelu=tanh"],
             "--weights.normalisation: "),
            ([config, f"--weights={folder}/run", f"--workdir={folder}/run"], "--weights: takes the place of --workdir"),
            ([f"--workdir={folder}/run", "--ema"],
             "--weights: not given, and --ema, --key, --prefix, --image_size and --model are about it"),
            ([f"--weights={folder}/bv.npz"], "--config: not given; for example --config=digits, or --config=list"),
            (["--config=debug:size=20", f"--weights={folder}/run"],
             "config.evals.val.pp_fn: the model cannot take its images, (20, 20, 3)")):
        assert refusal(eval_only, *args).startswith(error)


def test_the_way_out_of_an_unknown_normalisation_is_one(trained, tmp_path):
    folder, _ = trained
    bare = open_weights(folder / "bare.safetensors", "", num_heads=2, context="cb", gelu="tanh")
    assert bare.normalisation is None
    export(bare, str(tmp_path / "told.safetensors"), normalisation=((0.5,) * 3, (0.5,) * 3))
    told = open_weights(tmp_path / "told.safetensors", "")
    assert told.normalisation == ((0.5,) * 3, (0.5,) * 3)
    assert (told.model.config.context, told.model.config.gelu) == ("cb", "tanh")


def test_parameters_are_read_straight_into_shards(trained):
    """Of each leaf a device holds an eighth, if an eighth there is."""
    folder, _ = trained
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rules = [("params/.*", "fsdp(min_size_to_shard_mb=0)"), ("opt/nothing", "replicate")]
    for name in ("run", "timm.safetensors"):
        _, whole = cb_vit.load(folder / name)
        _, params = cb_vit.load(folder / name, place=lambda shapes: sharding.place(shapes, rules, mesh))
        divided = 0
        for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
            can = any(size % 8 == 0 for size in leaf.shape)
            divided += can
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8 if can else leaf.size}
            assert len(leaf.addressable_shards) == 8
            np.testing.assert_array_equal(leaf, expected)
        assert divided > 10
