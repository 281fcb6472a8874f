"""`hf://` without a network: what is in the hub's cache is found there, and what is not is told."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import cb_vit  # noqa: E402
from cb_vit.weights.containers import open_file, write_safetensors  # noqa: E402
from cb_vit.weights.dialects.timm import to_timm  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
REVISION = "0" * 40
CARD = {"architecture": "vit_tiny_patch4_8", "num_classes": 3, "model_args": {"num_heads": 1}, "pretrained_cfg": {
    "mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 8, 8], "crop_pct": 0.8, "interpolation": "bilinear"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache as the hub's library leaves it after a download, and the logits of the model in it."""
    home = tmp_path_factory.mktemp("hub")
    snapshot = home / "models--somebody--vit" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(REVISION)
    model = cb_vit.Model(3, patch_size=4, width=64, depth=1, mlp_dim=32, num_heads=1, pool_type="tok", gelu="erf")
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 3))
    write_safetensors(snapshot / "model.safetensors", to_timm(jax.device_get(params), model.config))
    (snapshot / "config.json").write_text(json.dumps(CARD))
    image = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(1, 8, 8, 3)
    return home, model.apply({"params": params}, image)[0].tolist()


def offline(home, code, **how):
    environment = os.environ | {"HF_HUB_CACHE": str(home), "JAX_PLATFORMS": "cpu"} | (how or {"HF_HUB_OFFLINE": "1"})
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=120)


def test_a_repository_in_the_cache(cache):
    home, expected = cache
    done = offline(home, """
import json, numpy as np
from cb_vit import weights
for address in ("hf://somebody/vit", "hf://somebody/vit@main", "hf://somebody/vit/model.safetensors"):
    found = weights.open_weights(address, "path")
    image = np.linspace(-1, 1, 8 * 8 * 3, dtype=np.float32).reshape(1, 8, 8, 3)
    logits = found.model.apply({"params": found.read()}, image)[0]
    print(json.dumps([logits.tolist(), found.normalisation, found.pp]))
""")
    assert done.returncode == 0, done.stderr
    for logits, normalisation, pp in map(json.loads, done.stdout.splitlines()):
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)  # positions of the class token are folded
        assert normalisation == [[0.5] * 3, [0.25] * 3]
        assert pp == ("decode|resize_small(10, 'bilinear')|central_crop((8, 8))|"
                      "vgg_value_range((127.5, 127.5, 127.5), (63.75, 63.75, 63.75))")


def test_a_hub_out_of_reach_is_asked_once(cache):
    """Nobody listens at that port: what is in the cache is found, and of the rest it is told where to get it."""
    start = time.monotonic()
    done = offline(cache[0], """
from cb_vit import weights
print(weights.open_weights("hf://somebody/vit", "path").pp)
weights.open_weights("hf://somebody/else", "path")
""", HF_ENDPOINT="http://localhost:9")
    assert done.stdout.startswith("decode|") and "Retrying" not in done.stderr and time.monotonic() - start < 40
    assert done.stderr.splitlines()[-1].startswith(
        "cb_vit.weights.containers.files.FormatError: hf://somebody/else: is not in the hub's cache, and "
        "http://localhost:9 cannot be reached (")


@pytest.mark.parametrize("address", ["hf://somebody/else", "hf://somebody/vit/other.safetensors"])
def test_what_is_not_in_the_cache(cache, address):
    done = offline(cache[0], f"""
from cb_vit.weights.containers import FormatError
import cb_vit
try:
    cb_vit.load({address!r})
except FormatError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{address}: is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub. ")


def test_a_repository_in_several_files(cache):
    """As PyTorch's; and an index whose files lead elsewhere, which are not even asked for."""
    torch = pytest.importorskip("torch")
    home, expected = cache
    file = open_file(home / "models--somebody--vit" / "snapshots" / REVISION / "model.safetensors")
    arrays = {name: tensor.read() for name, tensor in file.tensors.items()}
    for name, shards in (("parts", ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
                         ("bad", ["../../x.bin", "x.bin"]), ("odd", [])):
        folder = home / f"models--somebody--{name}" / "snapshots" / REVISION
        folder.mkdir(parents=True)
        (folder.parents[1] / "refs").mkdir()
        (folder.parents[1] / "refs" / "main").write_text(REVISION)
        where = {key: shards[i % 2] for i, key in enumerate(sorted(arrays))} if shards else ["x"]
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        for shard in shards if name == "parts" else []:
            torch.save({key: torch.from_numpy(arrays[key]) for key in arrays if where[key] == shard}, folder / shard)
    done = offline(home, """
import json, numpy as np
from cb_vit.weights import containers
from cb_vit import weights
found = weights.open_weights("hf://somebody/parts", "path", num_heads=1)
image = np.linspace(-1, 1, 8 * 8 * 3, dtype=np.float32).reshape(1, 8, 8, 3)
print(json.dumps(found.model.apply({"params": found.read()}, image)[0].tolist()))
for name in ("bad", "odd"):
    try:
        weights.open_weights(f"hf://somebody/{name}", "path")
    except containers.FormatError as error:
        print(error)
""")
    assert done.returncode == 0, done.stderr
    logits, bad, odd = done.stdout.splitlines()
    np.testing.assert_allclose(json.loads(logits), expected, rtol=1e-4, atol=1e-6)
    assert "refers to '../../x.bin'; an index may name only files beside it" in bad and "no weight_map" in odd
