"""Named architectures: sizes as data, and the settings of a recipe's `model:` section. Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vitscale.errors import UserError

if TYPE_CHECKING:
    from vitscale.model.vit import VisionTransformer


@dataclass(frozen=True)
class Size:
    """Depth in blocks, width D, hidden width of the MLP, and heads H of one size of ViT."""

    depth: int
    width: int
    mlp_width: int
    heads: int


SIZES = {  # Dosovitskiy et al. 2020, table 1 (base, large, huge); Touvron et al. 2020, table 1 (tiny, small)
    "tiny": Size(12, 192, 768, 3),
    "small": Size(12, 384, 1536, 6),
    "base": Size(12, 768, 3072, 12),
    "large": Size(24, 1024, 4096, 16),
    "huge": Size(32, 1280, 5120, 16),
}
MOST_BLOCKS, MOST_SIZE = 1024, 1 << 24  # sanity: sizes may come from files that others made
NAME = re.compile(r"vit_(?P<size>[a-z]+)_patch(?P<patch>\d+)_(?P<img>\d+)")


@dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes the architecture of a Vision Transformer; stored with checkpoints and exports.

    `img_size` and `patch_size` are sides in pixels. `pre_logits` adds the paper's pretraining head: one hidden tanh
    layer of width D before the classifier. `drop_path` is the rate of stochastic depth at the last block: the caller of
    a network draws the branches to drop. Raises `UserError` for sizes that do not fit each other.
    """

    img_size: int
    patch_size: int
    depth: int
    width: int
    mlp_width: int
    heads: int
    num_classes: int
    dropout: float = 0.0
    pre_logits: bool = False
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for key in ("img_size", "patch_size", "depth", "width", "mlp_width", "heads", "num_classes"):
            value, most = getattr(self, key), MOST_BLOCKS if key == "depth" else MOST_SIZE
            if not 1 <= value <= most:
                raise UserError(f"model.{key}", value, f"a whole number from 1 to {most}", "Change it.")
        if self.img_size % self.patch_size:
            lower = max(self.img_size // self.patch_size, 1) * self.patch_size
            raise UserError(
                "model.img_size",
                f"{self.img_size} with model.patch_size {self.patch_size}",
                "a multiple of the patch size",
                f"Set model.img_size to {lower} or {lower + self.patch_size}, or change model.patch_size.",
            )
        if self.width % self.heads:
            raise UserError(
                "model.heads",
                f"{self.heads} with model.width {self.width}",
                "a divisor of the width",
                "Change one of the two.",
            )
        if not 0 <= self.dropout < 1:
            raise UserError("model.dropout", self.dropout, "a probability in [0, 1)", "The paper uses 0 or 0.1.")
        if not 0 <= self.drop_path < 1:
            raise UserError("model.drop_path", self.drop_path, "a probability in [0, 1)", "DeiT uses 0.1.")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.img_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """`model:` – a named architecture, and what differs from it (null: as named). Image and patch in px.

    `drop_path`: an image passes a branch of the last block by with this probability in training, one of an earlier
    block with one that rises linearly from 0 at the first (stochastic depth, Huang et al. 2016; DeiT: 0.1).
    """

    name: str = "vit_base_patch16_224"
    img_size: int | None = None
    patch_size: int | None = None
    depth: int | None = None
    width: int | None = None
    mlp_width: int | None = None
    heads: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    pre_logits: bool = False

    def __post_init__(self) -> None:
        self.resolve(num_classes=1)

    def resolve(self, num_classes: int) -> ViTConfig:
        """The full architecture for `num_classes` classes. Raises `UserError` for a name or size that cannot be."""
        match = NAME.fullmatch(self.name)
        if not match or match["size"] not in SIZES:
            near = difflib.get_close_matches(self.name, list_models(), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Change sizes with model.width, model.depth and so on."
            raise UserError(
                "model.name",
                repr(self.name),
                f"vit_SIZE_patchP_R with SIZE one of {', '.join(SIZES)}, P the patch side and R the image side in px",
                hint,
            )
        named = {"img_size": int(match["img"]), "patch_size": int(match["patch"]), **asdict(SIZES[match["size"]])}
        changed = {key: getattr(self, key) for key in named if getattr(self, key) is not None}
        return ViTConfig(
            **{**named, **changed}, num_classes=num_classes, dropout=self.dropout, pre_logits=self.pre_logits,
            drop_path=self.drop_path,
        )  # fmt: skip


def list_models() -> list[str]:
    """Names for the usual patch and image sides; others follow the same pattern."""
    sides = {14: (224, 518), 16: (224, 384), 32: (224, 384)}
    return [f"vit_{size}_patch{patch}_{img}" for size in SIZES for patch in sides for img in sides[patch]]


def create_model(name: str, num_classes: int = 1000, seed: int = 0, **options: Any) -> VisionTransformer:
    """Build a named architecture with the paper's initialisation.

    `options` are the other fields of `ModelConfig`, such as `img_size=384`. Raises `UserError` as that class does.
    """
    from vitscale.model.vit import VisionTransformer  # keeps this module free of torch

    return VisionTransformer(ModelConfig(name=name, **options).resolve(num_classes), seed=seed)
