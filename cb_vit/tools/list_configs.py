"""The configs that come with cb_vit, a line each, and those in a folder `configs` of your own.

    cb-vit configs
    cb-vit train --config=NAME:ARGUMENTS
"""
from __future__ import annotations

import argparse
import sys

from cb_vit.tools import cli, config_files


def arguments(parser: cli.Parser) -> None:
    """What the command takes: nothing."""


def main(args: argparse.Namespace) -> None:
    """Print them."""
    cli.show(*config_files.overview())


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
