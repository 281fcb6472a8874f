"""All that timm can make of its VisionTransformer: each file loads with the right logits, or is refused.

With the `config.json` that timm itself writes, and without; nothing is ever silently wrong.
"""
import functools
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cb_vit.models.vit import Model
from cb_vit.tree import unflatten_names
from cb_vit.weights import containers
from cb_vit.weights.containers import FormatError
from cb_vit.weights.dialects import cards
from cb_vit.weights.dialects.conversion import convert
from cb_vit.weights.dialects.names import PUBLISHED

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from timm.models import list_models  # noqa: E402
from timm.models._hub import save_config_for_hf  # noqa: E402
from timm.models._pretrained import PretrainedCfg  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

NAMES = [name for module in ("vision_transformer", "deit") for name in list_models(module=module)]


def make(name, **options):
    """On no device: names and shapes."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **options)


class Stop(Exception):
    pass


@functools.cache
def arguments(name):
    """What timm makes it of."""
    def stop(self, *args, **kw):
        raise Stop(kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "__init__", stop)
        with pytest.raises(Stop) as stopped:
            make(name)
    defaults = {name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()}
    return defaults | stopped.value.args[0]


def small(name, **options):
    """One block, four channels a head, few pixels and classes; else as it is."""
    given = dict(depth=1, embed_dim=4 * arguments(name)["num_heads"], num_classes=7, img_size=12, patch_size=4)
    return make(name, **{**given, **options})


def card(model, path):
    """The `config.json` that timm writes for it."""
    save_config_for_hf(model, path / "config.json")
    return json.loads((path / "config.json").read_text())


def understand(model, **kw):
    tensors = {name: containers.Tensor(tuple(p.shape), np.dtype(np.float32), lambda p=p: p.detach().numpy())
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
            if re.search(r"norm.*weight|gamma", name):
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


# Of each kind one that must not be refused.
LOADS = {"vit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_distilled_patch16_224", "deit3_large_patch16_224",
         "flexivit_small", "test_vit", "vit_so400m_patch14_siglip_224", "vit_so400m_patch16_siglip_gap_256",
         "vit_base_patch16_gap_224", "vit_small_patch14_dinov2", "vit_base_patch32_plus_256",
         "vit_huge_patch14_gap_224", "vit_small_patch14_reg4_dinov2", "vit_large_patch14_reg4_dinov2",
         "vit_base_patch14_reg1_tipsv2", "vit_so150m_patch16_reg4_gap_256", "vit_so150m_patch16_reg4_map_256"}


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name, tmp_path):
    model = small(name)
    loads = right_or_refused(model, config=card(model, tmp_path))
    assert loads or name not in LOADS
    if loads:  # the arrays alone, which are of no published model
        with pytest.raises(FormatError, match="says num_heads.*; give num_heads"):
            understand(model)
        right_or_refused(model, num_heads=arguments(name)["num_heads"])


@pytest.mark.parametrize("name", list_models("*rope*"))
def test_rotary_positions_are_refused(name, tmp_path):
    """Some leave no trace in arrays: such a file is one of DeiT-III's, by its names and shapes."""
    model = make(name)
    for said in ({}, card(model, tmp_path)):
        with pytest.raises(FormatError):
            understand(model, config=said, gelu="erf", layer_norm_eps=1e-6,
                       **{} if said == {} else {"num_heads": 6, "posemb": "learn"})


def test_heads_are_guessed_of_published_sizes_only():
    published, seen = {tuple(sizes): heads for *sizes, heads in PUBLISHED}, set()
    for name in NAMES:
        its = arguments(name)
        sizes = its["embed_dim"], its["depth"], int(its["embed_dim"] * its["mlp_ratio"])
        if its["class_token"] and not its["reg_tokens"] and sizes in published:
            assert published[sizes] == its["num_heads"], name
            seen.add(sizes)
    assert seen == published.keys()


