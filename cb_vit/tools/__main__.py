"""Vision Transformers with Context Broadcasting.

    cb-vit COMMAND …
    cb-vit COMMAND --help
    cb-vit --version

In a clone that is not installed: `python -m cb_vit.tools COMMAND …`.
"""
from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import cb_vit
from cb_vit.config import suggest
from cb_vit.tools import cli

COMMANDS = {  # and their modules
    "train": "train", "eval": "eval_only", "predict": "predict", "density": "density",
    "convert": "convert", "inspect": "inspect_config", "check-data": "check_data", "import-data": "import_data",
    "curves": "curves", "sweep": "sweep", "compare": "compare", "report": "report", "configs": "list_configs"}


def main() -> None:
    """Run the command that the first argument names."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        cli.show(*__doc__.rstrip().split("\n"), "", *overview())
    elif name == "--version":
        cli.show(f"cb_vit {cb_vit.__version__}")
    elif name in COMMANDS:
        cli.run(importlib.import_module(f"cb_vit.tools.{COMMANDS[name]}"), argv)
    else:
        cli.fail(f"{name}: no command{suggest(name, COMMANDS)} There are {', '.join(COMMANDS)}; --help says more")


def overview() -> Iterator[str]:
    """A line for each command: its name, and how its help begins. Read, not imported: JAX would take seconds."""
    for name, module in COMMANDS.items():
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_bytes())
        yield f"  {name:<12}{ast.get_docstring(tree).splitlines()[0]}"


if __name__ == "__main__":
    main()
