"""Optimisers, schedules, clipping, parameter groups and losses against timm's and torch's own, in float32."""
import functools
import math
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import cb_vit
from cb_vit import losses, models
from cb_vit.config import parse
from cb_vit.optax import OptimiserConfig, describe, make
from cb_vit.tree import names

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
timm_loss, timm_optim, timm_utils = map(pytest.importorskip, ("timm.loss", "timm.optim", "timm.utils"))
CosineLRScheduler = pytest.importorskip("timm.scheduler").CosineLRScheduler

ATTENTION = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
SHAPES = {"embedding/kernel": (4, 4, 3, 8), "embedding/bias": (8,), "cls": (1, 1, 8), "pos_embedding": (1, 5, 8),
          f"{ATTENTION}/query/kernel": (8, 2, 4), f"{ATTENTION}/query/bias": (2, 4),
          f"{ATTENTION}/out/kernel": (2, 4, 8), "Transformer/encoder_norm/scale": (8,), "head/kernel": (8, 6)}
STEPS = 20


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.uniform(0.1, 3) * rng.normal(size=shape)).astype(np.float32)
            for name, shape in SHAPES.items()}


def ours(params, grads, **block):
    """Parameters by name after an update for each gradient, and the schedule."""
    cfg = parse(OptimiserConfig, {"lr": 0.02, "schedule": dict(warmup_steps=5, warmup_lr=1e-3, min_lr=1e-4), **block})
    params = unflatten_dict(params, sep="/")
    tx, schedules = make(cfg, params, total_steps=STEPS, batch_size=8)
    update, state = jax.jit(tx.update), tx.init(params)
    for grad in grads:
        updates, state = update(unflatten_dict(grad, sep="/"), state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(params, sep="/"), schedules[".*"]


def theirs(optimiser, params, grads, schedule, weight_decay, decayed):
    """The same by a torch optimiser, its learning rate set before every step."""
    params = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in params.items()}
    optimiser = optimiser([
        dict(params=[p for name, p in params.items() if decayed(name)], weight_decay=weight_decay),
        dict(params=[p for name, p in params.items() if not decayed(name)], weight_decay=0.0)])
    for t, grad in enumerate(grads):
        for name, p in params.items():
            p.grad = torch.tensor(grad[name])
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * float(schedule(t))
        optimiser.step()
    return {name: p.detach().numpy() for name, p in params.items()}


def adamw(groups):
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def lamb(groups, **kw):
    return timm_optim.Lamb(groups, betas=(0.9, 0.95), eps=1e-8, **kw)


@pytest.mark.parametrize("optimiser, block", [
    (adamw, {}),
    (functools.partial(lamb, max_grad_norm=1.0, foreach=False), dict(optax_name="scale_by_lamb", grad_clip_norm=1.0)),
    (functools.partial(lamb, max_grad_norm=1e3, foreach=True), dict(optax_name="scale_by_lamb", grad_clip_norm=1e3)),
    (functools.partial(lamb, max_grad_norm=None), dict(optax_name="scale_by_lamb"))],
    ids=["adamw", "lamb that clips", "lamb below its clipping norm", "lamb without"])
