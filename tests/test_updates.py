"""LAMB and adaptive clipping against NumPy in float64, parameter by parameter, and in both layouts."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from cb_vit import dist, tree
from cb_vit.config import parse
from cb_vit.models.common import to_loop, to_scan
from cb_vit.optax import OptimiserConfig, make
from cb_vit.updates import fused_name, unit_axes

ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK = {
    f"{ATTENTION}/query/kernel": (6, 2, 3), f"{ATTENTION}/query/bias": (2, 3), f"{ATTENTION}/out/kernel": (2, 3, 6),
    f"{ATTENTION}/key/kernel": (6, 2, 3), f"{ATTENTION}/value/kernel": (6, 2, 3),
    "MlpBlock_0/Dense_0/kernel": (6, 8), "MlpBlock_0/Dense_0/bias": (8,), "LayerNorm_0/scale": (6,)}
SHAPES = {f"Transformer/encoderblock_{i}/{name}": shape for i in range(3) for name, shape in BLOCK.items()} | {
    "embedding/kernel": (2, 2, 3, 6), "cls": (1, 1, 6), "pos_embedding": (1, 4, 6), "head/kernel": (6, 5)} | {
        f"MAPHead_0/{ATTENTION}/{part}/kernel": (6, 2, 3) for part in ("query", "key", "value")}
STEPS = 20


def draw(seed, scale=1.0):
    """Every leaf at a size of its own, so that a norm taken over the wrong entries shows."""
    rng = np.random.default_rng(seed)
    return {name: scale * rng.uniform(0.1, 3) * rng.normal(size=shape) for name, shape in SHAPES.items()}


def nested(flat):
    return unflatten_dict({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()}, sep="/")


def flat(nested_tree):
    return {name: np.asarray(leaf) for name, leaf in tree.flatten_with_names(nested_tree)[0]}


def train(params, grads, **block):
    """Parameters after an update for each of `grads`, trees of NumPy arrays by name or of JAX's."""
    cfg = parse(OptimiserConfig, {"lr": 0.02, "schedule": dict(warmup_steps=5, warmup_lr=1e-3), **block})
    tx, _ = make(cfg, params, total_steps=STEPS, batch_size=8)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params


def lr_at(t):
    return 1e-3 + 0.019 * t / 5 if t < 5 else 0.01 * (1 + np.cos(np.pi * (t - 5) / 15))


def lamb(params, grads, decay, clip=np.inf, b1=0.9, b2=0.999, eps=1e-8, whole=lambda name: name, frozen=()):
    """LAMB by the book in float64; decay: name → weight decay, without which a parameter takes Adam's step.

    whole: name → the name of the tensor whose norms count.
    """
    m, v = ({name: 0.0 for name in params} for _ in range(2))
    for t, grad in enumerate(grads):
        factor = min(1, clip / np.sqrt(sum(np.sum(g**2) for g in grad.values())))
        steps, after = {}, dict(params)
        for name, p in params.items():
            if name in frozen:
                continue
            g = grad[name] * factor
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            u = m[name] / (1 - b1 ** (t + 1)) / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + eps)
            steps[name] = u + decay(name) * p
        for name, u in steps.items():
            if decay(name):
                group = [other for other in steps if whole(other) == whole(name) and decay(other)]
                size, length = (np.linalg.norm(np.concatenate([tree[other].ravel() for other in group]))
                                for tree in (params, steps))
                u = u * size / length
            after[name] = params[name] - lr_at(t) * u
        params = after
    return params


def in_timm(name):
    """The name of the tensor that holds a kernel in timm."""
    head = name.startswith("MAPHead_0")
    parts = "key|value" if head else "query|key|value"
    return re.sub(f"/({parts})/", "/fused/", name)


