"""Throughput of DeiT's host recipe on one core, ours against timm's own transform, on the same JPEGs in the same run.

    pip install torch torchvision timm "pillow<13"
    python benchmarks/host_recipe.py --images=/data/imagenet/train/n01440764

`--images`: a folder (searched to the bottom) or a tar of JPEGs. timm's transform is `create_transform` with DeiT's
settings: crop, flip and RandAugment as ours, then the float part (to tensor, normalise, erase), which ours leaves to
the accelerator; timm is timed with the float part and without. Rounds are interleaved and the median is taken,
for other work on the machine comes and goes. Prints one JSON line.
"""
import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "parity")]

import conftest  # noqa: E402, F401  torchvision's operators
import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import create_transform  # noqa: E402

from cb_vit.pp.builder import build  # noqa: E402

RECIPE = "decode|inception_crop(224)|flip_lr|randaug('rand-m9-mstd0.5-inc1')"
DEIT = dict(input_size=224, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1)


def read_jpegs(path: Path, count: int) -> list[bytes]:
    """The first `count` files that end in .jpg or .jpeg, in any case."""
    def wanted(name: str) -> bool:
        return name.lower().endswith((".jpg", ".jpeg"))

    if path.is_dir():
        return [file.read_bytes() for file in sorted(path.rglob("*")) if wanted(file.name)][:count]
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if wanted(member.name)][:count]


def seconds(function: Callable[[bytes], object], files: list[bytes]) -> float:
    """Processor time for one file, averaged over all."""
    start = time.process_time()
    for file in files:
        function(file)
    return (time.process_time() - start) / len(files)


def ours_by_stage(files: list[bytes], rng: np.random.Generator) -> dict[str, float]:
    """Seconds a file for each op of the recipe, one op at a time over all files."""
    times = {}
    examples = [{"image": file} for file in files]
    for name, op in build(RECIPE, "recipe").host_ops:
        start = time.process_time()
        examples = [op(example, rng) for example in examples]
        times[name.split("(")[0]] = (time.process_time() - start) / len(files)
    start = time.process_time()
    for example in examples:
        np.asarray(example["image"])
    return {**times, "to_uint8": (time.process_time() - start) / len(files)}


def timm_by_stage(files: list[bytes], transform: Callable) -> dict[str, float]:
    """The same for timm's transform."""
    start = time.process_time()
    images = [timm_decode(file) for file in files]
    times = {"decode": (time.process_time() - start) / len(files)}
    for step in transform.transforms:
        start = time.process_time()
        images = [step(image) for image in images]
        times[type(step).__name__] = (time.process_time() - start) / len(files)
    return times


def timm_decode(file: bytes) -> Image.Image:
    """As timm's `ImageDataset` opens a file."""
    return Image.open(io.BytesIO(file), formats=["JPEG"]).convert("RGB")


def medians(rounds: list[dict[str, float]], scale: float = 1e3) -> dict[str, float]:
    """The median over the rounds for each key, in milliseconds."""
    return {key: round(statistics.median(times[key] for times in rounds) * scale, 3) for key in rounds[0]}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder or a tar of JPEGs")
    parser.add_argument("--count", type=int, default=200, help="how many of them (default 200)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved repeats (default 9)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = read_jpegs(args.images, args.count)
    if not files:
        parser.error(f"no JPEGs in {args.images}")
    preprocess, rng = build(RECIPE, "recipe"), np.random.default_rng(0)
    whole, uint8 = create_transform(**DEIT), create_transform(**{**DEIT, "re_prob": 0.0}, use_prefetcher=True)
    contestants = {
        "ours": lambda file: preprocess.host({"image": file}, rng),
        "timm": lambda file: whole(timm_decode(file)),
        "timm_without_float": lambda file: uint8(timm_decode(file)),
    }
    rounds, ours_stages, timm_stages = [], [], []
    for _ in range(args.rounds):
        rounds.append({name: seconds(function, files) for name, function in contestants.items()})
        ours_stages.append(ours_by_stage(files, rng))
        timm_stages.append(timm_by_stage(files, whole))
    print(json.dumps({
        "files": len(files), "mean_kb": round(sum(map(len, files)) / len(files) / 1e3, 1), "rounds": args.rounds,
        "timm_version": timm.__version__, "pillow": Image.__version__,
        "images_per_second": {name: round(1e3 / ms, 1) for name, ms in medians(rounds).items()},
        "ratio": round(statistics.median(times["timm"] / times["ours"] for times in rounds), 3),
        "ratio_without_float": round(statistics.median(
            times["timm_without_float"] / times["ours"] for times in rounds), 3),
        "ours_ms": medians(ours_stages), "timm_ms": medians(timm_stages)}))


if __name__ == "__main__":
    main()
