"""Classification by softmax cross-entropy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.pipeline.data.augment import Preprocess, normalise
from vitscale.pipeline.data.device_augment import DeviceAugment


class Supervised(nn.Module):
    """Images and labels → cross-entropy, summed over the rows of weight one.

    `forward({"pixels": uint8 (B, Y, X, 3), "label": (B,), "weight": (B,)})` returns the loss sum and
    `{"top1": correct rows}`. Rows of weight zero are padding: they add nothing to either. In training mode `augment`
    changes the batch first, and needs more of it; where it mixes labels, a row is correct if it has the one of the
    larger share, its own at equal ones. With `predict=True` it returns float32 logits (B, K), and needs the pixels
    alone.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        label_smoothing: float = 0.0,
        augment: DeviceAugment | None = None,
    ) -> None:
        super().__init__()
        self.model, self.preprocess, self.label_smoothing = model, preprocess, label_smoothing
        self.augment = augment

    def forward(self, batch: dict[str, Tensor], predict: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        pixels, targets_BK = batch["pixels"], None
        if self.augment and self.training and not predict:
            pixels, targets_BK = self.augment(batch)
        dtype = next(self.model.parameters()).dtype
        logits_BK = self.model(normalise(pixels, self.preprocess, dtype)).float()
        if predict:
            return logits_BK
        label, weight = batch["label"], batch["weight"]
        if targets_BK is None:
            losses = F.cross_entropy(logits_BK, label, reduction="none", label_smoothing=self.label_smoothing)
        else:
            losses = soft_cross_entropy(logits_BK, targets_BK, self.label_smoothing)
            own = targets_BK.gather(1, label[:, None])[:, 0]
            label = torch.where(own >= 0.5, label, targets_BK.argmax(dim=1))
        correct = (logits_BK.detach().argmax(dim=1) == label).float()
        return (losses * weight).sum(), {"top1": torch.dot(correct, weight)}


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy (B,) against shares of labels that add up to 1.

    Computed in the order of `F.cross_entropy` with labels: where a share is 1, the bits are the same.
    """
    log_p_BK = F.log_softmax(logits_BK, dim=1)
    losses = -(targets_BK * log_p_BK).sum(dim=1)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + -log_p_BK.sum(dim=1) * (label_smoothing / logits_BK.shape[1])
