"""ViT on ImageNet-1k, 90 epochs: big_vision's recipe (arXiv 2205.01580), with or without context.

    python main.py --config=configs/vit_i1k.py:variant=S/16,context=cb --workdir=gs://BUCKET/vit_s16_cb

Accuracy: unverified here. big_vision reports 76.5 % top-1 for S/16 with the full recipe; this file has no
RandAugment and no mixup, which that recipe has, so expect less. Hours: unverified.
Weight decay is written AdamW's way, multiplied by the learning rate: big_vision's wd 1e-4 at lr 1e-3 is 0.1.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), data_dir of TFDS."""
    arg = c.parse_arg(arg, variant="S/16", context="cb", data_dir="")
    config = c.base()
    config.total_epochs = 90.0
    config.num_classes = 1000
    config.loss = "softmax_xent"

    data = dict(name="imagenet2012", data_dir=arg.data_dir or None)
    config.input.data = dict(**data, split="train[:99%]")
    config.input.batch_size = 1024
    normalise = "value_range(-1, 1)|onehot(1000)|keep('image', 'labels')"
    # big_vision's inception_crop begins at 5 % of the area; ours, like timm's, at 8 % unless told.
    config.input.pp = f"decode|inception_crop(224, area_min=5)|flip_lr|{normalise}"

    config.model_name = "vit"
    config.model.variant = arg.variant
    config.model.context = arg.context
    config.model.rep_size = True
    config.model.pool_type = "gap"
    config.model.posemb = "sincos2d"
    config.model.dtype_mm = "bfloat16"

    config.lr = 1e-3
    config.weight_decay = 0.1
    config.grad_clip_norm = 1.0
    config.optax_name = "scale_by_adam"
    config.optax = dict(mu_dtype="bfloat16")
    config.schedule = c.schedule(warmup_steps=10_000)

    config.log_training_steps = 50
    config.ckpt_steps = 1000
    config.keep_ckpt_steps = 10_000

    pp_eval = f"decode|resize_small(256)|central_crop(224)|{normalise}"
    for name, split, epochs in (("minival", "train[99%:]", 2.0), ("val", "validation", 2.0)):
        config.evals[name] = c.classification(data=dict(**data, split=split), pp_fn=pp_eval, log_epochs=epochs)
    return config
