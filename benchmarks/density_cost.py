"""What measuring the density of attention costs beside plain evaluation of the same model, in the same run.

    python benchmarks/density_cost.py
    python benchmarks/density_cost.py --variant=Ti/16 --batch_size=32 --rounds=9

Both sides classify the same random images: plain evaluation fetches the best class, density also every measure of
every block and head, and sums them up on the host. Rounds alternate. Seconds are of the wall clock; processor seconds
tell how far other work on the machine got in the way. Prints one JSON line.
"""
import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from cb_vit import Model  # noqa: E402
from cb_vit.analysis.attention_measures import Density, by_block  # noqa: E402
from cb_vit.analysis.density_sums import DensitySums  # noqa: E402

SIZE, TOP_K = 224, 5


def clocked(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall clock and of all processors."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="S/16", help="the model (default S/16)")
    parser.add_argument("--dtype_mm", default="float32", help="dtype of its matrix products (default float32)")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (default 16)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating repeats (default 7)")
    args = parser.parse_args()

    model = Model(1000, args.variant, pool_type="tok", init="deit", dtype_mm=args.dtype_mm)
    images = np.random.default_rng(0).normal(size=(args.batch_size, SIZE, SIZE, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    # As in a trained model, attention is not uniform: logits of a spread of about 1.
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    _, shapes = jax.eval_shape(lambda: model.apply({"params": params}, images))
    density = Density.of(shapes, (SIZE, SIZE), TOP_K)
    sums = DensitySums(density)

    @jax.jit
    def classes(params, images):
        return jnp.argmax(model.apply({"params": params}, images)[0], axis=-1)

    @jax.jit
    def numbers(params, images):
        logits, out = model.apply({"params": params}, images, attention=density)
        return jnp.argmax(logits, axis=-1), by_block(out["encoder"])

    sides = {"plain": lambda: jax.device_get(classes(params, images)),
             "density": lambda: sums.add(jax.device_get(numbers(params, images))[1])}
    for side in sides.values():
        side()  # compiles
    rounds = [{name: clocked(side) for name, side in sides.items()} for _ in range(args.rounds)]
    ratios = [[times["density"][clock] / times["plain"][clock] for times in rounds] for clock in range(2)]
    print(json.dumps({
        "model": args.variant, "dtype_mm": args.dtype_mm, "batch": args.batch_size, "rounds": args.rounds,
        "jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)),
        "ms_an_image": {name: round(1e3 * statistics.median(t[name][0] for t in rounds) / args.batch_size, 1)
                        for name in sides},
        **{f"{name}ratio": {"median": round(statistics.median(found), 3), "least": round(min(found), 3),
                            "greatest": round(max(found), 3)}
           for name, found in zip(("", "processor_"), ratios, strict=True)}}))


if __name__ == "__main__":
    main()
