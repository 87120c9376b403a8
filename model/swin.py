"""The Swin Transformer of "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (Liu et al. 2021,
arXiv:2103.14030)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.model import initial
from vitscale.model.config import SwinConfig
from vitscale.model.embed import PatchEmbed, constant, grid_of
from vitscale.model.initial import Rules, truncated
from vitscale.model.layers import MLP, Block, attention_weights, kept
from vitscale.model.network import Network

APART = -100.0  # added to scores of tokens that do not belong together, as in the paper's code: a weight of 4e-44


class SwinTransformer(Network):
    """Patches → stages of blocks on feature maps, each with half the rows and columns and twice the width of the last →
    classifier on the average of the map. Parameter names are timm's.

    Images of any sides that are multiples of `config.patch` will do: a block fills a map with zeros, below and to the
    right, to whole windows, and merging to even sides, as is usual in detection; what a block added is cut off again.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        self.patch_embed = NormedPatches(config)
        self.layers: Any = nn.ModuleList(Stage(config, number) for number in range(len(config.depths)))
        width = config.width << (len(config.depths) - 1)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = Head(width, config.num_classes)
        self.initialise(seed)

    @staticmethod
    def rules(config: SwinConfig) -> Rules:
        """As in the paper's own code (microsoft/Swin-Transformer, `models/swin_transformer.py`): dense layers and bias
        tables normal of deviation 0.02; patches, which it leaves to torch, uniform within 1 / √inputs; other biases
        zero. The classifier is zero, which there is normal too."""
        bound = (3 * config.patch**2) ** -0.5
        return (
            (r"^patch_embed\.proj\.", lambda weight, generator: weight.uniform_(-bound, bound, generator=generator)),
            (r"norm\d?\.weight$", initial.constant(1.0)),
            (r"^layers\..*(\.weight|_bias_table)$", truncated(0.02)),
            (r"^head\.fc\.bias$", initial.constant(config.head_bias)),
        )

    def forward(self, images_BCYX: Tensor, keep_L2B: Tensor | None = None, return_attention: bool = False) -> Any:
        """Logits (B, K), with `return_attention` also a list of weights (B, W, H, N, N), block by block: of each of N
        tokens of each of W windows, row by row of the shifted map, to those of the same window."""
        weights: list[Tensor] | None = [] if return_attention else None
        features_BYXC = self.forward_features(images_BCYX, keep_L2B, weights)
        logits_BK = self.head(self.representation(features_BYXC))
        return (logits_BK, weights) if return_attention else logits_BK

    def forward_features(
        self, images_BCYX: Tensor, keep_L2B: Tensor | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """Normalised map of the last block (B, Y, X, C); attention is appended to `weights`, where that is given."""
        maps_BYXC, first = self.patch_embed(images_BCYX), 0
        for stage in self.layers:
            maps_BYXC = self.through(stage.blocks, stage.downsample(maps_BYXC), keep_L2B, weights, first=first)
            first += len(stage.blocks)
        return self.norm(maps_BYXC)

    def representation(self, features_BYXC: Tensor) -> Tensor:
        """What the classifier sees of the map that `forward_features` returns, (B, C)."""
        return features_BYXC.mean(dim=(1, 2))


class NormedPatches(PatchEmbed):
    """Patches projected and normalised, as a map: (B, 3, Y, X) → (B, rows, columns, D)."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(config.patch, config.width)
        self.patch_size = config.patch
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        grid = grid_of(images_BCYX, self.patch_size)
        return self.norm(super().forward(images_BCYX)).unflatten(1, grid)


class Stage(nn.Module):
    """What is of one resolution: a merging of patches, but in the first, and blocks. `SwinTransformer` runs them."""

    def __init__(self, config: SwinConfig, number: int) -> None:
        super().__init__()
        width = config.width << number
        self.downsample = Merging(width // 2, config.norm_eps) if number else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(config, width, config.heads[number], shifted=bool(block % 2))
            for block in range(config.depths[number])
        )


class Merging(nn.Module):
    """The pixels of squares of 2×2, normalised and projected to twice the width: (B, Y, X, C) → (B, Y/2, X/2, 2C)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, maps_BYXC: Tensor) -> Tensor:
        maps_BYXC = filled(maps_BYXC, 2)
        rows, columns = maps_BYXC.shape[1] // 2, maps_BYXC.shape[2] // 2
        squares = maps_BYXC.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # (B, row, y, column, x, C)
        return self.reduction(self.norm(squares.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinBlock(Block):
    """Pre-norm block on maps (B, Y, X, C): x + attention within windows of norm(x), then x + mlp(norm(x)).

    The windows of every second block are `shifted` by half of one, cyclically; tokens that this brings together from
    opposite ends do not see each other. A map whose smaller side is no larger than a window has windows of that side,
    which are not shifted.
    """

    def __init__(self, config: SwinConfig, width: int, heads: int, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = config.window, shifted
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = WindowAttention(width, heads, config.window, config.dropout)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, int(width * config.mlp_ratio), config.dropout)

    def forward(self, maps_BYXC: Tensor, keep_2B: Tensor | None = None, weights: list[Tensor] | None = None) -> Tensor:
        one, other = (None, None) if keep_2B is None else keep_2B.unbind(0)
        maps_BYXC = maps_BYXC + kept(self.within_windows(self.norm1(maps_BYXC), weights), one)
        return maps_BYXC + kept(self.mlp(self.norm2(maps_BYXC)), other)

    def within_windows(self, maps_BYXC: Tensor, weights: list[Tensor] | None) -> Tensor:
        rows, columns = maps_BYXC.shape[1:3]
        side = min(rows, columns, self.window)
        shift = self.window // 2 if self.shifted and side < min(rows, columns) else 0
        whole_BYXC, mask_W1NN = filled(maps_BYXC, side), None
        if shift:
            whole_BYXC = whole_BYXC.roll((-shift, -shift), dims=(1, 2))
            mask_W1NN = shift_mask(whole_BYXC.shape[1], whole_BYXC.shape[2], side, shift, maps_BYXC.device)
        attended_BWNC = self.attn(windows(whole_BYXC, side), side, mask_W1NN, weights)
        whole_BYXC = joined(attended_BWNC, side, whole_BYXC.shape[1] // side)
        if shift:
            whole_BYXC = whole_BYXC.roll((shift, shift), dims=(1, 2))
        return whole_BYXC[:, :rows, :columns]


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for each offset in rows and columns:
    (B, W, N, C) → (B, W, N, C), N the square of `side`.

    `mask_W1NN` is added to the scores. Weights (B, W, H, N, N) are appended to `weights`, where that is given: they are
    then computed openly, in float32.
    """

    def __init__(self, width: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, windows_BWNC: Tensor, side: int, mask_W1NN: Tensor | None, weights: list[Tensor] | None = None
    ) -> Tensor:
        count = windows_BWNC.shape[1]
        qkv = self.qkv(windows_BWNC).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        # windows count as heads, so that what is added to scores is the same for all images, and nowhere repeated
        q_BHNE, k_BHNE, v_BHNE = qkv.flatten(2, 3).unbind(0)
        offsets_NN = offsets(side, self.window, windows_BWNC.device)
        bias_WHNN = self.relative_position_bias_table[offsets_NN].permute(2, 0, 1).expand(count, -1, -1, -1)
        bias_WHNN = bias_WHNN if mask_W1NN is None else bias_WHNN + mask_W1NN
        bias_1HNN = bias_WHNN.flatten(0, 1)[None]
        if weights is None and not torch.compiler.is_exporting():  # graphs fail on how the fused kernel lays it out
            mixed_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, attn_mask=bias_1HNN.to(q_BHNE.dtype))
        else:
            weights_BHNN = attention_weights(q_BHNE, k_BHNE, bias_1HNN)
            if weights is not None:
                weights.append(weights_BHNN.unflatten(1, (count, self.heads)))
            mixed_BHNE = weights_BHNN.to(v_BHNE.dtype) @ v_BHNE
        mixed_BWNC = mixed_BHNE.unflatten(1, (count, self.heads)).transpose(2, 3).flatten(3)
        return self.proj_drop(self.proj(mixed_BWNC))


class Head(nn.Module):
    """The classifier: (B, D) → (B, K). A module of its own for timm's names."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.fc(pooled_BD)


def filled(maps_BYXC: Tensor, side: int) -> Tensor:
    """Maps with zeros below and to the right, up to multiples of `side`."""
    below, right = (-n % side for n in maps_BYXC.shape[1:3])
    return F.pad(maps_BYXC, (0, 0, 0, right, 0, below)) if below or right else maps_BYXC


def windows(maps_BYXC: Tensor, side: int) -> Tensor:
    """The windows of `side` by `side` pixels that maps consist of: (B, Y, X, C) → (B, W, N, C), row by row."""
    rows, columns = (n // side for n in maps_BYXC.shape[1:3])
    split = maps_BYXC.unflatten(2, (columns, side)).unflatten(1, (rows, side))  # (B, row, y, column, x, C)
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def joined(windows_BWNC: Tensor, side: int, rows: int) -> Tensor:
    """The reverse of `windows`, of `rows` rows of windows."""
    split = windows_BWNC.unflatten(2, (side, side)).unflatten(1, (rows, -1))  # (B, row, column, y, x, C)
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@constant
def offsets(side: int, window: int, device: torch.device) -> Tensor:
    """The row (N, N) of the bias table of windows of `window` that holds the bias of two tokens of one of `side`."""
    place = torch.arange(side, device=device)
    offset = place[:, None] - place + window - 1
    return (offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]).flatten(2).flatten(0, 1)


@constant
def shift_mask(height: int, width: int, side: int, shift: int, device: torch.device) -> Tensor:
    """What keeps tokens apart that a shift of a whole map brought into one window from opposite ends: (W, 1, N, N)."""
    below, right = (torch.arange(n, device=device) >= n - shift for n in (height, width))
    region_YX = below.int()[:, None] * 2 + right.int()
    region_WN = windows(region_YX[None, :, :, None], side)[0, :, :, 0]
    return torch.where(region_WN[:, None, :, None] == region_WN[:, None, None, :], 0.0, APART)
