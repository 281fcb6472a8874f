"""What the command line says of settings, `--config.a.b=value`, and how it is laid over the config of a file."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from cb_vit.config import UNITS, ConfigError, Text, duration_keys, plain


def split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Arguments without those that override settings, and those: the name and the text of each, None without one.

    `--config.lr=3e-4`, `--config.lr 3e-4`, `--config.plot` for True and `--noconfig.plot` for False, as flags are.
    """
    rest, overrides, waiting = [], [], list(argv)
    while waiting:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", arg := waiting.pop(0), re.DOTALL)
        if not match:
            rest.append(arg)
            continue
        no, name, text = match.groups()
        if text is None and not no and waiting and not waiting[0].startswith("--"):
            text = waiting.pop(0)
        overrides.append((name, "False" if no else text))
    return rest, overrides


def lay_over(
    config: ml_collections.ConfigDict | Mapping[str, Any], overrides: Iterable[tuple[str, str | None]]
) -> dict[str, Any]:
    """The config with what the command line says in place of what the file does; the schema checks it all.

    A duration in one unit replaces the file's in any other. Settings of the file that refer to an overridden one
    (`ConfigDict.get_ref`) follow it.

    Args:
        config: the file's config; its references are set, it is otherwise left as it is.
        overrides: pairs (dotted name, text or None for a bare flag), of which the last one of a name counts.

    Raises:
        ConfigError: a dotted name leads through a setting that is not a block.
    """
    overrides = dict(overrides)
    for name, text in overrides.items():
        _set_reference(config, name.split("."), text)
    laid = plain(config)
    for name, text in overrides.items():
        *parents, key = name.split(".")
        block, path = laid, "config"
        for parent in parents:
            path = f"{path}.{parent}"
            if block.get(parent) is None:
                block[parent] = {}
            block = block[parent]
            if not isinstance(block, dict):
                raise ConfigError(path, f"is {block!r}, not a block of settings; config.{name} cannot be set")
        block[key] = Text(text)
        stem, _, unit = key.rpartition("_")
        for other in duration_keys(stem) if unit in UNITS else ():
            if other in block and ".".join([*parents, other]) not in overrides:
                block[other] = None
    return laid


def _set_reference(block: Any, names: Sequence[str], text: str | None) -> None:
    """Set the reference that a name leads to, if there is one, for those settings of the file that follow it."""
    *parents, key = names
    for parent in parents:
        if not isinstance(block, ml_collections.ConfigDict) or parent not in block:
            return
        block = block[parent]
    if isinstance(block, ml_collections.ConfigDict):
        held = dict(block.items(preserve_field_references=True)).get(key)
        if isinstance(held, ml_collections.FieldReference):
            with contextlib.suppress(ConfigError):  # a wrong type: the schema refuses it by its full name
                held.set(Text(text).read(held.get_type() | None, key), type_safe=False)
