"""From a config file to frozen, checked dataclasses: the one door through which settings come in.

A config file builds an `ml_collections.ConfigDict` with big_vision's flat keys, and `overrides.lay_over` lays what the
command line says over it. Each room declares the schema of its block as a frozen dataclass; `parse` turns the block
into it once, and from then on nobody reads a raw config. So whatever the schema has can be set, wherever it comes from.
A wrong key, type or value ends in one line that names the field, the value and the fix.

Rules of a schema: a value of None means "not set" and takes the default, so a field that may be None
defaults to None. A field of type `Duration` called `ckpt` is written `ckpt_steps`, `ckpt_epochs`,
`ckpt_examples` or `ckpt_percent`. A field of type `Annotated[X, Read(as_written, make)]` is written as the type
`as_written`, and is the X that `make(value, path)` makes of it. Checks that need more than a type go into
`__post_init__` and raise `ConfigError("field", "what is wrong and what to do")`.
"""
from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import ml_collections

T = TypeVar("T")
NO_SETTING = {"setting": False}  # metadata of a field of a schema that is no key of the config
UNITS = ("steps", "epochs", "examples", "percent")


class Failure(RuntimeError):
    """What ends a run by no fault of the program, and says all there is to know in one line."""


class ConfigError(ValueError):
    """A setting that cannot work: `path` names the field, `message` the value and the way out."""

    def __init__(self, path: str, message: str):
        super().__init__(f"{path}: {message}")
        self.path, self.message = path, message

    def __reduce__(self):  # without it the error could not come back from a worker process
        return type(self), (self.path, self.message)

    def under(self, prefix: str) -> ConfigError:
        """The same error, with its path taken as relative to `prefix`."""
        return ConfigError(f"{prefix}.{self.path}", self.message)


