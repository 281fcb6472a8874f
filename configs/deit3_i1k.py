"""DeiT-III on ImageNet-1k, 800 epochs: the recipe of arXiv 2204.07118, with or without context.

    cb-vit train --config=deit3_i1k:variant=B/16,context=cb --workdir=gs://BUCKET/deit3_b16_cb

Accuracy and hours: unverified here. DeiT-III reports 81.4, 83.8, 84.9 and 85.2 % top-1 at 224 pixels for S, B, L and H
without context (crop ratio 1.0, after fine-tuning at 224 where it trains smaller: `configs/finetune.py`).
Sizes, learning rates and stochastic depth are those of its README; H/14 trains at 154 pixels, the part of 160 that its
patches cover.
"""
import configs.common as c

# pixels in training, peak learning rate (LAMB's, not scaled with the batch), stochastic depth (constant over depth)
SIZES = {"S": (224, 4e-3, 0.05), "M": (224, 3e-3, 0.1), "B": (192, 3e-3, 0.2), "L": (192, 3e-3, 0.45),
         "H": (154, 3e-3, 0.6)}


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), epochs, size in pixels (0: as in the paper), simple_crop (its own
    crop, which DeiT-III has for ImageNet-21k), batch_size (lr does not follow it), classes, data_dir of TFDS, or root
    of image folders (train, val)."""
    arg = c.parse_arg(arg, variant="B/16", context="cb", epochs=800.0, size=0, simple_crop=False, batch_size=2048,
                      classes=None, data_dir="", root="")
    size, lr, drop_path = SIZES.get(arg.variant.partition("/")[0], SIZES["S"])
    size = arg.size or size
    crop = "simple_random_crop" if arg.simple_crop else "inception_crop"
    config = c.deit(arg, test="val" if arg.root else "validation", crop=f"decode|{crop}({size})|flip_lr",
                    augment="three_augment|color_jitter(0.3, 0.3, 0.3)", evaluation=c.centre(size, 1.0))
    config.loss = "bce"
    config.label_smoothing = 0.0
    config.input.virtual_ranks = c.ranks(arg.batch_size, 8)
    del config.random_erasing, config.ema
    config.model.update(drop_path=drop_path, drop_path_schedule="constant", layer_scale=1e-4)
    config.lr = lr
    del config.lr_reference_batch
    config.grad_clip_norm = 1.0
    config.optax_name = "scale_by_lamb"
    config.schedule.decay_type = "deit"
    config.keep_ckpt_epochs = 100.0
    return config
