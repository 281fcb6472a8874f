"""What config files share: reading their arguments, DeiT's recipe, and the pieces of a preprocessing string."""
from __future__ import annotations

import ast
from typing import Any

from ml_collections import ConfigDict

RANDAUG = "randaug('rand-m9-mstd0.5-inc1')"  # as DeiT writes it, in timm's language


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Read `variant=S/16,context=cb`, what follows the colon in `--config=file.py:…`.

    Args:
        arg: text after the colon; None: there is none.
        **defaults: default of every argument that the file takes; a value is read as the type of its
            default (as Python would write it, where the default is None).

    Raises:
        ValueError: an argument is none that the file takes, or its value is of the wrong type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, _, text = (word.strip() for word in part.partition("="))
        if name not in defaults:
            raise ValueError(f"argument {name!r} in :{arg}: this file takes {', '.join(defaults) or 'none'}")
        values[name] = _value(name, text, defaults[name])
    return ConfigDict(values)


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text in ("", "True", "true", "1"):
        return True
    if isinstance(default, bool) and text in ("False", "false", "0"):
        return False
    try:
        value = ast.literal_eval(text)
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        value = text
    if default is None or type(value) is type(default) or (isinstance(default, float) and isinstance(value, int)):
        return value
    raise ValueError(f"argument {name}={text}: expected {type(default).__name__}")


def deit(arg: ConfigDict, *, name: str = "imagenet2012", classes: int | None = 1000, test: str, crop: str,
         augment: str = RANDAUG, evaluation: str) -> ConfigDict:
    """DeiT's recipe (arXiv 2012.12877, table 9), of which other recipes are deltas.

    Args:
        arg: arguments of the file: variant, context, epochs, batch_size, data_dir, root, and classes if it has it.
        name: name of the data set in TFDS.
        classes: number of its classes; None: as many as the data has, as always with arg.root.
        test: split to evaluate on.
        crop: ops of training's preprocessing up to the augmentation.
        augment: ops of the augmentation.
        evaluation: ops of the evaluator's preprocessing up to normalising.
    """
    config = ConfigDict()
    config.seed = 0
    config.total_epochs = arg.epochs
    config.num_classes = arg.get("classes") or (None if arg.root else classes)
    config.loss = "softmax_xent"
    config.label_smoothing = 0.1

    source = dict(name=name, data_dir=arg.data_dir, root=arg.root)
    config.input = dict(
        data=data(split="train", **source), batch_size=arg.batch_size, repeats=3,
        virtual_ranks=ranks(arg.batch_size, 4), pp=f"{crop}|{augment}|{normalise(config.num_classes)}")
    config.mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)
    config.random_erasing = dict(prob=0.25, mode="pixel")

    config.model_name = "vit"
    config.model = dict(variant=arg.variant, context=arg.context, pool_type="tok", drop_path=0.1, gelu="erf",
                        init="deit", dtype_mm="bfloat16")

    config.lr = 5e-4
    config.lr_reference_batch = 512
    config.weight_decay = 0.05
    config.optax_name = "scale_by_adam"
    config.schedule = dict(decay_type="cosine", warmup_epochs=5.0, warmup_lr=1e-6, min_lr=1e-5)
    config.ema = dict(decay=0.99996)

    config.log_training_steps = 50
    config.ckpt_epochs = 1.0
    config.evals = dict(val=classification(
        data=data(split=test, **source), log_epochs=5.0, pp_fn=f"{evaluation}|{normalise(config.num_classes)}"))
    return config


def small(arg: ConfigDict, name: str, *, classes: int, test: str, crop: str, evaluation: str = "decode") -> ConfigDict:
    """The recipe for small data sets trained from scratch: DeiT's, with an even learning rate and a quicker average.

    Repeated augmentation is off: an epoch would see a third of images that are few already.

    Args:
        arg: arguments of the file: variant, context, epochs, data_dir, root.
        name, test, crop, evaluation: data set, split and ops, as for `deit`.
        classes: number of classes of the data.
    """
    config = deit(ConfigDict(dict(arg, batch_size=256)), name=name, classes=classes, test=test, crop=crop,
                  evaluation=evaluation)
    config.input.repeats = 1
    config.lr = 1e-3
    del config.lr_reference_batch
    config.grad_clip_norm = 1.0
    del config.schedule.warmup_epochs
    config.schedule.warmup_percent = 0.05
    config.ema = dict(decay=0.9998, warmup=True)
    config.ckpt_epochs = 5.0
    return config


def classification(**settings: Any) -> dict[str, Any]:
    """An evaluator of accuracy and loss."""
    return dict(type="classification", loss_name="softmax_xent", **settings)


def data(name: str, split: str, data_dir: str = "", root: str = "") -> dict[str, Any]:
    """A data set of TFDS by name, in `data_dir` if given; or, if `root` is, the image folders there."""
    source = dict(name="folder", root=root) if root else dict(name=name, data_dir=data_dir or None)
    return dict(**source, split=split)


def ranks(batch_size: int, most: int) -> int:
    """`input.virtual_ranks`: `most`, or as many fewer as leave each an even part of the batch, for mixing."""
    return next((n for n in range(most, 0, -1) if batch_size % (2 * n) == 0), 1)


def centre(size: int, crop_ratio: float, decode: str = "decode") -> str:
    """Preprocessing of an evaluator: the middle of an image whose shorter side is size / crop_ratio, as in timm."""
    return f"{decode}|resize_small({int(size / crop_ratio)})|central_crop({size})"


def normalise(classes: int | None, how: str = "vgg_value_range") -> str:
    """The device's part of a preprocessing string; None: as many classes as the data has."""
    return f"{how}|onehot{f'({classes})' if classes else ''}|keep('image', 'labels')"