def test_a_guess_is_right_and_said():
    """Twelve blocks, as published, and nothing but arrays."""
    model = make("deit_tiny_patch16_224", img_size=48)
    assert understand(model).doubts == (
        "num_heads=3, layer_norm_eps=1e-06, gelu='erf', pool_type='tok', grid=(3, 3) assumed, as all published models "
        "of this kind have it; the file does not say",)
    assert right_or_refused(model)


OPTIONS = [
    dict(global_pool="avg"), dict(global_pool="avg", fc_norm=False), dict(global_pool="avg", class_token=False),
    dict(global_pool="avg", fc_norm=False, class_token=False), dict(global_pool="map", class_token=False),
    dict(global_pool="map"), dict(global_pool="prr"), dict(global_pool="max", fc_norm=False, class_token=False),
    dict(global_pool="avgmax", fc_norm=False, class_token=False), dict(global_pool="", class_token=False),
    dict(global_pool=""), dict(global_pool="avg", fc_norm=False, pool_include_prefix=True), dict(fc_norm=True),
    dict(no_embed_class=True), dict(no_embed_class=True, img_size=(16, 24)), dict(img_size=(16, 24)),
    dict(img_size=20), dict(no_embed_class=True, img_size=20), dict(reg_tokens=1),
    dict(reg_tokens=4, no_embed_class=True), dict(reg_tokens=4, init_values=0.1),
    dict(reg_tokens=2, global_pool="avg", fc_norm=False, class_token=False), dict(reg_tokens=2, global_pool=""),
    dict(reg_tokens=2, global_pool="map", class_token=False, no_embed_class=True),
    dict(reg_tokens=2, global_pool="avg", fc_norm=False, class_token=False, pool_include_prefix=True),
    dict(init_values=0.1), dict(act_layer="gelu_tanh"), dict(act_layer="silu"), dict(act_layer="quick_gelu"),
    dict(norm_layer="layernorm"), dict(norm_layer="rmsnorm"), dict(qk_norm=True), dict(qkv_bias=False),
    dict(proj_bias=False), dict(pre_norm=True), dict(final_norm=False), dict(dynamic_img_size=True), dict(num_heads=2),
    dict(num_heads=1), dict(mlp_ratio=3), dict(patch_size=2), dict(in_chans=1), dict(pos_embed="none"),
    dict(pos_embed=""), dict(attn_layer="diff"), dict(attn_layer="attn"), dict(scale_attn_norm=True),
    dict(scale_mlp_norm=True), dict(drop_rate=0.5, drop_path_rate=0.5, attn_drop_rate=0.5, patch_drop_rate=0.5),
    dict(num_classes=0), dict(embed_norm_layer="layernorm"), dict(fix_init=True, weight_init="jax")]
REFUSED = ("qk_norm", "qkv_bias", "proj_bias", "pre_norm", "final_norm", "pos_embed", "scale_attn_norm",
           "scale_mlp_norm", "embed_norm_layer", "pool_include_prefix")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options, tmp_path):
    model = small("vit_tiny_patch16_224", **options)
    said = card(model, tmp_path)
    loads = right_or_refused(model, config=said)
    plain = not any(name in options for name in REFUSED) and options.get("attn_layer") != "diff"
    plain &= options.get("norm_layer") != "rmsnorm" and options.get("act_layer") not in ("silu", "quick_gelu")
    if "global_pool" not in options and "fc_norm" not in options:
        assert loads == plain


def test_no_option_of_timms_is_unknown():
    """A new one fails here, until `cards` has a rule for it."""
    for function, rules in ((VisionTransformer, cards.ARGUMENTS), (VisionTransformerDistilled, cards.ARGUMENTS),
                            (PretrainedCfg, cards.PRETRAINED)):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD or parameter.kind is parameter.VAR_POSITIONAL:
                continue
            rule = rules[name]
            if isinstance(rule, cards.Only) and parameter.default is not None and not isinstance(
                    parameter.default, type):
                assert parameter.default in rule.values
            elif isinstance(rule, cards.Tells) and parameter.default is not None:
                rule.read(parameter.default)
