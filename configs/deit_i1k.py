"""DeiT on ImageNet-1k, 300 epochs: the recipe of arXiv 2012.12877, with or without context.

    python main.py --config=configs/deit_i1k.py:variant=S/16,context=cb --workdir=gs://BUCKET/deit_s16_cb
    python main.py --config=configs/deit_i1k.py:variant=Ti/16,context=cb_s,epochs=100,root=/data/imagenet --workdir=…
    python main.py --config=configs/deit_i1k.py:root=/data/pets,classes=37,batch_size=128 --workdir=…
    python main.py --config=configs/deit_i1k.py:teacher=runs/teacher --workdir=…   # distilled, hard labels

Accuracy and hours: unverified here. DeiT reports 72.2, 79.9 and 81.8 % top-1 for Ti, S and B without context (its own
evaluation, crop ratio 0.875, raw weights); runs of others are 0.3 to 0.5 apart.

Where the reference has a quirk, the default is the reference's, so that results compare, and the way out is named here:
the learning rate changes once an epoch, one epoch late (`schedule=cosine`: at every step); repeated augmentation is on
for all sizes (`repeats=1`: off). The average of the parameters is evaluated too, which DeiT does not do.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), epochs, size in pixels, schedule (deit, cosine), repeats, teacher
    (a run's folder or a file of weights), batch_size, classes, data_dir of TFDS, or root of image folders (train, val).
    """
    arg = c.parse_arg(arg, variant="S/16", context="cb", epochs=300.0, size=224, schedule="deit", repeats=3,
                      teacher="", batch_size=1024, classes=1000, data_dir="", root="")
    config = c.base()
    config.total_epochs = arg.epochs
    config.num_classes = arg.classes
    config.loss = "softmax_xent"
    config.label_smoothing = 0.1

    imagenet = dict(name="imagenet2012", data_dir=arg.data_dir, root=arg.root)
    config.input.data = c.data(split="train", **imagenet)
    config.input.batch_size = arg.batch_size
    config.input.repeats = arg.repeats
    config.input.virtual_ranks = c.ranks(arg.batch_size, 4)
    config.input.pp = (f"decode|inception_crop({arg.size})|flip_lr|randaug('rand-m9-mstd0.5-inc1')|"
                       f"{c.normalise(arg.classes)}")
    config.mixup.update(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)
    config.random_erasing.update(prob=0.25, mode="pixel")

    config.model_name = "vit"
    config.model.update(variant=arg.variant, context=arg.context, pool_type="tok", drop_path=0.1, gelu="erf",
                        init="deit", dtype_mm="bfloat16")
    if arg.teacher:
        config.model.distilled = True
        config.distillation.update(teacher=arg.teacher, type="hard", alpha=0.5, tau=1.0)

    config.lr = 5e-4
    config.lr_reference_batch = 512
    config.weight_decay = 0.05
    config.optax_name = "scale_by_adam"
    config.schedule = c.schedule(decay_type=arg.schedule, warmup_epochs=5.0, warmup_lr=1e-6, min_lr=1e-5)
    config.ema.update(decay=0.99996)

    config.log_training_steps = 50
    config.ckpt_epochs = 1.0
    config.keep_ckpt_epochs = 50.0
    config.evals.val = c.classification(
        data=c.data(split="val" if arg.root else "validation", **imagenet), log_epochs=5.0,
        pp_fn=c.evaluation(arg.size, 0.875, c.normalise(arg.classes)))
    return config
