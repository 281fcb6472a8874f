"""Beginning from the parameters of another model: what is taken, what begins anew, and that all of it is said."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.config import ConfigError
from cb_vit.models import vit
from cb_vit.models.common import merge_params, to_loop
from cb_vit.models.resample import METHODS, resample_patch, resample_posemb
from cb_vit.tree import flatten_with_names

SIZES = dict(patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2)


def config(**changes):
    return vit.resolve(vit.Config(**SIZES | changes))


def params(seed=0, image=(16, 16), num_classes=3, **changes):
    """Random ones of a model, as if it had been trained."""
    model = vit.Model(num_classes, **SIZES | changes)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *image, 3))), jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def flat(tree):
    return dict(flatten_with_names(tree)[0])


def merged(ours, theirs, dont_load=(), settings=(), **kw):
    """Parameters by name, and the report."""
    found, report = vit.merge(ours, theirs, config(**dict(settings)), dont_load, **kw)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, ours)
    return flat(found), report.lines


def assert_from(found, source, names):
    """Those arrays are the same in both."""
    for name in names:
        np.testing.assert_array_equal(found[name], source[name], err_msg=name)


def test_the_same_model_is_taken_whole():
    ours, theirs = params(0), params(1)
    found, lines = merged(ours, theirs)
    assert_from(found, flat(theirs), found)
    assert lines == (f"{len(found)} of the model's {len(found)} parameter arrays are loaded",)


@pytest.mark.parametrize("method", METHODS)
def test_patches_of_another_size_are_resampled(method):
    ours, theirs = params(0, patch_size=8, image=(32, 32)), params(1)
    found, lines = merged(ours, theirs, posemb_resize=method, settings=dict(patch_size=8))
    assert_from(found, flat(theirs), found.keys() - {"embedding/kernel"})
    expected = resample_patch(theirs["embedding"]["kernel"], (8, 8), method)
    np.testing.assert_allclose(found["embedding/kernel"], expected, atol=1e-6)
    assert f"embedding/kernel: resampled from 4×4 to 8×8 pixels, {method}" in lines


@pytest.mark.parametrize("method", METHODS)
def test_position_embeddings_are_resampled(method):
    ours, theirs = params(0, image=(24, 24)), params(1)
    found, lines = merged(ours, theirs, posemb_resize=method)
    assert_from(found, flat(theirs), found.keys() - {"pos_embedding"})
    expected = resample_posemb(theirs["pos_embedding"], (6, 6), method)
    np.testing.assert_allclose(found["pos_embedding"], expected, atol=1e-6)
    assert f"pos_embedding: resampled from 4×4 to 6×6, {method}" in lines


def test_grids_that_are_not_square():
    ours, theirs = params(0, image=(8, 32)), params(1, image=(12, 8))
    found, lines = merged(ours, theirs, image_size=(8, 32), loaded_grid=(3, 2))
    expected = resample_posemb(theirs["pos_embedding"], (2, 8), source=(3, 2))
    np.testing.assert_allclose(found["pos_embedding"], expected, atol=1e-6)
    assert "pos_embedding: resampled from 3×2 to 2×8, bicubic_antialias" in lines
    with pytest.raises(ConfigError, match="^pos_embedding: its 6 patches are no square"):
        merged(ours, theirs, image_size=(8, 32))
    # As many patches, but in another grid.
    theirs = params(1)
    found, lines = merged(ours, theirs, image_size=(8, 32), loaded_grid=(4, 4))
    assert "pos_embedding: resampled from 4×4 to 2×8, bicubic_antialias" in lines
    assert_from(merged(ours, theirs, image_size=(8, 32), loaded_grid=(2, 8))[0], flat(theirs), ["pos_embedding"])
    assert_from(merged(ours, theirs, image_size=(8, 32))[0], flat(theirs), ["pos_embedding"])


def test_a_head_of_another_size_begins_anew_as_a_whole_and_one_of_the_same_size_is_taken():
    ours, theirs = params(0, num_classes=5), params(1)
    found, lines = merged(ours, theirs)
    assert_from(found, flat(ours), ["head/kernel", "head/bias"])
    assert_from(found, flat(theirs), found.keys() - {"head/kernel", "head/bias"})
    assert lines[1] == "begun anew, the file's being of another size: head/bias, head/kernel"
    theirs["head"]["bias"] = jnp.ones(5)  # fits, but is nothing without its kernel
    assert_from(merged(ours, theirs)[0], flat(ours), ["head/kernel", "head/bias"])


def test_a_head_that_only_one_side_has():
    none, some = params(0, num_classes=None), params(1)
    found, lines = merged(some, none)
    assert_from(found, flat(some), ["head/kernel", "head/bias"])
    assert lines[1] == "begun anew, as the file has none: head/bias, head/kernel"
    assert merged(none, some)[1][1] == "left in the file, as the model has none: head/bias, head/kernel"


def test_what_a_plain_model_lacks_of_cb_s_and_of_a_distilled_one():
    theirs = params(1, pool_type="tok")
    settings = dict(pool_type="tok", context="cb_s", distilled=True, registers=2)
    ours = params(0, **settings)
    found, lines = merged(ours, theirs, settings=settings)
    anew = [name for name in found if name.endswith("context_scale")]
    anew += ["dist", "reg", "head_dist/kernel", "head_dist/bias"]
    assert len(anew) == 6
    assert_from(found, flat(ours), anew)
    assert_from(found, flat(theirs), found.keys() - set(anew))
    assert lines[1].startswith("begun anew, as the file has none: ") and all(name in lines[1] for name in anew)


@pytest.mark.parametrize("scan", [False, True])
def test_scan_layout_gets_what_loop_layout_gets(scan):
    theirs = params(1)
    found, _ = merged(params(0, image=(24, 24), scan=scan), theirs, settings=dict(scan=scan), dont_load=["head/.*"])
    looped = flat(to_loop(vit.merge(params(0, image=(24, 24), scan=scan), theirs, config(scan=scan), ["head/.*"])[0]))
    assert ("Transformer/encoderblock/LayerNorm_0/scale" in found) == scan
    assert_from(looped, flat(theirs), looped.keys() - {"pos_embedding", "head/kernel", "head/bias"})
    assert_from(looped, flat(params(0, image=(24, 24), scan=scan)), ["head/kernel", "head/bias"])


def test_dont_load_on_either_side():
    ours, theirs = params(0, layer_scale=0.1), params(1, context="cb_s")
    rules = ["embedding/.*", ".*/gamma", ".*/context_scale", "pos_embedding"]
    found, lines = merged(ours, theirs, dont_load=rules, settings=dict(layer_scale=0.1))
    kept = [name for name in found if name.startswith("embedding") or "gamma" in name] + ["pos_embedding"]
    assert len(kept) == 7
    assert_from(found, flat(ours), kept)
    assert_from(found, flat(theirs), found.keys() - set(kept))
    anew, left = (next(line for line in lines if line.startswith(what)) for what in ("begun anew, told", "left in the"))
    assert "embedding/kernel" in anew and "gamma" in anew and "context_scale" not in anew
    assert "context_scale" in left and "gamma" not in left and "embedding" not in left


def test_a_position_embedding_in_dont_load_is_not_said_to_be_resampled():
    _, lines = merged(params(0, image=(24, 24)), params(1), dont_load=["pos_embedding"])
    assert not any("resampled" in line for line in lines)


@pytest.mark.parametrize("here, there, message", [
    ({}, dict(width=32), r"has another shape of Transformer/\S+ \(\[32\], here \[16\]\), .* and \d+ more.*dont_load"),
    (dict(depth=3), {}, "lacks Transformer/encoderblock_2/LayerNorm_0/bias, .* and 13 more.*dont_load"),
    ({}, dict(depth=3), "has besides Transformer/encoderblock_2/LayerNorm_0/bias"),
    ({}, dict(registers=2), "has besides reg"),
    (dict(registers=3), dict(registers=2), r"has another shape of reg \(\[1, 2, 16\], here \[1, 3, 16\]\)"),
    ({}, dict(pool_type="tok"), "has besides cls"), (dict(pool_type="map"), {}, "lacks MAPHead_0/"),
    (dict(layer_scale=0.1), {}, "lacks Transformer/encoderblock_0/LayerScale_0/gamma"),
    ({}, dict(context="cb_s"), "has besides .*context_scale"), ({}, dict(posemb="sincos2d"), "lacks pos_embedding"),
    ({}, dict(mlp_dim=64), r"has another shape of .*Dense_0/bias \(\[64\], here \[32\]\)")])
def test_another_model_is_refused(here, there, message):
    with pytest.raises(ConfigError, match=f"^model_init: it {message}") as error:
        merged(params(0, **here), params(1, **there), settings=here)
    assert "\n" not in str(error.value)


def test_a_regex_that_matches_nothing():
    with pytest.raises(ConfigError, match=r"^model_load.dont_load\[1\]: 'haed/.\*' matches no parameter"):
        merged(params(0), params(1), dont_load=["head/.*", "haed/.*"])


def test_shapes_alone_tell_and_jit_computes_the_same():
    ours, theirs = params(0, image=(24, 24), num_classes=5, scan=True), params(1)
    merge = lambda ours, theirs: vit.merge(ours, theirs, config(scan=True))  # noqa: E731
    found, report = merge(ours, theirs)
    shapes, report_of_shapes = jax.eval_shape(merge, ours, theirs)
    compiled, report_of_jit = jax.jit(merge)(ours, theirs)
    assert report == report_of_shapes == report_of_jit
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), compiled, found)


def test_the_models_dtype_is_kept():
    found, _ = merge_params({"w": jnp.zeros(3)}, {"w": jnp.ones(3, jnp.bfloat16)})
    assert found["w"].dtype == jnp.float32 and found["w"].tolist() == [1, 1, 1]
