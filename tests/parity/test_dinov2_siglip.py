"""DINOv2 and SigLIP: the features of transformers and of Meta's own files, to 1e-5, or a refusal by name."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cb_vit
from cb_vit.models.vit import Model
from cb_vit.tree import unflatten_names
from cb_vit.weights import containers, open_weights
from cb_vit.weights.containers import FormatError
from cb_vit.weights.dialects import cards
from cb_vit.weights.dialects.conversion import convert

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402
from transformers import (  # noqa: E402
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* assumed")  # files that do not say all of their model

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, image_size=12, patch_size=4)
TOWER = SIZES | dict(intermediate_size=80)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99,
            bos_token_id=1, eos_token_id=2)


def randomise(model):
    """All parameters random, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.5 / np.sqrt(p[0].numel()) if p.ndim in (2, 4) else 0.3
            one = "norm" in name and name.endswith("weight") or "lambda1" in name or "gamma" in name
            p.copy_(torch.randn(p.shape, generator=generator) * scale + one)
    return model.eval()


def dinov2(kind=Dinov2Model, **options):
    return randomise(kind(kind.config_class(**SIZES | options)))


def siglip(kind, **options):
    if kind is SiglipVisionModel:
        return randomise(kind(SiglipVisionConfig(**TOWER | options)))
    return randomise(kind(SiglipConfig(vision_config=TOWER | options, text_config=TEXT, num_labels=5)))


def images(size=(12, 12)):
    return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


def theirs(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x).permute(0, 3, 1, 2))


def assert_close(found, expected, rtol=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


def ours(folder, x, **given):
    """The model, what it gives, and its features."""
    model, params = cb_vit.load(folder, **given)
    found, out = jax.jit(model.apply)({"params": params}, jnp.asarray(x))
    return model, found, out["encoded"]


@pytest.mark.parametrize("kind, options", [
    (Dinov2Model, {}), (Dinov2Model, dict(use_mask_token=False)), (Dinov2Model, dict(hidden_act="gelu_new")),
    (Dinov2Model, dict(layer_norm_eps=1e-2, mlp_ratio=3)), (Dinov2Model, dict(num_attention_heads=12)),
    (Dinov2Model, dict(layerscale_value=0.1, drop_path_rate=0.5, hidden_dropout_prob=0.5)),
    (Dinov2Model, dict(image_size=8, patch_size=2)), (Dinov2WithRegistersModel, {}),
    (Dinov2WithRegistersModel, dict(num_register_tokens=1, num_attention_heads=2))], ids=str)
def test_dinov2_of_transformers(kind, options, tmp_path):
    model = dinov2(kind, **options)
    model.save_pretrained(tmp_path)
    size = options.get("image_size", 12)
    expected = theirs(model, images((size, size)))
    loaded, pooled, encoded = ours(tmp_path, images((size, size)))
    assert_close(encoded, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)
    registers = options.get("num_register_tokens", 4) if kind is Dinov2WithRegistersModel else 0
    assert loaded.config.registers == registers and loaded.config.pool_type == "tok"
    assert loaded.config.layer_norm_eps == options.get("layer_norm_eps", 1e-6)
    notes = open_weights(tmp_path, "").notes
    assert any("mask_token' is left in the file" in note for note in notes) == options.get("use_mask_token", True)


def test_a_key_that_is_not_there_is_transformers_default(tmp_path):
    for i, (kind, config) in enumerate(((Dinov2Model, Dinov2Config), (Dinov2WithRegistersModel,
                                                                      Dinov2WithRegistersConfig))):
        folder = tmp_path / str(i)
        model = dinov2(kind, num_attention_heads=12)
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": config.model_type, "image_size": 12}))
        assert_close(ours(folder, images())[2], theirs(model, images()).last_hidden_state)


def test_a_backbone_and_a_model_that_has_one(tmp_path):
    backbone = dinov2(Dinov2Backbone)
    backbone.save_pretrained(tmp_path / "a")
    x = images()
    expected = theirs(backbone, x).feature_maps[-1].numpy().transpose(0, 2, 3, 1)
    assert_close(ours(tmp_path / "a", x)[2][:, 1:].reshape(expected.shape), expected)
    arrays = {f"backbone.{name}": value.numpy() for name, value in _saved(tmp_path / "a").items()}
    (tmp_path / "b").mkdir()
    containers.write_safetensors(tmp_path / "b" / "model.safetensors", arrays | {"neck.fusion_stage.x": np.ones(1)})
    nested = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model_type": "depth_anything", "backbone_config": nested}))
    with pytest.raises(FormatError, match="a model of depth .*a ViT is in 'backbone': choose with prefix"):
        cb_vit.load(tmp_path / "b")
    assert_close(ours(tmp_path / "b", x, prefix="backbone")[2], ours(tmp_path / "a", x)[2])


def _saved(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind, part", [(Dinov2ForImageClassification, "dinov2"),
                                        (Dinov2WithRegistersForImageClassification, "dinov2_with_registers")])
