"""Trained weights → folders to keep and to share, each checked against its source before it appears."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitscale.data_prep.publish import publish_text, sync_folder
from vitscale.errors import UserError
from vitscale.pipeline.config import require, require_choice
from vitscale.pipeline.formats.card import card, provenance
from vitscale.pipeline.formats.check import IMAGES, difference, fixed_images, streamed_logits
from vitscale.pipeline.weights import Tensors, Trained, open_trained

STREAMED = {"safetensors": "ours", "hf": "hugging_face", "timm": "timm"}  # modules of pipeline/formats
GRAPHS = {"onnx": "onnx", "pt2": "pt2"}  # these need the whole network
FORMATS = (*STREAMED, *GRAPHS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of logits, as a share of the largest logit (or of 1): the same network on the same weights differs
# by nothing; the same arithmetic in another order by some 1e-6; arithmetic in 16 bits by some 1e-2 in many layers.
EXACT, REORDERED, ROUGH = 0.0, 1e-4, 0.1


@dataclass(frozen=True)
class Exported:
    """One export: its folder, files, and the largest difference of logits that `reader` found on fixed images.

    `notes` are those of its source.
    """

    format: str
    folder: Path
    files: list[str]
    difference: float
    reader: str
    notes: list[str]


def export(
    source: str,
    out: str,
    formats: list[str] | None = None,
    *,
    weights: str = "auto",
    dtype: str = "float32",
    dynamic_size: bool = False,
    licence: str = "",
) -> list[Exported]:
    """Export the network at `source` (a run, a checkpoint, or another export) into the new folder `out`.

    One format is written into `out`, several each into a folder of its name within. `weights` as in `open_trained`;
    `dtype` is that of the weights, one of `DTYPES`; `dynamic_size` makes graphs for images of any size. Weights go
    through memory one tensor at a time, but for graphs.

    Before `out` appears, each export is read back, by the library that it is for where that is there, and its logits
    on fixed images are compared with those of the source's weights rounded to `dtype`. Raises `UserError` if `out`
    exists, if there is nothing to export, if a format cannot hold the network, or if logits differ.
    """
    chosen = list(dict.fromkeys(formats or ["safetensors"]))
    for name in chosen:
        require_choice("--format", name, FORMATS)
    require_choice("--dtype", dtype, DTYPES)
    graphs = [name for name in chosen if name in GRAPHS]
    require(not dynamic_size or bool(graphs), "--dynamic-size", ", ".join(chosen), "onnx or pt2", "Leave it out.")
    target = Path(out)
    if target.exists():
        raise UserError("OUT", f"{out}, which exists", "a new folder", "Choose another name, or remove it first.")
    trained = open_trained(source, "SOURCE", weights)
    for name in graphs:
        module_of(name).check(trained.model, DTYPES[dtype], dynamic_size)
    trained = replace(trained, origin={**trained.origin, **provenance(trained)})
    rounded = replace(trained, open=lambda: _rounded(trained.open(), DTYPES[dtype]))

    @cache
    def expected(height: int, width: int) -> Tensor:
        return streamed_logits(trained.model, rounded.open().read, fixed_images(height, width))

    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        done = []
        for name in chosen:
            folder = partial / name if len(chosen) > 1 else partial
            folder.mkdir(exist_ok=True)
            made = _export(rounded, expected, folder, name, DTYPES[dtype], dynamic_size, licence)
            done.append(replace(made, folder=target / name if len(chosen) > 1 else target))
        partial.rename(target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "OUT", f"{error} while writing {out}", "a folder that can be written", "Choose another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _export(
    trained: Trained,
    expected: Callable[[int, int], Tensor],
    folder: Path,
    name: str,
    dtype: torch.dtype,
    dynamic_size: bool,
    licence: str,
) -> Exported:
    """Write one format into an empty folder, check it, describe it, and sync all of it.

    `trained` has weights rounded to `dtype`, and `expected` are its logits on the fixed images of a height and width.
    """
    form, size, patch = module_of(name), trained.model.height_width, trained.model.patch_size
    more = patch if patch > 1 else 16
    sizes = [size, (size[0] + more, size[1] + 2 * more)] if dynamic_size and name in GRAPHS else [size]
    if name in GRAPHS:
        form.write(trained.load(), folder, dtype, dynamic_size)
    else:
        form.write(trained, folder, dtype)
    tolerance = EXACT if name == "safetensors" else REORDERED if dtype == torch.float32 else ROUGH
    found, reader = 0.0, ""
    for height, width in sizes:
        wanted = expected(height, width)
        got, reader = form.logits(folder, fixed_images(height, width))
        apart, largest = difference(got, wanted), max(wanted.abs().max().item(), 1.0)
        if not apart <= tolerance * largest:
            said = f"{name}: logits that differ from the source's by {apart:.1e}, of {largest:.1e}"
            raise UserError("--format", said, f"at most {tolerance * largest:.0e}", "Choose another format.")
        found = max(found, apart)
    told = f" of each of {len(sizes)} sizes" if len(sizes) > 1 else ""
    rows = {
        "format": name,
        "dtype": str(dtype).removeprefix("torch."),
        "largest difference of logits": f"{found:.1e} on {IMAGES} images{told}, read by {reader}",
        **{f"sha256 of {path.name}": _sha256(path) for path in sorted(folder.iterdir())},
    }
    if name == "hf" and size[0] != size[1]:
        rows["image processor"] = "of images of other shapes it cuts off more than vitscale does: it can do no other"
    publish_text(folder / "README.md", card(trained, licence, form.LOADING, rows))
    publish_text(folder / "export.json", json.dumps({**rows, "max_difference": found}, indent=1))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return Exported(name, folder, sorted(path.name for path in folder.iterdir()), found, reader, trained.notes)


def module_of(name: str) -> Any:
    """The module of a format, with `write` and `logits`; that of a graph has `check` too."""
    return import_module(f"vitscale.pipeline.formats.{(STREAMED | GRAPHS)[name]}")


def _rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    def read(name: str) -> Tensor:
        return tensors.read(name).to(dtype).float()

    return tensors if dtype == torch.float32 else Tensors(tensors.shapes, read)


def _sha256(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
