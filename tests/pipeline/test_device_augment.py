"""Augmentation on the device: against Pillow, against its distributions, and the same bits in any batch."""

import hashlib
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.errors import UserError
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data import device_augment as device
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.device_augment import DeviceAugment, beta_quantile, random_bits, uniforms
from vitscale.pipeline.objectives.supervised import Supervised, soft_cross_entropy

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
CLASSES = 10
GOLDEN_BITS = [[2391539541053276776, 920862675595841680], [1596193942043497256, -5635463988372729271]]
GOLDEN_UNIFORMS = [[0.15220073211132712, 0.47790442581392145], [0.9745269243194258, 0.7615126032239008]]
GOLDEN_PIXELS, GOLDEN_TARGETS = "04a8c27ffcb8ba6c", "4cae57d9f62b02bc"
PER_ROW = AugmentConfig(randaugment_ops=3, erase=0.5)
ALL = replace(PER_ROW, mixup=0.8, cutmix=1.0)


@cache
def photos() -> list[Image.Image]:
    """Two photographs of 112 × 80 px."""
    return [Image.fromarray(image).resize((112, 80), Image.Resampling.BICUBIC) for image in load_sample_images().images]


def stacked(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def batch_of(rows: int, height: int = 24, width: int = 32, epoch: int = 0) -> dict[str, Tensor]:
    """Rows 0 … of a global batch: random colours on a slope, labels in turn."""
    key = torch.arange(rows) * 0x1234567_89ABCDE - 2**61
    noise = random_bits(1, 0, key, torch.zeros_like(key), height * width * 3) & 127
    slope = torch.arange(height)[:, None, None] + torch.arange(width)[None, :, None]
    return {
        "pixels": (noise.reshape(rows, height, width, 3) + slope).to(torch.uint8),
        "label": torch.arange(rows) % CLASSES,
        "weight": torch.ones(rows),
        "key": key,
        "epoch": torch.full((rows,), epoch),
        "row": torch.arange(rows),
    }


def take(batch: dict[str, Tensor], rows: list[int] | Tensor) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def flat_batch(rows: int, side: int = 16) -> dict[str, Tensor]:
    """As `batch_of`, with even rows black and odd ones white."""
    batch = batch_of(rows, side, side)
    shade = (batch["row"] % 2 * 255).to(torch.uint8)[:, None, None, None]
    return {**batch, "pixels": shade.expand(rows, side, side, 3).contiguous()}


# Random bits


def split_mix(word: int) -> int:
    """The finaliser of SplitMix64 in whole numbers."""
    word &= 2**64 - 1
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    word = (word ^ word >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return word ^ word >> 31


def test_bits_are_those_of_whole_numbers() -> None:
    golden = 0x9E3779B97F4A7C15
    # the first outputs of SplitMix64 from 1234567, as its reference program prints them
    assert [split_mix(1234567 + i * golden) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]
    keys, epochs = [0, 1, -1, 2**63 - 1, -(2**63), 123456789], [0, 1, 2, 3, 2**40, 5]
    words = random_bits(2**31 - 1, 3, torch.tensor(keys), torch.tensor(epochs), 50).tolist()
    for key, epoch, row in zip(keys, epochs, words, strict=True):
        start = split_mix(2**31 - 1 + (3 << 32) + golden)
        state = split_mix((split_mix((key ^ start) + golden) ^ epoch) + golden)
        assert [word % 2**64 for word in row] == [split_mix(state + i * golden) for i in range(1, 51)]


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_golden_draws(where: str) -> None:
    """A change here changes everybody's augmentation."""
    key, epoch = torch.tensor([0, -1], device=where), torch.tensor([0, 7], device=where)
    assert random_bits(0, 0, key, epoch, 2).tolist() == GOLDEN_BITS
    assert uniforms(5, 1, key, epoch, 2).tolist() == GOLDEN_UNIFORMS


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_golden_pixels(where: str) -> None:
    """CPU and CUDA give the same bits, in any version."""
    batch = {name: tensor.to(where) for name, tensor in batch_of(64).items()}
    pixels, targets = DeviceAugment(ALL, 3, CLASSES)(batch)
    assert targets is not None
    assert hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()[:16] == GOLDEN_PIXELS
    assert hashlib.sha256(targets.cpu().numpy().tobytes()).hexdigest()[:16] == GOLDEN_TARGETS


def test_draws_are_uniform_and_differ_in_every_argument() -> None:
    key = torch.arange(100_000)
    draws = uniforms(0, 0, key, key * 0, 4)
    counts = torch.stack([torch.histc(column.float(), 100, 0, 1) for column in draws.T])
    chi_squared = ((counts - 1000) ** 2 / 1000).sum(dim=1)
    assert abs(chi_squared - 99).max() < 5 * math.sqrt(2 * 99)
    others = [
        uniforms(*arguments, 4) for arguments in ((1, 0, key, key * 0), (0, 1, key, key * 0), (0, 0, key, 1 + key * 0))
    ]
    columns = torch.cat([draws, *others, draws.roll(1, 0)], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(20)
    assert abs(correlation).max() < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 30.0])
def test_beta_has_its_moments_and_quantiles(alpha: float) -> None:
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values = beta_quantile(alpha, uniform)
    assert (values.diff() >= 0).all()
    assert torch.allclose(values + values.flip(0), torch.ones_like(values), rtol=0, atol=1e-12)
    # the density is taken as even between two of the table's nodes, which moves mass within each
    assert float(values.var(correction=0)) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=5e-6)
    if alpha == 1:
        assert torch.allclose(values, uniform, atol=1e-12)
    scipy_stats = pytest.importorskip("scipy.stats")
    lower = slice(0, 100_000)  # beyond, values next to 1 are rounded to 1e-16, which the CDF magnifies where α < 1
    back = torch.from_numpy(scipy_stats.beta(alpha, alpha).cdf(values[lower].numpy()))
    assert float(abs(back - uniform[lower]).max()) < 2e-5


