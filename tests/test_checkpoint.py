"""Checkpoints: bit for bit there and back, onto any devices and layouts, and what happens to damaged ones."""
import contextlib
import errno
import math
import os
import pathlib
import re
import resource
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from cb_vit import checkpoint, checkpoint_reading, damage, experiment, io, retry
from cb_vit.checkpoint import Checkpointer, KeepBest, saved_steps
from cb_vit.checkpoint_arrays import checksums
from cb_vit.checkpoint_reading import Mismatch
from cb_vit.config import ConfigError, Failure
from cb_vit.damage import Unreadable
from cb_vit.io import CannotWrite
from cb_vit.models.common import to_loop, to_scan
from cb_vit.settings import check
from cb_vit.train_state import TrainState
from cb_vit.tree import flatten_with_names

FSDP = ((".*", "fsdp(axis='data', min_size_to_shard_mb=0)"),)
TENSOR = (
    (r".*/(query|key|value)/kernel", "shard_dim('model', -2)"), (r".*/out/kernel", "shard_dim('model', -3)"),
    (r".*/MlpBlock_0/Dense_0/kernel", "shard_dim('model', -1)"), (r".*/Dense_1/kernel", "shard_dim('model', -2)"))
FROZEN = (("embedding/.*|pos_embedding", None), (".*", dict(decay_type="cosine")))


def build(devices=8, model=(), **changes):
    """A tiny experiment."""
    data = dict(name="fake", split="train", num_examples=64, image_size=8, num_classes=3)
    config = dict(
        seed=0, total_steps=10, lr=1e-3, weight_decay=0.1,
        input=dict(data=data, batch_size=8, pp="value_range|onehot(3)"),
        model=dict(dict(patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2, context="cb_s"), **dict(model)))
    return experiment.build(check(config | changes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def run():
    return build(devices=1, model=dict(depth=1))


def filled(run, step, seed=0):
    """A state of random bits (but no NaN: those do not equal themselves), where `run` keeps it."""
    rng = np.random.default_rng((seed, step))

    def fill(leaf):
        values = rng.integers(0, 100, leaf.shape) if leaf.dtype == jnp.int32 else rng.normal(size=leaf.shape)
        return np.asarray(values).astype(leaf.dtype)

    state = jax.tree.map(fill, run.shapes).replace(step=np.int32(step), finite=np.bool_(True))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, run.shapes))


@contextlib.contextmanager
def opened(folder, **settings):
    with contextlib.closing(Checkpointer(folder / "checkpoints", **settings)) as checkpointer:
        yield checkpointer


def save(run, folder, *steps, **settings):
    with opened(folder, **{"keep_last": 100, **settings}) as checkpointer:
        for step in steps:
            assert checkpointer.save(filled(run, step), {"note": step})


def restore(run, folder, **settings):
    """(state, meta), or None."""
    with opened(folder, **{"keep_last": 100, **settings}) as checkpointer:
        return checkpointer.restore_latest(run.shapes, run.settings.model.scan)


def assert_equal(got, expected):
    """The same names, dtypes and bits."""
    (a, _), (b, _) = flatten_with_names(got), flatten_with_names(expected)
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


def assert_placed(state, run):
    jax.tree.map(lambda x, like: np.testing.assert_equal(x.sharding.is_equivalent_to(like.sharding, x.ndim), True),
                 state, run.shapes)


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def small(step):
    """A state of one parameter."""
    return TrainState(jnp.int32(step), {"w": jnp.arange(3.0)}, {"m": jnp.arange(3.0)}, jnp.asarray(True))


def snapshot(folder):
    """Name, size and time of everything under `folder`."""
    return {os.path.join(root, name): (os.stat(os.path.join(root, name)).st_size,
                                       os.stat(os.path.join(root, name)).st_mtime_ns)
            for root, folders, files in os.walk(folder) for name in files + folders}


