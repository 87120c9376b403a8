"""Few-shot classification by least squares in closed form, as big_vision's `fewshot_lsr` (Kolesnikov et al. 2020;
Dosovitskiy et al. 2020, section 4.1)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.pipeline.data.order import mixed
from vitscale.pipeline.evaluation.features import Features

SHOTS = (1, 5, 10, 25)
L2 = 2.0**10  # big_vision's `configs/common_fewshot.py`, as are the shots and the number of seeds
GRID = tuple(2.0**power for power in range(-10, 21))
SEEDS = 3
BIAS = 100.0  # a constant feature, so large that the penalty hardly reaches its weight
CHUNK = 8_192


def fewshot(
    train: Features,
    test: Features,
    classes: int,
    shots: Sequence[int] = SHOTS,
    l2s: Sequence[float] = (L2,),
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield `5shot`, …: for each image of `test` the share of `SEEDS` choices of training images that get it right.

    Of several penalties each one's, as `5shot_l2_2^10`. Shots are left out of which some class has fewer images;
    classes without any do not count.
    """
    images = np.bincount(train.labels)
    for shot in (shot for shot in shots if shot <= images[images > 0].min()):
        right = {l2: np.zeros(len(test)) for l2 in l2s}
        for seed in range(SEEDS):
            numbers = chosen(train.keys, train.labels, shot, seed)
            fit = LeastSquares(train.take(numbers), train.labels[numbers], classes, device)
            for l2 in l2s:
                weights_DK = fit.weights(l2)
                for first, rows in test.chunks(CHUNK):
                    part = slice(first, first + len(rows))
                    right[l2][part] += fit.best(rows, weights_DK) == test.labels[part]
        for l2 in l2s:
            yield f"{shot}shot" if len(l2s) == 1 else f"{shot}shot_l2_2^{np.log2(l2):g}", right[l2] / SEEDS


def chosen(keys: NDArray[np.int64], labels: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """Numbers of `shots` images of each class, a pure function of the seed and the keys, whatever their order.

    The choices of a seed hold those of fewer shots.
    """
    drawn = mixed(mixed(keys.view(np.uint64)) + np.uint64(seed))
    falling = np.lexsort((keys, drawn, labels))
    of = labels[falling]
    place = np.arange(len(of)) - np.searchsorted(of, of)  # within its class
    return falling[place < shots]


class LeastSquares:
    """argmin ‖x W - y‖² + l2 ‖W‖² for any number of penalties l2 after one eigendecomposition, in float64.

    `x` are the features with mean 0 and standard deviation 1 and a constant `BIAS` beside them (N, D + 1), `y` 1 for an
    image's class and -1 for the others (N, K). With N above D, W = Q (Λ + l2)⁻¹ Qᵀ xᵀ y of xᵀ x = Q Λ Qᵀ; below it,
    W = xᵀ Q (Λ + l2)⁻¹ Qᵀ y of x xᵀ = Q Λ Qᵀ, the smaller of the two.
    """

    def __init__(
        self, values_ND: np.ndarray, labels: np.ndarray, classes: int, device: torch.device | str = "cpu"
    ) -> None:
        values = torch.from_numpy(values_ND).to(device).double()
        self.mean, self.deviation = values.mean(dim=0), values.std(dim=0, correction=0) + 1e-5
        x = self._padded(values)
        targets = torch.from_numpy(labels).to(device)
        y = 2 * torch.nn.functional.one_hot(targets, classes).double() - 1
        if len(x) >= x.shape[1]:
            self.eigenvalues, q = torch.linalg.eigh(x.T @ x)
            self.left, self.right = q, q.T @ (x.T @ y)
        else:
            self.eigenvalues, q = torch.linalg.eigh(x @ x.T)
            self.left, self.right = x.T @ q, q.T @ y

    def weights(self, l2: float) -> Tensor:
        """W (D + 1, K)."""
        return (self.left / (self.eigenvalues + l2)) @ self.right

    def best(self, values_ND: np.ndarray, weights_DK: Tensor) -> NDArray[np.int64]:
        """The class of the largest output for each row; the first of equal ones."""
        return (self._padded(torch.from_numpy(values_ND).to(self.mean)) @ weights_DK).argmax(dim=1).cpu().numpy()

    def _padded(self, values_ND: Tensor) -> Tensor:
        return torch.nn.functional.pad((values_ND - self.mean) / self.deviation, (0, 1), value=BIAS)
