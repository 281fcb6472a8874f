"""Leaves by name: parameters are addressed as `"Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"`.

One spelling, matched in full by regular expressions, serves weight decay, freezing, learning-rate
multipliers and sharding alike (big_vision, `utils.py` tree functions).
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cb_vit.config import ConfigError

Tree = Any
_BLOCK = re.compile(r"(?:^|/)encoderblock(?:_(\d+))?/")


def key_name(key: Any) -> str:
    """The part of a name that one entry of a JAX key path gives: dict key, field, attribute or index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"not an entry of a key path: {key!r}")


def flatten_with_names(tree: Tree) -> tuple[list[tuple[str, Any]], jax.tree_util.PyTreeDef]:
    """`([(name, leaf), …], treedef)` in JAX's own leaf order, which sorts dict keys; names join the path with "/"."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [("/".join(map(key_name, path)), leaf) for path, leaf in leaves], treedef


def names(tree: Tree) -> list[str]:
    """Names of all leaves, in JAX's leaf order."""
    return [name for name, _ in flatten_with_names(tree)[0]]


def unflatten_names(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`: the inverse of `flatten_with_names` for nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def map_with_names(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` with the leaf's name as first argument.

    Args:
        function: the function of a name and a leaf of `tree` and of each further tree.
        tree: the tree whose names count.
        *rest: further trees of the same structure.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function("/".join(map(key_name, path)), *leaves), tree, *rest)


def first_match(name: str, rules: Sequence[tuple[str, Any]], default: Any = None) -> Any:
    """The value of the first `(regex, value)` rule whose regex matches all of `name`; `default` where none does."""
    return next((value for regex, value in rules if re.fullmatch(regex, name)), default)


def blocks(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of the blocks in a leaf: (3,) for `encoderblock_3/…`, all for `encoderblock/…`, () outside the blocks.

    Args:
        name: the leaf's name.
        shape: the leaf's shape; one of `encoderblock` has an entry for each block along its first axis.
    """
    match = _BLOCK.search(name)
    if match is None:
        return ()
    return (int(match[1]),) if match[1] else tuple(range(shape[0]))


def is_stacked(name: str) -> bool:
    """Whether a leaf has one entry a block along its first axis (scan layout, `models/common.py`)."""
    match = _BLOCK.search(name)
    return match is not None and match[1] is None


def check_rules(rules: Sequence[tuple[str, Any]], tree: Tree, path: str) -> None:
    """Refuse rules that do not compile or that match no leaf of `tree`: they would silently do nothing.

    Args:
        rules: (regex, value) pairs.
        tree: a tree with the names that the regexes are for.
        path: where the rules stand in the config, for errors.

    Raises:
        ConfigError: at `path`, naming the rule and a few of the leaves.
    """
    known = names(tree)
    for index, (regex, _) in enumerate(rules):
        try:
            pattern = re.compile(regex)
        except re.error as error:
            raise ConfigError(f"{path}[{index}]", f"{regex!r} is not a regular expression: {error}") from None
        if not any(map(pattern.fullmatch, known)):
            raise ConfigError(
                f"{path}[{index}]", f"{regex!r} matches no parameter; names look like {', '.join(known[:3])}")
