"""safetensors files, written and read one tensor in memory at a time."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PIECE = 1 << 24  # bytes written and hashed at a time, in which other threads go on
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class TensorFile:
    """A safetensors file, whose `shapes` are known and whose tensors are read when they are asked for.

    The library checks the file's header; reading is by plain reads, because pages of a mapped file that were once
    touched count as this process's memory. Raises `SafetensorError`, OSError, or `ValueError` for other types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt"):  # else it is not sound
            pass
        self._file = path.open("rb")
        (length,) = struct.unpack("<Q", self._file.read(8))
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        known = {name: dtype for dtype, name in DTYPES.items()}
        odd = {row["dtype"] for row in header.values()} - known.keys()
        if odd:
            raise ValueError(f"tensors of type {', '.join(sorted(odd))}")
        self.shapes = {name: tuple(row["shape"]) for name, row in header.items()}
        self._places = {
            name: (known[row["dtype"]], 8 + length + row["data_offsets"][0]) for name, row in header.items()
        }

    def read(self, name: str) -> Tensor:
        """A whole tensor, as it is stored."""
        return self.read_range(name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def read_range(self, name: str, low: int, high: int) -> Tensor:
        """Elements `low` to `high` of a flattened tensor."""
        dtype, begin = self._places[name]
        out = torch.empty(high - low, dtype=dtype)
        left = memoryview(out.view(torch.uint8).numpy()) if len(out) else memoryview(b"")
        at = begin + low * dtype.itemsize
        while left:
            count = os.preadv(self._file.fileno(), [left], at)
            if not count:
                raise OSError(f"{self.path} ends at {at} bytes, within {name}")
            left, at = left[count:], at + count
        return out


def file_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file of these tensors, in this order, begins with; a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Write tensors of these `shapes`, as `read` gives them one after the other, as a safetensors file, synced.

    They come in the order of `shapes`, from the host's memory, and are stored as `dtype`. Returns the file's bytes and
    sha256. Other threads go on meanwhile, and the file is not read again for its checksum; the library's own writer
    holds the interpreter's lock, and all tensors at once. Raises OSError.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: memoryview) -> None:
            for at in range(0, len(data), PIECE):
                file.write(data[at : at + PIECE])
                digest.update(data[at : at + PIECE])

        write(memoryview(file_header({name: (dtype, shape) for name, shape in shapes.items()}, metadata)))
        for name, shape in shapes.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
            if tensor.numel():
                flat = tensor.detach().to(dtype).contiguous().view(-1).view(torch.uint8)
                write(memoryview(flat.numpy()))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return size, digest.hexdigest()
