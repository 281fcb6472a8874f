"""Fine-tuning from an earlier run or a file of weights: at a higher resolution, or on another data set.

    cb-vit train --config=finetune:init=runs/deit_s16,size=384 --workdir=runs/deit_s16_384
    cb-vit train --config=finetune:init=runs/deit_s16,dataset=oxford_flowers102,lr=1e-4,decay=cosine,epochs=100 \\
        --workdir=runs/flowers

The model is that of init, unless variant or context are given. Positions are resampled, a head of another size begins
anew, and the log says what was taken and what was not. The numbers are DeiT's for 384 pixels on ImageNet (arXiv
2012.12877): learning rate 5e-6 at batch 512, constant since its floor is as high, 30 epochs, next to no weight decay. A
new head wants more: lr=1e-4,decay=cosine. A folder of a few thousand images: `configs/folder.py`. Accuracy: unverified.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: init (a run's folder or a file of weights; required), variant, context, size in pixels, epochs, lr,
    decay, layer_decay (1: none), batch_size, dataset of TFDS, the number of classes where it is not the
    data's, the split to test on, data_dir, or root of image folders."""
    arg = c.parse_arg(arg, init="", variant=None, context=None, size=384, epochs=30.0, lr=5e-6, decay="constant",
                      layer_decay=1.0, batch_size=512, dataset="imagenet2012", classes=None, test="", data_dir="",
                      root="")
    if not arg.init:
        raise ValueError("argument init is not set: which run to begin from, as in :init=runs/deit_s16")
    test = arg.test or ("val" if arg.root else "validation" if arg.dataset == "imagenet2012" else "test")
    classes = 1000 if arg.dataset == "imagenet2012" else None
    config = c.deit(arg, name=arg.dataset, classes=classes, test=test,
                    crop=f"decode|inception_crop({arg.size})|flip_lr", evaluation=c.centre(arg.size, 0.875))
    config.model_init = arg.init
    config.input.repeats = 3 if arg.dataset == "imagenet2012" else 1
    config.lr = arg.lr
    config.layer_decay = arg.layer_decay
    del config.model.pool_type, config.model.gelu
    config.weight_decay = 1e-8
    config.schedule = dict(decay_type=arg.decay, warmup_epochs=min(5.0, arg.epochs / 6), warmup_lr=1e-6)
    del config.ema
    config.evals.val.log_epochs = 1.0
    return config
