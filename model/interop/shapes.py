"""What an architecture is, by the shapes of its weights under timm's names."""

import re
from collections.abc import Iterable, Mapping
from math import isqrt, prod

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, Size, SwinConfig, ViTConfig
from vitscale.model.interop.maps import Shape

HEADS = {64: 2, 96: 3, 1152: 16, 1280: 16, 1408: 16, 1664: 16}  # by width; elsewhere a head is 64 wide
SIDE: Size = 224  # of images in px, where weights do not tell

Shapes = Mapping[str, Shape]


def infer(shapes: Shapes, size: Size = SIDE, heads: int | None = None) -> ArchitectureConfig:
    """The architecture of weights of these shapes. Raises `UserError` (`weights`) if it is none of ours.

    Shapes do not tell the number of heads, for which `heads` or what is usual for the width is taken; nor the `size` of
    images in px, where there are no learned positions or these are not of a square; nor options without weights: those
    are the defaults.
    """
    if any(name.endswith("relative_position_bias_table") for name in shapes):
        return _swin(shapes, size)
    if any(".mlp_tokens." in name for name in shapes):
        return _mixer(shapes, size)
    if "stages.0.blocks.0.conv1.weight" in shapes:
        return _resnet(shapes, size)
    return infer_vit(shapes, size, heads)


def infer_vit(shapes: Shapes, size: Size, heads: int | None) -> ViTConfig:
    """The Vision Transformer of weights of these shapes."""
    width, _, patch, _ = need(shapes, "patch_embed.proj.weight", 4)
    fc1, fc2 = (need(shapes, f"blocks.0.mlp.fc{i}.weight", 2) for i in (1, 2))
    if heads is None:
        head = shapes.get("blocks.0.attn.q_norm.weight")
        heads = width // head[0] if head and head[0] else HEADS.get(width, max(width // 64, 1))
    stem = count_nested(shapes, r"^patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.")
    stride = 2 ** (len(stem) + 1) if stem else 1
    class_token, distilled = "cls_token" in shapes, "dist_token" in shapes
    registers = need(shapes, "reg_token", 3)[1] if "reg_token" in shapes else 0
    if "pos_embed" in shapes:
        placed = class_token + distilled
        before = (0, placed) if registers else (placed, 0)
        size = _size_of(need(shapes, "pos_embed", 3)[1], before, registers, patch * stride, size)
    fc_norm = "fc_norm.weight" in shapes
    pool = "map" if "attn_pool.latent" in shapes else "token" if class_token and not fc_norm else "avg"
    return ViTConfig(
        img_size=size,
        patch_size=patch * stride,
        depth=count(shapes, r"^blocks\.(\d+)\."),
        width=width,
        mlp_width=fc2[1],
        heads=heads,
        num_classes=shapes["head.weight"][0] if "head.weight" in shapes else 1,
        pre_logits="pre_logits.fc.weight" in shapes,
        stem=stem,
        class_token=class_token,
        pool=pool,
        fc_norm=fc_norm and pool == "avg",
        distilled=distilled,
        registers=registers,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        mlp="swiglu" if fc1[0] == 2 * fc2[1] else "gelu",
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in shapes else 0.0,
        pre_norm="norm_pre.weight" in shapes,
    )


def _swin(shapes: Shapes, size: Size) -> SwinConfig:
    width, _, patch, _ = need(shapes, "patch_embed.proj.weight", 4)
    depths = count_nested(shapes, r"^layers\.(\d+)\.blocks\.(\d+)\.")
    tables = [
        need(shapes, f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in range(len(depths))
    ]
    return SwinConfig(
        img_size=size,
        patch=patch,
        window=(isqrt(tables[0][0]) + 1) // 2 if tables else 0,
        width=width,
        depths=depths,
        heads=tuple(table[1] for table in tables),
        num_classes=shapes["head.fc.weight"][0] if "head.fc.weight" in shapes else 1,
        mlp_ratio=need(shapes, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / max(width, 1),
    )


def _mixer(shapes: Shapes, size: Size) -> MixerConfig:
    width, _, patch, _ = need(shapes, "stem.proj.weight", 4)
    tokens_width, tokens = need(shapes, "blocks.0.mlp_tokens.fc1.weight", 2)
    return MixerConfig(
        img_size=_size_of(tokens, (0,), 0, patch, size),
        patch_size=patch,
        depth=count(shapes, r"^blocks\.(\d+)\."),
        width=width,
        tokens_width=tokens_width,
        channels_width=need(shapes, "blocks.0.mlp_channels.fc1.weight", 2)[0],
        num_classes=shapes["head.weight"][0] if "head.weight" in shapes else 1,
    )


def _resnet(shapes: Shapes, size: Size) -> ResNetConfig:
    return ResNetConfig(
        img_size=size,
        depths=count_nested(shapes, r"^stages\.(\d+)\.blocks\.(\d+)\."),
        factor=need(shapes, "stem.conv.weight", 4)[0] // 64,
        num_classes=shapes["head.fc.weight"][0] if "head.fc.weight" in shapes else 1,
    )


def need(shapes: Shapes, name: str, dims: int) -> Shape:
    """The shape of a tensor. Raises `UserError` (`weights`) if it is missing, or of another number of dimensions."""
    if len(shapes.get(name, ())) != dims:
        got = f"{name} of shape {shapes[name]}" if name in shapes else f"no {name}"
        remedy = "If a config.json belongs to them, name its folder; else convert them to timm's format."
        raise UserError("weights", got, "tensors of a ViT, Swin, MLP-Mixer or ResNet under timm's names", remedy)
    return shapes[name]


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers, the group of a pattern, there are in names."""
    return len({match[1] for match in map(re.compile(pattern).search, names) if match})


def count_nested(names: Iterable[str], pattern: str) -> tuple[int, ...]:
    """How many different second numbers of a pattern there are for each of the first ones, in order."""
    found = {(int(match[1]), int(match[2])) for match in map(re.compile(pattern).search, names) if match}
    firsts = sorted({first for first, _ in found})
    return tuple(sum(each == first for each, _ in found) for first in firsts)


def _size_of(rows: int, before: tuple[int, ...], registers: int, patch: int, told: Size) -> Size:
    """The size in px of images of so many `rows` of positions (see `grid_of`): the pair that is `told`, if it is one
    and has as many patches; else that of a square."""
    if isinstance(told, tuple) and all(isinstance(side, int) for side in told):
        others = rows - prod(side // max(patch, 1) for side in told)
        if others in (*before, *(each + registers for each in before)):
            return told
    return grid_of(rows, before, registers) * patch


def grid_of(rows: int, before: Iterable[int], registers: int = 0) -> int:
    """Patches a side of a square, of so many `rows` of positions with one of these numbers of others `before` them,
    among which may be `registers`. Raises `UserError` (`weights`) where that is none."""
    for extra in (*before, *(each + registers for each in before if registers)):
        side = isqrt(max(rows - extra, 0))
        if side and side * side == rows - extra:
            return side
    raise UserError("weights", f"positions of {rows} tokens", "those of a square of patches", "Use another file.")
