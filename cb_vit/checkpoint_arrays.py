"""Arrays as a checkpoint has them: in loop layout; their names, shapes, dtypes and checksums, whatever the sharding."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cb_vit.models.common import to_loop
from cb_vit.tree import flatten_with_names

Tree = Any


def describe(tree: Tree) -> dict[str, list[Any]]:
    """`{name: [shape, dtype]}` of every leaf, in JAX's leaf order, as JSON holds them."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flatten_with_names(tree)[0]}


def checksums(tree: Tree) -> list[int]:
    """One 32-bit number for each leaf, in JAX's leaf order; the same for any sharding."""
    # A program a shape compiles five times faster than one for the tree; each is waited for, since many small
    # collectives under way at once can lock up simulated CPU devices.
    return [int(_checksum(leaf)) for leaf in jax.tree.leaves(tree)]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Σ hash(word ⊕ hash(place)) modulo 2³², over the words of an array.

    A sum of integers does not depend on its order, so not on the sharding either. The hash is a
    permutation: a changed word is always seen, words that changed places but for one time in 2³².
    """
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    # The bits, not the values: -0 and 0 differ, and so do NaNs.
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(_hash(bits.astype(jnp.uint32) ^ _hash(place)), dtype=jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, a permutation of 32-bit words."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def in_loop(tree: Tree) -> Tree:
    """`to_loop` on the devices; each block keeps the sharding that it has in the stack.

    Args:
        tree: arrays in the model's own layout.
    """
    target = in_loop_layout(tree)
    # In loop layout nothing is to be done, and a jitted identity would copy the whole state.
    if jax.tree.structure(target) == jax.tree.structure(tree):
        return tree
    return jax.jit(to_loop, out_shardings=shardings(target))(tree)


def in_loop_layout(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of `to_loop(tree)`, without computing it."""
    return jax.tree.map(lambda leaf: leaf.struct, to_loop(jax.tree.map(_Abstract, tree)))


def shardings(tree: Tree) -> Tree:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


class _Abstract:
    """An array without values, that `to_loop` can take apart along its first axis."""

    def __init__(self, leaf: jax.Array | jax.ShapeDtypeStruct):
        self.struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    def __len__(self) -> int:
        return self.struct.shape[0]

    def __getitem__(self, index: int) -> _Abstract:
        shape, where = self.struct.shape[1:], self.struct.sharding
        # The stack's own axis has no place in a block; a mesh axis that shards it is not used there.
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
        return _Abstract(jax.ShapeDtypeStruct(shape, self.struct.dtype, sharding=where))
