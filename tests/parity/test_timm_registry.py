"""All that timm can make of its VisionTransformer: each file loads with the right logits, or is refused.

With the `config.json` that timm itself writes, and without; nothing is ever silently wrong.
"""
import functools
import inspect
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit import formats
from cb_vit.formats import FormatError, cards
from cb_vit.formats.conversion import convert
from cb_vit.models.vit import Model
from cb_vit.tree import unflatten_names

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from timm.models import list_models  # noqa: E402
from timm.models._hub import save_config_for_hf  # noqa: E402
from timm.models._pretrained import PretrainedCfg  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

NAMES = [name for module in ("vision_transformer", "deit") for name in list_models(module=module)]
PIECES = {"norm", "gamma"}


def make(name, **options):
    """On no device: names and shapes."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **options)


def small(name, **options):
    """Two blocks, few patches, some classes; else as it is."""
    patch = make(name).patch_embed.patch_size[0]
    return make(name, **{"depth": 2, "num_classes": 7, "img_size": 3 * patch, **options})


def card(model, path):
    """The `config.json` that timm writes for it."""
    save_config_for_hf(model, path / "config.json")
    return json.loads((path / "config.json").read_text())


def understand(model, **kw):
    tensors = {name: formats.Tensor(tuple(p.shape), np.dtype(np.float32), lambda p=p: p.detach().numpy())
               for name, p in model.state_dict(keep_vars=True).items()}
    return convert(tensors, path="file", **kw)


def fill(model):
    """Random parameters, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.5 / np.sqrt(p[0].numel()) if p.ndim in (2, 4) else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if any(piece in name for piece in PIECES) and not name.endswith("bias"):
                p.add_(1)
    return model


@functools.cache
def compiled(num_classes, keywords):
    return jax.jit(Model(num_classes, **dict(keywords)).apply)


def assert_same_logits(model, understood):
    """As timm's, to 1e-4 of the largest."""
    fill(model)
    found = understood()
    rows, columns = found.grid
    height, width = (n * side for n, side in zip((rows, columns), found.model["patch_size"], strict=True))
    x = np.random.default_rng(0).normal(size=(2, height, width, model.patch_embed.proj.in_channels)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    params = unflatten_names({name: jnp.asarray(tensor.read()) for name, tensor in found.params.items()})
    logits, _ = compiled(found.num_classes, tuple(sorted(found.model.items())))({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def right_or_refused(model, **kw):
    """Whether it loads; what loads is right."""
    try:
        understand(model, **kw)
    except FormatError:
        return False
    assert_same_logits(model, lambda: understand(model, **kw))
    return True


LOADS = (r"(vit|deit)_(tiny|small|base)_patch16_224", r"deit_base_distilled_patch16_224", r"deit3_large_patch16_224",
         r"flexivit_small", r"test_vit", r"vit_so400m_patch1[46]_siglip(_gap)?_256", r"vit_base_patch16_gap_224")


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name, tmp_path):
    model = small(name)
    said = card(model, tmp_path)
    loads = right_or_refused(model, config=said)
    assert loads or name not in (
        "vit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_distilled_patch16_224", "deit3_large_patch16_224",
        "flexivit_small", "test_vit", "vit_so400m_patch16_siglip_256", "vit_base_patch16_gap_224")
    if loads:  # the arrays alone: heads are given, for of two blocks there is no published model
        bare = small(name)
        assert not right_or_refused(bare)
        right_or_refused(small(name), num_heads=model.blocks[0].attn.num_heads)


@pytest.mark.parametrize("name", [name for name in NAMES if cards._architecture(name, "")])
def test_heads_that_are_guessed(name):
    """Of the whole depth, by shapes."""
    model = make(name)
    try:
        found = understand(model, gelu="erf")
    except FormatError:
        return
    assert found.model["num_heads"] == model.blocks[0].attn.num_heads and "num_heads" in found.doubts[0]
