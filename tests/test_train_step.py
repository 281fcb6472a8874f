"""One training step: the same on any devices and layout, and what enters it and what does not."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit import dist, experiment
from cb_vit.models.common import to_loop, to_scan
from cb_vit.settings import check
from cb_vit.train_state import TrainState
from cb_vit.train_step import stream_key
from cb_vit.tree import flatten_with_names

BATCH, CLASSES, STEPS = 112, 5, 3  # no other size here is 112, or a multiple of it
TENSOR_RULES = (
    (r".*/(query|key|value)/kernel", "shard_dim('model', -2)"), (r".*/out/kernel", "shard_dim('model', -3)"),
    (r".*/MlpBlock_0/Dense_0/kernel", "shard_dim('model', -1)"), (r".*/Dense_1/kernel", "shard_dim('model', -2)"))
FROZEN = "embedding/.*|.*/encoderblock_0/.*"
FSDP = dict(sharding_strategy=((".*", "fsdp(axis='data', min_size_to_shard_mb=0)"),))
AUGMENT = dict(mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem"), random_erasing=dict(prob=0.5))
SETTINGS = {
    "one device": dict(devices=1),
    "data parallel": {},
    "fsdp": FSDP,
    "tensor parallel": dict(mesh=(("data", 4), ("model", 2)), sharding_strategy=TENSOR_RULES),
    "scan, fsdp": FSDP | dict(model=dict(scan=True)),
    "accumulated": dict(devices=1, grad_accum_steps=4),
    "accumulated, fsdp": FSDP | dict(grad_accum_steps=2),
    "smoothed": dict(devices=1, label_smoothing=0.1),
    "frozen": dict(devices=1, schedule=((FROZEN, None), (".*", dict(decay_type="cosine")))),
    "dropout": dict(devices=1, model=dict(dropout=0.5, drop_path=0.2)),
    "dropout, data parallel": dict(model=dict(dropout=0.5, drop_path=0.2)),
    "augmented": dict(devices=1, label_smoothing=0.1, **AUGMENT),
    "augmented, data parallel": dict(label_smoothing=0.1, **AUGMENT),
    "augmented, accumulated": dict(label_smoothing=0.1, grad_accum_steps=2, **AUGMENT),
    "average": dict(devices=1, ema=dict(decay=0.9)),
    "average, warm": FSDP | dict(ema=dict(decay=0.9, warmup=True), model=dict(scan=True))}


@functools.cache
def build(name):
    """A tiny ViT with Context Broadcasting in float32, and SGD, which keeps the size of the gradient."""
    settings = dict(SETTINGS[name])
    data = dict(name="fake", split="train", num_examples=64, image_size=8, num_classes=CLASSES)
    model = dict(patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=4, pool_type="tok", context="cb_s")
    devices = jax.devices()[:settings.pop("devices", 8)]
    return experiment.build(check(dict(
        seed=0, total_steps=10, lr=0.1, weight_decay=0.01, schedule=dict(decay_type="cosine"), optax_name="trace",
        optax=dict(decay=0.9), input=dict(data=data, batch_size=BATCH, pp=f"value_range(-1, 1)|onehot({CLASSES})"),
    ) | settings | dict(model=model | settings.get("model", {}))), devices)


@functools.cache
def compiled(name):
    """The step of `build(name)`, compiled as the train loop does it."""
    run = build(name)
    with run.active_mesh():
        return run.jit_train_step().lower(*run.step_shapes()).compile()


@functools.cache
def parameters():
    """Random parameters, in loop layout; no leaf is zero."""
    rng, shapes = np.random.default_rng(0), build("one device").shapes.params
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def begin(name, step=0, **changed):
    """A state of `build(name)` with `parameters()` and an empty optimiser state."""
    run = build(name)
    params = to_scan(parameters()) if run.settings.model.scan else parameters()
    state = TrainState(np.int32(step), params, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.shapes.opt),
                       np.bool_(True), run.shapes.ema and params).replace(**changed)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, run.shapes))


def batches(steps=STEPS, masked=()):
    """Batches as the host delivers them, `masked` rows without an example."""
    rng = np.random.default_rng(0)
    return [{"image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
             "label": rng.integers(0, CLASSES, BATCH, np.int32), "_mask": ~np.isin(np.arange(BATCH), masked)}
            for _ in range(steps)]


def train(name, data, state=None):
    """(metrics of every step, the state) after training on the batches `data`."""
    run, history = build(name), []
    state = begin(name) if state is None else state
    for batch in data:
        batch = dist.to_global(batch, np.arange(BATCH), run.batch_sharding, BATCH)
        state, metrics = compiled(name)(state, batch, None)
        history.append(jax.device_get(metrics))
    return history, state


def assert_close(got, expected, tolerance=1e-5):
    """Metrics and parameters agree, relative to their size."""
    for a, b in zip(got[0], expected[0], strict=True):
        assert a.keys() == b.keys()
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=tolerance, err_msg=name)
    (a, _), (b, _) = flatten_with_names(to_loop(got[1].params)), flatten_with_names(to_loop(expected[1].params))
    for (name, x), (other, y) in zip(a, b, strict=True):
        assert name == other
        np.testing.assert_allclose(x, y, rtol=10 * tolerance, atol=tolerance, err_msg=name)


def test_every_leaf_moves_and_the_loss_falls():
    history, state = train("one device", batches(1) * 8)
    assert history[-1]["training_loss"] < history[0]["training_loss"] - 0.02
    for (name, x), y in zip(flatten_with_names(state.params)[0], jax.tree.leaves(parameters()), strict=True):
        assert np.abs(x - y).max() > 1e-4 or name.endswith("key/bias"), name  # softmax does not see the key's bias


@pytest.mark.parametrize("name", list(SETTINGS)[1:7])
def test_any_layout_takes_the_same_steps(name):
    history, state = train(name, batches())
    assert_close((history, state), train("one device", batches()))
    jax.tree.map(lambda x, like: np.testing.assert_equal(x.sharding.is_equivalent_to(like.sharding, x.ndim), True),
                 state, build(name).shapes)


def test_the_parameters_one_starts_with_do_not_depend_on_devices():
    states = []
    for name in ("one device", "fsdp"):
        with build(name).active_mesh():
            states.append(jax.device_get(build(name).create_state()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *states)


def test_a_step_is_the_gradient_of_the_mean_loss_over_the_examples():
    """An independent reference: plain `jax.grad`, and SGD with weight decay by hand; two rows hold no example."""
    (batch,), params, model = batches(1, masked=(0, 50)), parameters(), build("smoothed").model
    images = jnp.asarray(batch["image"][batch["_mask"]], jnp.float32) / 127.5 - 1
    labels = np.eye(CLASSES)[batch["label"][batch["_mask"]]] * 0.9 + 0.1 / CLASSES

    def loss(params):
        logits, _ = model.apply({"params": params}, images)
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))

    value, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
    decay = jax.tree_util.tree_map_with_path(lambda path, p: 0.01 * p if path[-1].key == "kernel" else 0.0, params)
    expected = jax.tree.map(lambda p, g, d: p - 0.1 * (g + d), params, grads, decay)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))  # noqa: E731
    metrics = {"training_loss": value, "l2_grads": norm(grads), "l2_params": norm(expected), "examples_skipped": 2,
               "l2_updates": norm(jax.tree.map(np.subtract, expected, params)), "finite": True}
    assert_close(train("smoothed", [batch]), ([metrics], begin("one device", params=expected)), tolerance=2e-5)


@pytest.mark.parametrize("name", ["one device", "accumulated", "accumulated, fsdp"])
def test_masked_rows_count_for_nothing(name):
    """What stands in a masked row does not matter."""
    masked = (0, 3, 4, 50, 111)
    clean = batches(masked=masked)
    poisoned = [{**batch, "image": np.where(batch["_mask"][:, None, None, None], batch["image"], np.uint8(255)),
                 "label": np.where(batch["_mask"], batch["label"], -1)} for batch in clean]
    got = train(name, poisoned)
    assert_close(got, train("one device", clean))
    assert [metrics["examples_skipped"] for metrics in got[0]] == [len(masked)] * STEPS


def test_a_row_without_a_label_teaches_nothing():
    """Smoothing would make a target of it: -1 has to count as masked, but was not skipped."""
    data = batches(1, masked=(2, 5))
    unlabelled = [{**batch, "label": np.where(batch["_mask"], batch["label"], -1), "_mask": np.full(BATCH, True)}
                  for batch in data]
    got, expected = train("smoothed", unlabelled), train("smoothed", data)
    assert (got[0][0].pop("examples_skipped"), expected[0][0].pop("examples_skipped")) == (0, 2)
    assert_close(got, expected)


def test_flops_are_those_of_the_model_however_it_is_run():
    names = ("one device", "data parallel", "scan, fsdp", "accumulated")
    counts = {name: build(name).flops_per_step() for name in names}
    assert len(set(counts.values())) == 1
    # By hand: 2 blocks of 4 projections, two products of attention, two of the MLP; patches and head; times 3.
    n, d, f = 5, 32, 64
    forward = 2 * (2 * n * d * d * 4 + 2 * 2 * n * n * d + 2 * 2 * n * d * f) + 2 * 4 * 48 * d + 2 * d * CLASSES
    assert 3 * forward <= counts["one device"] / BATCH < 3 * forward * 1.35  # besides: norms, GELU, softmax


def test_a_batch_of_masked_rows_only_decays_and_does_nothing_else():
    (metrics,), state = train("one device", batches(1, masked=range(BATCH)))
    assert metrics["training_loss"] == 0 and metrics["l2_grads"] == 0 and metrics["finite"]
    for (name, x), y in zip(flatten_with_names(state.params)[0], jax.tree.leaves(parameters()), strict=True):
        np.testing.assert_allclose(x, y * (1 - 0.1 * 0.01) if name.endswith("kernel") else y, rtol=1e-6)


def test_frozen_leaves_keep_every_bit_and_cost_no_state():
    _, state = train("frozen", batches())
    for (name, x), y in zip(flatten_with_names(state.params)[0], jax.tree.leaves(parameters()), strict=True):
        frozen = re.fullmatch(FROZEN, name)
        assert (x == y).all() if frozen else (x != y).any() or name.endswith("key/bias"), name
    assert not any("encoderblock_0/" in name for name, _ in flatten_with_names(state.opt)[0])
    flops = {name: compiled(name).cost_analysis()["flops"] for name in ("frozen", "one device")}
    assert flops["frozen"] < 0.9 * flops["one device"]  # their backward pass is left out


def test_the_finite_flag_falls_with_a_nan_and_stays_down():
    params = jax.tree.map(np.copy, parameters())
    params["head"]["kernel"][0, 0] = np.nan
    history, state = train("one device", batches(2), begin("one device", params=params))
    assert np.isnan(history[0]["training_loss"]) and not any(metrics["finite"] for metrics in history)
    assert not state.finite
    history, state = train("one device", batches(2), begin("one device", finite=np.bool_(False)))
    assert np.isfinite(history[1]["training_loss"]) and not history[1]["finite"] and not state.finite


def test_parameters_that_run_away_are_noticed_at_once():
    """Loss and gradient are those of the parameters before: still finite."""
    opt = jax.tree.map(lambda x: np.full(x.shape, 1e25 if x.ndim else 0, x.dtype), build("one device").shapes.opt)
    (metrics,), state = train("one device", batches(1), begin("one device", opt=opt))
    assert np.isfinite(metrics["training_loss"]) and np.isfinite(metrics["l2_grads"])
    assert not metrics["finite"] and not state.finite


def test_the_state_is_donated():
    state = begin("fsdp")
    _, following = train("fsdp", batches(1), state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt)))
    assert int(following.step) == 1


def test_dropout_is_addressed_by_the_step_and_is_the_same_again_on_any_devices():
    def loss_at(step, name="dropout"):
        return train(name, batches(1), begin(name, step))[0][0]["training_loss"].item()

    values = [loss_at(step) for step in range(4)]
    assert len(set(values)) == 4 and max(values) - min(values) > 1e-3
    assert loss_at(1) == values[1]
    np.testing.assert_allclose(loss_at(1, "dropout, data parallel"), values[1], rtol=1e-5)


@pytest.mark.parametrize("name", ["augmented, data parallel", "augmented, accumulated"])
def test_augmentation_is_the_same_on_any_devices(name):
    assert_close(train(name, batches()), train("augmented", batches()))
    assert train("augmented", batches(1))[0][0]["training_loss"] != train("smoothed", batches(1))[0][0]["training_loss"]


def test_augmentation_is_addressed_by_the_step():
    losses = [train("augmented", batches(1), begin("augmented", step))[0][0]["training_loss"] for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(("name", "rates"), [
    ("average", [0.1] * 3), ("average, warm", [1, 2 ** (-2 / 3), 3 ** (-2 / 3)])])
def test_the_average_follows_its_formula(name, rates):
    """And leaves the parameters alone. A decay of 0.9 is reached at t = 31, far from here."""
    start = begin(name)
    expected = jax.device_get(start.params)
    state = start.replace(ema=jax.tree.map(jnp.copy, start.params))
    for batch, rate in zip(batches(), rates, strict=True):
        _, state = train(name, [batch], state)
        expected = jax.tree.map(lambda e, p, rate=rate: e + rate * (np.asarray(p) - e), expected, state.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.ema, expected)
    assert_close(([], state), ([], train("one device", batches())[1]))


def test_streams_of_randomness_share_no_key():
    keys = [jax.random.key_data(stream_key(seed, stream, step)).tobytes()
            for seed in (0, 1) for stream in ("init", "dropout", "augment") for step in range(4)]
    assert len(set(keys)) == len(keys)


def collectives(name):
    """(kind, shape) of everything that the devices send each other in a step."""
    lines = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
                       compiled(name).as_text())
    return [(kind, tuple(int(n) for n in dims.split(",") if n))
            for shapes, kind in lines for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]


@pytest.mark.parametrize("name, kinds", [
    ("data parallel", {"all-reduce"}), ("fsdp", {"all-gather", "all-reduce"}),
    ("scan, fsdp", {"all-gather", "all-reduce"})])
def test_devices_send_each_other_parameters_and_gradients_never_activations(name, kinds):
    found = collectives(name)
    assert {kind for kind, _ in found} - {"reduce-scatter"} == kinds
    leaves = jax.tree.leaves(build(name).shapes.params)
    sizes = {part * leaf.size // stack for leaf in leaves for part in (1, 3) for stack in (1, 2)}  # q, k, v are stacked
    for kind, shape in found:
        assert not any(n % BATCH == 0 for n in shape), (kind, shape)
        assert kind != "all-gather" or np.prod(shape) in sizes, (kind, shape)


def test_tensor_parallelism_never_gathers_a_kernel():
    kernels = [32 * 32, 32 * 64]
    assert not [shape for kind, shape in collectives("tensor parallel") if kind == "all-gather"
                and np.prod(shape) in kernels + [3 * 32 * 32]]
