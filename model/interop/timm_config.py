"""timm's descriptions of trained networks: `config.json`."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.interop.maps import Shape
from vitscale.model.interop.shapes import infer
from vitscale.model.interop.timm import architecture
from vitscale.model.interop.view import View, triple

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # timm's default mean and standard deviation
# Names of what has our computation: others have weights of the same names and other blocks, or other functions
_SIZES = r"tiny|x?small|base|medium|mediumd|betwixt|large|huge|giant|giantopt|gigantic|little|wee|so\d+m2?"
_PARTS = r"patch\d+|\d+(x1)?|reg\d+|gap|clip|siglip|dinov2|tipsv2|plus|distilled|miil|r\d+|s\d+"
KNOWN = (
    rf"(vit|deit3?|flexivit)(_({_SIZES}|{_PARTS}))+|eva_large_patch14_(196|336)|test_vit2?"
    r"|swin_[a-z]+_patch\d+_window\d+_\d+|mixer_[sbl]\d+_224(_miil)?|resnetv2_\d+x\d_bit"
)
TANH = r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip|vit_large_patch16_siglip\w*_512"
WIDE = r"giantopt|vit_base_patch16_gap"  # of 16 heads
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ARGUMENTS = (  # that weights tell, or that act in training alone
    r"img_size|patch_size|num_classes|embed_dim|depths?|num_heads|mlp_ratio|global_pool|fc_norm|class_token|reg_tokens"
    r"|no_embed_class|qkv_bias|qk_norm|init_values|pre_norm|act_layer|window_size|layers|width_factor|num_blocks"
    r"|dynamic_img_size|\w*drop\w*|weight_init|fix_init|in_chans|strict_img_size"
)


def read_config(
    described: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> tuple[ArchitectureConfig, list[str] | None, View]:
    """Architecture, names of classes, and preprocessing of a `config.json` and of the weights beside it.

    Raises `UserError`, naming the setting there, for what we do not have, and `TypeError`, `ValueError` or `KeyError`
    for what is no description.
    """
    name, given = str(described["architecture"]), dict(described.get("model_args") or {})
    trained = {**described, **dict(described.get("pretrained_cfg") or {})}
    if not re.fullmatch(KNOWN, name):
        raise UserError("architecture", name, "a ViT, DeiT, Swin, MLP-Mixer or BiT of timm", "Use another one.")
    for key, value in given.items():
        if not re.fullmatch(ARGUMENTS, key):
            raise UserError(f"model_args.{key}", value, "arguments known here", "There is no such option here.")
    size = given.get("img_size") or trained.get("input_size", [3, 224, 224])[1:]
    heads = given.get("num_heads") or (16 if re.search(WIDE, name) else None)
    config = infer(shapes, tuple(size) if isinstance(size, list) else size, heads if isinstance(heads, int) else None)
    if isinstance(config, ViTConfig):
        config = _with_options(config, name, given, described.get("global_pool"))
    elif given.get("act_layer"):
        raise UserError("model_args.act_layer", given["act_layer"], "the default", "There is no such option here.")
    mean, std = (triple(trained.get(key, usual)) for key, usual in zip(("mean", "std"), IMAGENET, strict=True))
    view = View(min(float(trained.get("crop_pct") or 0.875), 1.0), mean, std)
    return config, _classes(described.get("label_names") or trained.get("label_names"), config.num_classes), view


def describe(config: ArchitectureConfig, classes: list[str], view: View) -> dict[str, dict[str, Any]]:
    """`config.json` of an architecture, as `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it.

    Raises `UserError` (`model.SETTING`) for what timm does not have.
    """
    name, arguments = architecture(config), dict[str, Any]()
    if isinstance(config, ViTConfig):
        arguments = _vit(config)
    elif isinstance(config, SwinConfig):
        arguments = {"patch_size": config.patch, "window_size": config.window, "embed_dim": config.width,
                     "depths": list(config.depths), "num_heads": list(config.heads),
                     "mlp_ratio": config.mlp_ratio}  # fmt: skip
    if not isinstance(config, ResNetConfig):
        arguments["img_size"] = config.img_size
    trained = {
        "input_size": [3, *config.height_width],
        "fixed_input_size": not isinstance(config, ResNetConfig),
        "interpolation": "bicubic",
        "crop_pct": view.crop,
        "crop_mode": "center",
        "mean": list(view.mean),
        "std": list(view.std),
        "num_classes": len(classes),
    }
    described: dict[str, Any] = {"architecture": name, "num_classes": len(classes), "label_names": classes}
    described["global_pool"] = arguments.get("global_pool", "avg")
    return {"config.json": {**described, "model_args": arguments, "pretrained_cfg": trained}}


def _with_options(config: ViTConfig, name: str, given: Mapping[str, Any], pool: Any) -> ViTConfig:
    """A ViT with what its weights do not tell."""
    activation = given.get("act_layer") or ("gelu_tanh" if re.search(TANH, name) else "gelu")
    if config.mlp != "swiglu":
        if activation not in ACTIVATIONS:
            remedy = "There is no such option here."
            raise UserError("model_args.act_layer", activation, " or ".join(ACTIVATIONS), remedy)
        config = replace(config, mlp=ACTIVATIONS[activation])
    pool = given.get("global_pool", pool)
    if pool is not None and pool != config.pool:
        if (pool, config.pool) != ("avg", "token"):
            raise UserError("global_pool", pool, f"{config.pool}, by the weights", "There is no such option here.")
        config = replace(config, pool=pool)
    return replace(config, norm_eps=1e-5 if "clip" in name else 1e-6)


def _vit(config: ViTConfig) -> dict[str, Any]:
    gated = config.mlp == "swiglu"
    arguments = {
        "patch_size": config.patch_size // config.stem_stride,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": _ratio(config.mlp_width * (2 if gated else 1), config.width),
        "global_pool": config.pool,
        "fc_norm": config.fc_norm,
        "class_token": config.class_token,
        "reg_tokens": config.registers,
        "no_embed_class": config.registers > 0,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale,  # 0 for none: `create_model` drops None
        "pre_norm": config.pre_norm,
    }
    return arguments if gated else {**arguments, "act_layer": config.mlp}


def _ratio(hidden: int, width: int) -> float:
    """A number by which timm gets this hidden width, ⌊width · ratio⌋."""
    return next(ratio for ratio in (hidden / width, (hidden + 0.5) / width) if int(width * ratio) == hidden)


def _classes(names: Any, count: int) -> list[str] | None:
    """Names of classes in label order; None where they are not told."""
    if isinstance(names, Mapping):
        names = [names.get(str(number), str(number)) for number in range(count)]
    return [str(name) for name in names] if isinstance(names, list) and len(names) == count else None
