"""Distillation: the loss by hand, the same images for the teacher, and a teacher that stays as it was."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit import dist, experiment, weights
from cb_vit.config import ConfigError
from cb_vit.distillation import DistillationConfig, make_teacher
from cb_vit.pp import builder
from cb_vit.settings import check
from cb_vit.train import train_and_evaluate
from cb_vit.tree import flatten_with_names

CLASSES, BATCH = 5, 16
DATA = dict(name="fake", split="train", num_examples=64, image_size=8, num_classes=CLASSES)
TEACHER_PP, STUDENT_PP = (f"{how}|onehot({CLASSES})" for how in ("value_range(-1, 1)", "vgg_value_range"))
MODEL = dict(patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2, pool_type="tok", init="deit")


def config(pp, model=(), **changes):
    return dict(seed=0, total_steps=2, lr=0.1, schedule=dict(decay_type="constant"), optax_name="trace",
                optax=dict(decay=0.0), input=dict(data=DATA, batch_size=BATCH, pp=pp), model=MODEL | dict(model),
                plot=False) | changes


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run with another normalisation than the student's, in scan layout."""
    folder = tmp_path_factory.mktemp("teacher")
    train_and_evaluate(config(TEACHER_PP, dict(width=24, depth=2, scan=True)), folder)
    return folder


def student(teacher, devices=1, **changes):
    block = dict(teacher=str(teacher)) | changes.pop("distillation", {})
    model = dict(distilled=True) | changes.pop("model", {})
    return experiment.build(check(config(STUDENT_PP, model, distillation=block, **changes)), jax.devices()[:devices])


def step(run):
    """(loss, parameters before, parameters after, the batch) of one step."""
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
             "label": rng.integers(0, CLASSES, BATCH, np.int32), "_mask": np.full(BATCH, True)}
    with run.active_mesh():
        state = run.create_state()
        before = jax.device_get(state.params)
        sent = dist.to_global(batch, np.arange(BATCH), run.batch_sharding, BATCH)
        state, metrics = run.jit_train_step()(state, sent, run.read_teacher())
    return float(metrics["training_loss"]), before, jax.device_get(state.params), batch


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("block", [dict(type="hard"), dict(type="soft", tau=3.0, alpha=0.3)], ids=str)
def test_the_loss_by_hand(teacher, block):
    run = student(teacher, distillation=block)
    loss, params, _, batch = step(run)
    on_device = jax.tree.map(jnp.asarray, batch)
    seen = builder.build(STUDENT_PP, "pp").device(on_device)["image"]
    _, out = run.model.apply({"params": jax.tree.map(jnp.asarray, params)}, seen)
    source = weights.open_weights(teacher, "teacher")
    shown = builder.build(TEACHER_PP, "pp").device(on_device)["image"]  # as the teacher was trained
    logits, _ = source.model.apply({"params": run.read_teacher()}, shown)
    cls, own, logits = (np.asarray(x, np.float64) for x in (out["logits_cls"], out["logits_dist"], logits))
    alpha, tau = block.get("alpha", 0.5), block.get("tau", 1.0)
    label_loss = -log_softmax(cls)[np.arange(BATCH), batch["label"]].mean()
    if block["type"] == "hard":
        share = -log_softmax(own)[np.arange(BATCH), logits.argmax(axis=1)].mean()
    else:
        log_t, log_s = log_softmax(logits / tau), log_softmax(own / tau)
        share = (np.exp(log_t) * (log_t - log_s)).sum() * tau**2 / own.size  # DeiT divides by all elements
    assert loss == pytest.approx((1 - alpha) * label_loss + alpha * share, rel=2e-5)


def test_each_head_learns_from_its_own_and_the_teacher_does_not_learn(teacher):
    _, before, after, _ = step(student(teacher, distillation=dict(alpha=1.0)))
    moved = {name: np.abs(a - b).max() > 0 for (name, a), b in
             zip(flatten_with_names(after)[0], jax.tree.leaves(before), strict=True)}
    assert moved["head_dist/kernel"] and not moved["head/kernel"]


def test_the_teacher_is_sharded_by_the_same_rules_and_the_step_is_the_same(teacher):
    strategy = (("(params|opt)/.*", "fsdp(axis='data', min_size_to_shard_mb=0)"), ("opt/.*", "replicate"))
    sharded = student(teacher, devices=8, sharding_strategy=strategy)
    kernel = sharded.read_teacher()["embedding"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert step(sharded)[0] == pytest.approx(step(student(teacher))[0], rel=1e-5)


def test_it_trains_evaluates_and_resumes(teacher, tmp_path):
    settings = config(STUDENT_PP, dict(distilled=True), distillation=dict(teacher=str(teacher)), ckpt_steps=1)
    whole = train_and_evaluate(settings, tmp_path / "whole")
    train_and_evaluate(settings | dict(total_steps=1), tmp_path / "parts")
    assert train_and_evaluate(settings, tmp_path / "parts")["training_loss"] == whole["training_loss"]


def test_what_cannot_work_is_named(teacher, tmp_path):
    def refused(match, *args, **changes):
        with pytest.raises(ConfigError, match=match):
            student(*args or (teacher,), **changes)

    refused("config.distillation: the student needs .* set config.model.distilled=True", model=dict(distilled=False))
    refused("config.distillation.teacher: .* not the workdir of a run: it has no run.json", tmp_path)
    (tmp_path / "run.json").write_text("{}")
    refused("config.distillation.teacher: .*run.json does not describe a model: KeyError", tmp_path)
    refused("config.distillation.alpha: .* got 0", distillation=dict(alpha=0.0))
    refused("config.distillation.tau: has no effect with type='hard'", distillation=dict(tau=2.0))
    refused("config.distillation.type: .*'firm'", distillation=dict(type="firm"))
    with pytest.raises(ConfigError, match="config.distillation.teacher: required"):
        check(config(STUDENT_PP, dict(distilled=True), distillation=dict(alpha=0.5)))

    source, pp = weights.open_weights(teacher, "teacher"), builder.build(STUDENT_PP, "pp")
    settings = DistillationConfig(teacher=str(teacher))
    with pytest.raises(ConfigError, match=r"teacher: .* positions for \(2, 2\) patches and cannot .* \(16, 16, 3\)"):
        make_teacher(settings, source, pp, (16, 16, 3), CLASSES)
    with pytest.raises(ConfigError, match="has 5 classes, the student has 7"):
        make_teacher(settings, source, pp, (8, 8, 3), 7)
