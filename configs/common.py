"""What config files share: reading their arguments, and the pieces of a preprocessing string."""
from __future__ import annotations

import ast
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Read `variant=S/16,context=cb`, what follows the colon in `--config=file.py:…`.

    Args:
        arg: the text after the colon, or None.
        **defaults: every argument the file takes, with its default; a value is read as the type of its
            default (as Python would write it, where the default is None).

    Raises:
        ValueError: an argument the file does not take, or a value of the wrong type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, _, text = (word.strip() for word in part.partition("="))
        if name not in defaults:
            raise ValueError(f"argument {name!r} in :{arg}: this file takes {', '.join(defaults) or 'none'}")
        values[name] = _value(name, text, defaults[name])
    return ml_collections.ConfigDict(values)


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


def base() -> ml_collections.ConfigDict:
    """A config with the keys that people override, not set: only declared keys can be, on the command line."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    for name, kind in _OVERRIDABLE.items():
        config[name] = placeholder(kind)
    config.update(_lengths("total", "log_training", "ckpt", "keep_ckpt"))
    config.input = ml_collections.ConfigDict(dict(
        batch_size=placeholder(int), pp=placeholder(str), num_workers=placeholder(int), num_threads=placeholder(int),
        prefetch=placeholder(int), repeats=placeholder(int), virtual_ranks=placeholder(int),
        skip_errors=placeholder(object)))  # a share, or True
    config.model = ml_collections.ConfigDict({name: placeholder(kind) for name, kind in _MODEL.items()})
    config.mixup = dict(mixup_alpha=placeholder(float), cutmix_alpha=placeholder(float), prob=placeholder(float),
                        switch_prob=placeholder(float), mode=placeholder(str), group_size=placeholder(int))
    config.random_erasing = dict(prob=placeholder(float), mode=placeholder(str), count=placeholder(int))
    config.ema = dict(decay=placeholder(float), warmup=placeholder(bool))
    config.distillation = dict(teacher=placeholder(str), type=placeholder(str), alpha=placeholder(float),
                               tau=placeholder(float))
    config.evals = ml_collections.ConfigDict()
    config.profile = dict(start_step=placeholder(int), num_steps=placeholder(int))
    config.wandb = {name: placeholder(str) for name in ("project", "name", "entity", "group", "mode")}
    config.model_load = dict(params=placeholder(str), dont_load=placeholder(tuple), posemb_resize=placeholder(str),
                             key=placeholder(str), prefix=placeholder(str))
    config.keep_best = dict(metric=placeholder(str), n=placeholder(int), mode=placeholder(str))
    return config


def schedule(**settings: Any) -> ml_collections.ConfigDict:
    """A learning-rate schedule, cosine unless told, whose lengths and ends can be overridden."""
    ends = dict(warmup_lr=placeholder(float), min_lr=placeholder(float))
    return ml_collections.ConfigDict({"decay_type": "cosine", **_lengths("warmup", "cooldown"), **ends, **settings})


def classification(**settings: Any) -> ml_collections.ConfigDict:
    """An evaluator of accuracy and loss, whose cadence `log_*` and `skip_errors` can be overridden."""
    block = {"type": "classification", "loss_name": "softmax_xent", **_lengths("log"),
             "skip_errors": placeholder(object), **settings}
    return ml_collections.ConfigDict(block)


def small(arg: ml_collections.ConfigDict, name: str, *, batch_size: int, pp: str, classes: int, test: str):
    """DeiT's recipe for small data sets trained from scratch: mixup, cutmix, RandAugment, erasing, smoothing, EMA.

    Repeated augmentation is off: an epoch would see a third of images that are few already.

    Args:
        arg: variant, context, epochs, data_dir, root.
        name: of the TFDS data set.
        batch_size: examples in a batch.
        pp: preprocessing up to RandAugment.
        classes: of the data.
        test: the split to evaluate on, as it is; `pp_fn` can be replaced.
    """
    config = base()
    config.total_epochs = arg.epochs
    config.num_classes = classes
    config.loss = "softmax_xent"
    config.label_smoothing = 0.1

    source = dict(name=name, data_dir=arg.data_dir, root=arg.root)
    config.input.data = data(split="train", **source)
    config.input.batch_size = batch_size
    config.input.pp = f"{pp}|randaug('rand-m9-mstd0.5-inc1')|{normalise(classes)}"
    config.mixup.update(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)
    config.random_erasing.update(prob=0.25, mode="pixel")

    config.model_name = "vit"
    config.model.update(variant=arg.variant, context=arg.context, pool_type="tok", drop_path=0.1, gelu="erf",
                        init="deit")

    config.lr = 1e-3
    config.weight_decay = 0.05
    config.grad_clip_norm = 1.0
    config.optax_name = "scale_by_adam"
    config.schedule = schedule(warmup_percent=0.05, warmup_lr=1e-6, min_lr=1e-5)
    config.ema.update(decay=0.9998, warmup=True)

    config.log_training_steps = 50
    config.ckpt_epochs = 5.0
    config.evals.val = classification(
        data=data(split=test, **source), log_epochs=5.0, pp_fn=f"decode|{normalise(classes)}")
    return config


def data(name: str, split: str, data_dir: str = "", root: str = "") -> dict[str, Any]:
    """A data set of TFDS by name, in `data_dir` if given; or, if `root` is, the image folders there."""
    source = dict(name="folder", root=root) if root else dict(name=name, data_dir=data_dir or None)
    return dict(**source, split=split, labels=placeholder(str))


def ranks(batch_size: int, most: int) -> int:
    """`input.virtual_ranks`: `most`, or as many fewer as leave each an even part of the batch, for mixing."""
    return next((n for n in range(most, 0, -1) if batch_size % (2 * n) == 0), 1)


def evaluation(size: int, crop_ratio: float, normalise: str) -> str:
    """Preprocessing of an evaluator: the middle of an image whose shorter side is size / crop_ratio, as in timm."""
    return f"decode|resize_small({int(size / crop_ratio)})|central_crop({size})|{normalise}"


def normalise(classes: int, how: str = "vgg_value_range") -> str:
    """The device's part of a preprocessing string."""
    return f"{how}|onehot({classes})|keep('image', 'labels')"


def _lengths(*names: str) -> dict[str, Any]:
    """Every unit of these durations, not set."""
    units = dict(steps=int, epochs=float, examples=int, percent=float)
    return {f"{name}_{unit}": placeholder(kind) for name in names for unit, kind in units.items()}


_OVERRIDABLE = dict(
    num_classes=int, allow_unused_classes=bool, loss=str, label_smoothing=float, grad_accum_steps=int, lr=float,
    lr_reference_batch=int, weight_decay=float, grad_clip_norm=float, grad_clip_adaptive=float, layer_decay=float,
    keep_last=int, resume=str, model_init=str, allow_changed_data=bool, optax_name=str, lamb_fused_qkv=bool,
    tensorboard=bool, plot=bool)
_MODEL = dict(
    variant=str, patch_size=int, width=int, depth=int, mlp_dim=int, num_heads=int, posemb=str, pool_type=str,
    rep_size=bool, dropout=float, head_zeroinit=bool, scan=bool, remat_policy=str, dtype_mm=str, context=str,
    context_at=str, context_layers=tuple, drop_path=float, drop_path_schedule=str, layer_scale=float, gelu=str,
    init=str, distilled=bool)