# --- There and back ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, dict(schedule=FROZEN), dict(optax=dict(mu_dtype="bfloat16")), dict(optax_name="trace", optax=dict(decay=0.9)),
    dict(model=dict(scan=True)), dict(model=dict(scan=True), schedule=FROZEN, sharding_strategy=FSDP)])
def test_round_trip_is_bit_equal(tmp_path, changes):
    run = build(**changes)
    save(run, tmp_path, 5)
    state, meta = restore(run, tmp_path)
    assert_equal(state, filled(run, 5))
    assert_placed(state, run)
    assert meta["note"] == 5 and meta["step"] == 5 and not any("encoderblock/" in name for name in meta["arrays"])


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_loop_and_scan_read_each_others_checkpoints(tmp_path, before, after):
    old, new = build(model=dict(scan=before)), build(model=dict(scan=after), sharding_strategy=FSDP)
    save(old, tmp_path, 3)
    state, _ = restore(new, tmp_path)
    assert_equal(state, jax.tree.map(np.asarray, (to_scan if after else to_loop)(filled(old, 3))))
    assert_placed(state, new)


# --- Storage that fails -----------------------------------------------------------------------------------------

def test_a_save_that_fails_in_the_background_is_told_once_and_the_one_before_stays(tmp_path):
    """No file can grow past 4 KiB, as on a disk that is full."""
    big = TrainState(jnp.int32(2), {"w": jnp.arange(9000.0)}, {}, jnp.asarray(True))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = rf"^{tmp_path}/checkpoints cannot be written: File too large; raise ulimit -f$"
    for told in (Checkpointer.check, Checkpointer.wait, Checkpointer.close, None):
        with pytest.raises(CannotWrite, match=said), opened(tmp_path, keep_last=9) as checkpointer:
            checkpointer.save(small(1), {})
            checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            try:
                checkpointer.save(big, {})
                while checkpointer._manager.is_saving_in_progress():
                    time.sleep(0.01)
                if told is None:
                    checkpointer.save(small(3), {})
                told(checkpointer)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert saved_steps(tmp_path / "checkpoints") == [1]
        assert checkpointer.last_good() == f"the last good checkpoint is step 1 in {tmp_path}/checkpoints"


def test_a_folder_that_has_gone_is_not_made_anew(tmp_path):
    with opened(tmp_path) as checkpointer:
        assert checkpointer.last_good() == "there is no checkpoint yet"
        checkpointer.save(small(1), {})
        checkpointer.wait()
        shutil.rmtree(tmp_path)
        with pytest.raises(CannotWrite, match=r"No such file or directory; it was removed, moved or unmounted; put "):
            checkpointer.save(small(2), {})
        assert not tmp_path.exists() and "step 1 in" in checkpointer.last_good()


LAYOUTS = {
    "whole": dict(devices=8), "fsdp": dict(devices=8, sharding_strategy=FSDP), "half": dict(devices=4),
    "half fsdp": dict(devices=4, sharding_strategy=FSDP), "one": dict(devices=1),
    "tensor": dict(devices=8, mesh=(("data", 4), ("model", 2)), sharding_strategy=TENSOR),
    "scan fsdp": dict(devices=8, sharding_strategy=FSDP, model=dict(scan=True))}


@pytest.mark.parametrize("before, after", [
    ("whole", "half fsdp"), ("fsdp", "half"), ("fsdp", "tensor"), ("tensor", "one"), ("scan fsdp", "tensor"),
    ("tensor", "scan fsdp")])
def test_restore_onto_other_devices_and_shardings(tmp_path, before, after):
    old, new = build(**LAYOUTS[before]), build(**LAYOUTS[after])
    save(old, tmp_path, 1)
    state, _ = restore(new, tmp_path)
    assert_placed(state, new)
    assert_equal(jax.tree.map(np.asarray, to_loop(state)), jax.tree.map(np.asarray, to_loop(filled(old, 1))))


def test_blocks_taken_out_of_a_scanned_stack_keep_their_sharding(tmp_path, monkeypatch):
    """No device ever holds a whole copy of a sharded parameter, saving or restoring."""
    run, saved = build(**LAYOUTS["scan fsdp"]), []
    for module in (checkpoint, checkpoint_reading):
        monkeypatch.setattr(module, "checksums", lambda tree: saved.extend(jax.tree.leaves(tree)) or checksums(tree))
    save(run, tmp_path, 1)
    restore(run, tmp_path)
    kernels = [leaf for leaf in saved if leaf.shape == (16, 32)]
    assert len(kernels) == 2 * 2 * 3  # saved and restored, two blocks, Adam's two moments and the parameter
    assert {leaf.addressable_shards[0].data.shape for leaf in kernels} == {(16, 4)}


def test_a_save_under_way_is_not_touched_by_the_steps_that_follow(tmp_path):
    run = build(devices=8, model=dict(depth=1, width=32, mlp_dim=512))
    state, expected = filled(run, 1), jax.tree.map(np.array, filled(run, 1))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype) if x.dtype != bool else x, state),
                   donate_argnums=0)
    with opened(tmp_path) as checkpointer:
        checkpointer.save(state, {})
        for _ in range(3):
            state = step(state)
        checkpointer.wait()
    assert_equal(restore(run, tmp_path)[0], expected)


# --- Damage -----------------------------------------------------------------------------------------------------

def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 4, len(content), 64):  # some bytes of a file are read by nobody
        content[place] ^= 0x55
    path.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damages(folder):
    """What may go wrong with the files of a checkpoint: (what, how). `opt` is stored as `params` is."""
    names = [path.relative_to(folder) for path in files(folder)]
    yield from ((f"{how.__name__} {name}", lambda f, how=how, name=name: how(f / name))
                for name in names if name.parts[0] != "opt" for how in (truncate, flip, pathlib.Path.unlink))
    yield from ((f"without {item}", lambda f, item=item: shutil.rmtree(f / item)) for item in ("params", "opt", "meta"))
    yield "empty", empty
    yield "flip the largest", lambda f: flip(largest(f))


def test_damage_is_noticed_set_aside_and_the_one_before_is_taken(tmp_path, run, caplog):
    """A file that matters to no value may be damaged unnoticed; then the values are the right ones."""
    whole = tmp_path / "whole"
    save(run, whole, 1, 2)
    expected = {step: filled(run, step) for step in (1, 2)}
    noticed = {}
    for number, (what, harm) in enumerate(damages(whole / "checkpoints" / "2")):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        harm(folder / "checkpoints" / "2")
        caplog.clear()
        with opened(folder) as checkpointer:
            state, meta = checkpointer.restore_latest(run.shapes, False)
            assert_equal(state, expected[meta["note"]])
            noticed[what] = meta["note"] == 1
            if noticed[what]:
                assert "checkpoint 2 is damaged" in caplog.text
                assert [path.name for path in (folder / "damaged_checkpoints").iterdir()] == ["2"], what
                assert checkpointer.latest_step() == 1 and steps_in(folder) == [1]
    matter = [what for what in noticed if re.search(r"\w+ (params/d/|meta/metadata)|without|empty|largest", what)]
    assert len(matter) >= 11 and all(noticed[what] for what in matter), noticed


def test_after_a_damaged_checkpoint_its_step_can_be_saved_again(tmp_path, run):
    save(run, tmp_path, 1, 2)
    empty(tmp_path / "checkpoints" / "2")
    with opened(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.restore_latest(run.shapes, False)[1]["note"] == 1
        assert checkpointer.save(filled(run, 2), {"note": 2})
        checkpointer.wait()
        assert_equal(checkpointer.restore_latest(run.shapes, False)[0], filled(run, 2))
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("item", ["params", "opt"])
def test_a_bit_that_only_the_checksum_can_see_is_seen(tmp_path, run, caplog, monkeypatch, item):
    save(run, tmp_path, 1, 2)
    restore_well = ocp.PyTreeCheckpointHandler.restore

    def restore_badly(self, directory, args):
        found = restore_well(self, directory, args=args)
        if directory.parts[-2:] != ("2", item):
            return found
        leaves, treedef = jax.tree.flatten(found)
        last = np.array(leaves[-1])
        last.view(np.uint32).flat[0] ^= 1
        return jax.tree.unflatten(treedef, [*leaves[:-1], jax.device_put(last, leaves[-1].sharding)])

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore_badly)
    assert restore(run, tmp_path)[1]["note"] == 1
    assert f"checksum of {item}/" in caplog.text


def test_where_none_is_sound_none_is_given_up(tmp_path, run):
    """A supervisor repeats its command at every preemption: what it repeats must not begin anew."""
    save(run, tmp_path, 1, 2, 3)
    for step in steps_in(tmp_path):
        flip(largest(tmp_path / "checkpoints" / str(step)))
    before = snapshot(tmp_path)
    for _ in range(2):
        with pytest.raises(Failure, match=r"no checkpoint in .* is sound \(step 3: .*; step 2: .*; step 1: .*\); "
                                          "nothing is changed.* set aside what is damaged: mkdir -p ") as error:
            restore(run, tmp_path)
        assert snapshot(tmp_path) == before
    subprocess.run(str(error.value).partition("damaged: ")[2], shell=True, check=True)
    assert restore(run, tmp_path) is None
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints" / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_one_that_no_sound_one_precedes_stays(tmp_path, run):
    """Also where an older one is sound but of another model: then nothing is known to be right."""
    save(run, tmp_path, 1, 2)
    empty(tmp_path / "checkpoints" / "2")
    before = snapshot(tmp_path)
    with pytest.raises(Mismatch, match="checkpoint 1 in "):
        restore(build(devices=1, model=dict(depth=2)), tmp_path)
    assert snapshot(tmp_path) == before


def test_a_step_may_be_damaged_twice(tmp_path, run):
    save(run, tmp_path, 1)
    for _ in range(2):
        save(run, tmp_path, 2)
        truncate(largest(tmp_path / "checkpoints" / "2"))
        assert restore(run, tmp_path)[1]["note"] == 1
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["2", "2-2"]


def test_what_cannot_be_set_aside_is_told(tmp_path, run):
    save(run, tmp_path, 1, 2)
    empty(tmp_path / "checkpoints" / "2")
    (tmp_path / "damaged_checkpoints").write_text("")
    with pytest.raises(Failure, match=f"checkpoint 2 in .* is damaged .* cannot be moved to {tmp_path}/damaged_"):
        restore(run, tmp_path)


# --- Trouble ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A workdir with small checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("pair")
    with opened(folder, keep_last=9) as checkpointer:
        for step in (1, 2):
            checkpointer.save(small(step), {}, {"loss": step / 10})
    return folder


@pytest.fixture
def workdir(pair, tmp_path):
    return shutil.copytree(pair, tmp_path / "run")


@pytest.fixture
def waits(monkeypatch):
    """Seconds slept between attempts, which nobody waits for."""
    slept = []
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(sleep=slept.append))
    return slept


def latest(folder, **settings):
    """The step of the newest sound one."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "d")
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), small(0))
    with opened(folder, **{"keep_last": 9, **settings}) as checkpointer:
        return int(checkpointer.restore_latest(like, False)[0].step)


def shapes_then_params(folder):
    with opened(folder, read_only=True) as checkpointer:
        step, shapes = checkpointer.params_shapes()
        checkpointer.restore_params(step, placed(shapes))
        return step


READERS = {"restore": latest, "read only": lambda folder: latest(folder, read_only=True),
           "keep best": lambda folder: latest(folder, keep_best=KeepBest("loss")), "parameters": shapes_then_params}


def breaking(patch, match, error, hits=math.inf):
    """Let the lowest readers meet `error` at paths that contain `match`, `hits` times; lists where they did."""
    met = []

    def broken(real):
        def read(self, *args, **kw):
            path = f"{args[0] if args else self}/"
            if match in path and len(met) < hits:
                met.append(path)
                raise error
            return real(self, *args, **kw)
        return read

    for owner, name in ((epath.gpath.PosixGPath, "read_bytes"), (epath.gpath.PosixGPath, "iterdir"),
                        (ocp.PyTreeCheckpointHandler, "restore")):
        patch.setattr(owner, name, broken(getattr(owner, name)))
    return met


EIO, DENIED = OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("where", ["/2/meta/", "/2/params/", "/checkpoints/"])
def test_trouble_is_given_time_to_pass(workdir, monkeypatch, waits, where):
    for read in READERS.values():
        waits.clear()
        with monkeypatch.context() as patch:
            met = breaking(patch, where, EIO, 2)
            assert read(workdir) == 2
        assert len(met) == 2 and waits == [1, 2]
    assert steps_in(workdir) == [1, 2] and not (workdir / "damaged_checkpoints").exists()


@pytest.mark.parametrize("error, asked", [
    (EIO, [1, 2, 4, 8]), (DENIED, []), (ValueError("UNAVAILABLE: 503"), [1, 2, 4, 8])])
def test_trouble_that_stays_stops_every_reader_and_changes_nothing(workdir, monkeypatch, waits, error, asked):
    before = snapshot(workdir)
    for where, what in (("/2/meta/", "checkpoint 2 in "), ("/2/params/", "checkpoint 2 in "), ("/checkpoints/", "")):
        for read in READERS.values():
            waits.clear()
            with monkeypatch.context() as patch, pytest.raises(Unreadable) as told:
                breaking(patch, where, error)
                read(workdir)
            assert str(told.value) == f"{what}{workdir}/checkpoints cannot be read ({error}); nothing is changed"
            assert waits == asked and snapshot(workdir) == before


@pytest.mark.parametrize("error", [
    FileNotFoundError("not found"), KeyError("params"), ValueError("NOT_FOUND: Error"), ValueError("Expecting value")])
def test_what_cannot_be_looked_at_is_not_damaged(workdir, monkeypatch, waits, error):
    """Orbax takes a file that cannot be opened for one that is not there."""
    breaking(monkeypatch, "/2/params/", error)
    monkeypatch.setattr(damage, "read_whole", lambda folder: os.listdir(workdir / "nowhere"))
    with pytest.raises(Unreadable, match="checkpoint 2 in .*No such file"):
        latest(workdir)
    assert steps_in(workdir) == [1, 2]


def test_damage_that_is_not_seen_again_is_none(workdir, monkeypatch):
    breaking(monkeypatch, "/2/meta/", ValueError("Expecting value"), 1)
    assert latest(workdir) == 2


def test_the_best_is_not_forgotten_where_it_cannot_be_judged(workdir, caplog):
    truncate(workdir / "checkpoints" / "1" / "meta" / "metadata")
    with opened(workdir, keep_best=KeepBest("loss", mode="min")) as checkpointer:
        for step, loss in ((3, 0.9), (4, 0.8)):
            checkpointer.save(small(step), {}, {"loss": loss})
    assert steps_in(workdir) == [1, 2, 4] and "keep_best cannot judge checkpoint 1, and so keeps it" in caplog.text


def test_checkpoints_that_are_not_listed_are_not_taken_for_none(workdir, monkeypatch, waits):
    """Orbax sees an empty folder where it cannot look into one."""
    monkeypatch.setattr(ocp.CheckpointManager, "all_steps", lambda self: [])
    with pytest.raises(Unreadable, match=r"Orbax does not find \[1, 2\]"):
        latest(workdir)
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("make, what", [
    (lambda path: path.write_text(""), io.FILE), (lambda path: path.symlink_to("nowhere"), io.LINK)])
def test_what_is_no_folder_is_no_checkpoint(workdir, make, what):
    make(workdir / "checkpoints" / "12")
    with pytest.raises(ConfigError, match=f"^workdir: {workdir}/checkpoints/12 is {what}, and so no .*; move it away$"):
        latest(workdir)
    make(workdir / "x")
    with pytest.raises(ConfigError, match=f"^workdir: {workdir}/x is not a folder; move it away$"):
        Checkpointer(workdir / "x")


@pytest.mark.parametrize("changes, message", [
    (dict(model=dict(depth=2)), "lacks .*encoderblock_1.*another model or optimiser"),
    (dict(model=dict(depth=2, scan=True)), "lacks .*encoderblock_1"),
    (dict(model=dict(depth=1, width=32)), r"is float32 \[.*16.*\] in .* and float32 \[.*32.*\] in this config"),
    (dict(model=dict(depth=1, context="cb")), "has besides .*context_scale"),
    (dict(model=dict(depth=1), schedule=FROZEN), "has besides opt/.*embedding"),
    (dict(model=dict(depth=1), optax=dict(mu_dtype="bfloat16")), r"is float32 \[.*\] in checkpoint 2 .* and bfloat16")])
def test_another_model_is_a_mismatch_and_nothing_is_set_aside(tmp_path, run, changes, message):
    save(run, tmp_path, 1, 2)
    before = snapshot(tmp_path)
    with pytest.raises(Mismatch, match=f"^workdir: .*({message})") as error:
        restore(build(devices=1, **changes), tmp_path)
    assert isinstance(error.value, ConfigError) and "\n" not in str(error.value)
    assert snapshot(tmp_path) == before


def test_a_newer_format_is_named(tmp_path, run, monkeypatch):
    from cb_vit import checkpoint
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    save(run, tmp_path, 1)
    with pytest.raises(Mismatch, match="format 2, this version reads 1"):
        restore(run, tmp_path)


def test_a_half_written_save_is_ignored_and_removed(tmp_path, run):
    save(run, tmp_path, 1)
    checkpoints = tmp_path / "checkpoints"
    half = checkpoints / "2.orbax-checkpoint-tmp-1795228800000000"
    shutil.copytree(checkpoints / "1", half)
    assert restore(run, tmp_path, read_only=True)[1]["note"] == 1
    assert half.exists()
    assert restore(run, tmp_path)[1]["note"] == 1
    assert not half.exists() and steps_in(tmp_path) == [1]


def test_reading_only_changes_nothing(tmp_path, run):
    save(run, tmp_path, 1, 2, 3)
    before = snapshot(tmp_path)
    assert restore(run, tmp_path, read_only=True, keep_last=1)[1]["note"] == 3
    assert snapshot(tmp_path) == before
    truncate(largest(tmp_path / "checkpoints" / "3"))
    before = snapshot(tmp_path)
    with pytest.raises(Failure, match=f"newest checkpoint in {tmp_path}/checkpoints is damaged .step 3: .*nothing is "
                                      f"changed.* mv {tmp_path}/checkpoints/3 {tmp_path}/damaged_checkpoints/3$"):
        restore(run, tmp_path, read_only=True)
    assert snapshot(tmp_path) == before


# --- Parameters alone -------------------------------------------------------------------------------------------

def placed(shapes):
    """Shapes with shardings: the first axis spread over the devices where they divide it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        spec = ("data",) if leaf.shape and leaf.shape[0] % 8 == 0 else ()
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, shapes)


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_are_read_without_knowing_the_model(tmp_path, scan):
    run = build(model=dict(scan=scan), sharding_strategy=FSDP, ema=dict(decay=0.9))
    save(run, tmp_path, 3, 7)
    before = snapshot(tmp_path)
    with opened(tmp_path, read_only=True) as checkpointer:
        for asked, step in ((None, 7), (3, 3)):
            for kind, item in (("raw", "params"), ("ema", "ema")):
                found, shapes = checkpointer.params_shapes(asked, kind)
                assert found == step
                like = placed(shapes)
                params = checkpointer.restore_params(step, like, kind)
                assert_equal(params, to_loop(getattr(filled(run, step), item)))
                jax.tree.map(lambda x, wanted: np.testing.assert_equal(x.sharding, wanted.sharding), params, like)
    assert any(len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert snapshot(tmp_path) == before


def test_parameters_that_are_not_there_or_damaged(tmp_path, run, monkeypatch):
    with opened(tmp_path) as checkpointer, pytest.raises(ConfigError, match=f"{tmp_path}/.* holds no checkpoint"):
        checkpointer.params_shapes()
    save(run, tmp_path, 1, 2)
    with opened(tmp_path, read_only=True) as checkpointer:
        with pytest.raises(ConfigError, match="holds checkpoints of steps 1, 2, none of step 3"):
            checkpointer.params_shapes(3)
        with pytest.raises(ConfigError, match=f"step 2 in {tmp_path}/.* has no 'ema'; its run kept no average"):
            checkpointer.params_shapes(params="ema")
        step, shapes = checkpointer.params_shapes()
        for path in files(tmp_path / "checkpoints" / "2" / "params"):
            if path.parent.name == "d":  # the numbers; the metadata, at times the largest file, have been read by now
                flip(path)
        with pytest.raises(ConfigError, match=f"step 2 in {tmp_path}/checkpoints is damaged") as error:
            checkpointer.restore_params(step, placed(shapes))
        assert "\n" not in str(error.value)
        monkeypatch.setattr(checkpoint_reading, "checksums", lambda tree: [value ^ 1 for value in checksums(tree)])
        with pytest.raises(ConfigError, match="step 1 in .* is damaged .checksum of params/"):
            checkpointer.restore_params(1, placed(shapes))
        truncate(largest(tmp_path / "checkpoints" / "1" / "meta"))
        with pytest.raises(ConfigError, match="step 1 in .* is damaged"):
            checkpointer.params_shapes(1)


# --- What is kept -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, kept, then", [
    (dict(keep_last=3), [4, 5, 6], [5, 6, 7]), (dict(keep_last=1, keep_every=2), [2, 4, 6], [2, 4, 6, 7]),
    (dict(keep_last=1, keep_best=KeepBest("val/prec@1", 2, "max")), [2, 4, 6], [2, 4, 7]),
    (dict(keep_last=2, keep_every=5, keep_best=KeepBest("val/loss", 1, "min")), [3, 5, 6], [3, 5, 6, 7])])
