"""What every program shares: its command line, the flags `--config` and `--workdir`, and errors in one line."""
from __future__ import annotations

import ast
import functools
import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from cb_vit import config as config_lib
from cb_vit import io
from cb_vit.config import ConfigError, Failure
from cb_vit.registry import UNPARSED, suggest
from cb_vit.texts import printable

FLAGS = flags.FLAGS
CONFIG_HELP = (
    "The experiment: a file with get_config(), e.g. configs/digits.py. It is Python, and is executed: run none of "
    "strangers. Arguments of the file follow a colon, "
    "configs/vit_i1k.py:variant=S/16,context=cb. Any key it declares can be overridden: --config.lr=3e-4, "
    "--config.input.batch_size=512, --config.total_steps=1000. --config=list lists the files.")


def define(workdir: str | None = None) -> None:
    """Define the flags of a program; `workdir` is the help of `--workdir`, None where it has none."""
    config_flags.DEFINE_config_file("config", None, CONFIG_HELP, lock_config=True)
    if workdir:
        flags.DEFINE_string("workdir", None, workdir)
    for name in ("config", "workdir")[:2 if workdir else 1]:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # --help shows the flags of the program


def run(main: Callable[[ml_collections.ConfigDict], None], usage: str) -> None:
    """Parse the command line and call `main(config)`; what the user can mend ends in one line and status 1.

    Args:
        main: the program.
        usage: its docstring, shown by `--help`.
    """
    def with_config(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise ConfigError(argv[1], "not an argument of this program; settings are written --config.key=value")
        if FLAGS.config is None:
            raise _no_config()
        overridden = list(config_flags.get_override_values(FLAGS["config"]))
        config_lib.prefer_overrides(FLAGS.config, overridden)
        main(FLAGS.config)

    _start(with_config, functools.partial(_parse_config, usage=usage), news=sys.stdout)


def run_plain(main: Callable[..., None], usage: str, *arguments: str) -> None:
    """The same for a program without a config: `main(*arguments)`.

    Args:
        main: the program.
        usage: its docstring, shown by `--help`.
        *arguments: names of what it takes beside flags, all required; of a last "NAME…", one or more.
    """
    def with_arguments(argv: Sequence[str]) -> None:
        _, *given = argv
        if len(given) < len(arguments) or (len(given) > len(arguments) and not arguments[-1].endswith("…")):
            listed = f", got {' '.join(given)}" if given else ""
            raise ConfigError("arguments", f"this program takes {' '.join(arguments)}{listed}; --help says more")
        main(*given)

    _start(with_arguments, functools.partial(_parse, usage=usage), news=sys.stderr)  # stdout is for what was asked


def _start(program: Callable[..., None], parse: Callable[..., list[str]], news: TextIO) -> None:
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

    app.run(guarded, flags_parser=parse)


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
        ConfigError: it was not given.
    """
    if not FLAGS.workdir:
        raise ConfigError("--workdir", "not given; for example --workdir=runs/digits")
    return FLAGS.workdir


def _parse(argv: list[str], usage: str, explain: Callable[[Exception], Exception] = lambda error: error) -> list[str]:
    """absl's parsing, with its errors, `explain`ed, in one line, and its help cut down to the program's own flags."""
    if {"--help", "-h", "--helpshort"}.intersection(argv):
        print(f"{usage.rstrip()}\n{FLAGS.main_module_help()}")
        sys.exit(0)
    absl_logging.set_verbosity(absl_logging.ERROR)  # what ml_collections would warn of is told in the error
    try:
        return FLAGS(argv)
    except Exception as error:
        _fail(explain(error))


def _parse_config(argv: list[str], usage: str) -> list[str]:
    given, overrides = _given(argv)
    if given == "list":
        show(*list_configs(_configs()).split("\n"))
        sys.exit(0)
    sys.path.insert(0, os.getcwd())  # `configs.common`, for a config file of the user's own folder too
    explain = functools.partial(_explain, given=given, overrides=overrides)
    rest = _parse(argv, usage, explain)
    if given is not None and not isinstance(FLAGS.config, ml_collections.ConfigDict):
        # a file that cannot be read comes back as an object
        _fail(explain(TypeError(f"--config={given} is not a config")))
    return rest


def _given(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The value of `--config`, and the `(key, value)` of each `--config.key=value`, None where it has no "="."""
    given, overrides = None, []
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(r"--?(?:no)?config(?:\.([^=]+))?(?:=(.*))?", arg, re.DOTALL):
            key, value = match.groups()
            if key:
                overrides.append((key, value))
            else:
                given = following if value is None else value
    return given, overrides


def _explain(error: Exception, given: str | None, overrides: list[tuple[str, str | None]]) -> Exception:
    """The error to show for `error`, which came up while flags were parsed.

    absl and ml_collections wrap what a config file raises, and what is wrong with an override, each in its own
    way; so look again, at the file and at each override in turn. Where they are well, absl's words will do.
    """
    try:
        if given is not None:
            config = load_config(given)
            for key, value in overrides:
                check_override(config, given.partition(":")[0], key, value)
        elif overrides:
            raise _no_config()
    except ConfigError as found:
        return found
    return error


def load_config(given: str) -> ml_collections.ConfigDict:
    """The config that `--config=given` names, `given` being a file with or without ":arguments".

    Raises:
        ConfigError: it cannot be loaded; names the line of the file.
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


def check_override(config: ml_collections.ConfigDict, path: str, key: str, value: str | None) -> None:
    """Refuse an override that the config of the file `path` does not take.

    Args:
        config: the config as the file makes it.
        path: the file.
        key: dotted name of the setting.
        value: the text it is given; None: not known.

    Raises:
        ConfigError: names the key and what it takes.
    """
    block, field = config, "config"
    for part in key.split("."):
        if not isinstance(block, ml_collections.ConfigDict):
            raise ConfigError(field, f"is {block!r} in {path}, not a block of settings; config.{key} cannot be set")
        field += f".{part}"
        if part not in block:
            near = suggest(part, block)
            listed = f": {', '.join(block)}" if near == ";" else ""
            raise ConfigError(field, f"unknown{near} Only what {path} declares can be set here{listed}")
        kind, block = block.get_type(part), block[part]
    flag = FLAGS[field] if field in FLAGS else None
    if flag is None or value is None:
        # ml_collections knows no way to write a list, or to tell what None may become.
        if kind in (list, type(None)):
            raise ConfigError(field, f"is {block!r} in {path}, which the command line cannot change; change it there")
        return
    try:
        flag.parser.parse(value)
    except (TypeError, ValueError):
        kind = dict if issubclass(kind, ml_collections.ConfigDict) else kind
        raise ConfigError(field, f"expected {config_lib.describe(kind)}, got {value!r}") from None


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


def _no_config() -> ConfigError:
    return ConfigError("--config", "not given; for example --config=configs/digits.py, or --config=list")


def _fail(message: object, status: int = 1) -> None:
    show(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)
