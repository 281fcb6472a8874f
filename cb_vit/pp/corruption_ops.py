"""The corruptions of ImageNet-C and CIFAR-10-C on float images, after the authors' code, named as there.

Each takes an image [h w c] of 1 or 3 channels from 0 to 1, a generator, and the constants of one severity; it returns
another image, not yet clipped, and leaves the first as it is. Lengths are in pixels.
"""
from __future__ import annotations

import functools
import io
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage, signal

from cb_vit.pp import corruptions

Pixels = Float[np.ndarray, "h w c"]
GREY = (0.299, 0.587, 0.114)  # shares of red, green and blue (ITU-R BT.601), as OpenCV's and Pillow's
FROSTS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # the authors' draw skips the sixth


def gaussian_noise(pixels: Pixels, rng: np.random.Generator, std: float) -> Pixels:
    """Normal noise on each channel."""
    return pixels + rng.normal(0, std, pixels.shape)


def shot_noise(pixels: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    """Poisson noise, as if white were so many photons."""
    return rng.poisson(pixels * photons) / photons


def impulse_noise(pixels: Pixels, rng: np.random.Generator, share: float) -> Pixels:
    """This share of all values becomes 0 or 1, channel by channel."""
    lots = rng.random(pixels.shape)
    return np.where(lots < share / 2, 0.0, np.where(lots < share, 1.0, pixels))


def defocus_blur(pixels: Pixels, rng: np.random.Generator, radius: float, softness: float) -> Pixels:
    """Convolution with a disk, mirrored at the borders."""
    kernel = disk(radius, softness)
    reach = len(kernel) // 2
    padded = np.pad(pixels, [(reach, reach), (reach, reach), (0, 0)], mode="reflect")
    return signal.fftconvolve(padded, kernel[:, :, None], mode="valid", axes=(0, 1))


def disk(radius: float, softness: float) -> Float[np.ndarray, "n n"]:
    """A disk of sum 1, its rim softened by a Gaussian of 3×3 pixels (5×5 for radii above 8).

    Args:
        radius: radius of the disk.
        softness: standard deviation of the Gaussian.
    """
    soft = 1 if radius <= 8 else 2
    reach = math.ceil(radius) + soft  # the authors' grid has no room for the rim of a large disk
    places = np.arange(-reach, reach + 1)
    inside = (places[:, None] ** 2 + places[None] ** 2 <= radius**2).astype(float)
    taps = np.exp(-np.arange(-soft, soft + 1) ** 2 / (2 * softness**2))
    for axis in (0, 1):
        inside = ndimage.correlate1d(inside, taps / taps.sum(), axis=axis, mode="constant")
    return inside / inside.sum()


def glass_blur(pixels: Pixels, rng: np.random.Generator, sigma: float, reach: int, rounds: int) -> Pixels:
    """Pixels take the place of near ones, between two Gaussian blurs.

    The authors mean to swap two pixels; as theirs are views of an array, one is copied over the other, and so here.

    Args:
        sigma: standard deviation of the blurs.
        reach: farthest distance of the other pixel, along either axis.
        rounds: how often all pixels are gone through.
    """
    height, width, _ = pixels.shape
    order = list(range(height * width))
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    places = (rows[:, None] * width + columns[None]).ravel()
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, len(places)))
        for place, other in zip(places.tolist(), (places + down * width + right).tolist(), strict=True):
            order[place] = order[other]  # one after the other: a pixel may travel on
    moved = _gaussian(pixels, sigma).reshape(height * width, -1)[order].reshape(pixels.shape)
    return _gaussian(moved, sigma)


def motion_blur(pixels: Pixels, rng: np.random.Generator, radius: int, sigma: float) -> Pixels:
    """Movement along a line within 45° of the horizontal, see `move`."""
    return move(pixels, radius, sigma, rng.uniform(-45, 45))


