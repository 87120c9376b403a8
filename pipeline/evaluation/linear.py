"""Linear classifiers on frozen features: SGD over a grid of rates, and logistic regression by L-BFGS."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vitscale.pipeline.data.order import mixed
from vitscale.pipeline.evaluation.features import Features

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # each begins where the one before it ended
BATCH, MOMENTUM, EPOCHS, LEAST_STEPS = 1_024, 0.9, 10, 1_000  # about what DINOv2 (Oquab et al. 2023) takes
HELD_OUT = 10  # one in so many training images chooses the rate and the penalty
CHUNK = 8_192

Numbers = NDArray[np.int64]


def linear(
    train: Features, test: Features, classes: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, float | NDArray[np.float64]]]:
    """Yield `sgd_top1` and `lbfgs_top1`, for each image of `test` 1 if it was right, else 0, and what was chosen.

    `sgd_rate` and `lbfgs_l2` are those that did best on training images held out, the smaller rate and the larger
    penalty of equal ones. With that penalty logistic regression is then fitted to all training images.
    """
    held = mixed(train.keys.view(np.uint64)) % np.uint64(HELD_OUT) == 0
    if not 0 < held.sum() < len(held):
        held = np.zeros(len(held), bool)
    fitted, all_rows = np.flatnonzero(~held), np.arange(len(train))
    judges = np.flatnonzero(held) if held.any() else all_rows
    scale = Scale.of(train, device)
    heads_GDK = sgd(train, fitted, classes, scale, RATES)
    shares = [_right(train, judges, scale, head_DK).mean() for head_DK in heads_GDK]
    place = int(np.argmax(shares))
    yield "sgd_rate", RATES[place]
    yield "sgd_top1", _right(test, np.arange(len(test)), scale, heads_GDK[place])
    head_DK, tried = None, []
    for l2 in PENALTIES:
        head_DK = logistic(train, fitted, classes, scale, l2, head_DK)
        tried.append((_right(train, judges, scale, head_DK).mean(), l2, head_DK))
    _, l2, head_DK = max(tried, key=lambda each: each[:2])
    yield "lbfgs_l2", l2
    head_DK = logistic(train, all_rows, classes, scale, l2, head_DK)
    yield "lbfgs_top1", _right(test, np.arange(len(test)), scale, head_DK)


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each feature (D,), in float64; where it never changes, 1."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(train: Features, device: torch.device | str = "cpu") -> "Scale":
        mean = sum(rows.sum(axis=0, dtype=np.float64) for _, rows in train.chunks(CHUNK)) / len(train)
        squares = sum(((rows - mean) ** 2).sum(axis=0) for _, rows in train.chunks(CHUNK)) / len(train)
        deviation = np.where(squares > 0, np.sqrt(squares), 1)
        return Scale(torch.as_tensor(mean).to(device), torch.as_tensor(deviation).to(device))

    def padded(self, values_ND: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Scaled features with a constant 1 beside them (N, D + 1)."""
        values = torch.from_numpy(values_ND).to(self.mean.device).double()
        return F.pad((values - self.mean) / self.deviation, (0, 1), value=1.0).to(dtype)


def sgd(
    train: Features,
    rows: Numbers,
    classes: int,
    scale: Scale,
    rates: Sequence[float],
    least_steps: int = LEAST_STEPS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A head (D + 1, K) for each rate (G, D + 1, K), all of them trained on the same batches at once, from zero.

    Softmax cross-entropy, momentum, no weight decay, a cosine from the rate to zero; `EPOCHS` epochs or `least_steps`
    steps, whichever is more. The order of an epoch is a pure function of the keys.
    """
    batch = min(BATCH, len(rows))
    each = len(rows) // batch
    epochs = max(EPOCHS, math.ceil(least_steps / each))
    heads = torch.zeros(len(rates), train.width + 1, classes, dtype=dtype, device=scale.mean.device)
    speed = torch.zeros_like(heads)
    rate_G11 = torch.tensor(rates, dtype=dtype, device=heads.device)[:, None, None]
    for step in range(epochs * each):
        if step % each == 0:
            drawn = mixed(mixed(train.keys[rows].view(np.uint64)) + np.uint64(step // each))
            shuffled = rows[np.argsort(drawn, kind="stable")]
        numbers = np.sort(shuffled[step % each * batch :][:batch])  # in the order of the file
        x_BD = scale.padded(train.take(numbers), dtype)
        labels = torch.from_numpy(train.labels[numbers]).to(heads.device)
        errors_GBK = (x_BD @ heads).softmax(dim=2)
        errors_GBK[:, torch.arange(batch, device=heads.device), labels] -= 1
        speed = MOMENTUM * speed + x_BD.T @ errors_GBK / batch
        heads = heads - rate_G11 * (0.5 + 0.5 * math.cos(math.pi * step / (epochs * each))) * speed
    return heads


def logistic(
    train: Features, rows: Numbers, classes: int, scale: Scale, l2: float, start: Tensor | None = None, steps: int = 300
) -> Tensor:
    """The head (D + 1, K) of least mean softmax cross-entropy + l2 / 2 · ‖weights without the bias‖², in float64.

    `LogisticRegression(C=1 / (l2 · N))` of scikit-learn, N images, on the scaled features; from `start` or zero.
    """
    shape = train.width + 1, classes
    head_DK = torch.zeros(shape, dtype=torch.float64, device=scale.mean.device) if start is None else start.clone()
    solver = torch.optim.LBFGS(
        [head_DK],
        max_iter=steps,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=head_DK.device)
        slope = torch.zeros_like(head_DK)
        for first in range(0, len(rows), CHUNK):
            numbers = rows[first : first + CHUNK]
            x_BD = scale.padded(train.take(numbers), torch.float64)
            labels = torch.from_numpy(train.labels[numbers]).to(head_DK.device)[:, None]
            log_p_BK = (x_BD @ head_DK).log_softmax(dim=1)
            total -= log_p_BK.gather(1, labels).sum()
            slope += x_BD.T @ log_p_BK.exp().scatter_add_(1, labels, -torch.ones_like(labels, dtype=torch.float64))
        weights = F.pad(head_DK[:-1], (0, 0, 0, 1))
        head_DK.grad = slope / len(rows) + l2 * weights
        return total / len(rows) + l2 / 2 * (weights * weights).sum()

    with torch.no_grad():
        solver.step(loss)  # pyright: ignore[reportArgumentType]
    return head_DK


def _right(of: Features, rows: Numbers, scale: Scale, head_DK: Tensor) -> NDArray[np.float64]:
    """For each row 1 if its class has the largest output, else 0; of a head that diverged all 0."""
    right = np.zeros(len(rows))
    if not head_DK.isfinite().all():
        return right
    for first in range(0, len(rows), CHUNK):
        numbers = rows[first : first + CHUNK]
        best = (scale.padded(of.take(numbers), head_DK.dtype) @ head_DK).argmax(dim=1).cpu().numpy()
        right[first : first + CHUNK] = best == of.labels[numbers]
    return right
