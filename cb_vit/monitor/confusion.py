"""Pictures of what is taken for what: the whole matrix of a few classes, the worst pairs of many. Drawn by Pillow."""
from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from cb_vit.monitor.style import FAINT, GRID, INK, RIGHT, WRONG, encode, fit, font

Pairs = Mapping[tuple[int, int], int]  # (true class, predicted class) → number of examples
MOST_CLASSES = 30  # in a matrix
MOST_PAIRS = 30
MARGIN, TOP = 14, 62  # pixels
NAME = 220  # pixels of a name, at most
LETTERS, SMALL = 12, 11  # heights of letters


def draw_confusion(pairs: Pairs, names: Sequence[str], title: str) -> bytes:
    """How often each class is taken for each, as a PNG.

    Args:
        pairs: number of examples of each (true, predicted) pair of classes; none where it is 0.
        names: names of all classes.
        title: text above.
    """
    return (_matrix if len(names) <= MOST_CLASSES else _worst_pairs)(pairs, names, title)


def _matrix(pairs: Pairs, names: Sequence[str], title: str) -> bytes:
    letters, count = font(LETTERS), len(names)
    cell = min(44, max(26, 560 // count))
    shown = [fit(name, letters, NAME) for name in names]
    space = int(max(letters.getlength(name) for name in shown)) + 8
    left, top = MARGIN + space, TOP + space
    picture, draw = _begin(left + count * cell + MARGIN, top + count * cell + MARGIN, title,
                           "rows: the true class, columns: what it is taken for; darker: more of the row")
    totals = _totals(pairs)
    for number, name in enumerate(shown):
        draw.text((left - 6, top + (number + 0.5) * cell), name, INK, letters, "rm")
        upright = Image.new("RGB", (space - 2, LETTERS + 4), "white")
        ImageDraw.Draw(upright).text((0, (LETTERS + 4) / 2), name, INK, letters, "lm")
        picture.paste(upright.rotate(90, expand=True), (int(left + (number + 0.5) * cell - LETTERS / 2 - 2), TOP))
    for true in range(count):
        for predicted in range(count):
            x, y, number = left + predicted * cell, top + true * cell, pairs.get((true, predicted), 0)
            share = number / max(totals[true], 1)
            # By its root, as one mistake in a hundred would not be seen.
            fill = _blend("#ffffff", RIGHT if true == predicted else WRONG, np.sqrt(share))
            draw.rectangle((x, y, x + cell, y + cell), fill, GRID)
            if number:
                text = fit(f"{number}", font(SMALL), cell + 8)
                draw.text((x + cell / 2, y + cell / 2), text, "white" if share > 0.3 else INK, font(SMALL), "mm")
    return encode(picture)


def _worst_pairs(pairs: Pairs, names: Sequence[str], title: str) -> bytes:
    letters, line, bar, totals = font(LETTERS), 20, 180, _totals(pairs)
    worst = sorted(((number, *pair) for pair, number in pairs.items() if pair[0] != pair[1]),
                   key=lambda one: (-one[0], -one[0] / totals[one[1]], one[1:]))[:MOST_PAIRS]
    columns = MARGIN, MARGIN + NAME + 12, MARGIN + 2 * (NAME + 12)
    picture, draw = _begin(columns[2] + bar + 110 + MARGIN, TOP + line * (len(worst) + 1) + MARGIN, title,
                           "the mistakes that are made most often")
    for x, heading in zip(columns, ("true class", "taken for", "of the true class"), strict=True):
        draw.text((x, TOP), heading, FAINT, font(SMALL))
    for row, (number, true, predicted) in enumerate(worst, 1):
        y, share = TOP + row * line, number / totals[true]
        draw.text((columns[0], y), fit(names[true], letters, NAME), INK, letters)
        draw.text((columns[1], y), fit(names[predicted], letters, NAME), WRONG, letters)
        draw.rectangle((columns[2], y + 1, columns[2] + bar, y + 13), GRID)
        draw.rectangle((columns[2], y + 1, columns[2] + bar * share, y + 13), WRONG)
        draw.text((columns[2] + bar + 8, y), f"{number:,} of {totals[true]:,}", INK, letters)
    return encode(picture)


def _totals(pairs: Pairs) -> collections.Counter[int]:
    """Number of examples of each true class."""
    totals: collections.Counter[int] = collections.Counter()
    for (true, _), number in pairs.items():
        totals[true] += number
    return totals


def _begin(width: int, height: int, title: str, note: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    width = max(width, 500)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 2), fit(title, font(17), width - 2 * MARGIN), INK, font(17))
    draw.text((MARGIN, MARGIN + 22), fit(note, font(LETTERS), width - 2 * MARGIN), FAINT, font(LETTERS))
    return picture, draw


def _blend(low: str, high: str, share: float) -> tuple[int, ...]:
    pair = zip(ImageColor.getrgb(low), ImageColor.getrgb(high), strict=True)
    return tuple(round(a + (b - a) * share) for a, b in pair)
