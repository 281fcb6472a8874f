"""Weights from one form into another: nothing is lost that the target can hold, and nothing is half-written."""
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, refusal, tool

import cb_vit
from cb_vit import startup
from cb_vit.config import ConfigError, Failure
from cb_vit.model_init import fit, open_init
from cb_vit.models.vit import Model
from cb_vit.pp import builder
from cb_vit.pp.normalisation import HALF, IMAGENET, Normalisation
from cb_vit.settings import check
from cb_vit.tools import cli
from cb_vit.tools import convert as tool_convert
from cb_vit.weights import export, export_run, open_weights
from cb_vit.weights.containers import FormatError, write_npz, write_safetensors
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.conversion import UNSEEN
from cb_vit.weights.dialects.timm import to_timm
from configs import debug

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

SIZES = dict(patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2)
MODELS = {
    "plain": dict(pool_type="tok", gelu="erf"),
    "cb": dict(pool_type="tok", context="cb", context_layers=(1,), layer_norm_eps=1e-3),
    "cb_s": dict(pool_type="gap", context="cb_s", gelu="erf", layer_scale=1e-4),
    "distilled": dict(pool_type="tok", distilled=True, context="cb", context_at="msa_end", gelu="erf"),
}
TARGETS = ["x.safetensors", "x.npz", "x"]


def convert(src, dst, model=None, **kw):
    """Returns the lines that it has to say as well."""
    lines = export.export(open_weights(src, "SRC", **model or {}), str(dst), **kw)
    return str(dst), "\n".join(lines)


