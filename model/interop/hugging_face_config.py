"""Descriptions of Hugging Face transformers: `config.json` and `preprocessor_config.json`."""

from collections.abc import Mapping
from typing import Any

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, SwinConfig, ViTConfig, from_dict
from vitscale.model.interop.hugging_face import OTHERS, as_written, model_type
from vitscale.model.interop.view import View, triple

CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "swin": "SwinForImageClassification",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_VIT = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "patch_size": 16,
    "layer_norm_eps": 1e-12,
}  # fmt: skip
_DINOV2 = {**_VIT, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "use_swiglu_ffn": False}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of their classes, for what a file leaves out
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": {**_DINOV2, "num_register_tokens": 4},
    "swin": {
        "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "mlp_ratio": 4.0,
        "patch_size": 4, "layer_norm_eps": 1e-5, "use_absolute_embeddings": False,
    },
}  # fmt: skip


def read_config(described: Mapping[str, Any]) -> tuple[ArchitectureConfig, list[str]]:
    """The architecture and the names of its classes of a `config.json`.

    Raises `UserError`, naming the setting there, for what we do not have, and `TypeError` or `ValueError` for what is
    no description.
    """
    kind = described.get("model_type")
    if kind not in _DEFAULTS:
        raise UserError("model_type", kind, " or ".join(_DEFAULTS), "Convert it to one of these, or to timm's format.")
    common = {"image_size": 224, "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3, "hidden_dropout_prob": 0.0}
    given = {**common, **_DEFAULTS[kind], **described}
    fixed = {"qkv_bias": True, "num_channels": 3, "use_absolute_embeddings": False}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(name, given[name], str(value), "There is no such option here.")
    if given["hidden_act"] not in ACTIVATIONS:
        raise UserError("hidden_act", given["hidden_act"], " or ".join(ACTIVATIONS), "There is no such option here.")
    classes = _classes(given)
    ours = {
        "img_size": _size(given["image_size"]),
        "num_classes": max(len(classes), 1),
        "dropout": given["hidden_dropout_prob"],
    }
    ours |= _swin(given) if kind == "swin" else _vit(kind, given)
    return from_dict(ours), classes


def describe(config: ArchitectureConfig, classes: list[str], view: View) -> dict[str, dict[str, Any]]:
    """`config.json` and `preprocessor_config.json` of an architecture, as `from_pretrained` reads them.

    Raises `UserError` (`model.SETTING`) for what none of their models has.
    """
    config = as_written(config)
    kind = model_type(config)
    names = {str(number): name for number, name in enumerate(classes)}
    described: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_size": list(config.img_size) if isinstance(config.img_size, tuple) else config.img_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu_pytorch_tanh" if getattr(config, "mlp", "gelu") == "gelu_tanh" else "gelu",
        "attention_probs_dropout_prob": 0.0,
        "id2label": names,
        "label2id": {name: int(number) for number, name in names.items()},
    }
    if isinstance(config, SwinConfig):
        described |= {
            "patch_size": config.patch, "embed_dim": config.width, "depths": list(config.depths),
            "num_heads": list(config.heads), "window_size": config.window, "mlp_ratio": config.mlp_ratio,
            "hidden_dropout_prob": config.dropout, "drop_path_rate": config.drop_path,
            "use_absolute_embeddings": False, "layer_norm_eps": config.norm_eps,
        }  # fmt: skip
    elif isinstance(config, ViTConfig):
        described |= {
            "patch_size": config.patch_size, "hidden_size": config.width, "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads, "hidden_dropout_prob": config.dropout,
            "layer_norm_eps": config.norm_eps,
        }  # fmt: skip
        if kind.startswith("dinov2"):
            described |= {"mlp_ratio": _ratio(config), "use_swiglu_ffn": config.mlp == "swiglu"}
            described |= {"layerscale_value": config.layer_scale, "drop_path_rate": 0.0}
        else:
            described["intermediate_size"] = config.mlp_width
        if kind == "dinov2_with_registers":
            described["num_register_tokens"] = config.registers
    return {"config.json": described, "preprocessor_config.json": _preprocessing(config.height_width, view)}


