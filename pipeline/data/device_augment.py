"""Augmentation of whole batches of uint8 pixels on the device: RandAugment, random erasing, mixup and cutmix.

Every random choice is a hash of (seed, stream, sample key, epoch): no generator has a state, and neither the rank nor a
row's place in its batch counts. Pixels are computed in integers, or in floats by single, correctly rounded operations.
So a row comes out with the same bits in any batch, on CPU and on CUDA.

RandAugment (Cubuk et al. 2020): each image gets `randaugment_ops` of the paper's 14 operations, drawn with equal
probability and with replacement, each always applied, all at the same magnitude. With m = magnitude / 10 the arguments
are those of timm's increasing set (`rand-m9-…-inc1`, DeiT; Touvron et al. 2021), without its noise on the magnitude,
its chance of 1/2 to leave an operation out, and its operations Invert and SolarizeAdd: rotation by ±30m degrees; shear
by ±0.3m; translation by ±0.45m of the side; colour, contrast, brightness and sharpness by a factor of 1 ± 0.9m;
posterisation to 4 - ⌊4m⌋ bits, at least 1; solarisation from the level 256 - ⌊256m⌋ on. Signs are drawn. The pixel
arithmetic is Pillow's; pixels from outside the image are grey (128), as in timm and big_vision.

Random erasing (Zhong et al. 2017): with probability `erase` a rectangle of 2 % to 1/3 of the area, its aspect 0.3 to
1/0.3 and uniform in the logarithm (as timm and DeiT), becomes noise, each value uniform in 0 … 255 (the paper's RE-R).

Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): rows 2i and 2i + 1 of the global batch mix with each other, by a
λ ~ Beta(α, α) of their own; with both set, a pair takes either with probability 1/2 (DeiT).
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vitscale.pipeline.config import AugmentConfig

OPS = (  # affine ones last
    "identity", "autocontrast", "equalize", "posterize", "solarize", "color", "contrast", "brightness", "sharpness",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
AFFINE = OPS.index("rotate")
FILL = 128  # of pixels from outside the image
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), 0.3
TRIES = 10  # for a rectangle that fits the image, as in timm
ONE = 1 << 16  # λ in fixed point

RANDAUGMENT, ERASE, NOISE, MIX, DROP_PATH, PATCH_DROP = range(6)  # streams that never meet
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed int64, like the two below


class DeviceAugment:
    """The augmentations of `config` for batches of `classes` labels; what is off costs nothing."""

    def __init__(self, config: AugmentConfig, seed: int, classes: int) -> None:
        self.config, self.seed, self.classes = config, seed, classes

    @property
    def mixes(self) -> bool:
        """Whether rows 2i and 2i + 1 of a global batch have to be neighbours, because they mix."""
        return self.config.mixes

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Augmented uint8 pixels (B, Y, X, 3), and the mixed labels (B, K) in float32, or None if nothing mixes.

        Takes `pixels`, `label` (B,), `weight` (B,; 0 for padding, which stays as it is), `key` (B,; 64 bits of the
        sample key's hash), `epoch` (B,) and `row` (B,; number in the global batch); instead of `label`, `targets`
        (B, K; true for each label) where there are any. Pairs sit at rows 2j and 2j + 1; a row without its neighbour is
        not mixed. With everything off, `pixels` itself comes back.
        """
        pixels = batch["pixels"]
        if self.config.randaugment_ops or self.config.erase:
            pixels = self._change_rows(pixels, batch)
        return self._mix_pairs(pixels, batch) if self.mixes else (pixels, None)

    def _change_rows(self, pixels: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """RandAugment, then erasing: each operation on the rows that drew it, gathered and put back."""
        config, real = self.config, batch["weight"] > 0
        draws = uniforms(self.seed, RANDAUGMENT, batch["key"], batch["epoch"], 2 * config.randaugment_ops)
        chosen = (draws[:, 0::2] * len(OPS)).long() * real[:, None]  # padding draws the identity
        negative = draws[:, 1::2] < 0.5
        hit, boxes = self._erased_boxes(batch, pixels.shape[1], pixels.shape[2])
        columns = torch.cat([chosen, (hit & real).long()[:, None]], dim=1)
        order = columns.argsort(dim=0, stable=True)
        kinds = torch.arange(len(OPS), device=pixels.device)
        counts = (columns[:, :, None] == kinds).sum(dim=0).tolist()  # the only wait for the device
        pixels = pixels.clone()
        for layer, of_op in enumerate(counts[:-1]):
            starts = np.cumsum([0, *of_op])
            for op in range(1, AFFINE):
                if of_op[op]:
                    rows = order[starts[op] : starts[op + 1], layer]
                    pixels[rows] = apply(OPS[op], pixels[rows], negative[rows, layer], config.randaugment_magnitude)
            if starts[-1] > starts[AFFINE]:
                rows = order[starts[AFFINE] :, layer]
                kind = 2 * (chosen[rows, layer] - AFFINE) + negative[rows, layer]
                matrices = _affine_matrices(config.randaugment_magnitude, *pixels.shape[1:3], pixels.device)
                pixels[rows] = affine(pixels[rows], matrices[kind])
        if counts[-1][1]:
            rows = order[-counts[-1][1] :, -1]
            pixels[rows] = self._erase(pixels[rows], boxes[rows], batch["key"][rows], batch["epoch"][rows])
        return pixels

    def _erased_boxes(self, batch: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Which rows to erase (B,), and (top, left, bottom, right) (B, 4) of each row's first rectangle that fits."""
        draws = uniforms(self.seed, ERASE, batch["key"], batch["epoch"], 3 + 2 * TRIES)
        low, high = ERASED_AREA
        side = (height * width * (low + (high - low) * draws[:, 3::2])).sqrt()
        stretches = _stretches(side.device)
        stretch = stretches[(draws[:, 4::2] * len(stretches)).long()]
        tall, wide = (side * stretch).round().long(), (side / stretch).round().long()
        fits = (tall > 0) & (tall < height) & (wide > 0) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)
        tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
        top, left = (draws[:, 1] * (height - tall + 1)).long(), (draws[:, 2] * (width - wide + 1)).long()
        hit = (draws[:, 0] < self.config.erase) & fits.any(dim=1)
        return hit, torch.stack([top, left, top + tall, left + wide], dim=1)

    def _erase(self, pixels: Tensor, boxes: Tensor, key: Tensor, epoch: Tensor) -> Tensor:
        values = pixels[0].numel()
        noise = random_bits(self.seed, NOISE, key, epoch, -(-values // 8)).view(torch.uint8)[:, :values]
        return torch.where(_inside(boxes, *pixels.shape[1:3]), noise.reshape(pixels.shape), pixels)

    def _mix_pairs(self, pixels: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each row with its neighbour's share, rounded to uint8, and both labels with the same shares."""
        (rows, height, width, _), device = pixels.shape, pixels.device
        place = torch.arange(rows, device=device)
        first = place & ~1  # of the pair, whose choices hold for both
        second, partner = (other.clamp(max=rows - 1) for other in (first + 1, place ^ 1))
        number, real = batch["row"], batch["weight"] > 0
        paired = real[first] & real[second] & (number[first] % 2 == 0) & (number[second] == number[first] + 1)
        cut, lam, y, x = uniforms(self.seed, MIX, batch["key"][first], batch["epoch"][first], 4).unbind(dim=1)
        chance = 0.5 if self.config.mixup and self.config.cutmix else float(self.config.cutmix > 0)
        cut = cut < chance
        own = torch.full((rows,), ONE, dtype=torch.int32, device=device)  # share of a row in its pixels
        given = torch.zeros(rows, dtype=torch.float64, device=device)  # share of its partner in its label
        if self.config.mixup:
            mixed = paired & ~cut
            own = torch.where(mixed, (beta_quantile(self.config.mixup, lam) * ONE).round().int(), own)
            given = torch.where(mixed, (ONE - own) / ONE, given)
        own = own[:, None, None, None]
        if self.config.cutmix:
            box = _cut_boxes(beta_quantile(self.config.cutmix, lam), y, x, height, width) * (paired & cut)[:, None]
            own = torch.where(_inside(box, height, width), 0, own)
            area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
            given = torch.where(paired & cut, area.double() / torch.full_like(given, height * width), given)
        other = pixels[partner]
        blend = pixels.int()
        blend.sub_(other).mul_(own).add_(ONE // 2).bitwise_right_shift_(16).add_(other)  # other + share * (own - other)
        kinds = torch.arange(self.classes, device=device)
        mine = batch["targets"] if "targets" in batch else batch["label"][:, None] == kinds
        theirs = mine[partner]
        targets = mine * (1 - given).float()[:, None] + theirs * given.float()[:, None]
        return blend.to(torch.uint8), targets


# Random bits


def random_bits(seed: int, stream: int, key: Tensor, epoch: Tensor, count: int) -> Tensor:
    """`count` words of 64 random bits for each key (B,) and epoch (B,): int64 (B, count).

    The output of SplitMix64 (Steele et al. 2014) from a state that is a hash, by its own steps, of the arguments.
    """
    start = int(_split_mix(torch.tensor(seed + (stream << 32)) + GOLDEN))
    state = _split_mix((_split_mix((key ^ start) + GOLDEN) ^ epoch) + GOLDEN)
    return _split_mix(state[:, None] + GOLDEN * torch.arange(1, count + 1, device=key.device))


def uniforms(seed: int, stream: int, key: Tensor, epoch: Tensor, count: int) -> Tensor:
    """`random_bits` as numbers in [0, 1): float64 (B, count), multiples of 2**-53."""
    return _logical_shift(random_bits(seed, stream, key, epoch, count), 11).double() * 2.0**-53


def _split_mix(word: Tensor) -> Tensor:
    """The finaliser of SplitMix64. Products of int64 wrap around, as those of unsigned words do."""
    word = (word ^ _logical_shift(word, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    word = (word ^ _logical_shift(word, 27)) * (0x94D049BB133111EB - 2**64)
    return word ^ _logical_shift(word, 31)


def _logical_shift(word: Tensor, bits: int) -> Tensor:
    """Shift to the right that fills up with zeros; torch's fills up with the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def beta_quantile(alpha: float, uniform: Tensor) -> Tensor:
    """Numbers distributed as Beta(`alpha`, `alpha`) from uniform ones (float64): the inverse of a tabulated CDF."""
    nodes, cdf = _beta_table(alpha, uniform.device)
    lower = torch.minimum(uniform, 1 - uniform)  # the density is symmetric
    cell = (torch.searchsorted(cdf, lower, right=True) - 1).clamp(max=len(nodes) - 2)
    share = (lower - cdf[cell]) / (cdf[cell + 1] - cdf[cell])
    value = nodes[cell] + share * (nodes[cell + 1] - nodes[cell])
    return torch.where(uniform < 0.5, value, 1 - value)


@lru_cache(maxsize=8)
def _beta_table(alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes in [0, 1/2] and the CDF there, both float64: density integrated by Simpson's rule between nodes.

    Some nodes lie evenly, for densities with a narrow peak (large `alpha`); some geometrically, for those that go to
    infinity at 0 (`alpha` < 1).
    """
    x = np.unique(np.concatenate([np.linspace(0, 0.5, 4097), np.geomspace(1e-100, 0.5, 4097)]))
    middle = (x[1:] + x[:-1]) / 2

    def density(t: np.ndarray) -> np.ndarray:
        return np.exp((alpha - 1) * np.log(4 * t * (1 - t)))  # 1 at the centre

    mass = np.empty(len(x) - 1)
    mass[0] = x[1] * density(x[1]) / alpha  # where 1 - t is 1
    mass[1:] = (x[2:] - x[1:-1]) * (density(x[1:-1]) + 4 * density(middle[1:]) + density(x[2:])) / 6
    cdf = np.concatenate([[0], np.cumsum(mass)])
    return torch.from_numpy(x).to(device), torch.from_numpy(cdf * (0.5 / cdf[-1])).to(device)


# Rectangles


@lru_cache(maxsize=8)
def _stretches(device: torch.device) -> Tensor:
    """Square roots of aspects, evenly spaced in the logarithm: a table, since exp differs between devices."""
    most = -math.log(ERASED_ASPECT) / 2
    return torch.tensor([math.exp(most * (i / 1024 - 1)) for i in range(2049)], dtype=torch.float64, device=device)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Whether pixels lie in their row's (top, left, bottom, right): bool (B, Y, X, 1)."""
    top, left, bottom, right = boxes[:, :, None].unbind(dim=1)
    y, x = (torch.arange(side, device=boxes.device) for side in (height, width))
    tall, wide = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return (tall[:, :, None] & wide[:, None, :])[..., None]


def _cut_boxes(lam: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Rectangles (B, 4) of 1 - λ of the area around a uniform centre, cut off at the edges (Yun et al. 2019)."""
    ratio, edges = (1 - lam).sqrt(), []
    for draw, side in ((y, height), (x, width)):
        half, centre = (ratio * side).long() // 2, (draw * side).long()
        edges += [(centre - half).clamp(min=0), (centre + half).clamp(max=side)]
    return torch.stack(edges, dim=1)[:, [0, 2, 1, 3]]


# The operations of RandAugment, on uint8 pixels (B, Y, X, 3)


def apply(op: str, pixels: Tensor, negative: Tensor, magnitude: float) -> Tensor:
    """An operation that is not affine, at a magnitude of 10 at most; `negative` (B,) are signs."""
    if op == "autocontrast":
        return autocontrast(pixels)
    if op == "equalize":
        return equalize(pixels)
    if op == "posterize":
        return posterize(pixels, max(1, 4 - int(magnitude / 10 * 4)))
    if op == "solarize":
        return solarize(pixels, 256 - int(magnitude / 10 * 256))
    change = 0.9 * magnitude / 10
    factor = torch.where(negative, 1 - change, 1 + change)
    enhance = {"color": color, "contrast": contrast, "brightness": brightness, "sharpness": sharpness}[op]
    return enhance(pixels, factor)


def autocontrast(pixels: Tensor) -> Tensor:
    """Each channel stretched linearly from its extremes to 0 … 255."""
    planes = _planes(pixels)
    low, high = planes.amin(dim=1, keepdim=True).double(), planes.amax(dim=1, keepdim=True).double()
    levels = torch.arange(256, device=pixels.device, dtype=torch.float64)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255 / x would be 255 times the rounded 1 / x
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return _look_up(planes, torch.where(high > low, stretched, levels), pixels)


def equalize(pixels: Tensor) -> Tensor:
    """Each channel mapped so that its levels become equally frequent."""
    planes = _planes(pixels)
    ones = torch.ones((1, 1), dtype=torch.int64, device=pixels.device).expand_as(planes)
    counts = torch.zeros((len(planes), 256), dtype=torch.int64, device=pixels.device).scatter_add_(1, planes, ones)
    last = counts.gather(1, planes.amax(dim=1, keepdim=True))
    step = (planes.shape[1] - last) // 255
    below = counts.cumsum(dim=1) - counts
    mapped = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    levels = torch.arange(256, device=pixels.device)
    return _look_up(planes, torch.where(step > 0, mapped, levels), pixels)


def posterize(pixels: Tensor, bits: int) -> Tensor:
    """The `bits` highest bits of each value."""
    return pixels & (256 - (1 << (8 - bits)))


def solarize(pixels: Tensor, threshold: int) -> Tensor:
    """Values from `threshold` on inverted."""
    return torch.where(pixels.int() < threshold, pixels, 255 - pixels)


def color(pixels: Tensor, factor: Tensor) -> Tensor:
    """Saturation times `factor` (B,)."""
    return _blend(_grey(pixels), pixels, factor)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Distance to the mean grey, in whole levels, times `factor` (B,)."""
    grey = _grey(pixels).flatten(1)
    mean = (2 * grey.sum(dim=1) + grey.shape[1]) // (2 * grey.shape[1])
    return _blend(mean[:, None, None, None], pixels, factor)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Values times `factor` (B,)."""
    return _blend(pixels.new_zeros(1), pixels, factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Distance to the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13 times `factor` (B,); edges stay."""
    wide = pixels.to(torch.int16)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = wide.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, pixels, factor)


def _grey(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma as Pillow rounds it: int32 (B, Y, X, 1)."""
    red, green, blue = pixels.int().split(1, dim=3)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(base: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """base + factor * (pixels - base), clipped and cut off to whole levels."""
    base = base.float()
    return (base + factor.float()[:, None, None, None] * (pixels - base)).clamp(0, 255).to(torch.uint8)


def _planes(pixels: Tensor) -> Tensor:
    """Values by channel, as indices: int64 (3B, YX)."""
    return pixels.permute(0, 3, 1, 2).reshape(3 * len(pixels), -1).long()


def _look_up(planes: Tensor, table: Tensor, like: Tensor) -> Tensor:
    """`table` (3B, 256) at `planes`, in the shape of `like`."""
    rows, height, width, _ = like.shape
    return table.to(torch.uint8).gather(1, planes).reshape(rows, 3, height, width).permute(0, 2, 3, 1)


@lru_cache(maxsize=8)
def _affine_matrices(magnitude: float, height: int, width: int, device: torch.device) -> Tensor:
    """`fixed_matrix` of every affine operation and sign (positive, negative): int64 (2 * 5, 6)."""
    angle, shear = 30 * magnitude / 10, 0.3 * magnitude / 10
    right, down = 0.45 * magnitude / 10 * width, 0.45 * magnitude / 10 * height
    matrices = []
    for sign in (1, -1):
        cos, sin = math.cos(math.radians(angle)), -sign * math.sin(math.radians(angle))
        matrices.append([
            (cos, sin, (width - cos * width - sin * height) / 2, -sin, cos, (height + sin * width - cos * height) / 2),
            (1, sign * shear, 0, 0, 1, 0),
            (1, 0, 0, sign * shear, 1, 0),
            (1, 0, sign * right, 0, 1, 0),
            (1, 0, 0, 0, 1, sign * down),
        ])  # fmt: skip
    return torch.stack([fixed_matrix(matrix) for pair in zip(*matrices, strict=True) for matrix in pair]).to(device)


def fixed_matrix(matrix: tuple[float, ...]) -> Tensor:
    """(a, b, c, d, e, f) as `affine` takes it, int64 (6,): a half unit of the four factors, the shifts, by 2**32."""
    return torch.tensor([round(value * 2 ** (32 if i % 3 == 2 else 31)) for i, value in enumerate(matrix)])


def affine(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear samples at (ax + by + c, dx + ey + f) for the pixel centre (x, y), by matrices (B, 6).

    As Pillow's `Image.transform`: values beyond the outermost centres are those there, outside the image `FILL`, and
    results are cut off to whole levels. Places are multiples of 2**-32 px, weights of 2**-11.
    """
    rows, height, width, _ = pixels.shape
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(dim=1)
    y, x = (2 * torch.arange(side, device=pixels.device) + 1 for side in (height, width))
    x, y = (a * x + b * y[:, None] + c), (d * x + e * y[:, None] + f)
    inside = (x >= 0) & (x < width << 32) & (y >= 0) & (y < height << 32)
    x, y = x - (1 << 31), y - (1 << 31)
    across, along = (((place >> 21) & 2047).int()[..., None] for place in (x, y))
    left, top = x >> 32, y >> 32
    left, right = left.clamp(0, width - 1), (left + 1).clamp(0, width - 1)
    start = torch.arange(rows, device=pixels.device)[:, None, None] * height
    top, bottom = ((start + line.clamp(0, height - 1)) * width for line in (top, top + 1))
    upper, lower = (_between(_take(pixels, line + left), _take(pixels, line + right), across) for line in (top, bottom))
    sampled = _between(upper, lower, along) >> 22
    return torch.where(inside[..., None], sampled, FILL).to(torch.uint8)


def _take(pixels: Tensor, places: Tensor) -> Tensor:
    """Pixels at `places` (B, Y, X), counted through all rows: int32 (B, Y, X, 3)."""
    return pixels.reshape(-1, 3).index_select(0, places.flatten()).reshape(*places.shape, 3).int()


def _between(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """2048 low + share (high - low), in the memory of `high`."""
    return high.sub_(low).mul_(share).add_(low, alpha=2048)
