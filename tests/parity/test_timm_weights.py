"""Weights to and from timm: the same numbers in both, and everything in a file told apart.

Every parameter is random, so that none can hide behind a one or a zero.
"""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.models.common import to_scan
from cb_vit.models.vit import Config, Model, resolve
from cb_vit.weights import containers
from cb_vit.weights.dialects.big_vision import to_big_vision
from cb_vit.weights.dialects.conversion import convert, describe
from cb_vit.weights.dialects.timm import arguments, snippet, to_timm

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

# The whole depth of one model of each family; elsewhere two blocks, which know all that twelve do.
NAMES = [("vit_tiny_patch16_224", None), ("deit_tiny_distilled_patch16_224", None), ("deit_small_patch16_224", None),
         ("deit3_small_patch16_224", None)] + [(name, 2) for name in (
             "vit_tiny_patch16_384", "vit_small_patch16_224", "vit_small_patch32_224", "vit_small_patch32_384",
             "vit_base_patch16_224", "vit_base_patch32_384", "deit_tiny_patch16_224", "deit_base_patch16_224",
             "deit_base_patch16_384", "deit_small_distilled_patch16_224", "deit_base_distilled_patch16_384",
             "deit3_small_patch16_384", "deit3_base_patch16_224", "vit_base_patch16_siglip_224",
             "vit_base_patch16_siglip_gap_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
             "vit_so150m_patch16_reg4_map_256")]