def read_view(described: Mapping[str, Any]) -> tuple[View, list[str]]:
    """How images become input by a `preprocessor_config.json`, and a line for each thing that we do otherwise.

    Raises `TypeError` or `ValueError` for what is no description.
    """
    notes, crop = [], 1.0
    size, cut = described.get("size"), described.get("crop_size")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    if described.get("do_center_crop", cut is not None) and cut is not None:
        # sides of one number were resized whole: older files of ViT, and of DeiT with its cut
        resized = shorter if shorter is not None else max(_size(size))
        crop = min(max(_size(cut)) / resized, 1.0)
    elif not isinstance(size, dict) or shorter is None:
        notes.append("they squeeze whole images to squares; here their central squares are taken")
    scale = 255 * described.get("rescale_factor", 1 / 255) if described.get("do_rescale", True) else 255.0
    normalised = described.get("do_normalize", True)
    mean = triple(described.get("image_mean", 0.5)) if normalised else (0.0, 0.0, 0.0)
    std = triple(described.get("image_std", 0.5)) if normalised else (1.0, 1.0, 1.0)
    return View(crop, triple([each / scale for each in mean]), triple([each / scale for each in std])), notes


def _vit(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    activation = ACTIVATIONS[given["hidden_act"]]
    ours = {
        "family": "vit", "patch_size": _side(given["patch_size"]), "depth": given["num_hidden_layers"],
        "width": given["hidden_size"], "heads": given["num_attention_heads"], "mlp": activation,
        "norm_eps": given["layer_norm_eps"], "antialias": kind == "dinov2_with_registers",
    }  # fmt: skip
    if kind == "deit":
        teacher = any(str(name).endswith("WithTeacher") for name in given.get("architectures") or ())
        ours |= {"distilled": True} if teacher else {"registers": 1}
    if not kind.startswith("dinov2"):
        return {**ours, "mlp_width": given["intermediate_size"]}
    gated, ratio = given["use_swiglu_ffn"], given["mlp_ratio"]
    ours |= {"layer_scale": float(given["layerscale_value"]) or 1.0, "registers": given.get("num_register_tokens", 0)}
    return {**ours, "mlp": "swiglu" if gated else activation, "mlp_width": _hidden(given["hidden_size"], ratio, gated)}


def _swin(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["layer_norm_eps"] != 1e-5:
        raise UserError("layer_norm_eps", given["layer_norm_eps"], "1e-05, as in all norms of a Swin", "Change it.")
    if ACTIVATIONS[given["hidden_act"]] != "gelu":
        raise UserError("hidden_act", given["hidden_act"], "gelu, for a Swin", "There is no such option here.")
    names = {"patch": "patch_size", "window": "window_size", "width": "embed_dim", "depths": "depths"}
    ours = {name: given[theirs] for name, theirs in names.items()}
    return {**ours, "family": "swin", "patch": _side(given["patch_size"]), "heads": given["num_heads"],
            "mlp_ratio": given["mlp_ratio"]}  # fmt: skip


def _hidden(width: int, ratio: float, gated: bool) -> int:
    """DINOv2's hidden width: of a gated MLP two thirds, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _ratio(config: ViTConfig) -> int:
    """The whole number from which DINOv2 computes our hidden width."""
    gated = config.mlp == "swiglu"
    for ratio in range(1, 4 * config.mlp_width // config.width + 2):
        if _hidden(config.width, ratio, gated) == config.mlp_width:
            return ratio
    expected = "a whole multiple of the width" + (", two thirds of it rounded up to a multiple of 8" if gated else "")
    raise UserError("model.mlp_width", config.mlp_width, f"{expected}, in a DINOv2 of transformers", OTHERS)


def _classes(given: Mapping[str, Any]) -> list[str]:
    """Names of classes in label order, or numbers where some have none."""
    names = given.get("id2label")
    if not isinstance(names, dict):
        return [str(number) for number in range(_count(given.get("num_labels", 2)))]
    by_number = {int(number): str(name) for number, name in names.items()}
    return [by_number.get(number, str(number)) for number in range(len(by_number))]


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 1 << 24:
        raise ValueError(f"{value!r} classes")
    return value


def _side(value: Any) -> int:
    """The side in px of patches, where it may be both sides."""
    height, width = _size(value)
    if height != width:
        raise UserError("patch_size", value, "squares", "Patches are squares here.")
    return height


def _size(value: Any) -> tuple[int, int]:
    """Height and width in px, where it may be one for both, both, or a mapping of them."""
    sides = [value[key] for key in ("height", "width")] if isinstance(value, dict) else value
    sides = sides if isinstance(sides, list) else [sides, sides]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError("image_size", value, "height and width in px", "Mend it.")
    return sides[0], sides[1]


def _preprocessing(size: tuple[int, int], view: View) -> dict[str, Any]:
    """For images that are not square theirs cuts off more of some: no setting there resizes as ours does."""
    return {
        "image_processor_type": "BitImageProcessor",  # that which resizes the shorter side and cuts
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(max(size) / view.crop)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": dict(zip(("height", "width"), size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }
