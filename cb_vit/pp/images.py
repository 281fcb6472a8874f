"""Between bytes, Pillow images and uint8 arrays; sizes and resampling methods. What the image ops are made of."""
from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cb_vit.registry import Registry

Size = int | tuple[int, int]
HW = tuple[int, int]

# "area" is Pillow's box filter: it equals TensorFlow's area when the size is divided by a whole number.
METHODS: Registry[Image.Resampling] = Registry("resampling method", {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
    "lanczos3": Image.Resampling.LANCZOS, "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX, "area": Image.Resampling.BOX})
POINT_METHODS = ("nearest", "bilinear", "bicubic")  # those that Pillow can sample without widening the filter


def is_encoded(image: Any) -> bool:
    """Whether an image is still the bytes of a file."""
    return isinstance(image, bytes | bytearray | memoryview)


def as_pil(image: Any) -> Image.Image:
    """An image or a uint8 array [h w] or [h w c], c 1 to 4, as a Pillow image."""
    if isinstance(image, Image.Image):
        return image
    if is_encoded(image):
        raise ValueError("the image is still encoded (bytes); put decode before this op")
    pixels = as_uint8(image)
    if pixels.shape[2] > 4:
        raise ValueError(f"image ops take 1 to 4 channels, got an array of shape {pixels.shape}")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def as_uint8(image: Any) -> UInt8[np.ndarray, "h w c"]:
    """A Pillow image or an array as a contiguous uint8 array [h w c]; any other type of pixel is an error."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"the image has {pixels.dtype} pixels, but hosts deliver uint8: leave arithmetic to "
                         f"value_range and vgg_value_range at the end of the string, which run on the device")
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"the image must be [h w] or [h w c], got an array of shape {pixels.shape}")
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode RGB (3 channels) or L (1)."""
    mode = {3: "RGB", 1: "L"}[channels]
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; store the image with 8 or 16 bits")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency
    return image if image.mode == mode else image.convert(mode)


def resize_image(image: Image.Image, size: HW, method: str, antialias: bool) -> Image.Image:
    """The image at (h, w); see `Resize` for what `antialias` means."""
    if antialias:
        return image.resize(size[::-1], METHODS[method])
    return image.transform(size[::-1], Image.Transform.EXTENT, (0, 0, *image.size), METHODS[method])


def height_width(size: Size) -> HW:
    """An int as a square."""
    return (size, size) if isinstance(size, int) else size


def check_size(size: Size) -> None:
    """Refuse sizes of 0 or less."""
    if min(height_width(size)) <= 0:
        raise ValueError(f"size must be positive, got {size}")


def check_method(method: str, antialias: bool) -> None:
    """Refuse methods that do not exist, or not without antialias."""
    METHODS.pick(method, "method")
    if not antialias and method not in POINT_METHODS:
        raise ValueError(f"antialias=False works with {', '.join(POINT_METHODS)}, not with {method!r}; drop it")


def check_fits(crop: HW, size: HW | None) -> HW:
    """`crop`, unless it is larger than `size`."""
    if size is not None and (crop[0] > size[0] or crop[1] > size[1]):
        raise ValueError(f"the image, {size[0]} x {size[1]} (h x w), is smaller than the crop, {crop[0]} x {crop[1]}; "
                         f"resize before the crop")
    return crop
