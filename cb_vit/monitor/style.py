"""How the project's pictures look: their colours and letters, and a picture as the bytes of a PNG."""
from __future__ import annotations

import bisect
import functools
from io import BytesIO
from typing import Any

from PIL import Image, ImageFont

from cb_vit.texts import printable

INK, FAINT, GRID = "#2b2f36", "#8a9099", "#e8eaed"
PALETTE = ("#1f6fb4", "#d1603d", "#2a9d6f", "#8e5ea2", "#b8892b", "#3aa6b9", "#c0497b", "#6b7280")
RIGHT, WRONG = "#1d7f55", "#c22f2f"


def to_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG."""
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def encode(image: Image.Image) -> bytes:
    """An image of Pillow as a PNG: quick rather than small."""
    picture = BytesIO()
    image.save(picture, "PNG", compress_level=1)
    return picture.getvalue()


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The letters of what Pillow draws; a box stands for what they lack.

    Args:
        size: height of the letters in pixels.
    """
    return ImageFont.load_default(size)


def fit(text: str, letters: ImageFont.FreeTypeFont, width: float, end: str = "") -> str:
    """`text` and `end` in one line that is no wider than `width` pixels.

    What is too long loses its middle, since long names differ at either end; `end` is kept.

    Args:
        text: what anybody wrote; controls in it are escaped.
        letters: the font that it will be drawn in.
        width: width that there is, in pixels.
        end: what follows, such as a number.
    """
    text = printable(text)[:1000]  # longer ones would take long to measure, and nobody reads them
    if letters.getlength(text + end) <= width:
        return text + end
    def shortened(keep: int) -> str:
        return text[:(keep + 1) // 2] + "…" + text[len(text) - keep // 2:] + end

    keep = bisect.bisect_right(range(1, len(text)), width, key=lambda keep: letters.getlength(shortened(keep)))
    return shortened(keep)
