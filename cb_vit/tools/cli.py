"""What every program shares: the flags `--config` and `--workdir`, and errors in one line."""
from __future__ import annotations

import ast
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from cb_vit import config as config_lib
from cb_vit.config import ConfigError
from cb_vit.registry import suggest

FLAGS = flags.FLAGS
CONFIG_HELP = (
    "The experiment: a file with get_config(), e.g. configs/digits.py. Arguments of the file follow a colon, "
    "configs/vit_i1k.py:variant=S/16,context=cb. Any key it declares can be overridden: --config.lr=3e-4, "
    "--config.input.batch_size=512, --config.total_steps=1000. --config=list lists the files.")


def define(workdir: str | None = None) -> None:
    """Define the flags of a program; `workdir` is the help of `--workdir`, None where it has none."""
    config_flags.DEFINE_config_file("config", None, CONFIG_HELP, lock_config=True)
    if workdir:
        flags.DEFINE_string("workdir", None, workdir)


def run(main: Callable[[ml_collections.ConfigDict], None], usage: str) -> None:
    """Parse the command line and call `main(config)`; what the user can mend ends in one line and status 1.

    Args:
        main: the program.
        usage: its docstring, shown by `--help`.
    """
    sys.modules["__main__"].__doc__ = usage

    def guarded(argv: Sequence[str]) -> None:
        # absl has put its own handler in place by now; Orbax and JAX tell their news through it.
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        absl_logging.set_verbosity(absl_logging.WARNING)
        if len(argv) > 1:
            _fail(f"{argv[1]}: not an argument of this program; settings are written --config.key=value")
        try:
            if FLAGS.config is None:
                raise ConfigError("--config", "not given; for example --config=configs/digits.py, or --config=list")
            overridden = list(config_flags.get_override_values(FLAGS["config"]))
            config_lib.prefer_overrides(FLAGS.config, overridden)
            main(FLAGS.config)
        except ConfigError as error:
            _fail(error)
        except Exception as error:
            # These say all there is to know; anything else is a fault of the program and keeps its traceback.
            if type(error).__name__ in ("DataError", "NonFinite"):
                _fail(error)
            raise

    app.run(guarded, flags_parser=_parse)


def require_workdir() -> str:
    """The value of `--workdir`.

    Raises:
        ConfigError: it was not given.
    """
    if not FLAGS.workdir:
        raise ConfigError("--workdir", "not given; for example --workdir=runs/digits")
    return FLAGS.workdir


def _parse(argv: list[str]) -> list[str]:
    """absl's parsing, with ml_collections' errors turned into one line."""
    if "--config=list" in argv:
        print(list_configs(Path("configs")))
        sys.exit(0)
    sys.path.insert(0, os.getcwd())  # `configs.common`, for a config file of the user's own folder too
    try:
        return app.parse_flags_with_usage(argv)
    except SystemExit:
        raise
    except Exception as error:
        _fail(_explain(error, argv))


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for what went wrong while a config file was loaded or overridden."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    given = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "")
    path = given.split(":")[0]
    if not os.path.isfile(path):
        near = suggest(path, map(str, Path("configs").glob("*.py")))
        return f"--config={given}: no such file{near or ';'} --config=list lists them"
    if isinstance(error, AttributeError | KeyError | ValueError | TypeError) and (
            override := re.search(r"config\.([\w.]+)", text) or _first_undeclared(argv)):
        key = override if isinstance(override, str) else override[1]
        return f"config.{key}: cannot be set from the command line ({text}); {path} declares the keys that can"
    return f"{path}: {text}"


def _first_undeclared(argv: list[str]) -> str | None:
    return next((arg[len("--config."):].partition("=")[0] for arg in argv if arg.startswith("--config.")), None)


def list_configs(folder: Path) -> str:
    """A line for each config file in `folder`: its path, and the first line of its docstring."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body):
            lines.append(f"{str(path):<28}{(ast.get_docstring(tree) or '').splitlines()[0]}")
    return "\n".join(lines) or f"no config files in {folder}"


def _fail(message: object) -> None:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(1)
