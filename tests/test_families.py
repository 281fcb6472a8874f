"""Files of other families by their right names, and none mistaken for another, or a plain ViT for any of them."""
import time

import numpy as np
import pytest

from cb_vit.weights.containers import FormatError, Tensor
from cb_vit.weights.dialects.conversion import convert
from cb_vit.weights.dialects.families import ROWS, name_family

TIMM = ("cls_token 3", "pos_embed 3", "patch_embed.proj.weight 4", "blocks.0.norm1.weight 1",
        "blocks.0.attn.qkv.weight 2", "blocks.0.attn.proj.weight 2", "blocks.0.mlp.fc1.weight 2", "norm.weight 1")
HF = ("vit.embeddings.cls_token 3", "vit.embeddings.position_embeddings 3",
      "vit.embeddings.patch_embeddings.projection.weight 4", "vit.encoder.layer.0.layernorm_before.weight 1",
      "vit.encoder.layer.0.attention.attention.query.weight 2", "vit.layernorm.weight 1", "classifier.weight 2")
BIG_VISION = ("cls", "embedding/kernel 4", "Transformer/encoderblock_0/LayerNorm_0/scale",
              "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel 2", "Transformer/encoder_norm/scale", "head/kernel")
WITH_HF = lambda *names: tuple(name.removeprefix("vit.") for name in HF[:3]) + names  # noqa: E731

DINOV2 = WITH_HF("embeddings.mask_token 2", "encoder.layer.0.norm1.weight",
                 "encoder.layer.0.attention.attention.query.weight 2", "encoder.layer.0.mlp.fc1.weight 2",
                 "encoder.layer.0.layer_scale1.lambda1", "layernorm.weight")
SIGLIP = ("embeddings.patch_embedding.weight 4", "embeddings.position_embedding.weight 2",
          "encoder.layers.0.layer_norm1.weight", "encoder.layers.0.self_attn.q_proj.weight 2",
          "encoder.layers.0.mlp.fc1.weight 2", "post_layernorm.weight")

