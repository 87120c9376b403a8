"""From pixels to tokens: patches, and position embeddings that follow the image to another resolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Cut an image into squares of `patch_size` px and project each linearly: (B, 3, Y, X) → (B, N, D).

    A convolution whose stride is its kernel is that projection; the name `proj` is timm's.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.proj(images_BCYX).flatten(2).transpose(1, 2)


def resize_pos_embed(pos_embed_1ND: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Interpolate position embeddings in 2D to `grid` (rows, columns), by their place in the image.

    The first `prefix` tokens (the class token) have no place and stay as they are; the others must form a square.
    Bicubic with antialiasing in float32; the result has the dtype of the input. Dosovitskiy et al. 2020, section 3.2.
    """
    prefix_1ND, patches_1ND = pos_embed_1ND[:, :prefix], pos_embed_1ND[:, prefix:]
    side = round(patches_1ND.shape[1] ** 0.5)
    if side * side != patches_1ND.shape[1]:
        raise ValueError(f"position embeddings of {patches_1ND.shape[1]} patches do not form a square grid")
    if (side, side) == grid:
        return pos_embed_1ND
    patches_1DYX = patches_1ND.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized_1DYX = F.interpolate(patches_1DYX, size=grid, mode="bicubic", antialias=True)
    return torch.cat([prefix_1ND, resized_1DYX.flatten(2).transpose(1, 2).to(pos_embed_1ND.dtype)], dim=1)
