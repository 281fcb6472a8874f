"""Context Broadcasting: the algebra of ½(I + 11ᵀ/n), reference spec C.3."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.models.context import broadcast_context

RNG = np.random.default_rng(0)


def tokens(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_equals_the_paper_in_float64():
    x = RNG.normal(size=(2, 3, 17, 8))
    expected = (x + x.mean(axis=-2, keepdims=True)) / 2
    np.testing.assert_allclose(broadcast_context(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)


def test_keeps_the_mean_and_halves_deviations():
    x = tokens(4, 197, 16)
    y = broadcast_context(x)
    mean = x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(y.mean(axis=1, keepdims=True), mean, atol=1e-6)
    np.testing.assert_allclose(y - mean, (x - mean) / 2, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_its_matrix_has_eigenvalue_one_once_and_a_half_else(n):
    matrix = broadcast_context(jnp.eye(n)[None])[0]
    np.testing.assert_allclose(matrix, (np.eye(n) + np.ones((n, n)) / n) / 2, atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), [0.5] * (n - 1) + [1.0], atol=1e-5)


def test_gradient_is_the_same_operator():
    x, g = tokens(2, 9, 4), tokens(2, 9, 4)
    (got,) = jax.vjp(broadcast_context, x)[1](g)
    np.testing.assert_allclose(got, (g + g.mean(axis=1, keepdims=True)) / 2, atol=1e-6)


def test_commutes_with_any_affine_map_of_a_token():
    x, w, b = tokens(2, 9, 4), tokens(4, 6), tokens(1, 1, 6)
    np.testing.assert_allclose(broadcast_context(x @ w + b), broadcast_context(x) @ w + b, atol=1e-5)


def test_does_not_mind_the_order_of_tokens():
    x, order = tokens(2, 9, 4), RNG.permutation(9)
    np.testing.assert_allclose(broadcast_context(x[:, order]), broadcast_context(x)[:, order], atol=1e-6)


def test_stacking_halves_again():
    x = tokens(1, 9, 4)
    y = x
    for _ in range(4):
        y = broadcast_context(y)
    mean = x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(y - mean, (x - mean) / 16, atol=1e-6)


def test_scale_multiplies_the_mean_per_channel():
    x, scale = tokens(2, 9, 4), tokens(4)
    expected = (np.asarray(x) + np.asarray(scale) * np.asarray(x).mean(axis=1, keepdims=True)) / 2
    np.testing.assert_allclose(broadcast_context(x, scale), expected, atol=1e-6)
    np.testing.assert_array_equal(broadcast_context(x, jnp.ones(4)), broadcast_context(x))


def test_mask_leaves_padding_out_of_the_mean():
    x, mask = tokens(2, 9, 4), jnp.asarray([[True] * 6 + [False] * 3, [True] * 9])
    y = broadcast_context(x, mask=mask)
    np.testing.assert_allclose(y[0, :6], broadcast_context(x[:1, :6])[0], atol=1e-6)
    np.testing.assert_allclose(y[1], broadcast_context(x)[1], atol=1e-6)
    poisoned = x.at[0, 6:].set(jnp.nan)
    np.testing.assert_array_equal(broadcast_context(poisoned, mask=mask)[0, :6], y[0, :6])


def test_a_row_of_padding_alone_has_mean_zero():
    x = tokens(1, 5, 4)
    np.testing.assert_array_equal(broadcast_context(x, mask=jnp.zeros((1, 5), bool)), x / 2)


def test_mean_is_taken_in_float32_in_a_bfloat16_model():
    x = jnp.ones((1, 4097, 2), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    y = broadcast_context(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x)
    noise = tokens(1, 197, 64).astype(jnp.bfloat16)
    exact = np.asarray(noise, np.float64)
    exact = (exact + exact.mean(axis=1, keepdims=True)) / 2
    # Nothing but the final rounding to bfloat16 separates the two: half a unit in the last place of 8 bits.
    np.testing.assert_allclose(np.asarray(broadcast_context(noise), np.float64), exact, rtol=2**-8, atol=1e-6)


def test_jit_and_eager_agree():
    x = tokens(2, 9, 4)
    # Compiled as users have it: `conftest.py` turns off what these options turn on, for the version that knows them.
    options = dict(xla_backend_optimization_level=3, xla_cpu_use_fusion_emitters=True)
    known = jax.__version_info__[:2] == (0, 10)
    compiled = jax.jit(broadcast_context, compiler_options=options if known else None)
    np.testing.assert_array_equal(compiled(x), broadcast_context(x))