def test_trajectories(optimiser, block):
    params, grads = draw(0), [draw(10 + t, scale=0.1) for t in range(STEPS)]
    mine, schedule = ours(params, grads, weight_decay=0.3, optax=dict(b2=0.95), **block)
    reference = theirs(optimiser, params, grads, schedule, 0.3, lambda name: name.endswith("/kernel"))
    for name, leaf in reference.items():
        np.testing.assert_allclose(mine[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(leaf - params[name]).max() > 0.05


def test_deit_schedule_is_timms_as_deits_loop_steps_it():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimiser = torch.optim.SGD([parameter], lr=1e-3)
    scheduler = CosineLRScheduler(optimiser, t_initial=300, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    cfg = parse(OptimiserConfig, dict(lr=5e-4, lr_reference_batch=512, schedule=dict(
        decay_type="deit", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)))
    _, schedules = make(cfg, {"w": jnp.zeros(())}, total_steps=300 * 1251, batch_size=1024, examples=1_281_167)
    for epoch in range(300):
        used = optimiser.param_groups[0]["lr"]
        for step in (0, 1250):
            np.testing.assert_allclose(1e-3 * schedules[".*"](1251 * epoch + step), used, rtol=1e-6)
        scheduler.step(epoch)


def to_torch(name, leaf):
    """Output-first, as torch keeps kernels; query's heads and features are one axis there."""
    if "query/" in name:
        leaf = leaf.reshape(*leaf.shape[:-2], -1)
    if "out/kernel" in name:
        leaf = leaf.reshape(-1, leaf.shape[-1])
    return np.moveaxis(leaf, -1, 0) if name.endswith("/kernel") else leaf


@pytest.mark.parametrize("factor", [0.01, 0.3])
def test_adaptive_clipping(factor):
    """The heads excepted, which timm leaves to its caller (`train.py` leaves out a model's last two parameters)."""
    params, grads = draw(0), draw(1, scale=0.3)
    params["embedding/bias"] *= 1e-5
    mine, _ = ours(params, [grads], grad_clip_adaptive=factor, optax_name="identity", lr=1.0,
                   schedule=dict(decay_type="constant"))
    unclipped = 0
    for name in SHAPES:
        p = torch.nn.Parameter(torch.tensor(to_torch(name, params[name])))
        p.grad = torch.tensor(to_torch(name, grads[name]))
        if name != "head/kernel":
            timm_utils.adaptive_clip_grad([p], clip_factor=factor)
        unclipped += np.array_equal(p.grad, to_torch(name, grads[name]))
        after = (p - p.grad).detach()
        np.testing.assert_allclose(to_torch(name, mine[name]), after, rtol=1e-5, atol=1e-6, err_msg=name)
    assert unclipped < len(SHAPES) / 2


RENAMED = [
    (r"(cls|dist)_token", r"\1"), ("pos_embed", "pos_embedding"), (r"patch_embed\.proj", "embedding"),
    (r"^norm\.", "Transformer/encoder_norm."), (r"blocks\.(\d+)\.", r"Transformer/encoderblock_\1/"),
    ("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_1"), (r"mlp\.fc1", "MlpBlock_0/Dense_0"),
    (r"mlp\.fc2", "MlpBlock_0/Dense_1"), (r"attn\.(qkv|proj)", r"MultiHeadDotProductAttention_0/\1"),
    ("/proj", "/out"), (r"(LayerNorm_\d|encoder_norm)\.weight", r"\1/scale"), (r"\.weight", "/kernel"),
    (r"\.bias", "/bias")]


def to_ours(name):
    """Our names of timm's parameter `name`; its fused qkv is three of ours."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return [name.replace("qkv", part) for part in ("query", "key", "value")] if "qkv" in name else [name]


@functools.cache
def both(distilled):
    """timm's DeiT-Ti, and the shapes of ours."""
    model = timm.create_model(f"deit_tiny_{'distilled_' * distilled}patch16_224")
    mine = models.get("vit").Model(1000, variant="Ti/16", pool_type="tok", distilled=distilled)
    shapes = jax.eval_shape(lambda: mine.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"])
    assert sorted(sum((to_ours(name) for name, _ in model.named_parameters()), [])) == sorted(names(shapes))
    return model, shapes


@pytest.mark.parametrize("distilled", [False, True])
def test_the_same_parameters_are_decayed(distilled):
    """timm's today; the code of DeiT itself also decays the distillation token: wd_mults=[(".*/kernel|dist", 1)]."""
    model, shapes = both(distilled)
    groups = timm_optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    reference = {mine for name, p in model.named_parameters() if id(p) in decayed for mine in to_ours(name)}
    cfg = parse(OptimiserConfig, dict(lr=1e-3, weight_decay=0.05))
    assert {rule.name for rule in describe(cfg, shapes) if rule.wd_mult} == reference
    if distilled:
        quirk = parse(OptimiserConfig, dict(lr=1e-3, weight_decay=0.05, wd_mults=[(".*/kernel|dist", 1.0)]))
        assert {rule.name for rule in describe(quirk, shapes) if rule.wd_mult} == reference | {"dist"}


@pytest.mark.parametrize("distilled", [False, True])
def test_layer_decay_groups(distilled):
    """timm counts the final norm to the last block; ours, as BEiT's, to the heads."""
    model, shapes = both(distilled)
    scale = {id(p): group["lr_scale"]
             for group in timm_optim.param_groups_layer_decay(model, layer_decay=0.75) for p in group["params"]}
    reference = {mine: scale[id(p)] for name, p in model.named_parameters() for mine in to_ours(name)}
    rules = describe(parse(OptimiserConfig, dict(lr=1e-3, layer_decay=0.75)), shapes)
    for rule in rules:
        expected = reference[rule.name] / (0.75 if "encoder_norm" in rule.name else 1)
        assert math.isclose(rule.lr_mult, expected), rule
    assert {rule.lr_mult for rule in rules} == {0.75**i for i in range(14)}


LOGITS, TEACHER = (np.random.default_rng(i).normal(size=(6, 10)).astype(np.float32) * 4 for i in range(2))
MIXED = np.where(np.eye(10)[:6] + np.eye(10)[3:9] > 0, 0.3, 0.0).astype(np.float32)


def test_bce():
    mine = losses.bce(jnp.asarray(LOGITS), jnp.asarray(MIXED)).mean()
    logits, targets = torch.tensor(LOGITS), torch.tensor(MIXED)
    np.testing.assert_allclose(mine, torch.nn.BCEWithLogitsLoss()(logits, (targets > 0).float()), rtol=1e-5)
    np.testing.assert_allclose(
        mine, timm_loss.BinaryCrossEntropy(smoothing=0, target_threshold=0.0)(logits, targets), rtol=1e-5)


def test_soft_cross_entropy():
    mine = losses.softmax_xent(jnp.asarray(LOGITS), jnp.asarray(MIXED)).mean()
    reference = timm_loss.SoftTargetCrossEntropy()(torch.tensor(LOGITS), torch.tensor(MIXED))
    np.testing.assert_allclose(mine, reference, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation(tau):
    student, teacher = (torch.nn.functional.log_softmax(torch.tensor(x) / tau, dim=1) for x in (LOGITS, TEACHER))
    reference = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / LOGITS.size
    mine = losses.distill_soft(jnp.asarray(LOGITS), jnp.asarray(TEACHER), tau).mean()
    np.testing.assert_allclose(mine, reference, rtol=1e-5)


def test_hard_distillation():
    reference = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(TEACHER).argmax(dim=1))
    np.testing.assert_allclose(losses.distill_hard(jnp.asarray(LOGITS), jnp.asarray(TEACHER)).mean(), reference,
                               rtol=1e-5)


@pytest.mark.parametrize("pool, decayed", [
    ("avg", ".*/kernel"), ("map", ".*/kernel|MAPHead_0/probe"),  # timm decays the latent
    ("map", ".*")])
def test_lamb_trains_timms_model_as_timm_does(pool, decayed):
    """The same weights, images and loss; eps is large, for the gradient of a key's bias is nothing but rounding."""
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=10, class_token=False, fc_norm=False,
        global_pool=pool)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # of a size of its own each, so that what is fused has three sizes
        for p in theirs.parameters():
            for part in p.chunk(3 if len(p) == 96 else 2 if len(p) == 64 else 1):
                scale = 0.05 + 0.3 * torch.rand((), generator=generator)
                part.add_(scale * torch.randn(part.shape, generator=generator))
    mine, begun = ours_of(theirs, pool)
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(8, 16, 16, 3)).astype(np.float32) for _ in range(12)]
    labels = [rng.integers(10, size=8) for _ in images]

    groups = timm_optim.param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay())
    optimiser = timm_optim.Lamb([dict(params=list(theirs.parameters()), weight_decay=0.05)] if decayed == ".*" else
                                groups, lr=0.02, betas=(0.9, 0.999), eps=1e-4, max_grad_norm=1.0)
    for x, y in zip(images, labels, strict=True):
        optimiser.zero_grad()
        logits = theirs(torch.from_numpy(x).permute(0, 3, 1, 2))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).backward()
        optimiser.step()
    _, expected = ours_of(theirs, pool)

    def distance(**block):
        cfg = parse(OptimiserConfig, dict(
            lr=0.02, schedule=dict(decay_type="constant"), weight_decay=0.05, optax_name="scale_by_lamb",
            optax=dict(eps=1e-4), grad_clip_norm=1.0, wd_mults=[(decayed, 1.0)], **block))
        tx, _ = make(cfg, begun, total_steps=12, batch_size=8)

        @jax.jit
        def step(params, state, x, y):
            def loss(params):
                return optax.softmax_cross_entropy_with_integer_labels(mine.apply({"params": params}, x)[0], y).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = begun, tx.init(begun)
        for x, y in zip(images, labels, strict=True):
            params, state = step(params, state, x, y)
        assert names(params) == names(expected)
        return max(float(np.abs(a - b).max())
                   for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True))

    assert distance() < 1e-5
    assert distance(lamb_fused_qkv=False) > 1e-3


def ours_of(model, pool):
    """A model of timm as ours, which loads what it saves."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.pth"
        torch.save(model.state_dict(), path)
        return cb_vit.load(path, num_heads=2, gelu="erf")
