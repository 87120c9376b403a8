"""The MLP-Mixer of "MLP-Mixer: An all-MLP Architecture for Vision" (Tolstikhin et al. 2021, arXiv:2105.01601)."""

from torch import Tensor, nn

from vitscale.errors import UserError
from vitscale.model.config import MixerConfig
from vitscale.model.embed import PatchEmbed
from vitscale.model.initial import Rules, constant, lecun
from vitscale.model.layers import MLP, Block, kept
from vitscale.model.network import Network


class MLPMixer(Network):
    """Patches → blocks that mix tokens, then channels → classifier on the average of the tokens.

    Parameter names are timm's. Images are of `config.img_size`: the weights that mix tokens are of as many.
    """

    config: MixerConfig

    def __init__(self, config: MixerConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        self.stem = PatchEmbed(config.patch_size, config.width)
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.num_classes)
        self.initialise(seed)

    @staticmethod
    def rules(config: MixerConfig) -> Rules:
        """As in the paper's own code (google-research/vision_transformer, `vit_jax/models_mixer.py`): LeCun normal for
        patches and MLPs, classifier and biases zero."""
        return (
            (r"norm\d?\.weight$", constant(1.0)),
            (r"^(stem|blocks)\..*\.weight$", lecun),
            (r"^head\.bias$", constant(config.head_bias)),
        )

    def forward(self, images_BCYX: Tensor, keep_L2B: Tensor | None = None, return_attention: bool = False) -> Tensor:
        """Logits (B, K). Raises `ValueError` for `return_attention`: there is none."""
        features_BND = self.forward_features(images_BCYX, keep_L2B, [] if return_attention else None)
        return self.head(self.representation(features_BND))

    def forward_features(
        self, images_BCYX: Tensor, keep_L2B: Tensor | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """Normalised tokens of the last block (B, N, D).

        Raises `UserError` for images of another size, and `ValueError` where `weights` ask for attention.
        """
        if weights is not None:
            raise ValueError("an MLP-Mixer has no attention to return")
        (rows, columns), (height, width) = self.config.height_width, images_BCYX.shape[-2:]
        if (height, width) != (rows, columns):
            expected = f"{rows}×{columns} px, to which an MLP-Mixer's weights between tokens are tied"
            raise UserError("images", f"{height}×{width} px", expected, "Resize them, or take another architecture.")
        return self.norm(self.through(self.blocks, self.stem(images_BCYX), keep_L2B))

    def representation(self, features_BND: Tensor) -> Tensor:
        """What the classifier sees of the tokens that `forward_features` returns, (B, D)."""
        return features_BND.mean(dim=1)


class MixerBlock(Block):
    """x + MLP over the tokens of each channel of norm(x), then x + MLP over the channels of each token of norm(x):
    (B, N, D) → (B, N, D)."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp_tokens = MLP(config.patches, config.tokens_width, config.dropout)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp_channels = MLP(config.width, config.channels_width, config.dropout)

    def forward(self, tokens_BND: Tensor, keep_2B: Tensor | None = None) -> Tensor:
        one, other = (None, None) if keep_2B is None else keep_2B.unbind(0)
        mixed_BND = self.mlp_tokens(self.norm1(tokens_BND).transpose(1, 2)).transpose(1, 2)
        tokens_BND = tokens_BND + kept(mixed_BND, one)
        return tokens_BND + kept(self.mlp_channels(self.norm2(tokens_BND)), other)
