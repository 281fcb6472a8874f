"""What models share: the two layouts of a stack of blocks, and beginning from parameters of another model.

A model that runs its blocks under `nn.scan` keeps them as one `encoderblock` whose leaves have a
leading depth axis (scan layout); one that loops over them keeps `encoderblock_0`, `encoderblock_1`, …
(loop layout). Files always hold the loop layout (big_vision's names), so a run may switch.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cb_vit.config import ConfigError
from cb_vit.texts import first_few
from cb_vit.tree import check_rules, first_match, flatten_with_names, map_with_names

Tree = Any
# (loaded, initial) → the loaded array made to fit, and a word on what was done, if anything was.
Fit = Callable[[jax.Array, jax.Array], tuple[jax.Array, str | None]]
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
    # An optimiser's state holds parameter trees inside named tuples; the dicts are found wherever they are.
    is_wanted = lambda node: isinstance(node, dict) and wanted(node)  # noqa: E731
    return jax.tree.map(lambda node: function(node) if is_wanted(node) else node, tree, is_leaf=is_wanted)


def _unstack(node: dict) -> dict:
    stacked = node[STACKED]
    # `len`, not `.shape[0]`: `checkpoint_arrays` passes stand-ins for arrays, which have no values to index.
    depth = len(jax.tree.leaves(stacked)[0])
    blocks = {f"{STACKED}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
    return {**{k: v for k, v in node.items() if k != STACKED}, **blocks}


def _stack(node: dict) -> dict:
    # By number: JAX sorts dict keys as text, where block 10 comes before block 2.
    indices = sorted(int(match[1]) for match in map(BLOCK.fullmatch, node) if match)
    blocks = [node[f"{STACKED}_{i}"] for i in indices]
    rest = {k: v for k, v in node.items() if not BLOCK.fullmatch(k)}
    return {**rest, STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every array in a merge, as lines to print.

    To JAX it is a tree without leaves, so it comes out of `jax.jit` and `jax.eval_shape` beside the parameters.

    Attributes:
        lines: one sentence on each group of arrays that met the same fate.
    """

    lines: tuple[str, ...]


def merge_params(
    init: Tree, loaded: Tree, dont_load: Sequence[str] = (), *, heads: Sequence[str] = (),
    other_heads: bool = False, fresh: str = "", fit: Mapping[str, Fit] | None = None,
) -> tuple[Tree, Report]:
    """Take the parameters of a file where a model has them too; nothing is lost or begun anew unsaid.

    Args:
        init: the model's initial parameters, in loop layout.
        loaded: the file's parameters, in loop layout.
        dont_load: regexes of parameter names: in the model they keep their initial value, in the file they are unused.
        heads: top-level names of modules that may differ: one of another shape begins anew, as a whole.
        other_heads: whether all `heads` begin anew even where their shapes agree.
        fresh: a regex of the parameter names that a file may lack.
        fit: for a parameter's name, the function that makes a loaded array of another shape fit.

    Returns:
        Parameters in the form and dtypes of `init`, and the report.

    Raises:
        ConfigError: one side has what the other lacks, or in another shape, and nothing above allows it; or a regex
            of `dont_load` matches nothing.
    """
    ours, theirs = dict(flatten_with_names(init)[0]), dict(flatten_with_names(loaded)[0])
    rules = [(regex, True) for regex in dont_load]
    check_rules(rules, theirs | ours, "model_load.dont_load")
    told = {name for name in theirs | ours if first_match(name, rules)}
    missing, surplus = ([name for name in one if name not in other] for one, other in ((ours, theirs), (theirs, ours)))
    both, lines = {}, []
    for name in [name for name in ours if name in theirs and name not in told]:
        both[name], note = (fit or {}).get(name, lambda theirs, ours: (theirs, None))(theirs[name], ours[name])
        lines += [f"{name}: {note}"] if note else []

    # A head goes as a whole: a loaded bias beside a fresh kernel would belong to other classes.
    of_head = lambda name: name.split("/")[0] in heads  # noqa: E731
    differ = [name for name in both if both[name].shape != ours[name].shape]
    anew = {name.split("/")[0] for name in (both if other_heads else differ) if of_head(name)}
    reset = [name for name in both if name.split("/")[0] in anew]
    _refuse("has another shape of", [f"{name} ({list(theirs[name].shape)}, here {list(ours[name].shape)})"
                                     for name in differ if not of_head(name)])
    _refuse("lacks", [name for name in missing
                      if name not in told and not of_head(name) and not re.fullmatch(fresh, name)])
    _refuse("has besides", [name for name in surplus if name not in told and not of_head(name)])

    # Files may be in half precision; the optimiser needs parameters in the dtype that the model was made with.
    taken = {name: leaf.astype(ours[name].dtype) for name, leaf in both.items() if name not in reset}
    lines.insert(0, f"{len(taken)} of the model's {len(ours)} parameter arrays are loaded")
    for what, names in (
        (f"begun anew, the file's being {'for other classes' if other_heads else 'of another size'}", reset),
        ("begun anew, as the file has none", [name for name in missing if name not in told]),
        ("begun anew, told by dont_load", [name for name in ours if name in told]),
        ("left in the file, told by dont_load", [name for name in surplus if name in told]),
        ("left in the file, as the model has none", [name for name in surplus if name not in told])):
        lines += [f"{what}: {first_few(names, 8)}"] if names else []
    return map_with_names(lambda name, leaf: taken.get(name, leaf), init), Report(tuple(lines))


def _refuse(what: str, names: Sequence[str]) -> None:
    if names:
        raise ConfigError("model_init", f"it {what} {first_few(names, 3)}. Where that is meant, name what is to begin "
                                        "anew or to be left in the file in model_load.dont_load, a list of regexes")
