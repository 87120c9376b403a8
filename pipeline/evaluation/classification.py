"""Accuracy of a classifier: every image counted once, at any number of ranks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitscale.pipeline.distributed import sum_over_ranks
from vitscale.pipeline.objectives.supervised import label_losses

MOST_CONFUSION_CLASSES = 2_000  # a matrix of 21,843 classes would take 3.8 GB
MOST_SCORES = 1 << 28  # of all images and classes, kept for the average precision: 1 GiB over all ranks
SORTED_SCORES = 1 << 23  # of some classes, sorted at a time: temporary memory of about 0.5 GB


@torch.no_grad()
def classification(
    objective: nn.Module, batches: Iterable[dict[str, Tensor]], classes: int, loss: str = "softmax"
) -> Iterator[tuple[str, Any]]:
    """Yield `images`, `top1` and `top5` (shares), `loss` (mean, without smoothing) and `confusion` over all ranks.

    Every rank calls it with as many batches, on the objective's device; rows of weight zero are padding and count
    nowhere. `confusion[i][j]` counts images of class i taken for class j; None for more than 2,000 classes.

    Of images with several labels (batches with `targets`) `top1` counts those whose best class is one of them, `top5`
    and `confusion` are None, and `map` is the mean average precision over the classes that any image has: exact, equal
    scores counted together. It needs every score at once, so it is None for more than `MOST_SCORES`.
    """
    hits, total = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)  # top-1, top-5, images
    confusion = torch.zeros(classes**2 if classes <= MOST_CONFUSION_CLASSES else 0, dtype=torch.int64)
    precision = None
    for batch in batches:
        logits_BK, real = objective(batch, predict=True), batch["weight"] > 0
        hits, total, confusion = (tally.to(logits_BK.device) for tally in (hits, total, confusion))
        if "targets" in batch:
            precision = precision or Precision(classes)
            precision.add(logits_BK, batch["targets"], real)
        targets_BK = batch["targets"][real] if "targets" in batch else None
        logits_BK, label = logits_BK[real], batch["label"][real]
        best = logits_BK.topk(min(5, classes), dim=1).indices
        right = best == label[:, None] if targets_BK is None else targets_BK.gather(1, best)
        hits += torch.stack([right[:, 0].sum(), right.sum(), real.sum()])
        total += label_losses(logits_BK, label, targets_BK, loss).sum()
        if len(confusion) and targets_BK is None:
            confusion += torch.bincount(label * classes + best[:, 0], minlength=classes**2)
    top1, top5, images = sum_over_ranks(hits).tolist()
    counted = len(confusion) and not precision
    yield "images", images
    yield "top1", top1 / images
    yield "top5", None if precision else top5 / images
    yield "loss", sum_over_ranks(total).item() / images
    if precision:
        yield "map", precision.mean()
    yield "confusion", sum_over_ranks(confusion).reshape(classes, classes).tolist() if counted else None


class Precision:
    """The scores of all images, and what they come to. All ranks add as many rows, in batches of one size."""

    def __init__(self, classes: int) -> None:
        self.classes, self._rows = classes, 0
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._real: list[Tensor] = []

    def add(self, scores_BK: Tensor, targets_BK: Tensor, real: Tensor) -> None:
        """Keep a batch on the CPU, unless there are too many by now: a decision that is the same on all ranks."""
        self._rows += len(scores_BK)
        self.device = scores_BK.device
        if self._fits():
            self._scores.append(scores_BK.cpu())
            self._targets.append(targets_BK.cpu())
            self._real.append(real.cpu())
        else:
            self._scores, self._targets, self._real = [], [], []

    def _fits(self) -> bool:
        return self._rows * _ranks()[1] * self.classes <= MOST_SCORES

    def mean(self) -> float | None:
        """Mean over the classes that any image has, on all ranks alike; None where there were too many scores."""
        if not self._fits():
            return None
        real = _from_all_ranks(torch.cat(self._real).float().to(self.device)) > 0
        few = max(1, SORTED_SCORES // len(real))
        found = []
        for first in range(0, self.classes, few):
            part = slice(first, first + few)
            scores, targets = (
                _from_all_ranks(torch.cat([one[:, part] for one in kept]).float().to(self.device))[real].T
                for kept in (self._scores, self._targets)
            )
            targets = targets > 0
            found.append(average_precision(scores, targets)[targets.any(dim=1)])
        values = torch.cat(found)
        return values.mean().item() if len(values) else None


def average_precision(scores_KB: Tensor, targets_KB: Tensor) -> Tensor:
    """Average precision of each class (K,) in float64, not a number where no image has it.

    Σ (Rₙ - Rₙ₋₁) Pₙ over the distinct scores, descending, with recall R and precision P of all images scored as high
    or higher (as `average_precision_score` of scikit-learn): the order of images with equal scores does not count.
    """
    falling, order = scores_KB.neg().contiguous().sort(dim=1)
    hits = targets_KB.gather(1, order)
    images = torch.searchsorted(falling, falling, right=True)  # scored as high as this one or higher
    precision = hits.cumsum(dim=1).gather(1, images - 1) / images.double()
    return (precision * hits).sum(dim=1) / hits.sum(dim=1)


def _from_all_ranks(own: Tensor) -> Tensor:
    """The rows of every rank, one rank after the other; each has as many. Zeros add nothing, to the bit."""
    rank, size = _ranks()
    rows = own.new_zeros(size, *own.shape)
    rows[rank] = own
    return sum_over_ranks(rows).flatten(0, 1)


def _ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