def test_lamb_equals_numpy():
    params, grads = draw(0), [draw(10 + t) for t in range(STEPS)]
    after = train(nested(params), map(nested, grads), optax_name="scale_by_lamb", optax=dict(b2=0.99), weight_decay=0.3,
                  wd_mults=[("head/.*", 2.0), (".*/kernel", 1.0)], grad_clip_norm=1.0, lamb_fused_qkv=False)
    expected = lamb(params, grads, clip=1.0, b2=0.99, decay=lambda name: 0.3 * (2 if name.startswith("head/") else
                                                                                name.endswith("/kernel")))
    for name, leaf in flat(after).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layout, block, decay, frozen", [
    (dict, {}, {}, ""),
    (to_scan, dict(wd_mults=[(".*/query/.*", 2.0), (".*/value/kernel", 0.0), (".*/kernel", 1.0)]),
     {"query": 2.0, "value": 0.0}, ""),
    (dict, dict(schedule=[(".*/query/.*", None), (".*", dict(warmup_steps=5, warmup_lr=1e-3))]), {}, "/query/")],
    ids=["all", "decayed unlike each other, scan", "query frozen"])
def test_lamb_has_one_norm_for_a_tensor_of_timms(layout, block, decay, frozen):
    """Over those that are decayed and trained; each block by itself."""
    params, grads = draw(0), [draw(10 + t) for t in range(4)]
    after = train(layout(nested(params)), [layout(nested(grad)) for grad in grads], optax_name="scale_by_lamb",
                  weight_decay=0.3, **block)

    def of(name):
        *_, layer, leaf = ("", *name.split("/"))
        return 0.3 * decay.get(layer, leaf == "kernel")

    expected = lamb(params, grads, of, whole=in_timm, frozen=[name for name in params if frozen and frozen in name])
    apart = lamb(params, grads, of, frozen=[name for name in params if frozen and frozen in name])
    moved = set()
    for name, leaf in flat(to_loop(after)).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        moved |= {name} if np.abs(apart[name] - expected[name]).max() > 1e-3 else set()
    assert any("encoderblock_2" in name for name in moved) and all("MultiHead" in name for name in moved)


@pytest.mark.parametrize("name, whole", [
    (f"Transformer/encoderblock_0/{ATTENTION}/query/kernel", f"Transformer/encoderblock_0/{ATTENTION}/qkv/kernel"),
    (f"Transformer/encoderblock/{ATTENTION}/value/bias", f"Transformer/encoderblock/{ATTENTION}/qkv/bias"),
    (f"MAPHead_0/{ATTENTION}/key/kernel", f"MAPHead_0/{ATTENTION}/kv/kernel"),
    *[(name, name) for name in (f"MAPHead_0/{ATTENTION}/query/kernel", f"MAPHead_0/{ATTENTION}/out/kernel", "cls",
                                "head/kernel")]])
def test_fused_name(name, whole):
    assert fused_name(name) == whole


