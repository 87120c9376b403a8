"""What an image takes of a device's memory in training, measured on networks of one and of two blocks.

Otherwise the run's own, they go forward and backward with two numbers of images. What is held between the two passes
grows by the same for every image and every block; what the backward pass takes besides does not depend on the number of
blocks. That is enough to know what an image takes of the whole network, which need not be there: at ZeRO stage 3 no
rank could hold its weights.

The trial does without torch.compile, which takes minutes and keeps no more for the backward pass than is kept without.
"""

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS = (8, 2)  # images of the smaller of two trials; the second where the first runs out of memory

Batch = dict[str, Tensor]


class _CudaMemory(AbstractContextManager):
    """What tensors take on a GPU, as its allocator counts them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> tuple[int, int]:
        """Bytes held now, and the most since the last reading."""
        now, most = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return now, most


class _HostMemory(TorchDispatchMode):
    """What tensors take that are made while it is entered: the host's allocator does not count them."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:  # else a view, or in place
                storage = each.untyped_storage()
                given.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return result

    def _add(self, count: int) -> None:
        self._now += count
        self._most = max(self._most, self._now)

    def read(self) -> tuple[int, int]:
        """Bytes held now, and the most since the last reading."""
        most, self._most = self._most, self._now
        return self._now, most


@dataclass(frozen=True)
class Taken:
    """Bytes: the most of the forward pass, what is held after it, and the most of the backward pass."""

    forward: float
    held: float
    backward: float

    def growth(self, other: "Taken", rows: int) -> "Taken":
        """What each of so many more images adds, of which `other` is what they all take."""
        return Taken(
            (other.forward - self.forward) / rows,
            (other.held - self.held) / rows,
            (other.backward - self.backward) / rows,
        )


def taken(objective: nn.Module, batch_of: Callable[[int], Batch], rows: int, device: torch.device) -> Taken:
    """What a batch and the two passes over it take, besides weights and gradients that are there already."""
    with _CudaMemory(device) if device.type == "cuda" else _HostMemory() as memory:
        before, _ = memory.read()
        batch = batch_of(rows)
        loss, _ = objective(batch)
        held, forward = memory.read()
        loss.backward()
        _, backward = memory.read()
    return Taken(forward - before, held - before, backward - before)


def bytes_an_image(
    build: Callable[[int], nn.Module], depth: int, batch_of: Callable[[int], Batch], device: torch.device
) -> float:
    """Bytes that each image of a micro batch takes of a network of `depth` blocks, at the peak of a step.

    `build` makes the objective with so many blocks, on the device. Infinite where not even two images go through two.
    """
    for rows in ROWS:
        with suppress(torch.OutOfMemoryError):
            one, two = (_growth(build(blocks), batch_of, rows, device) for blocks in (1, 2))
            held = one.held + (depth - 1) * (two.held - one.held)
            return max(two.forward, held + two.backward - two.held)  # augmentation may take more than a small network
        free_memory()  # what the failed trial held, for the smaller one
    return math.inf


def _growth(objective: nn.Module, batch_of: Callable[[int], Batch], rows: int, device: torch.device) -> Taken:
    taken(objective, batch_of, rows, device)  # makes gradients and the libraries' workspaces
    return taken(objective, batch_of, rows, device).growth(taken(objective, batch_of, 2 * rows, device), rows)


def free_memory() -> None:
    """Give memory back to the device that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
