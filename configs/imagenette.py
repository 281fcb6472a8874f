"""Imagenette, ten classes of ImageNet, from scratch with DeiT's augmentation.

    cb-vit train --config=imagenette --workdir=runs/imagenette
    cb-vit train --config=imagenette:root=/data/imagenette2-320 --workdir=runs/imagenette   # as downloaded

Accuracy and hours: unverified.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), epochs, size in pixels, data_dir of TFDS, or root of image folders
    (train, val)."""
    arg = c.parse_arg(arg, variant="Ti/16", context="cb", epochs=200.0, size=160, data_dir="", root="")
    return c.small(arg, "imagenette/320px-v2", classes=10, test="val" if arg.root else "validation",
                   crop=f"decode|inception_crop({arg.size})|flip_lr", evaluation=c.centre(arg.size, 0.875))
