"""The Vision Transformer: counts, layouts, options, and an independent reference in numpy."""
import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from cb_vit.config import ConfigError
from cb_vit.models import vit
from cb_vit.models.common import to_loop, to_scan
from cb_vit.models.layers import MAPHead, drop_path, posemb_sincos_2d, softmax
from cb_vit.models.vit import Model
from cb_vit.tree import names

SMALL = dict(patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=2)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)


def init(model, images=IMAGES, seed=0):
    """Parameters with every leaf random: zeros would hide what a leaf does."""
    params = jax.eval_shape(model.init, jax.random.key(seed), images)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), params)


def shapes(**kw):
    return jax.eval_shape(Model(1000, **kw).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]


@pytest.mark.parametrize("variant, count", [
    ("Ti/16", 5_717_224), ("S/16", 22_050_280), ("B/16", 86_566_888), ("L/16", 304_325_608), ("H/14", 632_044_520)])
def test_parameter_counts(variant, count):
    count_of = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count_of(shapes(variant=variant, pool_type="tok", context="cb", scan=variant != "Ti/16")) == count
    if variant == "Ti/16":
        assert count_of(shapes(variant=variant, pool_type="tok")) == count
        # One vector a block; DeiT's distilled counts have one row more for cls and dist each.
        assert count_of(shapes(variant=variant, pool_type="tok", context="cb_s")) == count + 12 * 192
        assert count_of(shapes(variant=variant, pool_type="tok", distilled=True)) == 5_910_800 - 2 * 192


def test_leaves_have_big_visions_names_and_shapes():
    tree = shapes(variant="Ti/16", pool_type="tok", context="cb_s", layer_scale=1e-4, distilled=True)
    flat = {"/".join(k): v.shape for k, v in flax.traverse_util.flatten_dict(tree).items()}
    block = "Transformer/encoderblock_11/"
    expected = {
        "embedding/kernel": (16, 16, 3, 192), "embedding/bias": (192,), "pos_embedding": (1, 196, 192),
        "cls": (1, 1, 192), "dist": (1, 1, 192), "head/kernel": (192, 1000), "head_dist/bias": (1000,),
        "Transformer/encoder_norm/scale": (192,),
        block + "LayerNorm_0/scale": (192,), block + "LayerNorm_1/bias": (192,),
        block + "MultiHeadDotProductAttention_0/query/kernel": (192, 3, 64),
        block + "MultiHeadDotProductAttention_0/value/bias": (3, 64),
        block + "MultiHeadDotProductAttention_0/out/kernel": (3, 64, 192),
        block + "MlpBlock_0/Dense_0/kernel": (192, 768), block + "MlpBlock_0/Dense_1/bias": (192,),
        block + "MlpBlock_0/context_scale": (192,), block + "LayerScale_0/gamma": (192,),
        block + "LayerScale_1/gamma": (192,)}
    assert {name: flat.get(name) for name in expected} == expected
    assert len(flat) == 12 * 19 + 11  # 16 leaves of a plain block and 3 of ours; and nothing else


