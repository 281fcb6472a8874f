"""The flags `--ema`, `--key`, `--prefix`, `--image_size` and `--model` of tools that read weights: what a path alone
does not say.
"""
from __future__ import annotations

import argparse
import ast
import dataclasses
from typing import Any

from cb_vit.config import ConfigError
from cb_vit.registry import UNPARSED
from cb_vit.weights import Weights, open_weights

# Arguments of `open_weights` that are not about the model, and how a command line has them.
OWN = {"key": "--key", "prefix": "--prefix", "params": "--ema", "image_size": "--image_size",
       "path": "--weights or SRC", "field": "--weights or SRC"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the flags of this module."""
    group = parser.add_argument_group("what a path alone does not say")
    group.add_argument("--ema", action="store_true", help="Of a run: the moving average of the parameters.")
    group.add_argument("--key", help="Of a PyTorch file: the entry that holds the weights, e.g. model_ema.")
    group.add_argument("--prefix", help="Of a file: take only the arrays under it, e.g. visual.trunk.")
    group.add_argument("--image_size", help="Pixels of the images, such as 224 or 224,320 (height, width), onto whose "
                                            "patches positions are resampled.")
    group.add_argument("--model", action="append", default=[], metavar="NAME=VALUE", help=(
        "What a file does not say of its model; may be repeated: --model=context=cb --model=num_heads=3"))


def given(args: argparse.Namespace) -> bool:
    """Whether any of the flags of this module was given."""
    return bool(args.ema or args.key or args.prefix or args.image_size or args.model)


def open_source(args: argparse.Namespace, path: str, field: str) -> Weights:
    """Look into a file or run, with what the flags of this module say.

    Args:
        args: arguments of the command.
        path: path of the file or run, as for `cb_vit.load`.
        field: flag or argument that names the path, for errors.

    Raises:
        ConfigError: part of a run is missing or cannot be read, or a flag does not fit.
        FormatError: a file cannot be read.
    """
    weights = open_weights(path, field, params="ema" if args.ema else "raw", key=args.key, prefix=args.prefix,
                           image_size=_image_size(args.image_size), **_keywords(args.model))
    return dataclasses.replace(weights, notes=(*weights.notes, *weights.other_size()))


def _image_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = [part.strip() for part in text.split(",")]
    if len(sides) > 2 or not all(side.isdecimal() and side.isascii() for side in sides):
        raise ConfigError("--image_size", f"expected pixels, such as 224 or 224,320 (height, width), got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _keywords(texts: list[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name.isidentifier():
            raise ConfigError("--model", f"expected NAME=VALUE, such as --model=context=cb, got {text!r}")
        if name in OWN:
            raise ConfigError("--model", f"{name!r} says nothing of a model; it is given as {OWN[name]}")
        try:
            found[name] = ast.literal_eval(value)
        except (TypeError, *UNPARSED):
            found[name] = value  # a word
    return found
