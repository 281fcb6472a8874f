"""Data of Hugging Face (parquet) or webdataset (tar), made once into a data set that configs name.

    cb-vit import-data ~/flowers --name=flowers --data_dir=~/tensorflow_datasets

SRC is a folder of *.parquet or *.tar files, or one of them. Splits are called as the files say (train-00000-of-00002),
and are train where they do not say. Images, their order and the names of classes stay as they are. The data set is
written whole or not at all, as array_record with TFDS's description; at the end stands the block for a config.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm

from cb_vit.config import ConfigError, at
from cb_vit.datasets import check_source, open_source
from cb_vit.datasets.contents import DataError, describe
from cb_vit.datasets.core import KINDS
from cb_vit.datasets.importing import block_of, import_data, open_incoming
from cb_vit.datasets.incoming import Example, read_classes
from cb_vit.datasets.preparing import check_target
from cb_vit.datasets.tfds import default_data_dir
from cb_vit.io import is_local
from cb_vit.pp.images import check_encoded
from cb_vit.texts import first_few
from cb_vit.tools import cli


def arguments(parser: cli.Parser) -> None:
    """What the command takes."""
    parser.add_argument("SRC", help="What is read: a folder of .parquet or .tar files, or one of them.")
    parser.add_argument("--name", help="What the data set is to be called in configs.")
    parser.add_argument("--data_dir", help="Folder of prepared data sets, which DIR/NAME goes into; by default "
                                           "$TFDS_DATA_DIR, or ~/tensorflow_datasets.")
    parser.add_argument("--classes", metavar="FILE", help="Names of the classes, one a line, in the order of their "
                                                          "numbers; stands above what SRC says.")
    parser.add_argument("--image_key", metavar="KEY", help="The column of images; in tar files their extension.")
    parser.add_argument("--label_key", metavar="KEY", help="The column of labels; in tar files cls, txt or a key of "
                                                           "the JSON.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier import of this name.")


def main(args: argparse.Namespace) -> None:
    """Import, and say how the data is used."""
    name = cli.required(args.name, "--name", "flowers")
    if not name.isidentifier() or not name.islower() or not name.isascii():
        raise ConfigError("--name", f"is made of small letters, digits and _, got {name!r}")
    if name in KINDS:
        raise ConfigError("--name", f"{name!r} is a kind of data; choose another name")
    with at("--name"):
        check_source(block_of(name, "", "train"), "")
    data_dir = os.path.expanduser(args.data_dir or default_data_dir())
    if not is_local(data_dir):
        raise ConfigError("--data_dir", f"is a folder on a local or mounted disk, got {data_dir!r}")
    home = os.path.join(os.path.abspath(data_dir), name)
    try:
        check_target(home, args.overwrite)
        classes = read_classes(args.classes) if args.classes else None
        incoming = open_incoming(args.SRC, args.image_key, args.label_key)
        for split, files in incoming.splits.items():
            cli.show(f"read      {split}: {first_few(map(os.path.basename, files), 3)}")
        import_data(incoming, home, classes, check_encoded, _progress)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror or error}") from None
    cli.show(f"wrote     {home}")
    for split in incoming.splits:
        block = block_of(name, os.path.dirname(home), split)
        cli.show(*(f"data      {line}" for line in describe(split, open_source(block, "data"))))
        cli.show(f"config    data=dict({', '.join(f'{key}={value!r}' for key, value in block.items())})")


def _progress(split: str, count: int, examples: Iterator[Example]) -> Iterator[Example]:
    """The examples as they pass; on a terminal with a bar."""
    return iter(tqdm(examples, split, count, file=sys.stderr, disable=not sys.stderr.isatty(), unit=" images"))


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
