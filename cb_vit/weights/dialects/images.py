"""What the cards beside weights say of images: how pixels are normalised, how images are prepared, and back again.

timm says it in the `pretrained_cfg` of its `config.json`, transformers in `preprocessor_config.json`. What cannot be
done here, or is not understood, leaves preparation open, with a note; normalisation is a matter of the model itself.
"""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from cb_vit.pp import builder
from cb_vit.pp.normalisation import Normalisation
from cb_vit.pp.ops_general import OPS, ValueRange, VggValueRange
from cb_vit.pp.ops_image import CentralCrop, Decode, Resize, ResizeSmall
from cb_vit.registry import Call, parse_calls
from cb_vit.retry import PARSING
from cb_vit.weights.dialects.cards import NOTHING, READ, pair

# Hugging Face's `preprocessor_config.json`; transformers ignores the rest.
PROCESSOR = {
    **dict.fromkeys((
        "image_processor_type", "feature_extractor_type", "do_resize", "size", "resample", "do_center_crop",
        "crop_size", "default_to_square", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
        "do_pad"), READ),
    **dict.fromkeys((
        "processor_class", "do_convert_rgb", "pad_size", "data_format", "input_data_format",
        "device", "return_tensors", "disable_grouping", "image_seq_length"), NOTHING),
}
# What transformers takes for a key that is not there: for any model, and for these; of others it is not known here.
_ANY = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_OF = {
    "vit": {"image_mean": 0.5, "image_std": 0.5, "resample": 2, "size": 224, "do_center_crop": False,
            "default_to_square": True},
    "deit": {"image_mean": 0.5, "image_std": 0.5, "resample": 3, "size": 256, "do_center_crop": True, "crop_size": 224,
             "default_to_square": True},
    "bit": {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3, "size": 224, "do_center_crop": True, "crop_size": 224, "default_to_square": False},
    "siglip": {"image_mean": 0.5, "image_std": 0.5, "resample": 3, "size": {"height": 224, "width": 224},
               "do_center_crop": False, "default_to_square": False},
}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # numbered as Pillow's filters are
_SYNONYMS = {"lanczos3": "lanczos", "area": "box"}


def normalisation(card: Mapping[str, Any]) -> Any:
    """(mean, std) of pixels from 0 to 1 as the cards have it, not yet checked; None: they do not say."""
    timm, processor = _timm(card), _processor(card)
    if timm is not None:
        mean, std = timm.get("mean"), timm.get("std")
        return None if mean is None and std is None else (mean, std)
    if processor is None:
        return None
    mean, std = (processor.get("image_mean"), processor.get("image_std")) if processor["do_normalize"] else (0.0, 1.0)
    factor = processor["rescale_factor"] if processor["do_rescale"] else 1
    return None if mean is None and std is None else (_divide(mean, factor), _divide(std, factor))


def evaluation(
    card: Mapping[str, Any], normalisation: Normalisation | None, grid: tuple[int, int] | None, patch: tuple[int, int]
) -> tuple[str | None, str | None]:
    """Preprocessing for evaluation as the cards say, else at the size of the positions, cropped as DeiT does (0.875).

    Args:
        card: content of the cards as one dict; {}: there are none.
        normalisation: mean and std of pixels from 0 to 1 in training; None: not known.
        grid: rows and columns of patches that the positions are for; None: not known.
        patch: height and width of a patch in pixels.

    Returns:
        A preprocessing string for `pp.builder`, None where not enough is known; and a note on what is assumed, or
        cannot be done.
    """
    if normalisation is None:
        return None, None
    timm, processor, note = _timm(card), _processor(card), None
    size = grid and tuple(rows * side for rows, side in zip(grid, patch, strict=True))
    try:
        if timm is not None:
            steps = _timm_steps(timm, size)
        elif processor is not None:
            steps = _processor_steps(processor)
        elif size is None:
            return None, None
        else:
            steps = [f"resize_small({int(min(size) / 0.875)}, 'bicubic')", f"central_crop({size})"]
            note = "how its images were prepared is not known; taken to be resized and cropped as DeiT's, by 0.875"
        channels = len(normalisation.mean)
        pp = "|".join(["decode" if channels == 3 else f"decode({channels})", *steps, normalisation.op])
        builder.build(pp, "pp")
    except PARSING as error:
        return None, f"how its card prepares images cannot be done here ({' '.join(str(error).split())})"
    return pp, note


def for_size(pp: str, size: tuple[int, int]) -> str:
    """A preprocessing string that ends in images of another size.

    Its ops that give sizes are scaled where that keeps the shape of the images (256 and 224 pixels become 592 and 518);
    where it does not, or nothing fixes their size, images are resized at the end of what the host does.

    Args:
        pp: preprocessing string for evaluation.
        size: (height, width) in pixels.
    """
    preprocess, calls = builder.build(pp, "pp"), parse_calls(pp, "pp")
    before = preprocess.image_size
    if before == size:
        return pp
    last = len(calls) - len(preprocess.device_ops)
    host, device = [call.text for call in calls[:last]], [call.text for call in calls[last:]]
    if before and size[0] * before[1] == size[1] * before[0]:
        scaled = [_scale(call, size[0] / before[0]) for call in calls[:last]]
        if builder.build(text := "|".join(scaled + device), "pp").image_size == size:
            return text
    return "|".join([*host, f"resize({size})", *device])


