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
    except (ValueError, SyntaxError):
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
        prefetch=placeholder(int), skip_errors=placeholder(bool)))
    config.model = ml_collections.ConfigDict({name: placeholder(kind) for name, kind in _MODEL.items()})
    config.evals = ml_collections.ConfigDict()
    config.profile = dict(start_step=placeholder(int), num_steps=placeholder(int))
    config.wandb = {name: placeholder(str) for name in ("project", "name", "entity", "group", "mode")}
    config.keep_best = dict(metric=placeholder(str), n=placeholder(int), mode=placeholder(str))
    return config


def schedule(**settings: Any) -> ml_collections.ConfigDict:
    """A learning-rate schedule, cosine unless told, whose lengths can be overridden."""
    return ml_collections.ConfigDict({"decay_type": "cosine", **_lengths("warmup", "cooldown"), **settings})


def classification(**settings: Any) -> ml_collections.ConfigDict:
    """An evaluator of accuracy and loss, whose cadence `log_*` can be overridden."""
    block = {"type": "classification", "loss_name": "softmax_xent", **_lengths("log"), **settings}
    return ml_collections.ConfigDict(block)


def _lengths(*names: str) -> dict[str, Any]:
    """Every unit of these durations, not set."""
    units = dict(steps=int, epochs=float, examples=int, percent=float)
    return {f"{name}_{unit}": placeholder(kind) for name in names for unit, kind in units.items()}


_OVERRIDABLE = dict(
    num_classes=int, loss=str, label_smoothing=float, grad_accum_steps=int, lr=float, lr_reference_batch=int,
    weight_decay=float, grad_clip_norm=float, keep_last=int, resume=str, allow_changed_data=bool,
    tensorboard=bool, plot=bool)
_MODEL = dict(
    variant=str, patch_size=int, width=int, depth=int, mlp_dim=int, num_heads=int, posemb=str, pool_type=str,
    rep_size=bool, dropout=float, head_zeroinit=bool, scan=bool, remat_policy=str, dtype_mm=str, context=str,
    context_at=str, context_layers=tuple, drop_path=float, drop_path_schedule=str, layer_scale=float, gelu=str,
    init=str, distilled=bool)
