"""What every command shares: its command line, its words in the terminal, and errors in one line.

A command is a module: its docstring is its help, `arguments(parser)` says what it takes, and `main(args)` does it.
`cb-vit NAME` and `python -m cb_vit.tools.MODULE` run the same.
"""
from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import logging as absl_logging

from cb_vit import io
from cb_vit.config import ConfigError, Failure, suggest
from cb_vit.overrides import lay_over, split
from cb_vit.texts import printable
from cb_vit.tools import config_files

CONFIG_HELP = (
    "The experiment: the name of one that comes with cb_vit (--config=list), or a file with get_config(), which is "
    "Python and is executed: run none of strangers. Its arguments follow a colon, deit_i1k:variant=S/16,context=cb. "
    "Any setting can be overridden, whether the file has it or not: --config.lr=3e-4, --config.input.batch_size=512, "
    "--config.total_steps=1000.")

SUITE_KEYS = {"evals", "num_classes"}  # all that a suite of evaluators says


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are `ConfigError`s."""

    def __init__(self, command: ModuleType):
        self.names: list[str] = []
        super().__init__(prog=" ".join(called()), description=command.__doc__.rstrip(), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        command.arguments(self)
        wanted = [name for name in self.names if not name.startswith("-")]
        self.usage = " ".join([self.prog, "[FLAG …]", *wanted])

    def add_config(self, otherwise: str = "") -> None:
        """Take `--config`, and overrides of its settings; `otherwise` is what counts where it is not given."""
        self.add_argument("--config", metavar="NAME", help=f"{CONFIG_HELP} {otherwise}".rstrip())
        self.set_defaults(overrides=[])

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As in argparse; names are kept, for the usage and for whoever misspells one."""
        self.names.append(names[-1])
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        where, colon, what = message.removeprefix("argument ").partition(": ")
        if where.startswith("the following arguments are required"):
            where, what = what, "not given"
        raise ConfigError(where if colon else "arguments", f"{what or message}; --help says more")


def run(command: ModuleType, argv: Sequence[str] | None = None) -> None:
    """Run a command as a program: what the user can mend ends in one line and status 1.

    Args:
        command: module of the command.
        argv: what the command line says after the command; None: all that this process was given.
    """
    try:
        args = parse(command, sys.argv[1:] if argv is None else argv)
        # Where there is no config, stdout is for what was asked.
        _set_up_output(news=sys.stdout if hasattr(args, "config") else sys.stderr)
        if getattr(args, "config", None) == "list":
            show(*config_files.overview())
        else:
            command.main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written nowhere
        sys.exit(1)
    except (ConfigError, Failure) as error:  # anything else is a fault of the program and keeps its traceback
        fail(error)
    except OSError as error:
        if error.errno not in io.FULL:
            raise
        fail(io.cannot_write(error.filename or "what this program prints", error))
    except KeyboardInterrupt:
        fail("interrupted", status=130)


