"""Compiles a config's train step for a TPU topology, with no TPU at hand: memory, FLOPs, bytes, collectives.

    pip install 'jax[tpu]'
    python benchmarks/compile_tpu.py --config=configs/vit_i1k.py:variant=S/16,context=cb --topology=v4:2x2x1

Prints one JSON line. Images are made up: only their shape matters. Figures measured this way are in
`benchmarks/README.md`.
"""
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from cb_vit import datasets, experiment  # noqa: E402
from cb_vit.model_init import with_model  # noqa: E402
from cb_vit.settings import check  # noqa: E402
from cb_vit.tools import cli  # noqa: E402

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def arguments(parser):
    """What the program takes."""
    parser.add_config()
    parser.add_argument("--topology", default="v4:2x2x1", help="The slice, e.g. v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4.")


def main(args):
    """Compile and report."""
    settings = with_model(check(cli.config_of(args)))
    fake = dict(name="fake", split="train", num_examples=1_281_167, image_size=max(settings.input.pp.image_size),
                num_classes=settings.input.pp.num_classes, encoded=True)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    run = experiment.build(settings, devices=devices, source=datasets.open_source(fake, "fake"))
    start = time.monotonic()
    with run.active_mesh():
        compiled = run.jit_train_step().lower(*run.step_shapes()).compile()
    seconds = time.monotonic() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    images = settings.input.batch_size / run.mesh.size
    found = Counter(re.findall(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text()))
    print(json.dumps({
        "topology": args.topology, "chips": run.mesh.size, "model": settings.model.variant,
        "context": settings.model.context, "batch": settings.input.batch_size, "jax": jax.__version__,
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "gflop_per_image": round(cost["flops"] / images / 1e9, 2),
        "mb_accessed_per_image": round(cost["bytes accessed"] / images / 1e6, 1),
        "collectives": dict(found), "compile_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
