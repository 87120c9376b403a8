"""Google's `.npz` files: of vision_transformer (ViT, hybrids, MLP-Mixer), of big_vision (ViT), and of BiT (ResNet).

Kernels are (rows, columns, inputs, outputs) or (inputs, outputs); in those of attention heads are an axis of their own.
Names are Flax's: `vit_jax/models_vit.py` and `models_mixer.py` of google-research/vision_transformer, `models/vit.py`
of google-research/big_vision, and `bit_jax` of google-research/big_transfer.
"""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, Size, ViTConfig, in_pixels
from vitscale.model.interop.maps import Layout, Tensors, renamed, require
from vitscale.model.interop.shapes import SIDE, Shapes, count, count_nested, grid_of, need
from vitscale.model.interop.view import View

OTHERS = "Export it in vitscale's own format, or timm's."
PREFIXES = ("params/img/", "params/", "opt/target/", "resnet/", "")  # the first that leads to the first layer
FIRST = ("embedding/kernel", "stem/kernel", "root_block/standardized_conv2d/kernel")
POSITIONS = "Transformer/posembed_input/pos_embedding"
PARTS = ("query", "key", "value")


def familiar(theirs: Tensors) -> Tensors:
    """Their tensors without what leads to their names, norms of convolutions as vectors."""
    lead = next((lead for lead in PREFIXES for first in FIRST if lead + first in theirs.shapes), "")
    plain = renamed(theirs, lambda name: name.removeprefix(lead) if name.startswith(lead) else "")
    flat = {name for name, shape in plain.shapes.items() if len(shape) == 4 and shape[:3] == (1, 1, 1)}
    flat = {name for name in flat if re.search(r"(scale|bias|gamma|beta)$", name)}
    shapes = {name: shape[3:] if name in flat else shape for name, shape in plain.shapes.items()}
    return Tensors(shapes, lambda name: plain.read(name).flatten() if name in flat else plain.read(name))


