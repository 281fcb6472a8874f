"""Pictures of attention maps: each over its image, and many images on a contact sheet."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cb_vit.monitor.contact_sheet import Line, Tile, draw_sheet
from cb_vit.monitor.style import FAINT, INK, to_png

COLOURS = "inferno"  # perceptually uniform
OPAQUE = 0.8  # of the strongest colour; the photograph shows through even there
RANGE = 0.5, 99.5  # percentiles of the maps' values, as a few patches may draw nearly everything
FLAT, STEEP = 1.02, 100.0  # least and greatest quotient of the ends of a scale
COLUMNS = 7
TILE, GAP, LINE, TOP, MARGIN, BAR = 1.9, 0.12, 0.32, 0.98, 0.15, 0.75  # inches
SIDE = 224  # pixels, at least, of a picture
PAIR = 320  # pixels of an image and its map side by side, at most


@dataclasses.dataclass(frozen=True)
class Scale:
    """What colour stands for how much attention: logarithmic, as multiples of uniform attention are.

    Attributes:
        low: value that leaves the photograph as it is, in grey.
        high: value of the strongest colour.
        extend: whether there are values beyond, as a colour bar of matplotlib has it: "neither", "min", "max", "both".
    """

    low: float
    high: float
    extend: str = "neither"

    @classmethod
    def of(cls, values: Float[np.ndarray, "*n"]) -> Scale:
        """The scale that shows these values: all the structure that there is, but not the noise of a flat map."""
        low, high = map(float, np.percentile(values, RANGE))
        high = high or 1.0  # there is no attention at all
        low = max(low, high / STEEP)
        if high < FLAT * low:
            middle = math.sqrt(low * high)
            low, high = middle / math.sqrt(FLAT), middle * math.sqrt(FLAT)
        beyond = values.min() < low, values.max() > high
        return cls(low, high, {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither"))

    def strength(self, values: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """From 0 at `low` to 1 at `high`, and no further."""
        inside = np.clip(values, self.low, self.high)
        return np.log(inside / self.low) / math.log(self.high / self.low)

    def paint(
        self, image: UInt8[np.ndarray, "y x c"], patches: Float[np.ndarray, "gy gx"]
    ) -> UInt8[np.ndarray, "y x 3"]:
        """The map over the image."""
        from matplotlib import colormaps
        rgb = np.broadcast_to(image, (*image.shape[:2], 3)) / 255
        strength = self.strength(_enlarge(patches, rgb.shape[:2]))
        return np.uint8(np.rint(255 * overlay(rgb, colormaps[COLOURS](strength)[..., :3], strength)))

    def legend(self) -> Any:
        """What a colour bar of matplotlib is made of: the colours as they are over a middling grey."""
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, LogNorm
        strength = np.linspace(0, 1, 256)[None]
        colours = overlay(np.full((1, 256, 3), 0.5), colormaps[COLOURS](strength)[..., :3], strength)
        return ScalarMappable(LogNorm(self.low, self.high), ListedColormap(colours[0]))

    def ticks(self) -> list[float]:
        """Values to name beside a colour bar."""
        return np.geomspace(self.low, self.high, 5).tolist()


def draw_maps(
    image: UInt8[np.ndarray, "y x c"], maps: Mapping[str, Float[np.ndarray, "gy gx"]], title: str, note: str = "",
    apart: Collection[str] = (),
) -> bytes:
    """The image, and each map over it, as a PNG; they share one scale of colours.

    Args:
        image: the image as the model saw it.
        maps: the maps in multiples of uniform attention, by their titles.
        title: text above the pictures.
        note: a smaller line below the title.
        apart: titles of maps on another level than the others, each with a scale of its own, whose ends its title says.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to the user
    rows = math.ceil((1 + len(maps)) / COLUMNS)
    columns = math.ceil((1 + len(maps)) / rows)
    tile = TILE * image.shape[0] / image.shape[1]
    width, height = MARGIN + columns * (TILE + GAP) + BAR, TOP + rows * (tile + LINE) - LINE + MARGIN
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def axes(left: float, top: float, width_: float, height_: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + height_) / height, width_ / width, height_ / height))

    scale = Scale.of(np.concatenate([np.ravel(patches) for name, patches in maps.items() if name not in apart]))
    zoom = math.ceil(SIDE / min(image.shape[:2]))  # a map is smooth whatever the pixels are
    image = image.repeat(zoom, 0).repeat(zoom, 1)
    pictures = {"input": np.broadcast_to(image, (*image.shape[:2], 3))}
    for name, patches in maps.items():
        own = Scale.of(patches) if name in apart else scale
        ends = f", {own.low:.3g} to {own.high:.3g}" if name in apart else ""
        pictures[name + ends] = own.paint(image, patches)
    for number, (name, picture) in enumerate(pictures.items()):
        row, column = divmod(number, columns)
        ax = axes(MARGIN + column * (TILE + GAP), TOP + row * (tile + LINE), TILE, tile)
        ax.imshow(picture, interpolation="nearest", aspect="auto")
        ax.set_title(name, loc="left", fontsize=9, color=FAINT if name == "input" else INK, pad=4)
        ax.set_axis_off()
    bar = figure.colorbar(scale.legend(), extend=scale.extend,
                          cax=axes(MARGIN + columns * (TILE + GAP) + 0.05, TOP, 0.11, rows * (tile + LINE) - LINE))
    ticks = scale.ticks()
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("× uniform attention", color=FAINT, fontsize=8)
    bar.ax.tick_params(length=0, colors=FAINT, labelsize=8)
    bar.outline.set_visible(False)
    for below, text, colour, size in ((0.25, title, INK, 11.5), (0.5, note, FAINT, 8.5)):
        figure.text(MARGIN / width, 1 - below / height, text, va="center", color=colour, fontsize=size,
                    parse_math=False)
    return to_png(figure)