# The names of each are those of a published file, few of them.
FAMILIES = {
    "a LoRA adapter": [
        ("base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight 2",),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight 4",),
        (*TIMM, "blocks.0.attn.qkv.lora_B.default.weight 2")],
    "quantised": [(*HF, "vit.encoder.layer.0.attention.attention.query.SCB"), ("model.layers.0.mlp.down_proj.qweight",),
                  (*HF, "vit.encoder.layer.0.intermediate.dense.weight.absmax")],
    "the state of an optimiser": [("state.0.exp_avg", "state.0.exp_avg_sq"), ("opt/0/mu/head/kernel", "chrono/x")],
    "a model of video": [("videomae.embeddings.patch_embeddings.projection.weight 5", "videomae.encoder.layer.0.x"),
                         (*TIMM[3:], "patch_embed.proj.weight 5", "blocks.0.attn.q_bias")],
    "a diffusion transformer": [("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight", "pos_embed")],
    "a diffusion model": [
        ("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
        ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight")],
    "a VAE": [("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"),
              ("encoder.down.0.block.0.conv1.weight", "post_quant_conv.weight")],
    "a SAM 2": [("image_encoder.trunk.pos_embed_window", "sam_mask_decoder.x", "memory_encoder.x")],
    "a SAM (Segment": [
        ("image_encoder.blocks.0.attn.qkv.weight", "image_encoder.blocks.0.attn.rel_pos_h",
         "image_encoder.neck.0.weight", "mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"),
        ("vision_encoder.layers.0.attn.rel_pos_h", "shared_image_embedding.positional_embedding", "mask_decoder.x")],
    "the image encoder of a SAM": [(*TIMM[1:], "blocks.0.attn.rel_pos_h", "neck.0.weight")],
    "a TNT": [("pixel_embed.proj.weight", "blocks.0.attn_in.qk.weight", "blocks.0.proj.weight")],
    "a Hiera": [(*TIMM[1:], "blocks.2.proj.weight", "head.fc.weight")],
    "a detector": [("backbone.model.layer1.0.conv1.weight", "class_labels_classifier.weight"),
                   ("vit.embeddings.detection_tokens", "vit.encoder.layer.0.layernorm_before.weight")],
    "a model of depth": [("backbone.embeddings.mask_token", "backbone.encoder.layer.0.layer_scale1.lambda1",
                          "neck.reassemble_stage.layers.0.projection.weight")],
    "a model of text with images": [("vision_tower.vision_model.pre_layrnorm.weight", "language_model.model.x")],
    "a SigLIP 2 for images of any shape (NaFlex)": [
        ("vision_model.head.probe", "vision_model.embeddings.patch_embedding.weight 2", "logit_scale",
         "text_model.embeddings.token_embedding.weight"),
        (*(name.replace(" 4", " 2") for name in SIGLIP), "encoder.layers.0.self_attn.q_proj.weight 2")],
    "a CLIP": [
        ("visual.conv1.weight", "visual.ln_pre.weight", "transformer.resblocks.0.attn.in_proj_weight",
         "text_projection 2", "logit_scale"),
        ("visual.trunk.blocks.0.attn.qkv.weight", "text.token_embedding.weight", "logit_scale"),
        ("vision_model.pre_layrnorm.weight", "text_model.embeddings.token_embedding.weight"),
        (*(f"vision_model.{name}" for name in SIGLIP), "text_model.embeddings.token_embedding.weight", "logit_bias"),
        ("module.visual.layer1.0.conv1.weight", "module.token_embedding.weight", "module.logit_scale")],
    "the image tower of a CLIP": [
        ("visual.class_embedding", "visual.ln_pre.weight", "visual.transformer.resblocks.0.attn.in_proj_weight"),
        ("vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight",
         "vision_model.encoder.layers.0.self_attn.k_proj.weight")],
    "a model of text": [
        ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"),
        ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"), ("wte.weight", "h.0.attn.c_attn.weight"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")],
    "a DINOv3": [("storage_tokens", "rope_embed.periods", "blocks.0.ls1.gamma", "mask_token"),
                 ("embeddings.register_tokens", "embeddings.patch_embeddings.weight", "embeddings.mask_token",
                  "layer.0.layer_scale1.lambda1"),
                 (*(name for name in TIMM if name != "pos_embed 3"), "reg_token 3", "blocks.0.gamma_1")],
    "a DINOv2 with a head that reads the class token beside the mean of patches": [
        (*(f"dinov2.{name}" for name in DINOV2), "classifier.weight 2"),
        (*(f"dinov2_with_registers.{name}" for name in DINOV2), "classifier.bias")],
    "an iBOT": [(*TIMM, "masked_embed")],
    "a masked autoencoder (MAE)": [
        (*TIMM, "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight"),
        (*HF, "decoder.mask_token", "decoder.decoder_layers.0.layernorm_before.weight")],
    "a ViT in the names that transformers 5 has in memory": [
        ("vit.embeddings.cls_token 3", "vit.layers.0.attention.q_proj.weight 2", "vit.layers.0.mlp.fc1.weight 2"),
        (*DINOV2, "encoder.layer.0.attention.q_proj.weight 2")],
    "a data2vec": [("data2vec_vision.embeddings.cls_token", "data2vec_vision.encoder.layer.0.lambda_1")],
    "a Swin Transformer V2": [
        ("patch_embed.proj.weight", "layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.q_bias"),
        ("swinv2.encoder.layers.0.blocks.0.attention.self.logit_scale",)],
    "a BEiT": [
        (*TIMM, "blocks.0.gamma_1", "blocks.0.attn.q_bias", "blocks.0.attn.relative_position_bias_table"),
        (*TIMM, "mask_token", "lm_head.weight", "blocks.0.attn.q_bias", "rel_pos_bias.relative_position_bias_table"),
        ("beit.embeddings.cls_token", "beit.encoder.layer.0.lambda_1")],
    "an EVA": [(*TIMM, "blocks.0.attn.q_bias", "fc_norm.weight"),
               (*TIMM[:4], "blocks.0.attn.q_proj.weight", "blocks.0.mlp.fc1_g.weight")],
    "a ViT of masked images": [("encoder.mask_token", "encoder.blocks.0.attn.qkv.weight", "decoder.0.weight"),
                               (*HF, "vit.embeddings.mask_token", "decoder.0.weight")],
    "a ViT of torchvision": [("class_token", "conv_proj.weight", "encoder.pos_embedding",
                              "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "heads.head.weight")],
    "a NaFlexViT": [(*TIMM[3:], "embeds.proj.weight", "embeds.pos_embed")],
    "a hybrid": [(*TIMM, "patch_embed.backbone.stem.conv.weight"), (*BIG_VISION, "conv_root/kernel")],
    "a ViT with gated MLPs (SwiGLU)": [
        (*TIMM, "blocks.0.mlp.w12.weight"), (*TIMM, "register_tokens", "mask_token 2", "blocks.0.0.mlp.w12.weight"),
        (*DINOV2, "encoder.layer.0.mlp.weights_in.weight")],
    "a ViT with norms on queries and keys": [(*TIMM, "blocks.0.attn.q_norm.weight")],
    "a TinyViT": [("patch_embed.seq.0.c.weight", "layers.1.blocks.0.local_conv.c.weight",
                   "layers.1.blocks.0.attn.attention_biases", "layers.1.blocks.0.attn.qkv.weight")],
    "a FocalNet": [("layers.0.blocks.0.modulation.f.weight",)],
    "a PVT": [("stages.0.blocks.0.attn.sr.weight",)],
    "a Swin Transformer": [
        ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "layers.0.downsample.reduction.weight"),
        ("swin.embeddings.norm.weight", "swin.encoder.layers.0.blocks.0.attention.self.query.weight")],
    "a CaiT": [(*TIMM, "blocks.0.gamma_1", "blocks.0.attn.proj_l.weight", "blocks_token_only.0.gamma_1")],
    "a PiT": [("patch_embed.conv.weight", "transformers.0.blocks.0.attn.qkv.weight", "pos_embed")],
    "an XCiT": [(*TIMM[3:], "cls_token", "cls_attn_blocks.0.attn.qkv.weight", "blocks.0.local_mp.conv1.weight")],
    "a LeViT": [("patch_embed.0.c.weight", "blocks.0.m.qkv.c.weight", "blocks.0.m.attention_biases"),
                ("levit.encoder.stages.0.layers.0.module.attention_biases",)],
    "a ConViT": [(*TIMM, "blocks.0.attn.gating_param", "blocks.0.attn.pos_proj.weight")],
    "a CrossViT": [("pos_embed_0", "blocks.0.blocks.0.0.attn.qkv.weight")],
    "a VOLO": [("network.0.0.attn.v.weight", "post_network.0.attn.kv.weight", "pos_embed")],
    "a NesT": [("levels.0.transformer_encoder.0.attn.qkv.weight", "levels.0.pos_embed")],
    "a Twins": [("patch_embeds.0.proj.weight", "blocks.0.0.attn.qkv.weight", "pos_block.0.proj.0.weight")],
    "a CoaT": [("crpe1.conv_list.0.weight",)],
    "an MViT": [("blocks.0.attn.pool_q.weight", "blocks.0.attn.norm_q.weight", "blocks.0.attn.rel_pos_h")],
    "a GCViT": [("stages.0.global_block.blocks.0.attn.rel_pos.relative_position_bias_table",)],
    "a MaxViT": [("stages.0.blocks.0.attn_grid.attn.qkv.weight",)],
    "a MobileViT": [("stages.2.1.transformer.0.attn.qkv.weight",), ("mobilevit.conv_stem.convolution.weight",)],
    "an EdgeNeXt": [("stages.0.blocks.0.conv_dw.weight", "stages.1.blocks.2.xca.qkv.weight")],
    "an MLP-Mixer": [("MixerBlock_0/LayerNorm_0/scale",), ("stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight")],
    "a ConvNeXt": [
        ("stages.0.blocks.0.conv_dw.weight", "head.fc.weight", "norm_pre.weight"),
        ("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.0.0.pwconv1.weight"),
        ("convnext.encoder.stages.0.layers.0.dwconv.weight",)],
    "a RegNet": [("stem.conv.weight", "s1.b1.conv1.conv.weight", "s1.b1.se.fc1.weight", "head.fc.weight"),
                 ("stem.0.weight", "trunk_output.block1.block1-0.f.a.0.weight", "fc.weight"),
                 ("regnet.encoder.stages.0.layers.0.layer.0.convolution.weight",)],
    "an HRNet": [("layer1.0.conv1.weight", "stage2.0.branches.0.0.conv1.weight")],
    "a ResNet": [("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight"),
                 ("resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",),
                 ("stages.0.blocks.0.downsample.conv.weight", "stages.0.blocks.0.conv1.weight")],
    "an EfficientNet": [("conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.se.conv_reduce.weight"),
                        ("efficientnet.encoder.blocks.0.x",)],
    "a network of stages": [("stages.0.0.something.weight",)],
    "a ViT with a norm before its blocks": [(*TIMM, "norm_pre.weight")],
    "a ViT with relative positions": [(*TIMM, "blocks.0.attn.rel_pos.mlp.fc1.weight"),
                                      (*TIMM, "shared_rel_pos.relative_position_bias_table")],
    "a ViT with rotary positions": [(*TIMM, "rope.freqs")],
    "a ViT that pools its patches": [(*TIMM, "fc_norm.weight")],
}
LISTS = [(family, names) for family, lists in FAMILIES.items() for names in lists]


def tensors(names):
    """Empty arrays of those names; a number behind one is that of its dimensions."""
    split = (name.partition(" ") for name in names)
    shapes = {name: (0,) * int(number or 1) for name, _, number in split}
    return {name: Tensor(shape, np.dtype("f4"), lambda shape=shape: np.zeros(shape, "f4"))
            for name, shape in shapes.items()}


@pytest.mark.parametrize("family, names", LISTS, ids=[f"{family}-{i}" for i, (family, _) in enumerate(LISTS)])
def test_a_family_by_its_name(family, names):
    """Under its own names, and within a wrapper's; of names that fit several, the longest is meant."""
    for prefix in ("", "module.", "student.backbone."):
        if prefix and "/" in "".join(names):
            continue
        found = name_family(tensors([prefix + name for name in names]))
        assert found and found.startswith(family), found
        assert not any(found.startswith(other) and len(other) > len(family) for other in FAMILIES)
    with pytest.raises(FormatError, match="^file: it seems to be .*, which is not supported"):
        convert(tensors(names), path="file")


def test_every_row_is_met():
    met = {name_family(tensors(names)) for _, names in LISTS}
    assert met == {what for what, *_ in ROWS}


@pytest.mark.parametrize("names", [
    TIMM, HF, BIG_VISION, WITH_HF(*(name.removeprefix("vit.") for name in HF[3:6]), "pooler.dense.weight"),
    (*TIMM, "dist_token", "head_dist.weight"), (*TIMM, "blocks.0.ls1.gamma"), (*TIMM, "blocks.0.gamma_1"),
    (*TIMM[1:], "attn_pool.latent", "attn_pool.kv.weight", "attn_pool.mlp.fc1.weight"), (*TIMM, "pre_logits.fc.weight"),
    (*TIMM, "reg_token 3"), (*TIMM, "mask_token 2", "register_tokens 3", "blocks.0.ls1.gamma"), (*TIMM, "mask_token"),
    (*TIMM[:3], "mask_token 2", "blocks.0.0.attn.qkv.weight 2", "blocks.0.0.ls1.gamma"), DINOV2,
    (*DINOV2, "embeddings.register_tokens 3"), SIGLIP, (*SIGLIP, "head.probe 3", "head.attention.in_proj_weight 2"),
    (*(f"vision_model.{name}" for name in SIGLIP), "classifier.weight 2"), (*BIG_VISION, "reg 3"),
    (*TIMM, "blocks.0.mlp.context_scale"), tuple(name.replace("vit.", "deit.") for name in HF),
    (*BIG_VISION, "MAPHead_0/probe", "pre_logits/kernel", "Transformer/posembed_input/pos_embedding"),
    ("a", "b.c", "head.weight")])
def test_a_plain_vit_is_of_no_other_family(names):
    assert name_family(tensors(names)) is None


def test_hostile_names_take_no_time():
    start = time.monotonic()
    name_family(tensors(["." * 10**6, "a." * 10**6, "blocks." + "1." * 10**6, *map(str, range(1000))]))
    assert time.monotonic() - start < 5
