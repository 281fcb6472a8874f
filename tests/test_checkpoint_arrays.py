"""Checksums see every change of a value or its place, and no sharding."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.checkpoint_arrays import checksums


def checksum(x):
    value, = checksums(x)
    return value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_sees_every_change_and_no_sharding(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 32))
    x = jnp.asarray(values > 0 if dtype == "bool" else 100 * values, dtype)
    expected = checksum(x)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in [("a",), ("b", "a"), (("a", "b"),), (None, "b"), ()]:
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert checksum(jax.device_put(x, where)) == expected
    flat = np.asarray(x).reshape(-1)
    for place in rng.integers(0, flat.size, 20):
        changed = flat.copy()
        changed.view(np.uint8)[place * flat.itemsize] ^= 1
        assert checksum(jnp.asarray(changed.reshape(x.shape))) != expected
    for i, j in rng.integers(0, flat.size, (20, 2)):
        if flat[i] != flat[j]:
            swapped = flat.copy()
            swapped[[i, j]] = flat[[j, i]]
            assert checksum(jnp.asarray(swapped.reshape(x.shape))) != expected
    assert checksum(x.T) != expected and checksum(x[::-1]) != expected


def test_checksum_sees_swaps_of_round_numbers():
    """Values with few bits set, swapped over round distances: where weighted sums modulo 2³² fail."""
    for a, b in [(1.0, -1.0), (1.0, 2.0), (0.5, 0.0), (256.0, -0.0)]:
        for distance in (1, 2, 256, 4096):
            x, y = np.zeros((2, 8192), np.float32)
            x[0], x[distance], y[0], y[distance] = a, b, b, a
            assert checksum(jnp.asarray(x)) != checksum(jnp.asarray(y))
