"""Classification by softmax or sigmoid cross-entropy, of images with one label or several."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.errors import UserError
from vitscale.pipeline.data.augment import Preprocess, normalise
from vitscale.pipeline.data.device_augment import DeviceAugment
from vitscale.pipeline.objectives.dropping import keep_factors, kept_patches


class Supervised(nn.Module):
    """Images and labels → cross-entropy, summed over the rows of weight one.

    `forward({"pixels": uint8 (B, Y, X, 3), "label": (B,), "weight": (B,)})` returns the loss sum and
    `{"top1": correct rows}`. Rows of weight zero are padding: they add nothing to either. Images with several labels
    come with `targets` (B, K; bool), and are correct if the best class is one of them. `loss` is `softmax` or
    `sigmoid`, as of `label_losses`.

    In training mode `augment` changes the batch first, and needs more of it; where it mixes labels, a row is correct if
    it has the one of the larger share, its own at equal ones (of several labels, one with half a share or more). There
    too, branches and patches are dropped as `model.config` says, drawn from `seed` and the batch's `key` and `epoch`.
    With `predict=True` it returns float32 logits (B, K), with `predict="features"` what the classifier sees, in float32
    (B, D), and needs the pixels alone.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        label_smoothing: float = 0.0,
        augment: DeviceAugment | None = None,
        loss: str = "softmax",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.preprocess, self.label_smoothing = model, preprocess, label_smoothing
        self.augment, self.loss, self.seed = augment, loss, seed

    def forward(
        self, batch: dict[str, Tensor], predict: bool | Literal["features"] = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        pixels, targets_BK = batch["pixels"], batch.get("targets")
        training = self.training and not predict
        if self.augment and training:
            pixels, mixed_BK = self.augment(batch)
            targets_BK = targets_BK if mixed_BK is None else mixed_BK
        dtype = next(self.model.parameters()).dtype
        images_BCYX = normalise(pixels, self.preprocess, dtype)
        if predict == "features":
            return self._representation(images_BCYX).float()
        logits_BK = self.model(images_BCYX, **(self._kept(batch) if training else {})).float()
        if predict:
            return logits_BK
        losses = label_losses(logits_BK, batch["label"], targets_BK, self.loss, self.label_smoothing)
        correct = _correct(logits_BK.detach().argmax(dim=1), batch, targets_BK)
        return (losses * batch["weight"]).sum(), {"top1": torch.dot(correct.float(), batch["weight"])}

    def _representation(self, images_BCYX: Tensor) -> Tensor:
        """What the classifier sees, (B, D): `Network.representation`, caught in passing, so that modules are called
        as for logits: under ZeRO-3 each gathers its weights when it is."""
        seen: list[Tensor] = []
        hook = self.model.get_submodule("head").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self.model(images_BCYX)
        finally:
            hook.remove()
        return seen[0].flatten(1)  # a convolution sees it as a map of one place

    def _kept(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's further arguments: factors of branches, and numbers of patches, where some are dropped."""
        config, kept = getattr(self.model, "config", None), {}
        if config is None:
            return kept
        if config.drop_path:
            kept["keep_L2B"] = keep_factors(self.seed, config.drop_path, config.depth, batch["key"], batch["epoch"])
        share = getattr(config, "patch_drop", 0)
        if share:
            patches = math.prod(side // config.patch_size for side in batch["pixels"].shape[1:3])
            kept["patches_BM"] = kept_patches(self.seed, share, patches, batch["key"], batch["epoch"])
        return kept


def check_loss(loss: str, multi: bool) -> None:
    """Raise `UserError` where `loss` cannot learn from data of several labels an image (`multi`)."""
    if multi and loss != "sigmoid":
        got = f"{loss} for data with several labels an image"
        raise UserError("objective.loss", got, "sigmoid", "Add objective.loss=sigmoid.")


def label_losses(
    logits_BK: Tensor, label: Tensor, targets_BK: Tensor | None, loss: str, label_smoothing: float = 0.0
) -> Tensor:
    """Losses (B,) of `loss`, `softmax` or `sigmoid`, against the shares `targets_BK`, or without them `label` (B,)."""
    if loss == "sigmoid":
        if targets_BK is None:
            targets_BK = label[:, None] == torch.arange(logits_BK.shape[1], device=label.device)
        return sigmoid_cross_entropy(logits_BK, targets_BK.float(), label_smoothing)
    if targets_BK is None:
        return F.cross_entropy(logits_BK, label, reduction="none", label_smoothing=label_smoothing)
    return soft_cross_entropy(logits_BK, targets_BK, label_smoothing)


def sigmoid_cross_entropy(logits_BK: Tensor, targets_BK: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy (B,), summed over the classes (Beyer et al. 2020; big_vision's `sigmoid_xent`).

    Smoothing by ε makes a target t (1 - ε) t + ε / K: of a label 1 - ε + ε / K, of no label ε / K, as in timm's
    `BinaryCrossEntropy` and for DeiT III; being linear, it is the same before labels are mixed and after.
    """
    if label_smoothing:
        targets_BK = (1 - label_smoothing) * targets_BK + label_smoothing / logits_BK.shape[1]
    return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none").sum(dim=1)


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy (B,) against shares of labels that add up to 1.

    Computed in the order of `F.cross_entropy` with labels: where a share is 1, the bits are the same.
    """
    log_p_BK = F.log_softmax(logits_BK, dim=1)
    losses = -(targets_BK * log_p_BK).sum(dim=1)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + -log_p_BK.sum(dim=1) * (label_smoothing / logits_BK.shape[1])


def _correct(best: Tensor, batch: dict[str, Tensor], targets_BK: Tensor | None) -> Tensor:
    """Which rows (B,) have `best` (B,) for a label, of mixed ones the label of the larger share."""
    label = batch["label"]
    if targets_BK is None:
        return best == label
    if "targets" in batch:
        return targets_BK.gather(1, best[:, None])[:, 0] >= 0.5
    own = targets_BK.gather(1, label[:, None])[:, 0]
    return best == torch.where(own >= 0.5, label, targets_BK.argmax(dim=1))
