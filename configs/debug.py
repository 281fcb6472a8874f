"""Fake data and a tiny model: does everything run here? Seconds.

    cb-vit train --config=debug --workdir=runs/debug

The images are made up (`cb_vit/datasets/fake.py`), so the numbers mean nothing. All of the recipe is on.
"""
from ml_collections import ConfigDict

import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), size of the images in pixels."""
    arg = c.parse_arg(arg, variant="mu/4", context="cb", size=16)
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 20

    data = dict(name="fake", image_size=arg.size, num_classes=10)
    pixels = "value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
    config.input = dict(data=dict(data, split="train", num_examples=256), batch_size=32, repeats=2,
                        pp=f"flip_lr|{c.RANDAUG}|{pixels}")
    config.mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0)
    config.random_erasing = dict(prob=0.25)
    config.label_smoothing = 0.1
    config.ema = dict(decay=0.99, warmup=True)

    config.model_name = "vit"
    config.model = dict(variant=arg.variant, context=arg.context)

    config.lr = 1e-3
    config.schedule = dict(decay_type="cosine", warmup_percent=0.25)
    config.log_training_steps = 5
    config.ckpt_steps = 10
    config.evals = dict(val=c.classification(
        data=dict(data, split="test", num_examples=100), log_steps=10, pp_fn=pixels))
    return config
