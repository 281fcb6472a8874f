"""Position embeddings on another grid, and patches of another size, against torch and timm themselves."""
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.models.resample import resample_patch, resample_posemb

torch = pytest.importorskip("torch")
timm_layers = pytest.importorskip("timm.layers")

GRIDS = [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((7, 5), (9, 12)), ((4, 4), (5, 3))]


def embedding(grid, d=8):
    return np.random.default_rng(grid).normal(size=(1, math.prod(grid), d)).astype(np.float32)


@pytest.mark.parametrize("source, grid", GRIDS)
def test_bicubic_is_deits(source, grid):
    """What DeiT's main.py does to `pos_embed` before fine-tuning."""
    x = embedding(source)
    image = torch.from_numpy(x).reshape(1, *source, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).flatten(1, 2).numpy()
    np.testing.assert_allclose(resample_posemb(jnp.asarray(x), grid, "bicubic", source), expected, atol=5e-6)


@pytest.mark.parametrize("source, grid", GRIDS)
def test_bicubic_antialias_is_timms(source, grid):
    x = embedding(source)
    expected = timm_layers.resample_abs_pos_embed(
        torch.from_numpy(x), new_size=list(grid), old_size=list(source), num_prefix_tokens=0).numpy()
    np.testing.assert_allclose(resample_posemb(jnp.asarray(x), grid, "bicubic_antialias", source), expected, atol=5e-6)


@pytest.mark.parametrize("before, after", [(16, 32), (16, 8), (14, 16), (32, 16)])
def test_patches_of_another_size_are_timms(before, after):
    kernel = np.random.default_rng(0).normal(size=(before, before, 3, 8)).astype(np.float32)
    expected = timm_layers.resample_patch_embed(
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()), [after, after]).numpy().transpose(2, 3, 1, 0)
    got = resample_patch(jnp.asarray(kernel), (after, after))
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
