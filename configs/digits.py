"""A small CB-ViT on scikit-learn's digits, 1 797 real 8×8 scans: the whole path in a minute or two on two cores.

    cb-vit train --config=digits --workdir=runs/digits
    cb-vit train --config=digits:context=none --workdir=runs/digits_plain

The data is prepared on first use. 360 images, a fixed seeded permutation's first, are the test split
(`cb_vit/datasets/digits.py` writes it down).

1 437 images are few even for so small a model: what it makes of them hangs on its first weights, on the order of the
batches and, by way of rounding, on the processor. Mixup and stochastic depth leave it less freedom, a lower learning
rate keeps its path calmer, and 90 epochs pay for both. `benchmarks/digits_seeds.py` measures the spread.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s)."""
    arg = c.parse_arg(arg, variant="nano/2", context="cb")
    config = ConfigDict()
    config.seed = 0
    config.total_epochs = 90.0

    data_dir = placeholder(str)  # one for both: config.evals follows --config.input.data.data_dir
    pixels = "value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
    # A pixel is an eighth of the image: shifts by one are about all the augmentation it bears.
    config.input = dict(data=dict(name="digits", split="train", data_dir=data_dir), batch_size=64,
                        pp=f"decode|random_crop(8, padding=1)|{pixels}")
    config.mixup = dict(mixup_alpha=0.4)

    config.model_name = "vit"
    config.model = dict(variant=arg.variant, context=arg.context, posemb="sincos2d", init="deit", drop_path=0.1)

    config.loss = "softmax_xent"
    config.label_smoothing = 0.1
    config.lr = 2e-3
    config.weight_decay = 0.05
    config.grad_clip_norm = 1.0
    config.optax_name = "scale_by_adam"
    config.schedule = dict(decay_type="cosine", warmup_percent=0.1)

    config.log_training_steps = 50
    config.ckpt_epochs = 20.0
    config.evals = dict(val=c.classification(
        data=dict(name="digits", split="test", data_dir=data_dir), log_epochs=10.0, pp_fn=f"decode|{pixels}"))
    return config