def draw_index(
    images: Sequence[UInt8[np.ndarray, "y x c"]], maps: Sequence[Float[np.ndarray, "gy gx"]],
    captions: Sequence[Sequence[Line]], title: str, what: str,
) -> bytes:
    """Many images and a map of each, side by side, as a PNG; all share one scale of colours.

    Args:
        images: the images as the model saw them.
        maps: the map of each, in multiples of uniform attention.
        captions: the lines below each.
        title: text above.
        what: description of the maps.
    """
    scale = Scale.of(np.concatenate([np.ravel(patches) for patches in maps]))
    tiles = []
    for image, patches, lines in zip(images, maps, captions, strict=True):
        zoom = max(1, PAIR // 2 // max(image.shape[:2]))
        image = image.repeat(zoom, 0).repeat(zoom, 1)
        pair = np.broadcast_to(image, (*image.shape[:2], 3)), scale.paint(image, patches)
        tiles.append(Tile(np.concatenate(pair, axis=1), lines))
    note = f"{what}; colours from {scale.low:.3g} (none) to {scale.high:.3g} times uniform attention"
    return draw_sheet(tiles, title, note, side=PAIR)


def overlay(
    image: Float[np.ndarray, "y x 3"], colours: Float[np.ndarray, "y x 3"], strength: Float[np.ndarray, "y x"]
) -> Float[np.ndarray, "y x 3"]:
    """Colours over the image in grey, opaque as far as they are strong; everything from 0 to 1.

    Args:
        image: the image.
        colours: the colour of each pixel.
        strength: how strong the colour of each pixel is.
    """
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]  # luma, ITU-R BT.601
    alpha = OPAQUE * strength[..., None]
    return (1 - alpha) * grey + alpha * colours


def _enlarge(patches: Float[np.ndarray, "gy gx"], size: tuple[int, int]) -> Float[np.ndarray, "y x"]:
    return np.asarray(Image.fromarray(np.asarray(patches, np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))
