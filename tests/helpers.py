"""What several files of tests share."""
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from cb_vit import dist
from cb_vit.config import ConfigError, Failure, under
from cb_vit.datasets.core import DataError
from cb_vit.evaluators import common
from cb_vit.input_pipeline import Pipeline
from cb_vit.tools import cli
from cb_vit.train_state import TrainState
from cb_vit.tree import flatten_with_names
from cb_vit.workdir import write_notes

ROOT = pathlib.Path(__file__).parents[1]
TIMES = re.compile(r"uptime|core_hours|img/sec.*|data_wait|mfu|z/secs/.*|.*_gib")


def program(*args, cwd=ROOT, **env):
    """(exit status, stdout, stderr) of `python ARGS`."""
    result = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, text=True, capture_output=True, timeout=120,
                            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env)
    return result.returncode, result.stdout, result.stderr


def tool(name, *args, **kw):
    return program("-m", f"cb_vit.tools.{name}", *args, **kw)


def refusal(command, *args):
    """What a command says that cannot work, without a program for it; `command` is its module."""
    with pytest.raises((ConfigError, Failure)) as caught:
        command.main(cli.parse(command, list(map(str, args))))
    return " ".join(str(caught.value).split())


def records(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(folder):
    """All records, in the order of the file, without what a clock or the machine put in."""
    return [{name: value for name, value in record.items() if not TIMES.fullmatch(name)} for record in records(folder)]


def saved_steps(folder):
    path = folder / "checkpoints"
    return sorted(int(name) for name in os.listdir(path) if name.isdigit()) if path.exists() else []


def named(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten_with_names(tree)[0]}


def saved(folder, step):
    """Parameters and optimiser state of a checkpoint, read past our own code; leaves by name."""
    place = (folder / "checkpoints" / str(step)).resolve()
    with ocp.PyTreeCheckpointer() as reader:
        return named({item: reader.restore(place / item) for item in ("params", "opt")})


def assert_same(found, expected):
    """Two trees have the same leaves, bit for bit."""
    found, expected = named(found), named(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


# Evaluators.


class Numbered:
    """Example i is an image of one pixel that says i, and the labels one gives it."""

    class_names = None

    def __init__(self, labels, num_classes, broken=()):
        self.labels, self.num_classes, self.broken = labels, num_classes, broken

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"example {index} is broken")
        return {"image": np.array([[[index // 256, index % 256, 0]]], np.uint8), "label": self.labels[index], "id": "x"}


class Pictures(Numbered):
    """Example i is picture i, uint8 [i y x c]."""

    def __init__(self, pictures, labels, num_classes, broken=()):
        super().__init__(labels, num_classes, broken)
        self.pictures = pictures

    def __getitem__(self, index):
        return super().__getitem__(index) | {"image": self.pictures[index]}


def predict_numbered(state, images):
    """Logits of the example that the image names."""
    return state.params["logits"][images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]], {}


class After(Numbered):
    """Examples with the numbers that follow those of another source."""

    def __init__(self, first, labels, num_classes, broken=()):
        super().__init__(labels, num_classes, broken)
        self.first = first

    def __getitem__(self, index):
        number = self.first + index
        return super().__getitem__(index) | {"image": np.array([[[number // 256, number % 256, 0]]], np.uint8)}


def predict_features(state, images):
    """Features of the example that the image names, which are its logits as well."""
    found, _ = predict_numbered(state, images)
    return found, {"pre_logits": found, "encoder": {"pre_ln": found[:, None], "twice": 2 * found}}


def open_evaluator(kind, sources, predict, params, pp, devices=1, batch_size=8, ema=None, **settings):
    """(evaluator, state), on so many devices.

    `sources` are the data by the name of their block, first "data"; `settings` those of the evaluator.
    """
    mesh = dist.create_mesh([("data", -1)], devices=jax.devices()[:devices])
    config = common.read_evaluator(dict(
        type=kind, log_steps=5, data=dict(name="fake", split="test"), pp_fn=pp, batch_size=batch_size,
        prefix=f"{kind}/", num_workers=0, num_threads=2, prefetch=2) | settings, "val")
    sharding = dist.batch_sharding(mesh, "data")
    pipelines = {field: Pipeline(config, source, config.pp_fn, dist.local_rows(sharding, batch_size))
                 for field, source in sources.items()}
    with under("val"):
        evaluator = importlib.import_module(f"cb_vit.evaluators.{kind}").Evaluator(
            predict, config=config, pipeline=pipelines.pop("data"), sharding=sharding, **pipelines)
    state = TrainState(jnp.int32(7), params, (), jnp.asarray(True), ema)
    return evaluator, jax.device_put(state, dist.replicated(mesh))


def photographs(home, each):
    """`home` itself, with `flowers/CLASS/NUMBER.jpg`, so many of three classes that are told apart by brightness."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("daisy", "rose", "tulip")):
        (home / "flowers" / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(80 * label, 80 * label + 80, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(home / "flowers" / name / f"{number}.jpg")
    return home


# Runs that are over.


def write_run(folder, config, lines, total=20, classes=("cat", "dog"), fingerprint="f", **notes):
    """A run's folder as training leaves it, with these records."""
    said = {"format": 1, "num_classes": len(classes), "class_names": list(classes), "total_steps": total,
            "data": {name: {"examples": 100, "fingerprint": fingerprint} for name in ("train", *config["evals"])}}
    write_notes(folder, config, said | notes)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_records(value, total=20, **more):
    """Records of a run that ends at this accuracy, and was better before."""
    steps = (total // 2, total)
    return [{"step": step, "training_loss": 2 - step / total} for step in steps] + [
        {"step": step, "val/prec@1": value + (step < total) / 10, "val/loss": 1 - value, **more} for step in steps]


# Weights of other codebases.

D, F, H, P, GRID, DEPTH, CLASSES = 32, 64, 4, 4, 3, 2, 5


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def timm_shapes(tokens=1, depth=DEPTH, entries=None, **more):
    entries = tokens if entries is None else entries
    block = {"norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
             "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
             "mlp.fc1.weight": (F, D), "mlp.fc1.bias": (F,), "mlp.fc2.weight": (D, F), "mlp.fc2.bias": (D,)}
    shapes = {"pos_embed": (1, GRID**2 + entries, D), "patch_embed.proj.weight": (D, 3, P, P),
              "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,), "head.weight": (CLASSES, D),
              "head.bias": (CLASSES,), **{f"blocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}}
    shapes |= {"cls_token": (1, 1, D)} if tokens else {}
    if tokens == 2:
        shapes |= {"dist_token": (1, 1, D), "head_dist.weight": (CLASSES, D), "head_dist.bias": (CLASSES,)}
    return shapes | more


def hf_shapes(prefix="vit.", distilled=False, head=True, **more):
    block = {"layernorm_before": (D,), "layernorm_after": (D,), "attention.attention.query": (D, D),
             "attention.attention.key": (D, D), "attention.attention.value": (D, D), "attention.output.dense": (D, D),
             "intermediate.dense": (F, D), "output.dense": (D, F)}
    modules = {"embeddings.patch_embeddings.projection": (D, 3, P, P), "layernorm": (D,),
               **{f"encoder.layer.{i}.{k}": v for i in range(DEPTH) for k, v in block.items()}}
    tokens = ["cls_token"] + ["distillation_token"] * distilled
    shapes = {"embeddings.position_embeddings": (1, GRID**2 + len(tokens), D),
              **{f"embeddings.{token}": (1, 1, D) for token in tokens},
              **{f"{k}.weight": v for k, v in modules.items()}, **{f"{k}.bias": v[:1] for k, v in modules.items()}}
    shapes = {prefix + k: v for k, v in shapes.items()}
    heads = (["cls_classifier", "distillation_classifier"] if distilled else ["classifier"]) if head else []
    return shapes | {f"{h}.weight": (CLASSES, D) for h in heads} | {f"{h}.bias": (CLASSES,) for h in heads} | more


def dinov2_shapes(registers=0, **more):
    block = {"norm1": (D,), "norm2": (D,), "attention.attention.query": (D, D), "attention.attention.key": (D, D),
             "attention.attention.value": (D, D), "attention.output.dense": (D, D), "mlp.fc1": (F, D),
             "mlp.fc2": (D, F)}
    modules = {"embeddings.patch_embeddings.projection": (D, 3, P, P), "layernorm": (D,),
               **{f"encoder.layer.{i}.{k}": v for i in range(DEPTH) for k, v in block.items()}}
    return {"embeddings.cls_token": (1, 1, D), "embeddings.mask_token": (1, D),
            "embeddings.position_embeddings": (1, GRID**2 + 1, D),
            **({"embeddings.register_tokens": (1, registers, D)} if registers else {}),
            **{f"{k}.weight": v for k, v in modules.items()}, **{f"{k}.bias": v[:1] for k, v in modules.items()},
            **{f"encoder.layer.{i}.layer_scale{j}.lambda1": (D,) for i in range(DEPTH) for j in (1, 2)}} | more


def siglip_shapes(head=True, **more):
    block = {"layer_norm1": (D,), "layer_norm2": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D),
             "self_attn.v_proj": (D, D), "self_attn.out_proj": (D, D), "mlp.fc1": (F, D), "mlp.fc2": (D, F)}
    modules = {"embeddings.patch_embedding": (D, 3, P, P), "post_layernorm": (D,),
               **{f"encoder.layers.{i}.{k}": v for i in range(DEPTH) for k, v in block.items()}}
    shapes = {"embeddings.position_embedding.weight": (GRID**2, D)}
    if head:
        modules |= {"head.attention.out_proj": (D, D), "head.layernorm": (D,), "head.mlp.fc1": (F, D),
                    "head.mlp.fc2": (D, F)}
        shapes |= {"head.probe": (1, 1, D), "head.attention.in_proj_weight": (3 * D, D),
                   "head.attention.in_proj_bias": (3 * D,)}
    return shapes | {f"{k}.weight": v for k, v in modules.items()} | {
        f"{k}.bias": v[:1] for k, v in modules.items()} | more


def flax_shapes(attention="MultiHeadDotProductAttention_0", norm="LayerNorm_1", mlp="MlpBlock_0", **more):
    block = {"LayerNorm_0/scale": (D,), "LayerNorm_0/bias": (D,), f"{norm}/scale": (D,), f"{norm}/bias": (D,),
             **{f"{attention}/{part}/kernel": (D, H, D // H) for part in ("query", "key", "value")},
             **{f"{attention}/{part}/bias": (H, D // H) for part in ("query", "key", "value")},
             f"{attention}/out/kernel": (H, D // H, D), f"{attention}/out/bias": (D,),
             f"{mlp}/Dense_0/kernel": (D, F), f"{mlp}/Dense_0/bias": (F,),
             f"{mlp}/Dense_1/kernel": (F, D), f"{mlp}/Dense_1/bias": (D,)}
    return {"embedding/kernel": (P, P, 3, D), "embedding/bias": (D,), "Transformer/encoder_norm/scale": (D,),
            "Transformer/encoder_norm/bias": (D,), "head/kernel": (D, CLASSES), "head/bias": (CLASSES,),
            **{f"Transformer/encoderblock_{i}/{k}": v for i in range(DEPTH) for k, v in block.items()}} | more
