"""The flags `--ema`, `--key`, `--prefix` and `--model` of tools that read weights: what a path alone does not say."""
from __future__ import annotations

import argparse
import ast
from typing import Any

from cb_vit.config import ConfigError
from cb_vit.registry import UNPARSED
from cb_vit.weights import Weights, open_weights

# Arguments of `open_weights` that are not about the model, and how a command line has them.
OWN = {"key": "--key", "prefix": "--prefix", "params": "--ema", "path": "--weights or SRC", "field": "--weights or SRC"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the flags of this module."""
    group = parser.add_argument_group("what a path alone does not say")
    group.add_argument("--ema", action="store_true", help="Of a run: the moving average of the parameters.")
    group.add_argument("--key", help="Of a PyTorch file: the entry that holds the weights, e.g. model_ema.")
    group.add_argument("--prefix", help="Of a file: take only the arrays under it, e.g. visual.trunk.")
    group.add_argument("--model", action="append", default=[], metavar="NAME=VALUE", help=(
        "What a file does not say of its model; may be repeated: --model=context=cb --model=num_heads=3"))


def given(args: argparse.Namespace) -> bool:
    """Whether any of the flags of this module was given."""
    return bool(args.ema or args.key or args.prefix or args.model)


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
    return open_weights(path, field, params="ema" if args.ema else "raw", key=args.key, prefix=args.prefix,
                        **_keywords(args.model))


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
