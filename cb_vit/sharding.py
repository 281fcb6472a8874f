"""Where parameters and optimiser state live: (regex, rule) pairs, as in big_vision.

`config.sharding_strategy = [(".*", "fsdp(axis='data')")]`: the first regex that matches a leaf's whole
name picks its rules, applied left to right. Names start with `params/` or `opt/`; a leaf of the optimiser
that mirrors a parameter ends in that parameter's name, so one regex can serve both. Data parallel, FSDP
and tensor parallel are rules, not code paths.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cb_vit.config import ConfigError
from cb_vit.registry import Registry, parse_calls
from cb_vit.tree import check_rules, first_match, map_with_names

Tree = Any
Spec = list[Any]  # one entry an array axis: None, a mesh axis, or a tuple of them
Rule = Callable[[Spec, jax.ShapeDtypeStruct, Mesh], Spec]
Strategy = tuple[tuple[str, tuple[Rule, ...]], ...]  # regexes of names, and the rules of each
RULES: Registry[Callable[..., Rule]] = Registry("sharding rule")


@RULES.register("replicate")
def replicate() -> Rule:
    """Every device holds the whole array."""
    return lambda spec, leaf, mesh: [None] * len(spec)


@RULES.register("fsdp")
def fsdp(axis: str | tuple[str, ...] = "data", min_size_to_shard_mb: float = 4) -> Rule:
    """Shard the longest free array axis that the mesh axis divides; small arrays stay whole.

    Args:
        axis: the mesh axis to shard over, or several taken together.
        min_size_to_shard_mb: size in MiB below which arrays stay whole: gathering them costs more than the memory they
            save.
    """
    def rule(spec: Spec, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> Spec:
        size = _axis_size(mesh, axis)
        if np.prod(leaf.shape) * leaf.dtype.itemsize < min_size_to_shard_mb * 2**20:
            return spec
        free = [i for i, taken in enumerate(spec) if taken is None and leaf.shape[i] % size == 0]
        if not free:
            return spec
        longest = max(free, key=lambda i: leaf.shape[i])
        return [axis if i == longest else taken for i, taken in enumerate(spec)]

    return rule


@RULES.register("shard_dim")
def shard_dim(axis: str | tuple[str, ...], dim: int) -> Rule:
    """Shard array axis `dim` over mesh axis `axis`; tensor parallelism is made of these.

    Args:
        axis: the mesh axis to shard over, or several taken together.
        dim: the array axis to shard; counted from the end when negative, which serves loop and scan layout alike.
    """
    def rule(spec: Spec, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> Spec:
        size, index = _axis_size(mesh, axis), dim + len(spec) if dim < 0 else dim
        if not 0 <= index < len(spec):
            raise ValueError(f"an array of shape {leaf.shape} has no axis {dim}")
        if spec[index] is not None:
            raise ValueError(f"axis {dim} of an array of shape {leaf.shape} is sharded twice")
        if leaf.shape[index] % size:
            raise ValueError(f"axis {dim} of an array of shape {leaf.shape} is not divisible by {axis!r} = {size}")
        return [axis if i == index else taken for i, taken in enumerate(spec)]

    return rule


def _axis_size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    axes = (axis,) if isinstance(axis, str) else axis
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"the mesh has no axis {name!r}; config.mesh has {', '.join(mesh.shape)}")
    return int(np.prod([mesh.shape[name] for name in axes]))


def parse_strategy(strategy: Sequence[tuple[str, str]], path: str) -> Strategy:
    """Read (regex, "rule|rule") pairs.

    Args:
        strategy: the pairs of `config.sharding_strategy`.
        path: where the strategy stands in the config, for errors.

    Raises:
        ConfigError: at `path`, when a rule is unknown or its arguments do not fit.
    """
    return tuple((regex, tuple(call.bind(RULES.pick(call.name, f"{path}[{i}]"), f"{path}[{i}]")
                               for call in parse_calls(text, f"{path}[{i}]")))
                 for i, (regex, text) in enumerate(strategy))


def infer(tree: Tree, strategy: Strategy, mesh: Mesh, path: str = "config.sharding_strategy",
          partial: bool = False) -> Tree:
    """The sharding of every leaf.

    Args:
        tree: shapes of the state, `jax.ShapeDtypeStruct` leaves.
        strategy: as `parse_strategy` gives it; a leaf that no regex matches is replicated.
        mesh: the run's mesh.
        path: where the strategy stands in the config, for errors.
        partial: whether `tree` is only part of a state, so that some regexes may match nothing.

    Returns:
        `NamedSharding`s in the form of `tree`.

    Raises:
        ConfigError: a regex matches nothing, or a rule does not fit its leaf.
    """
    if not partial:
        check_rules(strategy, tree, path)

    def shard(name: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec: Spec = [None] * len(leaf.shape)
        try:
            for rule in first_match(name, strategy, default=()):
                spec = rule(spec, leaf, mesh)
            used = [name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)]
            if twice := [name for name in mesh.shape if used.count(name) > 1]:
                raise ValueError(f"mesh axis {twice[0]!r} shards two axes of an array of shape {leaf.shape}")
        except ValueError as error:
            raise ConfigError(path, f"{name}: {error}") from None
        # JAX takes the axes that are left out for None; one spelling of a sharding keeps equal ones equal.
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return map_with_names(shard, tree)


def place(params: Tree, strategy: Strategy | Sequence[tuple[str, str]], mesh: Mesh) -> Tree:
    """Where the rules of a run put parameters alone, of whatever model: their shapes, with shardings.

    Args:
        params: shapes of parameters, without the "params/" that names in a state have.
        strategy: as for `infer`, or in the words of `config.sharding_strategy`.
        mesh: the run's mesh.

    Raises:
        ConfigError: a rule does not fit its leaf.
    """
    if any(isinstance(rules, str) for _, rules in strategy):
        strategy = parse_strategy(strategy, "strategy")
    # Named as in a state, so that its rules serve; those of the optimiser find nothing here.
    where = infer({"params": params}, strategy, mesh, partial=True)["params"]
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        params, where)


@contextlib.contextmanager
def active_mesh(mesh: Mesh, rules: Sequence[tuple[str, str | tuple[str, ...]]]) -> Iterator[None]:
    """Trace and run jitted functions inside this context, in which names of activation axes mean mesh axes.

    Args:
        mesh: the run's device mesh.
        rules: the pairs (name of an activation axis, mesh axis or axes) of `config.sharding_rules`.
    """
    # `with mesh:` is deprecated in favour of `jax.set_mesh`. The rules are Linen's, global while they hold; a function
    # that is traced outside them is compiled without any constraint on activations.
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield
