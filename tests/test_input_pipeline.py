"""The input pipeline: which examples are in which batch, whoever loads them, and what happens to broken ones."""
import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from cb_vit import datasets, dist
from cb_vit.config import ConfigError, parse
from cb_vit.datasets.core import DataError
from cb_vit.input_pipeline import InputConfig, Pipeline, to_device
from cb_vit.workers import check_workers

N = 37  # examples; prime, so that no batch size divides an epoch. Each has a class of its own: its label names it.
BATCH = 8
RANDOM = "decode|inception_crop(8)|flip_lr|value_range(-1, 1)|onehot(37)"
PLAIN = "keep('image', 'label')"


def pipeline(pp=RANDOM, rows=None, batch_size=BATCH, examples=N, broken=(), **settings):
    """A pipeline over made-up images, encoded if `pp` decodes them."""
    encoded = pp.startswith("decode")
    data = dict(name="fake", split="train", num_examples=examples, image_size=16 if encoded else 2,
                num_classes=examples, encoded=encoded, broken=broken)
    config = parse(InputConfig, dict(data=data, batch_size=batch_size, pp=pp) | {"num_threads": 1} | settings)
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    return Pipeline(config, datasets.open_source(config.data, "data"), config.pp, rows)


def assert_same(got, expected, rows=slice(None)):
    """Batches `got` are `rows` of the batches `expected`."""
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            np.testing.assert_array_equal(a[name], b[name][rows], err_msg=name)


@pytest.fixture(scope="module")
def reference():
    """The batches of steps 0 to 11, more than two epochs."""
    return list(pipeline().train(seed=3, start_step=0, total_steps=12))


# --- The batches do not depend on who loads them. ---------------------------------------------------------------

@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_loads_the_same_global_batches(reference, processes):
    for rows in np.arange(BATCH).reshape(processes, -1):
        assert_same(pipeline(rows=rows).train(3, 0, 12), reference, rows)


@pytest.mark.parametrize("order, axes, shared", [
    ([0, 1, 2, 3, 4, 5, 6, 7], (("data", 8),), False),
    ([0, 4, 2, 6, 7, 3, 5, 1], (("data", 8),), False),                # the mesh permutes processes
    ([0, 2, 1, 3, 4, 6, 5, 7], (("data", 4), ("model", 2)), True),    # a model axis spans two processes
    ([5, 1, 7, 3, 0, 4, 2, 6], (("data", 2), ("model", 4)), True)])
def test_every_process_loads_just_the_rows_of_its_devices(monkeypatch, reference, order, axes, shared):
    """Four processes of two devices each are played one after the other."""
    devices = jax.devices()
    names, sizes = zip(*axes, strict=True)
    mesh = Mesh(np.array(devices)[order].reshape(sizes), names, axis_types=(AxisType.Auto,) * len(axes))
    sharding = dist.batch_sharding(mesh, "data")
    held = sharding.devices_indices_map((BATCH,))
    loaded = []
    for process in range(4):
        own = devices[2 * process:2 * process + 2]
        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map",
                            lambda self, shape, own=own: {d: self.devices_indices_map(shape)[d] for d in own})
        rows = dist.local_rows(sharding, BATCH)
        assert set(rows) == {row for d in own for row in np.arange(BATCH)[held[d]]}
        assert_same(pipeline(rows=rows).train(3, 0, 2), reference[:2], rows)
        loaded.append(list(rows))
    assert sorted(set(itertools.chain(*loaded))) == list(range(BATCH))
    assert (sum(map(len, loaded)) > BATCH) == shared  # hosts of one model-parallel group load the same rows
    assert shared or len(set(map(tuple, loaded))) == 4


@pytest.mark.parametrize("start", range(13))
def test_a_restart_goes_on_with_the_batch_that_would_have_come_next(reference, start):
    assert_same(pipeline(rows=[2, 3, 6]).train(3, start, 12), reference[start:], [2, 3, 6])


def test_threads_change_nothing(reference):
    assert_same(pipeline(num_threads=4, prefetch=3).train(3, 0, 12), reference)


def test_workers_change_nothing_survive_signals_and_end_with_the_iterator(reference):
    for workers, threads, start in [(1, 1, 0), (3, 2, 5)]:
        batches = pipeline(num_workers=workers, num_threads=threads, rows=[1, 4, 5]).train(3, start, 1000)
        got = list(itertools.islice(batches, workers))  # one from each: all of them are up
        assert len(children := multiprocessing.active_children()) == workers
        for child in children:  # as a scheduler does to all processes of a job, and a terminal on control-C
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(child.pid, number)
        got += itertools.islice(batches, 12 - start - workers)
        assert_same(got, reference[start:], [1, 4, 5])
        batches.close()
        assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_told_in_one_line():
    batches = pipeline(num_workers=1).train(3, 0, 1000)
    next(batches)
    [child] = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGBUS)
    with pytest.raises(DataError, match=r"^a process that loads data has ended \(exit status -7\): /dev/shm is full: "):
        list(batches)


@pytest.mark.parametrize("workers, prefetch, free, enough", [
    (2, 2, 1.7e6, True), (2, 2, 1.5e6, False), (4, 2, 1.7e6, False), (2, 8, 1.7e6, False), (0, 2, 0, True)])
def test_workers_that_shared_memory_cannot_hold_are_refused(monkeypatch, workers, prefetch, free, enough):
    """A batch is 8 × 64 × 16 bytes and two pages, and 19 of them and 1 MiB are what two workers need."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=free))
    config = pipeline(num_workers=workers, prefetch=prefetch).config
    spec = {"image": ((64, 16, 3), np.dtype(np.uint8)), "label": ((), np.dtype(np.int32))}
    refused = pytest.raises(ConfigError, match=rf"^config\.input\.num_workers: {workers} processes pass batches "
                                               r"through /dev/shm and need .* MiB there, of which .* are free; ")
    with contextlib.nullcontext() if enough else refused:
        check_workers(config.num_workers, config.prefetch, spec, rows=8)


# --- Order ------------------------------------------------------------------------------------------------------

def labels(seed, epochs=1, **settings):
    """Labels of the first `epochs` epochs, [epochs N]."""
    steps = -(-epochs * N // BATCH)
    batches = pipeline(PLAIN, **settings).train(seed, 0, steps)
    return np.concatenate([batch["label"] for batch in batches])[:epochs * N].reshape(epochs, N)


def test_each_epoch_is_a_permutation_of_its_own_and_seeds_share_none():
    orders = np.concatenate([labels(seed, epochs=4) for seed in (0, 1, 2, 3, 2**32 - 1)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(N), (len(orders), 1)))
    assert len(np.unique(orders, axis=0)) == len(orders)
    np.testing.assert_array_equal(labels(2, epochs=4), orders[8:12])


def test_every_visit_to_an_example_is_augmented_anew(reference):
    """The same example gets other crops in other epochs, under another seed, and at another place."""
    images = [(int(label), image.tobytes()) for batch in reference
              for label, image in zip(batch["label"], batch["image"], strict=True)]
    assert len(set(images)) == len(images)
    one, other = ([(label, image.tobytes()) for batch in pipeline(examples=2).train(seed, 0, 3)
                   for label, image in zip(batch["label"], batch["image"], strict=True)] for seed in (3, 4))
    same = [(a, b) for (i, a), (j, b) in zip(one, other, strict=True) if i == j]  # the same example at the same place
    assert len(same) > 5 and all(a != b for a, b in same)


@pytest.mark.parametrize("batch_size, examples", [(8, 37), (37, 37), (64, 37), (1, 3), (12, 36)])
def test_evaluation_sees_every_example_once_and_masks_the_padding(batch_size, examples):
    parts = [np.arange(batch_size)[i::3] for i in range(3)] if batch_size >= 3 else [np.arange(batch_size)]
    steps = -(-examples // batch_size)
    found, masked = np.full((steps, batch_size), -1), np.zeros((steps, batch_size), bool)
    for rows in parts:
        for step, batch in enumerate(pipeline(PLAIN, rows, batch_size, examples).evaluate()):
            found[step, rows], masked[step, rows] = batch["label"], batch["_mask"]
            assert not batch["image"][~batch["_mask"]].any()
        assert step == steps - 1
    np.testing.assert_array_equal(found[masked], np.arange(examples))  # in the source's order
    np.testing.assert_array_equal(masked.ravel(), np.arange(steps * batch_size) < examples)


def test_what_the_host_delivers_is_uint8_and_a_mask(reference):
    for batch in reference:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            "image": ((BATCH, 8, 8, 3), np.uint8), "label": ((BATCH,), np.int32), "_mask": ((BATCH,), bool)}
        assert batch["_mask"].all()


def test_nothing_is_left_after_the_last_step():
    assert list(pipeline().train(0, 5, 5)) == [] and list(pipeline().train(0, 7, 5)) == []


# --- Broken examples --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_run_by_name_also_from_another_process(workers):
    batches = pipeline(broken=(20,), num_workers=workers).train(0, 0, 12)
    with pytest.raises(DataError, match=re.escape("train#20: decode: ")):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("broken", [(20,), (0, 1, 36)])
def test_skip_errors_keeps_the_row_masked_and_all_others_as_they_are(caplog, broken):
    sound = list(pipeline().train(3, 0, 12))
    got = list(pipeline(broken=broken, skip_errors=True).train(3, 0, 12))
    for a, b in zip(got, sound, strict=True):
        bad = np.isin(b["label"], broken)
        np.testing.assert_array_equal(a["_mask"], ~bad)
        assert not a["image"][bad].any()
        for name in ("image", "label"):
            np.testing.assert_array_equal(a[name][~bad], b[name][~bad])
    assert f"skipped: train#{broken[-1]}: decode: " in caplog.text


def test_evaluation_leaves_broken_examples_out():
    batches = list(pipeline(broken=(0, 5), skip_errors=True).evaluate())
    mask, label = (np.concatenate([batch[name] for batch in batches]) for name in ("_mask", "label"))
    assert set(label[mask]) == set(range(N)) - {0, 5}


def test_nothing_but_broken_examples_is_an_error():
    with pytest.raises(DataError, match="train#2: decode: "):
        list(pipeline(examples=3, batch_size=2, broken=(0, 1, 2), skip_errors=True).train(0, 0, 3))
    with pytest.raises(DataError, match="train#0: decode: "):
        list(pipeline(broken=(0,)).train(0, 0, 3))


@pytest.mark.parametrize("field, value", [("batch_size", 0), ("num_workers", -1), ("num_threads", 0), ("prefetch", 0)])
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^config\.{field}: must be at least {value + 1}, got {value}$"):
        pipeline(**{field: value})


# --- Onto the devices, and the end ------------------------------------------------------------------------------

@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_to_device_yields_every_batch_once_in_order_and_sends_some_ahead(count, ahead):
    sent, closed = [], []

    def host():
        try:
            for step in range(count):
                sent.append(step)
                yield {"x": np.arange(8) + 10 * step}
        finally:
            closed.append(True)

    sharding = dist.batch_sharding(dist.create_mesh([("data", 8)]), "data")
    source, received = host(), 0
    for step, batch in enumerate(to_device(source, np.arange(8), sharding, 8, ahead)):
        received += 1
        assert len(sent) == min(step + 1 + ahead, count)
        assert batch["x"].sharding == sharding
        np.testing.assert_array_equal(batch["x"], np.arange(8) + 10 * step)
    assert received == len(sent) == count and closed == [True]


def test_to_device_ends_the_workers_when_it_is_left_early(reference):
    sharding = dist.batch_sharding(dist.create_mesh([("data", 8)]), "data")
    source = pipeline(num_workers=1).train(3, 0, 1000)
    batches = to_device(source, np.arange(BATCH), sharding, BATCH)
    assert_same([next(batches)], reference[:1])
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


SCRIPT = """
    import multiprocessing, time
    import numpy as np
    from cb_vit import datasets
    from cb_vit.config import parse
    from cb_vit.input_pipeline import InputConfig, Pipeline

    if __name__ == "__main__":
        data = dict(name="fake", split="train", image_size=61)
        config = parse(InputConfig, dict(data=data, batch_size=7, pp="flip_lr", num_workers=2, num_threads=2))
        source = datasets.open_source(config.data, "data")
        batches = Pipeline(config, source, config.pp, np.arange(7)).train(0, 0, 10**6)
        assert [next(batches)["image"].shape for _ in range(4)] == [(7, 61, 61, 3)] * 4
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


def running(pid):
    """Whether there is such a process, other than one that has ended and was not asked for its status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def segments():
    """Shared memory that can only hold images of SCRIPT, known by its unusual size."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir("/dev/shm") if entry.name.startswith("psm_")}
    return {name for name, size in sizes.items() if size == 7 * 61 * 61 * 3}


@pytest.mark.skipif(not os.path.isdir("/proc/self") or not os.path.isdir("/dev/shm"), reason="looks into /proc")
def test_a_killed_script_leaves_no_processes_and_no_shared_memory(tmp_path):
    """A plain script: nobody has parsed absl's flags."""
    script, others = tmp_path / "script.py", segments()
    script.write_text(textwrap.dedent(SCRIPT))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": root}) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(running, workers))
        assert segments() - others
        parent.kill()
    try:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and (any(map(running, workers)) or segments() - others):
            time.sleep(0.1)
        assert not any(map(running, workers))
        assert not segments() - others
    finally:
        for pid in filter(running, workers):
            os.kill(pid, signal.SIGKILL)
