"""Between bytes, Pillow images and uint8 arrays; sizes and resampling methods. What the image ops are made of."""
from __future__ import annotations

import functools
import io
import re
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from cb_vit.registry import Registry

Size = int | tuple[int, int]
HW = tuple[int, int]

# "area" is Pillow's box filter: it equals TensorFlow's area when the size is divided by a whole number.
METHODS: Registry[Image.Resampling] = Registry("resampling method", {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
    "lanczos3": Image.Resampling.LANCZOS, "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX, "area": Image.Resampling.BOX})
# Pillow's names of the formats that are read: it knows forty, of which one starts another program (EPS: Ghostscript).
# A JPEG of several pictures, MPO, is read as JPEG.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
_CONVERT = "convert it to JPEG or PNG"
# How the content of other files begins, and in words for errors; of several the first.
_OTHERS = tuple((re.compile(start, re.DOTALL | re.IGNORECASE), words) for start, words in (
    (rb"\Z", "the file is empty; copy it anew"),
    (rb"\0+\Z", "it holds nothing but zeros; copy it anew"),
    (rb".{4}ftyp(.{4}){0,16}?avi[fs]", f"it is an AVIF file; {_CONVERT}, e.g. with avifdec"),
    (rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", f"it is a HEIC (HEIF) file; {_CONVERT}, e.g. with heif-convert"),
    (rb".{4}ftyp", "it is a video (MP4 or the like); cut pictures from it, as JPEG or PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", f"it is an EPS or PostScript file; {_CONVERT}"),
    (rb".{0,1024}?%PDF-", f"it is a PDF file; {_CONVERT}"),
    (rb"\s*(<\?xml.{0,2048}?|<!--.{0,2048}?|<!doctype\s+)?<?svg\b", f"it is an SVG file; {_CONVERT}"),
    (rb"\s*(<!--.{0,2048}?)?<(!doctype\s+html|html|head|body)\b", "it is a web page (HTML); the download failed"),
    (rb"version https://git-lfs", "it is a Git LFS pointer; fetch the file with git lfs pull"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", f"it is a JPEG 2000 file; {_CONVERT}"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", f"it is a JPEG XL file; {_CONVERT}"),
    (rb"8BPS", f"it is a Photoshop file; {_CONVERT}"), (rb"PK\x03\x04|\x1f\x8b|Rar!|7z", "it is an archive; unpack it"),
    (rb"\xff\xd8|\x89PNG|GIF8|RIFF.{4}WEBP|II\*\0|MM\0\*|BM", "it is damaged or truncated; copy it anew"),
    (rb"([\t\n\r -~]|[\xc3-\xf4][\x80-\xbf]{0,3})+\Z", "it is text, no image"),
))
# How files in one of FORMATS begin.
_BEGINNINGS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]", re.DOTALL)
POINT_METHODS = ("nearest", "bilinear", "bicubic")  # those that Pillow can sample without widening the filter


def is_encoded(image: Any) -> bool:
    """Whether an image is still the bytes of a file."""
    return isinstance(image, bytes | bytearray | memoryview)


def decode_image(data: bytes) -> Image.Image:
    """The first image of a file in one of `FORMATS`, its pixels read.

    Args:
        data: the bytes of the file.

    Raises:
        ValueError: the file is of another format, which is named where it is known; or it has too many pixels.
        Exception: whatever Pillow's readers stumble over in damaged bytes.
    """
    _hush_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image format that is read here, {', '.join(FORMATS)}; {name_content(data)}") from None
    check_pixels(image.height, image.width)  # Pillow only warns up to twice the limit
    # Pillow reads pixels on first use; damage is to show here, where the example is known.
    image.load()
    return image


def check_encoded(data: bytes) -> None:
    """Refuse bytes that do not begin as a file in one of `FORMATS`; nothing is decoded.

    Raises:
        ValueError: names what it is, where that is known.
    """
    if not _BEGINNINGS.match(data):
        raise ValueError(f"no image format that is read here, {', '.join(FORMATS)}; {name_content(data)}")


def name_content(data: bytes) -> str:
    """What a file is that holds no image in one of `FORMATS`, and the way out, in words for an error."""
    head = bytes(data[:4096])
    return next((words for start, words in _OTHERS if start.match(head)), "it is in no image format that is known here")


@functools.cache
def _hush_pillow() -> None:
    """What Pillow warns of on the terminal, once a process, is an error here."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_pixels(height: int, width: int) -> None:
    """Refuse an image that would fill the memory.

    Raises:
        ValueError: the image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if (limit := Image.MAX_IMAGE_PIXELS) and height * width > limit:
        raise ValueError(f"{height * width} pixels, over the limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS)")


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
    if image.mode.startswith("I;16"):  # Pillow's own conversion would saturate all but the darkest values
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; store the image with 8 or 16 bits")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency
    return image if image.mode == mode else image.convert(mode)


def resize_image(image: Image.Image, size: HW, method: str, antialias: bool) -> Image.Image:
    """The image resized.

    Args:
        image: an image of mode RGB or L.
        size: (h, w) of the result, in pixels.
        method: one of the names in `METHODS`.
        antialias: whether the filter widens where the image shrinks, see `Resize`.

    Raises:
        ValueError: the result would have too many pixels.
    """
    check_pixels(*size)  # a line of pixels, its shorter side made longer, would become a hundred gigabytes
    if antialias:
        return image.resize(size[::-1], METHODS[method])
    return image.transform(size[::-1], Image.Transform.EXTENT, (0, 0, *image.size), METHODS[method])


def height_width(size: Size) -> HW:
    """A size as (h, w); an int stands for a square."""
    return (size, size) if isinstance(size, int) else size


def check_size(size: Size) -> None:
    """Refuse sizes of 0 or less, and those that no memory holds, with a `ValueError`."""
    if min(height_width(size)) <= 0:
        raise ValueError(f"size must be positive, got {size}")
    check_pixels(*height_width(size))


def check_method(method: str, antialias: bool) -> None:
    """Refuse methods that do not exist, and those that need antialias where it is off, with a `ValueError`."""
    METHODS.pick(method, "method")
    if not antialias and method not in POINT_METHODS:
        raise ValueError(f"antialias=False works with {', '.join(POINT_METHODS)}, not with {method!r}; drop it")


def check_fits(crop: HW, size: HW | None) -> HW:
    """`crop` itself; a `ValueError` if the image, where its `size` is known, is smaller."""
    if size is not None and (crop[0] > size[0] or crop[1] > size[1]):
        raise ValueError(f"the image, {size[0]} x {size[1]} (h x w), is smaller than the crop, {crop[0]} x {crop[1]}; "
                         f"resize before the crop")
    return crop