def make(**kw):
    """A model and random parameters; no leaf is zero."""
    model, rng = Model(5, **SIZES | kw), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def unseen(model):
    return {name: value for name in UNSEEN if (value := getattr(model.config, name)) is not None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each model a folder of a run, made from an .npz, and its parameters."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name, kw in MODELS.items():
        model, params = make(**kw)
        write_npz(folder / f"{name}.npz", to_big_vision(params))
        run, _ = convert(folder / f"{name}.npz", folder / name, unseen(model), normalisation=IMAGENET)
        made[name] = run, model, params
    return made


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_for_bit_the_same(runs, tmp_path, name, target):
    run, model, params = runs[name]
    assert_same(cb_vit.load(run)[1], params)
    needed = unseen(model) if target.endswith(".npz") else {}
    there, _ = convert(run, tmp_path / target)
    back, _ = convert(there, tmp_path / "back", needed)
    for path, given in ((there, needed), (back, {})):
        found, loaded = cb_vit.load(path, **given)
        assert_same(loaded, params)
        of_training = dict(variant=None) | {
            name: getattr(found.config, name) for name in ("layer_scale", "init", "head_zeroinit")}
        assert found.num_classes == 5 and vars(found.config) == vars(model.config) | of_training


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_images_are_goes_along_or_is_told(runs, tmp_path, target):
    run, _, _ = runs["cb"]
    assert open_weights(run, "run").normalisation.same(IMAGENET)
    file, said = convert(run, tmp_path / target)
    found = open_weights(file, "file")
    if target.endswith(".npz"):  # such a file has no place for it; big_vision's own models have -1 to 1
        assert found.normalisation == HALF
        assert "cannot say how its pixels are normalised: (v - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)" in said
    else:
        assert found.normalisation.same(IMAGENET)
        assert found.pp.startswith("decode|resize_small(9, 'bicubic')|central_crop((8, 8))|vgg_value_range(")
        assert "note" not in said


def test_what_a_file_cannot_say_of_its_model_is_told_as_a_call_that_loads_it(runs, tmp_path):
    for name, (run, model, _) in runs.items():
        file, said = convert(run, tmp_path / f"{name}.npz")
        call, = re.findall(r"cannot say all of its model: (cb_vit\.load\(.*\))", said) or ["cb_vit.load(file)"]
        found, _ = eval(call, {"cb_vit": cb_vit, "file": file})
        assert unseen(found) == unseen(model)


def test_images_that_are_no_square(tmp_path):
    model, params = make(context="cb")
    params["pos_embedding"] = np.repeat(params["pos_embedding"], 2, axis=1)
    write_npz(tmp_path / "wide.npz", to_big_vision(params))
    with pytest.raises(FormatError, match="give grid"):
        convert(tmp_path / "wide.npz", tmp_path / "run")
    run, _ = convert(tmp_path / "wide.npz", tmp_path / "run", dict(grid=(2, 4), context="cb"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["image_shape"] == [8, 16, 3]
    file, said = convert(run, tmp_path / "wide.npz", overwrite=True)
    assert f"cb_vit.load({file!r}, context='cb', grid=(2, 4))" in said
    file, said = convert(run, tmp_path / "wide.safetensors")
    assert "cb_vit.load" not in said and "img_size=(8, 16)" in said
    assert_same(cb_vit.load(file)[1], params)


def test_registers_and_images_of_another_size(tmp_path):
    model, params = make(pool_type="tok", registers=3, gelu="erf")
    write_npz(tmp_path / "x.npz", to_big_vision(params))
    flags = ["--image_size=12", "--model=gelu=erf"]
    tool_convert.main(cli.parse(tool_convert, [str(tmp_path / "x.npz"), str(tmp_path / "run"), *flags]))
    run = open_weights(tmp_path / "run", "")
    assert run.grid == (3, 3) and builder.build(run.pp, "pp").image_size == (12, 12)
    assert run.model.config.registers == 3
    assert_same(run.read(), cb_vit.load(tmp_path / "x.npz", image_size=12, gelu="erf")[1])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["image_shape"] == [12, 12, 3]
    for wrong, error in (("9", "image_size: 9×9 is asked for, but "), ("big", "--image_size: expected pixels")):
        assert refusal(tool_convert, tmp_path / "run", tmp_path / "y", f"--image_size={wrong}").startswith(error)


def test_fixed_positions_are_written_out_where_they_must_be_learned(tmp_path):
    model, params = make(posemb="sincos2d")
    params = jax.tree.map(jnp.asarray, params)
    write_npz(tmp_path / "fixed.npz", to_big_vision(params))
    assert_same(cb_vit.load(convert(tmp_path / "fixed.npz", tmp_path / "same.npz")[0])[1], params)
    for target in ("x.safetensors", "run"):
        with pytest.raises(ConfigError, match=r"model: .* no positions of its own.*grid=14,14"):
            convert(tmp_path / "fixed.npz", tmp_path / target)
    file, _ = convert(tmp_path / "fixed.npz", tmp_path / "x.safetensors", dict(grid=(2, 2)))
    found, loaded = cb_vit.load(file)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    assert found.config.posemb == "learn"
    np.testing.assert_allclose(found.apply({"params": loaded}, images)[0], model.apply({"params": params}, images)[0],
                               atol=1e-5)


def test_the_normalisation_is_written_down_and_folded(runs, tmp_path):
    _, model, params = runs["plain"]
    bare, given = tmp_path / "bare.safetensors", dict(num_heads=2)
    write_safetensors(bare, to_timm(params, model.config))
    assert open_weights(bare, "", **given).normalisation is None
    with pytest.raises(ConfigError, match=r"^mean: .* does not say how its pixels were normalised, which a run must"):
        convert(bare, tmp_path / "run", given)
    with pytest.raises(ConfigError, match=r"^fold: .* does not say how its pixels were normalised; give mean and std"):
        convert(bare, tmp_path / "x.safetensors", given, fold=True)
    told, _ = convert(bare, tmp_path / "told.safetensors", given, normalisation=IMAGENET)
    assert open_weights(told, "").normalisation == IMAGENET

    pixels = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), jnp.float32)
    mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in IMAGENET)
    expected = model.apply({"params": jax.tree.map(jnp.asarray, params)}, (pixels - mean) / std)[0]
    for target in TARGETS:
        folded, said = convert(told, tmp_path / f"folded_{target}", fold=True)
        assert open_weights(folded, "").normalisation == HALF and "normalised" not in said
        found, loaded = cb_vit.load(folded, **{"gelu": "erf"} if target.endswith(".npz") else {})
        np.testing.assert_allclose(found.apply({"params": loaded}, 2 * pixels - 1)[0], expected, atol=1e-5)