def reference(params, images, heads, gelu, prefix=()):
    """A plain ViT in float64 numpy, written from the paper's equations 1 to 4 (arXiv 2010.11929)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, w):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * w["scale"] + w["bias"]

    def act(x):
        tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return tanh if gelu == "tanh" else 0.5 * x * (1 + erf(x / np.sqrt(2)))

    def attend(x, w):
        d = x.shape[-1]
        flat = {n: (w[n]["kernel"].reshape(d, d), w[n]["bias"].reshape(d)) for n in ("query", "key", "value")}
        q, k, v = (x @ flat[n][0] + flat[n][1] for n in ("query", "key", "value"))
        outs = []
        for h in np.split(np.arange(d), heads):
            logits = q[:, h] @ k[:, h].T / np.sqrt(len(h))
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            outs.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
        return np.concatenate(outs, -1) @ w["out"]["kernel"].reshape(d, d) + w["out"]["bias"]

    logits = []
    for image in np.asarray(images, np.float64):
        k = p["embedding"]["kernel"]
        size = k.shape[0]
        rows, columns = image.shape[0] // size, image.shape[1] // size
        patches = [image[r * size:(r + 1) * size, c * size:(c + 1) * size] for r in range(rows) for c in range(columns)]
        x = np.stack([np.einsum("yxc,yxcd->d", patch, k) for patch in patches]) + p["embedding"]["bias"]
        x = x + p["pos_embedding"][0]
        x = np.concatenate([p[name][0] for name in prefix] + [x])
        for i in range(len(p["Transformer"]) - 1):
            b = p["Transformer"][f"encoderblock_{i}"]
            x = x + attend(norm(x, b["LayerNorm_0"]), b["MultiHeadDotProductAttention_0"])
            m = b["MlpBlock_0"]
            h = act(norm(x, b["LayerNorm_1"]) @ m["Dense_0"]["kernel"] + m["Dense_0"]["bias"])
            x = x + h @ m["Dense_1"]["kernel"] + m["Dense_1"]["bias"]
        x = norm(x, p["Transformer"]["encoder_norm"])
        pooled = x[0] if "cls" in prefix else x[len(x) - len(patches):].mean(0)
        logits.append(pooled @ p["head"]["kernel"] + p["head"]["bias"])
    return np.stack(logits)


@pytest.mark.parametrize("pool_type, gelu, scan", [("gap", "tanh", False), ("tok", "erf", False), ("tok", "erf", True)])
def test_without_context_it_is_the_plain_vit(pool_type, gelu, scan):
    loop = Model(7, **SMALL, pool_type=pool_type, gelu=gelu)
    params = init(loop)
    model = Model(7, **SMALL, pool_type=pool_type, gelu=gelu, scan=scan)
    logits, _ = model.apply({"params": to_scan(params) if scan else params}, IMAGES)
    expected = reference(params, IMAGES, heads=2, gelu=gelu, prefix=("cls",) if pool_type == "tok" else ())
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    other = reference(params, IMAGES, heads=2, gelu="erf" if gelu == "tanh" else "tanh",
                      prefix=("cls",) if pool_type == "tok" else ())
    assert np.abs(other - expected).max() > 2e-5  # the two GELUs can be told apart


@pytest.mark.parametrize("kw", [
    dict(context="cb"), dict(context="cb_s", layer_scale=0.1), dict(context="cb", context_layers=[1]),
    dict(context="none", drop_path=0.3, dropout=0.2), dict(context="cb", drop_path=0.4, drop_path_schedule="constant"),
    dict(context="cb", remat_policy="nothing_saveable", drop_path=0.2, registers=2)])
def test_loop_and_scan_are_the_same_function(kw):
    loop, scan = Model(7, **SMALL, **kw), Model(7, **SMALL, **kw, scan=True)
    params = init(loop)

    def loss(model, p):
        rngs = {"dropout": jax.random.key(3)}
        logits, out = model.apply({"params": p}, IMAGES, train=True, attention=True, rngs=rngs)
        return jnp.sum(logits**2), out

    (a, out_a), grad_a = jax.jit(jax.value_and_grad(lambda p: loss(loop, p), has_aux=True))(params)
    (b, out_b), grad_b = jax.jit(jax.value_and_grad(lambda p: loss(scan, p), has_aux=True))(to_scan(params))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), out_a, out_b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), grad_a, to_loop(grad_b))


@pytest.mark.parametrize("pool_type", ["tok", "gap", "map"])
def test_registers_stand_before_the_patches_and_no_head_reads_them(pool_type):
    model = Model(7, **SMALL, pool_type=pool_type, registers=3)
    params = init(model)
    got, out = jax.jit(model.apply)({"params": params}, IMAGES)
    token = int(pool_type == "tok")
    assert params["reg"].shape == (1, 3, 32) and out["encoded"].shape == (2, token + 3 + 6, 32)
    if pool_type in ("tok", "gap"):
        expected = reference(params, IMAGES, heads=2, gelu="tanh", prefix=("cls",) * token + ("reg",))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(out["pre_logits_2d"], out["encoded"][:, token + 3:].reshape(2, 2, 3, 32))
    if pool_type == "map":
        close(out["head_input"], MAPHead(model.config).apply({"params": params["MAPHead_0"]}, out["encoded"][:, 3:]))
    if pool_type == "gap":
        context = Model(7, **SMALL, registers=3, context="cb", context_layers=(0,))
        mixed = jax.jit(lambda p: context.apply({"params": p}, IMAGES)[1]["encoder"]["block00"]["mlp"])(params)
        plain = out["encoder"]["block00"]["mlp"]
        close(mixed, (plain + plain.mean(axis=1, keepdims=True)) / 2)


def test_layouts_convert_both_ways():
    params = init(Model(7, **SMALL, context="cb_s"))
    scanned = to_scan(params)
    expected = jax.eval_shape(Model(7, **SMALL, context="cb_s", scan=True).init, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(np.testing.assert_array_equal, to_loop(scanned), params)
    assert to_loop(params) is not None and names(to_loop(params)) == names(params)


def logits(params, **kw):
    return Model(7, **SMALL, **kw).apply({"params": params}, IMAGES)[0]


def test_context_stands_where_it_should():
    params = init(Model(7, **SMALL))
    places = ("mlp_end", "mlp_mid", "mlp_front", "msa_end")
    at = {place: logits(params, context="cb", context_at=place) for place in places}
    plain = logits(params)
    np.testing.assert_allclose(at["mlp_mid"], at["mlp_end"], atol=1e-5)  # commutes with the second Dense
    for a, b in [("mlp_end", "mlp_front"), ("mlp_end", "msa_end"), ("mlp_front", "msa_end")]:
        assert jnp.abs(at[a] - at[b]).max() > 1e-3
    assert all(jnp.abs(value - plain).max() > 3e-5 for value in at.values())


def test_context_is_applied_to_the_mlp_branch_of_the_chosen_blocks():
    params = init(Model(7, **SMALL))
    plain = Model(7, **SMALL).apply({"params": params}, IMAGES)[1]["encoder"]["block00"]["mlp"]
    model = Model(7, **SMALL, context="cb", context_layers=(0,))
    got = model.apply({"params": params}, IMAGES)[1]["encoder"]["block00"]["mlp"]
    np.testing.assert_allclose(got, (plain + plain.mean(axis=1, keepdims=True)) / 2, atol=1e-6)
    np.testing.assert_array_equal(logits(params, context="cb", context_layers=()), logits(params))


def test_cb_s_begins_as_cb():
    model = Model(7, **SMALL, context="cb_s", head_zeroinit=False)
    params = model.init(jax.random.key(0), IMAGES)["params"]
    got = model.apply({"params": params}, IMAGES)[0]
    plain = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf, params)
    for block in range(2):
        del plain["Transformer"][f"encoderblock_{block}"]["MlpBlock_0"]["context_scale"]
    np.testing.assert_array_equal(got, logits(plain, context="cb"))


def test_attention_appears_when_asked_for_and_costs_nothing_else():
    model = Model(7, **SMALL, pool_type="tok")
    params = init(model)
    _, out = model.apply({"params": params}, IMAGES, attention=True)
    maps = out["encoder"]["block01"]["attention"]
    assert maps.shape == (2, 2, 7, 7) and maps.dtype == jnp.float32
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert "attention" not in model.apply({"params": params}, IMAGES)[1]["encoder"]["block01"]
    flops = [jax.jit(lambda p, a=a: model.apply({"params": p}, IMAGES, attention=a)[0]).lower(params).compile()
             .cost_analysis()["flops"] for a in (False, True)]
    assert flops[0] == flops[1]


@pytest.mark.parametrize("options", [{}, {"scan": True}, {"scan": True, "remat_policy": "nothing_saveable"},
                                     {"remat_policy": "dots_saveable"}], ids=str)
def test_attention_is_reduced_where_it_is_made(options):
    model = Model(7, **SMALL, pool_type="tok", **options)
    params = init(model)
    reduce = lambda maps: {"largest": maps.max(-1), "sum": maps.sum((1, 2, 3))}  # noqa: E731
    apply = jax.jit(lambda p, attention: model.apply({"params": p}, IMAGES, attention=attention)[1]["encoder"],
                    static_argnums=1)
    whole, reduced = apply(params, True), apply(params, reduce)
    for block in ("block00", "block01"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6),
                     reduced[block]["attention"], reduce(whole[block]["attention"]))


def test_drop_path_drops_whole_examples_at_the_stated_rate_and_keeps_the_mean():
    x = jnp.ones((20_000, 2, 3))
    y = drop_path(x, 0.3, jax.random.key(0))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    assert (y == y[:, :1, :1]).all()
    # 20 000 draws: six standard deviations are 0.0194.
    assert abs(float((y == 0).mean()) - 0.3) < 0.0194
    np.testing.assert_array_equal(drop_path(x, 0.3, None), x)


def test_drop_path_rates_grow_linearly_from_zero():
    """With rate p near 1 in the last block only that block is dropped, and with it nothing before."""
    kw = dict(SMALL, depth=2, drop_path=0.999)
    params = init(Model(7, **kw))
    rngs = {"dropout": jax.random.key(0)}
    linear = Model(7, **kw).apply({"params": params}, IMAGES, train=True, rngs=rngs)[1]["encoder"]
    assert jnp.abs(linear["block00"]["+mlp"] - linear["block00"]["+sa"]).max() > 1e-3
    np.testing.assert_array_equal(linear["block01"]["+mlp"], linear["block00"]["+mlp"])
    constant = Model(7, **kw, drop_path_schedule="constant").apply({"params": params}, IMAGES, train=True, rngs=rngs)[1]
    np.testing.assert_array_equal(constant["encoder"]["block01"]["+mlp"], constant["with_posemb"])


@functools.cache
def initialised(school):
    model = Model(100, "Ti/16", pool_type="tok", init=school, depth=1, registers=4)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    return flax.traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("school, leaf, std", [
    ("deit", "head/kernel", 0.02), ("deit", "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", 0.02),
    ("deit", "pos_embedding", 0.02), ("deit", "embedding/kernel", 0.036084 / 3**0.5),
    ("deit", "embedding/bias", 0.036084 / 3**0.5), ("big_vision", "head/kernel", 0.0), ("deit", "reg", 1e-6),
    ("big_vision", "reg", 1e-6),
    ("big_vision", "pos_embedding", 1 / 192**0.5), ("big_vision", "cls", 0.0),
    ("big_vision", "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", (2 / 384) ** 0.5),
    ("big_vision", "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", (2 / 960) ** 0.5),
    ("big_vision", "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias", 1e-6)])
def test_initialisation_has_the_spread_of_its_school(school, leaf, std):
    value = initialised(school)[leaf]
    tolerance = 6 / np.sqrt(2 * value.size)  # six standard errors of a standard deviation
    np.testing.assert_allclose(value.std(), std, rtol=tolerance, atol=1e-12)


def test_sincos_position_embedding_closed_form():
    table = np.asarray(posemb_sincos_2d(3, 5, 8))[0].reshape(3, 5, 8)
    for y in range(3):
        for x in range(5):
            expected = [np.sin(x), np.sin(x / 1e4), np.cos(x), np.cos(x / 1e4),
                        np.sin(y), np.sin(y / 1e4), np.cos(y), np.cos(y / 1e4)]
            np.testing.assert_allclose(table[y, x], expected, atol=1e-6)


@pytest.mark.parametrize("kw, shape", [
    (dict(pool_type="map", rep_size=True), (2, 7)), (dict(pool_type="0"), (2, 7)), (dict(pool_type="none"), (2, 6, 7)),
    (dict(posemb="sincos2d", rep_size=24), (2, 7)), (dict(pool_type="tok", distilled=True), (2, 7))])
def test_heads_and_pools(kw, shape):
    model = Model(7, **SMALL, **kw)
    got, out = model.apply({"params": init(model)}, IMAGES)
    assert got.shape == shape and np.isfinite(got).all()
    if kw.get("distilled"):
        np.testing.assert_allclose(got, (out["logits_cls"] + out["logits_dist"]) / 2, rtol=1e-6)
    assert "head" not in init(Model(None, **SMALL, **kw))


def test_bfloat16_matmuls_stay_near_float32_and_parameters_stay_float32():
    params = init(Model(7, **SMALL, context="cb"))
    half = logits(params, context="cb", dtype_mm="bfloat16")
    full = logits(params, context="cb")
    assert half.dtype == jnp.float32
    scaled = Model(7, **SMALL, context="cb", dtype_mm="bfloat16", layer_scale=0.1, pool_type="tok", drop_path=0.1)
    out = scaled.apply({"params": init(scaled)}, IMAGES, train=True, rngs={"dropout": jax.random.key(0)})[1]
    assert out["encoder"]["block01"]["+mlp"].dtype == jnp.bfloat16  # and so is what is moved through memory
    assert float(jnp.linalg.norm(half - full) / jnp.linalg.norm(full)) < 0.03
    stored = jax.eval_shape(Model(7, **SMALL, dtype_mm="bfloat16").init, jax.random.key(0), IMAGES)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kw, message", [
    (dict(variant="SS/16"), "model.variant: unknown ViT variant 'SS'; did you mean S?"),
    *((dict(variant=variant), f"model.variant: unknown ViT variant '{variant}'; did you mean {meant}\\?$")
      for variant, meant in (("b/16", "B/16"), ("B16", "B/16"), ("ViT-B-32", "B/32"), ("TI/16", "Ti/16"),
                             ("so400m/14", "So400m/14"), ("vit_base_patch16_224", "B/16"), ("deit_tiny", "Ti"))),
    (dict(variant="S/x"), "model.variant: expected SIZE/PATCH"),
    (dict(variant="S"), "model.patch_size: not set"),
    (dict(variant="S/16", num_heads=5), "model.num_heads: 5 does not divide width 384"),
    (dict(variant="S/16", contxt="cb"), "model.contxt: unknown; did you mean context?"),
    (dict(variant="S/16", context="cbs"), "model.context: unknown value 'cbs'"),
    (dict(variant="S/16", drop_path=1.0), r"model.drop_path: is a probability in \[0, 1\), got 1.0"),
    (dict(variant="S/16", context="cb", context_layers=[12]), "model.context_layers: blocks are 0 to 11"),
    (dict(variant="S/16", context="cb_s", context_layers=[1], scan=True), "model.context_layers: cb_s in some"),
    (dict(variant="S/16", distilled=True), "model.distilled: needs pool_type='tok'"),
    (dict(variant="S/16", registers=-1), "model.registers: is a number of tokens, 0 or more, got -1"),
    (dict(variant="S/16", registers="4"), "model.registers: expected a whole number"),
    (dict(variant="S/16", registers=2, pool_type="0"), "model.registers: 2 with pool_type='0': the first token would")])
def test_impossible_models_are_refused_by_name(kw, message):
    with pytest.raises(ConfigError, match=message):
        Model(10, **kw)


def test_patch_must_divide_the_image():
    with pytest.raises(ConfigError, match=re.escape("variant: 'S/16' has patch 16×16, which does not divide")):
        vit.check_image_size(vit.Config(variant="S/16"), (224, 230))
    vit.check_image_size(vit.Config(variant="S/16"), (224, 240))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_softmax_and_its_gradient_equal_jaxs_in_float32(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(0, 3, (4, 5, 197)), dtype) for _ in range(2))
    got, pullback = jax.vjp(softmax, x)
    expected, reference_pullback = jax.vjp(lambda y: jax.nn.softmax(y, axis=-1), x.astype(jnp.float32))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=tolerance, atol=1e-30)
    (back,), (reference_back,) = pullback(g), reference_pullback(g.astype(jnp.float32))
    error = jnp.linalg.norm(back.astype(jnp.float32) - reference_back) / jnp.linalg.norm(reference_back)
    assert back.dtype == dtype and float(error) < 2 * tolerance


def of(shape=(1, 8, 12, 3), dtype=np.float32):
    return np.ones(shape, dtype)


BAD_IMAGES = {
    "no batch axis": (of((8, 12, 3)), r"^images: have 3 axes, \[8 12 3\], where .* has 4; give images\[None\]"),
    "video": (of((1, 2, 8, 12, 3)), r"^images: have 5 axes"),
    "uint8": (of(dtype=np.uint8), r"^images: are uint8; scale them as .*np.float32\(images\) / 127.5 - 1"),
    "int64": (of(dtype=np.int64), "^images: are int.*; scale them"),
    "bool": (of(dtype=bool), "^images: are bool; scale them"),
    "float64": (of(dtype=np.float64), "^images: are float64; make them one array of np.float32"),
    "complex": (of(dtype=np.complex64), "^images: are complex64; make them one array"),
    "object": (of(dtype=object), "^images: are object; make them one array"),
    "list": ([[0.0]], r"^images: are a list; give one array \[b y x c\] of float32"),
    "channels first": (of((1, 3, 8, 12)), r"^images: \[1 3 8 12\] have .* first; .*images.transpose\(0, 2, 3, 1\)"),
    "channels": (of((1, 8, 12, 1)), r"^images: \[1 8 12 1\] have 1 channels, .* embedding 3; .*channels=1\)"),
    "size": (of((1, 8, 8, 3)), r"^images: of 8×8 pixels are 2×2 patches, pos_embedding has 6; .*load.*\(8, 8\)\)"),
    "patch": (of((1, 8, 9, 3)), "^model.patch_size: 4×4 does not divide the image of 8×9"),
    "no pixels": (of((1, 0, 12, 3)), "^model.patch_size: 4×4 does not divide the image of 0×12")}
NUMBERS_ONLY = [name for name in BAD_IMAGES if name not in ("object", "list")]


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_of_another_kind_are_refused_in_a_sentence(name):
    image, message = BAD_IMAGES[name]
    model = Model(7, **SMALL)
    with pytest.raises(ConfigError, match=message):
        model.apply({"params": init(model)}, image)


@pytest.mark.parametrize("name", [name for name in NUMBERS_ONLY if name not in ("float64", "channels", "size")])
def test_images_are_looked_at_under_every_transformation_and_before_there_are_parameters(name):
    image, message = BAD_IMAGES[name]
    model = Model(7, **SMALL)
    apply = lambda image: model.apply({"params": init(model)}, image)[0]  # noqa: E731
    for function in (jax.jit(apply), lambda image: jax.eval_shape(apply, image),
                     lambda image: apply(jnp.asarray(image)), lambda image: model.init(jax.random.key(0), image)):
        with pytest.raises(ConfigError, match=message):
            function(image)


def test_images_that_only_look_odd_are_taken():
    one = dict(SMALL, patch_size=1)
    for shape in ((1, 3, 4, 6), (1, 2, 3, 1)):  # of six channels, and of one
        model = Model(7, **one)
        params = init(model, of((1, *shape[1:])))
        assert model.apply({"params": params}, of(shape))[0].shape == (shape[0], 7)
    for dtype in ("float16", "bfloat16"):
        model = Model(7, **SMALL)
        assert model.apply({"params": init(model)}, IMAGES.astype(dtype))[0].shape == (2, 7)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kw", [
    dict(pool_type="gap", rep_size=True), dict(pool_type="tok", rep_size=24), dict(pool_type="tok", distilled=True),
    dict(pool_type="map"), dict(pool_type="0"), dict(pool_type="none", rep_size=True)])
def test_intermediates_are_what_they_are_in_big_vision(kw, scan):
    """Each from others by numpy: the pooled tokens, and the head's layers on the pooled and on every patch."""
    loop, model = Model(7, **SMALL, **kw), Model(7, **SMALL, **kw, scan=scan)
    params = init(loop)
    _, out = model.apply({"params": to_scan(params) if scan else params}, IMAGES)
    assert "logits_2d" not in Model(None, **SMALL, **kw).apply({"params": params}, IMAGES)[1]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    pre_ln, encoded = np.asarray(out["encoder"]["pre_ln"]), np.asarray(out["encoded"])
    close(pre_ln, out["encoder"]["block01"]["+mlp"])
    params = jax.tree.map(np.asarray, params)
    norm = params["Transformer"]["encoder_norm"]
    scaled = (pre_ln - pre_ln.mean(-1, keepdims=True)) / np.sqrt(pre_ln.var(-1, keepdims=True) + 1e-6)
    close(scaled * norm["scale"] + norm["bias"], encoded)

    pool, extra = kw["pool_type"], (kw["pool_type"] == "tok") + kw.get("distilled", False)
    assert ("head_input" in out) == (pool != "none")
    if pool != "none":
        close(out["head_input"], {"gap": encoded.mean(1), "map": out["head_input"]}.get(pool, encoded[:, 0]))
    hidden = lambda x: np.tanh(x @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"]) \
        if kw.get("rep_size") else x  # noqa: E731
    head = lambda x: x @ params["head"]["kernel"] + params["head"]["bias"]  # noqa: E731
    patches = encoded[:, extra:].reshape(2, 2, 3, 32)
    close(out["pre_logits_2d"], hidden(patches))
    close(out["logits_2d"], head(hidden(patches)))
    close(out["pre_logits"], hidden(np.asarray(out["head_input"]) if pool != "none" else encoded))
    close(out["logits_cls" if kw.get("distilled") else "logits"], head(np.asarray(out["pre_logits"])))


def test_attention_pooling_is_in_float32_as_in_big_vision():
    kw = dict(SMALL, pool_type="map")
    params = init(Model(None, **kw))
    out = Model(None, **kw, dtype_mm="bfloat16").apply({"params": params}, IMAGES)[1]
    head = MAPHead(Model(None, **kw).config).apply({"params": params["MAPHead_0"]}, out["encoded"])
    np.testing.assert_array_equal(out["head_input"], head)
    assert out["head_input"].dtype == jnp.float32