# The same result in any batch


def test_a_row_comes_out_the_same_in_any_batch() -> None:
    batch, augment = batch_of(60, epoch=2), DeviceAugment(PER_ROW, 0, CLASSES)
    expected, targets = augment(batch)
    assert targets is None
    assert sum(torch.equal(*pair) for pair in zip(expected, batch["pixels"], strict=True)) < 5
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(take(batch, order))[0], expected[order])
    for size in (1, 7):
        parts = [augment(take(batch, part))[0] for part in torch.arange(60).split(size)]
        assert torch.equal(torch.cat(parts), expected)
    for name, other in (("epoch", 3), ("key", 4)):
        changed = augment({**batch, name: torch.full((60,), other)})[0]
        assert not any(torch.equal(*pair) for pair in zip(changed, expected, strict=True) if pair[0].ne(pair[1]).any())
    assert not torch.equal(DeviceAugment(PER_ROW, 1, CLASSES)(batch)[0], expected)


def test_pairs_come_out_the_same_in_any_micro_batch() -> None:
    """The odd last row of the global batch has no partner."""
    batch, augment = batch_of(31), DeviceAugment(ALL, 0, CLASSES)
    pixels, targets = augment(batch)
    assert targets is not None
    for size in (2, 8):
        parts = [augment(take(batch, part)) for part in torch.arange(31).split(size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), pixels)
        assert torch.equal(torch.cat([part[1] for part in parts if part[1] is not None]), targets)
    pairs = [pair for i in torch.randperm(15).tolist() for pair in (2 * i, 2 * i + 1)]
    shuffled = augment(take(batch, pairs))
    assert torch.equal(shuffled[0], pixels[pairs])
    assert torch.equal(shuffled[1], targets[pairs])  # pyright: ignore[reportArgumentType]
    assert torch.equal(targets[30], F.one_hot(batch["label"][30], CLASSES).float())
    assert torch.equal(pixels[30], DeviceAugment(PER_ROW, 0, CLASSES)(batch)[0][30])


