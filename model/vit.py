"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.model.embed import PatchEmbed, resize_pos_embed
from vitscale.model.heads import PreLogits
from vitscale.model.initial import initialise
from vitscale.model.layers import NORM_EPS, Block
from vitscale.model.registry import ViTConfig

HEAD = ("head.", "pre_logits.")  # the classifier and the hidden layer before it


class VisionTransformer(nn.Module):
    """Patches and a class token with learned positions → pre-norm encoder → classifier on the class token.

    `forward`: float images (B, 3, Y, X) of `config.img_size` → logits (B, K). Parameter names are timm's. `keep_L2B`
    are the factors of the two branches of each block, image by image, for stochastic depth in training (Huang et al.
    2016): 0 where a branch is dropped, 1 / (1 - rate) where it is kept. None, as in evaluation, keeps them all.

    Initial weights are `initial_weight(…, seed)`; with None they are left as torch makes them, which is for
    parameters that are partitioned over ranks as they are made. `recompute`, to be set from outside, keeps of each
    block in training its input alone, and computes the rest again in the backward pass (Chen et al. 2016).
    """

    recompute = False

    def __init__(self, config: ViTConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.pre_logits = PreLogits(config.width) if config.pre_logits else nn.Identity()
        self.head = nn.Linear(config.width, config.num_classes)
        if seed is not None:
            initialise(self, seed)

    def forward(self, images_BCYX: Tensor, keep_L2B: Tensor | None = None) -> Tensor:
        return self.head(self.pre_logits(self.forward_features(images_BCYX, keep_L2B)[:, 0]))

    def forward_features(self, images_BCYX: Tensor, keep_L2B: Tensor | None = None) -> Tensor:
        """Normalised tokens of the last block (B, N, D), the class token first."""
        patches_BND = self.patch_embed(images_BCYX)
        class_B1D = self.cls_token.expand(len(patches_BND), -1, -1)
        tokens_BND = self.pos_drop(torch.cat([class_B1D, patches_BND], dim=1) + self.pos_embed)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        factors = [None] * len(self.blocks) if keep_L2B is None else keep_L2B.to(tokens_BND.dtype)
        for block, keep_2B in zip(self.blocks, factors, strict=True):
            if recompute:
                # the variant without a backward pass within: under ZeRO-3 each weight is then gathered no more often
                tokens_BND = checkpoint(block, tokens_BND, keep_2B, use_reentrant=False)
            else:
                tokens_BND = block(tokens_BND, keep_2B)
        return self.norm(tokens_BND)


def adapt_weights(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    config: ViTConfig,
    own_shapes: Mapping[str, tuple[int, ...]],
) -> tuple[set[str], Callable[[str], Tensor], list[str]]:
    """Fit pretrained weights, of these `shapes` and read by name, to a network of `config` and `own_shapes`.

    Returns the names of those kept, a function that reads one of them, adapted, and a line for each thing that is not
    kept as it is. Positions are interpolated (`resize_pos_embed`); the classifier and the hidden layer before it are
    left out, so that the network keeps its own (zero-initialised) head. Nothing is read before that function is called.
    Raises `ValueError` naming the tensors that are missing, unexpected or of another shape.
    """
    kept = {name: tuple(shape) for name, shape in shapes.items() if not name.startswith(HEAD)}
    own = {name: tuple(shape) for name, shape in own_shapes.items() if not name.startswith(HEAD)}
    notes, grid = [], None
    positions = kept.get("pos_embed", ())
    if len(positions) == 3 and positions[2] == config.width:
        patches = positions[1] - 1
        before, after = math.isqrt(max(patches, 0)), config.grid
        if before != after:
            if before**2 != patches:
                raise ValueError(f"position embeddings of {patches} patches do not form a square grid")
            grid, kept["pos_embed"] = (after, after), (*positions[:1], after**2 + 1, config.width)
            notes.append(f"position embeddings interpolated from {before}×{before} to {after}×{after}")
    wrong = [f"{name} is missing" for name in sorted(own.keys() - kept.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(kept.keys() - own.keys())]
    both = sorted(own.keys() & kept.keys())
    wrong += [f"{name} is {kept[name]}, not {own[name]}" for name in both if kept[name] != own[name]]
    if wrong:
        raise ValueError("; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    dropped = sorted(shapes.keys() - kept.keys())
    if dropped:
        notes.append(f"dropped {', '.join(dropped)}; the new head for {config.num_classes} classes starts at zero")

    def adapted(name: str) -> Tensor:
        weight = read(name)
        return resize_pos_embed(weight, grid) if grid and name == "pos_embed" else weight

    return set(kept), adapted, notes
