"""Fake data and a tiny model: does everything run here? Seconds.

    python main.py --config=configs/debug.py --workdir=runs/debug

The images are made up (`cb_vit/datasets/fake.py`), so the numbers mean nothing. All of the recipe is on.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), size of the images in pixels."""
    arg = c.parse_arg(arg, variant="mu/4", context="cb", size=16)
    config = c.base()
    config.total_steps = 20

    config.input.data = dict(name="fake", split="train", num_examples=256, image_size=arg.size, num_classes=10)
    config.input.batch_size = 32
    config.input.repeats = 2
    config.input.pp = "flip_lr|randaug('rand-m9-mstd0.5-inc1')|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"

    config.mixup.update(mixup_alpha=0.8, cutmix_alpha=1.0)
    config.random_erasing.prob = 0.25
    config.label_smoothing = 0.1
    config.ema.update(decay=0.99, warmup=True)

    config.model_name = "vit"
    config.model.variant = arg.variant
    config.model.context = arg.context

    config.lr = 1e-3
    config.schedule = c.schedule(warmup_percent=0.25)
    config.log_training_steps = 5
    config.ckpt_steps = 10

    config.evals.val = c.classification(
        log_steps=10,
        data=dict(name="fake", split="test", num_examples=100, image_size=arg.size, num_classes=10),
        pp_fn="value_range(-1, 1)|onehot(10)|keep('image', 'labels')")
    return config
