"""Tables of named choices, and the small language `op(a, b=c)|op2` that picks from them.

big_vision spells preprocessing and sharding in this language (`pp/builder.py`, `sharding.py` there);
here both read it through one parser.
"""
from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from cb_vit.config import ConfigError, convert, suggest

T = TypeVar("T")
# What Python's parser raises at a text; the last two where that is nested too deep.
UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)


class Registry(dict[str, T]):
    """A table of choices whose misses end in an error that lists them.

    Args:
        kind: what the entries are, for the error text, e.g. "loss" or "preprocessing op".
        entries: the first entries, by name; None: none yet.
    """

    def __init__(self, kind: str, entries: dict[str, T] | None = None):
        super().__init__(entries or {})
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the decorated object under `name`; a name is given once."""
        if name in self:
            raise KeyError(f"{self.kind} {name!r} is registered twice")

        def enter(entry: T) -> T:
            self[name] = entry
            return entry

        return enter

    def pick(self, name: str, path: str) -> T:
        """The entry called `name`; a miss is a `ConfigError` at `path` that lists the choices."""
        if name in self:
            return self[name]
        raise ConfigError(path, f"unknown {self.kind} {name!r}{suggest(name, self)} Choices: {', '.join(sorted(self))}")


@dataclasses.dataclass(frozen=True)
class Call:
    """One `name(*args, **kwargs)` of the language.

    Attributes:
        name: the name that is called.
        args: values of the positional arguments.
        kwargs: values of the named arguments.
        text: the call as it was written, for errors.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str

    def bind(self, function: Callable[..., T], path: str) -> T:
        """What `function(*args, **kwargs)` returns.

        Arguments are converted to the types that `function` declares: a list to a tuple, 1 to 1.0.

        Args:
            function: the entry of a table that `name` picks.
            path: where the text stands in the config, for errors.

        Raises:
            ConfigError: at `path`, when the arguments do not fit.
        """
        try:
            given = inspect.signature(function).bind(*self.args, **self.kwargs)
        except TypeError as error:
            signature = str(inspect.signature(function)).split(" ->")[0]
            raise ConfigError(path, f"{self.text!r}: {error}. It takes {self.name}{signature}") from None
        try:
            hints = typing.get_type_hints(function)
            for name, value in given.arguments.items():
                given.arguments[name] = convert(value, hints[name], name) if name in hints else value
            return function(*given.args, **given.kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(path, f"{self.text!r}: {error}") from None


def parse_calls(text: str, path: str) -> tuple[Call, ...]:
    """Split `"op1(a,b=c)|op2"` into its calls, left to right.

    Arguments are Python literals. An empty text has no calls.

    Args:
        text: the calls, divided by "|".
        path: where the text stands in the config, for errors.

    Raises:
        ConfigError: at `path`, when the text is not of that form.
    """
    if not text.strip():
        return ()
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except UNPARSED as error:
        reason = getattr(error, "msg", None) or str(error) or "it is nested too deep"
        raise ConfigError(path, f"cannot read {text!r:.200}: {reason}; write it as 'op(1)|op2(name=2)'") from None
    # Python reads "a|b|c" as "(a|b)|c", so calls come off from the right. Nothing is ever evaluated: such a text may
    # stand in the run.json of somebody else's run.
    nodes: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        nodes.append(tree.right)
        tree = tree.left
    nodes.append(tree)
    return tuple(_call(node, text, path) for node in reversed(nodes))


def _call(node: ast.expr, text: str, path: str) -> Call:
    try:
        source = ast.unparse(node)
        if isinstance(node, ast.Name):
            return Call(node.id, (), {}, source)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            args = tuple(ast.literal_eval(a) for a in node.args)
            kwargs = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
            if len(kwargs) == len(node.keywords):  # `**{…}` has no name, and is refused
                return Call(node.func.id, args, kwargs, source)
    except RecursionError:
        raise ConfigError(path, f"cannot read {text!r:.200}: it is nested too deep") from None
    except (ValueError, TypeError):
        raise ConfigError(path, f"{source!r:.200}: arguments must be plain values such as 224, 0.5 or 'name'") from None
    raise ConfigError(path, f"cannot read {source!r:.200} in {text!r:.200}; write it as 'op(1)|op2(name=2)'")
