"""The fifteen kinds of corruption, of square images (Y, X, 3) from 0 to 1, at severities 0 to 4.

Constants are those of ImageNet-C (Hendrycks and Dietterich 2019), published for 224 px; at other sizes lengths are the
same part of the image.
"""

import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image as Picture

from vitscale.pipeline.evaluation.corruption_tools import (
    Draws,
    Image,
    clouds,
    disk,
    gaussian,
    magnified,
    motion,
    poisson,
    scaled,
)

Kind = Callable[[Image, int, Draws], Image]


def gaussian_noise(image: Image, severity: int, draws: Draws) -> Image:
    return image + (0.08, 0.12, 0.18, 0.26, 0.38)[severity] * draws.normal(*image.shape)


def shot_noise(image: Image, severity: int, draws: Draws) -> Image:
    photons = (60, 25, 12, 5, 3)[severity]
    levels = np.rint(image * 255).astype(np.intp)
    return poisson(np.arange(256) / 255 * photons, levels, draws.uniform(*image.shape)) / photons


def impulse_noise(image: Image, severity: int, draws: Draws) -> Image:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity]
    drawn = draws.uniform(*image.shape)
    return np.where(drawn < share, (drawn < share / 2).astype(image.dtype), image)


def defocus_blur(image: Image, severity: int, draws: Draws) -> Image:
    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity]
    return cv2.filter2D(image, -1, disk(scaled(radius, len(image), 1), softness))


def glass_blur(image: Image, severity: int, draws: Draws) -> Image:
    """Pixels take the colour of a neighbour, one after the other from the last, so that some wander far."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity]
    sigma, reach = scaled(sigma, len(image), 0.3), round(scaled(reach, len(image), 1))
    side = len(image)
    colours = np.floor(gaussian(image, sigma) * 255).reshape(-1, 3)
    moved = np.arange(side - reach, reach, -1)
    rows, columns = np.meshgrid(moved, moved, indexing="ij")
    for _ in range(times):
        across, down = draws.whole(-reach, reach, 2, *rows.shape)
        colours = colours[_wandered(rows, columns, rows + down, columns + across, side)]
    return gaussian(colours.reshape(image.shape) / 255, sigma)


def _wandered(rows: Image, columns: Image, to_rows: Image, to_columns: Image, side: int) -> Image:
    """Where each pixel's colour comes from, if pixels copy others in this order, some of which have copied before.

    Each points at the one it copies; if that one copied before, the chain goes on. Chains halve until all are at their
    ends, which a loop over pixels would take a thousand times as long for.
    """
    turn = np.full(side * side, np.iinfo(np.int64).max)  # never, of pixels at the border
    pixels, others = (rows * side + columns).ravel(), (to_rows * side + to_columns).ravel()
    turn[pixels] = np.arange(len(pixels))
    ends = side * side + np.arange(side * side)  # what was there before, by pixel
    points = np.concatenate([ends, ends])
    points[pixels] = np.where(turn[others] < turn[pixels], others, ends[others])
    while (points[: side * side] < side * side).any():
        points = points[points]
    return points[: side * side] - side * side


def motion_blur(image: Image, severity: int, draws: Draws) -> Image:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity]
    side = len(image)
    return motion(image, scaled(radius, side, 2), scaled(sigma, side, 1), draws.between(-45, 45))


def zoom_blur(image: Image, severity: int, draws: Draws) -> Image:
    last, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity]
    factors = np.arange(1, last, step)
    return (image + sum(magnified(image, factor) for factor in factors)) / (len(factors) + 1)


def snow(image: Image, severity: int, draws: Draws) -> Image:
    mean, deviation, size, least, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity]
    side = len(image)
    flakes = magnified(mean + deviation * draws.normal(side, side), scaled(size, side, 1))
    flakes = np.floor(np.where(flakes < least, 0, flakes.clip(0, 1)) * 255) / 255
    flakes = motion(flakes, scaled(radius, side, 2), scaled(sigma, side, 1), draws.between(-135, -45))[..., None]
    grey = image @ np.array([0.299, 0.587, 0.114])
    whiter = np.maximum(image, grey[..., None] * 1.5 + 0.5)
    return share * image + (1 - share) * whiter + flakes + flakes[::-1, ::-1]


def frost(image: Image, severity: int, draws: Draws) -> Image:
    """Frost made here, not the photographs of the published set, which are others' work: fern-like needles on clouds.

    Strengths are as published; results are close to those of ImageNet-C, not equal.
    """
    keep, add = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity]
    return keep * image + add * frosted(len(image), draws)


def frosted(side: int, draws: Draws) -> Image:
    """A window with ice on it (side, side, 3): bright needles in six directions, thicker where clouds are."""
    thick, ridges = clouds(side, 1.9, draws), 1 - np.abs(2 * clouds(side, 1.6, draws) - 1)
    needles, first = np.zeros((side, side)), draws.between(0, 60)
    for number in range(6):
        seeds = (draws.uniform(side, side) < 0.02) * draws.uniform(side, side)
        ray = motion(seeds, scaled(14, side, 2), scaled(9, side, 1), first + 60 * number)
        needles = np.maximum(needles, ray / max(ray.max(), 1e-9))
    light = 0.12 + 0.35 * thick + 0.3 * ridges**4 + 0.75 * needles * (0.3 + 0.7 * thick)
    return light.clip(0, 1)[..., None] ** np.array([1.25, 1.08, 0.95])  # bluish where it is thin


def fog(image: Image, severity: int, draws: Draws) -> Image:
    strength, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity]
    most = image.max()
    return (image + strength * clouds(len(image), decay, draws)[..., None]) * most / (most + strength)


def brightness(image: Image, severity: int, draws: Draws) -> Image:
    """The value of HSV raised, hue and saturation kept: all channels times the same; black becomes grey."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity], 1)
    return np.where(value > 0, image / np.maximum(value, 1e-9), 1) * brighter


