"""Weights from one form into another: files of timm, Hugging Face and big_vision, and runs of this project.

    python -m cb_vit.tools.convert runs/digits digits.safetensors
    python -m cb_vit.tools.convert hf://timm/deit_tiny_patch16_224.fb_in1k runs/deit_ti
    python -m cb_vit.tools.convert B_16.npz b16.safetensors --names=huggingface

SRC is whatever `cb_vit.load` takes. DST decides what is written: NAME.safetensors for timm and PyTorch, NAME.npz for
big_vision, and any other name for the folder of a run, which `config.model_init` and `eval_only --weights` take. What
DST cannot express is an error; what it cannot say is printed. DST is written whole or not at all.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from absl import flags

from cb_vit.config import ConfigError
from cb_vit.pp.normalisation import Normalisation
from cb_vit.tools import cli, source
from cb_vit.weights import Weights
from cb_vit.weights.export import NAMES, check_target, export

STYLE = flags.DEFINE_enum("names", "timm", list(NAMES), "Whose names a .safetensors file is to have.")
MEAN = flags.DEFINE_list("mean", None, "How pixels from 0 to 1 were normalised for SRC: a number, or one a channel. "
                                       "Needed where SRC does not say; stands above what it says.")
STD = flags.DEFINE_list("std", None, "See --mean.")
FOLD = flags.DEFINE_bool("fold", False, "Change the patch embedding so that DST takes pixels from -1 to 1.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace DST if it is there.")
flags.adopt_module_key_flags(source)  # for --help


def main(src: str, dst: str) -> None:
    """Convert, and say what was read, what was written, and how to use it."""
    check_target(dst, OVERWRITE.value)
    weights = source.open_source(src, "SRC")
    cli.show(*describe(weights))
    lines = export(weights, dst, names=STYLE.value, normalisation=_normalisation(weights), fold=FOLD.value,
                   overwrite=OVERWRITE.value)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.shapes))
    cli.show(f"wrote     {dst}: {count:,} parameters" + ", for pixels from -1 to 1" * FOLD.value)
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


def _normalisation(weights: Weights) -> Normalisation | None:
    """The normalisation that `--mean` and `--std` give; None: they are not given."""
    if MEAN.value is None and STD.value is None:
        return None
    if MEAN.value is None or STD.value is None:
        raise ConfigError("--mean", "is given together with --std")
    mean, std = _numbers("--mean", MEAN.value, weights.channels), _numbers("--std", STD.value, weights.channels)
    if min(std) == 0:
        raise ConfigError("--std", f"must be above 0, got {','.join(STD.value)}")
    return Normalisation(mean, std)


def _numbers(flag: str, given: list[str], channels: int) -> tuple[float, ...]:
    try:
        values = tuple(map(float, given))
    except ValueError:
        values = ()
    if len(values) not in (1, channels) or not all(0 <= value <= 1 for value in values):
        raise ConfigError(flag, f"expected a number from 0 to 1, or {channels} with commas, got {','.join(given)}")
    return values * channels if len(values) == 1 else values


if __name__ == "__main__":
    cli.run_plain(main, __doc__, "SRC", "DST")
