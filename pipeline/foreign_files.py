"""Files of weights that others wrote: opened tensor by tensor, and never trusted.

Nothing in them is executed, memory is bounded by their size on disk, and what is damaged is a `UserError`.
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.interop import Shape, Tensors
from vitscale.model.interop.timm import unwrapped
from vitscale.pipeline.mirror import fetch, names
from vitscale.pipeline.tensor_file import TensorFile

PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".npz", *PICKLES)
MOST_JSON = 16 << 20  # bytes of a description; the names of ImageNet-21k are three million
MOST_DENSE = 16  # bytes of arrays for each byte of their file: trained weights compress to no less than a half
SMALL = 1 << 20  # bytes of arrays that any file may hold


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises `UserError`."""
    with _reading(path, setting, "a description in JSON"):
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes of JSON")
        described = json.loads(path.read_text("utf-8"))
        if not isinstance(described, dict):
            raise ValueError("no mapping in it")
        return described


def open_file(path: Path, setting: str) -> Tensors:
    """The tensors of a file of one of `SUFFIXES`, in float32. Raises `UserError`, also where one is read."""
    kind = "safetensors" if path.suffix == ".safetensors" else "npz" if path.suffix == ".npz" else "pickle"
    expected = {
        "safetensors": "a whole safetensors file",
        "npz": "an .npz file of plain arrays",
        "pickle": "a file of torch.save with tensors and plain values alone",
    }[kind]
    with _reading(path, setting, expected):
        opened = {"safetensors": _open_safetensors, "npz": _open_npz, "pickle": _open_pickle}[kind](path)

    def read(name: str) -> Tensor:
        with _reading(path, setting, expected):
            return opened.read(name)

    return Tensors(opened.shapes, read)


def open_shards(index: Path, setting: str) -> Tensors:
    """The tensors of the files beside an index of them, as transformers writes it. Raises `UserError`."""
    placed = read_json(index, setting).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(setting, f"{index}: no weight_map in it", "an index of transformers", "Fetch the folder again.")
    for file in set(map(str, placed.values())):
        if Path(file).name != file or not file.endswith(SUFFIXES) or file.startswith("."):
            raise UserError(setting, f"{index}, which names {file!r}", "files beside it", "Do not trust this folder.")
    beside = names(index.parent)
    opened: dict[str, Tensors] = {}
    for file in sorted(set(map(str, placed.values()))):
        if file not in beside:
            raise UserError(setting, f"{index.parent} without {file}", "all files of its index", "Fetch it again.")
        fetch(index.parent / file)
        opened[file] = open_file(index.parent / file, setting)
    missing = [name for name, file in placed.items() if name not in opened[str(file)].shapes]
    if missing:
        got = f"{placed[missing[0]]} without {missing[0]}"
        raise UserError(setting, f"{index.parent}: {got}", "the tensors of its index", "Fetch the folder again.")
    shapes = {name: opened[str(file)].shapes[name] for name, file in placed.items()}
    return Tensors(shapes, lambda name: opened[str(placed[name])].read(name))


@contextmanager
def _reading(path: Path, setting: str, expected: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever kind a library that parses such a file may raise
        remedy = "Fetch it again, or convert it to safetensors where it comes from."
        raise UserError(setting, f"{path}: {_reason(error)}", expected, remedy) from error


def _reason(error: Exception) -> str:
    """In short why a file cannot be read. Torch's own advice, to trust the file, is left out."""
    said = " ".join(str(error).split())
    if code := re.search(r"GLOBAL ([\w.]+)", said):
        return f"it calls for {code[1]}, which may run anything; nothing was run"
    said = said.split("WeightsUnpickler error: ")[-1].split(" Check the documentation")[0].split(" In PyTorch ")[0]
    return f"{type(error).__name__} {said[:200]}".strip()


def _open_safetensors(path: Path) -> Tensors:
    file = TensorFile(path)
    return Tensors(file.shapes, lambda name: file.read(name).to(torch.float32))


def _open_pickle(path: Path) -> Tensors:
    # the options of a training script are often saved beside its weights, and do nothing
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that are then refused
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    tensors = unwrapped(state)
    for name, tensor in tensors.items():
        _require_own_memory(name, tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Tensors(shapes, lambda name: tensors[name].detach().to(torch.float32))


def _require_own_memory(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for what is no plain tensor, or repeats its memory to claim a size."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{name} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} has {tensor.untyped_storage().nbytes()} bytes")


def _open_npz(path: Path) -> Tensors:
    archive = zipfile.ZipFile(path)
    shapes: dict[str, Shape] = {}
    declared = 0
    for info in archive.infolist():
        with archive.open(info) as file:
            shape, dtype, start = _npy_header(file)
        name, size = info.filename.removesuffix(".npy"), int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject or (dtype.kind not in "fiu" and dtype != _BFLOAT16):
            raise ValueError(f"{name} is of {dtype}, not of numbers")
        if info.file_size != start + size:
            raise ValueError(f"{name} of shape {shape} has {info.file_size} bytes")
        shapes[name] = shape
        declared += size
    if declared > SMALL + MOST_DENSE * path.stat().st_size:
        raise ValueError(f"{declared} bytes of arrays in a file of {path.stat().st_size}")
    return Tensors(shapes, lambda name: _read_npy(archive, f"{name}.npy"))


_BFLOAT16 = np.dtype("V2")  # as numpy saves what it does not know


def _npy_header(file: IO[bytes]) -> tuple[Shape, np.dtype, int]:
    """Shape and dtype of an array in a file, and where it starts. Raises `ValueError`."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return tuple(shape), dtype, file.tell()


def _read_npy(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(torch.float32)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
