"""Fashion-MNIST from scratch, with DeiT's augmentation at the size of its images: minutes on a CPU.

    cb-vit train --config=fashion_mnist --workdir=runs/fashion_mnist
    cb-vit train --config=fashion_mnist:context=none,root=/data/fashion_mnist --workdir=runs/fashion_plain

Accuracy: 83.2 % top-1 after 30 epochs with CB, on two CPU cores (`docs/recipe.md`).
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), epochs, data_dir of TFDS, or root of the four files that
    it is published as."""
    arg = c.parse_arg(arg, variant="nano/4", context="cb", epochs=30.0, data_dir="", root="")
    config = c.small(arg, "fashion_mnist", classes=10, test="test", crop="decode|random_crop(28, padding=2)|flip_lr")
    config.model.dtype_mm = "float32"  # made for a CPU
    if arg.root:
        config.input.data.name = config.evals.val.data.name = "idx"
    return config
