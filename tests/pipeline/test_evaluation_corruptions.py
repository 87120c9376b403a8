"""Corruptions beside scipy and naive loops: the same at any time, at any size, and worse with every severity."""

import colorsys
import math
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitscale.errors import UserError
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation.corruption_kinds import KINDS, brightness, glass_blur
from vitscale.pipeline.evaluation.corruption_tools import Draws, clouds, gaussian, magnified, motion, poisson, scaled
from vitscale.pipeline.evaluation.corruptions import ALEXNET, CorruptedView, check_corruptions, corrupt, corruptions

ALONE = World(0, 1, 0, torch.device("cpu"))


def photo(side: int) -> np.ndarray:
    """A picture with edges, gradients and texture, uint8."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y * x), np.sin(40 * x) * np.sin(30 * y)], axis=2)
    disc = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06)[..., None]
    return np.where(disc, [200, 60, 30], 120 + 70 * waves).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 47, 96, 224])
def test_every_corruption_at_every_size(side: int) -> None:
    clean = photo(side)
    for kind in KINDS:
        damage = []
        for severity in range(1, 6):
            made = corrupt(clean, kind, severity, "a")
            assert (made.shape, made.dtype) == (clean.shape, np.uint8)
            assert (made == corrupt(clean, kind, severity, "a")).all()
            damage.append(np.abs(made.astype(float) - clean).mean())
        assert damage[0] > 0.5, kind
        alike = ("elastic_transform", "frost", *(["glass_blur"] if side < 96 else []))  # of few px none moves further
        assert damage[4] > 1.1 * damage[0] or kind in alike, (kind, damage)
        if kind in ("gaussian_noise", "frost", "fog", "snow", "motion_blur", "elastic_transform", "glass_blur"):
            assert (corrupt(clean, kind, 3, "a") != corrupt(clean, kind, 3, "b")).any()
    assert (clean == photo(side)).all()


def test_random_numbers_are_what_they_should_be() -> None:
    from scipy import stats

    draws = Draws("a", 1)
    uniform, normal = draws.uniform(20_000), draws.normal(100, 200).ravel()
    assert stats.kstest(uniform, "uniform").pvalue > 0.01  # the numbers are always the same: passes or not for good
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert np.bincount(draws.whole(-2, 2, 1000) + 2).min() > 200
    means = np.arange(256) / 255 * 60
    levels = np.arange(20_000) % 256
    expected = stats.poisson.ppf(uniform, means[levels])
    assert (poisson(means, levels, uniform) == np.maximum(expected, 0)).all()


@pytest.mark.parametrize(("sigma", "truncate", "mode"), [(0.7, 4, "nearest"), (9, 4, "nearest"), (40, 3, "reflect")])
def test_blur_is_scipys(sigma: float, truncate: float, mode: str) -> None:
    from scipy.ndimage import gaussian_filter

    border = {"nearest": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT}[mode]
    for image in (photo(50) / 255, (photo(50) / 255)[..., 0]):
        expected = gaussian_filter(image, (sigma, sigma, 0)[: image.ndim], mode=mode, truncate=truncate)
        np.testing.assert_allclose(gaussian(image, sigma, truncate, border), expected, atol=1e-12)  # float64


@pytest.mark.parametrize("factor", [1, 1.01, 1.3, 2.5, 4.5])
def test_magnification_is_scipys(factor: float) -> None:
    from scipy.ndimage import zoom

    for side in (32, 61, 224):
        image, part = photo(side) / 255, math.ceil(side / factor)
        first = (side - part) // 2
        whole = np.asarray(zoom(image[first : first + part, first : first + part], (factor, factor, 1), order=1))
        cut = (len(whole) - side) // 2
        np.testing.assert_allclose(magnified(image, factor), whole[cut : cut + side, cut : cut + side], atol=1e-12)


@pytest.mark.parametrize("angle", [-131.0, -45, 0, 17.5, 44])
def test_motion_is_that_of_a_naive_loop(angle: float) -> None:
    image, side, width = photo(24)[..., 0] / 255, 24, 11
    expected = np.zeros((side, side))
    weights = [math.exp(-0.5 * (i / 3) ** 2) for i in range(width)]
    for i, weight in enumerate(weights):
        down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        for y in range(side):
            for x in range(side):
                expected[y, x] += weight / sum(weights) * image[np.clip(y + down, 0, 23), np.clip(x + right, 0, 23)]
    np.testing.assert_allclose(motion(image, 5, 3, angle), expected, atol=1e-12)


@pytest.mark.parametrize("severity", range(5))
def test_glass_is_that_of_a_loop_over_pixels(severity: int) -> None:
    side = 40
    image = photo(side) / 255
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity]
    sigma, reach = scaled(sigma, side, 0.3), round(scaled(reach, side, 1))
    colours, draws = np.floor(gaussian(image, sigma) * 255), Draws(7)
    for _ in range(times):
        steps = draws.whole(-reach, reach, 2, side - 2 * reach, side - 2 * reach)
        for i, y in enumerate(range(side - reach, reach, -1)):
            for j, x in enumerate(range(side - reach, reach, -1)):
                colours[y, x] = colours[y + steps[1, i, j], x + steps[0, i, j]]
    assert (glass_blur(image, severity, Draws(7)) == gaussian(colours / 255, sigma)).all()


def test_brightness_is_that_of_hsv() -> None:
    image = photo(32) / 255
    image[:4] = 0
    got = brightness(image, 2, Draws(0))
    for y, x in ((0, 0), (9, 9), (20, 3), (15, 15)):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[y, x])
        assert got[y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1)), abs=1e-14)


def test_strengths_are_the_published_ones() -> None:
    grey = np.full((224, 224, 3), 128, np.uint8)
    for severity, deviation in enumerate((0.08, 0.12), 1):
        found = corrupt(grey, "gaussian_noise", severity, "a") / 255
        assert found.std() == pytest.approx(deviation, rel=0.02)  # of 150,528 values, cut off beyond 4 deviations
    found = corrupt(grey, "impulse_noise", 5, "a")
    assert np.mean(found != 128) == pytest.approx(0.27, abs=0.005)
    assert np.mean(found == 255) == pytest.approx(0.135, abs=0.005)
    found = corrupt(grey, "shot_noise", 3, "a") / 255
    assert (found.mean(), found.std()) == pytest.approx((128 / 255, math.sqrt(128 / 255 / 12)), abs=0.01)
    heights = clouds(224, 2, Draws(0))
    assert heights.shape == (224, 224)
    assert (heights.min() >= 0, heights.max() <= 1) == (True, True)
    smooth, rough = (np.abs(np.diff(clouds(256, decay, Draws(0)), axis=0)).mean() for decay in (2, 1.4))
    assert smooth < rough
    assert len(np.unique(corrupt(photo(224), "pixelate", 5, "a"), axis=0)) == 56


class Right(nn.Module):
    """An objective that is right about the images whose mean is below a threshold, which corruptions move."""

    def forward(self, batch: dict[str, Tensor], predict: bool = False) -> Tensor:
        dark = batch["pixels"].float().mean(dim=(1, 2, 3)) < 85
        return torch.nn.functional.one_hot(torch.where(dark, batch["label"], (batch["label"] + 1) % 10), 10).float()


def test_errors_add_up(digits: Any) -> None:
    store, preprocess = Store(str(digits.test), "DATASET"), Preprocess(32, 1.0)
    settings = LoaderSettings(120, 0)
    got = dict(corruptions(Right(), store, preprocess, settings, ALONE, 10, ["contrast", "brightness"]))
    names = [f"contrast_{s}" for s in range(1, 6)] + ["contrast_error"]
    assert list(got) == [*names, *(name.replace("contrast", "brightness") for name in names), "mean_error"]
    sample = store.read(3)
    seen = CorruptedView(preprocess, "brightness", 2)(sample.data, 0, sample.key)
    assert got["brightness_2"][3] == (seen.mean() < 85)
    for kind in ("contrast", "brightness"):
        shares = [got[f"{kind}_{severity}"].mean() for severity in range(1, 6)]
        assert got[f"{kind}_error"].mean() == pytest.approx(1 - np.mean(shares), abs=1e-12)
    assert got["mean_error"].mean() == pytest.approx(
        (got["contrast_error"].mean() + got["brightness_error"].mean()) / 2, abs=1e-12
    )
    assert 0.1 < got["mean_error"].mean() < 0.9
    assert list(ALEXNET) == list(KINDS)


def test_what_cannot_be_corrupted_is_refused() -> None:
    with pytest.raises(UserError, match="corruptions=rain; expected some of gaussian_noise"):
        check_corruptions(["fog", "rain"], Preprocess(224, 1.0))
    with pytest.raises(UserError, match="images of 28 px; expected squares of 32 px or more"):
        check_corruptions(["fog"], Preprocess(28, 1.0))
