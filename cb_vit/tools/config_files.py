"""Config files: the ones that come with cb_vit, found by name, and the user's own, found by path."""
from __future__ import annotations

import ast
import contextlib
import os
import runpy
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

import ml_collections

import cb_vit
from cb_vit.config import ConfigError, suggest
from cb_vit.registry import UNPARSED

SUITE = "Suite"  # first word of the docstring of a file that has evaluators alone, for `cb-vit eval --suite`

def shipped() -> Path:
    """The folder of the configs that come with cb_vit: in the package where it is installed, in a clone beside it."""
    package = Path(cb_vit.__file__).parent
    return folder if (folder := package / "configs").is_dir() else package.parent / "configs"


def get_config(given: str, flag: str = "--config") -> ml_collections.ConfigDict:
    """The config that `--config=given` names, to be changed as one likes.

    Args:
        given: a name or the path of a file, with or without its arguments: "digits", "folder:root=flowers".
        flag: the flag that names it, for errors.

    Raises:
        ConfigError: the config cannot be loaded; the message names the line of the file.
    """
    name, colon, arg = given.partition(":")
    path = _find(name, flag)
    try:
        with _importable(path):
            make = runpy.run_path(path).get("get_config")
            config = make(*[arg] if colon else []) if make else None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            path, lines, reason = error.filename or path, [error.lineno], f"{error.msg}: {(error.text or '').strip()}"
        raise ConfigError(path + (f", line {lines[-1]}" if lines else ""), reason) from None
    if not isinstance(config, ml_collections.ConfigDict):
        found = f"get_config() returns {config!r:.40}" if make else "there is no get_config()"
        raise ConfigError(path, f"{found}; a config file has get_config(), which returns a ConfigDict")
    return config


def _find(name: str, flag: str) -> str:
    """The file that is meant: a name is that of one that comes with cb_vit, anything else a path."""
    if os.sep not in name and (found := shipped() / f"{name}.py").is_file():
        return str(found)
    if os.path.isfile(name):
        return name
    if flag == "--suite":
        raise ConfigError(flag, f"neither a suite of cb_vit's nor a file: {name!r}{suggest(name, suites())} Suites: "
                                f"{', '.join(suites())}")
    near = suggest(name, [*(path.stem for path, _ in listed(shipped())), *map(str, Path("configs").glob("*.py"))])
    raise ConfigError(flag, f"neither a config of cb_vit's nor a file: {name!r}{near} --config=list lists them")


def suites() -> list[str]:
    """Names of the suites that come with cb_vit."""
    return [path.stem for path, line in listed(shipped()) if line.startswith(SUITE)]


@contextlib.contextmanager
def _importable(path: str) -> Iterator[None]:
    """`import configs.common` finds what is meant while a config file is executed.

    For one that comes with cb_vit it is the neighbour, whatever folder `configs` the user has; for a file of the
    user's it is theirs, here or beside the file, and what comes with cb_vit where they have none.
    """
    folders = [shipped()]
    if not os.path.samefile(Path(path).parent, shipped()):
        folders = [Path("configs").resolve(), Path(path).resolve().parent, *folders]
    package = types.ModuleType("configs")
    package.__path__ = [str(folder) for folder in folders]
    kept = _take_out_configs()
    sys.modules["configs"] = package
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before  # whatever the file has done to it, or to the folder that we stand in
        _take_out_configs()
        sys.modules.update(kept)


def _take_out_configs() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    return {name: sys.modules.pop(name) for name in names}


def listed(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every config file of a folder, and the first line of its docstring."""
    for path in sorted(folder.glob("*.py")):
        if not path.is_file():  # to open a pipe is to wait
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except UNPARSED as error:
            raise ConfigError(str(path), f"is no Python: {error}") from None
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body):
            yield path, (ast.get_docstring(tree) or "\u2014").splitlines()[0]


def overview() -> Iterator[str]:
    """A line for each config: those that come with cb_vit by name, the user's in a folder `configs` by path."""
    entries = [(path.stem, line) for path, line in listed(shipped())]
    mine = Path("configs")
    if mine.is_dir() and not mine.samefile(shipped()):
        entries += [(str(path), line) for path, line in listed(mine)]
    width = max(len(name) for name, _ in entries) + 2
    yield from (f"{name:<{width}}{line}" for name, line in entries)