def suggest(name: Any, choices: Iterable[str]) -> str:
    """What follows "unknown X" in an error: `"; did you mean Y?"` when a choice is close to `name`, else `";"`."""
    choices = list(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    if not close:  # "SGD" and "sgd", "B16" and "b/16" are alike
        bare = {bare_name(choice): choice for choice in reversed(choices)}
        close = [bare[found] for found in difflib.get_close_matches(bare_name(str(name)), bare, n=1)]
    return f"; did you mean {close[0]}?" if close else ";"


def bare_name(name: str) -> str:
    """A name without what people write now one way and now another: case, and whatever is no letter or digit."""
    return re.sub(r"[\W_]", "", name).lower()


@contextlib.contextmanager
def under(path: str) -> Iterator[None]:
    """A `ConfigError` raised inside has a path relative to `path`."""
    try:
        yield
    except ConfigError as error:
        raise error.under(path) from None


@contextlib.contextmanager
def at(path: str) -> Iterator[None]:
    """A `ConfigError` raised inside is one of the setting `path`, whatever it was of where it was raised."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(path, error.message) from None


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training in one of four units (big_vision's `*_steps/_epochs/_examples/_percent`).

    Attributes:
        value: number of units; for "percent" a fraction of the whole run, 0 to 1, as in big_vision.
        unit: name of the unit: "steps", "epochs", "examples" or "percent".
    """

    value: float
    unit: str

    def __post_init__(self):
        if not self.value >= 0 or math.isinf(self.value):
            raise ConfigError(self.unit, f"must be 0 or more, got {self.value}")
        if self.unit == "percent" and self.value > 1:
            raise ConfigError(self.unit, f"is a fraction of the run, 0 to 1, got {self.value}; write 0.1 for 10 %")

    def steps(self, batch_size: int, examples: int | None = None, total_steps: int | None = None) -> int:
        """This length in steps, to the nearest; at least 1 unless it is 0.

        Args:
            batch_size: number of examples in a global batch.
            examples: number of examples in one epoch; needed for the unit "epochs".
            total_steps: number of steps of the whole run; needed for the unit "percent".
        """
        if self.unit == "steps":
            steps = self.value
        elif self.unit == "examples":
            steps = self.value / batch_size
        elif self.unit == "epochs":
            if examples is None:
                raise ConfigError("epochs", "the data source has no length; give steps or examples")
            steps = self.value * examples / batch_size
        else:
            if total_steps is None:
                raise ConfigError("percent", "the length of the run itself cannot be a percentage; give steps")
            steps = self.value * total_steps
        return max(1, round(steps)) if self.value else 0


class Read(NamedTuple):
    """How a setting is read that is not written as what it is, for `Annotated`.

    Attributes:
        as_written: type of the setting in a config; `Any` for a block that `make` parses.
        make: function from (value, path) to the setting, or a `ConfigError`.
    """

    as_written: Any
    make: Callable[[Any, str], Any]


class Text:
    """What the command line says of a setting: what kind of value it is, only the schema knows.

    Attributes:
        text: the text as it was typed; None: there was none, as for a flag that is True.
        value: the value that the schema has read from the text.
    """

    def __init__(self, text: str | None):
        self.text, self.value = text, text

    def __repr__(self) -> str:
        return repr(self.text)

    def read(self, hint: Any, path: str) -> Any:
        """The text as the type `hint`: as it stands, or else as Python would write it; or a `ConfigError`."""
        if self.text is None:
            self.value = True
            with contextlib.suppress(ConfigError):
                return convert(True, hint, path)
            raise ConfigError(path, f"no value given; write --{path}=VALUE, {describe(hint)}")
        literal = _literal(self.text)
        candidates = [literal] if hint is Any else [self.text, literal]
        if literal in (0, 1):
            candidates.append(bool(literal))
        candidates.append((literal,))  # a list of one
        errors, structured = [], isinstance(literal, tuple | list | dict)
        for self.value in candidates:
            try:
                return convert(self.value, hint, path)
            except ConfigError as error:
                errors.append(error)
        # What is said of the literal is said of the type that was meant; further down, of the very entry.
        raise next((error for error in errors if structured and error.path != path), errors[0])


def _literal(text: str) -> Any:
    """A Python literal, or a number or truth value as people write them; else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for reading in (ast.literal_eval, float):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return reading(text)
    return text


def parse(schema: type[T], block: Any, path: str = "config") -> T:
    """Check `block` against the dataclass `schema` and build it.

    Args:
        schema: a frozen dataclass; see the module docstring for its rules.
        block: the config block, a ConfigDict or a mapping.
        path: where the block stands, for errors, e.g. "config.input".

    Raises:
        ConfigError: on the first unknown key, missing or ill-typed value, or failed check.
    """
    block = plain(block)
    if isinstance(block, Text):
        return block.read(schema, path)
    if not isinstance(block, dict):
        raise ConfigError(path, f"expected a block of settings, got {block!r}")
    hints = typing.get_type_hints(schema, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init and f.metadata != NO_SETTING}
    durations = {name for name in fields if Duration in (hints[name], *typing.get_args(hints[name]))}
    known = [key for name in fields for key in (duration_keys(name) if name in durations else [name])]
    for key in block:
        if key not in known:
            near = suggest(key, known)
            listed = f" {path} takes {', '.join(known)}" if near == ";" else ""
            raise ConfigError(f"{path}.{key}", f"unknown{near}{listed}")

    values = {}
    for name, field in fields.items():
        value = _duration(block, name, path) if name in durations else block.get(name)
        optional = name not in durations and type(None) in typing.get_args(hints[name])
        if not (_is_unset(value) if optional or isinstance(value, Text) else value is None):
            values[name] = value if name in durations else convert(value, hints[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            wanted = " or ".join(duration_keys(name)[:3]) if name in durations else name
            raise ConfigError(f"{path}.{name}", f"required and not set; give {wanted}")
    try:
        return schema(**values)
    except ConfigError as error:
        raise error.under(path) from None


def as_read(value: Any) -> Any:
    """A block of `overrides.lay_over` once it is parsed, with every text as the schema has read it."""
    if isinstance(value, Mapping):
        return {key: as_read(item) for key, item in value.items()}
    return plain(value.value) if isinstance(value, Text) else value


def plain(value: Any) -> Any:
    """ConfigDicts, their placeholders and lists as plain dicts, None and tuples."""
    if isinstance(value, ml_collections.FieldReference):
        return plain(value.get())
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict(preserve_field_references=False)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, or a `ConfigError` at `path` that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        as_written, make = hint.__metadata__[0]
        return make(convert(value, as_written, path), path)
    if isinstance(value, Text):
        return value.read(hint, path)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and _is_unset(value):
            return None
        return _convert_union(value, [a for a in args if a is not type(None)], path)
    if origin is typing.Literal:
        if value in args:
            return value
        choices = [str(arg) for arg in args]
        raise ConfigError(path, f"unknown value {value!r}{suggest(value, choices)} Choices: {', '.join(choices)}")
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, path)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): convert(v, args[1], f"{path}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if hint is float and _is_real(value):
        return float(value)
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise ConfigError(path, f"expected {describe(hint)}, got {value!r}")


def _is_real(value: Any) -> bool:
    """Whether it is a number that a float can hold; infinity is one."""
    if isinstance(value, float):
        return not math.isnan(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_unset(value: Any) -> bool:
    """None, or a block of nothing but None, as placeholders of ml_collections leave it."""
    if isinstance(value, Text) and value.text == "None":
        value.value = value = None
    return value is None or (isinstance(value, Mapping) and bool(value) and all(map(_is_unset, value.values())))


def _convert_union(value: Any, arms: list[Any], path: str) -> Any:
    errors = []
    for arm in arms:
        try:
            return convert(value, arm, path)
        except ConfigError as error:
            errors.append(error)
    # An error further down belongs to the arm that was meant.
    deeper = [e for e in errors if e.path != path]
    if deeper or len(errors) == 1:
        raise (deeper or errors)[0]
    raise ConfigError(path, f"expected {' or '.join(describe(a) for a in arms)}, got {value!r}")


def describe(hint: Any) -> str:
    """The type `hint` in the words of an error."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", tuple: "a list",
             dict: "a block of settings"}
    if hint in names:
        return names[hint]
    if dataclasses.is_dataclass(hint):
        return f"a block of {hint.__name__} settings"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return "a block of settings"
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a list, each entry {describe(args[0])}"
    if origin is tuple:
        return f"({', '.join(describe(a) for a in args)})"
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    return "None" if hint is type(None) else " or ".join(describe(a) for a in args) if args else str(hint)


def duration_keys(name: str) -> list[str]:
    """The keys in which a duration can be written."""
    return [f"{name}_{unit}" for unit in UNITS]


def _duration(block: dict[str, Any], name: str, path: str) -> Duration | None:
    given = {unit: block[f"{name}_{unit}"] for unit in UNITS if not _is_unset(block.get(f"{name}_{unit}"))}
    if len(given) > 1:
        keys = " and ".join(f"{name}_{unit}" for unit in given)
        raise ConfigError(f"{path}.{name}", f"{keys} are both set; keep one")
    for unit, value in given.items():
        key = f"{path}.{name}_{unit}"
        try:
            return Duration(convert(value, int if unit in ("steps", "examples") else float, key), unit)
        except ConfigError as error:
            raise ConfigError(key, error.message) from None
    return None