def contrast(image: Image, severity: int, draws: Draws) -> Image:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity] + mean


def elastic_transform(image: Image, severity: int, draws: Draws) -> Image:
    """A random affine map, then each pixel moved by smooth noise (Simard et al. 2003). 244 is published, for 224.

    Noise smoothed over fewer pixels is stronger: that moves are the same part of an image, `strength` goes by its area.
    """
    strength, smooth, shear = (
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    )[severity]
    side = len(image)
    strength, smooth, shear = scaled(scaled(strength, side), side), scaled(smooth, side, 0.5), scaled(shear, side)
    middle, reach = side // 2, side // 3
    here = np.array([[middle + reach, middle + reach], [middle + reach, middle - reach], [middle - reach] * 2])
    there = here + shear * (2 * draws.uniform(3, 2) - 1)
    affine = cv2.getAffineTransform(here.astype(np.float32), there.astype(np.float32))
    image = cv2.warpAffine(image, affine, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    moves = [gaussian(2 * draws.uniform(side, side) - 1, smooth, 3.0, cv2.BORDER_REFLECT) * strength for _ in range(2)]
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    places = [(at + move).astype(np.float32) for at, move in zip((columns, rows), moves, strict=True)]
    return cv2.remap(image, *places, interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def pixelate(image: Image, severity: int, draws: Draws) -> Image:
    side = len(image)
    few = int(side * (0.6, 0.5, 0.4, 0.3, 0.25)[severity])
    small = _picture(image).resize((few, few), Picture.Resampling.BOX)
    return np.asarray(small.resize((side, side), Picture.Resampling.BOX)) / 255


def jpeg_compression(image: Image, severity: int, draws: Draws) -> Image:
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity])
    return np.asarray(Picture.open(file)) / 255


def _picture(image: Image) -> Picture.Image:
    return Picture.fromarray(np.rint(image * 255).astype(np.uint8))


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
