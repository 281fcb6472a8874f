"""Suite: ImageNet's test sets, val, ReaL, V2, -A, -R, Sketch, ObjectNet and -C, for models of its 1,000 classes.

    cb-vit eval --suite=robustness --data_dir=/data --weights=hf://timm/deit_tiny_patch16_224.fb_in1k --output=results
    cb-vit eval --suite=robustness:batch_size=256 --data_dir=/data --workdir=runs/deit

Each set is taken from where it lies in data_dir: prepared by TFDS, or else as image folders, as they are published.
What is not there is left out, which is said. Images are prepared as the model's own. Where the sets come from, how they
are laid out, and what each number means: docs/robustness.md.
"""
from ml_collections import ConfigDict

import configs.common as c


def get_config(arg=None):
    """Arguments: data_dir, batch_size."""
    arg = c.parse_arg(arg, data_dir="", batch_size=128)
    if not arg.data_dir:
        raise ValueError("argument data_dir is not set: give --data_dir, the folder of the data sets")

    def tfds(name, split, **more):
        return dict(name=name, split=split, data_dir=arg.data_dir, **more)

    def folder(*place):
        return dict(name="folder", root="/".join([arg.data_dir, *place]), split="all", whole=True)

    def splits(*place):
        return dict(name="folder", root="/".join([arg.data_dir, *place]), split="val")

    def measured(*blocks, **settings):
        # Image folders are read from a disk, TFDS's copies from a bucket as well.
        there = [block for block in blocks if "data_dir" in block or "://" not in arg.data_dir]
        return c.classification(data=dict(name="first_of", blocks=tuple(there)), batch_size=arg.batch_size,
                                optional=True, **settings)

    val = (tfds("imagenet2012:5.1.0", "validation", id_key="file_name"), splits("imagenet"), folder("val"))
    config = ConfigDict()
    config.num_classes = 1000
    config.evals = {"imagenet": measured(*val), "imagenet-real": measured(*val)}
    real = config.evals["imagenet-real"]
    real.data = dict(name="real", images=real.data, labels_file=f"{arg.data_dir}/real.json")
    for name, prepared, published in (
            ("matched-frequency", "matched-frequency", "matched-frequency"),
            ("threshold-07", "threshold-0.7", "threshold0.7"), ("top-images", "topimages", "top-images")):
        config.evals[f"imagenetv2-{name}"] = measured(
            tfds(f"imagenet_v2/{prepared}", "test"), folder(f"imagenetv2-{published}-format-val"))
    for name in ("a", "r"):
        config.evals[f"imagenet-{name}"] = measured(
            tfds(f"imagenet_{name}", "test"), folder(f"imagenet-{name}"), only_data_classes=True)
    if "://" not in arg.data_dir:
        config.evals["imagenet-c"] = dict(
            type="stored_corruptions", data=dict(name="first_of", blocks=val), root=f"{arg.data_dir}/imagenet-c",
            batch_size=arg.batch_size, optional=True)
    config.evals.objectnet = measured(folder("objectnet-1.0", "images"))
    config.evals.objectnet.data = dict(name="objectnet", images=config.evals.objectnet.data)
    config.evals["sketch"] = measured(tfds("imagenet_sketch", "test"), folder("sketch"))
    return config
