"""Your own folder of images, ROOT/<class>/… or ROOT/train/<class>/… and ROOT/val/…, from scratch or from weights.

    cb-vit train --config=folder:root=flowers --workdir=runs/flowers
    cb-vit train --config=folder:root=flowers,init=hf://timm/deit_small_patch16_224.fb_in1k --workdir=runs/flowers
    cb-vit train --config=folder:root=flowers,init=runs/s16,size=160,epochs=10 --workdir=runs/flowers

For a few hundred to a few ten thousand images; classes and head come from the data. Where there is no folder `val`, a
tenth of each class is held out of `train` by a fixed rule, which run.json keeps. Photographs are turned as their EXIF
orientation says, as phones write it; other configs leave it, as DeiT and big_vision do. Up to 1 % of the files may be
unreadable: they are named and left out (`cb-vit check-data` finds them before).

From weights, which so few images want, everything of the model is as it is there (context too, unless it is given), the
head begins anew at zero, and lower blocks learn more slowly: layer decay 0.75 and AdamW at 1e-4 for a batch of 64, near
what MAE fine-tunes with (arXiv 2111.06377, table 9), without mixing, since the epochs are few. From scratch it is the
recipe of DeiT for a small model at 160 pixels. Accuracy: unverified.
"""
import configs.common as c

FROM_SCRATCH = dict(variant="Ti/16", context="cb", size=160, epochs=200.0, batch_size=128)
FINE_TUNING = dict(size=224, epochs=20.0, batch_size=64)  # variant and context as in the weights


def get_config(arg=None):
    """Arguments: root (required), init (a run, a file of weights or hf://ORG/NAME; empty: from scratch), variant (from
    scratch Ti/16, else as in init), context (none, cb, cb_s; from scratch cb, else as in init), size in pixels (224,
    from scratch 160), epochs (20, from scratch 200), batch_size (64, from scratch 128; the learning rate follows), val
    (the folder to evaluate on, where it is not called so), labels_file (a file that tells the classes of the images,
    where folders do not)."""
    arg = c.parse_arg(arg, root="", init="", variant=None, context=None, size=None, epochs=None, batch_size=None,
                      val="val", labels_file="")
    if not arg.root:
        raise ValueError("argument root is not set: the folder of the images, as in folder:root=/data/flowers")
    defaults = FINE_TUNING if arg.init else FROM_SCRATCH
    arg.update({name: value for name, value in defaults.items() if arg[name] is None}, data_dir="")
    decode = "decode(exif=True)"
    config = c.deit(arg, test=arg.val, crop=f"{decode}|inception_crop({arg.size})|flip_lr",
                    evaluation=c.centre(arg.size, 0.875, decode))
    val = config.evals.val
    for block in config.input, val:
        block.data.update(holdout=0.1 if arg.val == "val" else None, labels_file=arg.labels_file or None)
        block.skip_errors = True
    config.input.repeats = 1
    del config.ema
    config.grad_clip_norm = 1.0
    config.log_training_steps = 10
    config.evals.mistakes = dict(type="mistakes", data=val.data, pp_fn=val.pp_fn, skip_errors=True, log_percent=1.0)
    val.log_epochs = config.ckpt_epochs = max(1.0, arg.epochs / 20)
    config.lr_reference_batch = defaults["batch_size"]
    config.schedule = dict(decay_type="cosine", warmup_percent=0.1, warmup_lr=1e-6, min_lr=1e-6)
    if arg.init:
        config.model_init = arg.init
        config.lr, config.layer_decay = 1e-4, 0.75
        config.model.head_zeroinit = True
        del config.mixup, config.random_erasing, config.model.pool_type, config.model.gelu
    return config
