"""What a model says of images, and where it looks.

    cb-vit predict --weights=runs/digits scan.png
    cb-vit predict --weights=hf://timm/deit_tiny_patch16_224.fb_in1k --classes=names.txt photos/ cat.jpg
    cb-vit predict --weights=runs/digits --format=json scans/ > predictions.jsonl
    cb-vit predict --weights=runs/digits --attention=looks --rollout scans/

WEIGHTS is whatever `cb_vit.load` takes. Of a folder, every image in it and below is taken. What cannot be read is named
on stderr; the rest goes on, and the exit status is 1.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from cb_vit import io, retry
from cb_vit.config import ConfigError, Failure
from cb_vit.datasets.listing import EXTENSIONS
from cb_vit.monitor.timing import Chrono, speed_text
from cb_vit.prediction import Prediction, Predictor, preprocessing
from cb_vit.texts import parse_json, printable
from cb_vit.tools import cli, source
from cb_vit.tools.attention_folder import AttentionFolder
from cb_vit.weights import Weights

logger = logging.getLogger(__name__)
QUIET = 10.0  # seconds before the first word on progress, and between two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Values of the flags of the same names; see `arguments`."""

    top: int = 5
    format: str = "table"
    classes: str | None = None
    pp: str | None = None
    batch_size: int = 32
    attention: str | None = None
    layers: str = "last"
    rollout: bool = False
    overwrite: bool = False


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("IMAGE", nargs="+", help="Images, and folders of them.")
    parser.add_argument("--weights", help="The model: a run's workdir, a file of weights, or hf://ORG/NAME.")
    parser.add_argument("--top", type=cli.at_least_one, help="How many classes to name.")
    parser.add_argument("--format", type=cli.one_of("table", "json"),
                        help="For people, or one JSON object a line: path, top.")
    parser.add_argument("--classes", help="Names of the classes: a file with one a line, or JSON of names.")
    parser.add_argument("--pp", help="Preprocessing in place of the model's, e.g. 'resize(256)|central_crop(224)'.")
    parser.add_argument("--batch_size", type=cli.at_least_one, help="Images at once.")
    parser.add_argument("--attention", help="Folder for pictures of the attention, a PNG for each image, "
                                              "and of several images an index.png.")
    parser.add_argument("--layers", help="Blocks in those pictures: last, all, or numbers from 0, e.g. 3,7.")
    parser.add_argument("--rollout", action="store_true", help="Attention rollout in those pictures too.")
    parser.add_argument("--overwrite", action="store_true", help="Replace pictures that are there.")
    parser.set_defaults(**dataclasses.asdict(Options()))
    source.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    path = cli.required(args.weights, "--weights", "runs/digits")
    files = find_images(args.IMAGE)  # before weights are fetched
    weights = source.open_source(args, path, "--weights")
    predict(files, weights, Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}))


def predict(files: Sequence[str], weights: Weights, options: Options) -> None:
    """Print what the model says of each file, and draw where it looks.

    Raises:
        ConfigError: the options cannot work; raised before parameters are read.
        Failure: some files could not be read; raised at the end.
    """
    preprocess = preprocessing(weights, options.pp)
    looks = _looks(files, options)
    layers = pick_layers(options.layers, weights.model.config.depth) if looks else None
    predictor = Predictor(weights, preprocess, options.top, layers, options.rollout)
    number = weights.model.num_classes
    names = read_names(options.classes, number) if options.classes else weights.class_names or [None] * number
    labels = [f"class {number}" if name is None else name for number, name in enumerate(names)]
    for line in (f"{weights}: {weights.format}, {number} classes", *weights.notes, f"images: {preprocess.text}"):
        cli.show(line, file=sys.stderr)

    width, broken = max(len(printable(file)) for file in files), 0
    batch_size = min(options.batch_size, len(files))
    for found in progress(predictor(files, batch_size), len(files), batch_size):
        if found.error:
            broken += 1
            cli.show(f"{found.path}: {found.error}", file=sys.stderr)
            continue
        lines = [json.dumps(as_json(found, names))] if options.format == "json" else as_table(found, labels, width)
        cli.show(*lines)
        if looks:
            looks.add(found, predictor.view, labels)
    if looks:
        looks.finish()
    if broken:
        raise Failure(f"{broken} of {len(files)} images could not be read")


