"""Meshes, and who holds which rows of a batch."""
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cb_vit import dist
from cb_vit.config import ConfigError, Failure


def mesh_of(shape, names, order=None):
    """A mesh whose devices stand in any order."""
    devices = np.asarray(jax.devices(), object)
    return Mesh((devices if order is None else devices[order]).reshape(shape), names)


@pytest.mark.parametrize("axes, shape", [
    ([("data", -1)], (8,)), ([("data", 8)], (8,)), ([("data", -1), ("model", 2)], (4, 2)),
    ((("replica", 2), ("fsdp", -1), ("model", 1)), (2, 4, 1))])
def test_a_mesh_of_the_asked_shape_with_auto_axes(axes, shape):
    mesh = dist.create_mesh(axes)
    assert mesh.axis_names == tuple(name for name, _ in axes)
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.ravel()) == set(jax.devices())


def test_a_mesh_of_some_devices():
    assert list(dist.create_mesh([("data", -1)], devices=jax.devices()[2:5]).devices) == jax.devices()[2:5]


@pytest.mark.parametrize("axes", [
    [("data", -1), ("model", -1)], [("data", 4), ("data", 2)], [("data", 0)], [("data", -2), ("model", 4)]])
def test_sizes_that_make_no_mesh(axes):
    with pytest.raises(ConfigError, match=r"^config.mesh: needs distinct names and sizes of 1 or more, at most one -1"):
        dist.create_mesh(axes)


@pytest.mark.parametrize("axes", [[("data", 3)], [("data", 4)], [("data", 16)], [("data", -1), ("model", 3)], []])
def test_sizes_that_do_not_make_up_the_devices(axes):
    with pytest.raises(ConfigError, match=r"^config.mesh: .* does not make up the 8 devices here; let one axis be -1"):
        dist.create_mesh(axes)


def test_a_torus_that_the_sizes_do_not_tile(monkeypatch):
    def refuse(*args, **kw):
        raise NotImplementedError("Failed to find assignment")

    monkeypatch.setattr(dist.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(ConfigError, match="^config.mesh: .*Failed to find assignment.*mesh_allow_split_physical_axes"):
        dist.create_mesh([("data", -1)])


ORDER = [5, 2, 7, 0, 3, 6, 1, 4]
SHARDINGS = {
    "data": dist.batch_sharding(mesh_of((8,), ("data",)), "data"),
    "permuted": dist.batch_sharding(mesh_of((8,), ("data",), ORDER), "data"),
    "model": dist.batch_sharding(mesh_of((4, 2), ("data", "model"), ORDER), ["data"]),
    "two axes": dist.batch_sharding(mesh_of((2, 4), ("replica", "data"), ORDER), ("replica", "data")),
    "reversed axes": dist.batch_sharding(mesh_of((2, 4), ("replica", "data"), ORDER), ("data", "replica")),
    "replicated": dist.replicated(mesh_of((8,), ("data",), ORDER)),
}


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS.keys())
def test_to_global_puts_every_row_where_the_sharding_says(sharding):
    batch = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "_mask": np.arange(16) % 3 == 0}
    rows = dist.local_rows(sharding, 16)
    np.testing.assert_array_equal(rows, np.arange(16))  # one process holds all rows, each once, ascending
    placed = dist.to_global(batch, rows, sharding, 16)
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(sharding, array.ndim) and array.dtype == batch[name].dtype
        np.testing.assert_array_equal(array, batch[name])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])


@pytest.fixture
def one_of_four_hosts(monkeypatch):
    """Shardings as a host sees them that has only devices 2 and 3."""
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: {
        device: index for device, index in self.devices_indices_map(shape).items() if device.id in (2, 3)})


@pytest.mark.parametrize("name, rows", [
    ("data", [4, 5, 6, 7]),  # devices 2 and 3
    ("permuted", [2, 3, 8, 9]),  # they stand second and fifth in the mesh: not next to each other
    ("model", [0, 1, 2, 3, 8, 9, 10, 11]),  # each shares its rows with a neighbour of another host
    ("replicated", list(range(16))),
])
def test_a_host_of_several_loads_the_rows_of_its_own_devices(name, rows, one_of_four_hosts):
    np.testing.assert_array_equal(dist.local_rows(SHARDINGS[name], 16), rows)


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_host_of_several_builds_its_shards_from_its_own_rows(name, monkeypatch, one_of_four_hosts):
    sharding, batch = SHARDINGS[name], np.random.default_rng(0).normal(size=(16, 3))
    rows = dist.local_rows(sharding, 16)
    built = []

    def make(shape, _, shard):
        built.extend((index, shard(index)) for index in sharding.addressable_devices_indices_map(shape).values())
        return jax.numpy.zeros(())

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    dist.to_global(batch[rows], rows, sharding, 16)
    assert len(built) == 2
    for index, array in built:
        np.testing.assert_array_equal(array, batch[index])


def test_shardings_of_batches_and_of_what_is_whole():
    mesh = mesh_of((4, 2), ("data", "model"))
    assert dist.batch_sharding(mesh, "data").spec == P(("data",))
    assert dist.batch_sharding(mesh, ("data", "model")).shard_shape((16, 3)) == (2, 3)
    assert dist.batch_sharding(mesh, ()).is_fully_replicated
    assert dist.replicated(mesh).spec == P()


def test_alone_there_is_nobody_to_wait_for():
    assert dist.agree(True) is True and dist.agree(False) is False


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` is called with, in an environment of no cluster."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS",
                 "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append((args, kw)))
    return calls


@pytest.mark.parametrize("env, call", [
    ({}, None), ({"SLURM_NTASKS": "2"}, None), ({"SLURM_STEP_NUM_TASKS": "2"}, ((), {})),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, ((), {})),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, (("a:1",), dict(num_processes=None, process_id=None))),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
     (("a:1",), dict(num_processes=2, process_id=0)))])
def test_processes_join_only_where_there_are_several(env, call, joined, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    dist.initialize()
    wait = {"shutdown_timeout_seconds": dist.SHUTDOWN}
    assert joined == ([] if call is None else [(call[0], call[1] | wait)])


def test_a_process_count_that_is_no_number(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="^JAX_NUM_PROCESSES: expected a whole number, got 'two'$"):
        dist.initialize()


def test_what_fails_on_one_process_fails_on_all(monkeypatch):
    assert dist.worst(3) == 3 and dist.together(lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        dist.together(lambda: 1 / 0)
    monkeypatch.setattr(dist, "worst", lambda number: 1)
    with pytest.raises(Failure, match="another process cannot go on; it says why"):
        dist.together(lambda: "result")


@pytest.mark.parametrize("name, value", [
    ("jax_disable_jit", True), ("jax_numpy_dtype_promotion", "strict"), ("jax_transfer_guard", "disallow"),
    ("jax_transfer_guard_host_to_device", "disallow_explicit")])
def test_settings_of_jax_that_no_run_can_do_with_are_refused(name, value):
    dist.check_jax()
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(ConfigError, match=f"^{name.upper()}: cannot be {value} in training, as .*; unset it"):
            dist.check_jax()
    finally:
        jax.config.update(name, before)
    dist.check_jax()