def randomise(model, seed=0):
    """All parameters random, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 1 / np.sqrt(p[0].numel()) if p.ndim in (2, 4) else 0.3
            p.copy_(noise * scale + (1 if "norm" in name and name.endswith("weight") or "gamma" in name else 0))
    return model.eval()


def images(size, b=2):
    return np.random.default_rng(size[0]).normal(size=(b, *size, 3)).astype(np.float32)


def torch_run(model, x):
    """Features and logits; class logits of both heads if distilled."""
    x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        features = model.forward_features(x)
        return features.numpy(), model.forward_head(features).numpy()


def our_run(model, params, x):
    if model.config.depth > 3:  # compiles in a tenth of the time
        model, params = model.clone(config=dataclasses.replace(model.config, scan=True)), to_scan(params)
    logits, out = jax.jit(model.apply)({"params": params}, jnp.asarray(x))
    return np.asarray(out["encoded"]), np.asarray(logits), out


def assert_close(found, expected):
    """1e-4 of the largest: float32 sums in another order."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def load(tensors, **kw):
    """Our model and parameters for a state dict, and what was understood."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    found = convert({name: containers.Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()},
                    path="state_dict", **kw)
    return Model(found.num_classes, **found.model), tree({k: t.read() for k, t in found.params.items()}), found


def tree(flat):
    root = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf)
    return root


@pytest.mark.parametrize("name, depth", NAMES)
def test_a_timm_model_here_and_back_again(name, depth):
    options = dict(num_classes=10) | ({} if depth is None else dict(depth=depth))
    theirs = randomise(timm.create_model(name, pretrained=False, **options))
    model, params, found = load(theirs.state_dict(), config=dict(architecture=name))
    size = tuple(found.grid[i] * found.model["patch_size"][i] for i in range(2))
    assert size == theirs.patch_embed.img_size and found.model["num_heads"] == theirs.blocks[0].attn.num_heads
    x = images(size, b=1 if size[0] > 300 else 2)
    expected = torch_run(theirs, x)
    features, logits, out = our_run(model, params, x)
    assert_close(features, expected[0])
    assert_close(logits, expected[1])
    if found.model["distilled"]:
        with torch.no_grad():
            encoded = torch.from_numpy(expected[0])
            assert_close(out["logits_cls"], theirs.head(encoded[:, 0]).numpy())
            assert_close(out["logits_dist"], theirs.head_dist(encoded[:, 1]).numpy())

    again = timm.create_model(name, pretrained=False, **options).eval()
    arrays = to_timm(params, resolve(Config(**found.model)), no_embed_class=theirs.no_embed_class)
    state = {k: torch.tensor(v) for k, v in arrays.items()}
    again.load_state_dict(state, strict=True)
    for mine, right in zip(torch_run(again, x), expected, strict=True):
        assert_close(mine, right)
    # What goes back in comes out the same, bit for bit: the positions of tokens are folded once and for all.
    _, params_again, _ = load(again.state_dict(), config=dict(architecture=name))
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_without_a_head(name):
    theirs = randomise(timm.create_model(name, pretrained=False, num_classes=0, depth=2))
    model, params, found = load(theirs.state_dict(), config=dict(architecture=name))
    x = images((224, 224))
    expected = torch_run(theirs, x)[0]
    features, pooled, _ = our_run(model, params, x)
    assert_close(features, expected)
    assert_close(pooled, expected[:, 0])
    assert found.num_classes is None


def test_images_that_are_no_squares_and_the_tanh_gelu():
    theirs = randomise(VisionTransformer(img_size=(32, 64), patch_size=(8, 16), embed_dim=48, depth=3, num_heads=4,
                                         mlp_ratio=3, num_classes=7, act_layer="gelu_tanh"))
    model, params, found = load(theirs.state_dict(), grid=(4, 4), num_heads=4, gelu="tanh", layer_norm_eps=1e-6)
    x = images((32, 64))
    _, logits, _ = our_run(model, params, x)
    assert_close(logits, torch_run(theirs, x)[1])
    assert found.model["patch_size"] == (8, 16) and found.model["mlp_dim"] == 144


def test_a_no_embed_class_model_without_layer_scale():
    theirs = randomise(VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7,
                                         no_embed_class=True))
    model, params, found = load(theirs.state_dict(), num_heads=4, grid=(4, 4))
    assert_close(our_run(model, params, images((32, 32)))[1], torch_run(theirs, images((32, 32)))[1])
    again = to_timm(params, resolve(Config(**found.model)), no_embed_class=True)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in again.items()}, strict=True)


SMALL = dict(patch_size=8, width=48, depth=3, mlp_dim=100, num_heads=4)
OURS = [dict(pool_type="tok", layer_norm_eps=1e-2), dict(pool_type="map", layer_norm_eps=1e-2),
        dict(pool_type="tok", gelu="erf"), dict(pool_type="tok", gelu="tanh"), dict(pool_type="gap", gelu="erf"),
        dict(pool_type="map", gelu="tanh"), dict(pool_type="none", gelu="erf"),
        dict(pool_type="gap", gelu="erf", posemb="sincos2d"), dict(pool_type="tok", gelu="erf", layer_scale=0.1),
        dict(pool_type="tok", gelu="erf", distilled=True), dict(pool_type="tok", distilled=True, layer_scale=0.1),
        dict(pool_type="tok", registers=4, layer_scale=0.1), dict(pool_type="tok", registers=1),
        dict(pool_type="gap", registers=2), dict(pool_type="map", registers=2), dict(pool_type="none", registers=2)]
CONTEXTS = [dict(pool_type="tok", gelu="erf"), dict(pool_type="gap", gelu="tanh"), dict(pool_type="tok", registers=2),
            dict(pool_type="tok", distilled=True), dict(pool_type="tok", layer_scale=0.1),
            dict(pool_type="tok", context_layers=(1,)),
            *(dict(pool_type="tok", gelu="erf", context_at=at) for at in ("mlp_front", "mlp_mid", "msa_end"))]
SCALED = [dict(pool_type="tok", gelu="erf"), dict(pool_type="gap", layer_scale=0.1),
          dict(pool_type="tok", context_layers=(0, 2))]
OURS += [kw | dict(context="cb") for kw in CONTEXTS] + [kw | dict(context="cb_s") for kw in SCALED]


def ours(x, kw):
    """A small model of ours for such images, and random parameters."""
    model, rng = Model(7, **SMALL, **kw), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))["params"]
    return model, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), shapes)


@pytest.mark.parametrize("kw", OURS, ids=str)
def test_our_model_in_timm_by_the_snippet_alone(kw, tmp_path):
    """What `snippet` prints is run as it stands; the file comes back as the model it was, bit for bit."""
    x, path, config = images((32, 48)), str(tmp_path / "model.safetensors"), resolve(Config(**SMALL, **kw))
    model, params = ours(x, kw)
    features, logits, _ = our_run(model, params, x)

    containers.write_safetensors(path, to_timm(params, config, grid=(4, 6)), describe(config))
    names = {}
    exec(snippet(config, 7, (32, 48), path), names)
    found = torch_run(names["model"], x)
    assert_close(found[0], features)
    assert_close(found[1], logits)

    file = containers.open_file(path)
    back = convert(containers.parameters(file), path=path, metadata=file.metadata, grid=(4, 6))
    again = tree({k: t.read() for k, t in back.params.items()})
    if config.posemb == "learn":
        jax.tree.map(np.testing.assert_array_equal, again, params)
    np.testing.assert_array_equal(our_run(Model(7, **back.model), again, x)[1], logits)


@pytest.mark.parametrize("pool_type, old", [("tok", False), ("gap", False), ("map", False), ("tok", True)])
def test_timm_reads_an_npz_as_we_do(pool_type, old, tmp_path):
    """big_vision's names as we write them, and AugReg's, through timm's own reader of those files."""
    x, kw, path = images((32, 32)), dict(pool_type=pool_type), str(tmp_path / "model.npz")
    model, params = ours(x, kw)
    arrays, options = to_big_vision(params), arguments(resolve(Config(**SMALL, **kw)), 7, (32, 32))
    if old:
        positions = "Transformer/posembed_input/pos_embedding"
        rename = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
                  "MlpBlock_0": "MlpBlock_3", "pos_embedding": positions, "params/": ""}
        arrays = {re.sub("|".join(rename), lambda m: rename[m[0]], name): array for name, array in arrays.items()}
        arrays[positions] = np.concatenate([np.full((1, 1, 48), 0.7, np.float32), arrays[positions]], 1)
    containers.write_npz(path, arrays)
    theirs = VisionTransformer(**options, no_embed_class=pool_type == "tok" and not old).eval()
    theirs.load_pretrained(path)
    found = convert(containers.parameters(containers.open_file(path)), path=path)
    assert found.format == ("augreg" if old else "big_vision")
    logits = our_run(Model(7, **found.model), tree({k: t.read() for k, t in found.params.items()}), x)[1]
    assert_close(logits, torch_run(theirs, x)[1])
    if not old:
        np.testing.assert_array_equal(logits, our_run(model, params, x)[1])


