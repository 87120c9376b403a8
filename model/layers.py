"""The encoder block: multi-head self-attention and an MLP, each behind a layer norm and a residual."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.model.embed import rotate


class Block(nn.Module):
    """A residual block, of any architecture: the unit that is compiled, recomputed, and gathered whole by ZeRO-3.

    `forward(x, keep_2B, …)` → as x; `keep_2B` multiplies its two branches (stochastic depth, `kept`) image by image.
    """


def kept(branch: Tensor, keep_B: Tensor | None) -> Tensor:
    """A branch (B, …) times the factor of each image; None leaves it as it is."""
    return branch if keep_B is None else branch * keep_B.view(-1, *[1] * (branch.ndim - 1))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (B, N, D) → (B, N, D).

    `rope` are sines and cosines by `rotary_positions`. Weights (B, H, N, N) are appended to `weights`, where that is
    given: they are then computed openly, which a fused kernel would not, in float32.
    """

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, tokens_BND: Tensor, rope: Tensor | None = None, weights: list[Tensor] | None = None) -> Tensor:
        # (B, N, 3·H·E) → q, k, v of (B, H, N, E)
        qkv = self.qkv(tokens_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHNE, k_BHNE, v_BHNE = qkv.unbind(0)
        q_BHNE, k_BHNE = self.q_norm(q_BHNE), self.k_norm(k_BHNE)
        if rope is not None:
            q_BHNE, k_BHNE = rotate(q_BHNE, rope), rotate(k_BHNE, rope)
        if weights is None:
            mixed_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        else:
            weights.append(attention_weights(q_BHNE, k_BHNE))
            mixed_BHNE = weights[-1].to(v_BHNE.dtype) @ v_BHNE
        return self.proj_drop(self.proj(mixed_BHNE.transpose(1, 2).flatten(2)))


def attention_weights(q_BHNE: Tensor, k_BHNE: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √E + bias), (B, H, N, N), in float32."""
    scores = (q_BHNE.float() * q_BHNE.shape[-1] ** -0.5) @ k_BHNE.float().transpose(-2, -1)
    return (scores if bias is None else scores + bias.float()).softmax(dim=-1)


class MLP(nn.Module):
    """Two dense layers with a GELU between, applied to each token: (B, N, D) → (B, N, D).

    `approximate` is `none` or `tanh`, as of `torch.nn.functional.gelu`.
    """

    def __init__(self, width: int, hidden: int, dropout: float, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(tokens_BND), approximate=self.approximate))))


class SwiGLU(nn.Module):
    """A gated MLP: silu of the first half of `fc1` times the second, then `fc2` (Shazeer 2020, arXiv:2002.05202).

    Gate and values of `hidden` numbers each lie in one matrix, as in DINOv2.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        gate, values = self.fc1(tokens_BND).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.silu(gate) * values)))


class LayerScale(nn.Module):
    """A learned factor of each channel (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return tokens_BND * self.gamma


class EncoderBlock(Block):
    """Pre-norm encoder block: x + attention(norm(x)), then x + mlp(norm(x)).

    `keep_2B` multiplies the two branches of each image (stochastic depth); None leaves them as they are. `rope` and
    `weights` as of `Attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        dropout: float = 0.0,
        mlp: str = "gelu",
        qk_norm: bool = False,
        layer_scale: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, dropout, qk_norm, eps)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = make_mlp(mlp, width, mlp_width, dropout)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(
        self,
        tokens_BND: Tensor,
        keep_2B: Tensor | None = None,
        rope: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        one, other = (None, None) if keep_2B is None else keep_2B.unbind(0)
        tokens_BND = tokens_BND + kept(self.ls1(self.attn(self.norm1(tokens_BND), rope, weights)), one)
        return tokens_BND + kept(self.ls2(self.mlp(self.norm2(tokens_BND))), other)


def make_mlp(kind: str, width: int, hidden: int, dropout: float) -> nn.Module:
    """The MLP of a block: `gelu`, `gelu_tanh` or `swiglu`."""
    if kind == "swiglu":
        return SwiGLU(width, hidden, dropout)
    return MLP(width, hidden, dropout, "tanh" if kind == "gelu_tanh" else "none")
