"""CIFAR-10 from scratch, with DeiT's augmentation at the size of its images.

    cb-vit train --config=cifar10 --workdir=runs/cifar10
    cb-vit train --config=cifar10:context=none,root=/data/cifar10 --workdir=runs/cifar10_plain

Accuracy and hours: unverified.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), epochs, data_dir of TFDS, or root of image folders."""
    arg = c.parse_arg(arg, variant="Ti/4", context="cb", epochs=200.0, data_dir="", root="")
    return c.small(arg, "cifar10", classes=10, test="test", crop="decode|random_crop(32, padding=4)|flip_lr")
