"""Files of timm and transformers of other families: each refused by its right name, or at least by no wrong one."""
import re

import numpy as np
import pytest

from cb_vit.weights.containers import FormatError, Tensor, open_file
from cb_vit.weights.dialects.conversion import convert
from cb_vit.weights.dialects.families import name_family

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

NAMED = {
    "beit": "a BEiT", "cait": "a CaiT", "coat": "a CoaT", "convit": "a ConViT", "convnext": "a ConvNeXt",
    "crossvit": "a CrossViT", "edgenext": "an EdgeNeXt", "efficientnet": "an EfficientNet", "eva": "an EVA",
    "focalnet": "a FocalNet", "gcvit": "a GCViT", "hiera": "a Hiera", "hieradet_sam2": "a Hiera", "hrnet": "an HRNet",
    "levit": "a LeViT", "maxxvit": "a MaxViT", "mlp_mixer": "an MLP-Mixer",
    "mobilenetv3": "an EfficientNet or MobileNet", "mobilevit": "a MobileViT",
    "mvitv2": "an MViT", "naflexvit": "a NaFlexViT", "nest": "a NesT", "pit": "a PiT",
    "pvt_v2": "a PVT", "regnet": "a RegNet", "resnet": "a ResNet", "resnetv2": "a ResNet", "swin_transformer": "a Swin",
    "swin_transformer_v2": "a Swin Transformer V2", "swin_transformer_v2_cr": "a Swin Transformer V2",
    "tiny_vit": "a TinyViT", "tnt": "a TNT", "twins": "a Twins", "vision_transformer_hybrid": "a hybrid",
    "vision_transformer_relpos": "a ViT with relative", "vision_transformer_sam": "the image encoder of a SAM",
    "vitamin": "a hybrid", "volo": "a VOLO", "xcit": "an XCiT"}
# Of other modules a name may say what there is besides convolutions, or nothing.
VAGUE = {None, "a network of stages", "a ResNet or one of its kin", "an EfficientNet or MobileNet",
         "a ViT with gated MLPs (SwiGLU)", "an MLP-Mixer or one of its kin"}
PLAIN = ("vision_transformer", "deit")
SPECIAL = {  # timm's more telling models, and what they are
    "regnety_160": "a RegNet", "vit_small_patch14_dinov2": None, "vit_small_patch14_reg4_dinov2": None,
    "eva02_tiny_patch14_224": "an EVA", "eva02_base_patch16_clip_224": "an EVA", "convnext_tiny_hnf": "a ConvNeXt",
    "vit_base_patch16_clip_224": "a ViT with a norm before", "vit_base_patch16_siglip_224": None,
    "vit_small_r26_s32_224": "a hybrid", "beit3_base_patch16_224": "a ViT that pools",
    "coatnext_nano_rw_224": "a MaxViT",
    "vit_small_patch16_dinov3": "a DINOv3", "vit_giant_patch14_reg4_dinov2": None,
    "aimv2_large_patch14_224": "a ViT with gated MLPs"}


def tensors(state):
    """Empty arrays of the same names and dimensions."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return {name: Tensor(shape, np.dtype("f4"), lambda: np.zeros(1)) for name, shape in shapes.items()}


def create(name):
    with torch.device("meta"):
        return tensors(timm.create_model(name, pretrained=False).state_dict())


def modules():
    """The model with the shortest name of each module of timm's."""
    found = {}
    for name in sorted(timm.list_models(), key=lambda name: (len(name), name)):
        found.setdefault(timm.models.model_entrypoint(name).__module__.split(".")[-1], name)
    return found


def refused(names):
    with pytest.raises(FormatError) as error:
        convert(names, path="file")
    return re.search("it seems to be (.*), which is not supported", str(error.value))


@pytest.mark.parametrize("module, name", sorted(modules().items()))
def test_a_module_of_timms(module, name):
    names = create(name)
    found = name_family(names)
    if module in PLAIN:
        assert found is None
        return
    if module in NAMED:
        assert found and found.startswith(NAMED[module]), found
    else:
        assert found in VAGUE, found
    seems = refused(names)
    assert found is None or seems and seems[1] == found


@pytest.mark.parametrize("name", SPECIAL)
def test_a_telling_model_of_timms(name):
    found = name_family(create(name))
    assert found == SPECIAL[name] if found is None else SPECIAL[name] and found.startswith(SPECIAL[name])


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
             patch_size=8)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
TOWERS = dict(vision_config=SIZES, text_config=TEXT, projection_dim=16)
STAGES = dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32, patch_size=4, window_size=2)
NETWORK = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
TRANSFORMERS = {
    "CLIPModel": (TOWERS, "a CLIP"), "CLIPVisionModel": (SIZES, "the image tower of a CLIP"),
    "SiglipModel": (TOWERS, "a CLIP"),
    "ViTMAEForPreTraining": (SIZES | dict(
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64), "a masked autoencoder (MAE)"),
    "SwinForImageClassification": (STAGES, "a Swin Transformer"),
    "Swinv2ForImageClassification": (STAGES, "a Swin Transformer V2"),
    "ConvNextForImageClassification": (dict(hidden_sizes=[8] * 4, depths=[1] * 4), "a ConvNeXt"),
    "ResNetForImageClassification": (NETWORK, "a ResNet"),
    "RegNetForImageClassification": (NETWORK | dict(groups_width=8), "a RegNet"),
    "BeitForImageClassification": (SIZES, "a BEiT"), "BeitForMaskedImageModeling": (SIZES, "a BEiT"),
    "Data2VecVisionForImageClassification": (SIZES, "a data2vec"),
    "Dinov2ForImageClassification": (SIZES, "a DINOv2 with a head"), "DINOv3ViTModel": (SIZES, "a DINOv3"),
    "ViTForMaskedImageModeling": (SIZES | dict(encoder_stride=8), "a ViT of masked images"),
    "YolosModel": (SIZES | dict(image_size=[32, 32]), "a detector"), "VideoMAEModel": (SIZES, "a model of video"),
    "BertModel": (TEXT, "a model of text"),
    "T5Model": (dict(d_model=32, d_ff=32, num_layers=1, vocab_size=99), "a model of text"),
    "GPT2LMHeadModel": (dict(n_embd=32, n_layer=1, n_head=2, vocab_size=99), "a model of text"),
    "LlamaForCausalLM": (TEXT, "a model of text")}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_model_of_transformers(kind, tmp_path):
    """As it is saved, which need not have the names that it has in memory."""
    transformers = pytest.importorskip("transformers")
    config, family = TRANSFORMERS[kind]
    cls = getattr(transformers, kind)
    cls(cls.config_class(**config)).save_pretrained(tmp_path)
    found = refused(open_file(tmp_path).tensors)
    assert found and found[1].startswith(family), found
    longer = [other for _, other in TRANSFORMERS.values() if len(other) > len(family) and other.startswith(family)]
    assert not any(found[1].startswith(other) for other in longer)
