"""From a decoded image to the pixels that the model sees.

Pixels stay uint8 until they are on the device (`normalise`). Random choices derive from (seed, epoch, sample key), so
that they do not depend on the worker or the rank.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitscale.data_prep.decode import MAX_PIXELS, decode_rgb, decode_top
from vitscale.data_prep.integrity import image_format, jpeg_header
from vitscale.model.config import Size, height_width
from vitscale.pipeline.config import AugmentConfig

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two excluded
TRIES = 10  # for a random part with the wanted aspect that fits the image, as in torchvision


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes model input outside of training; stored with checkpoints and exports.

    `img_size` px, cut from the centre after the image was resized to just cover `img_size / crop` (of a square: the
    shorter side to that); then (value / 255 - mean) / std per channel.
    """

    img_size: Size
    crop: float
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # as the paper: values in [-1, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def view(self, rgb: Pixels) -> Pixels:
        """The centre of an image (Y, X, 3) as one of `img_size`."""
        (rows, columns), (height, width) = height_width(self.img_size), rgb.shape[:2]
        tall, wide = min(height, width * rows / columns) * self.crop, min(width, height * columns / rows) * self.crop
        left, top = (width - wide) / 2, (height - tall) / 2
        box = (left, top, left + wide, top + tall)
        image = Image.fromarray(rgb).resize((columns, rows), Image.Resampling.BICUBIC, box=box)
        return np.asarray(image)


def normalise(pixels: Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels (B, Y, X, 3) → normalised images (B, 3, Y, X) of `dtype` on the same device."""
    scale = 1 / (255 * torch.tensor(preprocess.std, device=pixels.device))
    shift = torch.tensor(preprocess.mean, device=pixels.device) * 255 * scale
    return (pixels.float() * scale - shift).permute(0, 3, 1, 2).to(dtype)


def training_view(data: bytes, size: Size, config: AugmentConfig, seed: int, epoch: int, key: str) -> Pixels:
    """A random view of `size` px of an encoded image, a pure function of its arguments. Raises `ImageRejected`."""
    draws = _uniforms(seed, epoch, key_number(key))
    flip = next(draws) < 0.5

    rows, columns = height_width(size)

    def part(height: int, width: int) -> Box:
        random = config.crop == "resized"
        return _random_box(height, width, columns / rows, config.scale_min, draws) if random else (0, 0, width, height)

    view = _cut(*_decode(data, part, rows, columns), rows, columns)
    if config.crop == "shift":
        view = _shift(view, config.shift, draws)
    return cv2.flip(view, 1) if config.flip and flip else view


def key_number(key: str) -> int:
    """64 bits that stand for the key of a sample, as a signed number, which tensors hold."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


def _uniforms(seed: int, epoch: int, number: int) -> Iterator[float]:
    """Numbers in [0, 1) for (seed, epoch, number), by SplitMix64 (Steele et al. 2014)."""
    state = 0
    for word in (seed, epoch, number):
        state = _scrambled(state + word)
    while True:
        state += 0x9E3779B97F4A7C15
        yield (_scrambled(state) >> 11) * 2.0**-53


def _scrambled(word: int) -> int:
    """`order.mixed` of one word."""
    word %= 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def _decode(data: bytes, part: Callable[[int, int], Box], rows: int, columns: int) -> tuple[Pixels, Box]:
    """An image and, in its pixels, the part of it that `part(height, width)` names.

    A JPEG is halved while it is decoded as long as this leaves the part `rows` by `columns` px, and not decoded below.
    """
    header = jpeg_header(data) if image_format(data) == "JPEG" else None
    if header and header.orientation == 1:
        height, width = header.height, header.width
        left, top, right, bottom = part(height, width)
        least = math.ceil(height * rows / (bottom - top)), math.ceil(width * columns / (right - left))
        rgb = decode_top(data, header, bottom, MAX_PIXELS, least)
        if rgb is not None:
            scale = rgb.shape[1] / width
            return rgb, (round(left * scale), round(top * scale), round(right * scale), round(bottom * scale))
    rgb = decode_rgb(data)
    return rgb, part(*rgb.shape[:2])


def _cut(rgb: Pixels, box: Box, rows: int, columns: int) -> Pixels:
    """A part resized: bicubic, or averaged over areas where it becomes half as large or less, lest it aliases."""
    left, top, right, bottom = box
    part = rgb[top : max(bottom, top + 1), left : max(right, left + 1)]
    smaller = part.shape[0] >= 2 * rows and part.shape[1] >= 2 * columns
    return cv2.resize(part, (columns, rows), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def _shift(view: Pixels, most: float, draws: Iterator[float]) -> Pixels:
    rows, columns = view.shape[:2]
    down, across = round(most * rows), round(most * columns)
    top, left = (int(draw * (2 * reach + 1)) for draw, reach in zip(islice(draws, 2), (down, across), strict=True))
    padded = np.pad(view, ((down, down), (across, across), (0, 0)), mode="edge")
    return padded[top : top + rows, left : left + columns]


def _random_box(height: int, width: int, usual: float, scale_min: float, draws: Iterator[float]) -> Box:
    """A part of `scale_min` to 1 of the area with an aspect of 3/4 to 4/3 (Szegedy et al. 2015) times the `usual` one,
    width to height; else the largest at the centre of that."""
    place_x, place_y = islice(draws, 2)
    for _ in range(TRIES):
        area = height * width * (scale_min + (1 - scale_min) * next(draws))
        aspect = usual * math.exp((2 * next(draws) - 1) * math.log(4 / 3))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(place_x * (width - box_width + 1)), int(place_y * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_height, box_width = max(1, min(height, round(width / usual))), max(1, min(width, round(height * usual)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