def move(pixels: Pixels, radius: int, sigma: float, angle: float) -> Pixels:
    """An image smeared along a line: weights fall off to one side, as half a Gaussian does.

    ImageMagick, which the authors call, does the same to 8-bit pixels: 2 radius + 1 copies moved by whole pixels, the
    border's pixels repeated beyond it. Here nothing is rounded.

    Args:
        radius: half the number of copies.
        sigma: standard deviation of the Gaussian.
        angle: direction in degrees; 0 is to the left, 90 up.
    """
    height, width, _ = pixels.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-steps**2 / (2 * sigma**2))
    turn = math.radians(angle)
    down, right = (np.ceil(steps * part - 0.5).astype(int) for part in (math.sin(turn), math.cos(turn)))
    reach = len(steps)
    padded = np.pad(pixels, [(reach, reach), (reach, reach), (0, 0)], mode="edge")
    found = np.zeros_like(pixels)
    for weight, y, x in zip(weights / weights.sum(), reach + down, reach + right, strict=True):
        found += weight * padded[y:y + height, x:x + width]
    return found


def zoom_blur(pixels: Pixels, rng: np.random.Generator, end: float, step: float) -> Pixels:
    """Mean of the image and its enlargements from 1 to `end`, see `zoom`."""
    factors = np.arange(1, end, step)
    return (pixels + sum(zoom(pixels, factor) for factor in factors)) / (len(factors) + 1)


def zoom(pixels: Pixels, factor: float) -> Pixels:
    """The middle of an image, enlarged to its size: linearly, the corners onto each other, as SciPy's `zoom` does."""
    for axis in (0, 1):
        length = pixels.shape[axis]
        cut = math.ceil(length / factor)
        full = round(cut * factor)
        steps = np.arange(length) + (full - length) // 2
        places = (length - cut) // 2 + steps * (cut - 1) / max(full - 1, 1)
        lower = places.astype(int)
        upper = np.minimum(lower + 1, length - 1)
        share = (places - lower).reshape([-1 if a == axis else 1 for a in range(3)])
        pixels = (1 - share) * pixels.take(lower, axis) + share * pixels.take(upper, axis)
    return pixels


def snow(pixels: Pixels, rng: np.random.Generator, mean: float, std: float, factor: float, threshold: float,
         radius: int, sigma: float, kept: float) -> Pixels:
    """Enlarged noise above a threshold, smeared downwards, twice over a paler image.

    Args:
        mean, std: mean and standard deviation of the noise.
        factor: how much it is enlarged.
        threshold: the value from which on it is a flake.
        radius, sigma: how it is smeared, see `move`, within 45° of the vertical.
        kept: share of the image that is not made paler.
    """
    flakes = zoom(rng.normal(mean, std, (*pixels.shape[:2], 1)), factor)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = move(flakes, radius, sigma, rng.uniform(-135, -45))
    pale = np.maximum(pixels, 1.5 * _grey(pixels) + 0.5)
    return kept * pixels + (1 - kept) * pale + flakes + flakes[::-1, ::-1]


def frost(pixels: Pixels, rng: np.random.Generator, kept: float, share: float, scale: float) -> Pixels:
    """A random part of a photograph of frost, added.

    Args:
        kept: factor of the image.
        share: factor of the frost.
        scale: how much its photograph is scaled; more where that would not cover the image, which the authors' code
            cannot do. By Pillow's bicubic filter, where theirs samples at points.
    """
    height, width, channels = pixels.shape
    picture = _frost(int(rng.integers(len(FROSTS))), scale, height, width)
    top, left = (int(rng.integers(room + 1)) for room in (picture.shape[0] - height, picture.shape[1] - width))
    ice = picture[top:top + height, left:left + width] / 255
    return kept * pixels + share * (ice if channels == 3 else _grey(ice))


@functools.lru_cache(16)
def _frost(number: int, scale: float, height: int, width: int) -> UInt8[np.ndarray, "y x 3"]:
    """A photograph of frost in RGB, scaled, and no smaller than `height` by `width`."""
    with Image.open(corruptions.frost_folder() / FROSTS[number]) as picture:
        picture = picture.convert("RGB")
    scale = max(scale, height / picture.height, width / picture.width)
    size = math.ceil(scale * picture.width), math.ceil(scale * picture.height)
    return np.asarray(picture if scale == 1 else picture.resize(size))


