"""The cards beside weights: every key of timm's and Hugging Face's `config.json`, and what becomes of it.

The tables say it. A key that a table lacks is refused where its library would hand it to the model (timm's `model_args`
and `pretrained_cfg`), and ignored where the library ignores it as well. What the cards say of images is in `images.py`.
Read in timm 1.0.31 (`VisionTransformer`, `PretrainedCfg`, `_hub.py`) and transformers 5.24 (`ViTConfig`, `DeiTConfig`,
`Dinov2Config`, `Dinov2WithRegistersConfig`, `SiglipConfig`, `SiglipVisionConfig`).
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from cb_vit.retry import PARSING
from cb_vit.weights.containers.files import FormatError, show

ARRAYS = "the arrays show it, and they decide"
NOTHING = "it does not change what a trained model computes"
READ = "it is read by its name, here or in images.py"


@dataclasses.dataclass(frozen=True)
class Tells:
    """A key that becomes a keyword of `Model`.

    Attributes:
        keyword: name of the keyword of `Model`.
        read: function from the key's value to the keyword's; raises TypeError, ValueError or KeyError for a wrong one.
        choices: values that the key may have, for errors; empty: they cannot be listed.
    """

    keyword: str
    read: Callable[[Any], Any]
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Only:
    """A key with these values only: any other makes a model that is none of ours."""

    values: tuple[Any, ...]


Rule = Tells | Only | str


def _whole(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ValueError
    return value


def _count(value: Any) -> int:
    return value if value == 0 and type(value) is int else _whole(value)


def pair(value: Any) -> tuple[int, int]:
    """A size in pixels: one number for a square, or height and width."""
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return _whole(height), _whole(width)


def _small(value: Any) -> float:
    if isinstance(value, bool) or not 0 < value < 1:
        raise ValueError
    return float(value)


def _named(keyword: str, values: Mapping[str, Any]) -> Tells:
    return Tells(keyword, values.__getitem__, tuple(values))


# timm's `model_args`: arguments of its VisionTransformer.
ARGUMENTS: dict[str, Rule] = {
    "num_heads": Tells("num_heads", _whole), "embed_dim": Tells("width", _whole), "depth": Tells("depth", _whole),
    "patch_size": Tells("patch_size", pair), "act_layer": _named("gelu", {"gelu": "erf", "gelu_tanh": "tanh"}),
    "norm_layer": _named("layer_norm_eps", {"layernorm": 1e-6, "layernormfp32": 1e-6}),
    "global_pool": _named("pool_type", {"token": "tok", "avg": "gap", "map": "map", "": "none"}),
    "reg_tokens": Tells("registers", _count),
    **dict.fromkeys(("img_size", "no_embed_class"), READ),
    **dict.fromkeys((
        "in_chans", "num_classes", "mlp_ratio", "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias",
        "init_values", "class_token", "pre_norm", "final_norm", "fc_norm"), ARRAYS),
    "pos_embed": Only(("learn",)), "pool_include_prefix": Only((False,)), "attn_layer": Only(("", "attn")),
    **dict.fromkeys(("embed_layer", "embed_norm_layer", "block_fn", "mlp_layer"), Only(())),
    **dict.fromkeys((
        "dynamic_img_size", "dynamic_img_pad", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
        "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "device", "dtype"), NOTHING),
}
# timm's `pretrained_cfg`; in older files it is the whole `config.json`.
PRETRAINED: dict[str, Rule] = {
    **dict.fromkeys(("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "label_names"), READ),
    "num_classes": ARRAYS, "label_offset": Only((0,)),
    **dict.fromkeys((
        "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "custom_load",
        "test_input_size", "min_input_size", "fixed_input_size", "test_crop_pct", "label_descriptions", "pool_size",
        "test_pool_size", "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids",
        "notes"), NOTHING),
}
# What stands beside the two; timm ignores the rest.
TOP: dict[str, Rule] = {
    **dict.fromkeys(("architecture", "model_args", "pretrained_cfg", "label_names", "labels"), READ),
    "global_pool": ARGUMENTS["global_pool"], "num_classes": ARRAYS,
    **dict.fromkeys(("num_features", "label_descriptions"), NOTHING),
}
# What the names of timm's architectures settle: heads, and GELU. Those that a file gives away as none of ours are left
# out; `tests/parity/test_timm_registry.py` holds this against all that timm can make.
_ARCHITECTURES = (
    (r"test_vit", 2, "erf"),
    (r"(vit|deit)_tiny(_distilled)?_patch\d+_\d+", 3, "erf"),
    (r"(vit|deit3?)_small(_distilled)?_patch\d+(_36x1)?_(\d+|(reg4_)?dinov2)|flexivit_small", 6, "erf"),
    (r"deit3_medium_patch16_\d+", 8, "erf"),
    (r"(vit|deit3?)_base(_distilled)?_patch\d+_(\d+|(reg4_)?dinov2)|flexivit_base", 12, "erf"),
    (r"vit_base_patch16_siglip(_gap)?_\d+", 12, "erf"),
    (r"vit_base_patch32_siglip(_gap)?_\d+", 12, "tanh"),
    (r"vit_base_patch14_reg1_tipsv2", 12, "erf"),
    (r"vit_base_patch\d+_plus_\d+|vit_so150m_patch16_reg4_(gap|map)_\d+", 14, "erf"),
    (r"(vit|deit3)_(large|huge)_patch\d+_(\d+|(reg4_)?dinov2)|flexivit_large", 16, "erf"),
    (r"vit_(giant|gigantic)_patch14_224", 16, "erf"),
    (r"vit_(base|huge|giant)_patch\d+_gap_\d+|vit_(large|so400m)_patch14_reg1_tipsv2", 16, "erf"),
    (r"vit_(large_patch16_siglip(_gap)?_(256|384)|so400m_patch14_siglip(_gap)?_\d+)", 16, "erf"),
    (r"vit_(large_patch16_siglip(_gap)?_512|(so400m|giantopt)_patch16_siglip(_gap)?_\d+)", 16, "tanh"),
)
# Widths of those with so many heads: another width is of another model, whatever its name.
_WIDTHS = {2: (64,), 3: (192,), 6: (384,), 8: (512,), 12: (768,), 14: (896,),
           16: (768, 1024, 1152, 1280, 1408, 1536, 1664)}
_NO_EMBED_CLASS = r"deit3_.*|flexivit_.*|.*_reg\d_(dinov2|tipsv2)"

_COMMON = {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
# What transformers takes for keys that are not there, by `model_type`.
DEFAULTS = {
    "vit": _COMMON | {"layer_norm_eps": 1e-12}, "deit": _COMMON | {"layer_norm_eps": 1e-12},
    "dinov2": _COMMON | {"num_register_tokens": 0},  # it knows of none
    "dinov2_with_registers": _COMMON | {"num_register_tokens": 4},
    **dict.fromkeys(("siglip_vision_model", "siglip"), _COMMON | {"hidden_act": "gelu_pytorch_tanh"}),
}
# Where a model of several parts keeps the settings of a part of it.
PARTS = ("vision_config", "backbone_config")
# Hugging Face's `config.json`; transformers ignores the rest.
CONFIG: dict[str, Rule] = {
    "num_attention_heads": Tells("num_heads", _whole), "num_register_tokens": Tells("registers", _count),
    "hidden_size": Tells("width", _whole), "num_hidden_layers": Tells("depth", _whole),
    "intermediate_size": Tells("mlp_dim", _whole), "patch_size": Tells("patch_size", pair),
    "hidden_act": _named("gelu", {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}),
    "layer_norm_eps": Tells("layer_norm_eps", _small),
    **dict.fromkeys(("model_type", "image_size", "id2label", *PARTS), READ),
    **dict.fromkeys((
        "num_channels", "qkv_bias", "pooler_output_size", "architectures", "num_labels", "mlp_ratio", "use_mask_token",
        "vision_use_head"), ARRAYS),
    "pooler_act": Only(("tanh",)), "is_encoder_decoder": Only((False,)), "use_swiglu_ffn": Only((False,)),
    **dict.fromkeys(("pruned_heads", "per_layer_config", "quantization_config", "auto_map"), Only(({},))),
    **dict.fromkeys((
        "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "encoder_stride", "label2id",
        "problem_type", "output_hidden_states", "output_attentions", "return_dict", "dtype", "torch_dtype",
        "chunk_size_feed_forward", "transformers_version", "_name_or_path", "attention_dropout", "layerscale_value",
        "drop_path_rate", "initializer_factor", "text_config"), NOTHING),
    # What a DINOv2 gives as part of a detector: all it computes is there to choose from.
    **dict.fromkeys((
        "apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "_out_features", "_out_indices",
        "stage_names"), NOTHING),
}


@dataclasses.dataclass(frozen=True)
class Said:
    """What a `config.json` says.

    Attributes:
        model: keywords of `Model` that it decides, with their values.
        image_size: (height, width) in pixels of the images that the positions are for; None: not said.
        no_embed_class: whether positions lack entries of class tokens; None: not said.
        class_names: names of the classes, in the order of their numbers; None: not said.
        known: whether the file names an architecture that is known here.
        widths: widths of the models with that name, where only the name says how wide it is and how many heads it has;
            None: something else does.
        guessable: whether what the file does not say may be taken from what all published models have, as it names
            nothing that is unknown here.
    """

    model: dict[str, Any]
    image_size: tuple[int, int] | None = None
    no_embed_class: bool | None = None
    class_names: tuple[str, ...] | None = None
    known: bool = False
    widths: tuple[int, ...] | None = None
    guessable: bool = True


def timm(card: Mapping[str, Any], path: str) -> Said:
    """What timm's `config.json` says.

    Raises:
        FormatError: a key, or a value of one, makes another model than ours.
    """
    arguments, nested = _block(card, "model_args", path), _block(card, "pretrained_cfg", path)
    pretrained = nested or ({key: value for key, value in card.items() if key in PRETRAINED} if "architecture" in card
                            else {})
    _told(pretrained, PRETRAINED, path)
    known = _architecture(card.get("architecture"))
    if "rope" in str(card.get("architecture")):
        raise FormatError(f"{path}: its config.json names the architecture {show(card['architecture'])}, whose rotary "
                          "positions are not supported")
    model = {**known, **_told({key: value for key, value in card.items() if key in TOP}, TOP, path),
             **_told(arguments, ARGUMENTS, path)}
    size = None
    if pretrained.get("input_size"):
        size = _read(lambda value: pair(value[1:]), "input_size", pretrained["input_size"], path)
    if arguments.get("img_size"):
        size = _read(pair, "img_size", arguments["img_size"], path)
    labels = next((block[key] for block, key in (
        (card, "label_names"), (card, "labels"), (pretrained, "label_names")) if block.get(key)), None)
    bare = arguments.get("no_embed_class")
    if bare is None and known:
        bare = bool(re.fullmatch(_NO_EMBED_CLASS, card["architecture"]))
    own = known and arguments.get("num_heads") is None and arguments.get("embed_dim") is None
    widths = _WIDTHS[known["num_heads"]] if own else None
    return Said(model, size, bare, names_of_classes(labels), bool(known), widths,
                bool(known) or not card.get("architecture"))


def huggingface(card: Mapping[str, Any], path: str, kinds: tuple[str, ...]) -> Said:
    """What Hugging Face's `config.json` says, the defaults of transformers included.

    Args:
        card: content of the file; of a model that has such a part, what it says of that part counts.
        path: path of the weights, for errors.
        kinds: names of the kinds of models, the `model_type`, that the arrays may be of; the first if none is said.

    Raises:
        FormatError: a key, or a value of one, makes another model than ours.
    """
    if not card.keys() & CONFIG.keys():
        return Said({})
    if part := next(filter(None, (_block(card, key, path) for key in PARTS)), None):
        card = {**part, "id2label": card.get("id2label")}
    if (kind := kinds[0] if card.get("model_type") is None else card["model_type"]) not in kinds:
        raise FormatError(f"{path}: its config.json says model_type={show(kind)}, which is not supported with these "
                          f"arrays; supported is {' or '.join(map(show, kinds))}")
    told = [key for key, rule in CONFIG.items() if isinstance(rule, Tells) and key in card]
    if empty := next((key for key in told if card[key] is None), None):
        raise FormatError(f"{path}: its config.json says {empty}=None, which cannot be")
    known = {key: value for key, value in card.items() if key in CONFIG and value is not None}
    labels = names_of_classes(known.get("id2label"))
    if labels and all(re.fullmatch(r"LABEL_\d+", name) for name in labels):  # transformers' own placeholders
        labels = None
    size = known.get("image_size")
    return Said(_told({**DEFAULTS[kind], **known}, CONFIG, path), size and _read(pair, "image_size", size, path),
                class_names=labels)


def _block(card: Mapping[str, Any], key: str, path: str) -> dict[str, Any]:
    block = card.get(key) or {}
    if not isinstance(block, dict):
        raise FormatError(f"{path}: its config.json says {key}={show(block)}, which should be keys and values")
    return block


def _told(block: Mapping[str, Any], rules: Mapping[str, Rule], path: str) -> dict[str, Any]:
    """Keywords of `Model` that a block tells; its keys are held against their rules."""
    found = {}
    for key, value in block.items():
        if value is None:  # as if it were not there, in both libraries
            continue
        rule = rules.get(key)
        if rule is None:
            raise FormatError(f"{path}: its config.json says {key}={show(value)}, a setting that is not known here; "
                              "where it does not matter, take it out")
        if isinstance(rule, Only) and value not in rule.values:
            raise FormatError(f"{path}: its config.json says {key}={show(value)}, which is not supported" +
                              (f"; supported is {' or '.join(map(show, rule.values))}" if rule.values else ""))
        if isinstance(rule, Tells):
            found[rule.keyword] = _read(rule.read, key, value, path, rule.choices)
    return found


def _read(read: Callable[[Any], Any], key: str, value: Any, path: str, choices: tuple[str, ...] = ()) -> Any:
    try:
        return read(value)
    except PARSING:
        raise FormatError(f"{path}: its config.json says {key}={show(value)}, " + (
            f"which is not supported; supported are {', '.join(map(show, choices))}" if choices
            else "which cannot be")) from None


def _architecture(name: Any) -> dict[str, Any]:
    """What the name of one of timm's architectures settles; {}: it is not known here."""
    for regex, heads, gelu in _ARCHITECTURES:
        if isinstance(name, str) and re.fullmatch(regex, name):
            return {"num_heads": heads, "gelu": gelu, "layer_norm_eps": 1e-6}
    return {}


def names_of_classes(labels: Any) -> tuple[str, ...] | None:
    """Names of classes, from a list or from `{number: name}`; None: not all of them have one."""
    if isinstance(labels, dict):
        numbers = {str(number): name for number, name in labels.items()}
        labels = [numbers.get(str(i)) for i in range(len(numbers))]
    named = isinstance(labels, list | tuple) and labels and all(isinstance(name, str) for name in labels)
    return tuple(labels) if named else None
