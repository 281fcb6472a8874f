"""Position embeddings on another grid, against the libraries whose ways these are."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from cb_vit.config import ConfigError
from cb_vit.models.resample import METHODS, resample_patch, resample_posemb

GRIDS = [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((3, 5), (8, 2)), ((2, 6), (6, 2)), ((14, 14), (24, 24)), ((1, 3), (2, 1))]


def embedding(grid, d=5):
    return jnp.asarray(np.random.default_rng(grid).normal(size=(1, grid[0] * grid[1], d)), jnp.float32)


def cubic_of_torch(x, grid, a=-0.75):
    """Bicubic interpolation written as its definition, value by value; x [h w d]."""
    def kernel(t):
        t = abs(t)
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    h, w, d = x.shape
    out = np.zeros((*grid, d))
    for i, j in np.ndindex(*grid):
        y, z = (i + 0.5) * h / grid[0] - 0.5, (j + 0.5) * w / grid[1] - 0.5
        for k in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for m in range(int(np.floor(z)) - 1, int(np.floor(z)) + 3):
                out[i, j] += kernel(y - k) * kernel(z - m) * x[min(max(k, 0), h - 1), min(max(m, 0), w - 1)]
    return out


REFERENCES = {
    "bicubic_antialias": lambda x, grid: jax.image.resize(x, (*grid, x.shape[-1]), "bicubic", antialias=True),
    "bicubic": cubic_of_torch,
    "linear": lambda x, grid: scipy.ndimage.zoom(
        x, (grid[0] / x.shape[0], grid[1] / x.shape[1], 1), order=1, mode="nearest")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source, grid", GRIDS)
def test_as_the_library_whose_way_it_is(method, source, grid):
    x = embedding(source)
    got = resample_posemb(x, grid, method, source)
    expected = np.asarray(REFERENCES[method](np.asarray(x[0]).reshape(*source, -1), grid))
    np.testing.assert_allclose(got, expected.reshape(got.shape), atol=1e-5)  # JAX computes its weights in float32


@pytest.mark.parametrize("method", METHODS)
def test_the_same_grid_is_left_alone_and_a_constant_stays_one(method):
    x = embedding((4, 4))
    np.testing.assert_allclose(resample_posemb(x, (4, 4), method), x, atol=1e-6)
    np.testing.assert_allclose(resample_posemb(jnp.ones((1, 9, 2)), (5, 8), method), 1.0, atol=1e-6)


def test_the_ways_differ():
    results = [resample_posemb(embedding((7, 7)), (5, 5), method) for method in METHODS]
    assert len(results) == 3
    for i, one in enumerate(results):
        assert all(np.abs(one - other).max() > 0.05 for other in results[:i])


def test_under_jit_and_in_the_dtype_given():
    x = embedding((4, 4))
    resample = functools.partial(resample_posemb, grid=(6, 6))
    np.testing.assert_allclose(jax.jit(resample)(x), resample(x), atol=1e-6)
    assert resample(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="^posemb_resize: unknown .*'bicubc'; did you mean bicubic.*Choices: "):
        resample_posemb(embedding((4, 4)), (6, 6), "bicubc")
    with pytest.raises(ConfigError, match="^pos_embedding: its 12 patches are no square"):
        resample_posemb(embedding((3, 4)), (6, 6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before, after", [((4, 4), (8, 8)), ((3, 5), (7, 6)), ((16, 16), (32, 32))])
def test_a_larger_patch_resized_gives_the_same_token(method, before, after):
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(*before, 3, 6)), rng.normal(size=(*before, 3))
    # Resizing an image is what resampling does to positions: channels stand for the width.
    resized = resample_posemb(jnp.asarray(patch.reshape(1, -1, 3), jnp.float32), after, method, before)
    got = np.einsum("yxc,yxcd->d", np.asarray(resized).reshape(*after, 3),
                    np.asarray(resample_patch(jnp.asarray(kernel, jnp.float32), after, method)))
    np.testing.assert_allclose(got, np.einsum("yxc,yxcd->d", patch, kernel), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_patch_is_as_near_as_can_be(method):
    """Least squares over the pixels of a patch, solved by numpy for the two axes at once."""
    kernel = np.random.default_rng(0).normal(size=(6, 5, 1, 1))
    resize = np.kron(METHODS[method](6, 3), METHODS[method](5, 4))
    expected = np.linalg.lstsq(resize.T, kernel.ravel(), rcond=None)[0].reshape(3, 4, 1, 1)
    np.testing.assert_allclose(resample_patch(jnp.asarray(kernel, jnp.float32), (3, 4), method), expected, atol=1e-4)
