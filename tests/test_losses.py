"""Losses against float64 SciPy, and the properties that callers build on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cb_vit.config import ConfigError
from cb_vit.losses import LOSSES, bce, distill_hard, distill_soft, sigmoid_xent, smooth_labels, softmax_xent

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(3, 4, 7)) * 10
SOFT = rng.dirichlet(np.ones(7), size=(3, 4))
MULTI_HOT = rng.integers(0, 2, size=(3, 4, 7))


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("labels", [SOFT, MULTI_HOT], ids=["soft", "multi-hot"])
def test_softmax_xent_equals_scipy(labels):
    expected = -np.sum(labels * scipy.special.log_softmax(LOGITS, axis=-1), axis=-1)
    np.testing.assert_allclose(softmax_xent(f32(LOGITS), jnp.asarray(labels)), expected, rtol=1e-5)


@pytest.mark.parametrize("labels", [SOFT, MULTI_HOT], ids=["soft", "multi-hot"])
def test_sigmoid_xent_equals_scipy_and_sums_over_classes(labels):
    log_p, log_not_p = scipy.special.log_expit(LOGITS), scipy.special.log_expit(-LOGITS)
    expected = -np.sum(labels * log_p + (1 - labels) * log_not_p, axis=-1)
    np.testing.assert_allclose(sigmoid_xent(f32(LOGITS), jnp.asarray(labels)), expected, rtol=1e-5)


def test_bce_takes_targets_above_0_as_1_and_the_mean_over_classes():
    mixed = SOFT * (rng.uniform(size=SOFT.shape) < 0.3)
    log_p, log_not_p = scipy.special.log_expit(LOGITS), scipy.special.log_expit(-LOGITS)
    expected = -np.mean(np.where(mixed > 0, log_p, log_not_p), axis=-1)
    np.testing.assert_allclose(bce(f32(LOGITS), f32(mixed)), expected, rtol=1e-5)
    np.testing.assert_allclose(bce(f32(LOGITS), jnp.asarray(MULTI_HOT)) * 7,
                               sigmoid_xent(f32(LOGITS), jnp.asarray(MULTI_HOT)), rtol=1e-6)


TEACHER = rng.normal(size=(3, 4, 7)) * 5


def test_distill_hard_is_the_cross_entropy_of_the_teachers_decision():
    log_p = scipy.special.log_softmax(LOGITS, axis=-1)
    expected = -np.take_along_axis(log_p, TEACHER.argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(distill_hard(f32(LOGITS), f32(TEACHER)), expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_distill_soft_is_the_relative_entropy_at_temperature(tau):
    student, teacher = (scipy.special.softmax(x / tau, axis=-1) for x in (LOGITS, TEACHER))
    expected = tau**2 * scipy.special.rel_entr(teacher, student).sum(-1) / 7
    loss = distill_soft(f32(LOGITS), f32(TEACHER), tau)
    assert loss.shape == (3, 4)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_distill_soft_of_the_teacher_itself_is_0_and_its_gradient_keeps_its_size():
    """The reason for τ² (arXiv 1503.02531, section 2): otherwise the gradient would fall with τ²."""
    logits, teacher = f32(LOGITS[0, 0]) / 10, f32(TEACHER[0, 0]) / 5
    np.testing.assert_allclose(distill_soft(teacher, teacher, 2.0), 0, atol=1e-7)
    sizes = [jnp.linalg.norm(jax.grad(distill_soft)(logits, teacher, tau)) for tau in (10.0, 100.0)]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.1)


def test_distillation_of_half_precision_logits_is_float32():
    half = jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16)
    for loss in (distill_hard, functools.partial(distill_soft, tau=2.0)):
        assert loss(*half).dtype == jnp.float32
        np.testing.assert_array_equal(loss(*half), loss(*(x.astype(jnp.float32) for x in half)))


def test_known_values():
    zeros, first = jnp.zeros((2, 5)), jax.nn.one_hot(jnp.array([0, 0]), 5)
    np.testing.assert_allclose(softmax_xent(zeros, first), np.log(5), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_xent(zeros, first), 5 * np.log(2), rtol=1e-6)


def test_confident_logits_keep_their_digits():
    """At logit 15 for the true class the loss is log(1 + e^-15), far below float32's resolution around 15."""
    logits, labels = jnp.array([[15.0]]), jnp.array([[1.0]])
    np.testing.assert_allclose(sigmoid_xent(logits, labels), [np.log1p(np.exp(-15.0))], rtol=1e-5)
    for loss in LOSSES.values():
        huge, wrong = jnp.array([[1e4, -1e4]]), jnp.array([[0.0, 1.0]])
        assert np.all(np.isfinite(loss(huge, wrong)))
        assert np.all(np.isfinite(jax.grad(lambda x, loss=loss, y=wrong: loss(x, y).sum())(huge)))


def test_rows_without_a_label():
    logits, none = f32(LOGITS[0]), jnp.zeros((4, 7))
    np.testing.assert_array_equal(softmax_xent(logits, none), 0)
    np.testing.assert_allclose(sigmoid_xent(logits, none), np.logaddexp(0, LOGITS[0]).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_logits_are_computed_in_float32(loss):
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    out = loss(logits, jnp.asarray(SOFT, jnp.bfloat16))
    assert out.shape == (3, 4) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, loss(logits.astype(jnp.float32), jnp.asarray(SOFT, jnp.bfloat16)))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_jit_equals_python(loss):
    np.testing.assert_allclose(jax.jit(loss)(f32(LOGITS), f32(SOFT)), loss(f32(LOGITS), f32(SOFT)), rtol=1e-6)


def test_smoothing_closed_form():
    """DeiT's values: 0.1 over 1000 classes leaves 0.9001 on the true class and 0.0001 on the others."""
    smooth = smooth_labels(jax.nn.one_hot(jnp.array([3]), 1000), 0.1)
    np.testing.assert_allclose(smooth[0, 3], 0.9001, rtol=1e-6)
    np.testing.assert_allclose(np.delete(smooth[0], 3), 1e-4, rtol=1e-6)
    np.testing.assert_array_equal(smooth_labels(f32(SOFT), 0.0), f32(SOFT))


def test_smoothing_commutes_with_mixing():
    y1, y2, lam = f32(SOFT[0]), f32(SOFT[1]), 0.3
    mixed = smooth_labels(lam * y1 + (1 - lam) * y2, 0.1)
    np.testing.assert_allclose(mixed, lam * smooth_labels(y1, 0.1) + (1 - lam) * smooth_labels(y2, 0.1), rtol=1e-6)


def test_a_miss_lists_the_losses():
    assert LOSSES.pick("softmax_xent", "config.loss") is softmax_xent
    with pytest.raises(ConfigError, match="config.loss: unknown loss 'softmax_xnt'; did you mean softmax_xent"):
        LOSSES.pick("softmax_xnt", "config.loss")
