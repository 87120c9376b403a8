"""What corruptions of images are made of: random numbers, blurs, magnification, clouds. Images are float, 0 to 1."""

import hashlib
import math

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating]
PUBLISHED = 224  # px a side, for which lengths were published


class Draws:
    """Random numbers, a pure function of the words it is made with: raw Philox, the same between versions of numpy."""

    def __init__(self, *words: object) -> None:
        digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """In [0, 1)."""
        words = np.asarray(self._bits.random_raw(math.prod(shape)), dtype=np.uint64)
        return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.uniform(1)[0])

    def whole(self, low: int, high: int, *shape: int) -> NDArray[np.int64]:
        """Whole numbers from `low` to `high` (excluded)."""
        return low + (self.uniform(*shape) * (high - low)).astype(np.int64)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        """Of mean 0 and deviation 1 (Box and Muller 1958)."""
        one, other = self.uniform(2, math.prod(shape))
        return (np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * np.pi * other)).reshape(shape)


def poisson(means: NDArray[np.float64], levels: NDArray[np.intp], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Poisson numbers of mean `means[levels]`, the inverse of the distribution function at `uniform`."""
    most = int(means.max() + 12 * math.sqrt(means.max()) + 20)  # none is above it before the 46th bit of `uniform`
    terms = [np.exp(-means)]
    for number in range(1, most):
        terms.append(terms[-1] * means / number)
    below = np.minimum(np.cumsum(terms, axis=0).T, 1) + np.arange(len(means))[:, None]  # one rising row, level by level
    return np.searchsorted(below.ravel(), uniform + levels, side="right") - levels * most


def scaled(length: float, side: int, least: float = 0.0) -> float:
    """A length in px published for 224 px, for images of `side` px: the same part of the image, or `least`."""
    return length if side == PUBLISHED else max(least, length * side / PUBLISHED)


def gaussian(image: Image, sigma: float, truncate: float = 4.0, border: int = cv2.BORDER_REPLICATE) -> Image:
    """Gaussian blur with a kernel cut off at `truncate` sigmas, as scipy's `gaussian_filter`."""
    radius = int(truncate * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    if radius < min(image.shape[:2]):
        return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=border)
    for axis in range(2):  # a kernel wider than the image: its weights fold onto the pixels that the border repeats
        image = np.moveaxis(np.tensordot(_folded(kernel, image.shape[axis], border), image, (1, axis)), 0, axis)
    return image


def _folded(kernel: Image, side: int, border: int) -> Image:
    """The blur of one axis as a matrix (side, side)."""
    matrix, radius = np.zeros((side, side)), len(kernel) // 2
    for offset, weight in enumerate(kernel, -radius):
        at = np.arange(side) + offset
        if border == cv2.BORDER_REPLICATE:
            at = at.clip(0, side - 1)
        else:
            at = at % (2 * side)  # d c b a | a b c d | d c b a
            at = np.where(at < side, at, 2 * side - 1 - at)
        np.add.at(matrix, (np.arange(side), at), weight)
    return matrix


def disk(radius: float, softness: float) -> Image:
    """The kernel of a lens out of focus: a disk whose edge a small Gaussian softens."""
    reach, width = (8, 3) if radius <= 8 else (math.ceil(radius), 5)
    line = np.arange(-reach, reach + 1)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float32)
    return cv2.GaussianBlur(inside / inside.sum(), (width, width), softness)


def motion(image: Image, radius: float, sigma: float, angle: float) -> Image:
    """Blur along a line from each pixel, at `angle` degrees, by half a Gaussian: `MotionBlurImage` of ImageMagick."""
    width = 2 * math.ceil(radius) + 1
    weights = np.exp(-0.5 * (np.arange(width) / sigma) ** 2)
    kernel = np.zeros((2 * width + 1, 2 * width + 1))
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    for number, weight in enumerate(weights / weights.sum()):
        kernel[width + math.ceil(number * down - 0.5), width + math.ceil(number * right - 0.5)] += weight
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def magnified(image: Image, factor: float) -> Image:
    """The centre of a square image magnified to its size, linearly, corners on corners, as scipy's `zoom`."""
    side = len(image)
    part = math.ceil(side / factor)
    whole = round(part * factor)
    places = (np.arange(side) + (whole - side) // 2) * ((part - 1) / max(whole - 1, 1))
    low = np.minimum(places.astype(int), part - 1)
    high, share = np.minimum(low + 1, part - 1), places - low
    image = image[(side - part) // 2 :][:part, (side - part) // 2 :][:, :part]
    share = share.reshape(-1, *[1] * (image.ndim - 1)).astype(image.dtype)
    image = image[low] * (1 - share) + image[high] * share
    share = share.reshape(1, -1, *[1] * (image.ndim - 2))
    return image[:, low] * (1 - share) + image[:, high] * share


def clouds(side: int, decay: float, draws: Draws) -> Image:
    """A map (side, side) from 0 to 1 by diamonds and squares (Fournier et al. 1982), rougher for a smaller `decay`.

    Cut out of one whose side is a power of two, whose opposite edges meet. The amplitude, and the range of the noise
    that it multiplies, both fall by `decay` from scale to scale, as published.
    """
    whole = 1 << (side - 1).bit_length()
    heights, step, amplitude = np.zeros((whole, whole)), whole, 100.0
    while step >= 2:
        half, shape = step // 2, (whole // step, whole // step)
        noise = amplitude * amplitude * (2 * draws.uniform(3, *shape) - 1)
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = (pairs + np.roll(pairs, -1, axis=1)) / 4 + noise[0]
        heights[half::step, half::step] = centres
        across = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        along = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[::step, half::step] = across / 4 + noise[1]
        heights[half::step, ::step] = along / 4 + noise[2]
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return (heights / heights.max())[:side, :side]
