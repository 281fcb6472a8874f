"""The optimiser against an independent NumPy AdamW in float64, its rules by name, and the errors of its keys."""
import ast
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from cb_vit import tree
from cb_vit.config import ConfigError, parse
from cb_vit.models.common import to_scan
from cb_vit.optax import TRANSFORMATIONS, OptimiserConfig, describe, make, peak_lr, warn_mismatch
from cb_vit.schedules import ScheduleConfig

BLOCK = "Transformer/encoderblock_0"
SHAPES = {
    "embedding/kernel": (2, 2, 3, 4), "embedding/bias": (4,), "cls": (1, 1, 4), "pos_embedding": (1, 9, 4),
    f"{BLOCK}/LayerNorm_0/scale": (4,), f"{BLOCK}/MlpBlock_0/Dense_0/kernel": (4, 8),
    f"{BLOCK}/MlpBlock_0/context_scale": (4,), f"{BLOCK}/LayerScale_0/gamma": (4,),
    "head/kernel": (4, 5), "head/bias": (5,),
}
STEPS = 20


def draw(seed, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) * scale for name, shape in shapes.items()}


def nested(flat):
    return unflatten_dict({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()}, sep="/")


def flat(nested_tree):
    return {name: np.asarray(leaf) for name, leaf in tree.flatten_with_names(nested_tree)[0]}


def config(**block):
    return parse(OptimiserConfig, {"lr": 1e-2, "schedule": dict(decay_type="constant"), **block})


def build(params, **block):
    return make(config(**block), params, total_steps=STEPS, batch_size=8, examples=80)


def train(tx, params, grads, jit=True):
    """Parameters after one update for each of `grads`, and the optimiser state."""
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state, step = tx.init(params), jax.jit(step) if jit else step
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def adamw(params, grads, lr, multiplier, decay, clip=None, frozen=(), b1=0.9, b2=0.999, eps=1e-8):
    """AdamW by the book in float64; lr(name, t), decay(name): what holds for a parameter; frozen ones stay."""
    params = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    moving = [name for name in params if name not in frozen]
    m, v = ({name: np.zeros_like(params[name]) for name in moving} for _ in range(2))
    for t, grad in enumerate(grads):
        norm = np.sqrt(sum(np.sum(grad[name] ** 2) for name in moving))
        factor = 1.0 if clip is None else min(1.0, clip / norm)
        for name in moving:
            g = grad[name] * factor
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            direction = (m[name] / (1 - b1 ** (t + 1))) / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + eps)
            params[name] = params[name] - lr * multiplier(name, t) * (direction + decay(name) * params[name])
    return params


def assert_trees_close(actual, expected, **tolerance):
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        np.testing.assert_allclose(actual[name], expected[name], err_msg=name, **tolerance)


def test_trajectory_equals_numpy_adamw():
    """Everything at once: two schedules, a frozen parameter, multipliers, decay rules, clipping, batch scaling."""
    params, grads = draw(0), [draw(10 + t, scale=0.3 + t % 3) for t in range(STEPS)]
    tx, _ = build(
        nested(params), lr=2e-3, lr_reference_batch=4, lr_mults=[("head/.*", 3.0), (".*/bias", 0.5)], weight_decay=0.3,
        wd_mults=[("embedding/.*", 0.0), (".*/kernel", 2.0), ("pos_embedding", 0.5)], grad_clip_norm=5.0,
        schedule=[("cls", None), ("Transformer/.*", dict(decay_type="constant")), (".*", dict(warmup_epochs=0.5))],
        optax=dict(b2=0.95))

    def multiplier(name, t):
        if name.startswith("Transformer/"):
            return 1.0
        return min(1, t / 5) * (1 + np.cos(np.pi * max(0, t - 5) / 15)) / 2 * (
            3.0 if name in ("head/kernel", "head/bias") else 0.5 if name == "embedding/bias" else 1.0)

    decay = {f"{BLOCK}/MlpBlock_0/Dense_0/kernel": 0.6, "head/kernel": 0.6, "pos_embedding": 0.15}
    expected = adamw(params, grads, lr=4e-3, multiplier=multiplier, decay=lambda name: decay.get(name, 0.0),
                     clip=5.0, frozen=("cls",), b2=0.95)
    actual, _ = train(tx, nested(params), [nested(grad) for grad in grads])
    assert_trees_close(actual, unflatten_dict(expected, sep="/"), rtol=1e-4, atol=1e-5)


