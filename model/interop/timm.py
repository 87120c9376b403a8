"""timm, whose names ours are, and the files of the original DeiT, DINO, DINOv2 and Swin, whose names differ little."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.interop.maps import Layout, Made, Shape, Tensors, our_shapes, renamed, require, with_more

OPTIONAL = r"^mask_token$|^decoder_|\.relative_position_index$|\.attn_mask$"
OTHERS = "Export it in vitscale's own format."
MIXERS = {(8, 512, 256, 2048): "s", (12, 768, 384, 3072): "b", (24, 1024, 512, 4096): "l"}
RESNETS = {
    ((3, 4, 6, 3), 1): "50x1", ((3, 4, 6, 3), 3): "50x3", ((3, 4, 23, 3), 1): "101x1", ((3, 4, 23, 3), 3): "101x3",
    ((3, 8, 36, 3), 2): "152x2", ((3, 8, 36, 3), 4): "152x4",
}  # fmt: skip
PLACES = ("cls_token", "dist_token", "reg_token", "pos_embed")
QKV_BIAS = ".attn.qkv.bias"
BIAS = "patch_embed.proj.bias"
STEMS = {
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}

DEEPEST = 4  # levels of dicts

_ORIGINAL = (
    (r"^register_tokens$", "reg_token"),  # DINOv2
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
)
_WRAPPERS = ("teacher", "model", "module", "state_dict", "model_state_dict")  # in this order, of what holds several
_FIRST = ("patch_embed.proj.weight", "patch_embed.backbone.stem.conv.weight", "stem.proj.weight", "stem.conv.weight")


def unwrapped(state: Any) -> dict[str, Tensor]:
    """The tensors of a network in what a training script saved: dicts of dicts, and prefixes of names, removed.

    Of DINO's student and teacher it is the teacher. Raises `ValueError` if there are none.
    """
    for _ in range(DEEPEST if isinstance(state, Mapping) else 0):
        inner = [state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)]
        state = inner[0] if inner else state
    tensors = {}
    if isinstance(state, Mapping):
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("no state dict in it")
    prefixes = [name.removesuffix(first) for first in _FIRST for name in tensors if name.endswith(first)]
    prefix = min(prefixes, key=len, default="")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def familiar(theirs: Tensors) -> Tensors:
    """Their tensors under the names that timm has today."""
    swin = any(name.endswith("relative_position_bias_table") for name in theirs.shapes)
    early = swin and "layers.0.downsample.norm.weight" in theirs.shapes

    def rename(name: str) -> str:
        for pattern, new in _ORIGINAL:
            name = re.sub(pattern, new, name)
        if swin:
            name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
        if early:  # merging was the end of a stage, as in Swin's own code; now it is the beginning of the next
            name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
        return name

    found = renamed(theirs, rename)
    if any(name.endswith(QKV_BIAS) for name in found.shapes):
        return found
    weights = [name for name in found.shapes if name.endswith(".attn.qkv.weight")]  # some were trained without biases
    zeros = {name.replace(".weight", ".bias"): torch.zeros(found.shapes[name][:1]) for name in weights}
    return with_more(found, zeros)


def architecture(config: ArchitectureConfig) -> str:
    """The name of an architecture of timm that, with arguments, is this one. Raises `UserError` (`model.SETTING`)."""
    if isinstance(config, SwinConfig):
        require(config, "a Swin of timm", OTHERS, norm_eps=(1e-5,))
        return "swin_tiny_patch4_window7_224"
    if isinstance(config, MixerConfig):  # whose sizes are no arguments there, nor those of a ResNet
        sizes = (config.depth, config.width, config.tokens_width, config.channels_width)
        require(config, "a Mixer of timm", OTHERS, norm_eps=(1e-6,), patch_size=(16, 32))
        return f"mixer_{_named('model.width', sizes, MIXERS)}{config.patch_size}_224"
    if isinstance(config, ResNetConfig):
        return f"resnetv2_{_named('model.depths', (config.depths, config.factor), RESNETS)}_bit"
    assert isinstance(config, ViTConfig)
    without = {"pre_logits": (False,), "stem": (*STEMS, ())}
    require(config, "timm", OTHERS, positions=("learned", "sincos2d"), mixing=("attention",), **without)
    if config.distilled:
        plain = {"pre_norm": (False,), "mlp": ("gelu", "gelu_tanh"), "registers": (0,), "stem": ((),)}
        require(config, "a distilled DeiT of timm", OTHERS, norm_eps=(1e-6,), **plain)
        return "deit_base_distilled_patch16_224"
    if config.mlp == "swiglu":
        require(config, "a gated ViT of timm", OTHERS, norm_eps=(1e-6,), stem=((),), pool=("token", "avg"))
        return "vit_giant_patch14_reg4_dinov2"
    if config.stem:
        require(config, "a hybrid of timm", OTHERS, norm_eps=(1e-6,), pre_norm=(False,))
        return STEMS[config.stem]
    require(config, "a ViT of timm", OTHERS, norm_eps=(1e-6, 1e-5))
    if config.norm_eps == 1e-5:
        return "vit_base_patch16_clip_224"
    return {
        192: "vit_tiny_patch16_224",
        384: "vit_small_patch16_224",
        1024: "vit_large_patch16_224",
        1280: "vit_huge_patch14_224",
    }.get(config.width, "vit_base_patch16_224")


def _named(setting: str, sizes: tuple[Any, ...], names: Mapping[tuple[Any, ...], str]) -> str:
    if sizes not in names:
        raise UserError(setting, f"{sizes}", f"{' or '.join(map(str, names))}, in timm", OTHERS)
    return names[sizes]


def layout(config: ArchitectureConfig, found: Mapping[str, Shape] | None = None) -> Layout:
    """The map of an architecture; of the variants of one, that whose shapes were `found`, or that which we write.

    Raises `UserError` (`model.SETTING`) for what timm does not have.
    """
    if found is None:
        architecture(config)
    names = our_shapes(config)
    heads = tuple(name for name in names if name.startswith(("head.", "head_dist.")))
    chosen, special = Layout(heads, OPTIONAL), set[str]()
    if isinstance(config, ViTConfig):
        special = _add_places(chosen, config, found)
    for name in names:
        if name not in special:
            chosen.same(name, name)
    return chosen


def _add_places(chosen: Layout, config: ViTConfig, found: Mapping[str, Shape] | None) -> set[str]:
    """Add what may lie otherwise in timm; returns the names of ours that this is."""
    rows = 0 if config.registers else config.placed_prefix
    if found and "pos_embed" in found and len(found["pos_embed"]) == 3:
        rows = found["pos_embed"][1] - config.patches
        if rows not in (0, config.placed_prefix, config.placed_prefix + config.registers):
            rows = config.placed_prefix  # what does not fit is told by its shape
    here = {name: name for name in PLACES if name in our_shapes(config)}
    chosen.places(config, rows, here)
    if not config.pre_norm or (found and BIAS in found):
        return set(here)
    # before a norm timm's patches have no bias, which is then part of their positions
    positions, width = next(each for each in chosen.theirs if each.name == "pos_embed"), config.width
    chosen.theirs.remove(positions)

    def with_bias(places_1ND: Tensor, bias_D: Tensor) -> Tensor:
        written_1ND = positions.make(places_1ND)
        return torch.cat([written_1ND[:, :rows], written_1ND[:, rows:] + bias_D], dim=1)

    chosen.theirs.append(Made("pos_embed", (*positions.of, BIAS), with_bias))
    chosen.ours.append(Made(BIAS, (), lambda: torch.zeros(width)))
    return {*here, BIAS}