def test_hugging_face_gets_its_cards(runs, tmp_path):
    run, model, params = runs["plain"]
    file, said = convert(run, tmp_path / "model.safetensors", names="huggingface")
    found, loaded = cb_vit.load(file)
    assert_same(loaded, params)
    assert found.config.gelu == "erf" and f"ViTForImageClassification.from_pretrained({str(tmp_path)!r})" in said
    assert open_weights(tmp_path, "").normalisation == IMAGENET and open_weights(tmp_path, "").format == "huggingface"
    card = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert card["crop_size"] == {"height": 8, "width": 8} and card["image_mean"] == list(IMAGENET[0])
    assert open_weights(tmp_path, "").pp == open_weights(run, "").pp
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"DST: there is a config\.json beside "):
        convert(run, file, names="huggingface")
    with pytest.raises(ConfigError, match="context: .* no place for Context Broadcasting; export to timm"):
        convert(runs["cb"][0], file, names="huggingface", overwrite=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_exported_run_begins_another_but_is_not_gone_on_with(runs, tmp_path):
    run, model, params = runs["cb"]
    config = debug.get_config("size=8")
    config.model_init, config.total_steps = run, 1
    config.model.update(variant=None, **SIZES, pool_type="tok", context="cb")
    config.model.context_layers = (1,)
    config.input.pp = "vgg_value_range|onehot(10)|keep('image', 'labels')"
    settings = check(config)
    experiment = startup.build(settings, tmp_path / "new")
    state, note = fit(experiment, open_init(settings))()
    state = jax.device_get(state.params)
    assert state.pop("head")["bias"].shape == (10,)  # of ten classes, begun anew
    assert note["model_init"]["path"] == run
    assert_same(state, {name: tree for name, tree in params.items() if name != "head"})
    config.model_init = None
    with pytest.raises(ConfigError, match=r"workdir: .* it is of another model or optimiser; use another workdir"):
        cb_vit.train_and_evaluate(config, run)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_replaced_untold_or_left_half_written(runs, tmp_path, monkeypatch, target):
    dst, _ = convert(runs["plain"][0], tmp_path / target)
    with pytest.raises(ConfigError, match=r"DST: .* is already there; choose another name, or overwrite it$"):
        convert(runs["cb"][0], dst)

    def fail(*args, **kw):
        raise KeyboardInterrupt

    def everything():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = everything()
    with monkeypatch.context() as patch:
        patch.setattr("cb_vit.weights.containers.safetensors.to_write", fail)
        patch.setattr("cb_vit.weights.containers.npz.to_write", fail)
        patch.setattr(export_run, "write_notes", fail)
        for path, overwrite in ((dst, True), (tmp_path / f"new_{target}", False)):
            with pytest.raises(KeyboardInterrupt):
                convert(runs["cb"][0], path, overwrite=overwrite)
            assert everything() == before and [path.name for path in tmp_path.iterdir()] == [target]
    convert(runs["cb_s"][0], dst, overwrite=True)
    assert "cls" not in cb_vit.load(dst)[1]
    assert [path.name for path in tmp_path.iterdir()] == [target]
    if target == "x":
        assert {path.name for path in (tmp_path / "x").iterdir()} == export.RUN


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("leads_to", ["an export", "nowhere", "itself"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(runs, tmp_path, target, leads_to):
    (tmp_path / "there").mkdir()
    inside, link = tmp_path / "there" / target, tmp_path / target
    if leads_to == "an export":
        convert(runs["plain"][0], inside)
    link.symlink_to(link if leads_to == "itself" else inside)
    before = {path: path.read_bytes() for path in inside.parent.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"DST: .* is already there; choose another name, or overwrite it$"):
        export.check_target(str(link), overwrite=False)
    assert link.is_symlink()
    convert(runs["cb"][0], link, overwrite=True)
    assert not link.is_symlink() and {path.name for path in tmp_path.iterdir()} == {"there", target}
    assert_same(cb_vit.load(link)[1], runs["cb"][2])
    assert {path: path.read_bytes() for path in inside.parent.rglob("*") if path.is_file()} == before


def test_links_to_what_is_not_replaced(runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "x.npz").symlink_to("run")
    os.mkfifo(tmp_path / "pipe.npz")
    for name, error in (("link", "holds more than an exported run, metrics.jsonl"), ("x.npz", "is a folder"),
                        ("pipe.npz", "is neither a file nor a folder"), ("run/metrics.jsonl/x", "cannot be|no folder")):
        with pytest.raises((ConfigError, Failure), match=error):
            convert(runs["cb"][0], tmp_path / name, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link", "x.npz", "pipe.npz"}


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(runs, tmp_path):
    dst, _ = convert(runs["plain"][0], tmp_path / "x")
    with pytest.raises(ConfigError, match="DST: .* cannot be written: No such file or directory"):
        with export_run._replacing_folder(str(dst), True) as folder:
            folder.rmdir()  # so that it cannot be moved
    assert_same(cb_vit.load(dst), cb_vit.load(runs["plain"][0]))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_run_that_was_trained_is_never_replaced(runs, tmp_path):
    for name in ("run", "x.npz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"DST: .* holds more than an exported run, metrics\.jsonl, and is not repl"):
        convert(runs["cb"][0], tmp_path / "run", overwrite=True)
    with pytest.raises(ConfigError, match="DST: .* is a folder; choose another name"):
        convert(runs["cb"][0], tmp_path / "x.npz", overwrite=True)


@pytest.mark.parametrize("dst, names, error", [
    ("x.pth", "timm", r"DST: x\.pth: no \.pth is written here; end it in \.safetensors for PyTorch, in \.npz for b"),
    ("x.npz", "huggingface", "names: 'huggingface' is for .safetensors files, not for x.npz"),
    ("x.safetensors", "tim", "names: unknown kind of names 'tim'; did you mean timm"),
    ("no/such/x.npz", "timm", "DST: no/such/x.npz: there is no folder "),
    ("hf://me/mine", "timm", "DST: hf://me/mine: nothing is put on the hub"),
    ("x.safetensors", "timm", "rep_size: timm has no layer before the head"),
])
def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch, dst, names, error):
    monkeypatch.chdir(tmp_path)
    write_npz("given.npz", to_big_vision(make(rep_size=True)[1]))
    with pytest.raises(ConfigError, match=error):
        convert("given.npz", dst, names=names)
    assert os.listdir() == ["given.npz"]


# As a user meets it.


def test_the_program(runs, tmp_path):
    run, _, params = runs["cb_s"]
    code, out, err = tool("convert", run, "x.safetensors", cwd=tmp_path)
    assert (code, err) == (0, ""), err
    assert_same(cb_vit.load(tmp_path / "x.safetensors")[1], params)
    lines = out.splitlines()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert lines[0] == f"read      step 0 of {run}: run" and f"wrote     x.safetensors: {count:,} parameters" in lines
    assert lines[2] == "images    2 × 2 patches; (v - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) of v from 0 to 1"
    assert any("register_forward_hook(lambda mlp, _, y: (y + mlp.context_scale * y.mean(1" in line for line in lines)
    assert "model.load_state_dict(load_file('x.safetensors'))" in lines


@pytest.mark.parametrize("args, error", [
    (["a.npz"], "DST: not given; --help says more"),
    (["a.npz", "x.npz", "--nmaes=timm"], "--nmaes: unknown flag; did you mean --names? --help lists them"),
    (["a.npz", "x.npz", "--names=tim"], "--names: unknown choice 'tim'; did you mean timm? Choices: timm, huggingface"),
    (["no/such.npz", "x.npz"], "SRC: no/such.npz does not exist"),
    (["a.npz", "x.npz", "--model=context"], "--model: expected NAME=VALUE, such as --model=context=cb, got 'context'"),
    (["a.npz", "x.npz", "--mean=0.5"], "--mean: is given together with --std"),
    (["a.npz", "x.npz", "--mean=0.5,0.5", "--std=1"], "--mean: expected a number from 0 to 1, or 3 with commas, got"),
    (["a.npz", "x.npz", "--mean=0", "--std=0"], "--std: must be above 0"),
    (["a.npz", "x.npz", "--ema"], "SRC: a.npz is no run of this project: only those keep an average ('ema')"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_refused(tmp_path, monkeypatch, args, error):
    monkeypatch.chdir(tmp_path)
    write_npz("a.npz", to_big_vision(make()[1]))
    assert refusal(tool_convert, *args).startswith(error)
    assert os.listdir() == ["a.npz"]


def test_a_mistake_ends_in_one_line(tmp_path):
    code, out, err = tool("convert", "no/such.npz", "x.npz", cwd=tmp_path)
    assert (code, out) == (1, "") and err.startswith("error: SRC: no/such.npz does not exist") and err.count("\n") == 1


def test_flags_say_what_a_file_does_not(tmp_path):
    arrays = {name.replace("params/", "params/img/"): array for name, array in to_big_vision(make()[1]).items()}
    write_npz(tmp_path / "a.npz", arrays | {"params/t": np.zeros(1, np.float32)})
    code, out, err = tool("convert", "a.npz", "run", "--prefix=img", "--model=context=cb", "--model=context_layers=0,",
                             "--mean=0.5", "--std=.25", cwd=tmp_path)
    assert (code, err) == (0, "") and "note      1 of the file's" in out
    found = open_weights(tmp_path / "run", "")
    assert found.normalisation.same(Normalisation((0.5,) * 3, (0.25,) * 3))
    assert (found.model.config.context, found.model.config.context_layers) == ("cb", (0,))


def test_help_shows_the_program_and_its_flags():
    code, out, err = tool("convert", "--help")
    assert code == 0 and not err and "convert [FLAG …] SRC DST\n\nWeights from one form into another" in out
    for flag in ("--ema", "--key", "--prefix", "--model", "--names", "--mean", "--std", "--fold", "--overwrite"):
        assert f"  {flag} " in out
