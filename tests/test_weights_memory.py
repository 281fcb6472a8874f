"""What it takes to load a large file: little more than the file, on one device or in shards on many."""
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cb_vit.weights.containers import Tensor, write_npz, write_safetensors

ROOT = pathlib.Path(__file__).parents[1]
WIDTH, DEPTH, CLASSES, PATCHES = 768, 12, 1000, 196
LOAD = r"""
import re, sys
import jax
import numpy as np
import cb_vit
from cb_vit import sharding

small, large, ways = sys.argv[1], sys.argv[2], int(sys.argv[3])
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
place = (lambda shapes: sharding.place(shapes, [(".*", "fsdp(min_size_to_shard_mb=0)")], mesh)) if ways > 1 else None
# Not ru_maxrss, in which a child begins with the peak of its parent.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
cb_vit.load(small, place=place, num_heads=1)
before = peak()
_, params = cb_vit.load(large, place=place)
jax.block_until_ready(params)
held = [0] * ways
for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
        held[shard.device.id] += shard.data.nbytes
print(peak() - before, max(held))
"""


def timm_shapes(width, depth):
    block = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
             "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
             "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width),
             "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    return {"cls_token": (1, 1, width), "pos_embed": (1, PATCHES + 1, width),
            "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
            **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
            "norm.weight": (width,), "norm.bias": (width,), "head.weight": (CLASSES, width), "head.bias": (CLASSES,)}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measured as Linux tells it")
@pytest.mark.parametrize("ways", [1, 8])
@pytest.mark.parametrize("write", [write_safetensors, write_npz])
def test_the_peak_is_below_three_times_the_file(tmp_path, write, ways):
    """ViT-B/16, 346 MB."""
    for name, width, depth in (("small", 64, 1), ("large", WIDTH, DEPTH)):
        write(tmp_path / name, {key: Tensor(shape, np.dtype(np.float32), lambda shape=shape: np.ones(shape, np.float32))
                                for key, shape in timm_shapes(width, depth).items()})
    size = os.path.getsize(tmp_path / "large")
    assert 346e6 < size < 347e6
    result = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "large", str(ways)], cwd=ROOT, text=True,
        capture_output=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(ways)})
    assert result.returncode == 0, result.stderr
    peak, held = map(int, result.stdout.split())
    print(f"{write.__name__}, {ways} devices: peak {peak / size:.2f} of the file; a device holds {held / size:.3f}")
    assert 0.9 * size < peak < 3 * size  # below, something was not measured
    assert held < 1.05 * size / ways
