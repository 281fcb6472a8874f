"""What a file is that is no plain ViT, by names that only its family has.

A row is a family and its marks, regular expressions of which each must be found where a part of some name begins. The
first row whose marks are all there decides: what tells most stands first, and what many have comes last. In what is
searched a space and the number of dimensions follow each name. No ViT that can be read has all marks of a row.
"""
from __future__ import annotations

import re
from collections.abc import Mapping

from cb_vit.weights.containers.files import Tensor

LONGEST = 300  # characters of a name that are looked at
ROWS = (
    # What is no model.
    ("a LoRA adapter (merge it into its model first)", r"lora_(A|B|up|down|unet|te)\b"),
    ("quantised, with weights that are no plain numbers",
     r"SCB |qweight |weight_packed |weight\.(absmax|quant_state)|_packed_params"),
    ("the state of an optimiser, without a model", r"exp_avg(_sq)? |momentum_buffer |opt/\d+/|opt/state/"),
    # Models of which a ViT is a part, or none at all.
    ("a model of video", r"(patch_embed(ding)?s?\.)?(proj|projection|patch_embed)\.weight 5"),
    ("a diffusion transformer (DiT)", r"adaLN_modulation|x_embedder\.proj|transformer_blocks\.\d+\.norm1\.linear"),
    ("a diffusion model", r"down_blocks\.\d+\.(resnets|attentions)|model\.diffusion_model\.|input_blocks\.\d+",
     r"time_embed(ding|_proj)?\.|model\.diffusion_model\."),
    ("a VAE, an autoencoder of images", r"(post_)?quant_conv\.|(encoder\.)?down(_blocks)?\.\d+\.(resnets|block)"),
    ("a SAM 2", r"pos_embed_window ", r"mask_decoder\.|memory_encoder\."),
    ("a SAM (Segment Anything)", r"mask_decoder\.|prompt_encoder\."),
    ("the image encoder of a SAM (Segment Anything)", r"attn\.rel_pos_h ", r"neck\.(0|conv1)\."),
    ("a TNT", r"pixel_embed\.proj\."),
    ("a Hiera", r"pos_embed_window |blocks\.\d+\.proj\.|encoder\.stages\.\d+\.layers\.\d+\.attn\.qkv"),
    ("a detector (DETR, YOLOS)",
     r"class_labels_classifier\.|query_position_embeddings|query_embed\.|detection_tokens "),
    ("a model of depth (DPT, Depth Anything)",
     r"neck\.(reassemble_stage|fusion_stage)|scratch\.refinenet|depth_head\."),
    ("a model of text with images (LLaVA, PaliGemma, …)", r"language_model\.|multi_modal_projector\.|text_decoder\."),
    ("a SigLIP 2 for images of any shape (NaFlex)", r"embeddings\.patch_embedding\.weight 2"),
    ("a CLIP, or another pair of towers for images and text",
     r"(vision|visual|image)(_model|_projection|_encoder)?\.|logit_scale ",
     r"text(_model|_projection)?\b|token_embedding\."),
    ("the image tower of a CLIP",
     r"(transformer\.)?resblocks\.\d+|ln_pre\.|pre_?layrnorm\.|embeddings\.class_embedding "),
    ("a model of text, or with a part for text",
     r"(word|token)_embeddings?\.|embed_tokens\.|wte\.|SelfAttention\.|shared\.weight |tok_embeddings\."),
    # ViTs with something more.
    ("a DINOv3", r"storage_tokens |rope_embed\.periods|layer\.\d+\.layer_scale1\.lambda1 ",
     r"storage_tokens |rope_embed\.periods|embeddings\.patch_embeddings\.weight "),
    ("a DINOv2 with a head that reads the class token beside the mean of patches",
     r"layer\.\d+\.layer_scale1\.lambda1 ", r"classifier\."),
    ("an iBOT, with its token for masked patches", r"masked_embed "),
    ("a masked autoencoder (MAE) with its decoder",
     r"decoder_(embed|blocks|pos_embed|norm|pred)\b|decoder\.decoder_layers|decoder\.mask_token "),
    ("a ViT in the names that transformers 5 has in memory (save_pretrained writes those that can be read)",
     r"(((vit|deit)\.)?layers|encoder\.layer)\.\d+\.attention\.q_proj\."),
    ("a data2vec", r"data2vec_vision\."),
    ("a Swin Transformer V2",
     r"(layers|stages)\.\d+\.blocks\.\d+\.(attn\.(logit_scale|cpb_mlp|meta_mlp)|attention\.self\.logit_scale)"),
    ("a BEiT", r"beit\.|blocks\.\d+\.gamma_1 |blocks\.\d+\.attn\.q_bias |rel_pos_bias\.|layer\.\d+\.lambda_1 ",
     r"relative_position_bias_table |beit\."),
    ("an EVA", r"blocks\.\d+\.attn\.q_bias |blocks\.\d+\.attn\.inner_attn_ln\."),
    ("an EVA", r"blocks\.\d+\.attn\.q_proj\.weight ", r"blocks\.\d+\.mlp\.fc1_g\."),
    ("a DINOv3", r"reg_token ", r"blocks\.\d+\.gamma_1 "),
    ("a ViT of masked images (SimMIM), with its decoder", r"mask_token ", r"decoder\.0\."),
    ("a ViT of torchvision (of timm or Hugging Face it could be read)",
     r"encoder\.layers\.encoder_layer_\d+\."),
    ("a NaFlexViT", r"embeds\.(proj|pos_embed)"),
    ("a hybrid of a convolutional network and a ViT",
     r"(patch_embed\.|embeddings\.patch_embeddings\.)backbone\.|conv_root/"),
    ("a ViT with gated MLPs (SwiGLU)", r"mlp\.(w12|w1|w3|fc1_g|fc1_x|weights_in|gate_proj)\."),
    ("a ViT with norms on queries and keys", r"attn\.[qk]_norm\."),
    # Other transformers of images.
    ("a TinyViT", r"(layers|stages)\.\d+\.blocks\.\d+\.local_conv\."),
    ("a FocalNet", r"(layers|stages)\.\d+\.(blocks|layers)\.\d+\.modulation\."),
    ("a PVT",
     r"(block\d|stages\.\d+\.blocks|encoder\.block\.\d+)\.\d+\.(attn\.sr|attention\.self\.sequence_reduction)\.|"
     r"attention\.spatial_reduction\."),
    ("a Swin Transformer", r"layers\.\d+\.blocks\.\d+\.(attn\.(qkv|relative)|attention\.(self|q_proj)|layernorm_)"),
    ("a CaiT", r"blocks_token_only\.|blocks\.\d+\.attn\.proj_l\."),
    ("a PiT", r"transformers\.\d+\.blocks\.\d+\."),
    ("an XCiT", r"cls_attn_blocks\.|blocks\.\d+\.local_mp\."),
    ("a LeViT", r"attention_biases |attention_bias_idxs ",
     r"levit\.|stem\.conv1\.linear\.|blocks\.\d+\.m\.|patch_embeddings\.embedding_layer_1\."),
    ("a ConViT", r"blocks\.\d+\.attn\.gating_param "),
    ("a CrossViT", r"blocks\.\d+\.(blocks|fusion|projs)\.\d+\.\d+\."),
    ("a VOLO", r"network\.\d+\.\d+\.attn\.", r"post_network\."),
    ("a NesT", r"levels\.\d+\.transformer_encoder\."),
    ("a Twins", r"patch_embeds\.\d+\.", r"pos_block\.\d+\."),
    ("a CoaT", r"crpe\d\.conv_list\."),
    ("an MViT", r"attn\.(pool_[qkv]|norm_q)\."),
    ("a GCViT", r"stages\.\d+\.global_block\."),
    ("a MaxViT or CoAtNet", r"stages\.\d+\.blocks\.\d+\.(attn_block|attn_grid|conv\.pre_norm|attn\.rel_pos)\."),
    ("a MobileViT", r"mobilevit(v2)?\.|stages\.\d+\.\d+\.transformer\.\d+\."),
    ("an EdgeNeXt", r"stages\.\d+\.blocks\.\d+\.xca\."),
    ("an MLP-Mixer or one of its kin", r"MixerBlock_\d+/|blocks\.\d+\.(mlp_tokens|mlp_channels|linear_tokens)\."),
    # Convolutional networks.
    ("a ConvNeXt", r"convnext(v2)?\.|downsample_layers\.0\.|stages\.\d+\.blocks\.\d+\.conv_dw\.|"
                   r"encoder\.stages\.\d+\.layers\.\d+\.dwconv\."),
    ("a RegNet", r"s\d\.b\d+\.conv\d\.|trunk_output\.block\d|regnet\."),
    ("an HRNet", r"stage\d\.\d+\.(branches|fuse_layers)\."),
    ("a ResNet or one of its kin", r"stages\.\d+\.blocks\.\d+\.downsample\.conv\.|"
                                  r"layer[1-4]\.\d+\.(conv\d|bn\d|norm\d)\b|resnet\.|"
                                  r"layer0\.conv1\.|block[1-4]/unit\d+/"),
    ("an EfficientNet or MobileNet",
     r"efficientnet\.|mobilenet_v[12]\.|blocks\.\d+\.\d+\.(conv_dw|conv_pwl|dw_start)\.|features\.\d+\.\d+\.block\.\d+\."),
    ("a network of stages", r"(dense_)?stages\.\d+\.|stage\d\.\d+\."),
    # What is left of the ViTs.
    ("a ViT with a norm before its blocks, as the image towers of CLIPs have", r"norm_pre\."),
    ("a ViT with relative positions", r"(shared_)?rel(ative)?_pos"),
    ("a ViT with rotary positions (RoPE)", r"rope\."),
    ("a ViT that pools its patches before the last norm (timm: global_pool='avg' with fc_norm)", r"fc_norm\."),
)


def name_family(tensors: Mapping[str, Tensor]) -> str | None:
    """The family that the names of a file give away; None: none of these."""
    lines = "\n".join(f"{name[:LONGEST]} {len(tensor.shape)}" for name, tensor in tensors.items())
    return next((what for what, *marks in ROWS if all(
        re.search(rf"(?:^|[./])(?:{mark})", lines, re.MULTILINE) for mark in marks)), None)
