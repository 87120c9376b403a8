"""Accuracy of a classifier: every image counted once, at any number of ranks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vitscale.pipeline.distributed import sum_over_ranks

MOST_CONFUSION_CLASSES = 2_000  # a matrix of 21,843 classes would take 3.8 GB


@torch.no_grad()
def classification(
    objective: nn.Module, batches: Iterable[dict[str, torch.Tensor]], classes: int
) -> Iterator[tuple[str, Any]]:
    """Yield `images`, `top1` and `top5` (shares), `loss` (mean cross-entropy) and `confusion` over all ranks.

    Every rank calls it with as many batches, on the objective's device; rows of weight zero are padding and count
    nowhere. `confusion[i][j]` counts images of class i taken for class j; None for more than 2,000 classes.
    """
    hits, loss = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)  # top-1, top-5, images
    confusion = torch.zeros(classes**2 if classes <= MOST_CONFUSION_CLASSES else 0, dtype=torch.int64)
    for batch in batches:
        logits_BK, real = objective(batch, predict=True), batch["weight"] > 0
        hits, loss, confusion = (tally.to(logits_BK.device) for tally in (hits, loss, confusion))
        logits_BK, label = logits_BK[real], batch["label"][real]
        right = logits_BK.topk(min(5, classes), dim=1).indices == label[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum(), real.sum()])
        loss += F.cross_entropy(logits_BK, label, reduction="sum")
        if len(confusion):
            confusion += torch.bincount(label * classes + logits_BK.argmax(dim=1), minlength=classes**2)
    top1, top5, images = sum_over_ranks(hits).tolist()
    yield "images", images
    yield "top1", top1 / images
    yield "top5", top5 / images
    yield "loss", sum_over_ranks(loss).item() / images
    yield "confusion", sum_over_ranks(confusion).reshape(classes, classes).tolist() if len(confusion) else None