def test_padding_is_left_alone_and_mixes_into_nothing() -> None:
    batch, padding = batch_of(12), [5, 8, 10, 11]
    batch["weight"][padding] = 0
    batch["row"][10:] = -1
    pixels, targets = DeviceAugment(replace(ALL, erase=1.0), 0, CLASSES)(batch)
    alone = DeviceAugment(replace(PER_ROW, erase=1.0), 0, CLASSES)(batch)[0]
    assert targets is not None
    assert torch.equal(pixels[padding], batch["pixels"][padding])
    assert torch.equal(pixels[[4, 9]], alone[[4, 9]])  # their partners are padding
    hard = F.one_hot(batch["label"], CLASSES).float()
    whole = [4, 9, *padding]
    assert torch.equal(targets[whole], hard[whole])
    assert not torch.equal(targets[[0, 1]], hard[[0, 1]])


def test_rows_that_are_not_a_pair_do_not_mix() -> None:
    for rows in ([0, 2], [1, 2], [1, 0], [3], [0, 3, 2, 5]):
        batch = take(batch_of(6), rows)
        pixels, targets = DeviceAugment(AugmentConfig(mixup=1.0), 0, CLASSES)(batch)
        assert torch.equal(pixels, batch["pixels"])
        assert torch.equal(targets, F.one_hot(batch["label"], CLASSES).float())  # pyright: ignore[reportArgumentType]


