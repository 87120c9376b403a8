"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

import hashlib
import math

import torch
from torch import Tensor, nn

from vitscale.model.embed import PatchEmbed, resize_pos_embed
from vitscale.model.heads import PreLogits
from vitscale.model.layers import NORM_EPS, Block
from vitscale.model.registry import ViTConfig


class VisionTransformer(nn.Module):
    """Patches and a class token with learned positions → pre-norm encoder → classifier on the class token.

    `forward`: float images (B, 3, Y, X) of `config.img_size` → logits (B, K). Parameter names are timm's.
    Initial weights depend on `seed` and each parameter's name alone, not on the order of construction.
    """

    def __init__(self, config: ViTConfig, seed: int = 0) -> None:
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
        initialise(self, seed)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.head(self.pre_logits(self.forward_features(images_BCYX)[:, 0]))

    def forward_features(self, images_BCYX: Tensor) -> Tensor:
        """Normalised tokens of the last block (B, N, D), the class token first."""
        patches_BND = self.patch_embed(images_BCYX)
        class_B1D = self.cls_token.expand(len(patches_BND), -1, -1)
        tokens_BND = self.pos_drop(torch.cat([class_B1D, patches_BND], dim=1) + self.pos_embed)
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        return self.norm(tokens_BND)


@torch.no_grad()
def initialise(model: VisionTransformer, seed: int) -> None:
    """Initial weights as in the paper's own code (google-research/vision_transformer, `vit_jax/models_vit.py`).

    Xavier uniform for the dense layers of the encoder, with query, key and value taken as three layers; MLP biases
    N(0, 1e-6); positions N(0, 0.02); LeCun normal for the patches and the hidden layer of the head; all else zero
    (class token, classifier, other biases) or one (norm scales).
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # a shape without memory: weights are put in later
            continue
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        fan_in = parameter[0].numel()
        if name == "pos_embed":
            parameter.normal_(std=0.02, generator=generator)
        elif name.endswith("qkv.weight"):
            bound = math.sqrt(6 / (2 * fan_in))
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.startswith("blocks.") and parameter.ndim == 2:
            bound = math.sqrt(6 / (fan_in + len(parameter)))
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.startswith("blocks.") and ".mlp." in name:
            parameter.normal_(std=1e-6, generator=generator)
        elif name in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
            nn.init.trunc_normal_(parameter, std=lecun_std(fan_in), a=-2 * lecun_std(fan_in), b=2 * lecun_std(fan_in),
                                  generator=generator)  # fmt: skip
        elif "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.zero_()


def lecun_std(fan_in: int) -> float:
    """Deviation to give a normal cut at two deviations so that the result has variance 1 / fan_in (as in JAX)."""
    return math.sqrt(1 / fan_in) / 0.87962566103423978


def adapt_weights(weights: dict[str, Tensor], model: VisionTransformer) -> tuple[dict[str, Tensor], list[str]]:
    """Fit pretrained `weights` to a `model` of another resolution, with a new head.

    Returns what to load and one line for each thing that was not kept as it is. Positions are interpolated
    (`resize_pos_embed`); the classifier and the hidden layer before it are left out, so that the model keeps its own
    (zero-initialised) head. Raises `ValueError` naming the tensors that are missing, unexpected or of another shape.
    """
    own, notes = model.state_dict(), []
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(("head.", "pre_logits."))}
    if "pos_embed" in kept and kept["pos_embed"].shape[2] == model.config.width:
        before, after = math.isqrt(kept["pos_embed"].shape[1] - 1), model.config.grid
        if before != after:
            kept["pos_embed"] = resize_pos_embed(kept["pos_embed"], (after, after))
            notes.append(f"position embeddings interpolated from {before}×{before} to {after}×{after}")
    expected = {name for name in own if not name.startswith(("head.", "pre_logits."))}
    wrong = [f"{name} is missing" for name in sorted(expected - kept.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(kept.keys() - expected)]
    wrong += [
        f"{name} is {tuple(kept[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(expected & kept.keys())
        if kept[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    dropped = sorted(weights.keys() - kept.keys())
    if dropped:
        head = f"the new head for {model.config.num_classes} classes starts at zero"
        notes.append(f"dropped {', '.join(dropped)}; {head}")
    return kept, notes
