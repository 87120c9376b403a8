"""Other projects' state dicts and configurations ↔ ours: pure maps, one tensor at a time.

`hugging_face` (transformers: ViT, DeiT, Swin, DINOv2), `timm` (whose names ours are; also those of the original DeiT,
DINO, DINOv2 and Swin files) and `google` (the `.npz` files of vision_transformer, big_vision and BiT).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vitscale.errors import UserError
from vitscale.model.config import ViTConfig
from vitscale.model.embed import sincos_positions
from vitscale.model.interop import google, hugging_face, hugging_face_config, timm, timm_config
from vitscale.model.interop.maps import Layout, Made, Shape, Tensors, check, made, our_shapes, with_more
from vitscale.model.interop.view import View

__all__ = ["LAYOUTS", "Imported", "Layout", "Made", "Shape", "Tensors", "View", "described", "exported", "imported"]

_MODULES: dict[str, Any] = {"hugging_face": hugging_face, "timm": timm, "google": google}
_DESCRIPTIONS: dict[str, Any] = {"hugging_face": hugging_face_config, "timm": timm_config, "google": google}
LAYOUTS = tuple(_MODULES)


@dataclass(frozen=True)
class Imported:
    """Weights of others as ours: the architecture, its tensors, and a line for each thing that is not as it was."""

    config: Any
    tensors: Tensors
    notes: list[str]


def exported(layout: str, config: Any, ours: Tensors) -> Tensors:
    """Our weights as tensors of `layout`, one of `LAYOUTS`, under the names that its files have.

    Nothing is read but what is asked for. Fixed positions become learned ones of the trained resolution. Raises
    `UserError`: `model.SETTING` if the layout cannot express the architecture, `weights` if these are not its weights.
    """
    check(ours.shapes, our_shapes(config))
    if isinstance(config, ViTConfig) and config.positions == "sincos2d":
        places_ND = sincos_positions(config.grid, config.width, config.placed_grid, torch.device("cpu"))
        prefix = places_ND.new_zeros(config.placed_prefix, config.width)
        ours = with_more(ours, {"pos_embed": torch.cat([prefix, places_ND])[None]})
        config = replace(config, positions="learned", sincos_grid=())
    if layout == "hugging_face":
        config, ours = hugging_face.complete(config, ours)
    return made(_MODULES[layout].layout(config).theirs, ours)


def imported(layout: str, config: Any, theirs: Tensors) -> Imported:
    """Their weights in `layout` as ours, for the architecture that their configuration or shapes describe.

    Without a classifier, or with one that ours cannot be, there is one of zeros for one class. Nothing is read but what
    is asked for, and a classifier of DINOv2. Raises `UserError` (`weights`) naming tensors that do not fit.
    """
    theirs, notes = _MODULES[layout].familiar(theirs), list[str]()
    if config.depth > len(theirs.shapes):  # before a network is made of what is merely claimed
        raise UserError("weights", f"{len(theirs.shapes)} tensors", f"those of {config.depth} blocks", "Use another.")
    chosen: Layout = _MODULES[layout].layout(config, theirs.shapes)
    trouble = hugging_face.head_trouble(config, theirs) if layout == "hugging_face" else ""
    if not trouble and not set(chosen.heads) & theirs.shapes.keys():
        trouble = "has no classifier"
    if trouble:
        config = replace(config, num_classes=1)
        notes.append(f"{trouble}: one of zeros, for one class, stands in for it")
        chosen = _MODULES[layout].layout(config, theirs.shapes)
    expected = made(chosen.theirs, Tensors(our_shapes(config), _unread)).shapes
    if trouble:
        theirs = with_more(theirs, {name: torch.zeros(expected[name]) for name in chosen.heads})
    check(theirs.shapes, expected, chosen.optional)
    return Imported(config, made(chosen.ours, theirs), notes)


def described(layout: str, config: Any, classes: list[str], view: View) -> dict[str, dict[str, Any]]:
    """The JSON files that lie beside weights in `layout`, by name: none for `google`.

    Raises `UserError` (`model.SETTING`) if the layout cannot express the architecture.
    """
    return _DESCRIPTIONS[layout].describe(config, classes, view)


def _unread(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is read for its shape")
