"""DeiT on ImageNet-1k, 300 epochs: the recipe of arXiv 2012.12877, with or without context.

    cb-vit train --config=deit_i1k:variant=S/16,context=cb --workdir=gs://BUCKET/deit_s16_cb
    cb-vit train --config=deit_i1k:variant=Ti/16,context=cb_s,epochs=100,root=/data/imagenet --workdir=…
    cb-vit train --config=deit_i1k:root=/data/pets,batch_size=128 --workdir=…
    cb-vit train --config=deit_i1k:teacher=runs/teacher --workdir=…   # distilled, hard labels

Accuracy and hours: unverified here. DeiT reports 72.2, 79.9 and 81.8 % top-1 for Ti, S and B without context (its own
evaluation, crop ratio 0.875, raw weights); runs of others are 0.3 to 0.5 apart.

Where the reference has a quirk, the default is the reference's, so that results compare, and the way out is named here:
the learning rate changes once an epoch, one epoch late (`schedule=cosine`: at every step); repeated augmentation is on
for all sizes (`repeats=1`: off). The average of the parameters is evaluated too, which DeiT does not do.
"""
import configs.common as c


def get_config(arg=None):
    """Arguments: variant, context (none, cb, cb_s), epochs, size in pixels, schedule (deit, cosine), repeats, teacher
    (a run's folder or a file of weights), batch_size, classes (where they are not the data's), data_dir of TFDS, or
    root of image folders (train, val).
    """
    arg = c.parse_arg(arg, variant="S/16", context="cb", epochs=300.0, size=224, schedule="deit", repeats=3,
                      teacher="", batch_size=1024, classes=None, data_dir="", root="")
    config = c.deit(arg, test="val" if arg.root else "validation",
                    crop=f"decode|inception_crop({arg.size})|flip_lr", evaluation=c.centre(arg.size, 0.875))
    config.input.repeats = arg.repeats
    config.schedule.decay_type = arg.schedule
    config.keep_ckpt_epochs = 50.0
    if arg.teacher:
        config.model.distilled = True
        config.distillation = dict(teacher=arg.teacher, type="hard", alpha=0.5, tau=1.0)
    return config
