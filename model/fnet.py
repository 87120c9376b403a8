"""Token mixing without weights, by a Fourier transform (FNet, Lee-Thorp et al. 2021, arXiv:2105.03824)."""

import torch
from torch import Tensor, nn

from vitscale.model.layers import Block, LayerScale, kept, make_mlp


class FourierBlock(Block):
    """Pre-norm block: x + Re(F(norm(x))), F the Fourier transform over tokens and width, then x + mlp(norm(x)).

    The transform is orthonormal (1 / √(N D)): of unit variance in, unit variance out, at any width and resolution.
    """

    def __init__(self, width: int, mlp_width: int, dropout: float, mlp: str, layer_scale: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = make_mlp(mlp, width, mlp_width, dropout)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, tokens_BND: Tensor, keep_2B: Tensor | None = None) -> Tensor:
        one, other = (None, None) if keep_2B is None else keep_2B.unbind(0)
        tokens_BND = tokens_BND + kept(self.ls1(mix(self.norm1(tokens_BND))), one)
        return tokens_BND + kept(self.ls2(self.mlp(self.norm2(tokens_BND))), other)


def mix(tokens_BND: Tensor) -> Tensor:
    """Real part of the orthonormal 2D Fourier transform over tokens and width, computed in float32."""
    return torch.fft.fft2(tokens_BND.float(), norm="ortho").real.to(tokens_BND.dtype)
