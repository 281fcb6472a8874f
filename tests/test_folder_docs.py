"""docs/folder.md and docs/notebook.ipynb as a reader follows them, on a small folder; only sizes are made small."""
import json
import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, photographs

import cb_vit
from cb_vit.pp.normalisation import Normalisation
from cb_vit.tools import cli
from cb_vit.tools.__main__ import COMMANDS
from cb_vit.weights.containers import write_safetensors
from cb_vit.weights.dialects.timm import to_timm
from cb_vit.weights.export import describe

PAGE = (ROOT / "docs" / "folder.md").read_text()
BLOCKS = re.findall(r"^```(python|)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SMALL = "root=flowers,size=32,epochs=1,batch_size=16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of six photographs, and a file of a small model of other classes."""
    folder = photographs(tmp_path_factory.mktemp("home"), 6)
    model = cb_vit.Model(7, "mu/16", pool_type="tok", gelu="erf")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    imagenet = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    write_safetensors(folder / "deit.safetensors", to_timm(jax.device_get(params), model.config),
                      describe(model.config, imagenet))
    return folder


@pytest.fixture
def home(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def run(command):
    """A command of the page in this process, with a small model and small images."""
    name, *args = shlex.split(command)[1:]
    small = SMALL + ("" if "init=" in command else ",variant=mu/16")
    args = [re.sub(r"root=flowers", small, arg).replace("hf://timm/deit_small_patch16_224.fb_in1k", "deit.safetensors")
            for arg in args]
    args += ["--config.plot=False"] * ("runs/scratch" in args[-1] and name == "train")  # pictures once are enough
    module = __import__(f"cb_vit.tools.{COMMANDS[name]}", fromlist=["main"])
    module.main(cli.parse(module, args))


def test_the_page_from_top_to_bottom_and_the_notebook(home, capsys):
    run_commands, names = [], {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block.replace("root=flowers", f"{SMALL},variant=mu/16"), "docs/folder.md", "exec"), names)
        for command in re.findall(r"^cb-vit .*$", block, re.MULTILINE) if not kind else ():
            run(command)
            run_commands.append(command.split()[1])
    assert run_commands == ["check-data", "inspect", "train", "train", "curves", "eval", *["predict"] * 3, "convert"]
    named = re.findall(r"`([\w/]+\.(?:png|csv|json))`", PAGE)
    assert len(named) >= 6
    for file in named:
        there = [home / file, home / "runs/flowers" / file, home / "runs/flowers/mistakes" / file]
        assert any(path.exists() for path in there), file
    assert (home / "both.png").exists() and (home / "looked_at").exists() and (home / "flowers.safetensors").exists()
    out = capsys.readouterr().out
    assert "flowers/rose/3.jpg" in out and names["val"].class_names == ("daisy", "rose", "tulip")
    follow_the_notebook(home)  # whose programs are compiled by now


def follow_the_notebook(home):
    """Every cell, in its order."""
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    names, sources = {}, ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for number, source in enumerate(sources):
        source = re.sub(r"root={root}.*?(?=\")", f"{SMALL},variant=mu/16", source)
        source = source.replace("metrics = ", "config.plot = False\nmetrics = ")
        exec(compile(source, f"notebook.ipynb, cell {number}", "exec"), names)
    assert 0 <= names["metrics"]["val/prec@1"] <= 1 and names["seen"] == 3 and jnp.isfinite(names["value"])
    assert (home / "runs" / "notebook" / "checkpoints").is_dir()


def test_every_command_is_on_some_page():
    pages = "".join(path.read_text() for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
    assert {name for name in COMMANDS if f"cb-vit {name}" not in pages} == set()