def test_nothing_else_is_touched() -> None:
    batch, state = batch_of(8), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in batch.items()}
    pixels, targets = DeviceAugment(AugmentConfig(), 0, CLASSES)({"pixels": batch["pixels"]})
    assert pixels is batch["pixels"]
    assert targets is None
    DeviceAugment(ALL, 0, CLASSES)(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert [DeviceAugment(config, 0, 2).mixes for config in (PER_ROW, ALL, AugmentConfig(cutmix=1.0))] == [0, 1, 1]


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_pictures(side: int) -> None:
    pixels, targets = DeviceAugment(ALL, 0, CLASSES)(batch_of(300, side, side))
    assert pixels.shape == (300, side, side, 3)
    assert torch.allclose(targets.sum(dim=1), torch.ones(300))  # pyright: ignore[reportOptionalMemberAccess]


# RandAugment


def by_pillow(op: str, image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    """An operation as timm gives it to Pillow."""
    m, (width, height) = magnitude / 10, image.size
    enhance = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    if op in enhance:
        return getattr(ImageEnhance, enhance[op])(image).enhance(1 + sign * 0.9 * m)
    if op == "posterize":
        return ImageOps.posterize(image, max(1, 4 - int(4 * m)))
    if op == "solarize":
        return ImageOps.solarize(image, 256 - int(256 * m))
    if op in ("autocontrast", "equalize"):
        return getattr(ImageOps, op)(image)
    sampled: dict[str, Any] = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    if op == "rotate":
        return image.rotate(sign * 30 * m, **sampled)
    matrix = {
        "shear_x": (1, sign * 0.3 * m, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.3 * m, 1, 0),
        "translate_x": (1, 0, sign * 0.45 * m * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * 0.45 * m * height),
    }[op]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **sampled)


@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("op", device.OPS[1:])
def test_operations_are_pillows(op: str, magnitude: float) -> None:
    """Whole numbers: exact. Blends: Pillow rounds its float products otherwise where its compiler fuses them.

    Bilinear samples are cut off to whole levels, so weights that differ by 2**-12 move some by a level.
    """
    pixels = stacked(photos()) // 2 + 30  # leaves autocontrast something to do
    images = [Image.fromarray(np.asarray(image)) for image in pixels]
    for sign in (1, -1):
        expected = stacked([by_pillow(op, image, magnitude, sign) for image in images])
        negative = torch.tensor([sign < 0] * 2)
        if device.OPS.index(op) < device.AFFINE:
            got = device.apply(op, pixels, negative, magnitude)
        else:
            matrices = device._affine_matrices(magnitude, 80, 112, CPU)
            got = device.affine(pixels, matrices[[2 * (device.OPS.index(op) - device.AFFINE) + (sign < 0)] * 2])
        difference = abs(got.int() - expected.int())
        assert got.dtype == torch.uint8
        if op in ("autocontrast", "equalize", "posterize", "solarize"):
            assert difference.max() == 0
        else:
            assert difference.max() <= 1
            assert difference.float().mean() < 0.1
        if magnitude == 9:
            assert not torch.equal(got, pixels)


def test_flat_channels_stay() -> None:
    pixels = torch.tensor([10, 0, 255], dtype=torch.uint8).expand(2, 40, 40, 3)
    assert torch.equal(device.autocontrast(pixels), pixels)
    assert torch.equal(device.equalize(pixels), pixels)


def test_operations_and_signs_are_drawn_equally_often() -> None:
    """A picture without symmetry tells what was done to it; 2,500 draws in each of four epochs."""
    picture = stacked(photos()[:1])[:, 20:52, 30:70] // 2 + 30
    magnitude, (height, width) = 9.0, picture.shape[1:3]
    signs = torch.tensor([False, True])
    matrices = device._affine_matrices(magnitude, height, width, CPU)
    results = [torch.cat([picture, picture])]
    results += [
        device.apply(op, torch.cat([picture, picture]), signs, magnitude) for op in device.OPS[1 : device.AFFINE]
    ]
    results += [device.affine(torch.cat([picture, picture]), matrices[i : i + 2]) for i in range(0, 10, 2)]
    names = {
        image.numpy().tobytes(): (op, i)
        for op, pair in zip(device.OPS, results, strict=True)
        for i, image in enumerate(pair)
    }
    signless = device.OPS[:5]
    assert len(names) == 2 * len(device.OPS) - len(signless)
    seen = dict.fromkeys(names.values(), 0)
    augment = DeviceAugment(AugmentConfig(randaugment_ops=1, randaugment_magnitude=magnitude), 0, CLASSES)
    for epoch in range(4):
        batch = {**batch_of(2500, 1, 1, epoch), "pixels": picture.expand(2500, -1, -1, -1)}
        for image in augment(batch)[0]:
            seen[names[image.numpy().tobytes()]] += 1
    for (op, _), count in seen.items():
        share = 1 / len(device.OPS) / (1 if op in signless else 2)
        assert abs(count - 10_000 * share) < 5 * math.sqrt(10_000 * share * (1 - share)), op


def test_several_operations_follow_each_other() -> None:
    """Two layers are the second layer on top of the first, whatever else the batch does."""
    batch = batch_of(200)
    one = DeviceAugment(AugmentConfig(randaugment_ops=1), 0, CLASSES)(batch)[0]
    two = DeviceAugment(AugmentConfig(randaugment_ops=2), 0, CLASSES)(batch)[0]
    draws = uniforms(0, device.RANDAUGMENT, batch["key"], batch["epoch"], 4)
    second = (draws[:, 2] * len(device.OPS)).long()
    for number, op in enumerate(device.OPS[: device.AFFINE]):
        rows = (second == number).nonzero()[:, 0]
        assert len(rows)
        expected = device.apply(op, one[rows], draws[rows, 3] < 0.5, 9.0) if number else one[rows]
        assert torch.equal(two[rows], expected)


# Erasing


def test_erased_rectangles() -> None:
    side, rows = 64, 3000
    batch = batch_of(rows, 1, 1)
    white = torch.full((rows, side, side, 3), 255, dtype=torch.uint8)
    pixels, _ = DeviceAugment(AugmentConfig(erase=0.25), 0, CLASSES)({**batch, "pixels": white})
    touched = (pixels != white).any(dim=3)
    hit = touched.any(dim=(1, 2))
    assert abs(int(hit.sum()) - 0.25 * rows) < 5 * math.sqrt(rows * 0.25 * 0.75)
    # values are 255 by chance too, but all three of a pixel once in 2**24: rows and columns of noise tell the box
    tall = touched[hit].any(dim=2).sum(dim=1).double()
    wide = touched[hit].any(dim=1).sum(dim=1).double()
    area = tall * wide / side**2
    assert torch.equal(tall * wide, touched[hit].sum(dim=(1, 2)).double())
    # sides are rounded to whole pixels: an area is off by half a pixel of the longer sides, an aspect by that share
    assert float(area.min()) > 0.02 - 2 * 0.5 * 0.26 / side
    assert float(area.max()) < 1 / 3 + 2 * 0.5 / side
    # all but the few rectangles too long for the image fit at the first try: a uniform area
    assert float(area.mean()) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert float(area.std()) == pytest.approx((1 / 3 - 0.02) / math.sqrt(12), abs=0.015)
    aspect = (tall / wide).log()
    assert float(abs(aspect).max()) < math.log(1 / 0.3) + 0.15
    # uniform in its logarithm: as often upright as lying
    assert float(aspect.mean()) == pytest.approx(0, abs=5 * 0.7 / math.sqrt(len(aspect)))
    assert float(aspect.std()) == pytest.approx(2 * math.log(1 / 0.3) / math.sqrt(12), abs=0.06)
    noise = pixels[touched].flatten()
    counts = torch.bincount(noise.long(), minlength=256)
    expected = len(noise) / 256
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * math.sqrt(2 * 255)
    places = touched[hit].float().mean(dim=0)
    assert float(abs(places - places.flip(0)).max()) < 5 * math.sqrt(0.5 / len(aspect))  # no side is favoured
    assert float(abs(places - places.flip(1)).max()) < 5 * math.sqrt(0.5 / len(aspect))


# Mixing


def test_mixup_mixes_pixels_and_labels_alike() -> None:
    batch = batch_of(400)
    pixels, targets = DeviceAugment(AugmentConfig(mixup=0.8), 0, CLASSES)(batch)
    assert targets is not None
    partner = torch.arange(400) ^ 1
    own = targets.gather(1, batch["label"][:, None]).double()[:, 0]
    other = targets.gather(1, batch["label"][partner][:, None]).double()[:, 0]
    assert torch.equal(own + other, torch.ones(400, dtype=torch.float64))
    assert torch.equal(own, own[partner])  # both rows of a pair keep the same share
    share = own[:, None, None, None]
    mean = share * batch["pixels"].double() + (1 - share) * batch["pixels"][partner].double()
    assert torch.equal(pixels.double(), (mean + 0.5).floor())  # multiples of 2**-16: exact in float64
    # Beta(0.8, 0.8) of 200 pairs: its variance is known to a tenth or so
    assert float(own.mean()) == pytest.approx(0.5, abs=5 * 0.31 / math.sqrt(200))
    assert float(own.var()) == pytest.approx(1 / (4 * 2.6), rel=0.3)


def test_cutmix_shares_are_those_of_the_area() -> None:
    batch = flat_batch(1000, 64)
    pixels, targets = DeviceAugment(AugmentConfig(cutmix=1.0), 0, CLASSES)(batch)
    assert targets is not None
    partner = torch.arange(1000) ^ 1
    cut = (pixels != batch["pixels"]).all(dim=3)
    assert torch.equal(cut, (pixels == batch["pixels"][partner]).all(dim=3))
    assert torch.equal(cut, cut[partner])  # the same part of both is exchanged
    assert torch.equal(cut.sum(dim=(1, 2)), cut.any(dim=1).sum(dim=1) * cut.any(dim=2).sum(dim=1))  # a rectangle
    share = cut.sum(dim=(1, 2)).double() / 64**2
    assert torch.equal(targets.gather(1, batch["label"][partner][:, None])[:, 0], share.float())
    assert torch.equal(targets.gather(1, batch["label"][:, None])[:, 0], (1 - share).float())
    # sides s = √(1 - λ) of a uniform λ around a uniform centre: the edges leave s - s²/4 of each, so E[(s - s²/4)²] =
    # 77/240 of the area; the sides are even numbers of pixels, 1 in 64 less on average
    assert float(share.mean()) == pytest.approx(77 / 240, abs=5 * float(share.std()) / math.sqrt(500) + 1 / 64)


def test_mixup_and_cutmix_take_turns() -> None:
    batch = flat_batch(4000)
    pixels, targets = DeviceAugment(AugmentConfig(mixup=1.0, cutmix=1.0), 0, CLASSES)(batch)
    assert targets is not None
    whole = (pixels == pixels[:, :1, :1]).all(dim=3).all(dim=(1, 2))
    grey = whole[0::2] & (pixels[0::2, 0, 0, 0] % 255 != 0)
    pairs, share = 2000, 0.5
    # of the mixed ones 2 in 255 round to black or white
    assert abs(int(grey.sum()) - pairs * share) < 5 * math.sqrt(pairs * share * (1 - share)) + 2 * pairs / 255


def test_equal_labels_stay_whole() -> None:
    batch = {**batch_of(100), "label": torch.full((100,), 3)}
    targets = DeviceAugment(ALL, 0, CLASSES)(batch)[1]
    expected = F.one_hot(batch["label"], CLASSES).float()
    assert torch.allclose(targets, expected, rtol=0, atol=1e-7)  # pyright: ignore[reportArgumentType]


# The objective


class Linear(nn.Module):
    """Logits linear in the pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * side * side, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_soft_loss_of_hard_labels_is_the_hard_loss(smoothing: float, classes: int) -> None:
    """Bit for bit, gradients too."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, classes, generator=generator) * 5).requires_grad_()
    label = torch.randint(classes, (64,), generator=generator)
    hard = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
    soft = soft_cross_entropy(logits, F.one_hot(label, classes).float(), smoothing)
    assert torch.equal(soft, hard)
    gradients = [torch.autograd.grad(losses.sum(), logits, retain_graph=True)[0] for losses in (hard, soft)]
    assert torch.equal(*gradients)


def test_soft_loss_is_torchs() -> None:
    logits, targets = torch.randn(20, 7), torch.rand(20, 7).softmax(dim=1)
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        # sums of 7 terms in another order
        assert torch.allclose(soft_cross_entropy(logits, targets, smoothing), expected, rtol=1e-5)


def test_objective_augments_in_training_alone() -> None:
    batch = flat_batch(16, 8)
    plain = Supervised(Linear(8), Preprocess(8, 1.0), 0.1)
    mixing = Supervised(Linear(8), Preprocess(8, 1.0), 0.1, DeviceAugment(AugmentConfig(mixup=1.0), 0, CLASSES))
    assert torch.equal(plain(batch, predict=True), mixing(batch, predict=True))  # in training mode too
    assert not torch.equal(plain(batch)[0], mixing(batch)[0])
    assert list(mixing.state_dict()) == list(plain.state_dict())
    mixing.eval()
    for before, now in zip(values(plain, batch), values(mixing, batch), strict=True):
        assert torch.equal(before, now)


def test_objective_with_nothing_to_mix_is_as_before() -> None:
    """Rows without partners: soft targets of whole labels."""
    batch = take(flat_batch(16, 8), list(range(0, 16, 2)))
    plain = Supervised(Linear(8), Preprocess(8, 1.0), 0.1)
    for config in (AugmentConfig(), AugmentConfig(mixup=1.0, cutmix=1.0)):
        augmented = Supervised(Linear(8), Preprocess(8, 1.0), 0.1, DeviceAugment(config, 0, CLASSES))
        for before, now in zip(values(plain, batch), values(augmented, batch), strict=True):
            assert torch.equal(before, now)


def test_objective_counts_the_larger_share() -> None:
    """A model that sees a pixel's level tells which row it mostly is."""

    class Shade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean(dim=(1, 2, 3)) * self.scale  # -1 black, 1 white
            return torch.stack([-mean, mean], dim=1)

    batch = flat_batch(200, 8)
    batch["label"] = batch["row"] % 2
    batch["weight"][190:] = 0
    objective = Supervised(Shade(), Preprocess(8, 1.0), 0.0, DeviceAugment(AugmentConfig(mixup=1.0), 0, 2))
    loss, metrics = values(objective, batch)
    assert metrics == 190
    pixels, targets = DeviceAugment(AugmentConfig(mixup=1.0), 0, 2)(batch)
    assert targets is not None
    log_p = objective({"pixels": pixels}, predict=True).log_softmax(dim=1).double()
    expected = -(targets.double() * log_p).sum(dim=1)[:190].sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def values(objective: Supervised, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss sum and correct rows."""
    returned = objective(batch)
    assert isinstance(returned, tuple)
    return returned[0], returned[1]["top1"]


@pytest.mark.parametrize(
    "settings",
    [
        {"randaugment_ops": -1}, {"randaugment_magnitude": 10.5}, {"randaugment_magnitude": -1.0}, {"erase": 1.5},
        {"mixup": -0.1}, {"mixup": math.inf}, {"cutmix": math.nan},
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^augment\.{next(iter(settings))}: "):
        AugmentConfig(**settings)
