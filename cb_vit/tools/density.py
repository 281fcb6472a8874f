"""How dense the attention of a model is, block by block, over images of yours; of several models, side by side.

    cb-vit density --weights=runs/digits scans/ --output=density
    cb-vit density --weights=runs/plain --weights=runs/cb --labels=none,CB photos/ --images=500 --output=density
    cb-vit density --weights=hf://timm/deit_tiny_patch16_224.fb_in1k photos/ --output=density

WEIGHTS is whatever `cb_vit.load` takes, with a head or without. Of a folder, every image in it and below is taken.
Written are LABEL/density.csv, with every block and head of a model, and for all of them density.png and
softmax_gradient.png; docs/density.md says what they show. What cannot be read is named on stderr; the rest goes on, and
the exit status is 1.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cb_vit import io
from cb_vit.analysis.attention_measures import DISTANCE, Density, by_block
from cb_vit.analysis.density import Row, as_csv, draw_density, pick
from cb_vit.analysis.density_sums import DensitySums
from cb_vit.analysis.softmax_gradient import draw_gradient
from cb_vit.config import ConfigError, Failure
from cb_vit.prediction import Images, Prediction, preprocessing
from cb_vit.texts import printable
from cb_vit.tools import cli, source
from cb_vit.tools.curves import short_names
from cb_vit.tools.predict import find_images, progress
from cb_vit.weights import Weights

LONGEST = 100  # characters of the name of a folder
TABLE, PICTURE, GRADIENT = "density.csv", "density.png", "softmax_gradient.png"
FILES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
COLUMNS = {"entropy / ln N": ("entropy_normalised", ".3f"), "effective tokens": ("effective_tokens", ".1f"),
           "distance, pixels": (DISTANCE, ".1f"), "rank": ("rank", ".1f")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Values of the flags of the same names; see `arguments`."""

    output: str
    images: int | None = None
    top_k: int = 5
    pp: str | None = None
    batch_size: int = 8
    overwrite: bool = False


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("IMAGE", nargs="+", help="Images, and folders of them.")
    parser.add_argument("--weights", action="append", metavar="WEIGHTS",
                        help="A model: a run's workdir, a file of weights, or hf://ORG/NAME; may be repeated.")
    parser.add_argument("--labels", metavar="LABEL,…", help="What the models are called. [the ends of their paths]")
    parser.add_argument("--output", help="Folder for the tables and pictures.")
    parser.add_argument("--images", type=cli.at_least_one, metavar="N",
                        help="So many of the images, evenly spread over their order. [all]")
    parser.add_argument("--top_k", type=cli.at_least_one, help="Number of keys whose attention is top_k_mass.")
    parser.add_argument("--pp", help="Preprocessing in place of the models', e.g. 'resize(256)|central_crop(224)'.")
    parser.add_argument("--batch_size", type=cli.at_least_one, help="Images at once.")
    parser.add_argument("--overwrite", action="store_true", help="Replace tables and pictures that are there.")
    parser.set_defaults(**dataclasses.asdict(Options(output="")))
    source.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    cli.required(args.weights and args.weights[0], "--weights", "runs/digits")
    cli.required(args.output, "--output", "density")
    labels = name_models(args.weights, args.labels)
    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    files = find_images(args.IMAGE)  # before weights are fetched
    check_outputs(options, labels, files)
    models = {label: source.open_source(args, path, "--weights")
              for label, path in zip(labels, args.weights, strict=True)}
    density(files, models, options)


def density(files: Sequence[str], models: Mapping[str, Weights], options: Options) -> dict[str, list[Row]]:
    """Measure, print and write the density of the attention of each model; returns the rows of `density.csv` of each.

    Args:
        files: paths of image files.
        models: the models by their labels.
        options: how, and where to.

    Raises:
        ConfigError: the options cannot work; raised before parameters are read.
        Failure: some files could not be read; raised at the end.
    """
    files = spread_evenly(files, options.images)
    images = {label: Images.of(weights, preprocessing(weights, options.pp)) for label, weights in models.items()}
    with io.writing(options.output):  # before time is spent
        io.as_path(options.output).mkdir(parents=True, exist_ok=True)
    found, broken = {}, 0
    for label, weights in models.items():
        for line in (f"{label}: {weights}, {weights.format}", *weights.notes,
                     f"images: {images[label].preprocess.text}"):
            cli.show(line, file=sys.stderr)
        sums, broken = measure(weights, images[label], files, options)
        found[label] = sums.rows()
        cli.show(*table(label, found[label]))
        _write(os.path.join(options.output, as_folder(label), TABLE), as_csv(found[label]).encode())
    title = f"attention over {len(files) - broken:,} images; k = {options.top_k}"
    _write(os.path.join(options.output, PICTURE), draw_density(found, title))
    _write(os.path.join(options.output, GRADIENT), draw_gradient(found))
    cli.show(f"wrote  {', '.join(outputs(options.output, models))}")
    if broken:
        raise Failure(f"{broken} of {len(files)} images could not be read")
    return found


