"""The tools, each run as a user runs it."""
import json
import re

import pytest
from helpers import refusal, tool

from cb_vit import train_and_evaluate
from cb_vit.config import ConfigError
from cb_vit.tools import eval_only, inspect_config, source
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
    code, out, err = tool("eval_only", f"--workdir={workdir}")  # the run knows its own config
    assert code == 0, err
    printed = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    assert printed == {name: f"{metrics[name]:.4f}" for name in ("val/loss", "val/prec@1", "val/prec@5")}
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize("args, error", [
    (["--config=debug", "--workdir=/no/such"],
     "--workdir: /no/such/checkpoints does not exist; give the workdir of a run"),
    (["--workdir=/no/such"], "--config: not given, and /no/such has no config.json; for example --config=digits"),
    (["--config=debug"], "--workdir: not given")])
def test_eval_only_without_a_run(args, error):
    assert refusal(eval_only, *args).startswith(error)


def test_eval_only_on_another_model(finished):
    """What the command line says stands above what the run was trained with."""
    code, _, err = tool("eval_only", f"--workdir={finished[0]}", "--config.model.variant=nano/4")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: workdir: config.model.variant is 'mu/4' there and 'nano/4' here: checkpoint 3 in")


def test_inspect_config_counts_what_training_uses(finished):
    workdir, _ = finished
    code, out, err = tool("inspect_config", "--config=debug", "--config.total_epochs=3", "--compile", "--all",
                          "--speed=256", JAX_NUM_CPU_DEVICES="4")
    assert code == 0, err
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if re.search(r"\S  +\S", line))
    assert lines["steps"] == "24 of 32 images (8 a device), 3.00 epochs"  # 3 · 256 / 32
    assert lines["time"] == "768 images at 256 a second: 0:00:03, without evaluation"
    # mu/4 at 16 pixels by hand: patches 4·4·3·32 + 32, positions 16·32, one block, final norm, head.
    block = 4 * (32 * 32 + 32) + 4 * 32 + (32 * 128 + 128) + (128 * 32 + 32)
    total = f"{(4 * 4 * 3 * 32 + 32) + 16 * 32 + block + 2 * 32 + (32 * 10 + 10):,}"
    assert lines["model"].startswith(f"vit mu/4, context cb: {total} parameters, ") and lines["all"].split()[0] == total
    count, flops = re.match(r"([\d,]+) parameters, (\S+) GFLOP; 1 of them", lines["each block"]).groups()
    # Forward and backward of the matmuls are three times 2·n·(4·d² + 2·d·f) and of the attention 4·n²·d; the rest is
    # small beside them, if not nothing.
    n, d, f = 16, 32, 128
    by_hand = 3 * (2 * n * (4 * d * d + 2 * d * f) + 4 * n * n * d)
    assert count == f"{block:,}" and by_hand < 1e9 * float(flops) < 1.4 * by_hand
    assert "activations" in lines["XLA"] and "config.seed" not in out and lines["seed"] == "0"
    assert json.loads((workdir / "run.json").read_text())["model"]["depth"] == 1


def test_inspect_config_without_the_data(tmp_path):
    args = ["--config=vit_i1k:variant=Ti/16"]
    assert "--examples=1281167" in refusal(inspect_config, f"{args[0]},data_dir={tmp_path}")
    code, out, err = tool("inspect_config", *args, "--examples=1268355", TFDS_DATA_DIR=str(tmp_path))
    assert code == 0, err
    assert "111,477 of 1024 images" in out and "90.00 epochs" in out and "1,268,355 examples of 1,000 classes" in out
    assert len(out.splitlines()) <= 10


@pytest.mark.parametrize("name, flag", [("key", "--key"), ("prefix", "--prefix"), ("params", "--ema"), ("path", "SRC"),
                                        ("image_size", "--image_size")])
def test_model_takes_nothing_that_is_another_flags(name, flag):
    with pytest.raises(ConfigError, match=f"^--model: '{name}' says nothing of a model; it is given as .*{flag}"):
        source._keywords([f"{name}=x"])
    assert source._keywords(["num_classes=0", "channels=1", "context=cb"]) == dict(
        num_classes=0, channels=1, context="cb")


def test_image_size_is_a_number_or_two():
    for text, size in (("224", 224), ("224, 320", (224, 320)), (None, None)):
        assert source._image_size(text) == size
    for wrong in ("", "22x", "1,2,3", "224,", "-8", "1e3", "²"):
        with pytest.raises(ConfigError, match="^--image_size: expected pixels, such as 224 or 224,320"):
            source._image_size(wrong)
