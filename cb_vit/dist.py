"""Processes, devices and global arrays: one mesh, and who holds which rows of a batch."""
from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cb_vit.config import ConfigError, Failure

Tree = Any
T = TypeVar("T")
# JAX's own is 300: so long would the processes of a run hang after one of them failed, and then abort.
SHUTDOWN = 60  # seconds


def initialize() -> None:
    """Join the processes of a pod or cluster, where there is one; call before any other use of JAX.

    Joins when `JAX_COORDINATOR_ADDRESS` (with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`) is set, under
    SLURM or Open MPI with several tasks, and on Cloud TPU, whose topology JAX finds by itself.

    Raises:
        ConfigError: one of these variables is no number.
    """
    env = os.environ
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        ids = {}
        for field, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            if name in env and not env[name].isdigit():
                raise ConfigError(name, f"expected a whole number, got {env[name]!r}")
            ids[field] = int(env[name]) if name in env else None
        jax.distributed.initialize(address, **ids, shutdown_timeout_seconds=SHUTDOWN)
    elif any(env.get(tasks, "1") != "1" for tasks in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")) or _on_tpu():
        jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN)


def check_jax() -> None:
    """Refuse what JAX itself can be told and no run can do with; its other settings may be as they like.

    Raises:
        ConfigError: names the environment variable.
    """
    guards = ["jax_transfer_guard" + way for way in ("", "_host_to_device", "_device_to_device", "_device_to_host")]
    for name, refused, why in (
        ("jax_disable_jit", (True,), "the train step is compiled for its mesh"),
        ("jax_numpy_dtype_promotion", ("strict",), "optax and Flax mix dtypes"),
        *((guard, ("disallow", "disallow_explicit"), "numbers are moved to and from the devices") for guard in guards)):
        if (value := getattr(jax.config, name)) in refused:
            raise ConfigError(name.upper(), f"cannot be {value} in training, as {why}; unset it")


def _on_tpu() -> bool:
    devices = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    return devices and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def create_mesh(
    axes: Sequence[tuple[str, int]],
    allow_split_physical_axes: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The device mesh of a run, with Auto axis types.

    Args:
        axes: (name, size) pairs, outermost first, as in `config.mesh`; one size may be -1: the rest.
        allow_split_physical_axes: whether a logical axis may take part of a physical one (TPU tori).
        devices: the devices, laid out in this order; None: all devices of all processes, laid out as their wiring is
            best used.

    Raises:
        ConfigError: at "config.mesh" when the sizes do not make up the devices.
    """
    in_order, devices = devices is not None, jax.devices() if devices is None else list(devices)
    names, sizes = [name for name, _ in axes], [size for _, size in axes]
    known = math.prod(size for size in sizes if size != -1)
    if len(set(names)) < len(names) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError("config.mesh", f"needs distinct names and sizes of 1 or more, at most one -1; got {axes}")
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ConfigError("config.mesh", f"{list(axes)} does not make up the {len(devices)} devices here; "
                                         "let one axis be -1, or change the sizes")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    try:
        grid = np.reshape(devices, sizes) if in_order else mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=allow_split_physical_axes)
    except (ValueError, NotImplementedError) as error:  # a torus that these sizes do not tile
        raise ConfigError("config.mesh", f"{list(axes)} does not fit how the devices are wired ({error}); change the "
                                         "sizes, or set config.mesh_allow_split_physical_axes=True") from None
    # JAX's own default in `jax.make_mesh` is Explicit, with which a step under FSDP's rules does not trace
    # (DuplicateSpecError, ShardingTypeError).
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def batch_sharding(mesh: Mesh, axes: str | Sequence[str]) -> NamedSharding:
    """Sharding of a batch: its leading axis over some mesh axes, all else replicated.

    Args:
        mesh: the run's device mesh.
        axes: the mesh axis or axes over which examples are spread.
    """
    return NamedSharding(mesh, PartitionSpec(tuple([axes] if isinstance(axes, str) else axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending, without repeats.

    Asked of the sharding, not computed from `process_index`: TPU meshes permute processes, and
    hosts that share a model-parallel group hold the same rows.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def to_global(local: Tree, rows: np.ndarray, sharding: NamedSharding, batch_size: int) -> Tree:
    """The global batch of which this process holds `rows`.

    Args:
        local: the rows that this process loaded, in the order of `rows`: a tree of arrays [len(rows) ...].
        rows: the numbers of these rows in the global batch, as `local_rows` gives them.
        sharding: the sharding of the batch, as `batch_sharding` gives it.
        batch_size: number of rows in the global batch.
    """
    def build(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            # A shard's rows follow each other in the batch, and all are among `rows`, so they do here as well.
            start = int(np.searchsorted(rows, first))
            return array[start:start + last - first]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return jax.tree.map(build, local)


def agree(flag: bool) -> bool:
    """The first process's `flag`, on all of them; a barrier for all of them."""
    return bool(first(np.asarray(flag)))


def first(arrays: Tree) -> Tree:
    """The first process's arrays, on all of them; a barrier for all of them.

    Args:
        arrays: a tree of NumPy arrays, of the same shapes on all processes.
    """
    return arrays if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(arrays)


def worst(number: int) -> int:
    """The highest `number` on any process; a barrier for all of them."""
    return int(number) if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(number))))


def alike(text: str) -> bool:
    """Whether `text` is the same on all processes."""
    if jax.process_count() == 1:
        return True
    # A digest has one length everywhere, as arrays that are gathered must.
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool(np.all(multihost_utils.process_allgather(digest) == digest))


def together(action: Callable[[], T]) -> T:
    """What `action()` returns on this process; where it fails on one of them it fails on all, and none waits in vain.

    Args:
        action: the function to call; it must not wait for other processes itself.

    Raises:
        Exception: what `action` raised on this process.
        Failure: another process has failed, and says why.
    """
    try:
        result, error = action(), None
    except Exception as found:
        result, error = None, found
    failed = worst(error is not None)
    if error is not None:
        raise error
    if failed:
        raise Failure("another process cannot go on; it says why")
    return result
