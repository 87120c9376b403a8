"""Fitting trained weights to another resolution, another patch size or other classes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitscale.model.embed import Grid, resize_pos_embed
from vitscale.model.network import HEAD

Shape = tuple[int, ...]
PATCHES = "patch_embed.proj.weight"
POSITIONS = "pos_embed"
BIASES = ".relative_position_bias_table"


def adapt_weights(
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    trained: Grid,
    config: Any,
    own_shapes: Mapping[str, Shape],
) -> tuple[set[str], Callable[[str], Tensor], list[str]]:
    """Fit pretrained weights, of these `shapes` and read by name, to a network of `config` and `own_shapes`.

    `trained` is the grid of patches that they were made for.

    Returns the names of those kept, a function that reads one of them, adapted, and a line for each thing that is not
    kept as it is. Positions are interpolated (`resize_pos_embed`), and so are Swin's position biases for other windows;
    patches of another size are resized (`resize_patches`). The classifier and the hidden layer before it are left out,
    so that the network keeps its own (zero-initialised) head. Nothing is read before that function is called.
    Raises `ValueError` naming the tensors that are missing, unexpected or of another shape.
    """
    kept = {name: tuple(shape) for name, shape in shapes.items() if not name.startswith(HEAD)}
    own = {name: tuple(shape) for name, shape in own_shapes.items() if not name.startswith(HEAD)}
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    notes: list[str] = []
    for name in sorted(own.keys() & kept.keys()):
        before, after = kept[name], own[name]
        same = before == after and (name != POSITIONS or trained == config.grid)
        change = None if same else _change(name, before, after, trained, config)
        if change:
            changes[name], said = change
            kept[name] = after
            notes += [said] if said not in notes else []
    wrong = [f"{name} is missing" for name in sorted(own.keys() - kept.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(kept.keys() - own.keys())]
    both = sorted(own.keys() & kept.keys())
    wrong += [f"{name} is {kept[name]}, not {own[name]}" for name in both if kept[name] != own[name]]
    if wrong:
        raise ValueError("; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    dropped = sorted(shapes.keys() - kept.keys())
    if dropped:
        notes.append(f"dropped {', '.join(dropped)}; the new head for {config.num_classes} classes starts at zero")

    def adapted(name: str) -> Tensor:
        weight = read(name)
        return changes[name](weight) if name in changes else weight

    return set(kept), adapted, notes


def _change(
    name: str, before: Shape, after: Shape, trained: Grid, config: Any
) -> tuple[Callable[[Tensor], Tensor], str] | None:
    """How a tensor becomes one of another shape, and what to say of it; None if it cannot."""
    if name == POSITIONS and before == (1, math.prod(trained) + config.placed_prefix, after[-1]):
        sizes = [f"{rows}×{columns}" for rows, columns in (trained, config.grid)]
        said = f"position embeddings interpolated from {sizes[0]} to {sizes[1]}"
        prefix, antialias = config.placed_prefix, config.antialias
        return lambda weight: resize_pos_embed(weight, trained, config.grid, prefix, antialias), said
    if name == PATCHES and len(before) == 4 and before[:2] == after[:2]:
        said = f"patches resized from {before[2]}×{before[3]} to {after[2]}×{after[3]} px"
        return lambda weight: resize_patches(weight, (after[2], after[3])), said
    if name.endswith(BIASES) and len(before) == 2 and before[1] == after[1]:
        sides = math.isqrt(before[0]), math.isqrt(after[0])
        if sides[0] ** 2 == before[0] and sides[1] ** 2 == after[0]:
            windows = [(side + 1) // 2 for side in sides]
            said = f"position biases interpolated from windows of {windows[0]} patches a side to {windows[1]}"
            return lambda weight: _resize_biases(weight, *sides), said
    return None


def resize_patches(weight_DCPP: Tensor, size: tuple[int, int]) -> Tensor:
    """Projections of patches of another size, (D, C, P, P), that give resized patches the same tokens as before.

    The least-squares solution for patches resized bilinearly (FlexiViT's PI-resize, Beyer et al. 2023,
    arXiv:2212.08013, section 3.4): the pseudo-inverse of the transposed resizing. In float64, kept in its own dtype.
    """
    rows, columns = (_bilinear(before, after) for before, after in zip(weight_DCPP.shape[2:], size, strict=True))
    flat = torch.einsum(
        "ya,xb,dcab->dcyx", *(torch.linalg.pinv(one.T) for one in (rows, columns)), weight_DCPP.double()
    )
    return flat.to(weight_DCPP.dtype)


def _bilinear(before: int, after: int) -> Tensor:
    """The matrix (after, before) of bilinear interpolation along one side, antialiased where it shrinks."""
    unit_11NN = torch.eye(before, dtype=torch.float64)[None, None]
    return F.interpolate(unit_11NN, size=(after, before), mode="bilinear", antialias=True)[0, 0]


def _resize_biases(table_MH: Tensor, before: int, after: int) -> Tensor:
    """Position biases for another window: bicubic, so that the ends of both lie on each other (as Swin's own code)."""
    table_1HNN = table_MH.float().T.unflatten(1, (before, before))[None]
    resized_1HNN = F.interpolate(table_1HNN, size=(after, after), mode="bicubic", align_corners=False)
    return resized_1HNN[0].flatten(1).T.to(table_MH.dtype).contiguous()
