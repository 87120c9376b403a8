"""Named architectures: sizes as data, and the settings of a recipe's `model:` section. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, SwinConfig, ViTConfig


@dataclass(frozen=True)
class Size:
    """Depth in blocks, width D, hidden width of the MLP, and heads H of one size of ViT."""

    depth: int
    width: int
    mlp_width: int
    heads: int


# Dosovitskiy et al. 2020, table 1 (base, large, huge); Touvron et al. 2020, table 1 (tiny, small); Zhai et al. 2022,
# table 2 (giant is their g, gigantic their G)
SIZES = {
    "tiny": Size(12, 192, 768, 3),
    "small": Size(12, 384, 1536, 6),
    "base": Size(12, 768, 3072, 12),
    "large": Size(24, 1024, 4096, 16),
    "huge": Size(32, 1280, 5120, 16),
    "giant": Size(40, 1408, 6144, 16),
    "gigantic": Size(48, 1664, 8192, 16),
}
STEMS = {  # Dosovitskiy et al. 2020, section 4.1 and appendix B.2; Steiner et al. 2021: blocks of each stage
    ("50", "16"): (3, 4, 9),
    ("50", "32"): (3, 4, 6, 3),
    ("26", "32"): (2, 2, 2, 2),
}
SWINS = {  # Liu et al. 2021, section 3.3: width, and blocks and heads of each stage
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
MIXERS = {  # Tolstikhin et al. 2021, table 1: depth, width, hidden widths over tokens and over channels
    "s": (8, 512, 256, 2048),
    "b": (12, 768, 384, 3072),
    "l": (24, 1024, 512, 4096),
}
RESNETS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}  # He et al. 2015, table 1

Named = tuple[type[ArchitectureConfig], dict[str, Any]]


def _vit(size: str, patch: str, img: str, **more: Any) -> Named:
    return ViTConfig, {"img_size": int(img), "patch_size": int(patch), **asdict(SIZES[size]), **more}


def _registers(size: str, patch: str, registers: str, img: str) -> Named:
    return _vit(size, patch, img, registers=int(registers))


def _distilled(size: str, patch: str, img: str) -> Named:
    return _vit(size, patch, img, distilled=True)


def _fnet(size: str, patch: str, img: str) -> Named:
    return _vit(size, patch, img, mixing="fourier")


def _hybrid(size: str, resnet: str, stride: str, img: str) -> Named:
    return _vit(size, stride, img, stem=STEMS[resnet, stride])


def _swin(size: str, patch: str, window: str, img: str) -> Named:
    width, depths, heads = SWINS[size]
    sizes = {"img_size": int(img), "patch": int(patch), "window": int(window)}
    return SwinConfig, {**sizes, "width": width, "depths": depths, "heads": heads}


def _mixer(size: str, patch: str, img: str) -> Named:
    names = ("depth", "width", "tokens_width", "channels_width")
    sizes = dict(zip(names, MIXERS[size], strict=True))
    return MixerConfig, {"img_size": int(img), "patch_size": int(patch), **sizes}


def _resnet(layers: str, factor: str) -> Named:
    return ResNetConfig, {"img_size": 224, "depths": RESNETS[layers], "factor": int(factor)}


NUMBER = r"(\d{1,5})"
PATTERNS: dict[str, Callable[..., Named]] = {
    rf"vit_([a-z]+)_patch{NUMBER}_{NUMBER}": _vit,
    rf"vit_([a-z]+)_patch{NUMBER}_reg{NUMBER}_{NUMBER}": _registers,
    rf"vit_([a-z]+)_r{NUMBER}_s{NUMBER}_{NUMBER}": _hybrid,
    rf"deit_([a-z]+)_distilled_patch{NUMBER}_{NUMBER}": _distilled,
    rf"swin_([a-z]+)_patch{NUMBER}_window{NUMBER}_{NUMBER}": _swin,
    rf"mixer_([a-z]){NUMBER}_{NUMBER}": _mixer,
    rf"fnet_([a-z]+)_patch{NUMBER}_{NUMBER}": _fnet,
    rf"resnetv2_{NUMBER}x{NUMBER}_bit": _resnet,
}


@dataclass(frozen=True)
class ModelConfig:
    """`model:` – a named architecture, and what differs from it (null: as named). Sizes of images and patches in px.

    `vitscale.model.config` says what each setting of each family is, and `vitscale models` lists names.

    `drop_path`: an image passes a branch of the last block by with this probability in training, one of an earlier
    block with one that rises linearly from 0 at the first (stochastic depth, Huang et al. 2016; DeiT: 0.1).
    """

    name: str = "vit_base_patch16_224"
    img_size: Any = None
    patch_size: int | None = None
    depth: int | None = None
    width: int | None = None
    mlp_width: int | None = None
    heads: Any = None
    dropout: float = 0.0
    drop_path: float = 0.0
    pre_logits: bool = False
    stem: Any = None
    positions: str | None = None
    antialias: bool | None = None
    class_token: bool | None = None
    pool: str | None = None
    fc_norm: bool | None = None
    distilled: bool | None = None
    registers: int | None = None
    mixing: str | None = None
    qk_norm: bool | None = None
    mlp: str | None = None
    layer_scale: float | None = None
    pre_norm: bool | None = None
    head_bias: float | None = None
    patch_drop: float | None = None
    norm_eps: float | None = None
    window: int | None = None
    depths: Any = None
    mlp_ratio: float | None = None
    tokens_width: int | None = None
    channels_width: int | None = None
    factor: int | None = None

    def __post_init__(self) -> None:
        self.resolve(num_classes=1)

    def resolve(self, num_classes: int) -> Any:
        """The full architecture for `num_classes` classes: an `ArchitectureConfig` of its family.

        Raises `UserError` for a name or size that cannot be, and for settings that the family does not have.
        """
        family, named = _look_up(self.name)
        known = {field.name for field in fields(family)}
        defaults = {field.name: field.default for field in fields(self)}
        changed = {key: getattr(self, key) for key in defaults if key != "name"}
        changed = {key: value for key, value in changed.items() if value is not None}
        if family is SwinConfig and "patch_size" in changed:
            changed["patch"] = changed.pop("patch_size")
        for key in [key for key in changed if key not in known]:
            if changed.pop(key) != defaults.get(key):
                settings = sorted(key for key in known if key in defaults)
                got = f"{getattr(self, key)!r} with model.name {self.name}"
                raise UserError(f"model.{key}", got, f"one of its settings: {', '.join(settings)}", "Take it out.")
        for key in ("stem", "depths", "heads"):
            value = changed.get(key)
            many = key != "heads" or family is SwinConfig
            sound = isinstance(value, list | tuple) if many else isinstance(value, int)
            if value is not None and not sound:
                expected = "a list of whole numbers, one a stage" if many else "a whole number"
                raise UserError(f"model.{key}", repr(value), expected, "Change it.")
        return family(**{**named, **changed}, num_classes=num_classes)


def _look_up(name: str) -> Named:
    for pattern, sizes in PATTERNS.items():
        match = re.fullmatch(pattern, name)
        if match:
            try:
                return sizes(*match.groups())
            except KeyError:
                break
    near = difflib.get_close_matches(name, list_models(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Change sizes with model.width, model.depth and so on."
    expected = f"vit_SIZE_patchP_R with SIZE one of {', '.join(SIZES)}, P the patch side and R the image side in px, "
    raise UserError("model.name", repr(name), expected + "or another of `vitscale models`", hint)


def list_models() -> list[str]:
    """Names for the usual patch and image sides; others follow the same patterns."""
    sides = {8: (224,), 14: (224, 518), 16: (224, 384), 32: (224, 384)}
    names = [f"vit_{size}_patch{patch}_{img}" for size in SIZES for patch in sides for img in sides[patch]]
    names += [f"vit_{size}_patch4_32" for size in ("tiny", "small")]
    names += [f"vit_{size}_patch14_reg4_518" for size in ("small", "base", "large", "giant")]
    names += [f"vit_{size}_r{layers}_s{stride}_{img}" for size, layers, stride in HYBRIDS for img in (224, 384)]
    names += [f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")]
    names += ["deit_base_distilled_patch16_384"]
    names += [f"swin_{size}_patch4_window7_224" for size in SWINS]
    names += [f"swin_{size}_patch4_window12_384" for size in ("base", "large")]
    names += [f"mixer_{size}{patch}_224" for size in MIXERS for patch in (16, 32)]
    names += [f"fnet_{size}_patch16_224" for size in ("tiny", "small", "base", "large")]
    return [*names, "resnetv2_50x1_bit", "resnetv2_101x1_bit", "resnetv2_50x3_bit"]


HYBRIDS = (("small", "26", "32"), ("base", "50", "16"), ("large", "50", "32"))
