"""What a classifier can do without: patches, their places, and resolution (Naseer et al. 2021, arXiv:2105.10497)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.model.config import ViTConfig
from vitscale.model.embed import Grid
from vitscale.pipeline.data.augment import normalise
from vitscale.pipeline.data.loader import Batch, EvaluationView, LoaderSettings, evaluation_batches
from vitscale.pipeline.data.order import mixed
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation.outcomes import in_order, outcomes
from vitscale.pipeline.objectives.supervised import Supervised

SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90)  # percent of the patches
GRIDS = (2, 4, 8, 16)  # parts of a side
SCALES = (0.5, 0.75, 1.25, 1.5)  # of the sides that the network is made for
OCCLUSION, SHUFFLE = 1, 2  # streams of random numbers

Changes = dict[str, Callable[[], Tensor]]


def robustness(
    objective: Supervised, store: Store, settings: LoaderSettings, world: World
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield for each image 1 if it is right, else 0, on all ranks alike:

    - `occlusion_random_10` … `_90` with so many percent of its patches black, and where the network attends by a class
      token `occlusion_salient_…` with those black that the token attends to most in the last block (the mean over the
      heads), and `occlusion_nonsalient_…`, to least
    - `shuffle_2x2` … `_16x16` with the image cut into so many parts, put together in another order
    - `resolution_…` of images of other sizes in px, of networks that take any
    """
    config: Any = objective.model.config
    names = _names(config)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in evaluation_batches(store, EvaluationView(objective.preprocess), settings, world):
            real = batch["weight"] > 0
            changes = _changes(objective, batch)
            right = [
                objective({**batch, "pixels": changes[name]()}, predict=True).argmax(dim=1) == batch["label"]
                for name in names
            ]
            yield batch["row"][real], torch.stack(right, dim=1)[real]

    with torch.no_grad():
        found = in_order(parts(), len(store), len(names), world)
    yield from zip(names, found.T, strict=True)
    for size in resolutions(config):
        preprocess = replace(objective.preprocess, img_size=size)
        seen = outcomes(objective, store, EvaluationView(preprocess), settings, world)
        name = f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"
        yield f"resolution_{name}", (seen.best == seen.label).astype(np.float64)


def resolutions(config: Any) -> list[tuple[int, int]]:
    """Heights and widths in px of whole patches about `SCALES` of the network's own; none where its weights are tied
    to that."""
    if config.family == "mixer":
        return []
    patch = config.patch_size
    height, width = ([max(1, round(side * scale / patch)) * patch for scale in SCALES] for side in config.height_width)
    return sorted({*zip(height, width, strict=True)} - {config.height_width})


def attends(config: Any) -> bool:
    """Whether a network has the attention of a class token."""
    return isinstance(config, ViTConfig) and config.mixing == "attention" and config.class_token


def _names(config: Any) -> list[str]:
    kinds = ["random", *(["salient", "nonsalient"] if attends(config) else [])]
    grids = [grid for grid in GRIDS if not any(side % grid for side in config.height_width)]
    return [f"occlusion_{kind}_{share}" for kind in kinds for share in SHARES] + [f"shuffle_{g}x{g}" for g in grids]


def _changes(objective: Supervised, batch: Batch) -> Changes:
    """The changed pixels by name, made when they are asked for."""
    pixels, key = batch["pixels"], batch["key"]
    config: Any = objective.model.config
    orders = {"random": drawn_order(key, config.patches, OCCLUSION)}
    if attends(config):
        attention_BN = class_attention(objective, pixels)
        orders["salient"] = attention_BN.argsort(dim=1, descending=True, stable=True)
        orders["nonsalient"] = attention_BN.argsort(dim=1, stable=True)
    changes: Changes = {}
    for kind, order_BN in orders.items():
        for share in SHARES:
            count = round(config.patches * share / 100)
            changes[f"occlusion_{kind}_{share}"] = lambda o=order_BN, n=count: occluded(pixels, o[:, :n], config.grid)
    for parts in GRIDS:
        changes[f"shuffle_{parts}x{parts}"] = lambda g=parts: shuffled(pixels, drawn_order(key, g * g, SHUFFLE), g)
    return changes


def drawn_order(key: Tensor, count: int, stream: int) -> Tensor:
    """A permutation of 0 … count - 1 for each key, (B, count), a pure function of it."""
    keys = key.cpu().numpy().view(np.uint64)
    seeds = mixed(keys + np.uint64(stream))[:, None]
    drawn = mixed(seeds + mixed(np.arange(count, dtype=np.uint64) + np.uint64(stream << 32)))
    return torch.from_numpy(drawn.argsort(axis=1, kind="stable")).to(key.device)


def class_attention(objective: Supervised, pixels: Tensor) -> Tensor:
    """How much the class token attends to each patch in the last block, (B, patches), the mean over the heads."""
    model: Any = objective.model
    last = _Last()
    model.forward_features(normalise(pixels, objective.preprocess, next(model.parameters()).dtype), weights=last)
    return last[-1][:, :, 0, model.config.prefix :].mean(dim=1)


class _Last(list):
    """A list that keeps the last alone: weights of all blocks would not fit for large images."""

    def append(self, item: Any) -> None:
        self[:] = [item]


def occluded(pixels: Tensor, patches_BM: Tensor, grid: Grid) -> Tensor:
    """Pixels (B, Y, X, 3) with these of the patches, which form a `grid`, black."""
    kept = torch.ones(len(pixels), math.prod(grid), dtype=pixels.dtype, device=pixels.device)
    mask = kept.scatter_(1, patches_BM, 0).unflatten(1, grid)
    for dim in (1, 2):
        mask = mask.repeat_interleave(pixels.shape[dim] // grid[dim - 1], dim=dim)
    return pixels * mask[..., None]


def shuffled(pixels: Tensor, order_BN: Tensor, grid: int) -> Tensor:
    """Pixels (B, Y, X, 3) cut into `grid` × `grid` parts, of which place i gets number `order_BN[:, i]`."""
    parts = pixels.unflatten(2, (grid, -1)).unflatten(1, (grid, -1)).transpose(2, 3).flatten(1, 2)
    parts = parts.take_along_dim(order_BN[:, :, None, None, None], dim=1)
    return parts.unflatten(1, (grid, grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
