"""From pixels to tokens: patches, and positions that follow the image to another resolution."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.errors import UserError

Grid = tuple[int, int]  # rows, columns


class PatchEmbed(nn.Module):
    """Cut an image into squares of `patch_size` px and project each linearly: (B, 3, Y, X) → (B, N, D).

    A convolution whose stride is its kernel is that projection; the names `proj` and `backbone` are timm's. With a
    `backbone`, that makes a feature map of so many `channels` first, whose pixels `patch_size` then counts.
    """

    def __init__(self, patch_size: int, width: int, backbone: nn.Module | None = None, channels: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Identity() if backbone is None else backbone
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.proj(self.backbone(images_BCYX)).flatten(2).transpose(1, 2)


def grid_of(images_BCYX: Tensor, patch_size: int) -> Grid:
    """Rows and columns of patches of images. Raises `UserError` for sides that are no multiples of the patch's."""
    height, width = images_BCYX.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        expected = f"sides that are multiples of {patch_size} px"
        raise UserError("images", f"{height}×{width} px", expected, "Resize or cut them.")
    return height // patch_size, width // patch_size


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the results of a pure function that makes tensors, except while a graph is traced."""

    @lru_cache(maxsize=64)
    def held(*args: object) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # usable in training, wherever they are first asked for
            return make(*args)

    def get(*args: object) -> Tensor:
        return make(*args) if torch.compiler.is_compiling() else held(*args)

    return get


def resize_pos_embed(
    pos_embed_1ND: Tensor, trained: Grid, grid: Grid, prefix: int = 1, antialias: bool = True
) -> Tensor:
    """Interpolate position embeddings in 2D from the grid `trained` to `grid`, by their place in the image.

    The first `prefix` tokens (the class token) have no place and stay as they are; the others lie row by row.
    Bicubic in float32, as `torch.nn.functional.interpolate` has it, with or without `antialias`; the result has the
    dtype of the input. Interpolation is linear and separable: two small matrices, which are kept from call to call, so
    that gradients reach the embeddings at any resolution. Dosovitskiy et al. 2020, section 3.2.
    """
    prefix_1ND, patches_1ND = pos_embed_1ND[:, :prefix], pos_embed_1ND[:, prefix:]
    symbolic = isinstance(grid[0], torch.SymInt) or isinstance(grid[1], torch.SymInt)  # a graph for any size
    if not symbolic and trained == tuple(grid):
        return pos_embed_1ND
    patches_YXD = patches_1ND.float().unflatten(1, trained)[0]
    if symbolic:
        patches_1DYX = patches_YXD.permute(2, 0, 1)[None]
        resized_1DYX = F.interpolate(patches_1DYX, size=grid, mode="bicubic", antialias=antialias)
        resized_1ND = resized_1DYX.flatten(2).transpose(1, 2)
    else:
        sides, device = zip(trained, grid, strict=True), pos_embed_1ND.device
        rows, columns = (_resizing(before, after, antialias, device) for before, after in sides)
        resized_1ND = torch.einsum("ay,bx,yxd->abd", rows, columns, patches_YXD).flatten(0, 1)[None]
    return torch.cat([prefix_1ND, resized_1ND.to(pos_embed_1ND.dtype)], dim=1)


@constant
def _resizing(before: int, after: int, antialias: bool, device: torch.device) -> Tensor:
    """The matrix (after, before) of bicubic interpolation along one side, in float32."""
    unit_11NN = torch.eye(before, device="cpu")[None, None]
    return F.interpolate(unit_11NN, size=(after, before), mode="bicubic", antialias=antialias)[0, 0].to(device)


@constant
def sincos_positions(grid: Grid, width: int, trained: Grid, device: torch.device) -> Tensor:
    """Fixed positions (N, D) of a grid in float32: sines and cosines of column and row at D / 4 frequencies.

    As `posemb_sincos_2d` of google-research/big_vision, temperature 10,000. Another grid than the one `trained` takes
    places between: patch i of n lies at (i + 1/2) · trained / n - 1/2.
    """
    count = width // 4
    omega = 10_000 ** -(torch.arange(count, device=device) / max(count - 1, 1))
    y, x = ((torch.arange(n, device=device) + 0.5) * known / n - 0.5 for n, known in zip(grid, trained, strict=True))
    y_YD, x_XD = y[:, None] * omega, x[:, None] * omega
    columns_XD = torch.cat([x_XD.sin(), x_XD.cos()], dim=1)
    rows_YD = torch.cat([y_YD.sin(), y_YD.cos()], dim=1)
    shape = (*grid, 2 * count)
    return torch.cat([columns_XD[None].expand(shape), rows_YD[:, None].expand(shape)], dim=2).flatten(0, 1)


@constant
def rotary_positions(grid: Grid, head_width: int, device: torch.device) -> Tensor:
    """Sines and cosines (2, 1, N, E) in float32 of the angles by which a patch's place turns queries and keys.

    A quarter of the pairs for each of E / 4 frequencies of row and of column, places from -1 to 1 over the image, base
    100: as in DINOv3 (Siméoni et al. 2025, arXiv:2508.10104). Resolution changes no angle of a place.
    """
    count = head_width // 4
    frequency = 100 ** -(torch.arange(count, device=device) / count)
    y, x = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in grid)
    shape = (*grid, count)
    rows, columns = (y[:, None, None] * frequency).expand(shape), (x[None, :, None] * frequency).expand(shape)
    angles_NE = (2 * math.pi * torch.cat([rows, columns], dim=2)).flatten(0, 1).tile(1, 2)
    return torch.stack([angles_NE.sin(), angles_NE.cos()])[:, None]


def rotate(values_BHNE: Tensor, rope_2BNE: Tensor) -> Tensor:
    """Turn queries or keys by the angles of `rotary_positions`; tokens before those that have a place stay."""
    prefix = values_BHNE.shape[2] - rope_2BNE.shape[2]
    placed_BHNE = values_BHNE[:, :, prefix:]
    sin_B1NE, cos_B1NE = rope_2BNE.to(values_BHNE.dtype).unsqueeze(2).unbind(0)
    one, other = placed_BHNE.chunk(2, dim=-1)
    turned_BHNE = placed_BHNE * cos_B1NE + torch.cat([-other, one], dim=-1) * sin_B1NE
    return torch.cat([values_BHNE[:, :, :prefix], turned_BHNE], dim=2)
