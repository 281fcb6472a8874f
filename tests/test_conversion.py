"""Weights of other codebases: what their names and shapes mean, against arrays worked out by hand."""
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    CLASSES,
    DEPTH,
    GRID,
    D,
    F,
    H,
    P,
    dinov2_shapes,
    flax_shapes,
    hf_shapes,
    random,
    siglip_shapes,
    timm_shapes,
)
from scipy.special import erf

from cb_vit.config import ConfigError
from cb_vit.models.vit import Config, Model, resolve
from cb_vit.pp.normalisation import Normalisation
from cb_vit.tree import flatten_with_names, unflatten_names
from cb_vit.weights import containers
from cb_vit.weights.containers import FormatError, Tensor
from cb_vit.weights.dialects import big_vision, huggingface, timm
from cb_vit.weights.dialects.conversion import convert, describe

SIZES = dict(patch_size=P, width=D, depth=DEPTH, mlp_dim=F, num_heads=H)


def tensors(arrays):
    return {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def understand(arrays, **kw):
    return convert(tensors(arrays), path="file", **kw)


def read(converted):
    return {name: tensor.read() for name, tensor in converted.params.items()}


def ours(seed=0, num_classes=CLASSES, grid=(GRID, GRID), **kw):
    """Random parameters of a model of ours by name, and its config."""
    config = resolve(Config(**SIZES | kw))
    model, image = Model(num_classes, **SIZES | kw), jnp.zeros((1, grid[0] * P, grid[1] * P, 3))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), image)["params"])
    return random({name: leaf.shape for name, leaf in flatten_with_names(tree)[0]}, seed), config


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


AUGREG = dict(attention="MultiHeadDotProductAttention_1", norm="LayerNorm_2", mlp="MlpBlock_3")
EPSILON = 1e-2  # of the norms in references; as large as it must be to be seen
POSITIONS = {"pos_embedding": (1, GRID**2, D)}


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON) * scale + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x, kind):
    if kind == "erf":
        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def torch_reference(get, images, layers, tokens, heads=H, kind="erf", gamma=lambda j, i: 1):
    """The tokens that a ViT with PyTorch's layout ends with, in float64; `get(role, i)` gives weight and bias."""
    weight, bias = get("patch")
    b, height, width, _ = images.shape
    patches = images.reshape(b, height // P, P, width // P, P, 3)
    x = np.einsum("bypxqc,dcpq->byxd", patches, weight).reshape(b, -1, len(bias)) + bias
    x = np.concatenate([np.repeat(t, b, 0) for t in tokens] + [x], 1) + get("positions")
    for i in range(layers):
        y = layer_norm(x, *get("norm1", i))
        split = lambda z: z.reshape(b, -1, heads, z.shape[-1] // heads)  # noqa: E731
        q, k, v = (split(y @ w.T + c) for w, c in (get(part, i) for part in "qkv"))
        p = softmax(np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1]))
        w, c = get("proj", i)
        x = x + gamma(1, i) * (np.einsum("bhnm,bmhk->bnhk", p, v).reshape(x.shape) @ w.T + c)
        (w1, c1), (w2, c2) = get("fc1", i), get("fc2", i)
        x = x + gamma(2, i) * (gelu(layer_norm(x, *get("norm2", i)) @ w1.T + c1, kind) @ w2.T + c2)
    return layer_norm(x, *get("norm"))


IMAGES = np.random.default_rng(7).normal(size=(2, GRID * P, GRID * P, 3)).astype(np.float32)


def run(converted, images=IMAGES):
    model = Model(converted.num_classes, **converted.model)
    params = jax.tree.map(jnp.asarray, unflatten_names(read(converted)))
    logits, out = jax.jit(model.apply)({"params": params}, jnp.asarray(images))
    return np.asarray(logits), out


HF_ROLES = {"norm1": "layernorm_before", "q": "attention.attention.query", "k": "attention.attention.key",
            "v": "attention.attention.value", "proj": "attention.output.dense", "norm2": "layernorm_after",
            "fc1": "intermediate.dense", "fc2": "output.dense"}


def hf_getter(arrays, prefix):
    def get(role, i=None):
        if role == "positions":
            return arrays[f"{prefix}embeddings.position_embeddings"]
        name = {"patch": "embeddings.patch_embeddings.projection", "norm": "layernorm"}.get(role)
        name = prefix + (name or f"encoder.layer.{i}.{HF_ROLES[role]}")
        return arrays[f"{name}.weight"], arrays[f"{name}.bias"]
    return get


@pytest.mark.parametrize("activation, kind", [("gelu", "erf"), ("gelu_new", "tanh")])
def test_huggingface_vit_computes_what_its_layers_say(activation, kind):
    arrays = random(hf_shapes())
    found = understand(arrays, config={"num_attention_heads": H, "hidden_act": activation, "layer_norm_eps": EPSILON})
    tokens = torch_reference(hf_getter(arrays, "vit."), IMAGES, DEPTH, [arrays["vit.embeddings.cls_token"]], kind=kind)
    logits = tokens[:, 0] @ arrays["classifier.weight"].T + arrays["classifier.bias"]
    np.testing.assert_allclose(run(found)[0], logits, rtol=1e-4, atol=1e-5)
    assert found.format == "huggingface" and found.model["gelu"] == kind and found.num_classes == CLASSES
    assert found.normalisation is None and any("normalised is not known" in note for note in found.notes)
    assert found.model["layer_norm_eps"] == EPSILON and found.doubts == ()
    assert understand(arrays, config={"num_attention_heads": H}).model["layer_norm_eps"] == 1e-12


