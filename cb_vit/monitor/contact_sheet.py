"""Contact sheets: many small images with captions, in one picture. Drawn by Pillow alone, in a few milliseconds."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from cb_vit.monitor.style import FAINT, GRID, INK, encode, fit, font

SIDE = 160  # pixels of an image's longer side, at most
NARROWEST = 128  # pixels of a tile: narrower captions would say nothing
MARGIN, GAP, LINE = 14, 10, 15  # pixels
TITLE, NOTE, CAPTION = 17, 12, 12  # heights of letters
SHAPE = 1.6  # width of a sheet by its height, about


@dataclasses.dataclass(frozen=True)
class Line:
    """A line below an image.

    Attributes:
        text: text that loses its middle where it is too long.
        end: text that follows it and is always kept, such as a number.
        colour: colour of both.
    """

    text: str
    end: str = ""
    colour: str = INK


@dataclasses.dataclass(frozen=True)
class Tile:
    """An image and what stands below it.

    Attributes:
        image: pixels; of 1 channel (grey), or of 3.
        lines: the caption, of one to three lines.
    """

    image: UInt8[np.ndarray, "y x c"]
    lines: Sequence[Line]


def draw_sheet(
    tiles: Sequence[Tile], title: str, note: str = "", side: int = SIDE, columns: int | None = None
) -> bytes:
    """The tiles row by row, as a PNG.

    Args:
        tiles: images of any sizes. Those that are smaller than `side` are enlarged by a whole number, so
            that their pixels can be seen; larger ones are reduced to it.
        title: text above the tiles.
        note: a smaller line below the title.
        side: the most pixels of an image's longer side.
        columns: number of tiles in a row; None: as many as make the sheet a little wider than high.
    """
    images = [_scaled(tile.image, side) for tile in tiles]
    wide = max([NARROWEST, *(image.width for image in images)])
    high = max((image.height for image in images), default=0)
    step_x, step_y = wide + GAP, high + LINE * max((len(tile.lines) for tile in tiles), default=0) + GAP + 4
    columns = columns or max(1, min(len(tiles), round(math.sqrt(SHAPE * len(tiles) * step_y / step_x))))
    top = MARGIN + TITLE + 10 + (NOTE + 8) * bool(note)
    inner = max(columns * step_x - GAP, *(_needs(text, size) for text, size in ((title, TITLE), (note, NOTE))))
    sheet = Image.new("RGB", (inner + 2 * MARGIN, top + math.ceil(len(tiles) / columns) * step_y + MARGIN - GAP),
                      "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 2), fit(title, font(TITLE), inner), INK, font(TITLE))
    if note:
        draw.text((MARGIN, MARGIN + TITLE + 6), fit(note, font(NOTE), inner), FAINT, font(NOTE))
    for number, (tile, image) in enumerate(zip(tiles, images, strict=True)):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * step_x, top + row * step_y
        sheet.paste(image, (x, y + high - image.height))  # just above its caption
        draw.rectangle((x - 1, y + high - image.height - 1, x + image.width, y + high), outline=GRID)
        for place, line in enumerate(tile.lines):
            text = fit(line.text, font(CAPTION), wide, line.end)
            draw.text((x, y + high + 4 + place * LINE), text, line.colour, font(CAPTION))
    return encode(sheet)


def _needs(text: str, size: int) -> int:
    """The width that a heading asks for: its own, as far as a narrow sheet may grow for it."""
    return min(math.ceil(font(size).getlength(text[:200])), 560)


def _scaled(pixels: UInt8[np.ndarray, "y x c"], side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]))
    longer = max(image.size)
    if longer > side:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    elif (zoom := side // longer) > 1:
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    return image.convert("RGB")
