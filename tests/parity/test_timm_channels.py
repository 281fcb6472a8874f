"""RGB weights for images of other channels: timm's own adaptation gives the same kernels and the same logits."""
import jax
import numpy as np
import pytest

import cb_vit
from cb_vit.weights.containers import write_safetensors

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from timm.models import adapt_input_conv  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

SIZES = dict(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=7)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) * 0.2 for name, value in VisionTransformer(**SIZES).state_dict().items()}


@pytest.mark.parametrize("channels, dense", [(1, False), (2, False), (4, False), (5, False), (1, True), (4, True)])
def test_as_timm_adapts_them(state, channels, dense, tmp_path):
    kernel = state["patch_embed.proj.weight"]
    """`dense`: the patch embedding of timm before 0.4."""
    theirs = VisionTransformer(**SIZES, in_chans=channels).eval()
    theirs.load_state_dict(state | {"patch_embed.proj.weight": adapt_input_conv(channels, kernel)})
    saved = state | {"patch_embed.proj.weight": kernel.reshape(len(kernel), -1)} if dense else state
    write_safetensors(tmp_path / "x.safetensors", {name: value.numpy() for name, value in saved.items()})
    model, params = cb_vit.load(tmp_path / "x.safetensors", channels=channels, num_heads=2)
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        expected = theirs(images).numpy()
    found = jax.jit(model.apply)({"params": params}, images.permute(0, 2, 3, 1).numpy())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(params["embedding"]["kernel"],
                               adapt_input_conv(channels, kernel).permute(2, 3, 1, 0).numpy(), rtol=1e-5, atol=1e-6)
