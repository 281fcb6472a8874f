"""The tools, each run as a user runs it."""
import json

import pytest
from helpers import tool

from cb_vit import train_and_evaluate
from cb_vit.config import ConfigError
from cb_vit.tools import source
from configs import debug


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = debug.get_config()
    config.total_steps, config.plot = 3, False
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_and_evaluate(config, workdir)


def test_eval_only_finds_what_training_found(finished):
    workdir, metrics = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    code, out, err = tool("eval_only", "--config=configs/debug.py", f"--workdir={workdir}")
    assert code == 0, err
    printed = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    assert printed == {name: f"{metrics[name]:.4f}" for name in ("val/loss", "val/prec@1", "val/prec@5")}
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize("args, error", [
    (["--workdir=/no/such"], "error: --workdir: /no/such/checkpoints does not exist; give the workdir of a run"),
    ([], "error: --workdir: not given")])
def test_eval_only_without_a_run(args, error):
    code, _, err = tool("eval_only", "--config=configs/debug.py", *args)
    assert code == 1 and err.startswith(error) and err.count("\n") == 1


def test_eval_only_on_another_model(finished):
    code, _, err = tool("eval_only", "--config=configs/debug.py", f"--workdir={finished[0]}",
                        "--config.model.variant=nano/4")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: workdir: config.model.variant is 'mu/4' there and 'nano/4' here: checkpoint 3 in")


def test_inspect_config_counts_what_training_uses(finished):
    workdir, _ = finished
    code, out, err = tool("inspect_config", "--config=configs/debug.py", "--config.total_epochs=3", "--compile",
                          JAX_NUM_CPU_DEVICES="4")
    assert code == 0, err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["steps"].split()[1:] == ["24", "(3.00", "epochs)"]  # 3 · 256 / 32
    assert lines["batch"].endswith("32 in all, 8 a device") or "8 a device" in out
    # mu/4 at 16 pixels by hand: patches 4·4·3·32 + 32, positions 16·32, one block, final norm, head.
    block = 4 * (32 * 32 + 32) + 4 * 32 + (32 * 128 + 128) + (128 * 32 + 32)
    assert f"{(4 * 4 * 3 * 32 + 32) + 16 * 32 + block + 2 * 32 + (32 * 10 + 10):,}" in lines["all"]
    assert "XLA: temporaries" in out and "XLA: FLOPs" in out
    assert json.loads((workdir / "run.json").read_text())["model"]["depth"] == 1


def test_inspect_config_without_the_data(tmp_path):
    args = ["--config=configs/vit_i1k.py:variant=Ti/16"]
    code, out, err = tool("inspect_config", *args, TFDS_DATA_DIR=str(tmp_path))
    assert code == 1 and "--examples=1281167" in err and err.count("\n") == 1
    code, out, err = tool("inspect_config", *args, "--examples=1268355", TFDS_DATA_DIR=str(tmp_path))
    assert code == 0, err
    assert "111,477 (90.00 epochs)" in out and "imagenet2012" in out


@pytest.mark.parametrize("name, flag", [("key", "--key"), ("prefix", "--prefix"), ("params", "--ema"), ("path", "SRC")])
def test_model_takes_nothing_that_is_another_flags(name, flag):
    with pytest.raises(ConfigError, match=f"^--model: '{name}' says nothing of a model; it is given as .*{flag}"):
        source._keywords([f"{name}=x"])
    assert source._keywords(["num_classes=0", "channels=1", "context=cb"]) == dict(
        num_classes=0, channels=1, context="cb")
