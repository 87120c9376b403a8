"""Confidence intervals by the bootstrap (Efron 1979): percentiles of what resampled images come to; and of shares alone
by Wilson's score (1927)."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitscale.pipeline.data.order import random_words

RESAMPLES = 1_000
LEVEL = 0.95
STREAM = 3  # second word of the Philox key, which no order of data uses
TOGETHER = 1 << 24  # images drawn at a time: some 0.4 GB

Numbers = NDArray[np.float64]


class Interval(NamedTuple):
    """A value, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def resampled_sums(values_NM: Numbers, seed: int = 0, resamples: int = RESAMPLES) -> Numbers:
    """Sums (R, M) of the rows of `values_NM` over N images drawn with replacement, for each of R resamples.

    A pure function of its arguments: resample r draws image ⌊wN / 2³²⌋ for the r-th N words w of 32 bits of Philox
    (two of each of 64 bits, the upper one first). No image is more than N / 2³² likelier than another.
    """
    images = len(values_NM)
    sums = np.empty((resamples, values_NM.shape[1]))
    words = -(-images // 2)
    for first in range(0, resamples, max(1, TOGETHER // images)):
        last = min(resamples, first + max(1, TOGETHER // images))
        counts = np.empty((last - first, images), np.float64)
        for row in range(first, last):
            drawn = random_words(seed, STREAM, (row, 0), words)
            halves = np.stack([drawn >> np.uint64(32), drawn & np.uint64(2**32 - 1)], axis=1).ravel()[:images]
            numbers = (halves * np.uint64(images)) >> np.uint64(32)
            counts[row - first] = np.bincount(numbers.astype(np.int64), minlength=images)
        sums[first:last] = counts @ values_NM
    return sums


def interval(
    values_NM: Numbers, statistic: Callable[[Numbers], Numbers], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """`statistic` of the means of the columns, (R, M) → (R,), with its percentile interval at `LEVEL`."""
    found = statistic(resampled_sums(values_NM, seed, resamples) / len(values_NM))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = statistic(values_NM.mean(axis=0, keepdims=True))[0]
    return Interval(float(value), float(low), float(high))


def mean_intervals(values_NM: Numbers, seed: int = 0, resamples: int = RESAMPLES) -> list[Interval]:
    """The mean of each column with its interval."""
    means = resampled_sums(values_NM, seed, resamples) / len(values_NM)
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [Interval(*map(float, each)) for each in zip(values_NM.mean(axis=0), *ends, strict=True)]


def wilson(share: float, images: int) -> Interval:
    """A share of `images` with its score interval at `LEVEL` (Wilson 1927), which a share of 0 or 1 has too."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    scale = 1 + z * z / images
    middle = (share + z * z / (2 * images)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))
