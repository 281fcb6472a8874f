"""Draws `docs/corruptions.png`: one photograph under each corruption, at severity 3.

    pip install 'cb_vit[corruptions]'
    python docs/draw_corruptions.py

The photograph is scikit-learn's `china.jpg`, by danielbuechele, CC BY 2.0
(https://www.flickr.com/photos/danielbuechele/6061409035).
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cb_vit.monitor.style import INK, font  # noqa: E402
from cb_vit.pp.builder import build  # noqa: E402
from cb_vit.pp.corruptions import CORRUPTIONS  # noqa: E402

SEVERITY, COLUMNS, TILE, LETTERS, GAP = 3, 8, 116, 11, 6  # the last three in pixels


def main():
    """Write the picture."""
    strings = {"clean": ""} | {name: f"|corrupt('{name}', {SEVERITY})" for name in CORRUPTIONS}
    rows, height = -(-len(strings) // COLUMNS), TILE + LETTERS + 2 * GAP
    picture = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, op) in enumerate(strings.items()):
        x, y = GAP + number % COLUMNS * (TILE + GAP), GAP + number // COLUMNS * height
        host = build(f"resize_small(256)|central_crop(224){op}", name).host
        image = host({"image": load_sample_image("china.jpg")}, np.random.default_rng(0))["image"]
        picture.paste(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + TILE + 2), name, INK, font(LETTERS))
    picture.quantize(256, dither=Image.Dither.NONE).save(HERE / "corruptions.png", optimize=True)


if __name__ == "__main__":
    main()
