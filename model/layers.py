"""The encoder block: multi-head self-attention and an MLP, each behind a layer norm and a residual."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6  # as in the paper's own code; PyTorch's default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (B, N, D) → (B, N, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        # (B, N, 3·H·E) → q, k, v of (B, H, N, E)
        qkv = self.qkv(tokens_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHNE, k_BHNE, v_BHNE = qkv.unbind(0)
        mixed_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        return self.proj_drop(self.proj(mixed_BHNE.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two dense layers with a GELU between, applied to each token: (B, N, D) → (B, N, D)."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(tokens_BND)))))


class Block(nn.Module):
    """Pre-norm encoder block: x + attention(norm(x)), then x + mlp(norm(x)).

    `keep_2B` multiplies the two branches of each image (stochastic depth); None leaves them as they are.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, mlp_width, dropout)

    def forward(self, tokens_BND: Tensor, keep_2B: Tensor | None = None) -> Tensor:
        attended_BND = self.attn(self.norm1(tokens_BND))
        tokens_BND = tokens_BND + (attended_BND if keep_2B is None else attended_BND * keep_2B[0, :, None, None])
        changed_BND = self.mlp(self.norm2(tokens_BND))
        return tokens_BND + (changed_BND if keep_2B is None else changed_BND * keep_2B[1, :, None, None])


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of every `Block` within: one graph, which all blocks share, without breaks.

    Names in the state dict stay, and so do hooks on a block, which run before and after what is compiled: those that
    gather partitioned weights have to be on blocks as a whole, none on the modules within. What makes another graph is
    another micro batch, image size or dtype, the change between training and evaluation, and stochastic depth; torch
    raises an error after eight (`torch._dynamo.config.recompile_limit`). Dropout draws other numbers than uncompiled
    blocks do. A copy of a compiled model would run the weights of the original: copy first.
    """
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
