"""What every program shares: its command line, the flags `--config` and `--workdir`, and errors in one line."""
from __future__ import annotations

import ast
import functools
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import ml_collections
from absl import app, flags
from absl import logging as absl_logging

from cb_vit import io
from cb_vit.config import ConfigError, Failure
from cb_vit.overrides import lay_over, split
from cb_vit.registry import UNPARSED, suggest
from cb_vit.texts import printable

FLAGS = flags.FLAGS
CONFIG_HELP = (
    "The experiment: a file with get_config(), e.g. configs/digits.py. It is Python, and is executed: run none of "
    "strangers. Arguments of the file follow a colon, "
    "configs/vit_i1k.py:variant=S/16,context=cb. Any setting can be overridden, whether the file has it or not: "
    "--config.lr=3e-4, --config.input.batch_size=512, --config.total_steps=1000. --config=list lists the files.")


def define(workdir: str | None = None) -> None:
    """Define the flags of a program; `workdir` is the help of its flag `--workdir`, None where it has no such flag."""
    flags.DEFINE_string("config", None, CONFIG_HELP)
    if workdir:
        flags.DEFINE_string("workdir", None, workdir)
    for name in ("config", "workdir")[:2 if workdir else 1]:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # --help shows the flags of the program


def run(main: Callable[[dict[str, Any]], None], usage: str) -> None:
    """Parse the command line and call `main(config)`; what the user can mend ends in one line and status 1.

    Args:
        main: function that is the program; its config is the file's, with what the command line says laid over.
        usage: docstring of the program, shown by `--help`.
    """
    argv, overrides = split(sys.argv)

    def with_config(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise ConfigError(argv[1], "not an argument of this program; settings are written --config.key=value")
        if FLAGS.config is None:
            raise ConfigError("--config", "not given; for example --config=configs/digits.py, or --config=list")
        if FLAGS.config == "list":
            show(*list_configs(_configs()).split("\n"))
            return
        sys.path.insert(0, os.getcwd())  # `configs.common`, for a config file of the user's own folder too
        main(lay_over(load_config(FLAGS.config), overrides))

    _start(with_config, usage, argv, news=sys.stdout)


def run_plain(main: Callable[..., None], usage: str, *arguments: str) -> None:
    """The same for a program without a config: `main(*arguments)`.

    Args:
        main: function that is the program.
        usage: docstring of the program, shown by `--help`.
        *arguments: names of what the program takes beside flags, all required; a last "NAME…" takes one or more.
    """
    def with_arguments(argv: Sequence[str]) -> None:
        _, *given = argv
        if len(given) < len(arguments) or (len(given) > len(arguments) and not arguments[-1].endswith("…")):
            listed = f", got {' '.join(given)}" if given else ""
            raise ConfigError("arguments", f"this program takes {' '.join(arguments)}{listed}; --help says more")
        main(*given)

    _start(with_arguments, usage, sys.argv, news=sys.stderr)  # stdout is for what was asked


def _start(program: Callable[..., None], usage: str, argv: list[str], news: TextIO) -> None:
    def guarded(argv: Sequence[str]) -> None:
        # absl has put its own handler in place by now; Orbax and JAX tell their news through it.
        logging.basicConfig(level=logging.INFO, stream=news, force=True)
        logging.root.handlers[0].setFormatter(_Log("%(message)s"))
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # an encoding need not have what is printed
        for chatty in ("jax", "matplotlib"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        _hush_threads()
        try:
            program(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written nowhere
            sys.exit(1)
        except (ConfigError, Failure) as error:  # anything else is a fault of the program and keeps its traceback
            _fail(error)
        except OSError as error:
            if error.errno not in io.FULL:
                raise
            _fail(io.cannot_write(error.filename or "what this program prints", error))
        except KeyboardInterrupt:
            _fail("interrupted", status=130)

    app.run(guarded, argv=argv, flags_parser=functools.partial(_parse, usage=usage))


class _Log(logging.Formatter):
    """Messages line by line, without what a terminal would obey."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """The message, without a traceback."""
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


def show(*lines: str, file: Any = None) -> None:
    """Print lines in which there may be words of others: names of files, of classes, of what is in a file."""
    for line in lines:
        print(printable(line), file=file, flush=True)


def _hush_threads() -> None:
    """Let threads of libraries die in silence: what they died of is raised where their work is waited for.

    Orbax logs it as well, once a thread; TensorStore and asyncio tell of what else was under way, which the end of the
    program then cuts short; and a process that looks after shared memory tells of what it cleans up.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None


def require_workdir() -> str:
    """The value of `--workdir`.

    Raises:
        ConfigError: the flag was not given.
    """
    if not FLAGS.workdir:
        raise ConfigError("--workdir", "not given; for example --workdir=runs/digits")
    return FLAGS.workdir


def _parse(argv: list[str], usage: str) -> list[str]:
    """absl's parsing, with its errors in one line, and its help cut down to the program's own flags."""
    if {"--help", "-h", "--helpshort"}.intersection(argv):
        print(f"{usage.rstrip()}\n{FLAGS.main_module_help()}")
        sys.exit(0)
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        _fail(error)


def config_arguments() -> list[str]:
    """The arguments that say which config this program has been given, to give them to another."""
    _, overrides = split(sys.argv[1:])
    return [f"--config={FLAGS.config}", *(f"--config.{name}" + ("" if text is None else f"={text}")
                                         for name, text in overrides)]


def load_config(given: str) -> ml_collections.ConfigDict:
    """The config that `--config=given` names, `given` being a file with or without ":arguments".

    Raises:
        ConfigError: the config cannot be loaded; the message names the line of the file.
    """
    path, colon, arg = given.partition(":")
    if not os.path.isfile(path):
        near = suggest(path, map(str, _configs().glob("*.py")))
        raise ConfigError("--config", f"no such file: {path!r}{near} --config=list lists them")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(*[arg] if colon else []) if get_config else None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            path, lines, reason = error.filename or path, [error.lineno], f"{error.msg}: {(error.text or '').strip()}"
        raise ConfigError(path + (f", line {lines[-1]}" if lines else ""), reason) from None
    if not isinstance(config, ml_collections.ConfigDict):
        found = f"get_config() returns {config!r:.40}" if get_config else "there is no get_config()"
        raise ConfigError(path, f"{found}; a config file has get_config(), which returns a ConfigDict")
    return config


def _configs() -> Path:
    """The folder of config files: here, or beside the program."""
    here = Path("configs")
    return here if here.is_dir() else Path(sys.argv[0]).resolve().parent / "configs"


def list_configs(folder: Path) -> str:
    """A line for each config file in `folder`: its path, and the first line of its docstring."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        if not path.is_file():  # to open a pipe is to wait
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except UNPARSED as error:
            raise ConfigError(str(path), f"is no Python: {error}") from None
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body):
            lines.append(f"{str(path):<28}{(ast.get_docstring(tree) or '—').splitlines()[0]}")
    return "\n".join(lines) or f"no config files in {folder}"


def _fail(message: object, status: int = 1) -> None:
    show(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)
