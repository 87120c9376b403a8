"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, arXiv:2010.11929), with options
that followed it."""

from typing import Any

import torch
from torch import Tensor, nn

from vitscale.model.config import ViTConfig
from vitscale.model.embed import PatchEmbed, grid_of, resize_pos_embed, rotary_positions, sincos_positions
from vitscale.model.fnet import FourierBlock
from vitscale.model.heads import AttentionPool, PreLogits
from vitscale.model.initial import Rules, constant, lecun, normal, xavier
from vitscale.model.layers import EncoderBlock
from vitscale.model.network import Network
from vitscale.model.resnet import STEM_RULES, Stem


class VisionTransformer(Network):
    """Patches and a class token with positions → pre-norm encoder → classifier on the representation.

    Tokens come in this order: class, distillation, registers, patches row by row. Parameter names are timm's. A network
    with a distillation token has two heads, whose logits `forward` averages (Touvron et al. 2020); `heads` has both.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        width, eps = config.width, config.norm_eps
        stem = Stem(config.stem) if config.stem else None
        self.patch_embed = PatchEmbed(
            config.patch_size // config.stem_stride, width, stem, stem.channels if stem else 3
        )
        self.cls_token = token(1, width) if config.class_token else None
        self.dist_token = token(1, width) if config.distilled else None
        self.reg_token = token(config.registers, width) if config.registers else None
        learned = config.positions == "learned"
        self.pos_embed = token(config.patches + config.placed_prefix, width) if learned else None
        self.pos_drop = nn.Dropout(config.dropout)
        self.norm_pre = nn.LayerNorm(width, eps=eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.depth))
        self.norm = nn.Identity() if config.fc_norm else nn.LayerNorm(width, eps=eps)
        self.attn_pool = None
        if config.pool == "map":
            self.attn_pool = AttentionPool(width, config.heads, config.mlp_width, config.mlp, config.dropout, eps)
        self.fc_norm = nn.LayerNorm(width, eps=eps) if config.fc_norm else nn.Identity()
        self.pre_logits = PreLogits(width) if config.pre_logits else nn.Identity()
        self.head = nn.Linear(width, config.num_classes)
        self.head_dist = nn.Linear(width, config.num_classes) if config.distilled else None
        self.initialise(seed)

    @staticmethod
    def rules(config: ViTConfig) -> Rules:
        """As in the paper's own code (google-research/vision_transformer, `vit_jax/models_vit.py`): Glorot uniform for
        the encoder's dense layers, query, key and value taken as three; MLP biases N(0, 1e-6); positions N(0, 0.02);
        LeCun normal for the patches and the hidden layer of the head; class token, classifier, other biases zero."""
        return (
            *((f"patch_embed.backbone.{pattern}", draw) for pattern, draw in STEM_RULES),
            (r"^(pos_embed|dist_token|reg_token)$", normal(0.02)),  # registers alike would stay alike
            (r"\.qkv\.weight$", xavier(3)),
            (r"attn_pool\.kv\.weight$", xavier(2)),
            (r"attn_pool\.latent$", normal(config.width**-0.5)),
            (r"norm\w*\.weight$", constant(1.0)),
            (r"\.ls\d\.gamma$", constant(config.layer_scale)),
            (r"^(blocks|attn_pool)\..*\.weight$|^attn_pool\.(q|proj)\.weight$", xavier()),
            (r"\.mlp\.\w+\.bias$", normal(1e-6)),
            (r"^(patch_embed\.proj|pre_logits\.fc)\.weight$", lecun),
            (r"^head(_dist)?\.bias$", constant(config.head_bias)),
        )

    def forward(
        self,
        images_BCYX: Tensor,
        keep_L2B: Tensor | None = None,
        patches_BM: Tensor | None = None,
        return_attention: bool = False,
    ) -> Any:
        """Logits (B, K), with `return_attention` also a list of weights (B, H, N, N), block by block.

        `patches_BM` are the numbers of the M patches of each image that are used (patch dropout); None uses all.
        """
        weights: list[Tensor] | None = [] if return_attention else None
        heads = self.heads(self.forward_features(images_BCYX, keep_L2B, patches_BM, weights))
        logits_BK = heads[0] if len(heads) == 1 else sum(heads) / len(heads)
        return (logits_BK, weights) if return_attention else logits_BK

    def forward_features(
        self,
        images_BCYX: Tensor,
        keep_L2B: Tensor | None = None,
        patches_BM: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Normalised tokens of the last block (B, N, D); attention is appended to `weights`, where that is given."""
        tokens_BND, rope = self.embed(images_BCYX, patches_BM)
        if self.config.mixing == "fourier":
            if weights is not None:
                raise ValueError("a network that mixes tokens by Fourier transforms has no attention to return")
            return self.norm(self.through(self.blocks, tokens_BND, keep_L2B))
        return self.norm(self.through(self.blocks, tokens_BND, keep_L2B, rope, weights))

    def embed(self, images_BCYX: Tensor, patches_BM: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens before the first block (B, N, D), and the angles (2, 1 or B, patches, E) of rotary positions."""
        config, grid = self.config, grid_of(images_BCYX, self.config.patch_size)
        patches_BND = self.patch_embed(images_BCYX)
        prefix, rope = [each for each in (self.cls_token, self.dist_token) if each is not None], None
        if self.pos_embed is not None:
            places_1ND = resize_pos_embed(self.pos_embed, config.grid, grid, config.placed_prefix, config.antialias)
            prefix = [each + places_1ND[:, i : i + 1] for i, each in enumerate(prefix)]
            patches_BND = patches_BND + places_1ND[:, config.placed_prefix :]
        elif config.positions == "sincos2d":
            places_ND = sincos_positions(grid, config.width, config.placed_grid, images_BCYX.device)
            patches_BND = patches_BND + places_ND.to(patches_BND.dtype)
        else:
            rope = rotary_positions(grid, config.width // config.heads, images_BCYX.device)
        if patches_BM is not None:
            patches_BND = patches_BND.take_along_dim(patches_BM[:, :, None], dim=1)
            rope = None if rope is None else rope.take_along_dim(patches_BM[None, :, :, None], dim=2)
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        tokens_BND = torch.cat([*(each.expand(patches_BND.shape[0], -1, -1) for each in prefix), patches_BND], dim=1)
        return self.norm_pre(self.pos_drop(tokens_BND)), rope

    def representation(self, tokens_BND: Tensor) -> Tensor:
        """What the classifier sees of the tokens that `forward_features` returns, (B, D)."""
        if self.attn_pool is not None:
            return self.attn_pool(tokens_BND[:, self.config.prefix :])
        pooled_BD = tokens_BND[:, 0] if self.config.pool == "token" else tokens_BND[:, self.config.prefix :].mean(dim=1)
        return self.pre_logits(self.fc_norm(pooled_BD))

    def heads(self, tokens_BND: Tensor) -> list[Tensor]:
        """Logits (B, K) of the classifier and, where there is one, of that on the distillation token."""
        logits = [self.head(self.representation(tokens_BND))]
        return logits if self.head_dist is None else [*logits, self.head_dist(tokens_BND[:, 1])]


def token(count: int, width: int) -> nn.Parameter:
    """Embeddings (1, count, D)."""
    return nn.Parameter(torch.zeros(1, count, width))


def make_block(config: ViTConfig) -> nn.Module:
    """One block of the encoder."""
    scaled, eps = config.layer_scale > 0, config.norm_eps
    if config.mixing == "fourier":
        return FourierBlock(config.width, config.mlp_width, config.dropout, config.mlp, scaled, eps)
    return EncoderBlock(
        config.width,
        config.heads,
        config.mlp_width,
        config.dropout,
        config.mlp,
        config.qk_norm,
        scaled,
        config.norm_eps,
    )
