"""Weighted k-nearest-neighbour classification on frozen features, as DINO's (Caron et al. 2021, arXiv:2104.14294)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.pipeline.evaluation.features import Features

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK, TRAIN_CHUNK = 1_024, 16_384  # images looked at together: about 0.4 GB at a width of 1,024
SPARE = 32  # neighbours kept beyond k, lest rounding leaves out one that belongs there
COMPARED = 4_096  # candidates compared in float64 at a time


def knn(
    train: Features,
    test: Features,
    classes: int,
    rows: range,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield `k10_top1`, `k10_top5`, …: for each image in `rows` of `test` 1 if it was right, else 0.

    Each of the k training images with the largest cosine similarity s votes exp(s / temperature) for its class. Only
    those k are used that are not above the number of training images; if all are, that number. Of training images
    that are equally similar the first ones count, of classes with equal votes the first is the best, and a class
    without a vote is never among the five best. Memory is bounded, whatever the sizes of the two.
    """
    used = sorted({k for k in ks if k <= len(train)} or {len(train)})
    right = {f"k{k}_top{top}": np.zeros(len(rows)) for k in used for top in (1, 5)}
    for first in range(rows.start, rows.stop, CHUNK):
        last = min(first + CHUNK, rows.stop)
        similar, numbers = neighbours(train, test.rows(first, last), used[-1], device)
        place = slice(first - rows.start, last - rows.start)
        labels, truth = train.labels[numbers], test.labels[first:last]
        for k, rank in _ranks(labels, np.exp(similar / temperature), truth, classes, used):
            right[f"k{k}_top1"][place], right[f"k{k}_top5"][place] = rank < 1, rank < 5
    yield from right.items()


def _ranks(
    labels: np.ndarray, votes: np.ndarray, truth: np.ndarray, classes: int, used: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """For each k, how many classes come before the true one, `classes` where it has no vote."""
    scores_BK, row, number = np.zeros((len(labels), classes)), np.arange(len(labels)), np.arange(classes)
    for k in range(1, labels.shape[1] + 1):  # nearest first: sums do not depend on chunks or devices
        scores_BK[row, labels[:, k - 1]] += votes[:, k - 1]
        if k in used:
            own = scores_BK[row, truth][:, None]
            before = (scores_BK > own) | ((scores_BK == own) & (number < truth[:, None]))
            yield k, np.where(own[:, 0] > 0, before.sum(axis=1), classes)


def neighbours(
    train: Features, test_BD: NDArray[np.float32], k: int, device: torch.device | str = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cosine similarities and numbers (B, k) of the k most similar rows of `train`, exact as of float64.

    Falling, and of equal similarities the lower number first. Candidates are found by matrix products in float32 and
    compared in float64, by sums whose order does not depend on where a row stands, so that equal rows are equally
    similar. Where the rounding of the products may have hidden a neighbour, they are done again in float64, and if many
    rows are alike even so, each row is compared with all.
    """
    test = _unit(test_BD, device)
    similar = np.empty((len(test), k))
    numbers = np.empty((len(test), k), np.int64)
    left = np.arange(len(test))
    for dtype in (torch.float32, torch.float64):
        if not len(left):
            return similar, numbers
        rows = test[torch.from_numpy(left).to(test.device)]
        close, candidates = _candidates(train, rows.to(dtype), min(k + SPARE, len(train)))
        found, places = _compared(train, rows, candidates, k)
        similar[left], numbers[left] = found, places
        error = (train.width + 4) * torch.finfo(dtype).eps  # bounds |Σ aᵢbᵢ| rounded, for rows of length 1
        sure = found[:, -1] > close[:, -1] + error if candidates.shape[1] < len(train) else np.full(len(left), True)
        left = left[~sure]
    for row in left:
        similar[row], numbers[row] = _against_all(train, test[row], k)
    return similar, numbers


def _candidates(train: Features, rows_BD: Tensor, count: int) -> tuple[np.ndarray, NDArray[np.int64]]:
    """Similarities, falling, and numbers of `count` candidates of each row, by products of the dtype of `rows_BD`."""
    best = rows_BD.new_zeros((len(rows_BD), 0))
    numbers = torch.zeros((len(rows_BD), 0), dtype=torch.int64, device=rows_BD.device)
    for first, chunk in train.chunks(TRAIN_CHUNK):
        products = rows_BD @ _unit(chunk, rows_BD.device).to(rows_BD.dtype).T
        here, places = products.topk(min(count, len(chunk)), dim=1)
        merged, order = torch.cat([best, here], dim=1).topk(min(count, best.shape[1] + here.shape[1]), dim=1)
        best, numbers = merged, torch.cat([numbers, places + first], dim=1).gather(1, order)
    return best.double().cpu().numpy(), numbers.cpu().numpy()


def _compared(train: Features, rows_BD: Tensor, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the candidates `numbers` of each row, in float64; `train` is read in order, as disks like it."""
    numbers = np.sort(numbers, axis=1)  # so that the stable sort below puts the lower number first
    similar = rows_BD.new_empty(numbers.shape)
    for first, chunk in train.chunks(TRAIN_CHUNK):
        row, place = np.nonzero((numbers >= first) & (numbers < first + len(chunk)))
        for begin in range(0, len(row), COMPARED):
            some, places = row[begin : begin + COMPARED], place[begin : begin + COMPARED]
            near = _unit(chunk[numbers[some, places] - first], rows_BD.device)
            similar[some, places] = (near * rows_BD[some]).sum(dim=1)
    values, order = (found[:, :k].cpu().numpy() for found in similar.sort(dim=1, descending=True, stable=True))
    return values, np.take_along_axis(numbers, order, axis=1)


def _against_all(train: Features, row_D: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    best, numbers = row_D.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=row_D.device)
    for first, chunk in train.chunks(TRAIN_CHUNK):
        similar = torch.cat([best, (_unit(chunk, row_D.device) * row_D).sum(dim=1)])
        places = torch.arange(first, first + len(chunk), device=row_D.device)
        best, order = similar.sort(descending=True, stable=True)
        best, numbers = best[:k], torch.cat([numbers, places])[order[:k]]
    return best.cpu().numpy(), numbers.cpu().numpy()


def _unit(values_ND: NDArray[np.float32], device: torch.device | str) -> Tensor:
    """Rows at length 1 in float64; rows of zeros stay zero."""
    values = torch.from_numpy(np.ascontiguousarray(values_ND)).to(device).double()
    lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values.div_(lengths.clamp_min(torch.finfo(torch.float64).tiny))