def test_the_line_that_adds_cb_to_a_timm_model():
    """As the README and the docstring of `dialects.timm` have it, on a model of timm's own."""
    theirs = randomise(timm.create_model("deit_tiny_patch16_224", pretrained=False, depth=3))
    plain, _, _ = load(theirs.state_dict(), num_heads=3)
    model, params, _ = load(theirs.state_dict(), num_heads=3, context="cb")
    x = images((224, 224))
    without = torch_run(theirs, x)[1]
    for b in theirs.blocks: b.mlp.register_forward_hook(lambda mlp, _, y: (y + y.mean(1, keepdim=True)) / 2)  # noqa: E701
    found = torch_run(theirs, x)[1]
    assert_close(our_run(plain, params, x)[1], without)
    assert_close(our_run(model, params, x)[1], found)
    assert np.abs(found - without).max() > 0.05 * np.abs(found).max()


@pytest.mark.parametrize("variant, mlp_dim", [("So400m/14", 4304), ("g/14", 6144)])
def test_timm_makes_our_odd_widths(variant, mlp_dim):
    config = resolve(Config(variant, depth=1, gelu="erf", pool_type="tok"))
    with torch.device("meta"):
        block = VisionTransformer(**arguments(config, 0, (28, 28)), weight_init="skip").blocks[0]
    assert block.mlp.fc1.out_features == mlp_dim and block.attn.num_heads == config.num_heads


def test_timms_distilled_class_is_the_one_named():
    config = resolve(Config(**SMALL, pool_type="tok", distilled=True))
    assert VisionTransformerDistilled.__name__ in snippet(config, 7, (32, 32), "x.safetensors")


@pytest.mark.parametrize("options, match", [
    (dict(global_pool="avg"), "before the last norm"), (dict(reg_tokens=4, qk_norm=True), "norms on queries and keys"),
    (dict(qkv_bias=False), "lacks 'blocks.0.attn.qkv.bias'"), (dict(qk_norm=True), "norms on queries and keys"),
    (dict(pre_norm=True), "CLIP"), (dict(class_token=False, global_pool="avg"), "before the last norm")])
def test_timm_models_that_are_none_of_ours(options, match):
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=7, **options)
    with pytest.raises(containers.FormatError, match=match):
        load(theirs.state_dict(), num_heads=1)