def find_images(paths: Sequence[str]) -> list[str]:
    """Files as given, and those in folders by their extension; each once.

    They are sorted by name, those of a folder itself before those of the folders in it. A pipe or a device with the
    name of an image is left out, with a warning.

    Raises:
        ConfigError: a path does not exist or is neither file nor folder, or there is no image at all; raised at
            "arguments".
    """
    found: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError("arguments", f"{path} does not exist; give images, or folders of them")
        if not os.path.isdir(path):
            if not os.path.isfile(path):  # to open a pipe is to wait
                raise ConfigError("arguments", f"{path} is {io.DEVICE}; give images, or folders of them")
            found.append(path)
            continue
        for folder, below, files in os.walk(path):
            below[:] = sorted(name for name in below if name[0] != ".")
            images = [os.path.join(folder, name) for name in sorted(files)
                      if name.lower().endswith(EXTENSIONS) and name[0] != "."]
            for image in images:
                if os.path.exists(image) and not os.path.isfile(image):
                    logger.warning("left out: %s is %s", image, io.DEVICE)
                else:  # a link to what is not there is told where it is read
                    found.append(image)
    if not found:
        raise ConfigError("arguments", f"no images in {', '.join(paths)}; they end in {', '.join(EXTENSIONS)}")
    once: dict[str, str] = {}
    for path in found:
        once.setdefault(os.path.abspath(path), path)
    return list(once.values())


def as_json(found: Prediction, names: Sequence[str | None]) -> dict:
    """`{"path": …, "top": [{"class": 3, "name": "cat", "probability": 0.93}, …]}`; a name that is not known is null."""
    return {"path": found.path, "top": [
        {"class": number, "name": names[number], "probability": round(probability, 6)}
        for number, probability in zip(found.classes, found.probabilities, strict=True)]}


def as_table(found: Prediction, labels: Sequence[str], width: int) -> Iterator[str]:
    """A line for each class: path (in the first alone), probability, name; `width` is that of the longest path."""
    for row, (number, probability) in enumerate(zip(found.classes, found.probabilities, strict=True)):
        yield f"{'' if row else printable(found.path):<{width}}  {100 * probability:6.2f} %  {labels[number]}"


def read_names(path: str, num_classes: int) -> list[str]:
    """The names of the classes, in their order.

    Args:
        path: path of a file with one name a line, or JSON: a list, {"0": name, …} or {name: 0, …}; where an entry is a
            list, as in Keras' index of ImageNet, its last part is the name.
        num_classes: number of names that there must be.

    Raises:
        ConfigError: the file cannot be read, or holds other than so many names; raised at "--classes".
    """
    try:
        with io.open_regular(path) as file:
            data = file.read()
        text = data.decode("utf-8-sig")
        content = parse_json(data) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
        if isinstance(content, dict):
            pairs = [pair[::-1] if type(pair[1]) is int else pair for pair in content.items()]
            numbered = {int(number): name for number, name in pairs}
            content = [numbered[number] for number in range(len(pairs))]
        names = [name[-1] if isinstance(name, list) else name for name in content]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("an entry is no text")
    except OSError as error:
        raise ConfigError("--classes", f"{path}: {error.strerror}") from None
    except retry.PARSING as error:
        raise ConfigError("--classes", f"{path} holds neither one name a line nor JSON of names "
                                       f"({error!r:.200})") from None
    if len(names) != num_classes:
        raise ConfigError("--classes", f"{path} has {len(names)} names, the model {num_classes} classes")
    return [name.strip() for name in names]


def pick_layers(text: str, depth: int) -> tuple[int, ...]:
    """The numbers of the blocks that `--layers` names.

    Args:
        text: value of the flag.
        depth: number of the model's blocks.

    Raises:
        ConfigError: the text names no blocks of the model; raised at "--layers".
    """
    if text in ("last", "all"):
        return tuple(range(depth)) if text == "all" else (depth - 1,)
    numbers = [int(part) if part.strip().isdecimal() else depth for part in text.split(",")]
    if max(numbers) >= depth:
        raise ConfigError("--layers", f"expected last, all, or numbers from 0 to {depth - 1} divided by commas, "
                                      f"got {text!r}")
    return tuple(dict.fromkeys(numbers))


def _looks(files: Sequence[str], options: Options) -> AttentionFolder | None:
    """Where pictures of the attention go; None: none are asked for."""
    if options.attention is not None:
        return AttentionFolder(options.attention, files, options.overwrite)
    if options.layers != "last" or options.rollout or options.overwrite:
        raise ConfigError("--attention", "not given, and --layers, --rollout and --overwrite are about its pictures; "
                                         "for example --attention=looks")
    return None


def progress(predictions: Iterable[Prediction], total: int, batch_size: int) -> Iterator[Prediction]:
    """The predictions; where they take long, stderr hears how far they are."""
    chrono, said = Chrono(total, 1), time.monotonic()
    for done, found in enumerate(predictions, 1):
        yield found
        if done % batch_size:  # the images of a batch come all at once
            continue
        chrono.tick(done)
        if time.monotonic() - said > QUIET and done < total:
            said, speed, left = time.monotonic(), chrono.measure(done).get("img/sec"), chrono.eta(done)
            parts = [f"{done:,} of {total:,} images"]
            if speed and left is not None:  # the first batch compiles, and tells nothing of the others
                parts += [speed_text(speed), f"ETA {datetime.timedelta(seconds=round(left))}"]
            print(" | ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