def _scale(call: Call, factor: float) -> str:
    """An op as it is written; its size in pixels, the first argument of all that have one, is scaled."""
    op = call.bind(OPS[call.name], "pp")
    name = next((name for name in ("size", "smaller_size") if hasattr(op, name)), None)
    if name is None:
        return call.text
    height, width = (round(side * factor) for side in pair(getattr(op, name)))
    said = (f"{field.name}={value!r}" for field in dataclasses.fields(op)
            if field.name != name and (value := getattr(op, field.name)) != field.default)
    return f"{call.name}({', '.join([repr(height if height == width else (height, width)), *said])})"


def preprocessor(pp: str, normalisation: Normalisation) -> tuple[dict[str, Any], list[str]]:
    """The content of a `preprocessor_config.json`, and the ops of `pp` that it has no words for.

    Args:
        pp: preprocessing string for evaluation.
        normalisation: mean and std of pixels from 0 to 1.
    """
    mean, std = normalisation
    card = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_center_crop": False,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(mean),
            "image_std": list(std)}
    unsaid, preprocess = [], builder.build(pp, "pp")
    for text, op in preprocess.host_ops + preprocess.device_ops:
        resizes = isinstance(op, Resize | ResizeSmall)
        if resizes and op.antialias and not card["do_resize"] and not card["do_center_crop"]:
            method = _SYNONYMS.get(op.method, op.method)
            size = _size(op.size) if isinstance(op, Resize) else {"shortest_edge": op.smaller_size}
            card |= {"do_resize": True, "resample": _RESAMPLE.index(method), "size": size}
            if isinstance(op, ResizeSmall):  # those of ViT and DeiT take a height and a width only
                card["image_processor_type"] = "BitImageProcessor"
        elif isinstance(op, CentralCrop) and not card["do_center_crop"]:
            card |= {"do_center_crop": True, "crop_size": _size(op.size)}
            if card["image_processor_type"] == "ViTImageProcessor":  # which does not crop
                card["image_processor_type"] = "DeiTImageProcessor"
        elif not isinstance(op, Decode | ValueRange | VggValueRange):
            unsaid.append(text)
    return card, unsaid


def _timm(card: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The block in which timm describes its images: one of its own, or in older files the whole card."""
    block = card.get("pretrained_cfg") or (card if "architecture" in card else None)
    return block if isinstance(block, Mapping) else None


def _processor(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of transformers' image processor, its defaults included; None: no card has any."""
    known = {key: value for key, value in card.items() if key in PROCESSOR and value is not None}
    if not known:
        return None
    name = known.get("image_processor_type") or known.get("feature_extractor_type") or card.get("model_type")
    match = re.fullmatch(rf"({'|'.join(_OF)})((ImageProcessor|FeatureExtractor)(Fast|Pil)?)?", str(name), re.IGNORECASE)
    return {**_ANY, "named": name, **(_OF[match[1].lower()] if match else {}), **known}


def _timm_steps(block: Mapping[str, Any], size: tuple[int, int] | None) -> list[str]:
    """Ops that do what `timm.data.create_transform` does for evaluation."""
    size = pair(block["input_size"][1:]) if block.get("input_size") else size
    mode, method = block.get("crop_mode") or "center", block.get("interpolation") or "bicubic"
    if size is None:
        raise ValueError("it does not say their size")
    scaled = tuple(math.floor(side / (block.get("crop_pct") or 0.875)) for side in size)
    if mode == "squash":
        return [f"resize({scaled}, {method!r})", f"central_crop({size})"]
    if mode != "center" or size[0] != size[1]:
        raise ValueError(f"crop_mode={mode!r}" + " to images that are no square" * (mode == "center"))
    return [f"resize_small({scaled[0]}, {method!r})", f"central_crop({size})"]


def _processor_steps(processor: Mapping[str, Any]) -> list[str]:
    """Ops that do what transformers' image processors do."""
    steps = []
    if "default_to_square" not in processor:
        raise ValueError(f"image_processor_type={processor['named']!r}")
    if processor.get("do_pad"):
        raise ValueError("do_pad=True")
    if processor["do_resize"]:
        size, method = processor["size"], _RESAMPLE[processor["resample"]]
        if isinstance(size, int) and not processor["default_to_square"]:
            size = {"shortest_edge": size}
        if isinstance(size, Mapping) and {key for key, value in size.items() if value} == {"shortest_edge"}:
            steps = [f"resize_small({size['shortest_edge']}, {method!r})"]
        else:
            steps = [f"resize({_height_width(size)}, {method!r})"]
    if processor["do_center_crop"]:
        steps.append(f"central_crop({_height_width(processor['crop_size'])})")
    return steps


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if {key for key, value in size.items() if value} != {"height", "width"}:
            raise ValueError(f"size={dict(size)}")
        size = size["height"], size["width"]
    return pair(size)


def _size(size: int | tuple[int, int]) -> dict[str, int]:
    return dict(zip(("height", "width"), pair(size), strict=True))


def _divide(values: Any, factor: Any) -> Any:
    """Values in units of pixels from 0 to 1, where pixels are multiplied by `factor` first; None: that is no number."""
    try:
        if math.isclose(255 * factor, 1, rel_tol=1e-6):
            return values
        by = 255 * factor
        return [value / by for value in values] if isinstance(values, list | tuple) else values / by
    except (TypeError, ArithmeticError):
        return None
