"""Compiles mixup, cutmix and random erasing alone for a TPU topology, with no TPU at hand: FLOPs, bytes, cycles.

    pip install 'jax[tpu]'
    python benchmarks/augment_cost.py --topology=v4:2x2x1 --group_size=128

Prints one JSON line for each of: nothing, erasing, mixing, both, with DeiT's settings. In each, uint8 images become
float32 in [-1, 1], are augmented, and end as bfloat16, as in a training step. Figures are in `benchmarks/README.md`.
"""
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from cb_vit import augment, dist  # noqa: E402
from cb_vit.pp.ops_device import value_range  # noqa: E402

TOPOLOGY = flags.DEFINE_string("topology", "v4:2x2x1", "The slice, e.g. v4:2x2x1, v5e:4x8, v6e:4x4.")
BATCH = flags.DEFINE_integer("batch_size", 1024, "Images of a global batch.")
GROUP = flags.DEFINE_integer("group_size", 256, "Rows among which partners are found.")
MODE = flags.DEFINE_enum("mode", "batch", ["batch", "pair", "elem"], "What shares one draw.")
SIZE, CLASSES = 224, 1000
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def main(_):
    """Compile and report."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value).devices
    mesh = dist.create_mesh([("data", -1)], devices=devices)
    rows, images_here = dist.batch_sharding(mesh, "data"), BATCH.value / mesh.size
    mixup = augment.MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode=MODE.value)
    shapes = [jax.ShapeDtypeStruct((BATCH.value, *shape), dtype, sharding=rows) for shape, dtype in [
        ((SIZE, SIZE, 3), jnp.uint8), ((CLASSES,), jnp.float32), ((), jnp.bool_)]]
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=dist.replicated(mesh))

    for erasing, mixing in [(False, False), (True, False), (False, True), (True, True)]:
        def step(key, images, labels, valid, erasing=erasing, mixing=mixing):
            keys, images = jax.random.split(key), value_range(images)
            if erasing:
                images = augment.erase(keys[0], images, augment.ErasingConfig())
            if mixing:
                images, labels = augment.mix(keys[1], images, labels, valid, mixup, GROUP.value)
            return images.astype(jnp.bfloat16), labels

        compiled = jax.jit(step, out_shardings=(rows, rows)).lower(key, *shapes).compile()
        cost, text = compiled.cost_analysis(), compiled.as_text()
        print(json.dumps({
            "topology": TOPOLOGY.value, "devices": mesh.size, "batch": BATCH.value, "group": GROUP.value,
            "mode": MODE.value, "erasing": erasing, "mixing": mixing, "jax": jax.__version__,
            "mflop_per_image": round(cost["flops"] / images_here / 1e6, 1),
            "mb_accessed_per_image": round(cost["bytes accessed"] / images_here / 1e6, 2),
            "estimated_cycles_per_image": round(
                sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / images_here),
            "sent": [f"{kind} {shape}" for shape, kind in re.findall(
                rf"= \(?(\w+\[[\d,]*\])[^=]* ({COLLECTIVES})(?:-start)?\(", text)]}), flush=True)


if __name__ == "__main__":
    app.run(main)
