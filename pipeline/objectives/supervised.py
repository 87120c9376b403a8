"""Classification by softmax cross-entropy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.pipeline.data.augment import Preprocess, normalise


class Supervised(nn.Module):
    """Images and labels → cross-entropy, summed over the rows of weight one.

    `forward({"pixels": uint8 (B, Y, X, 3), "label": (B,), "weight": (B,)})` returns the loss sum and
    `{"top1": correct rows}`. Rows of weight zero are padding: they add nothing to either. With `predict=True` it
    returns float32 logits (B, K), and needs the pixels alone.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.preprocess, self.label_smoothing = model, preprocess, label_smoothing

    def forward(self, batch: dict[str, Tensor], predict: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        dtype = next(self.model.parameters()).dtype
        logits_BK = self.model(normalise(batch["pixels"], self.preprocess, dtype)).float()
        if predict:
            return logits_BK
        label, weight = batch["label"], batch["weight"]
        losses = F.cross_entropy(logits_BK, label, reduction="none", label_smoothing=self.label_smoothing)
        correct = (logits_BK.detach().argmax(dim=1) == label).float()
        return (losses * weight).sum(), {"top1": torch.dot(correct, weight)}