def test_plain_adamw_equals_optax():
    params, grads = nested(draw(0)), [nested(draw(10 + t)) for t in range(5)]
    tx, _ = build(params, lr=1e-3, weight_decay=0.05, wd_mults=[(".*", 1.0)])
    actual, _ = train(tx, params, grads)
    expected, _ = train(optax.adamw(1e-3, weight_decay=0.05), params, grads)
    assert_trees_close(actual, expected, rtol=1e-5)


def test_default_decays_kernels_only():
    """With zero gradients only weight decay moves a parameter: p ← p (1 - lr · weight_decay)."""
    params = nested(draw(0))
    tx, _ = build(params, lr=0.1, weight_decay=0.5)
    after, _ = train(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    for name, leaf in flat(params).items():
        factor = 0.95 if name.endswith("/kernel") else 1.0
        np.testing.assert_allclose(flat(after)[name], leaf * factor, rtol=1e-6, err_msg=name)


def test_the_advised_conversion_of_wd_gives_big_vision_decay():
    """big_vision: p ← p - schedule · wd · p, whatever lr is."""
    lr, wd = 4e-3, 2e-2
    with pytest.raises(ConfigError) as error:
        config(lr=lr, wd=wd)
    assert str(error.value) == ("config.wd: big_vision's weight decay is not multiplied by lr; "
                                "write weight_decay = wd / lr = 5")
    params = nested(draw(0))
    tx, _ = build(params, lr=lr, weight_decay=5, wd_mults=[(".*", 1)])
    after, _ = train(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    assert_trees_close(after, jax.tree.map(lambda p: p * (1 - wd), params), rtol=1e-6)


@pytest.mark.parametrize("batch", [None, 4])
def test_the_advised_wd_mults_undo_lr_mults(batch):
    """big_vision: p ← p - schedule · wd · wd_mult · p, whatever lr_mults are."""
    wd, given = 2e-2, dict(lr=4e-3, lr_reference_batch=batch, lr_mults=[("head/.*", 0.1), (".*/kernel", 3.0)],
                           wd_mults=[("head/bias", 0.5), (".*/(kernel|scale)", 1.0)])
    with pytest.raises(ConfigError) as error:
        config(wd=wd, **given)
    weight_decay, wd_mults = re.search(r"wd / lr = ([\d.]+).*: wd_mults = (.*)$", str(error.value)).groups()
    params = nested(draw(0))
    tx, _ = build(params, **given | dict(weight_decay=float(weight_decay) / (8 if batch else 1),
                                         wd_mults=[(regex, mult) for regex, mult in ast.literal_eval(wd_mults)
                                                   if any(re.fullmatch(regex, name) for name in SHAPES)]))
    after, _ = train(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    for name, leaf in flat(params).items():
        mult = 0.5 if name == "head/bias" else float(name.endswith(("/kernel", "/scale")))
        np.testing.assert_allclose(flat(after)[name], leaf * (1 - wd * mult), rtol=1e-6, err_msg=name)


def test_frozen_parameters_keep_every_bit_and_have_no_state():
    params, grads = nested(draw(0)), [nested(draw(10 + t)) for t in range(3)]
    for grad in grads:
        grad["head"]["kernel"] *= jnp.nan
    tx, schedules = build(params, schedule=[("(?!head).*", None), (".*/kernel", None), (".*", {})], weight_decay=0.1)
    after, state = train(tx, params, grads)
    assert list(schedules) == [".*"]
    for name, leaf in flat(params).items():
        if name == "head/bias":
            assert np.all(flat(after)[name] != leaf)
        else:
            assert flat(after)[name].tobytes() == leaf.tobytes(), name
    sized = {name: leaf for name, leaf in flat(state).items() if leaf.ndim}
    assert len(sized) == 2 and all(name.endswith("/head/bias") for name in sized)  # Adam's mu and nu


def test_clip_norm_ignores_frozen_gradients():
    params, grad = nested(draw(0)), draw(1)
    loud = {name: leaf * (1e6 if name.startswith("Transformer/") else 1) for name, leaf in grad.items()}
    block = dict(grad_clip_norm=0.5, optax_name="identity", lr=1.0)
    tx, _ = build(params, schedule=[("Transformer/.*", None), (".*", dict(decay_type="constant"))], **block)
    updates, _ = tx.update(nested(loud), tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)
    tx, _ = build(params, **block)
    updates, _ = tx.update(nested(grad), tx.init(params), params)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in grad.values()))
    assert_trees_close(updates, nested({name: -0.5 / norm * leaf for name, leaf in grad.items()}), rtol=1e-5)
    assert norm > 0.5


def test_gradients_below_the_clip_norm_pass_unchanged():
    params, grad = nested(draw(0)), nested(draw(1))
    tx, _ = build(params, grad_clip_norm=1e3, optax_name="identity", lr=1.0)
    updates, _ = tx.update(grad, tx.init(params), params)
    assert_trees_close(updates, jax.tree.map(jnp.negative, grad), rtol=0)


def test_describe_first_match_wins():
    cfg = config(
        lr_mults=[("head/kernel", 2.0), ("head/.*", 3.0)], wd_mults=[("head/kernel", 0.5), (".*/kernel", 1.0)],
        schedule=[("cls", None), ("head/.*", dict(warmup_steps=2)), (".*", {})])
    rows = {row.name: row for row in describe(cfg, nested(draw(0)))}
    assert list(rows) == tree.names(nested(draw(0)))
    picked = {name: (row.schedule, row.lr_mult, row.wd_mult, row.frozen) for name, row in rows.items()}
    assert picked["head/kernel"] == ("head/.*", 2.0, 0.5, False)
    assert picked["head/bias"] == ("head/.*", 3.0, 0.0, False)
    assert picked["embedding/kernel"] == (".*", 1.0, 1.0, False)
    assert picked["cls"] == (None, 0.0, 0.0, True)
    assert rows["head/kernel"].shape == (4, 5)


LAYERS = ["embedding/kernel", "cls", "dist", "reg", "pos_embedding", "Transformer/encoderblock_0/Dense_0/kernel",
          "Transformer/encoderblock_1/Dense_0/kernel", "Transformer/encoderblock_2/Dense_0/kernel",
          "Transformer/encoder_norm/scale", "head/kernel", "head_dist/bias"]


def test_layer_decay_falls_from_the_heads_to_the_embedding():
    """BEiT: decay^(L + 1 - i), here L = 3; times lr_mults."""
    params = nested(draw(0, dict.fromkeys(LAYERS, (2, 2))))
    mults = {rule.name: rule.lr_mult for rule in describe(config(layer_decay=0.5, lr_mults=[("head/.*", 3.0)]), params)}
    assert [mults[name] for name in LAYERS] == [1 / 16] * 5 + [1 / 8, 1 / 4, 1 / 2] + [1, 3, 1]
    tx, _ = build(params, layer_decay=0.5, optax_name="identity", lr=1.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    for name, update in flat(updates).items():
        np.testing.assert_allclose(-update, mults[name] / (3 if name == "head/kernel" else 1), err_msg=name)


def test_layer_decay_in_scan_layout_is_one_multiplier_a_block():
    params = to_scan(nested(draw(0, dict.fromkeys(LAYERS, (2, 2)))))
    cfg = config(layer_decay=0.5, lr_mults=[("Transformer/.*", 2.0)])
    rule = {rule.name: rule for rule in describe(cfg, params)}["Transformer/encoderblock/Dense_0/kernel"]
    assert rule.lr_mult == (1 / 4, 1 / 2, 1) and rule.lr_text == "0.25…1"
    frozen = describe(config(layer_decay=0.5, schedule=[("Transformer/.*", None), (".*", {})]), params)
    assert {rule.lr_mult for rule in frozen if rule.frozen} == {0.0}
    plain = describe(config(layer_decay=1), params)
    assert {rule.lr_text for rule in plain} == {"1"}


def test_warning_of_a_learning_rate_for_lamb():
    """DeiT-III's 4e-3 with Adam's direction, be it given or scaled."""
    def warning(width=384, **block):
        return warn_mismatch(config(**block), batch_size=2048, width=width)

    for text in (warning(lr=4e-3), warning(lr=1e-3, lr_reference_batch=512)):
        assert text.startswith("config.lr: a peak of 0.004 is a learning rate for LAMB; with Adam's direction a width ")
    assert warning(lr=2e-3) is warning(lr=4e-3, width=64) is None
    assert warning(lr=4e-3, optax_name="scale_by_lamb", weight_decay=0.05) is None


def test_schedules_know_the_scaled_peak():
    """warmup_lr and min_lr are learning rates, whatever the batch."""
    _, schedules = build(nested(draw(0)), lr=1e-2, lr_reference_batch=4, schedule=dict(
        warmup_steps=4, warmup_lr=1e-3, min_lr=1e-4))
    np.testing.assert_allclose([2e-2 * schedules[".*"](t) for t in (0, 4, 20)], [1e-3, 2e-2, 1e-4], rtol=1e-5)


def test_state_has_the_parameters_names():
    """So that one regex shards parameters and optimiser state; also from shapes alone, as states are born sharded."""
    shapes = jax.eval_shape(lambda: nested(draw(0)))
    tx, _ = build(shapes)
    state = tree.flatten_with_names(jax.eval_shape(tx.init, shapes))[0]
    for name, leaf in tree.flatten_with_names(shapes)[0]:
        twins = [twin for twin_name, twin in state if twin_name.endswith(f"/{name}")]
        assert [twin.shape for twin in twins] == [leaf.shape] * 2


def test_scan_layout_moves_like_the_loop_layout():
    """Leaves with a leading depth axis get the same updates as the separate blocks stacked."""
    loop = {f"Transformer/encoderblock_{i}/Dense_0/{leaf}": (3,) * ndim
            for i in range(2) for leaf, ndim in (("kernel", 2), ("bias", 1))}
    blocks = [f"Transformer/encoderblock_{i}/Dense_0" for i in range(2)]

    def stacked(values):
        return {f"Transformer/encoderblock/Dense_0/{leaf}": np.stack([values[f"{block}/{leaf}"] for block in blocks])
                for leaf in ("kernel", "bias")}

    block = dict(weight_decay=0.3, grad_clip_norm=1.0, lr_mults=[("Transformer/.*", 2.0)])
    params, grads = draw(0, loop), [draw(10 + t, loop) for t in range(4)]
    separate, _ = train(build(nested(params), **block)[0], nested(params), [nested(grad) for grad in grads])
    together, _ = train(build(nested(stacked(params)), **block)[0], nested(stacked(params)),
                        [nested(stacked(grad)) for grad in grads])
    assert_trees_close(together, nested(stacked(flat(separate))), rtol=1e-5)


def test_count_is_the_number_of_updates_and_drives_the_schedules():
    params = nested(draw(0))
    tx, schedules = build(params, optax_name="identity", lr=0.5, schedule=dict(warmup_steps=4))
    state, ones = tx.init(params), jax.tree.map(jnp.ones_like, params)
    for step in range(6):
        updates, state = tx.update(ones, state, params)
        np.testing.assert_allclose(flat(updates)["cls"], -0.5 * schedules[".*"](step), rtol=1e-6)
        counts = {int(leaf) for name, leaf in flat(state).items() if name.endswith("count")}
        assert counts == {step + 1}


def test_jit_equals_python():
    params, grads = nested(draw(0)), [nested(draw(10 + t)) for t in range(3)]
    tx, _ = build(params, weight_decay=0.1, grad_clip_norm=1.0, schedule=dict(warmup_steps=4))
    assert_trees_close(train(tx, params, grads)[0], train(tx, params, grads, jit=False)[0], rtol=1e-5)


def test_mu_dtype_as_a_string():
    params = nested(draw(0))
    tx, _ = build(params, optax=dict(mu_dtype="bfloat16"))
    after, state = train(tx, params, [nested(draw(1))])
    dtypes = {name.split("/")[-3]: leaf.dtype for name, leaf in flat(state).items() if name.endswith("head/bias")}
    assert dtypes == {"mu": jnp.bfloat16, "nu": jnp.float32}
    assert all(leaf.dtype == jnp.float32 for leaf in flat(after).values())


@pytest.mark.parametrize("name", ["scale_by_adam", "scale_by_lion", "scale_by_factored_rms", "trace", "identity"])
def test_other_transformations_descend(name):
    params = nested(draw(0))
    tx, _ = build(params, optax_name=name, optax=dict(decay=0.9) if name == "trace" else {}, grad_clip_norm=1.0)
    after, _ = train(tx, params, [params] * 3)  # the gradient of ‖p‖² / 2
    assert optax.tree.norm(after) < optax.tree.norm(params)


def test_peak_lr_scales_with_the_batch():
    """DeiT: 5e-4 per 512 examples is 1e-3 at 1024."""
    assert peak_lr(config(lr=5e-4, lr_reference_batch=512), 1024) == 1e-3
    assert peak_lr(config(lr=5e-4), 1024) == 5e-4


def test_a_whole_config_can_inherit_the_keys():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Whole(OptimiserConfig):
        seed: int

    whole = parse(Whole, dict(seed=1, lr=1e-3))
    assert whole.schedule == ScheduleConfig() and whole.schedule_rules == ((".*", ScheduleConfig()),)
    with pytest.raises(ConfigError, match="config.lr: must be a number above 0, got 0.0"):
        parse(Whole, dict(seed=1, lr=0))


def test_transformations_that_would_not_fit_are_not_offered():
    assert "scale_by_adam" in TRANSFORMATIONS and "trace" in TRANSFORMATIONS
    assert not {"scale_by_schedule", "scale_by_learning_rate", "scale_by_polyak", "adamw"} & set(TRANSFORMATIONS)


@pytest.mark.parametrize(("block", "message"), [
    (dict(lr=-1), "config.lr: must be a number above 0, got -1.0"),
    (dict(weight_decay=-1), "config.weight_decay: must be 0 or more, got -1.0"),
    (dict(grad_clip_norm=0), "config.grad_clip_norm: must be a number above 0, got 0.0"),
    (dict(grad_clip_adaptive=0), "config.grad_clip_adaptive: must be a number above 0, got 0.0"),
    (dict(layer_decay=0), "config.layer_decay: must be above 0 and at most 1, got 0.0"),
    (dict(layer_decay=1.1), "config.layer_decay: must be above 0 and at most 1, got 1.1"),
    (dict(optax_name="scale_by_lamb"), "config.weight_decay: is 0, and scale_by_lamb adapts the steps of decayed"),
    (dict(optax_name="lamb"), "config.optax_name: unknown optax transformation 'lamb'; did you mean scale_by_lamb?"),
    (dict(lr_reference_batch=0), "config.lr_reference_batch: must be a number above 0, got 0"),
    (dict(lr_mults=[("head/.*", 0)]), "config.lr_mults[0]: 'head/.*' has multiplier 0.0, which must be above 0"),
    (dict(wd_mults=[("head/.*", -1)]), "config.wd_mults[0]: 'head/.*' has multiplier -1.0, which must be 0 or more"),
    (dict(wd_mults=[("(", 1)]), "config.wd_mults[0]: '(' is not a regular expression"),
    (dict(lr_mults=[("a", 1), ("a", 2)]), "config.lr_mults[1]: 'a' is given twice; keep one"),
    (dict(schedule=[(".*", dict(warmup_stepz=1))]), "config.schedule[0][1].warmup_stepz: unknown; did you mean"),
    (dict(schedule=dict(warmup_stepz=1)), "config.schedule.warmup_stepz: unknown; did you mean warmup_steps?"),
    (dict(schedule=[("[", None)]), "config.schedule[0]: '[' is not a regular expression"),
    (dict(optax_name="adamw"), "config.optax_name: unknown optax transformation 'adamw'; did you mean scale_by_adam"),
    (dict(optax=dict(bb2=0.9)), "config.optax.bb2: unknown; did you mean b2? scale_by_adam takes b1, b2, eps"),
    (dict(optax=dict(b2="high")), "config.optax.b2: expected a number, got 'high'"),
    (dict(optax=dict(mu_dtype="bfloat17")), "config.optax: scale_by_adam refuses {'mu_dtype': 'bfloat17'}"),
    (dict(optax_name="trace"), "config.optax.decay: required by trace and not set; write optax = dict(decay=...)"),
    (dict(wd=1e-4, lr_reference_batch=512),
     "config.wd: big_vision's weight decay is not multiplied by lr; write weight_decay = wd / lr = 5.12 / "
     "input.batch_size (lr as scaled by lr_reference_batch: 0.01 · input.batch_size / 512)"),
    (dict(wd=1e-4, layer_decay=0.75, schedule=[("cls", None), (".*", {})]),
     "config.wd: big_vision's weight decay is not multiplied by lr; write weight_decay = wd / lr = 0.01; nor by "
     "layer_decay, so divide wd_mults by 0.75ⁿ too, in loop layout: n = L - k in block k of L, L + 1 in the stem, "
     "0 above the blocks; what the schedule freezes is decayed in neither"),
    (dict(wd=1e-4, optax_name="scale_by_lamb"),
     "config.wd: big_vision's weight decay is not multiplied by lr; and no weight_decay equals it under scale_by_lamb"),
    (dict(lamb_fused_qkv=True), "config.lamb_fused_qkv: is True, and scale_by_adam has no such norms; unset it"),
])
def test_errors_of_the_config(block, message):
    with pytest.raises(ConfigError) as error:
        config(**block)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("block", "message"), [
    (dict(lr_mults=[("head/.*", 2), ("haed/.*", 2)]), "config.lr_mults[1]: 'haed/.*' matches no parameter"),
    (dict(wd_mults=[("kernel", 1)], weight_decay=0.1), "config.wd_mults[0]: 'kernel' matches no parameter"),
    (dict(schedule=[("body/.*", None), (".*", {})]), "config.schedule[0]: 'body/.*' matches no parameter"),
    (dict(schedule=[("(?!head).*", None), ("head/kernel", {})]), "config.schedule: no rule covers 'head/bias'; end"),
    (dict(schedule=()), "config.schedule: no rule covers 'Transformer/encoderblock_0/LayerNorm_0/scale'"),
    (dict(schedule=[(".*", None)]), "config.schedule: freezes every parameter"),
    (dict(schedule=[(".*", dict(warmup_steps=99))]), "config.schedule[0][1].warmup_steps: 99 steps of warm-up do not"),
    (dict(schedule=dict(warmup_steps=99)), "config.schedule.warmup_steps: 99 steps of warm-up do not fit"),
])
def test_errors_that_need_the_parameters(block, message):
    with pytest.raises(ConfigError) as error:
        build(nested(draw(0)), **block)
    assert str(error.value).startswith(message)


def test_layer_decay_needs_blocks():
    with pytest.raises(ConfigError, match="^config.layer_decay: goes by blocks named encoderblock"):
        describe(config(layer_decay=0.5), nested(draw(0, {"head/kernel": (2, 2)})))
