"""From tokens to a representation: attention pooling, and the hidden layer before a classifier."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.model.layers import make_mlp


class PreLogits(nn.Module):
    """The hidden tanh layer of the paper's pretraining head: (B, D) → (B, D). Dropped for fine-tuning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, features_BD: Tensor) -> Tensor:
        return torch.tanh(self.fc(features_BD))


class AttentionPool(nn.Module):
    """Attention of one learned query over all tokens, then an MLP with a residual: (B, N, D) → (B, D).

    The MAP head of Zhai et al. 2022 (arXiv:2106.04560); parameter names are those of timm's `AttentionPoolLatent`.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, mlp: str, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = make_mlp(mlp, width, mlp_width, dropout)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        q_1HNE = self.q(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BHNE, v_BHNE = self.kv(tokens_BND).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q_BHNE = q_1HNE.expand(tokens_BND.shape[0], -1, -1, -1)
        pooled_BD = self.proj(F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE).flatten(1))
        return pooled_BD + self.mlp(self.norm(pooled_BD))
