"""How the project's pictures look: their colours, lines, letters and words, and a picture as the bytes of a PNG."""
from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from io import BytesIO
from typing import Any

from PIL import Image, ImageFont

from cb_vit.texts import printable

INK, FAINT, RAW, GRID = "#2b2f36", "#8a9099", "#cfd3d8", "#e8eaed"
PALETTE = ("#1f6fb4", "#d1603d", "#2a9d6f", "#8e5ea2", "#b8892b", "#3aa6b9", "#c0497b", "#6b7280")
RIGHT, WRONG = "#1d7f55", "#c22f2f"
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))  # as matplotlib writes them


@dataclasses.dataclass(frozen=True)
class Look:
    """How one of several curves is drawn: its colour and its line, either of which tells it from its neighbours."""

    colour: str = INK
    dash: Any = DASHES[0]

    @classmethod
    def number(cls, index: int) -> Look:
        """The look of the curve with this number, from 0; the first 32 differ."""
        turn = index // len(PALETTE)
        return cls(PALETTE[index % len(PALETTE)], DASHES[(index + turn) % len(DASHES)])


def plain(text: str) -> str:
    """Words of others as matplotlib is to show them: in one line, and never as the formula that `$` begins."""
    return printable(text).replace("$", r"\$")


def short(names: Iterable[str], width: int = 20) -> dict[str, str]:
    """Names with room in a picture: of long ones the middle is left out, as long as all stay different."""
    names = list(names)
    for room in itertools.count(width, 4):
        found = {name: name if len(name) <= room else f"{name[:room // 2]}\u2026{name[-room // 2:]}" for name in names}
        if len(set(found.values())) == len(set(names)):
            return found


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
