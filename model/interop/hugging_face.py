"""Weights of Hugging Face transformers: ViT, DeiT, Swin, DINOv2 with and without registers.

Names are those of files on the hub and of `save_pretrained`, which every version reads. Networks in memory have others
since version 5 (`transformers.conversion_mapping`); files with these, or with those of a model without classifier, are
read as well.
"""

import re
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, SwinConfig, ViTConfig, in_pixels
from vitscale.model.interop.maps import Layout, Made, Tensors, renamed, require, with_more

OTHERS = "Export it in vitscale's own format, or timm's."
PATCHES = "embeddings.patch_embeddings.projection"
OPTIONAL = r"^(vit|deit|swin|dinov2\w*)\.(pooler\.|embeddings\.mask_token$)|relative_position_index$"

_ATTENTION = (
    (r"\.attention\.o_proj\.", r".attention.output.dense."),
    (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1."),
)
_MLP = ((r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."))
_VIT = ((r"^(\w+)\.layers\.(\d+)\.", r"\1.encoder.layer.\2."), *_MLP, *_ATTENTION)
_DINOV2 = (*_ATTENTION, (r"\.mlp\.down_proj\.", ".mlp.weights_out."))
_FROM_MEMORY = {  # patterns of names of networks in memory, and those of files, by model
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "swin": (
        *_MLP,
        _ATTENTION[0],
        (r"\.attention\.([qkv])_proj\.", r".attention.self.\1."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
    ),
}
_PARTS = {"q": "query", "k": "key", "v": "value"}


def model_type(config: ArchitectureConfig) -> str:
    """Which of their models an architecture is. Raises `UserError` (`model.SETTING`) for what none of them has."""
    if isinstance(config, SwinConfig):
        require(config, "a Swin of transformers", OTHERS, norm_eps=(1e-5,))  # fixed, in some of its norms
        return "swin"
    if not isinstance(config, ViTConfig):
        raise UserError("model", f"the family {config.family}", "vit or swin, in transformers", OTHERS)
    plain = {"positions": ("learned", "sincos2d"), "mixing": ("attention",), "stem": ((),), "pool": ("token",)}
    without = {"qk_norm": (False,), "pre_norm": (False,), "pre_logits": (False,)}
    require(config, "a ViT of transformers", OTHERS, **plain, **without)
    if config.distilled:
        branches = {"layer_scale": (0.0,), "mlp": ("gelu", "gelu_tanh")}
        require(config, "a DeiT of transformers", OTHERS, registers=(0,), **branches)
        return "deit"
    if config.layer_scale or config.mlp == "swiglu" or config.registers > 1:
        if isinstance(config.img_size, tuple):
            expected = "a square, in a DINOv2 of transformers, whose positions are taken for those of one"
            raise UserError("model.img_size", in_pixels(config.img_size), expected, OTHERS)
        return "dinov2_with_registers" if config.registers else "dinov2"
    return "deit" if config.registers else "vit"


def as_written(config: ArchitectureConfig) -> ArchitectureConfig:
    """The architecture that we write for one: registers without a position, and gated MLPs, are of a DINOv2, which has
    factors of branches in any case. Raises `UserError` as `model_type` does."""
    model_type(config)
    if not isinstance(config, ViTConfig) or config.distilled or config.layer_scale:
        return config
    return replace(config, layer_scale=1.0) if config.registers or config.mlp == "swiglu" else config


def complete(config: ArchitectureConfig, ours: Tensors) -> tuple[ArchitectureConfig, Tensors]:
    """Our architecture and tensors as we write them."""
    written = as_written(config)
    if written == config:
        return config, ours
    ones = {f"blocks.{i}.ls{j}.gamma": torch.ones(written.width) for i in range(config.depth) for j in (1, 2)}
    return written, with_more(ours, ones)


def familiar(theirs: Tensors) -> Tensors:
    """Their tensors under the names of files of a model with a classifier."""
    ends = {
        "relative_position_bias_table": "swin",
        "register_tokens": "dinov2_with_registers",
        "layer_scale1.lambda1": "dinov2",
        "distillation_token": "deit",
    }
    base = next((base for end, base in ends.items() if any(name.endswith(end) for name in theirs.shapes)), "vit")
    bare = f"{PATCHES}.weight" in theirs.shapes

    def rename(name: str) -> str:
        name = f"{base}.{name}" if bare else name
        for pattern, new in _FROM_MEMORY[base]:
            name = re.sub(pattern, new, name)
        return re.sub(r"\.(attention|self)\.([qkv])\.", lambda match: f".{match[1]}.{_PARTS[match[2]]}.", name)

    return renamed(theirs, rename)


def head_trouble(config: ArchitectureConfig, theirs: Tensors) -> str:
    """Why their classifier cannot be ours, if so."""
    if not isinstance(config, ViTConfig) or not model_type(config).startswith("dinov2"):
        return ""
    whole = theirs.shapes.get("classifier.weight", ())[1:] == (2 * config.width,)
    if whole and theirs.read("classifier.weight")[:, config.width :].any():
        return "has a classifier on the class token and the average of the patches together"
    return ""


def layout(config: ArchitectureConfig, found: Collection[str] = ()) -> Layout:
    """The map of an architecture, for the names of files, or for the variant of them that was `found`.

    Raises `UserError` (`model.SETTING`) for what none of these models has.
    """
    base = model_type(config)
    if isinstance(config, SwinConfig):
        return _swin(config)
    assert isinstance(config, ViTConfig)
    return _dinov2(config, base, found) if base.startswith("dinov2") else _vit(config, base)


def _vit(config: ViTConfig, base: str) -> Layout:
    """ViT and DeiT. A DeiT without a teacher has the distillation token all the same: our register, with a position."""
    heads = ("cls_classifier", "distillation_classifier") if config.distilled else ("classifier",)
    chosen = Layout(_tensors(heads), OPTIONAL)
    names = {"cls_token": "cls_token", "pos_embed": "position_embeddings"}
    if base == "deit":
        names["dist_token" if config.distilled else "reg_token"] = "distillation_token"
    chosen.places(config, config.prefix, {ours: f"{base}.embeddings.{theirs}" for ours, theirs in names.items()})
    chosen.layer("patch_embed.proj", f"{base}.{PATCHES}")
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"{base}.encoder.layer.{i}"
        _attention(chosen, ours, theirs, "attention.attention")
        _mlp(chosen, ours, theirs)
    chosen.layer("norm", f"{base}.layernorm")
    for name, head in zip(("head", "head_dist"), heads, strict=False):
        chosen.layer(name, head)
    return chosen


def _dinov2(config: ViTConfig, base: str, found: Collection[str]) -> Layout:
    """DINOv2, whose classifier sees the average of the patches beside the class token: by zeros, for ours."""
    chosen = Layout(_tensors(("classifier",)), OPTIONAL)
    names = {"cls_token": "cls_token", "pos_embed": "position_embeddings", "reg_token": "register_tokens"}
    chosen.places(config, 1, {ours: f"{base}.embeddings.{theirs}" for ours, theirs in names.items()})
    width = config.width
    chosen.theirs.append(Made(f"{base}.embeddings.mask_token", (), lambda: torch.zeros(1, width)))
    chosen.layer("patch_embed.proj", f"{base}.{PATCHES}")
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"{base}.encoder.layer.{i}"
        _attention(chosen, ours, theirs, "attention.attention", norm="norm1")
        chosen.same(f"{ours}.ls1.gamma", f"{theirs}.layer_scale1.lambda1")
        chosen.layer(f"{ours}.norm2", f"{theirs}.norm2")
        if config.mlp == "swiglu":
            halves = ("gate_proj", "up_proj") if f"{theirs}.mlp.gate_proj.weight" in found else ("weights_in",)
            chosen.stack(f"{ours}.mlp.fc1", [f"{theirs}.mlp.{half}" for half in halves])
            chosen.layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.weights_out")
        else:
            chosen.layer(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1")
            chosen.layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")
        chosen.same(f"{ours}.ls2.gamma", f"{theirs}.layer_scale2.lambda1")
    chosen.layer("norm", f"{base}.layernorm")
    chosen.changed("head.weight", "classifier.weight", _beside_zeros, lambda weight: weight[:, :width])
    chosen.same("head.bias", "classifier.bias")
    return chosen


def _swin(config: SwinConfig) -> Layout:
    """Swin, where the merging of patches is the end of a stage, not the beginning of the next."""
    chosen = Layout(_tensors(("classifier",)), OPTIONAL)
    chosen.layer("patch_embed.proj", f"swin.{PATCHES}")
    chosen.layer("patch_embed.norm", "swin.embeddings.norm")
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            ours, theirs = f"layers.{stage}.blocks.{i}", f"swin.encoder.layers.{stage}.blocks.{i}"
            _attention(chosen, ours, theirs, "attention.self")
            biases = "relative_position_bias_table"
            chosen.same(f"{ours}.attn.{biases}", f"{theirs}.attention.self.{biases}")
            _mlp(chosen, ours, theirs)
        if stage + 1 < len(config.depths):
            ours, theirs = f"layers.{stage + 1}.downsample", f"swin.encoder.layers.{stage}.downsample"
            chosen.layer(f"{ours}.norm", f"{theirs}.norm")
            chosen.same(f"{ours}.reduction.weight", f"{theirs}.reduction.weight")
    chosen.layer("norm", "swin.layernorm")
    chosen.layer("head.fc", "classifier")
    return chosen


def _attention(chosen: Layout, ours: str, theirs: str, parts: str, norm: str = "layernorm_before") -> None:
    chosen.layer(f"{ours}.norm1", f"{theirs}.{norm}")
    chosen.stack(f"{ours}.attn.qkv", [f"{theirs}.{parts}.{part}" for part in _PARTS.values()])
    chosen.layer(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")


def _mlp(chosen: Layout, ours: str, theirs: str) -> None:
    chosen.layer(f"{ours}.norm2", f"{theirs}.layernorm_after")
    chosen.layer(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
    chosen.layer(f"{ours}.mlp.fc2", f"{theirs}.output.dense")


def _tensors(layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


def _beside_zeros(weight_KD: Tensor) -> Tensor:
    return torch.cat([weight_KD, torch.zeros_like(weight_KD)], dim=1)