def test_the_head_of_transformers_dinov2_is_none_of_ours(kind, part, tmp_path):
    model = dinov2(kind, num_labels=5)
    model.save_pretrained(tmp_path)
    match = f"a DINOv2 with a head that reads the class token beside.*a ViT is in '{part}': choose with prefix"
    with pytest.raises(FormatError, match=match):
        cb_vit.load(tmp_path)
    expected = theirs(getattr(model, part), images()).last_hidden_state
    assert_close(ours(tmp_path, images(), prefix=part)[2], expected)


@pytest.mark.parametrize("kind, options, match", [
    (Dinov2Model, dict(use_swiglu_ffn=True), "a ViT with gated MLPs"),
    (Dinov2WithRegistersModel, dict(use_swiglu_ffn=True), "a ViT with gated MLPs"),
    (Dinov2Model, dict(qkv_bias=False), "lacks .*query.bias"),
    (Dinov2Model, dict(hidden_act="silu"), "hidden_act='silu', which is not supported")], ids=str)
def test_what_is_none_of_ours_is_refused(kind, options, match, tmp_path):
    dinov2(kind, **options).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=match):
        cb_vit.load(tmp_path)


@pytest.mark.parametrize("change, match", [
    (dict(num_register_tokens=0), "says registers=0, but the file has 4"),
    (dict(model_type="dinov2"), "says registers=0, but the file has 4"),
    (dict(model_type="vit"), "model_type='vit', which is not supported with these arrays; supported is 'dinov2' or"),
    (dict(hidden_size=32), "width=32"),
    (dict(num_register_tokens=-1), "num_register_tokens=-1, which cannot be")], ids=str)
def test_a_card_that_contradicts_the_arrays(change, match, tmp_path):
    dinov2(Dinov2WithRegistersModel).save_pretrained(tmp_path)
    card = json.loads((tmp_path / "config.json").read_text()) | change
    if change.get("model_type") == "dinov2":
        del card["num_register_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match=match):
        cb_vit.load(tmp_path)


@pytest.mark.parametrize("kind, rtol", [(Dinov2WithRegistersModel, 1e-5), (SiglipVisionModel, None)])
def test_another_size_of_images_with_antialiasing(kind, rtol, tmp_path):
    """As transformers resizes positions where it antialiases; and not where it does not."""
    model = dinov2(kind) if kind is Dinov2WithRegistersModel else siglip(kind)
    model.save_pretrained(tmp_path)
    x = images((8, 8))
    more = {} if kind is Dinov2WithRegistersModel else dict(interpolate_pos_encoding=True)
    with torch.no_grad():
        expected = model(torch.from_numpy(x).permute(0, 3, 1, 2), **more).last_hidden_state.numpy()
    found = np.asarray(ours(tmp_path, x, image_size=8)[2])
    if rtol:
        assert_close(found, expected, rtol)
    else:
        assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


def test_another_size_of_images_as_dinov2_and_siglip_have_it(tmp_path):
    """Without antialiasing: `posemb_resize="bicubic"`."""
    for i, (model, more) in enumerate((
            (dinov2(), {}), (siglip(SiglipVisionModel), dict(interpolate_pos_encoding=True)))):
        folder, x = tmp_path / str(i), images((8, 20))
        model.save_pretrained(folder)
        with torch.no_grad():
            expected = model(torch.from_numpy(x).permute(0, 3, 1, 2), **more).last_hidden_state
        module, _ = cb_vit.load(folder)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(x))["params"]
        init = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        params, _ = cb_vit.merge(init, folder, module.config, posemb_resize="bicubic", image_size=(8, 20))
        assert_close(module.apply({"params": params}, jnp.asarray(x))[1]["encoded"], expected)


def understand(state, **kw):
    arrays = {name: value.numpy() for name, value in state.items()}
    found = convert({name: containers.Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()},
                    path="file", **kw)
    params = jax.tree.map(jnp.asarray, unflatten_names({name: t.read() for name, t in found.params.items()}))
    return found, Model(found.num_classes, **found.model), params


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_metas_own_files_as_timm_takes_them(registers, chunked):
    """timm's converter of those files is the reference; the names of chunks are those of the training checkpoints."""
    model = randomise(VisionTransformer(
        img_size=12, patch_size=4, embed_dim=48, depth=3, num_heads=6, num_classes=0, init_values=1.0,
        reg_tokens=registers, no_embed_class=registers > 0))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.full((1, 1, 48), 0.7), state["pos_embed"]], 1)
    state["mask_token"] = torch.ones(1, 48)
    model.load_state_dict(checkpoint_filter_fn({name: value.clone() for name, value in state.items()}, model))
    if chunked:
        chunks = {0: 0, 1: 0, 2: 1}
        chunked = lambda name: f"blocks.{chunks[int(name.split('.')[1])]}.{name.removeprefix('blocks.')}"  # noqa: E731
        state = {chunked(name) if "blocks." in name else name: value for name, value in state.items()}
    found, ours, params = understand(state, num_heads=6)
    assert found.format == "dinov2" and found.model["gelu"] == "erf" and found.model.get("registers", 0) == registers
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(images()).permute(0, 3, 1, 2)).numpy()
    pooled, out = ours.apply({"params": params}, jnp.asarray(images()))
    assert_close(out["encoded"], expected)
    assert_close(pooled, expected[:, 0])
    assert any("'mask_token' is left in the file" in note for note in found.notes)


