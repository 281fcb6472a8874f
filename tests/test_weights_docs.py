"""docs/weights.md as a reader runs it, on small stand-ins of the files it names; what needs a network is left out."""
import importlib.util
import json
import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, H, dinov2_shapes, program, random, siglip_shapes
from PIL import Image

import cb_vit
from cb_vit.weights import open_weights
from cb_vit.weights.containers import write_npz, write_safetensors
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.timm import to_timm
from cb_vit.weights.export import export

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

PAGE = (ROOT / "docs" / "weights.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^cb-vit .*$", PAGE, re.MULTILINE)
SIZE = 32


def online(text):
    return "hf://" in text


def lacks(text):
    """What a snippet needs and is not here."""
    needed = (["torch"] if ".pth" in text or "torch" in text else []) + (["timm"] if "import timm" in text else [])
    return [name for name in needed if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")

    def make(classes=1000, **kw):
        model = cb_vit.Model(classes, **kw)
        return model, jax.device_get(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"])

    vit, params = make(variant="Ti/16", pool_type="tok", gelu="erf", scan=False)
    write_safetensors(folder / "vit.safetensors", to_timm(params, vit.config))
    if not lacks(".pth"):
        import torch
        state = {name: torch.from_numpy(array.copy()) for name, array in to_timm(params, vit.config).items()}
        torch.save({"model": state, "model_ema": state, "epoch": 3}, folder / "deit.pth")
    write_npz(folder / "B_16.npz", to_big_vision(params))
    write_safetensors(folder / "lightning.safetensors", {"loss.weight": params["cls"]} | {
        f"model.{name}": array for name, array in to_timm(params, vit.config).items()})
    (folder / "vit_hf").mkdir()
    export(open_weights(folder / "B_16.npz", ""), str(folder / "vit_hf" / "model.safetensors"), names="huggingface")
    _, params = make(10, variant="mu/16", context="cb")
    write_npz(folder / "digits.npz", to_big_vision(params))
    (folder / "runs").mkdir()
    export(open_weights(folder / "digits.npz", "", context="cb"), str(folder / "runs" / "digits"))
    (folder / "digits.npz").unlink()
    tower = {f"vision_model.{name}": shape for name, shape in siglip_shapes().items()}
    for name, shapes, card in (
            ("dinov2_small", dinov2_shapes(), dict(model_type="dinov2")),
            ("siglip", tower | {"text_model.embeddings.token_embedding.weight": (3, 3), "logit_scale": (1,)},
             dict(model_type="siglip", vision_config=dict(num_attention_heads=H)))):
        (folder / name).mkdir()
        write_safetensors(folder / name / "model.safetensors", random(shapes))
        (folder / name / "config.json").write_text(json.dumps(dict(num_attention_heads=H) | card))
    (folder / "scans").mkdir()
    Image.new("RGB", (SIZE, SIZE), "teal").save(folder / "scans" / "a.png")
    return folder


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet(files, monkeypatch, number):
    snippet = SNIPPETS[number]
    if online(snippet):
        pytest.skip("needs a network")
    if missing := lacks(snippet):
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(files)
    names = {}
    snippet = re.sub(r"\b(8|224), (8|224)(?=, [13]\))", f"{SIZE}, {SIZE}", snippet)
    snippet = snippet.replace("image_size=224", f"image_size={SIZE}")
    exec(compile(snippet, f"docs/weights.md, snippet {number}", "exec"), names)
    if "batches" in snippet:
        assert jnp.isfinite(names["value"])
    if "params" in names and "merge" not in snippet:
        model, params = names["model"], jax.device_get(names["params"])
        images = jnp.zeros((1, SIZE, SIZE, params["embedding"]["kernel"].shape[2]))
        assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(
            lambda: model.init(jax.random.key(0), images)["params"]))


@pytest.mark.parametrize("command", [
    command for command in COMMANDS if not online(command) and ("predict" not in command or "--attention" in command)])
def test_a_command(files, command):
    _, *args = shlex.split(command.replace("--config=digits", f"--config=debug:size={SIZE}"))
    code, out, err = program("-m", "cb_vit.tools", *args, cwd=files)
    assert code == 0, err
    if "predict" in command:  # one of them; `test_predict.py` has the flags of the others
        assert "scans/a.png" in out and (files / "looks" / "a.png").exists()
        return
    assert err == ""
    assert "val/prec@1" in out or "wrote     " in out


def test_the_page_is_read():
    assert len(SNIPPETS) >= 13 and len(COMMANDS) >= 7
