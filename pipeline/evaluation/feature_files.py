"""The features of one rank: a safetensors file of `keys`, `labels` and `features`, written and read through a map."""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vitscale.pipeline.tensor_file import file_header


@dataclass(frozen=True)
class FeatureFile:
    """Views of the file's memory: keys and labels int64 (n,), features float (n, D)."""

    path: Path
    memory: mmap.mmap
    keys: np.ndarray
    labels: np.ndarray
    features: np.ndarray

    def let_go(self) -> None:
        """Have its pages no longer count as memory of this process; they are read again, or stay to be written."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        """Wait until it is on disk. Raises OSError."""
        self.memory.flush()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def create(path: Path, rows: int, width: int, dtype: str) -> FeatureFile:
    """A new file of zeros, to be filled. Raises OSError, and does so here if the disk has no room for it."""
    head, size = _layout(rows, width, dtype)
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a page of a map that finds no room later would kill the process
        file.write(head)
        file.flush()
        return _mapped(path, mmap.mmap(file.fileno(), size), len(head), rows, width, dtype)


def open_file(path: Path, rows: int, width: int, dtype: str) -> FeatureFile:
    """The file that `create` made of the same numbers. Raises `ValueError` for any other, and OSError."""
    head, size = _layout(rows, width, dtype)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size or file.read(len(head)) != head:
            raise ValueError(f"{path} is not {rows} features of {width} as {dtype}")
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return _mapped(path, memory, len(head), rows, width, dtype)


def _layout(rows: int, width: int, dtype: str) -> tuple[bytes, int]:
    """What the file begins with, and its bytes. Tensors of 8 bytes a number come first, so that all are aligned."""
    tensors = {
        "keys": (torch.int64, (rows,)), "labels": (torch.int64, (rows,)),
        "features": (getattr(torch, dtype), (rows, width)),
    }  # fmt: skip
    head = file_header(tensors)
    return head, len(head) + sum(kind.itemsize * math.prod(shape) for kind, shape in tensors.values())


def _mapped(path: Path, memory: mmap.mmap, begin: int, rows: int, width: int, dtype: str) -> FeatureFile:
    keys, labels = (np.frombuffer(memory, np.int64, rows, at) for at in (begin, begin + 8 * rows))
    features = np.frombuffer(memory, dtype, rows * width, begin + 16 * rows)
    return FeatureFile(path, memory, keys, labels, features.reshape(rows, width))