def test_a_training_checkpoint_of_metas(tmp_path):
    model = randomise(VisionTransformer(img_size=12, patch_size=4, embed_dim=48, depth=2, num_heads=6, num_classes=0,
                                        init_values=1.0))
    backbone = {f"backbone.{name.replace('blocks.', 'blocks.0.')}": value for name, value in model.state_dict().items()}
    teacher = backbone | {"backbone.mask_token": torch.ones(1, 48), "dino_head.mlp.0.weight": torch.ones(3, 3)}
    torch.save({"teacher": teacher}, tmp_path / "teacher.pth")
    loaded, params = cb_vit.load(tmp_path / "teacher.pth", key="teacher", prefix="backbone", num_heads=6)
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(images()).permute(0, 3, 1, 2))
    assert_close(loaded.apply({"params": params}, jnp.asarray(images()))[1]["encoded"], expected)


@pytest.mark.parametrize("options", [
    {}, dict(num_attention_heads=12), dict(hidden_act="gelu"), dict(layer_norm_eps=1e-2), dict(attention_dropout=0.5),
    dict(image_size=8, patch_size=2), dict(intermediate_size=48)], ids=str)
def test_siglips_image_tower_of_transformers(options, tmp_path):
    """Alone, under the names of before transformers 5, and among two towers: the same model."""
    model, size = siglip(SiglipVisionModel, **options), options.get("image_size", 12)
    model.save_pretrained(tmp_path / "tower")
    x = images((size, size))
    expected = theirs(model, x)
    loaded, pooled, encoded = ours(tmp_path / "tower", x)
    assert_close(encoded, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)
    assert loaded.config.pool_type == "map" and loaded.config.gelu == ("erf" if "hidden_act" in options else "tanh")

    both = siglip(SiglipModel, **options)
    both.vision_model.load_state_dict(model.state_dict())
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(FormatError, match="pair of towers.*a ViT is in 'vision_model': choose with prefix"):
        cb_vit.load(tmp_path / "both")
    assert_close(ours(tmp_path / "both", x, prefix="vision_model")[1], expected.pooler_output)

    (tmp_path / "old").mkdir()
    old = {f"vision_model.{name}": value.numpy() for name, value in _saved(tmp_path / "tower").items()}
    containers.write_safetensors(tmp_path / "old" / "model.safetensors", old)
    (tmp_path / "old" / "config.json").write_text((tmp_path / "tower" / "config.json").read_text())
    assert_close(ours(tmp_path / "old", x)[1], expected.pooler_output)


def test_siglip_without_its_head_and_with_a_classifier(tmp_path):
    bare = siglip(SiglipVisionModel, vision_use_head=False)
    bare.save_pretrained(tmp_path / "bare")
    loaded, tokens, _ = ours(tmp_path / "bare", images())
    assert loaded.config.pool_type == "none"
    assert_close(tokens, theirs(bare, images()).last_hidden_state)
    classifier = siglip(SiglipForImageClassification)
    classifier.save_pretrained(tmp_path / "classifier")
    loaded, logits, _ = ours(tmp_path / "classifier", images())
    assert loaded.num_classes == 5 and loaded.config.pool_type == "gap"
    assert_close(logits, theirs(classifier, images()).logits)


def test_siglip_2_of_any_shape_is_refused_by_name(tmp_path):
    tower = {name: value for name, value in TOWER.items() if name != "image_size"} | dict(num_patches=9)
    Siglip2Model(Siglip2Config(vision_config=tower, text_config=TEXT)).save_pretrained(tmp_path)
    for prefix in (None, "vision_model"):
        with pytest.raises(FormatError, match=r"a SigLIP 2 for images of any shape \(NaFlex\)"):
            cb_vit.load(tmp_path, prefix=prefix)


@pytest.mark.parametrize("config, kinds", [
    (Dinov2Config, ("dinov2",)), (Dinov2WithRegistersConfig, ("dinov2_with_registers",)),
    (SiglipVisionConfig, ("siglip_vision_model", "siglip")), (SiglipConfig, ("siglip_vision_model", "siglip"))])
def test_no_key_of_a_config_is_unknown(config, kinds):
    """A new one fails here, until `cards` has a rule for it."""
    said = json.loads(config(id2label={0: "a", 1: "b"}).to_json_string(use_diff=False))
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields | said.keys() <= cards.CONFIG.keys()
    defaults = cards.huggingface({"model_type": config.model_type}, "file", kinds).model
    patch = 14 if config is Dinov2Config else 16
    sizes = {"width": 768, "depth": 12, "patch_size": (patch, patch)}
    sizes |= {"mlp_dim": 3072} if kinds[0].startswith("siglip") else {}
    assert cards.huggingface(said, "file", kinds).model == defaults | sizes