def fog(pixels: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """Clouds are added, see `plasma`, and the brightest value is kept."""
    height, width, _ = pixels.shape
    clouds = plasma(max(2, 1 << (max(height, width) - 1).bit_length()), decay, rng)
    brightest = pixels.max()
    return (pixels + amount * clouds[:height, :width, None]) * brightest / (brightest + amount)


def plasma(size: int, decay: float, rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Clouds from 0 to 1 by the diamond-square algorithm, such that opposite borders fit together.

    Args:
        size: length of a side, a power of two.
        decay: how much rougher a scale is than that of half its length, before the square that the authors have.
        rng: the generator.
    """
    heights, step, rough = np.zeros((size, size)), size, 100.0

    def middle(*four: np.ndarray) -> np.ndarray:
        return sum(four) / 4 + rough * rng.uniform(-rough, rough, four[0].shape)

    while step > 1:
        half = step // 2
        corners, centres = heights[::step, ::step], heights[half::step, half::step]
        below, right = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
        centres[:] = middle(corners, below, right, np.roll(below, -1, 1))
        heights[::step, half::step] = middle(corners, right, centres, np.roll(centres, 1, 0))
        heights[half::step, ::step] = middle(corners, below, centres, np.roll(centres, 1, 1))
        step, rough = half, rough / decay
    heights -= heights.min()
    return heights / heights.max()


def brightness(pixels: Pixels, rng: np.random.Generator, amount: float) -> Pixels:
    """The value of HSV is raised; hue and saturation stay, so that all channels grow by one factor."""
    value = pixels.max(axis=2, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, pixels * (raised / np.maximum(value, 1e-9)), raised)


def contrast(pixels: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    """Each channel is drawn towards its mean."""
    means = pixels.mean(axis=(0, 1), keepdims=True)
    return (pixels - means) * factor + means


def elastic_transform(pixels: Pixels, rng: np.random.Generator, amount: float, sigma: float, shift: float) -> Pixels:
    """A random affine map, and then random displacements that are alike for neighbours.

    The image is sampled once, linearly and mirrored at the borders, where the authors sample after either.

    Args:
        amount: factor of the smoothed displacements, before which they are uniform from -1 to 1; this and the other
            lengths as a share of the image's shorter side.
        sigma: standard deviation of the Gaussian that smooths them.
        shift: how far three corners of a square in the middle are moved, at most.
    """
    shape, side = pixels.shape[:2], min(pixels.shape[:2])
    centre, half = np.array(shape) // 2, max(side // 3, 1)
    corners = centre + half * np.array([(1, 1), (-1, 1), (-1, -1)])
    moved = corners + rng.uniform(-shift * side, shift * side, corners.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # rows: y, x, 1; from where a pixel comes
    places = np.indices(shape).astype(float)
    for axis in (0, 1):
        noise = rng.uniform(-1, 1, shape)
        places[axis] += amount * side * ndimage.gaussian_filter(noise, sigma * side, mode="reflect", truncate=3)
    places = np.moveaxis(np.stack([*places, np.ones(shape)], -1) @ back, -1, 0)
    return np.stack([ndimage.map_coordinates(channel, places, order=1, mode="mirror")
                     for channel in np.moveaxis(pixels, -1, 0)], -1)


def pixelate(pixels: Pixels, rng: np.random.Generator, scale: float) -> Pixels:
    """Made smaller by this factor, and large again."""
    height, width, _ = pixels.shape
    small = _picture(pixels).resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX)
    return _pixels(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(pixels: Pixels, rng: np.random.Generator, quality: int) -> Pixels:
    """Through a JPEG of this quality."""
    file = io.BytesIO()
    _picture(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return _pixels(image)


def _gaussian(pixels: Pixels, sigma: float) -> Pixels:
    return ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")


def _grey(pixels: Pixels) -> Float[np.ndarray, "h w 1"]:
    return pixels @ np.array(GREY)[:, None] if pixels.shape[2] == 3 else pixels


def _picture(pixels: Pixels) -> Image.Image:
    levels = np.rint(pixels * 255).astype(np.uint8)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0])


def _pixels(image: Image.Image) -> Pixels:
    levels = np.asarray(image)
    return (levels if levels.ndim == 3 else levels[:, :, None]) / 255
