"""Accuracy on corrupted images, as on ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261)."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitscale.data_prep.decode import decode_rgb
from vitscale.errors import UserError
from vitscale.model.config import Size, in_pixels
from vitscale.pipeline.data.augment import Pixels, Preprocess
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation.corruption_kinds import KINDS
from vitscale.pipeline.evaluation.corruption_tools import Draws
from vitscale.pipeline.evaluation.outcomes import outcomes

SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 32
ALEXNET = {  # mean errors over the severities, by which the paper divides
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
IMAGENET_CLASSES = 1_000


def corrupt(pixels: Pixels, kind: str, severity: int, key: str) -> Pixels:
    """A corrupted copy of a square image (Y, X, 3), of 32 px a side or more: a pure function of its arguments."""
    found = KINDS[kind](pixels / 255, severity - 1, Draws(kind, severity, key))
    # products of whole numbers by 1 / 255 may end just below them; otherwise rounded down, as published
    return np.floor(found.clip(0, 1) * 255 + 1e-6).astype(np.uint8)


@dataclass(frozen=True)
class CorruptedView:
    """The central view, corrupted. `vitscale.pipeline.data.loader.View`."""

    preprocess: Preprocess
    kind: str
    severity: int

    @property
    def size(self) -> Size:
        return self.preprocess.img_size

    def __call__(self, data: bytes, epoch: int, key: str) -> Pixels:
        return corrupt(self.preprocess.view(decode_rgb(data)), self.kind, self.severity, key)


def check_corruptions(kinds: Sequence[str], preprocess: Preprocess) -> None:
    """Raise `UserError` for kinds that there are not, or twice, and for images too small to be told from noise."""
    for kind in kinds:
        twice = kinds.count(kind) > 1
        if kind not in KINDS or twice:
            near = [] if twice else difflib.get_close_matches(kind.lower(), KINDS, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else "Join several by +."
            got = f"corruptions={kind}{' twice' if twice else ''}"
            raise UserError("--suite", got, f"some of {', '.join(KINDS)}", remedy)
    size = preprocess.img_size
    if isinstance(size, tuple) or size < LEAST_SIDE:
        got = f"corruptions with a network for images of {in_pixels(size)}"
        raise UserError("--suite", got, f"squares of {LEAST_SIDE} px or more", "Leave this suite out.")


def corruptions(
    objective: nn.Module,
    store: Store,
    preprocess: Preprocess,
    settings: LoaderSettings,
    world: World,
    classes: int,
    kinds: Sequence[str] = tuple(KINDS),
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield `fog_3`, …, for each image 1 if it is right at that severity, else 0, and what they come to.

    `KIND_error` is the share of wrong answers over the severities, `mean_error` over all kinds as well. With all kinds
    and 1,000 classes `mce`, the paper's mean corruption error: errors of each kind divided by AlexNet's.
    """
    errors = {}
    for kind in kinds:
        errors[kind] = np.zeros(len(store))
        for severity in SEVERITIES:
            found = outcomes(objective, store, CorruptedView(preprocess, kind, severity), settings, world)
            right = (found.best == found.label).astype(np.float64)
            errors[kind] += (1 - right) / len(SEVERITIES)
            yield f"{kind}_{severity}", right
        yield f"{kind}_error", errors[kind]
    yield "mean_error", np.mean(list(errors.values()), axis=0)
    if classes == IMAGENET_CLASSES and set(kinds) == set(KINDS):
        yield "mce", np.mean([errors[kind] / ALEXNET[kind] for kind in kinds], axis=0)
