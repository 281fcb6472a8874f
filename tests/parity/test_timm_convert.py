"""Through our forms and back to timm: the same state dict, the same logits, by the lines that are printed."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.models.vit import Model
from cb_vit.weights import open_weights
from cb_vit.weights.containers import write_npz
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.export import export

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from safetensors.torch import load_file, save_file  # noqa: E402

TOKENS = ("cls_token", "dist_token", "pos_embed")


def timm_model(name):
    """With random parameters, two blocks and images of 32 pixels."""
    model = timm.create_model(name, depth=2, img_size=32, num_classes=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def images():
    return np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(images())).numpy()


@pytest.mark.parametrize("via", ["x.safetensors", "x.npz", "x"])
@pytest.mark.parametrize("name", [
    "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_to_us_and_back_to_timm(tmp_path, monkeypatch, name, via):
    monkeypatch.chdir(tmp_path)
    model = timm_model(name)
    save_file(model.state_dict(), "timm.safetensors")
    torch.save({"model": model.state_dict(), "epoch": 1}, "deit.pth")
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    export(open_weights("deit.pth", "SRC", num_heads=model.blocks[0].attn.num_heads), via, normalisation=imagenet)
    given = {"gelu": "erf"} if via.endswith(".npz") else {}
    lines = export(open_weights(via, "SRC", **given), "back.safetensors")

    theirs, back = load_file("timm.safetensors"), load_file("back.safetensors")
    assert theirs.keys() == back.keys()
    for key in theirs:
        if key not in TOKENS:
            assert torch.equal(theirs[key], back[key]), key
    names = {}
    exec("\n".join(lines[lines.index("# In PyTorch:"):]), names)
    np.testing.assert_allclose(logits(names["model"].eval()), logits(model), atol=1e-5)


@pytest.mark.parametrize("context, at", [("cb", "mlp_end"), ("cb", "msa_end"), ("cb_s", "mlp_end")])
def test_context_by_the_lines_that_are_printed(tmp_path, monkeypatch, context, at):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    ours = Model(7, patch_size=16, width=48, depth=2, mlp_dim=96, num_heads=4, pool_type="tok", context=context,
                 context_at=at)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"])
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)
    write_npz("ours.npz", to_big_vision(params))
    lines = export(open_weights("ours.npz", "SRC", context=context, context_at=at), "x.safetensors")
    names = {}
    exec("\n".join(lines[lines.index("# In PyTorch:"):]), names)
    expected, _ = ours.apply({"params": params}, jnp.asarray(images().transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(logits(names["model"]), expected, atol=2e-5 * float(jnp.abs(expected).max()))
