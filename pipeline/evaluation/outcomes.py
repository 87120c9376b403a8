"""What a classifier says of each image of a dataset, in the order of the dataset on all ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitscale.errors import UserError
from vitscale.pipeline.data.loader import LoaderSettings, View, evaluation_batches
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, agree, sum_over_ranks


@dataclass(frozen=True)
class Outcomes:
    """Of each image (N,): the number of its key, its label, the best class, and the probability of that one.

    `loss` is the cross-entropy, `brier` Σ (probability - 1 for the label)² over the classes (Brier 1950).
    """

    key: NDArray[np.int64]
    label: NDArray[np.int64]
    best: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    brier: NDArray[np.float64]


@torch.no_grad()
def outcomes(objective: nn.Module, store: Store, view: View, settings: LoaderSettings, world: World) -> Outcomes:
    """`Outcomes` of an objective in evaluation mode, on all ranks alike. Of equal probabilities the first is best.

    Raises `UserError` on all ranks for logits that are not finite.
    """
    finite = torch.ones((), dtype=torch.bool, device=world.device)
    whole, parts = torch.zeros(4, len(store), dtype=torch.int64), torch.zeros(3, len(store), dtype=torch.float64)
    whole, parts = whole.to(world.device), parts.to(world.device)
    for batch in evaluation_batches(store, view, settings, world):
        logits_BK, label = objective(batch, predict=True).double(), batch["label"]
        log_p_BK = logits_BK.log_softmax(dim=1)
        best = logits_BK.argmax(dim=1)
        own = log_p_BK.gather(1, label[:, None])[:, 0]
        p_BK = log_p_BK.exp()
        brier = (p_BK * p_BK).sum(dim=1) - 2 * own.exp() + 1
        confidence = p_BK.gather(1, best[:, None])[:, 0]
        real = batch["weight"] > 0
        finite = finite & logits_BK[real].isfinite().all()
        rows = batch["row"][real]
        whole[:, rows] = torch.stack([batch["key"], label, best, torch.ones_like(label)]).to(world.device)[:, real]
        parts[:, rows] = torch.stack([confidence, -own, brier])[:, real]
    error = None
    if not finite:
        error = UserError(
            "CHECKPOINT", "logits that are not finite", "finite ones", "Use another checkpoint of the run."
        )
    agree(error)
    key, label, best, seen = sum_over_ranks(whole).cpu().numpy()
    assert (seen == 1).all()
    return Outcomes(key, label, best, *sum_over_ranks(parts).cpu().numpy())


def in_order(values: Iterable[tuple[Tensor, Tensor]], images: int, columns: int, world: World) -> NDArray[np.float64]:
    """(images, columns) on all ranks, of what each has in parts: rows of the dataset (n,) and values (n, columns)."""
    whole = torch.zeros(images, columns, dtype=torch.float64, device=world.device)
    for rows, part in values:
        whole[rows.to(world.device)] = part.to(world.device).double()
    return sum_over_ranks(whole).cpu().numpy()