def read_config(shapes: Shapes, size: Size = SIDE) -> ArchitectureConfig:
    """The architecture of weights of these shapes, as `familiar` gives them; `size` in px where they do not tell.

    Raises `UserError` (`weights`) if it is none of ours.
    """
    classes = shapes["head/bias"][-1] if shapes.get("head/bias") else 1
    if "root_block/standardized_conv2d/kernel" in shapes:
        depths = count_nested(shapes, r"^block(\d+)/unit(\d+)/")
        first, last = need(shapes, "root_block/standardized_conv2d/kernel", 4), shapes.get("head/conv2d/kernel", (1,))
        return ResNetConfig(size, depths, first[3] // 64, last[-1])
    if "stem/kernel" in shapes:
        patch, _, _, width = need(shapes, "stem/kernel", 4)
        tokens, tokens_width = need(shapes, "MixerBlock_0/token_mixing/Dense_0/kernel", 2)
        hidden = need(shapes, "MixerBlock_0/channel_mixing/Dense_0/kernel", 2)[1]
        depth, side = count(shapes, r"^MixerBlock_(\d+)/"), grid_of(tokens, (0,)) * patch
        return MixerConfig(side, patch, depth, width, tokens_width, hidden, classes)
    patch, _, _, width = need(shapes, "embedding/kernel", 4)
    block, big_vision = "Transformer/encoderblock_0", "pos_embedding" in shapes
    attention, mlp = (0, 0) if big_vision else (1, 3)
    stem = count_nested(shapes, r"^block(\d+)/unit(\d+)/")
    class_token, stride = "cls" in shapes, 2 ** (len(stem) + 1) if stem else 1
    rows = need(shapes, "pos_embedding" if big_vision else POSITIONS, 3)[1]
    grid = grid_of(rows, (0, class_token) if big_vision else (class_token, 0))
    return ViTConfig(
        img_size=grid * patch * stride,
        patch_size=patch * stride,
        depth=count(shapes, r"^Transformer/encoderblock_(\d+)/"),
        width=width,
        mlp_width=need(shapes, f"{block}/MlpBlock_{mlp}/Dense_0/kernel", 2)[1],
        heads=need(shapes, f"{block}/MultiHeadDotProductAttention_{attention}/query/kernel", 3)[1],
        num_classes=classes,
        pre_logits="pre_logits/kernel" in shapes,
        stem=stem,
        class_token=class_token,
        pool="map" if "MAPHead_0/probe" in shapes else "token" if class_token else "avg",
        mlp="gelu_tanh",  # Flax's default, and so of all of these
    )


def describe(config: ArchitectureConfig, classes: list[str], view: View) -> dict[str, dict[str, Any]]:
    """Nothing lies beside such a file. Raises `UserError` as `layout` does."""
    layout(config)
    return {}


def layout(config: ArchitectureConfig, found: Collection[str] = ()) -> Layout:
    """The map of an architecture; of the variants of one, that whose names were `found`, or that which we write:
    big_vision's for attention pooling, else vision_transformer's.

    Raises `UserError` (`model.SETTING`) for what these files have no place for.
    """
    if isinstance(config, ResNetConfig):
        return _resnet(config)
    if isinstance(config.img_size, tuple):
        expected = "a square, in Google's files, which do not tell how positions lie"
        raise UserError("model.img_size", in_pixels(config.img_size), expected, OTHERS)
    if isinstance(config, MixerConfig):
        return _mixer(config)
    if not isinstance(config, ViTConfig):
        raise UserError("model", f"the family {config.family}", "vit, mixer or resnet, in Google's files", OTHERS)
    what = "Google's code"
    without = {"distilled": (False,), "qk_norm": (False,), "pre_norm": (False,), "fc_norm": (False,), "registers": (0,)}
    require(
        config, what, OTHERS, positions=("learned", "sincos2d"), mixing=("attention",), layer_scale=(0.0,), **without
    )
    require(config, what, OTHERS, mlp=("gelu_tanh",), norm_eps=(1e-6,))
    return _vit(config, "pos_embedding" in found if found else config.pool == "map")


def _vit(config: ViTConfig, big_vision: bool) -> Layout:
    chosen, heads = Layout(_heads("head")), config.heads
    names = {"pos_embed": "pos_embedding" if big_vision else POSITIONS}
    names |= {"cls_token": "cls"} if config.class_token else {}
    chosen.places(config, 0 if big_vision else config.placed_prefix, names)
    if config.stem:
        backbone = "patch_embed.backbone"
        _conv(chosen, f"{backbone}.stem.conv", "conv_root")
        _norm(chosen, f"{backbone}.stem.norm", "gn_root")
        for stage, depth in enumerate(config.stem):
            for i in range(depth):
                ours, theirs = f"{backbone}.stages.{stage}.blocks.{i}", f"block{stage + 1}/unit{i + 1}"
                for number in (1, 2, 3):
                    _conv(chosen, f"{ours}.conv{number}", f"{theirs}/conv{number}")
                    _norm(chosen, f"{ours}.norm{number}", f"{theirs}/gn{number}")
                if not i:
                    _conv(chosen, f"{ours}.downsample.conv", f"{theirs}/conv_proj")
                    _norm(chosen, f"{ours}.downsample.norm", f"{theirs}/gn_proj")
    _conv(chosen, "patch_embed.proj", "embedding", bias=True)
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention, norm, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
        _norm(chosen, f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        inner = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        _attention(chosen, {f"{ours}.attn.qkv": PARTS}, f"{ours}.attn.proj", inner, heads)
        _norm(chosen, f"{ours}.norm2", f"{theirs}/LayerNorm_{norm}")
        _mlp(chosen, f"{ours}.mlp", f"{theirs}/MlpBlock_{mlp}")
    _norm(chosen, "norm", "Transformer/encoder_norm")
    if config.pool == "map":
        theirs, parts = "MAPHead_0", {"attn_pool.q": PARTS[:1], "attn_pool.kv": PARTS[1:]}
        chosen.same("attn_pool.latent", f"{theirs}/probe")
        _attention(chosen, parts, "attn_pool.proj", f"{theirs}/MultiHeadDotProductAttention_0", heads)
        _norm(chosen, "attn_pool.norm", f"{theirs}/LayerNorm_0")
        _mlp(chosen, "attn_pool.mlp", f"{theirs}/MlpBlock_0")
    if config.pre_logits:
        _dense(chosen, "pre_logits.fc", "pre_logits")
    _dense(chosen, "head", "head")
    return chosen


def _mixer(config: MixerConfig) -> Layout:
    require(config, "Google's code", OTHERS, norm_eps=(1e-6,))
    chosen = Layout(_heads("head"))
    _conv(chosen, "stem.proj", "stem", bias=True)
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"MixerBlock_{i}"
        _norm(chosen, f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        _mlp(chosen, f"{ours}.mlp_tokens", f"{theirs}/token_mixing")
        _norm(chosen, f"{ours}.norm2", f"{theirs}/LayerNorm_1")
        _mlp(chosen, f"{ours}.mlp_channels", f"{theirs}/channel_mixing")
    _norm(chosen, "norm", "pre_head_layer_norm")
    _dense(chosen, "head", "head")
    return chosen


def _resnet(config: ResNetConfig) -> Layout:
    chosen, conv, norm = Layout(_heads("head/conv2d")), "standardized_conv2d", ("gamma", "beta")
    _conv(chosen, "stem.conv", f"root_block/{conv}")
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            ours, theirs = f"stages.{stage}.blocks.{i}", f"block{stage + 1}/unit{i + 1:02d}"
            for number, letter in enumerate("abc", 1):
                _norm(chosen, f"{ours}.norm{number}", f"{theirs}/{letter}/group_norm", norm)
                _conv(chosen, f"{ours}.conv{number}", f"{theirs}/{letter}/{conv}")
            if not i:
                _conv(chosen, f"{ours}.downsample.conv", f"{theirs}/a/proj/{conv}")
    _norm(chosen, "norm", "group_norm", norm)
    _conv(chosen, "head.fc", "head/conv2d", bias=True)
    return chosen


def _attention(chosen: Layout, packed: dict[str, tuple[str, ...]], proj: str, theirs: str, heads: int) -> None:
    """Layers of ours, in each of which one or more of theirs lie one after another, and the projection behind them."""
    for ours, parts in packed.items():
        kernels, biases = ([f"{theirs}/{part}/{kind}" for part in parts] for kind in ("kernel", "bias"))
        chosen.parts(
            f"{ours}.weight", kernels, lambda w: w.T.unflatten(1, (heads, -1)), lambda kernel: kernel.flatten(1).T
        )
        chosen.parts(f"{ours}.bias", biases, lambda bias: bias.unflatten(0, (heads, -1)), torch.flatten)
    kernel = f"{theirs}/out/kernel"
    chosen.changed(f"{proj}.weight", kernel, lambda w: w.T.unflatten(0, (heads, -1)), lambda w: w.flatten(0, 1).T)
    chosen.same(f"{proj}.bias", f"{theirs}/out/bias")


def _conv(chosen: Layout, ours: str, theirs: str, bias: bool = False) -> None:
    chosen.changed(
        f"{ours}.weight", f"{theirs}/kernel", lambda w: w.permute(2, 3, 1, 0), lambda w: w.permute(3, 2, 0, 1)
    )
    if bias:
        chosen.same(f"{ours}.bias", f"{theirs}/bias")


def _dense(chosen: Layout, ours: str, theirs: str) -> None:
    chosen.changed(f"{ours}.weight", f"{theirs}/kernel", _turned, _turned)
    chosen.same(f"{ours}.bias", f"{theirs}/bias")


def _mlp(chosen: Layout, ours: str, theirs: str) -> None:
    for number in (0, 1):
        _dense(chosen, f"{ours}.fc{number + 1}", f"{theirs}/Dense_{number}")


def _norm(chosen: Layout, ours: str, theirs: str, names: tuple[str, str] = ("scale", "bias")) -> None:
    chosen.same(f"{ours}.weight", f"{theirs}/{names[0]}")
    chosen.same(f"{ours}.bias", f"{theirs}/{names[1]}")


def _heads(name: str) -> tuple[str, ...]:
    return f"{name}/kernel", f"{name}/bias"


def _turned(weight: Tensor) -> Tensor:
    return weight.T