def test_huggingface_distilled_deit_computes_what_its_layers_say():
    arrays = random(hf_shapes("deit.", distilled=True))
    found = understand(arrays, num_heads=H, layer_norm_eps=EPSILON)
    cls = [arrays["deit.embeddings.cls_token"], arrays["deit.embeddings.distillation_token"]]
    tokens = torch_reference(hf_getter(arrays, "deit."), IMAGES, DEPTH, cls)
    heads = [tokens[:, i] @ arrays[f"{name}_classifier.weight"].T + arrays[f"{name}_classifier.bias"]
             for i, name in enumerate(("cls", "distillation"))]
    logits, out = run(found)
    np.testing.assert_allclose(out["logits_cls"], heads[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["logits_dist"], heads[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, sum(heads) / 2, rtol=1e-4, atol=1e-5)
    assert found.normalisation[0][0] == 0.485 and "normalisation=((0.485, " in found.doubts[0]


def test_huggingface_pooler_is_pre_logits():
    arrays = random(hf_shapes("", head=False, **{"pooler.dense.weight": (D, D), "pooler.dense.bias": (D,)}))
    found = understand(arrays, num_heads=H, layer_norm_eps=EPSILON)
    tokens = torch_reference(hf_getter(arrays, ""), IMAGES, DEPTH, [arrays["embeddings.cls_token"]])
    expected = np.tanh(tokens[:, 0] @ arrays["pooler.dense.weight"].T + arrays["pooler.dense.bias"])
    np.testing.assert_allclose(run(found)[0], expected, rtol=1e-4, atol=1e-5)
    assert found.num_classes is None and found.model["rep_size"] == D
    assert understand(arrays, num_heads=H, layer_norm_eps=EPSILON, rep_size=True).model == found.model


def getter(arrays, layer, roles, positions):
    """Weight and bias by role, where the roles of a layer are called `roles` and those of the model as they are."""
    def get(role, i=None):
        if role == "positions":
            return positions
        name = roles[role] if i is None else f"{layer}.{i}.{roles[role]}"
        return arrays[f"{name}.weight"], arrays[f"{name}.bias"]
    return get


DINOV2_ROLES = HF_ROLES | {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm": "layernorm",
                           "patch": "embeddings.patch_embeddings.projection"}
SIGLIP_ROLES = {"norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
                "v": "self_attn.v_proj", "proj": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
                "norm": "post_layernorm", "patch": "embeddings.patch_embedding"}


def test_huggingface_dinov2_computes_what_its_layers_say():
    registers, arrays = 2, random(dinov2_shapes(2))
    config = {"model_type": "dinov2_with_registers", "num_attention_heads": H, "layer_norm_eps": EPSILON,
              "image_size": GRID * P, "num_register_tokens": registers}
    found = understand(arrays, config=config)
    positions = arrays["embeddings.position_embeddings"]
    positions = np.concatenate([positions[:, :1], np.zeros((1, registers, D)), positions[:, 1:]], 1)
    tokens = [arrays["embeddings.cls_token"], arrays["embeddings.register_tokens"]]
    expected = torch_reference(
        getter(arrays, "encoder.layer", DINOV2_ROLES, positions), IMAGES, DEPTH, tokens,
        gamma=lambda j, i: arrays[f"encoder.layer.{i}.layer_scale{j}.lambda1"])
    pooled, out = run(found)
    np.testing.assert_allclose(out["encoded"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled, expected[:, 0], rtol=1e-4, atol=1e-5)
    assert found.format == "huggingface" and found.num_classes is None and found.grid == (GRID, GRID)
    assert found.model["registers"] == registers and found.normalisation[0][0] == 0.485
    assert any("'embeddings.mask_token' is left in the file" in note for note in found.notes)
    del arrays["embeddings.register_tokens"]
    for card in ({}, {"model_type": "dinov2"}):
        bare = understand(arrays, num_heads=H, config=card).model
        assert (bare["layer_norm_eps"], bare["gelu"], bare["pool_type"]) == (1e-6, "erf", "tok")
        assert not bare.get("registers")


def test_huggingface_siglip_computes_what_its_layers_say():
    arrays = random(siglip_shapes())
    tower = {"model_type": "siglip_vision_model", "num_attention_heads": H, "layer_norm_eps": EPSILON}
    found = understand(arrays, config={"model_type": "siglip", "text_config": {}, "vision_config": tower})
    x = torch_reference(getter(arrays, "encoder.layers", SIGLIP_ROLES, arrays["embeddings.position_embedding.weight"]),
                        IMAGES, DEPTH, [], kind="tanh")
    wq, wk, wv = np.split(arrays["head.attention.in_proj_weight"], 3)
    cq, ck, cv = np.split(arrays["head.attention.in_proj_bias"], 3)
    split = lambda z: z.reshape(*z.shape[:-1], H, -1)  # noqa: E731
    q, k, v = split(arrays["head.probe"][0] @ wq.T + cq), split(x @ wk.T + ck), split(x @ wv.T + cv)
    p = softmax(np.einsum("nhk,bmhk->bhnm", q, k) / np.sqrt(D // H))
    head = {name: f"head.{name}" for name in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")}
    get = getter(arrays, "", head, None)
    (w, c), (w1, c1), (w2, c2) = get("attention.out_proj"), get("mlp.fc1"), get("mlp.fc2")
    y = np.einsum("bhnm,bmhk->bnhk", p, v).reshape(len(x), D) @ w.T + c
    y = y + gelu(layer_norm(y, *get("layernorm")) @ w1.T + c1, "tanh") @ w2.T + c2
    np.testing.assert_allclose(run(found)[0], y, rtol=1e-4, atol=1e-5)
    assert found.model["pool_type"] == "map" and found.model["gelu"] == "tanh" and found.grid == (GRID, GRID)
    assert found.normalisation == ((0.5,) * 3, (0.5,) * 3)

    for card in ({}, {"model_type": "siglip"}, {"vision_config": {"model_type": "siglip_vision_model"}}):
        old = understand({f"vision_model.{name}": array for name, array in arrays.items()}, num_heads=H, config=card)
        assert old.model["layer_norm_eps"] == 1e-6 and old.model["gelu"] == "tanh"
    assert_same(read(old), read(found))
    towers = {f"vision_model.{name}": array for name, array in arrays.items()} | random({
        "text_model.embeddings.token_embedding.weight": (9, D), "text_model.encoder.layers.0.layer_norm1.weight": (D,),
        "logit_scale": (1,)})
    with pytest.raises(FormatError, match="a CLIP, or another pair .* a ViT is in 'vision_model': choose with prefix"):
        understand(towers, num_heads=H)
    part = understand(towers, num_heads=H, prefix="vision_model")
    assert_same(read(part), read(found))
    assert any(f"3 of the file's {len(towers)} arrays are not under 'vision_model'" in note for note in part.notes)


def test_siglip_without_its_head_or_under_a_classifier():
    assert understand(random(siglip_shapes(head=False)), num_heads=H).model["pool_type"] == "none"
    classifier = {"classifier.weight": (CLASSES, D), "classifier.bias": (CLASSES,)}
    arrays = {name if "classifier" in name else f"vision_model.{name}": array
              for name, array in random(siglip_shapes(**classifier)).items()}
    found = understand(arrays, num_heads=H)
    assert found.model["pool_type"] == "gap" and found.num_classes == CLASSES
    assert not any("MAPHead" in name for name in found.params)
    assert any("attention pooling is left in the file: the classifier reads the mean" in note for note in found.notes)


def test_heads_of_published_siglips_are_known():
    wide = lambda shapes, depth, width, mlp: {  # noqa: E731
        name.replace(".0.", f".{i}."): np.broadcast_to(np.float32(0), tuple(
            {D: width, 3 * D: 3 * width, F: mlp, 3: 3, P: P}.get(size, size) for size in shape))
        for name, shape in shapes.items() for i in (range(depth) if ".0." in name else [0]) if ".1." not in name}
    found = understand(wide(siglip_shapes(), 12, 768, 3072))
    assert found.model["num_heads"] == 12 and found.doubts[0].startswith("num_heads=12, ")
    with pytest.raises(FormatError, match="says num_heads; give num_heads"):
        understand(wide(siglip_shapes(), 11, 768, 3072))


@pytest.mark.parametrize("shapes, config, match", [
    (dinov2_shapes(2), dict(model_type="dinov2"), "says registers=0, but the file has 2"),
    (dinov2_shapes(2), dict(model_type="dinov2_with_registers"), "says registers=4, but the file has 2"),
    (dinov2_shapes(), dict(model_type="dinov2_with_registers"), "lacks 'embeddings.register_tokens'"),
    (dinov2_shapes(), dict(model_type="vit"), "model_type='vit', which is not supported with.*; .* 'dinov2'"),
    (dinov2_shapes(), dict(use_swiglu_ffn=True), "use_swiglu_ffn=True, which is not supported; supported is False"),
    (dinov2_shapes(), dict(num_register_tokens="4"), "num_register_tokens='4', which cannot be"),
    (siglip_shapes(), dict(model_type="siglip2"), "model_type='siglip2', which is not supported with these arrays"),
    (siglip_shapes(), dict(vision_config=dict(model_type="siglip2_vision_model")), "model_type='siglip2_vision_model'"),
    (siglip_shapes(), dict(vision_config=[3]), r"vision_config=\[3\], which should be keys and values"),
    (siglip_shapes(), dict(vision_config=dict(hidden_size=64)), "says width=64, but the file has 32"),
    (hf_shapes(), dict(model_type="dinov2"), "model_type='dinov2', which is not supported with these arrays")], ids=str)
def test_what_huggingfaces_config_json_says_is_right_or_refused(shapes, config, match):
    with pytest.raises(FormatError, match=f"^file: .*{match}"):
        understand(random(shapes), config={"num_attention_heads": H} | config, num_heads=H)


def test_registers_of_timm_with_positions_and_without():
    for entries in (0, 3):
        arrays = random(timm_shapes(entries=entries, reg_token=(1, 2, D)))
        found = understand(arrays, num_heads=H, grid=(GRID, GRID))
        params, positions = read(found), arrays["pos_embed"]
        assert found.model["registers"] == 2 and found.format == "timm"
        np.testing.assert_array_equal(params["pos_embedding"], positions[:, entries:])
        np.testing.assert_array_equal(params["cls"], arrays["cls_token"] + (positions[:, :1] if entries else 0))
        np.testing.assert_array_equal(params["reg"], arrays["reg_token"] + (positions[:, 1:3] if entries else 0))
    with pytest.raises(FormatError, match="9 positions are those of 3×3 patches, or of 6 and the tokens before them"):
        understand(random(timm_shapes(entries=0, reg_token=(1, 2, D))), num_heads=H)
    card = dict(model_args=dict(num_heads=H, reg_tokens=4))
    with pytest.raises(FormatError, match="says registers=4, but the file has 2"):
        understand(random(timm_shapes(entries=0, reg_token=(1, 2, D))), config=card)


def test_dinov2s_own_files():
    scales = {f"blocks.{i}.ls{j}.gamma": (D,) for i in range(DEPTH) for j in (1, 2)}
    arrays = random(timm_shapes(mask_token=(1, D), register_tokens=(1, 4, D), **scales))
    arrays = {name: array for name, array in arrays.items() if not name.startswith("head")}
    found = understand(arrays, num_heads=H)
    params = read(found)
    np.testing.assert_array_equal(params["cls"], arrays["cls_token"] + arrays["pos_embed"][:, :1])
    np.testing.assert_array_equal(params["reg"], arrays["register_tokens"])  # without positions
    assert found.format == "dinov2" and found.model["registers"] == 4 and found.num_classes is None
    assert any("'mask_token' is left in the file" in note for note in found.notes)
    chunks = {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): array for name, array in arrays.items()}
    assert_same(read(understand(chunks, num_heads=H)), params)
    with pytest.raises(FormatError, match="'blocks.0.norm1.weight' is in it twice"):
        understand(chunks | {"blocks.1.0.norm1.weight": arrays["blocks.0.norm1.weight"]}, num_heads=H)
    other = arrays | {"register_tokens": arrays["cls_token"]}  # TIPS has one, and pixels from 0 to 1
    assert understand(other, num_heads=H).normalisation is None and found.normalisation[0][0] == 0.485
    del arrays["register_tokens"]
    none = understand(arrays, num_heads=H)
    assert none.format == "dinov2" and "registers" not in none.model and none.normalisation[0][0] == 0.485


def test_what_config_json_says():
    arrays = random(hf_shapes() | {"vit.embeddings.position_embeddings": (1, 2 * 6 + 1, D)})
    config = {"num_attention_heads": 8, "image_size": [2 * P, 6 * P], "patch_size": P, "layer_norm_eps": 1e-6,
              "id2label": {"1": "cat", "0": "ant", "4": "dog", "2": "bee", "3": "cow"}, "image_mean": [0.5] * 3,
              "image_std": [0.25] * 3}
    found = understand(arrays, config=config | {"hidden_act": "gelu"}, context="none")
    assert found.grid == (2, 6) and found.model["num_heads"] == 8
    assert found.class_names == ("ant", "cat", "bee", "cow", "dog")
    assert found.normalisation == ((0.5,) * 3, (0.25,) * 3)
    assert found.doubts == () and found.model["layer_norm_eps"] == 1e-6
    for labels in ({"0": "LABEL_0"}, {"0": "ant", "1": "cat"}, {"0": "ant", "9": "cat"}, ["ant"], "ant", {"0": 3}):
        assert understand(arrays, config=config | {"id2label": labels}).class_names is None
    found = understand(arrays, config=config, num_heads=2)
    assert found.model["num_heads"] == 2
    assert found.doubts == ("num_heads=2 as asked for, where its config.json says 8",)
    with pytest.raises(FormatError, match="hidden_act='quick_gelu', which is not supported; .*'gelu_new'"):
        understand(arrays, config=config | {"hidden_act": "quick_gelu"})


def by_hand(arrays, i, heads=H):
    """A timm block under our names, written out with einsum."""
    name, e, k = f"blocks.{i}.", np.eye(D, dtype=np.float32), D // heads
    block, attention = f"Transformer/encoderblock_{i}/", f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/"
    split = e.reshape(heads, k, D)  # [h k d]: where head and channel lie in the width
    found = {}
    for j, part in enumerate(("query", "key", "value")):
        rows = slice(j * D, (j + 1) * D)
        found[f"{attention}{part}/kernel"] = np.einsum("hko,od->dhk", split, arrays[name + "attn.qkv.weight"][rows])
        found[f"{attention}{part}/bias"] = np.einsum("hko,o->hk", split, arrays[name + "attn.qkv.bias"][rows])
    found[f"{attention}out/kernel"] = np.einsum("hki,di->hkd", split, arrays[name + "attn.proj.weight"])
    found[f"{attention}out/bias"] = arrays[name + "attn.proj.bias"]
    for j in (0, 1):
        found[f"{block}LayerNorm_{j}/scale"] = arrays[f"{name}norm{j + 1}.weight"]
        found[f"{block}LayerNorm_{j}/bias"] = arrays[f"{name}norm{j + 1}.bias"]
        found[f"{block}MlpBlock_0/Dense_{j}/kernel"] = np.einsum("oi->io", arrays[f"{name}mlp.fc{j + 1}.weight"])
        found[f"{block}MlpBlock_0/Dense_{j}/bias"] = arrays[f"{name}mlp.fc{j + 1}.bias"]
    return found


@pytest.mark.parametrize("tokens, entries", [(1, 1), (1, 0), (2, 2)])
def test_timm_by_hand(tokens, entries):
    arrays = random(timm_shapes(tokens, entries=entries))
    found = understand(arrays, num_heads=H, **{} if entries else {"grid": (GRID, GRID)})
    positions = arrays["pos_embed"]
    expected = {
        "embedding/kernel": np.einsum("dcyx->yxcd", arrays["patch_embed.proj.weight"]),
        "embedding/bias": arrays["patch_embed.proj.bias"], "pos_embedding": positions[:, entries:],
        "Transformer/encoder_norm/scale": arrays["norm.weight"], "Transformer/encoder_norm/bias": arrays["norm.bias"],
        "head/kernel": arrays["head.weight"].T, "head/bias": arrays["head.bias"]}
    for i, (token, name) in enumerate((("cls_token", "cls"), ("dist_token", "dist"))[:tokens]):
        expected[name] = arrays[token] + (positions[:, i:i + 1] if entries else 0)
    if tokens == 2:
        expected |= {"head_dist/kernel": arrays["head_dist.weight"].T, "head_dist/bias": arrays["head_dist.bias"]}
    assert_same(read(found), expected | by_hand(arrays, 0) | by_hand(arrays, 1))
    assert found.format == "timm" and found.grid == (GRID, GRID) and found.num_classes == CLASSES
    assert found.model == dict(SIZES, patch_size=(P, P), pool_type="tok", gelu="erf", layer_norm_eps=1e-6,
                               posemb="learn", context="none", distilled=tokens == 2)
    assert any("context='none' assumed: parameters do not show it" in note for note in found.notes)
    guessed = ["layer_norm_eps=1e-06", "gelu='erf'"] + ["pool_type='tok'"] * (tokens == 1)
    guessed += ["grid=(3, 3)"] * (tokens == 1 == entries)
    guessed += ["normalisation=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"] * (tokens == 2)
    assert found.doubts == (
        f"{', '.join(guessed)} assumed, as all published models of this kind have it; the file does not say",)
    assert any("added to the tokens" in note for note in found.notes) == bool(entries)


def test_deit_3s_own_names():
    scales = {f"blocks.{i}.gamma_{j}": (D,) for i in range(DEPTH) for j in (1, 2)}
    arrays = random(timm_shapes(entries=0, **scales))
    with pytest.raises(FormatError, match="says posemb; give posemb='learn' or whatever is right"):
        understand(arrays, num_heads=H)  # RoPE-ViT's files look the same
    found = understand(arrays, num_heads=H, posemb="learn")
    params = read(found)
    for i in range(DEPTH):
        for j in (1, 2):
            np.testing.assert_array_equal(params[f"Transformer/encoderblock_{i}/LayerScale_{j - 1}/gamma"],
                                          arrays[f"blocks.{i}.gamma_{j}"])
    assert found.format == "deit" and found.model["layer_scale"] == 1e-4 and found.normalisation[1][2] == 0.225
    renamed = {re.sub(r"gamma_(\d)", r"ls\1.gamma", name): array for name, array in arrays.items()}
    assert understand(renamed, num_heads=H).format == "timm"
    assert_same(read(understand(renamed, num_heads=H)), params)


def test_timms_variants_of_a_file():
    arrays = random(timm_shapes())
    plain = read(understand(arrays, num_heads=H))
    old = arrays | {"patch_embed.proj.weight": arrays["patch_embed.proj.weight"].reshape(D, -1)}
    assert_same(read(understand(old, num_heads=H)), plain)
    wrapped = understand({f"module.{name}": array for name, array in arrays.items()}, num_heads=H)
    assert_same(read(wrapped), plain)
    assert any("module." in note for note in wrapped.notes)
    headless = {name: array for name, array in arrays.items() if not name.startswith("head")}
    assert understand(headless, num_heads=H).num_classes is None
    logits = arrays | random({"pre_logits.fc.weight": (D, D), "pre_logits.fc.bias": (D,)})
    found = understand(logits, num_heads=H)
    assert found.model["rep_size"] == D
    np.testing.assert_array_equal(read(found)["pre_logits/kernel"], logits["pre_logits.fc.weight"].T)
    config = {"model_args": {"act_layer": "gelu_tanh", "num_heads": 8}, "pretrained_cfg": {"mean": [1], "std": [2]}}
    found = understand(arrays, config=config)
    assert (found.model["gelu"], found.model["num_heads"], found.normalisation) == ("tanh", 8, ((1.0,) * 3, (2.0,) * 3))


def test_heads_that_a_file_does_not_tell():
    shapes = lambda width: {  # noqa: E731
        name: tuple(width * size // D if size % D == 0 else size for size in shape)
        for name, shape in timm_shapes(depth=1).items()}
    for width in (32, 64, 96, 192, 1280):  # none of them is published with one block
        with pytest.raises(FormatError, match=f"says num_heads; give num_heads={max(1, width // 64)} or whatever is r"):
            understand({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes(width).items()})
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in timm_shapes(depth=12).items()}
    widen = lambda shape: tuple({D: 192, 3 * D: 576, F: 768}.get(size, size) for size in shape)  # noqa: E731
    arrays = {name: np.broadcast_to(np.float32(0), widen(array.shape)) for name, array in arrays.items()}
    found = understand(arrays)
    assert found.model["num_heads"] == 3 and found.doubts[0].startswith("num_heads=3, ")
    del arrays["cls_token"]
    with pytest.raises(FormatError, match="give num_heads"):  # SigLIP's width of 768 has 12 heads, or 16
        understand(arrays, gelu="erf", grid=(2, 5))
    with pytest.raises(FormatError, match="num_heads=7 does not divide the width of the file, 32"):
        understand(random(timm_shapes()), num_heads=7)


@pytest.mark.parametrize("tokens", [0, 1])
def test_augreg_by_hand(tokens):
    positions = {"Transformer/posembed_input/pos_embedding": (1, GRID**2 + tokens, D)}
    arrays = random(flax_shapes(**AUGREG, **positions, **{"pre_logits/kernel": (D, 6), "pre_logits/bias": (6,)}) |
                    {"head/kernel": (6, CLASSES)} | ({"cls": (1, 1, D)} if tokens else {}))
    found = understand(arrays)
    whole = arrays["Transformer/posembed_input/pos_embedding"]
    new = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1",
           "MlpBlock_3": "MlpBlock_0"}
    expected = {}
    for name, array in arrays.items():
        parts = [new.get(part, part) for part in name.split("/")]
        expected["/".join(parts)] = array
    del expected["Transformer/posembed_input/pos_embedding"]
    expected["pos_embedding"] = whole[:, tokens:]
    if tokens:
        expected["cls"] = arrays["cls"] + whole[:, :1]
    assert_same(read(found), expected)
    assert found.format == "augreg" and found.normalisation == ((0.5,) * 3, (0.5,) * 3)
    assert found.model == dict(SIZES, patch_size=(P, P), pool_type="tok" if tokens else "gap", rep_size=6, gelu="tanh",
                               layer_norm_eps=1e-6, posemb="learn", context="none", distilled=False)
    assert found.doubts == () if tokens else found.doubts[0].startswith("pool_type='gap' assumed")


def test_big_vision_is_ours_already(tmp_path):
    attention = {f"MAPHead_0/MultiHeadDotProductAttention_0/{part}/kernel": (D, H, D // H)
                 for part in ("query", "key", "value")}
    attention |= {name.replace("kernel", "bias"): (H, D // H) for name in attention}
    pool = {"MAPHead_0/probe": (1, 1, D), **attention, "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": (
        H, D // H, D), "MAPHead_0/MultiHeadDotProductAttention_0/out/bias": (D,), "MAPHead_0/LayerNorm_0/scale": (D,),
        "MAPHead_0/LayerNorm_0/bias": (D,), "MAPHead_0/MlpBlock_0/Dense_0/kernel": (D, F),
        "MAPHead_0/MlpBlock_0/Dense_0/bias": (F,), "MAPHead_0/MlpBlock_0/Dense_1/kernel": (F, D),
        "MAPHead_0/MlpBlock_0/Dense_1/bias": (D,)}
    arrays = random(flax_shapes(**POSITIONS, **pool))
    found = understand(arrays)
    assert_same(read(found), arrays)
    assert found.format == "big_vision" and found.model["pool_type"] == "map" and found.model["num_heads"] == H

    path = tmp_path / "two_towers.npz"
    image = {f"params/img/{name}": array for name, array in arrays.items()}
    containers.write_npz(path, image | {"params/t": np.zeros(1, np.float32)})
    assert_same(read(convert(containers.parameters(containers.open_file(path)), prefix="img", path=str(path))), arrays)


def test_scanned_blocks_are_taken_apart_and_read_once():
    arrays = random(flax_shapes(**POSITIONS))
    block = re.compile(r"Transformer/encoderblock_\d+/(.*)")
    scanned = {k: v for k, v in arrays.items() if not block.match(k)}
    names = {match[1] for match in map(block.match, arrays) if match}
    scanned |= {f"Transformer/encoderblock/{name}": np.stack(
        [arrays[f"Transformer/encoderblock_{i}/{name}"] for i in range(DEPTH)]) for name in names}
    reads = []
    counted = {name: Tensor(a.shape, a.dtype, lambda a=a, name=name: (reads.append(name), a)[1])
               for name, a in scanned.items()}
    found = convert(counted, path="file")
    assert not reads  # shapes are enough to understand a file
    assert_same(read(found), arrays)
    assert sorted(reads) == sorted(scanned)
    assert_same(read(found), arrays)
    assert found.model["depth"] == DEPTH and any("taken apart" in note for note in found.notes)
    del scanned["Transformer/encoderblock/LayerNorm_0/bias"]
    with pytest.raises(FormatError, match="lacks 'Transformer/encoderblock_0/LayerNorm_0/bias'"):
        understand(scanned)
    with pytest.raises(FormatError, match=r"hold \[\(2,\), \(3,\)\] blocks"):
        understand(scanned | {"Transformer/encoderblock/LayerNorm_0/bias": np.zeros((3, D), np.float32)})
    with pytest.raises(FormatError, match=r"hold \[\(1000000000,\)\] blocks"):
        understand({"Transformer/encoderblock/LayerNorm_0/scale": np.zeros((10**9, 0), np.float32)})


def test_bfloat16_is_read_as_float32():
    arrays = random(flax_shapes(**POSITIONS))
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    found = understand(half)
    assert_same(read(found), {name: array.astype(np.float32) for name, array in half.items()})
    assert {tensor.dtype for tensor in found.params.values()} == {np.dtype(np.float32)}
    assert any("bfloat16" in note for note in found.notes)


def test_a_fixed_position_embedding():
    found = understand(random(flax_shapes()))
    assert found.model["posemb"] == "sincos2d" and found.grid is None
    assert understand(random(flax_shapes()), grid=(2, 4)).grid == (2, 4)


@pytest.mark.parametrize("shapes", [lambda: without(timm_shapes(), "pos_embed"), lambda: flax_shapes(**AUGREG),
                                    lambda: without(hf_shapes(), "vit.embeddings.position_embeddings")])
def test_without_a_position_embedding_it_is_no_fixed_one_unless_asked_for(shapes):
    with pytest.raises(FormatError, match="no position embedding; rotary .* are to be asked for: posemb='sincos2d'"):
        understand(random(shapes()), num_heads=H)
    assert understand(random(shapes()), num_heads=H, posemb="sincos2d").model["posemb"] == "sincos2d"


MODELS = [
    dict(pool_type="tok", gelu="erf"), dict(pool_type="tok", layer_norm_eps=1e-3),
    dict(pool_type="tok", gelu="erf", distilled=True),
    dict(pool_type="tok", gelu="erf", layer_scale=1e-4), dict(pool_type="gap", gelu="tanh"),
    dict(pool_type="map", gelu="erf"), dict(pool_type="none", gelu="erf"),
    dict(pool_type="tok", context="cb", context_at="msa_end", context_layers=(1,)),
    dict(pool_type="tok", context="cb_s", layer_scale=1e-4, distilled=True),
    dict(pool_type="gap", context="cb_s", context_layers=(0,)),
    dict(pool_type="tok", layer_scale=1e-4, registers=4), dict(pool_type="map", layer_scale=1e-4, registers=1)]
SEEN = ("patch_size", "width", "depth", "mlp_dim", "num_heads", "gelu", "pool_type", "distilled", "layer_scale",
        "layer_norm_eps", "context", "context_at", "context_layers", "posemb", "rep_size", "registers")


def assert_same_model(found, config):
    config_found = resolve(Config(**found.model))
    assert {name: getattr(config_found, name) for name in SEEN} == {name: getattr(config, name) for name in SEEN}


@pytest.mark.parametrize("kw", MODELS)
@pytest.mark.parametrize("tree", [False, True])
def test_to_timm_and_back_is_the_same_bits(kw, tree, tmp_path):
    params, config = ours(**kw)
    path, statistics = tmp_path / "model.safetensors", Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    containers.write_safetensors(path, timm.to_timm(unflatten_names(params) if tree else params, config),
                              describe(config, statistics))
    file = containers.open_file(path)
    found = convert(containers.parameters(file), path=str(path), metadata=file.metadata)
    assert_same(read(found), params)
    assert_same_model(found, config)
    assert found.normalisation == statistics and found.num_classes == CLASSES
    assert not any("assumed" in note for note in found.notes)


def test_positions_in_a_timm_file():
    for kw, entries in ((dict(), 1), (dict(distilled=True), 2), (dict(layer_scale=1e-4), 0),
                        (dict(layer_scale=1e-4, distilled=True), 2), (dict(pool_type="gap"), 0)):
        params, config = ours(**{"pool_type": "tok", **kw})
        positions = timm.to_timm(params, config)["pos_embed"]
        np.testing.assert_array_equal(positions[:, :entries], 0)
        np.testing.assert_array_equal(positions[:, entries:], params["pos_embedding"])
    params, config = ours(pool_type="tok")
    assert timm.to_timm(params, config, no_embed_class=True)["pos_embed"].shape == (1, GRID**2, D)
    params, config = ours(pool_type="tok", distilled=True)
    with pytest.raises(ConfigError, match="no_embed_class"):
        timm.to_timm(params, config, no_embed_class=True)


def test_a_fixed_position_embedding_is_written_out():
    params, config = ours(pool_type="gap", posemb="sincos2d")
    with pytest.raises(ConfigError, match="^grid: .*rows, columns"):
        timm.to_timm(params, config)
    found = understand(timm.to_timm(params, config, grid=(2, 3)), num_heads=H, grid=(2, 3), gelu="tanh")
    images = np.random.default_rng(0).normal(size=(2, 2 * P, 3 * P, 3)).astype(np.float32)
    expected, _ = Model(CLASSES, **SIZES, pool_type="gap", posemb="sincos2d").apply(
        {"params": jax.tree.map(jnp.asarray, unflatten_names(params))}, jnp.asarray(images))
    np.testing.assert_array_equal(run(found, images)[0], expected)


@pytest.mark.parametrize("kw, match", [
    (dict(pool_type="0"), "pool_type: .*'0'"), (dict(pool_type="tok", rep_size=8), "rep_size"),
    (dict(pool_type="tok", distilled=True, registers=2), "registers: timm's distilled models"),
    (dict(context="cb_s", context_at="mlp_mid"), "context_at.*'mlp_mid'")])
def test_what_timm_cannot_express(kw, match):
    params, config = ours(**kw)
    for call in (lambda: timm.to_timm(params, config), lambda: timm.arguments(config, CLASSES, (12, 12))):
        with pytest.raises(ConfigError, match=match):
            call()


def test_arguments_of_timms_class():
    config = resolve(Config(**SIZES, pool_type="tok", gelu="erf"))
    assert timm.arguments(config, None, (12, 24)) == dict(
        img_size=(12, 24), patch_size=(P, P), embed_dim=D, depth=DEPTH, num_heads=H, mlp_ratio=2.0, num_classes=0)
    for mlp_dim, width in ((4304, 1152), (61, 28), (15360, 1792)):
        config = resolve(Config(**SIZES | dict(width=width, mlp_dim=mlp_dim)))
        assert int(width * timm.arguments(config, None, (12, 12))["mlp_ratio"]) == mlp_dim


@pytest.mark.parametrize("kw", [*MODELS, dict(pool_type="tok", context="cb_s", context_at="msa_end"),
                                dict(pool_type="0", rep_size=D), dict(posemb="sincos2d"),
                                dict(context="cb_s", context_at="mlp_mid")])
def test_to_big_vision_and_back_is_the_same_bits(kw, tmp_path):
    params, config = ours(**kw)
    path = tmp_path / "model.npz"
    containers.write_npz(path, big_vision.to_big_vision(unflatten_names(params)))
    file = containers.open_file(path)
    assert set(file.tensors) == {f"params/{name}" for name in params}
    found = convert(containers.parameters(file), path=str(path), **json.loads(describe(config)["cb_vit"])["model"])
    assert_same(read(found), params)
    assert_same_model(found, config)


@pytest.mark.parametrize("kw", [dict(), dict(distilled=True), dict(num_classes=0), dict(num_classes=0, rep_size=D),
                                dict(num_classes=0, distilled=True), dict(gelu="tanh", grid=(2, 3))])
def test_to_huggingface_and_back_is_the_same_bits(kw):
    kw = {"num_classes": CLASSES, "gelu": "erf", "pool_type": "tok", **kw}
    params, config = ours(**kw)
    rows, columns = kw.get("grid", (GRID, GRID))
    arrays = huggingface.to_huggingface(unflatten_names(params), config)
    names = [f"class {i}" for i in range(kw["num_classes"])]
    sidecar = json.loads(json.dumps(
        huggingface.config_json(config, kw["num_classes"], (rows * P, columns * P), names)))
    found = understand(arrays, config=sidecar)
    assert_same(read(found), params)
    assert_same_model(found, config)
    assert found.class_names == (tuple(names) or None) and found.grid == (rows, columns)
    if kw["num_classes"]:
        assert arrays.keys() == hf_shapes("deit." if config.distilled else "vit.", config.distilled).keys()
        assert {name: array.shape for name, array in arrays.items() if "position" not in name} == {
            name: shape for name, shape in hf_shapes("deit." if config.distilled else "vit.", config.distilled).items()
            if "position" not in name}


@pytest.mark.parametrize("kw, match", [
    (dict(pool_type="gap"), "pool_type"), (dict(layer_scale=1e-4), "layer_scale"), (dict(context="cb"), "context"),
    (dict(registers=4), "registers"),
    (dict(rep_size=True), "rep_size"), (dict(num_classes=0, rep_size=8), "rep_size")])
def test_what_transformers_cannot_express(kw, match):
    params, config = ours(**{"pool_type": "tok", "num_classes": CLASSES, **kw})
    with pytest.raises(ConfigError, match=f"^{match}"):
        huggingface.to_huggingface(params, config)


def test_an_array_without_a_place_is_not_dropped():
    params, config = ours(pool_type="tok")
    with pytest.raises(ConfigError, match="timm has no place for 'extra/kernel'"):
        timm.to_timm(params | {"extra/kernel": np.zeros(1)}, config)


@pytest.mark.parametrize("names", [["a", "b", "c", "d", "e", "f", "g"], []])
def test_what_is_unknown(names):
    with pytest.raises(FormatError, match="no ViT .*'a', 'b', .*and 2 more" if names else "holds nothing"):
        understand({name: np.zeros((3, 3), np.float32) for name in names})


def test_packed_gates_and_fused_rows():
    shapes = timm_shapes(**{f"blocks.{i}.mlp.fc1.weight": (2 * F, D) for i in range(DEPTH)})
    with pytest.raises(FormatError, match="SwiGLU"):
        understand(random(shapes), num_heads=H)
    with pytest.raises(FormatError, match=r"'blocks.0.attn.qkv.weight' is \[95, 32\], not the rows of query, key"):
        understand(random(timm_shapes(**{"blocks.0.attn.qkv.weight": (3 * D - 1, D)})), num_heads=H)


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize("shapes, match", [
    (without(timm_shapes(), "blocks.1.attn.qkv.bias"), "read as timm, the file lacks 'blocks.1.attn.qkv.bias'$"),
    (without(timm_shapes(), "patch_embed.proj.weight"), "it lacks 'patch_embed.proj.weight'"),
    (without(timm_shapes(), "cls_token"), "says gelu; give gelu='erf' or whatever is right"),
    (without(timm_shapes(), "head.bias"), "has besides 'head.weight'"),
    (timm_shapes(surprise=(1,)), "has besides 'surprise'$"),
    (timm_shapes(**{"norm.bias": (D + 1,)}), r"has 'norm.bias' of \[33\] and not \[32\]$"),
    (timm_shapes(**{"head.weight": (CLASSES, D, 1, 1)}), r"'head.weight' is \[5, 32, 1, 1\], which does not go"),
    (timm_shapes(**{"patch_embed.proj.weight": (D, 47)}), "'patch_embed.proj.weight' is"),
    (timm_shapes(**{"blocks.0.ls1.gamma": (D,)}), "lacks 'blocks.0.ls2.gamma', 'blocks.1.ls1.gamma'"),
    (without(hf_shapes(), "vit.layernorm.weight"), "read as huggingface, the file lacks 'vit.layernorm.weight'$"),
    (hf_shapes(**{"vit.embeddings.surprise": (1,)}), "has besides 'vit.embeddings.surprise'$"),
    (dinov2_shapes(**{"embeddings.surprise": (1,)}), "read as huggingface, .* has besides 'embeddings.surprise'$"),
    (without(dinov2_shapes(), "encoder.layer.1.layer_scale2.lambda1"), "lacks 'encoder.layer.1.layer_scale2.lambda1'$"),
    (without(siglip_shapes(), "head.attention.in_proj_bias"), "the file lacks 'head.attention.in_proj_bias'$"),
    (siglip_shapes(**{"head.attention.in_proj_bias": (3 * D + 1,)}), r"is \[97\], not the rows of query, key and"),
    (timm_shapes(reg_token=(2, D)), r"'reg_token' is \[2, 32\]: no ViT has that"),
    (flax_shapes(**AUGREG, **{"Transformer/posembed_input/pos_embedding": (1, 9, D), "Transformer/x": (1,)}),
     "read as augreg, the file has besides 'Transformer/x'$"),
    (without(flax_shapes(**AUGREG, **{"Transformer/posembed_input/pos_embedding": (1, 9, D)}),
             "Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias"), "lacks 'Transformer/encoderblock_1/MlpBlock_"),
    (flax_shapes(**AUGREG, **{"Transformer/posembed_input/pos_embedding": (1, 9, D),
                              "Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias": (D + 1,)}),
     r"has 'Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias' of \[33\]"),
    (flax_shapes(**POSITIONS, **{"pre_logits/kernel": (D, 6)}), "has besides 'pre_logits/kernel'")])
def test_every_array_is_accounted_for(shapes, match):
    with pytest.raises(FormatError, match=match):
        understand(random(shapes), num_heads=H)


@pytest.mark.parametrize("shapes", [
    timm_shapes(2), hf_shapes(), flax_shapes(**POSITIONS),
    flax_shapes(**AUGREG, **{"Transformer/posembed_input/pos_embedding": (1, 9, D)})])
def test_absurd_shapes_are_errors_of_the_file(shapes):
    arrays = random(shapes)
    for name in (name for name in arrays if not re.search(r"(blocks|layer|encoderblock)[._]1", name)):
        with pytest.raises(FormatError):
            understand(arrays | {name: np.zeros((), np.float32)}, num_heads=H)


@pytest.mark.parametrize("shapes, names", [
    (dinov2_shapes(2), ("cls_token", "register_tokens", "position_embeddings", "patch_embeddings.projection.weight")),
    (siglip_shapes(), ("probe", "in_proj_weight", "position_embedding.weight", "patch_embedding.weight")),
    (timm_shapes(reg_token=(1, 2, D)), ("reg_token", "pos_embed"))])
def test_absurd_shapes_of_what_is_special(shapes, names):
    arrays = random(shapes)
    for name in (name for name in arrays if name.endswith(names)):
        with pytest.raises(FormatError):
            understand(arrays | {name: np.zeros((), np.float32)}, num_heads=H)


@pytest.mark.parametrize("shapes, name", [
    (timm_shapes(**{f"blocks.0.{gamma}": (D,) for gamma in ("gamma_1", "ls1.gamma")}), "blocks.0.ls1.gamma"),
    (timm_shapes(**{"blocks.1.attn.key.bias": (D,)}), "blocks.1.attn.key.bias"),
    (hf_shapes(**{"deit.layernorm.bias": (D,)}), "layernorm.bias"),
    (flax_shapes(**POSITIONS, **{"Transformer/posembed_input/pos_embedding": (1, 9, D)}), "pos_embedding"),
    (flax_shapes(**POSITIONS, **{"Transformer/encoderblock/LayerNorm_0/scale": (DEPTH, D)}),
     "Transformer/encoderblock_0/LayerNorm_0/scale")])
def test_two_names_for_one_array(shapes, name):
    with pytest.raises(FormatError, match=f"'{name}' is in it twice"):
        understand(random(shapes), num_heads=H)


def test_missing_blocks():
    arrays = random(timm_shapes())
    far = {name.replace("blocks.1.", "blocks.9999."): array for name, array in arrays.items()}
    with pytest.raises(FormatError, match="not numbered from 0 to 1"):
        understand(far, num_heads=H)


@pytest.mark.parametrize("overrides, match", [
    (dict(num_heads=8), "num_heads=8 is asked for, but the file has 4"),
    (dict(variant="S/16"), "width=384 is asked for, but the file has 32"), (dict(depth=3), "depth=3.*file has 2"),
    (dict(patch_size=8), r"patch_size=\(8, 8\) .*\(4, 4\)"), (dict(pool_type="gap"), "pool_type='gap' .*'tok'"),
    (dict(distilled=True), "distilled=True .*False"), (dict(rep_size=True), "lacks.*'pre_logits/bias'"),
    (dict(context="cb_s"), "lacks.*context_scale"), (dict(layer_scale=0.1), "lacks.*gamma"),
    (dict(posemb="sincos2d"), "has besides 'pos_embedding'")])
def test_an_override_that_the_file_contradicts(overrides, match):
    arrays = random(flax_shapes(**POSITIONS, cls=(1, 1, D)))
    with pytest.raises(FormatError, match=match):
        understand(arrays, **overrides)


def test_overrides():
    arrays = random(flax_shapes(**POSITIONS))
    found = understand(arrays, context="cb", context_layers=[1], gelu="erf", pool_type="0", patch_size=P, depth=None)
    assert found.model == dict(SIZES, patch_size=(P, P), pool_type="0", context="cb", context_layers=(1,), gelu="erf",
                               layer_norm_eps=1e-6, posemb="learn", distilled=False)
    assert found.doubts == () and any("context='cb' as asked for: par" in note for note in found.notes)
    scale = {f"blocks.{i}.ls{j}.gamma": (D,) for i in range(DEPTH) for j in (1, 2)}
    assert understand(random(timm_shapes(**scale)), num_heads=H, layer_scale=0.5).model["layer_scale"] == 0.5
    with pytest.raises(ConfigError, match="^model.contxt: unknown; did you mean context"):
        understand(arrays, contxt="cb")
    with pytest.raises(ConfigError, match="^model.num_heads: expected a whole number"):
        understand(arrays, num_heads="four")
    with pytest.raises(ConfigError, match="^model.variant: unknown"):
        understand(arrays, variant="XS/16")


@pytest.mark.parametrize("kw", [dict(), dict(context_layers=(1,)), dict(context_at="msa_end"),
                                dict(context_at="mlp_mid", context_layers=(0,))])
def test_where_cb_s_stands_can_be_seen(kw):
    params, config = ours(context="cb_s", **kw)
    assert_same_model(understand(params), config)


def test_metadata():
    arrays = random(timm_shapes())
    config = resolve(Config(**SIZES, pool_type="tok", context="cb", layer_norm_eps=1e-3))
    found = understand(arrays, metadata=describe(config, grid=(GRID, GRID)))
    assert found.model["num_heads"] == H and found.model["context"] == "cb" and found.normalisation is None
    assert found.model["layer_norm_eps"] == 1e-3 and found.doubts == ()
    found = understand(arrays, metadata=describe(config, grid=(GRID, GRID)), context="none")
    assert found.model["context"] == "none"
    assert found.doubts == ("context='none' as asked for, where its metadata say 'cb'",)
    with pytest.raises(FormatError, match="its metadata say num_heads=4, its config.json 8; give num_heads"):
        understand(arrays, metadata=describe(config), config={"model_args": {"num_heads": 8}})
    said = json.loads(describe(config)["cb_vit"])
    for damaged in ("{", "[]", '{"model": 3}', *(json.dumps(said | change) for change in (
            {"model": {"num_heads": "four"}}, {"model": {"width": 3}}, {"model": {"layer_norm_eps": -1}}, {"grid": "3"},
            {"grid": [3, 0]}, {"normalisation": [[0.5] * 3, [0.0] * 3]}, {"normalisation": 3}))):
        with pytest.raises(FormatError):
            understand(arrays, metadata={"cb_vit": damaged}, num_heads=H)


NO_NORMALISATION = [
    ([0.5] * 3, [0.0] * 3), ([0.5] * 3, [0.5, -0.5, 0.5]), ([0.5] * 3, [float("nan")] * 3),
    ([float("nan")] * 3, [1.0] * 3), ([0.5] * 3, [float("inf")] * 3), ([0.5] * 2, [0.5] * 2),
    ([0.5] * 3, [0.5] * 2), ([0.5] * 4, [0.5] * 4), (0.5, 0),
    (["0.5"] * 3, [0.5] * 3), ("0.5", "0.5"), ([True] * 3, [True] * 3), ([0.5] * 3, None), (None, [0.5] * 3), ([], []),
    ({"a": 1}, [0.5] * 3), ([[0.5] * 3], [0.5] * 3)]


@pytest.mark.parametrize("mean, std", NO_NORMALISATION, ids=str)
def test_a_normalisation_that_cannot_be_is_refused_whoever_says_it(mean, std):
    match = r"file: how its pixels are normalised: expected \(mean, std\) with a number for each channel, std above 0"
    says = {"cb_vit": json.dumps({"model": {}, "normalisation": [mean, std]})}
    for kw in (dict(metadata=says), dict(config={"pretrained_cfg": {"mean": mean, "std": std}})):
        with pytest.raises(FormatError, match=match):
            understand(random(timm_shapes()), num_heads=H, **kw)
    card = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    if mean is not None and std is not None:  # of which there are defaults
        with pytest.raises(FormatError, match=match):
            understand(random(hf_shapes()), num_heads=H, config=card)


def test_a_number_stands_for_all_channels():
    for mean, std in ((0, 1), ([0], [1]), ([0.0] * 3, 1.0)):
        card = {"pretrained_cfg": {"mean": mean, "std": std}}
        assert understand(random(timm_shapes()), num_heads=H, config=card).normalisation == ((0.0,) * 3, (1.0,) * 3)


def test_grids_that_are_no_squares():
    arrays = random(timm_shapes() | {"pos_embed": (1, 2 * 5 + 1, D)})
    assert understand(arrays, num_heads=H, grid=(2, 5)).grid == (2, 5)
    for grid, match in ((None, "no square: give grid"), ((3, 5), "a grid of 3×5 has 15")):
        with pytest.raises(FormatError, match=match):
            understand(arrays, num_heads=H, grid=grid)


@pytest.mark.parametrize("said, grid", [
    (dict(grid=(4, 6)), (4, 6)), (dict(grid=(5, 5)), (5, 5)), (dict(metadata=dict(cb_vit=json.dumps(
        dict(model={}, normalisation=None, grid=[4, 6])))), (4, 6)),
    (dict(config=dict(model_args=dict(img_size=[4 * P, 6 * P]))), (4, 6)),
    (dict(config=dict(pretrained_cfg=dict(input_size=[3, 4 * P, 6 * P]))), (4, 6)),
    (dict(config=dict(pretrained_cfg=dict(input_size=[3, 5 * P, 5 * P]))), (5, 5)),
    (dict(config=dict(model_args=dict(no_embed_class=True))), (5, 5)),
    (dict(config=dict(architecture="deit3_small_patch16_224")), (5, 5))], ids=str)
def test_25_positions_are_a_square_or_4_by_6_and_the_class_token(said, grid):
    arrays = random(timm_shapes() | {"pos_embed": (1, 25, D)})
    found = understand(arrays, num_heads=H, **said)
    assert found.grid == grid
    whole = arrays["pos_embed"]
    np.testing.assert_array_equal(read(found)["pos_embedding"], whole if grid == (5, 5) else whole[:, 1:])
    with pytest.raises(FormatError, match=r"25 positions are those of 5×5 patches, or of 24 and .*give grid.*\(5, 5\)"):
        understand(arrays, num_heads=H)
    with pytest.raises(FormatError, match="position embedding is .*give grid"):
        understand(arrays, num_heads=H, config=dict(model_args=dict(no_embed_class=False)))


@pytest.mark.parametrize("config, match", [
    (dict(architecture="vit_small_patch16_rope_ape_224"), "'vit_small_patch16_rope_ape_224', whose rotary pos"),
    (dict(architecture="vit_tiny_patch16_224"), "names the architecture 'vit_tiny_patch16_224', but the file is"),
    (dict(architecture="vit_tiny_patch16_224", model_args=dict(num_heads=None)), "but the file is"),
    (dict(architecture="vit_new_thing"), "give num_heads"),
    (dict(architecture="vit_new_thing", model_args=dict(num_heads=4)), "gelu.*layer_norm_eps.*; give gelu='erf'"),
    (dict(model_args=dict(new_thing=1)), "says new_thing=1, a setting that is not known here"),
    (dict(model_args=[1]), r"says model_args=\[1\]"), (dict(model_args=dict(num_heads="4")), "num_heads='4', w"),
    (dict(model_args=dict(num_heads=4, embed_dim=64)), "its config.json says width=64, but the file has 32"),
    (dict(model_args=dict(num_heads=4, depth=12)), "its config.json says depth=12, but the file has 2"),
    (dict(model_args=dict(num_heads=4, global_pool="avg")), "says pool_type='gap', but the file has 'tok'"),
    (dict(global_pool="avgmax", model_args=dict(num_heads=4)), "global_pool='avgmax', which is not supported"),
    (dict(model_args=dict(num_heads=4, mlp_layer="glu")), "mlp_layer='glu', which is not supported"),
    (dict(pretrained_cfg=dict(label_offset=1)), "label_offset=1, which is not supported; supported is 0"),
    (dict(pretrained_cfg=dict(input_size=3)), "input_size=3, which cannot be"),
    (dict(pretrained_cfg=dict(new_thing=3)), "new_thing=3, a setting")], ids=str)
def test_what_timms_config_json_says_is_right_or_refused(config, match):
    with pytest.raises(FormatError, match=f"^file: .*{match}"):
        understand(random(timm_shapes()), config=config)


def test_timms_older_config_json_and_its_labels():
    arrays, names = random(timm_shapes()), ["ant", "bee", "cow", "dog", "eel"]
    flat = dict(architecture="vit_tiny_patch16_224", mean=[0.5] * 3, std=[0.25] * 3, input_size=[3, 3 * P, 3 * P],
                labels=names, num_features=D, tags=["mine"])
    found = understand(arrays, config=flat, num_heads=H)
    assert found.normalisation == ((0.5,) * 3, (0.25,) * 3) and found.class_names == tuple(names)
    for labels in (names, dict(enumerate(names)), {str(i): name for i, name in enumerate(names)}):
        for config in (dict(label_names=labels), dict(pretrained_cfg=dict(label_names=labels))):
            assert understand(arrays, config=config, num_heads=H).class_names == tuple(names)
    found = understand(arrays, config=dict(label_names=names[:3]), num_heads=H)
    assert found.class_names is None and any("for 3 classes, its head has 5" in note for note in found.notes)
