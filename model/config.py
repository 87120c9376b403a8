"""What fixes each architecture: one dataclass a family, validated, stored with checkpoints. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, cast

from vitscale.errors import UserError

MOST_BLOCKS, MOST_SIZE = 1024, 1 << 24  # sanity: sizes may come from files that others made
MOST_SIDE = 1 << 16  # of an image, in px

Size = int | tuple[int, int]  # of an image in px: the side of a square, or height and width


def height_width(size: Size) -> tuple[int, int]:
    """Of an image, in px."""
    return size if isinstance(size, tuple) else (size, size)


def in_pixels(size: Size) -> str:
    """A size for people: `384 px`, or `384×512 px`, height first."""
    return f"{'×'.join(map(str, size)) if isinstance(size, tuple) else size} px"


class ArchitectureConfig:
    """What every family has: the size of the images that it is made for in px, and the number of classes.

    `img_size` is the side of squares, or height and width: such a pair of equal numbers becomes one.
    `patch_size` is the side in px of which an image's have to be multiples, and `depth` the number of residual blocks.
    `drop_path` is the rate of stochastic depth at the last block: the caller of a network draws the branches to drop.
    `img_size` alone may differ between pretraining and fine-tuning, besides the head and what acts in training only.
    """

    family: ClassVar[str]
    alike: ClassVar[bool] = True  # whether all blocks are of one form, so that two of them tell what all of them take

    img_size: Size
    num_classes: int
    drop_path: float
    patch_size: int
    depth: int

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the images, in px."""
        return height_width(self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def summary(self) -> str:
        """Its sizes and the options that are not at their defaults, in a line."""
        shown = [field for field in fields(cast(Any, self)) if field.name not in ("img_size", "num_classes")]
        rows = {field.name.replace("_", " "): (getattr(self, field.name), field.default) for field in shown}
        return ", ".join(_said(name, value) for name, (value, usual) in rows.items() if value != usual)

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raise `UserError` for sizes out of reason, and for images that do not consist of whole patches."""
        size: Any = self.img_size
        if isinstance(size, list | tuple):  # from JSON or a recipe it comes as a list
            expected = "the side of a square in px, or height and width"
            _require(len(size) == 2, "img_size", list(size), expected, "384, say, or [384,512].")
            object.__setattr__(self, "img_size", size[0] if size[0] == size[1] else tuple(size))
        for name in names:
            value = getattr(self, name)
            limits = {"img_size": MOST_SIDE, "depth": MOST_BLOCKS, "depths": MOST_BLOCKS, "stem": MOST_BLOCKS}
            most = limits.get(name, MOST_SIZE)
            for one in value if isinstance(value, tuple | list) else [value]:
                _require(_whole(one) and 1 <= one <= most, name, value, f"whole numbers from 1 to {most}", "Change it.")
        patch = self.patch_size
        for side in self.height_width:
            lower = max(side // patch, 1) * patch
            got = f"{side} with patches of {patch} px"
            remedy = f"Set model.img_size to {lower} or {lower + patch}, or choose another patch size."
            _require(side % patch == 0, "img_size", got, "a multiple of the patch size", remedy)

    def check_shares(self, **usual: str) -> None:
        """Raise `UserError` for a probability outside of [0, 1); `usual` has an example for each."""
        for name, example in usual.items():
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "a probability in [0, 1)", example)


@dataclass(frozen=True)
class ViTConfig(ArchitectureConfig):
    """Everything that fixes a Vision Transformer (Dosovitskiy et al. 2020); the options' defaults are the paper's.

    `img_size` and `patch_size` are in pixels; `mlp_width` is the hidden width of a block's MLP.

    - `stem`: the blocks of each stage of a ResNet before the patches, whose side on its feature map is `patch_size`
      divided by its stride (the paper's hybrid: (3, 4, 9), or (3, 4, 6, 3)); empty: none.
    - `positions`: `learned`; `sincos2d`, fixed (Chen et al. 2021); or `rotary` (as in DINOv3, Siméoni et al. 2025).
      Learned ones follow the image to another resolution by bicubic interpolation, with `antialias` or without; fixed
      ones lie between those of `sincos_grid`, the rows and columns of patches that were trained (empty: the image's).
    - `class_token`, and `pool`: the `token` itself, the `avg` of the patches, or attention pooling (`map`, Zhai et al.
      2022). `fc_norm` puts the last norm behind the average. `distilled`: a second token with a head (DeiT).
    - `registers`: further tokens, without a place, that are not pooled (Darcet et al. 2023).
    - `mixing`: `attention`, or `fourier` (Lee-Thorp et al. 2021). `qk_norm`: layer norms of queries and keys (Dehghani
      et al. 2023). `mlp`: `gelu`, `gelu_tanh` (its approximation, as in the paper's code), or `swiglu`, in which
      `mlp_width` is that of the gate (Shazeer 2020). `layer_scale`: first factor of each branch (Touvron et al. 2021).
    - `pre_norm`: a norm before the first block. `pre_logits`: the paper's pretraining head, a hidden tanh layer
      before the classifier. `head_bias`: its initial bias, for sigmoid losses (Beyer et al. 2020: -ln K).
    - `dropout` after every dense layer but queries, keys and values, and after adding positions; `patch_drop`: share
      of the patches left out in training (Liu et al. 2022: 0.25 or 0.5).

    Raises `UserError` for sizes and options that do not fit each other.
    """

    family: ClassVar[str] = "vit"

    img_size: Size
    patch_size: int
    depth: int
    width: int
    mlp_width: int
    heads: int
    num_classes: int
    dropout: float = 0.0
    pre_logits: bool = False
    drop_path: float = 0.0
    stem: tuple[int, ...] = ()
    positions: str = "learned"
    sincos_grid: tuple[int, ...] = ()
    antialias: bool = True
    class_token: bool = True
    pool: str = "token"
    fc_norm: bool = False
    distilled: bool = False
    registers: int = 0
    mixing: str = "attention"
    qk_norm: bool = False
    mlp: str = "gelu"
    layer_scale: float = 0.0
    pre_norm: bool = False
    head_bias: float = 0.0
    patch_drop: float = 0.0
    norm_eps: float = 1e-6  # as in the paper's code; PyTorch's default is 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "stem", tuple(self.stem))  # from JSON it comes as a list
        sizes = ("img_size", "patch_size", "depth", "width", "mlp_width", "heads", "num_classes", "stem")
        self.check_sizes(sizes)
        self.check_shares(dropout="The paper uses 0 or 0.1.", drop_path="DeiT uses 0.1.", patch_drop="Often 0.5.")
        for name, choices in VIT_CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices), "Choose one.")
        _require(_whole(self.registers) and 0 <= self.registers <= 1024, "registers", self.registers, "0 to 1024", "4.")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0", "The paper's code has 1e-6.")
        _require(self.layer_scale >= 0, "layer_scale", self.layer_scale, "0 (none) or above", "DINOv2 has 1e-5.")
        got = f"{self.heads} with model.width {self.width}"
        _require(self.width % self.heads == 0, "heads", got, "a divisor of the width", "Change one of the two.")
        if self.pool == "token" or self.distilled:
            what = "model.pool=token" if self.pool == "token" else "model.distilled"
            remedy = "Set model.pool=avg or map." if self.pool == "token" else "Set model.class_token=true."
            _require(self.class_token, "class_token", f"false with {what}", "true: its representation is used", remedy)
        if self.distilled:
            got = f"model.pool={self.pool}"
            _require(self.pool == "token", "distilled", got, "pooling by token", "Set model.pool=token.")
        if self.fc_norm:
            _require(self.pool == "avg", "fc_norm", f"model.pool={self.pool}", "the average", "Set model.pool=avg.")
        if self.positions == "rotary":
            got, what = f"rotary with heads of width {self.width // self.heads}", "a head width that 4 divides"
            _require(self.width // self.heads % 4 == 0, "positions", got, what, "Change model.heads.")
            _require(
                self.mixing == "attention", "positions", "rotary with model.mixing=fourier", "attention", "Change."
            )
        if self.positions == "sincos2d":
            _require(self.width % 4 == 0, "width", self.width, "a multiple of 4, for sincos2d", "Change it.")
        grid = () if tuple(self.sincos_grid) == self.grid else tuple(self.sincos_grid)
        object.__setattr__(self, "sincos_grid", grid)
        if grid:
            sound = len(grid) == 2 and all(_whole(each) and 1 <= each <= MOST_SIDE for each in grid)
            sound = sound and self.positions == "sincos2d"
            _require(sound, "sincos_grid", grid, "rows and columns of sincos2d positions", "Take it out.")
        if self.stem:
            got = f"{self.patch_size} with a stem of stride {self.stem_stride}"
            fits = self.patch_size % self.stem_stride == 0
            _require(fits, "patch_size", got, "a multiple of that stride", f"Set it to {self.stem_stride}.")
        if self.patch_drop and self.mixing == "fourier":
            _require(False, "patch_drop", f"{self.patch_drop} with model.mixing=fourier", "0 there", "Set it to 0.")

    @property
    def stem_stride(self) -> int:
        """Pixels a side of the image that one pixel of the stem's feature map stands for; 1 without a stem."""
        return 2 ** (len(self.stem) + 1) if self.stem else 1

    @property
    def placed_grid(self) -> tuple[int, int]:
        """Rows and columns of patches that fixed positions were trained with."""
        rows, columns = self.sincos_grid or self.grid
        return rows, columns

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: class, distillation, registers."""
        return self.class_token + self.distilled + self.registers

    @property
    def placed_prefix(self) -> int:
        """Rows of learned positions that are not of patches: class and distillation token."""
        return self.class_token + self.distilled


VIT_CHOICES = {
    "positions": ("learned", "sincos2d", "rotary"),
    "pool": ("token", "avg", "map"),
    "mixing": ("attention", "fourier"),
    "mlp": ("gelu", "gelu_tanh", "swiglu"),
}


@dataclass(frozen=True)
class SwinConfig(ArchitectureConfig):
    """Everything that fixes a Swin Transformer (Liu et al. 2021, arXiv:2103.14030).

    `depths` and `heads` of each stage; `width` is that of the first, doubled at every later one. Attention is within
    windows of `window` patches a side. `patch` is the side of the first stage's patches in px.
    """

    family: ClassVar[str] = "swin"
    alike: ClassVar[bool] = False

    img_size: Size
    patch: int
    window: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    num_classes: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    head_bias: float = 0.0
    norm_eps: float = 1e-5  # as in the paper's code

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "heads", tuple(self.heads))
        got = f"{self.depths} blocks and {self.heads} heads"
        _require(0 < len(self.depths) == len(self.heads), "depths", got, "as many stages of both", "Change one.")
        self.check_sizes(("img_size", "patch", "window", "width", "depths", "heads", "num_classes"))
        self.check_shares(dropout="The paper uses 0.", drop_path="The paper uses 0.2 to 0.5.")
        for stage, heads in enumerate(self.heads):
            fits = (self.width << stage) % heads == 0
            _require(fits, "heads", f"{heads} for width {self.width << stage}", "a divisor", "Change one of the two.")

    @property
    def patch_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Pixels a side that an image's sides have to be multiples of: every stage but the first halves the grid."""
        return self.patch << (len(self.depths) - 1)

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sum(self.depths)


@dataclass(frozen=True)
class MixerConfig(ArchitectureConfig):
    """Everything that fixes an MLP-Mixer (Tolstikhin et al. 2021): `tokens_width` and `channels_width` are the hidden
    widths of the MLPs that mix tokens and channels. Token mixing ties it to `img_size`."""

    family: ClassVar[str] = "mixer"

    img_size: Size
    patch_size: int
    depth: int
    width: int
    tokens_width: int
    channels_width: int
    num_classes: int
    dropout: float = 0.0
    drop_path: float = 0.0
    head_bias: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("img_size", "patch_size", "depth", "width", "tokens_width", "channels_width", "num_classes")
        self.check_sizes(sizes)
        self.check_shares(dropout="The paper uses 0.", drop_path="The paper uses 0.1.")


@dataclass(frozen=True)
class ResNetConfig(ArchitectureConfig):
    """Everything that fixes a ResNet-v2 with group norm and weight standardisation (BiT, Kolesnikov et al. 2020).

    `depths`: bottleneck blocks of each stage; `factor` multiplies all widths (R50x1: (3, 4, 6, 3) and 1).
    """

    family: ClassVar[str] = "resnet"
    alike: ClassVar[bool] = False

    img_size: Size
    depths: tuple[int, ...]
    factor: int
    num_classes: int
    drop_path: float = 0.0
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        self.check_sizes(("img_size", "depths", "factor", "num_classes"))
        self.check_shares(drop_path="Often 0.")

    @property
    def patch_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """1: images of any size will do."""
        return 1

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sum(self.depths)


FAMILIES = {config.family: config for config in (ViTConfig, SwinConfig, MixerConfig, ResNetConfig)}


def to_dict(config: ArchitectureConfig) -> dict[str, Any]:
    """The form in which checkpoints and exports hold an architecture, in JSON."""
    return {"family": config.family, **asdict(config)}


def from_dict(described: dict[str, Any]) -> ArchitectureConfig:
    """Reads what `to_dict` made; without a family (written by earlier versions) it is a ViT.

    Raises `UserError`, `TypeError` or `ValueError` if that describes no architecture.
    """
    known = dict(described)
    family = known.pop("family", "vit")
    if family not in FAMILIES:
        raise ValueError(f"architecture {family!r}, not one of {', '.join(FAMILIES)}")
    chosen = FAMILIES[family]
    for field in fields(chosen):  # a JSON of any origin
        value, kinds = known.get(field.name), _KINDS[str(field.type)]
        if field.name in known and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise TypeError(f"{field.name} {value!r} in the description of an architecture")
    return chosen(**known)


_KINDS = {
    "Size": (int, list, tuple),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "tuple[int, ...]": (list, tuple),
}


def _said(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {'-'.join(map(str, value)) if isinstance(value, tuple) else value}"


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, name: str, got: object, expected: str, remedy: str) -> None:
    if not condition:
        raise UserError(f"model.{name}", got, expected, remedy)