def measure(weights: Weights, images: Images, files: Sequence[str], options: Options) -> tuple[DensitySums, int]:
    """The measures of a model over all images that can be read, and how many cannot; these are named on stderr.

    Raises:
        Failure: not one can be read, or the attention is not finite.
    """
    apply, params = weights.model.apply, weights.read()

    def forward(pixels: UInt8[Array, "b y x c"], reduce: Density | bool) -> tuple:
        return apply({"params": params}, images.preprocess.device({"image": pixels})["image"], attention=reduce)

    _, out = jax.eval_shape(lambda pixels: forward(pixels, False), jax.ShapeDtypeStruct((1, *images.shape), jnp.uint8))
    reduce = Density.of(out, images.shape[:2], options.top_k)
    sums, broken, batch_size = DensitySums(reduce), 0, min(options.batch_size, len(files))
    numbers = jax.jit(lambda pixels: by_block(forward(pixels, reduce)[1]["encoder"]))

    def one_by_one() -> Iterator[Prediction]:
        for batch, values in images.through(numbers, files, batch_size):
            _add(sums, batch, values)
            yield from batch

    for found in progress(one_by_one(), len(files), batch_size):
        if found.error:
            broken += 1
            cli.show(f"{found.path}: {found.error}", file=sys.stderr)
    if not sums.images:
        raise Failure(f"not one of {len(files)} images could be read")
    return sums, broken


def _add(sums: DensitySums, batch: Sequence[Prediction], values: Float[np.ndarray, "b l h s"]) -> None:
    read = [row for row, found in enumerate(batch) if not found.error]
    for row in read:
        if np.isnan(values[row]).any():
            raise Failure(f"{batch[row].path}: the model's attention is not finite; are these weights whole?")
    sums.add(values[read])


def table(label: str, rows: Sequence[Row]) -> Iterator[str]:
    """A line for each block of a model, of means over heads and images; all tokens are queries and keys."""
    columns = [pick(rows, measure) for measure, _ in COLUMNS.values()]
    names = [f"block {row.block}" for row in columns[0]]
    width = max(map(len, (printable(label), *names)))
    yield "  ".join([f"{printable(label):<{width}}", *COLUMNS])
    for name, block in zip(names, zip(*columns, strict=True), strict=True):
        cells = (f"{row.mean:>{len(heading)}{spec}}"
                 for row, (heading, (_, spec)) in zip(block, COLUMNS.items(), strict=True))
        yield "  ".join([f"{name:<{width}}", *cells])


def name_models(paths: Sequence[str], labels: str | None) -> list[str]:
    """What the models are called: as the flag `--labels` says, else by the ends of their paths that differ.

    Raises:
        ConfigError: two models are the same, or have one name, or there are other than so many names.
    """
    places = [os.path.realpath(os.path.expanduser(path)) if io.is_local(path) else path.rstrip("/") for path in paths]
    if labels is None:
        if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
            raise ConfigError("--weights", f"{twice} is given twice; give it once, or tell them apart by --labels")
        names = short_names(places)
        bare = [os.path.splitext(name)[0] if name.endswith(FILES) else name for name in names]
        names = bare if len(set(bare)) == len(bare) else names
    else:
        names = [name.strip() for name in labels.split(",")]
    if len(names) != len(paths) or not all(names):
        raise ConfigError("--labels", f"{labels!r} has to be {len(paths)} names, divided by commas: one for each "
                                      "--weights")
    folders = [as_folder(name).lower() for name in names]  # as file systems without capitals see them
    taken = [PICTURE, GRADIENT, *folders]
    for name, folder in zip(names, folders, strict=True):
        if taken.count(folder) > 1:
            raise ConfigError("--labels", f"what is called {name!r} would lie in {folder}/, where something else is "
                                          "written; give --labels that differ")
    return names


def as_folder(label: str) -> str:
    """The name of a model's folder; long ones by their ends, which differ sooner."""
    return re.sub(r"[^\w@+=. -]|^\.+", "_", label[-LONGEST:])


def outputs(folder: str, labels: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The paths of all that is written."""
    return [*(os.path.join(folder, as_folder(label), TABLE) for label in labels),
            *(os.path.join(folder, name) for name in (PICTURE, GRADIENT))]


def check_outputs(options: Options, labels: Sequence[str], files: Sequence[str]) -> None:
    """Refuse a folder in which not all can be written, before time is spent.

    Raises:
        ConfigError: at "--output".
    """
    folder = options.output
    io.check_address(folder, "--output")
    if io.is_local(folder) and (there := io.kind(os.path.expanduser(folder))) not in (None, io.FOLDER):
        raise ConfigError("--output", f"{folder} is {there}; give a folder")
    paths = outputs(folder, labels)
    here = {os.path.realpath(os.path.expanduser(path)) for path in paths if io.is_local(path)}
    if eaten := here & set(map(os.path.realpath, files)):
        raise ConfigError("--output", f"{min(eaten)} is one of the images; choose another folder")
    if not options.overwrite and (there := next(filter(io.is_taken, paths), None)):
        raise ConfigError("--output", f"{there} is already there; choose another folder, or give --overwrite")


def spread_evenly(files: Sequence[str], number: int | None) -> list[str]:
    """So many of the files, evenly spread; None, or more than there are: all."""
    number = len(files) if number is None else min(number, len(files))
    return [files[index * len(files) // number] for index in range(number)]


def _write(path: str, content: bytes) -> None:
    with io.writing(path):
        io.as_path(path).parent.mkdir(parents=True, exist_ok=True)
        io.write_atomic(path, content)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
