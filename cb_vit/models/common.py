"""What models share: the two layouts of a stack of blocks.

A model that runs its blocks under `nn.scan` keeps them as one `encoderblock` whose leaves have a
leading depth axis (scan layout); one that loops over them keeps `encoderblock_0`, `encoderblock_1`, …
(loop layout). Files always hold the loop layout (big_vision's names), so a run may switch.
"""
from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
STACKED, BLOCK = "encoderblock", re.compile(r"encoderblock_(\d+)")


def to_loop(tree: Tree) -> Tree:
    """Every scan-layout stack of blocks in `tree` taken apart; all else as it is.

    Works on parameters and on anything that holds trees of their shape, such as an optimiser's state.
    """
    return _map_dicts(_unstack, tree, lambda node: STACKED in node)


def to_scan(tree: Tree) -> Tree:
    """The inverse of `to_loop`: every run of `encoderblock_i` in `tree` as one stacked `encoderblock`."""
    return _map_dicts(_stack, tree, lambda node: any(map(BLOCK.fullmatch, node)))


def _map_dicts(function, tree: Tree, wanted) -> Tree:
    is_wanted = lambda node: isinstance(node, dict) and wanted(node)  # noqa: E731
    return jax.tree.map(lambda node: function(node) if is_wanted(node) else node, tree, is_leaf=is_wanted)


def _unstack(node: dict) -> dict:
    stacked = node[STACKED]
    depth = len(jax.tree.leaves(stacked)[0])
    blocks = {f"{STACKED}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
    return {**{k: v for k, v in node.items() if k != STACKED}, **blocks}


def _stack(node: dict) -> dict:
    indices = sorted(int(match[1]) for match in map(BLOCK.fullmatch, node) if match)
    blocks = [node[f"{STACKED}_{i}"] for i in indices]
    rest = {k: v for k, v in node.items() if not BLOCK.fullmatch(k)}
    return {**rest, STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