def parse(command: ModuleType, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; `overrides` holds what they say of settings.

    Raises:
        ConfigError: they are not those that the command takes.
    """
    parser = Parser(command)
    takes_config = parser.get_default("overrides") is not None
    argv, overrides = split(argv) if takes_config else (argv, [])
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        way_out = "; settings are written --config.key=value" if takes_config else ""
        raise ConfigError(flag, f"unknown flag{suggest(flag, parser.names)} --help lists them" if flag[0] == "-" else
                          f"not an argument of this program{way_out}")
    args.overrides = overrides
    return args


def at_least_one(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """The type of an argument that is a share of a whole, neither none nor all of it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, such as 0.95 for 95 %, got {text!r}")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """The type of an argument that is one of a few words."""
    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"unknown choice {text!r}{suggest(text, choices)} "
                                             f"Choices: {', '.join(choices)}")
        return text

    return read


def required(value: str | None, flag: str, example: str) -> str:
    """The value of a flag that must be given; `example` is one."""
    if not value:
        raise ConfigError(flag, f"not given; for example {flag}={example}")
    return value


def check_output(path: str, overwrite: bool, flag: str = "--output") -> None:
    """Refuse a file that cannot be written, before time is spent on what it is to hold.

    Raises:
        ConfigError: at `flag`, which names the file.
    """
    io.check_address(path, flag)
    if io.is_local(path) and not io.as_path(path).parent.is_dir():
        raise ConfigError(flag, f"{path}: there is no folder {io.as_path(path).parent}; make it first")
    if not io.is_taken(path):
        return
    if not overwrite:
        raise ConfigError(flag, f"{path} is already there; choose another name, or give --overwrite")
    if io.is_local(path) and (there := io.kind(path)) in (io.FOLDER, io.DEVICE):
        raise ConfigError(flag, f"{path} is {there}; choose another name")


def config_of(args: argparse.Namespace, run: str | None = None) -> dict[str, Any]:
    """The config that the command line asks for, with its settings laid over.

    Args:
        args: arguments of a command that takes `--config`.
        run: workdir of a run whose own config counts where no other is given; None: one must be given.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    if args.config is None:
        from cb_vit.workdir import read_config  # with what it brings, which the others can do without

        if run is not None and (config := read_config(run)) is not None:
            return lay_over(config, args.overrides)
        no_run = f", and {run} has no config.json" if run else ""
        raise ConfigError("--config", f"not given{no_run}; for example --config=digits, or --config=list")
    config = config_files.get_config(args.config)
    if not set(config) - SUITE_KEYS:
        name = args.config.partition(":")[0]
        raise ConfigError("--config", f"{name} is a suite of evaluators, no experiment: cb-vit eval --suite={name}")
    return lay_over(config, args.overrides)


def words_of(args: argparse.Namespace) -> list[str]:
    """What the command line says of config and workdir, to say it again."""
    return [f"--config={args.config}", f"--workdir={args.workdir}",
            *(f"--config.{name}" + ("" if text is None else f"={text}") for name, text in args.overrides)]


def called(command: str | None = None, module: str | None = None) -> list[str]:
    """How to call this program again, or another command as this one was called.

    Args:
        command: name of a command under `cb-vit`; None: this one.
        module: name of its module in `cb_vit.tools`.
    """
    program, python = sys.argv[0], os.path.relpath(sys.executable)
    python = python if not python.startswith("..") else "python"
    spec = sys.modules["__main__"].__spec__
    if os.path.basename(program) in ("cb-vit", "cb-vit.exe"):
        return ["cb-vit", command or sys.argv[1]]
    if spec and spec.name == "cb_vit.tools.__main__":
        return [python, "-m", "cb_vit.tools", command or sys.argv[1]]
    if module:
        return [python, "-m", f"cb_vit.tools.{module}"]
    return [python, "-m", spec.name] if spec else [python, os.path.relpath(program)]


def show(*lines: str, file: Any = None) -> None:
    """Print lines in which there may be words of others: names of files, of classes, of what is in a file."""
    for line in lines:
        print(printable(line), file=file, flush=True)


def _set_up_output(news: Any) -> None:
    logging.basicConfig(level=logging.INFO, stream=news, force=True)
    logging.root.handlers[0].setFormatter(_Log("%(message)s"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an encoding need not have what is printed
    for chatty in ("jax", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    _hush_threads()


class _Log(logging.Formatter):
    """Messages line by line, without what a terminal would obey."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """The message, without a traceback."""
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


def _hush_threads() -> None:
    """Let threads of libraries die in silence: what they died of is raised where their work is waited for.

    Orbax logs it as well, once a thread; TensorStore and asyncio tell of what else was under way, which the end of the
    program then cuts short; and a process that looks after shared memory tells of what it cleans up.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None


def fail(message: object, status: int = 1) -> NoReturn:
    """End the program with one line on stderr."""
    show(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)