def test_one_norm_is_the_same_on_eight_devices():
    """Kernels cut along inputs and heads, as FSDP and tensor parallel do."""
    params, grad = nested(draw(0)), nested(draw(1))
    mesh = dist.create_mesh([("rest", 2), ("fsdp", 2), ("model", 2)])

    def place(leaf):
        free = iter(("fsdp", "model"))
        axes = [next(free, None) if size % 2 == 0 else None for size in leaf.shape]
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    placed = [jax.tree.map(place, one) for one in (params, grad)]
    after, expected = (flat(train(p, [g], optax_name="scale_by_lamb", weight_decay=0.3))
                       for p, g in (placed, (params, grad)))
    for name, leaf in expected.items():
        np.testing.assert_allclose(after[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)


def test_lambs_ratio_is_1_where_a_norm_is_0():
    """So that a head that starts at zero learns at all."""
    params = nested(draw(0)) | {"head": {"kernel": jnp.zeros((6, 5))}}
    grads = nested(draw(1)) | {"embedding": {"kernel": jnp.zeros((2, 2, 3, 6))}}
    params["embedding"]["kernel"] *= 0
    after = train(params, [grads], optax_name="scale_by_lamb", weight_decay=0.3)
    np.testing.assert_allclose(jnp.abs(after["head"]["kernel"]), 1e-3, rtol=1e-3)  # Adam's first step: the sign
    np.testing.assert_array_equal(after["embedding"]["kernel"], 0)


@pytest.mark.parametrize("block", [
    dict(optax_name="scale_by_lamb", weight_decay=0.3, grad_clip_norm=1.0), dict(grad_clip_adaptive=0.1),
    dict(layer_decay=0.5), dict(optax_name="scale_by_lamb", weight_decay=0.3, layer_decay=0.5, grad_clip_adaptive=0.1,
                                lr_mults=[("Transformer/.*", 2.0)])], ids=str)
def test_scan_layout_trains_like_the_loop_layout(block):
    params, grads = nested(draw(0)), [nested(draw(10 + t)) for t in range(4)]
    together = train(to_scan(params), map(to_scan, grads), **block)
    assert "encoderblock" in together["Transformer"]
    together, separate = flat(to_loop(together)), flat(train(params, grads, **block))
    for name in SHAPES:
        np.testing.assert_allclose(together[name], separate[name], rtol=1e-5, atol=1e-6, err_msg=name)


def clipped(grad, param, factor):
    """Of one unit."""
    limit = factor * max(np.linalg.norm(param), 1e-3)
    return grad * min(1, limit / np.linalg.norm(grad))


def test_adaptive_clipping_goes_by_output_units():
    """Every unit by a loop of its own: outputs of query are heads × features, of `out` and of Dense the last axis."""
    params, grads = draw(0), draw(1, scale=0.2)
    params["Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias"] *= 0  # a unit of less than 10⁻³ counts as that
    grads["head/kernel"] *= 100
    after = train(nested(params), [nested(grads)], grad_clip_adaptive=0.2, optax_name="identity")
    untouched = 0
    for name, leaf in flat(after).items():
        p, g = params[name], grads[name]
        units = [()] if not name.endswith("/kernel") else np.ndindex(
            p.shape[-2:] if re.search("/(query|key|value)/", name) else p.shape[-1:])
        expected = g.copy()
        for unit in units:
            at = (..., *unit)
            if name != "head/kernel":
                expected[at] = clipped(g[at], p[at], 0.2)
        untouched += np.array_equal(expected, g)
        np.testing.assert_allclose(leaf, p - 1e-3 * expected, rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose((p - leaf) / 1e-3, expected, rtol=0.02, atol=1e-3, err_msg=name)
    assert 1 < untouched < len(SHAPES) / 2  # the head, and what was small enough


def test_adaptive_clipping_comes_before_that_of_the_norm():
    params, grad = nested(draw(0)), draw(1)
    loud = grad | {"cls": 1e6 * grad["cls"]}
    block = dict(grad_clip_adaptive=0.01, grad_clip_norm=0.1, optax_name="identity")
    for a, b in zip(*(jax.tree.leaves(train(params, [nested(g)], **block)) for g in (grad, loud)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name, ndim, axes", [
    ("embedding/kernel", 4, (0, 1, 2)), ("head/kernel", 2, (0,)), ("cls", 3, (0, 1, 2)),
    (f"Transformer/encoderblock_0/{ATTENTION}/key/kernel", 3, (0,)),
    (f"Transformer/encoderblock_0/{ATTENTION}/out/kernel", 3, (0, 1)),
    (f"Transformer/encoderblock/{ATTENTION}/value/kernel", 4, (1,)),
    (f"Transformer/encoderblock/{ATTENTION}/value/bias", 3, (1, 2)),
    (f"Transformer/encoderblock/{ATTENTION}/out/kernel", 4, (1, 2)),
    ("Transformer/encoderblock/LayerNorm_0/scale", 2, (1,))])
def test_unit_axes(name, ndim, axes):
    assert unit_axes(name, ndim) == axes