def test_what_is_kept(tmp_path, settings, kept, then):
    scores = {1: (float("nan"),) * 2, 2: (0.9, 0.5), 3: (0.1, 0.2), 4: (0.5, 0.3), 5: (0.3, 0.4)}  # 6: not evaluated
    with opened(tmp_path, **settings) as checkpointer:
        for step in range(1, 7):
            metrics = dict(zip(("val/prec@1", "val/loss"), scores[step], strict=True)) if step in scores else {}
            assert checkpointer.save(small(step), {}, metrics)
    assert steps_in(tmp_path) == kept
    with opened(tmp_path, **settings) as checkpointer:  # a later process knows the scores of the steps before
        checkpointer.save(small(7), {}, {"val/prec@1": 0.0, "val/loss": 1.0})
    assert steps_in(tmp_path) == then


def test_another_evaluators_metrics_do_not_judge(tmp_path, caplog):
    with opened(tmp_path, keep_best=KeepBest("val/prec@1")) as checkpointer:
        checkpointer.save(small(1), {}, {"val/prec@1": 0.5})
        checkpointer.save(small(2), {}, {"real/prec@1": 0.7})
        checkpointer.save(small(3), {}, {"val/prec@1": 0.1})
    assert steps_in(tmp_path) == [1, 3]
    assert "checkpoint 2: val/prec@1 is not among its metrics, real/prec@1" in caplog.text


def test_a_step_is_saved_once(tmp_path, run):
    with opened(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None and checkpointer.restore_latest(run.shapes, False) is None
        assert checkpointer.save(filled(run, 4), {})
        assert not checkpointer.save(filled(run, 4, seed=1), {})
        checkpointer.wait()
        assert not checkpointer.save(filled(run, 4, seed=1), {})
        assert checkpointer.latest_step() == 4
    with opened(tmp_path) as checkpointer:
        assert not checkpointer.save(filled(run, 4, seed=1), {})
    assert_equal(restore(run, tmp_path)[0], filled(run, 4))
