"""Weights from one form into another: files of timm, Hugging Face and big_vision, and runs of this project.

    cb-vit convert runs/digits digits.safetensors
    cb-vit convert hf://timm/deit_tiny_patch16_224.fb_in1k runs/deit_ti
    cb-vit convert B_16.npz b16.safetensors --names=huggingface

SRC is whatever `cb_vit.load` takes. DST decides what is written: NAME.safetensors for timm and PyTorch, NAME.npz for
big_vision, and any other name for the folder of a run, which `config.model_init` and `cb-vit eval --weights` take. What
DST cannot express is an error; what it cannot say is printed. DST is written whole or not at all.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

import jax

from cb_vit.config import ConfigError
from cb_vit.pp.normalisation import Normalisation
from cb_vit.tools import cli, source
from cb_vit.weights import Weights
from cb_vit.weights.export import NAMES, check_target, export


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("SRC", help="What is read: a run, a file of weights, or hf://ORG/NAME.")
    parser.add_argument("DST", help="What is written.")
    parser.add_argument("--names", type=cli.one_of(*NAMES), default="timm",
                        help="Whose names a .safetensors file is to have: timm's, or huggingface.")
    parser.add_argument("--mean", help="How pixels from 0 to 1 were normalised for SRC: a number, or one a channel, "
                                       "with commas. Needed where SRC does not say; stands above what it says.")
    parser.add_argument("--std", help="See --mean.")
    parser.add_argument("--fold", action="store_true",
                        help="Change the patch embedding so that DST takes pixels from -1 to 1.")
    parser.add_argument("--overwrite", action="store_true", help="Replace DST if it is there.")
    source.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Convert, and say what was read, what was written, and how to use it."""
    check_target(args.DST, args.overwrite)
    weights = source.open_source(args, args.SRC, "SRC")
    cli.show(*describe(weights))
    lines = export(weights, args.DST, names=args.names, fold=args.fold, overwrite=args.overwrite,
                   normalisation=_normalisation(args.mean, args.std, weights.channels))
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.shapes))
    cli.show(f"wrote     {args.DST}: {count:,} parameters" + ", for pixels from -1 to 1" * args.fold)
    cli.show(*(part for line in lines for part in line.split("\n")))


def describe(weights: Weights) -> Iterator[str]:
    """What was read, in lines to print."""
    config = weights.model.config
    fields = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    given = ", ".join(f"{field.name}={value!r}" for field, value in fields if value != field.default)
    yield f"read      {weights}: {weights.format}"
    yield f"model     Model({weights.model.num_classes}, {given})"
    patches = f"{weights.grid[0]} × {weights.grid[1]} patches" if weights.grid else "of any size"
    known = weights.normalisation
    yield f"images    {patches}; " + (known.text if known else "how they are normalised is not known")
    yield from (f"note      {note}" for note in weights.notes)


def _normalisation(mean: str | None, std: str | None, channels: int) -> Normalisation | None:
    """The normalisation that `--mean` and `--std` give; None: they are not given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ConfigError("--mean", "is given together with --std")
    found = Normalisation(_numbers("--mean", mean, channels), _numbers("--std", std, channels))
    if min(found.std) == 0:
        raise ConfigError("--std", f"must be above 0, got {std}")
    return found


def _numbers(flag: str, given: str, channels: int) -> tuple[float, ...]:
    try:
        values = tuple(map(float, given.split(",")))
    except ValueError:
        values = ()
    if len(values) not in (1, channels) or not all(0 <= value <= 1 for value in values):
        raise ConfigError(flag, f"expected a number from 0 to 1, or {channels} with commas, got {given}")
    return values * channels if len(values) == 1 else values


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
