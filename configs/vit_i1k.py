"""ViT on ImageNet-1k, 90 epochs: big_vision's recipe (arXiv 2205.01580), with or without context.

    cb-vit train --config=vit_i1k:variant=S/16,context=cb --workdir=gs://BUCKET/vit_s16_cb

Accuracy: unverified here. big_vision reports 76.5 % top-1 for S/16. Hours: unverified.
RandAugment is timm's, at the strength that is nearest: two ops an image, always, at magnitude 10, without Cutout, which
big_vision's has. Mixup is timm's too: λ is shared by 256 rows, and the partner is the group's row from the other end.
Weight decay is written AdamW's way, multiplied by the learning rate: big_vision's wd 1e-4 at lr 1e-3 is 0.1.
"""
from ml_collections import ConfigDict

import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), size in pixels, batch_size (lr does not follow it), classes,
    data_dir of TFDS, or root of image folders."""
    arg = c.parse_arg(arg, variant="S/16", context="cb", size=224, batch_size=1024, classes=None, data_dir="", root="")
    config = ConfigDict()
    config.seed = 0
    config.total_epochs = 90.0
    config.num_classes = arg.classes or (None if arg.root else 1000)
    config.loss = "softmax_xent"

    imagenet = dict(name="imagenet2012", data_dir=arg.data_dir, root=arg.root)
    normalise = c.normalise(config.num_classes, "value_range(-1, 1)")
    # big_vision's inception_crop begins at 5 % of the area; ours, like timm's, at 8 % unless told.
    config.input = dict(
        data=c.data(split="train[:99%]", **imagenet), batch_size=arg.batch_size,
        virtual_ranks=c.ranks(arg.batch_size, 4),
        pp=f"decode|inception_crop({arg.size}, area_min=5)|flip_lr|randaug('rand-m10-n2-p1')|{normalise}")
    config.mixup = dict(mixup_alpha=0.2)

    config.model_name = "vit"
    config.model = dict(variant=arg.variant, context=arg.context, rep_size=True, pool_type="gap", posemb="sincos2d",
                        dtype_mm="bfloat16")

    config.lr = 1e-3
    config.weight_decay = 0.1
    config.grad_clip_norm = 1.0
    config.optax_name = "scale_by_adam"
    config.optax = dict(mu_dtype="bfloat16")
    config.schedule = dict(decay_type="cosine", warmup_steps=10_000)

    config.log_training_steps = 50
    config.ckpt_steps = 1000
    config.keep_ckpt_steps = 10_000

    config.evals = {
        name: c.classification(data=c.data(split=split, **imagenet), log_epochs=2.0,
                               pp_fn=f"{c.centre(arg.size, 0.875)}|{normalise}")
        for name, split in (("minival", "train[99%:]"), ("val", "val" if arg.root else "validation"))}
    return config
