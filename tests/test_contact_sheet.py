"""Contact sheets: every image is there pixel for pixel, and no caption leaves its tile."""
import io

import numpy as np
import pytest
from PIL import Image

from cb_vit.monitor.contact_sheet import GAP, MARGIN, Line, Tile, draw_sheet
from cb_vit.monitor.style import fit, font

LONG = "a class whose name has forty letters, 123"


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int32)


def find(sheet, image):
    """Where the image stands in the sheet, (y, x): the places where its first pixels are, and all others."""
    high, wide, _ = image.shape
    first = (sheet[:-high + 1, :-wide + 1] == image[0, 0]).all(-1)
    return [(int(y), int(x)) for y, x in np.argwhere(first) if (sheet[y:y + high, x:x + wide] == image).all()]


@pytest.mark.parametrize("shape", [(8, 8, 1), (12, 20, 3), (160, 90, 3)])
def test_small_images_are_enlarged_by_whole_numbers_and_stay_what_they_are(shape):
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    sheet = pixels(draw_sheet([Tile(image, [Line("name")]) for image in images], "title"))
    zoom = 160 // max(shape)
    for image in images:
        expected = np.broadcast_to(image, (*shape[:2], 3)).repeat(zoom, 0).repeat(zoom, 1)
        assert len(find(sheet, expected)) == 1


def test_large_images_are_reduced_and_keep_their_shape():
    blue = np.zeros((300, 600, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
    sheet = pixels(draw_sheet([Tile(blue, [Line("")])], ""))
    ys, xs = np.nonzero((sheet == [0, 0, 255]).all(-1))
    assert (np.ptp(ys) + 1, np.ptp(xs) + 1, xs.min()) == (80, 160, MARGIN)


@pytest.mark.parametrize("count", [1, 5, 64])
def test_captions_stay_in_their_tiles(count):
    tiles = [Tile(np.full((9, 8, 3), 200, np.uint8), [Line(LONG * 3, " 0.38", "red"), Line("\x1b[31m猫\u202e\ud800")])
             for _ in range(count)]
    sheet = pixels(draw_sheet(tiles, LONG, "note"))
    letters = (sheet[..., 0] > sheet[..., 1] + 30)  # what is red
    columns = np.flatnonzero(letters.any(0)) - MARGIN
    assert (columns % (160 // 9 * 8 + GAP) < 160 // 9 * 8).all() and letters.any()


@pytest.mark.parametrize("end", ["", " 0.38"])
def test_what_is_too_long_keeps_both_ends(end):
    letters = font(12)
    for width in (60, 100, 160):
        text = fit(LONG, letters, width, end)
        assert letters.getlength(text) <= width < letters.getlength(LONG + end)
        start, tail = text.removesuffix(end).split("…")
        assert LONG.startswith(start) and LONG.endswith(tail) and start and text.endswith(end)
        longer = LONG[:len(start) + 1] + "…" + LONG[len(LONG) - len(tail) - 1:] + end
        assert letters.getlength(longer) > width  # it is no shorter than it must be
    assert fit("cat", letters, 100, end) == "cat" + end
    assert fit(LONG, letters, 1, end) == "…" + end


def test_controls_are_escaped():
    assert fit("\x1b[31mred\u202e\n", font(12), 500) == r"\x1b[31mred\u202e\n"
