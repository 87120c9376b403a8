"""Writing what other projects load: their tensors under their names, and their descriptions beside them."""

import json
from pathlib import Path

import torch

from vitscale.data_prep.publish import publish_text
from vitscale.model.interop import View, described, exported
from vitscale.pipeline.tensor_file import write_safetensors
from vitscale.pipeline.weights import Trained


def write_layout(layout: str, trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and JSON files in a layout of `vitscale.model.interop`.

    Raises `UserError` if that has no architecture like it, and OSError.
    """
    view = View(trained.preprocess.crop, trained.preprocess.mean, trained.preprocess.std)
    files = described(layout, trained.model, trained.classes, view)
    theirs = exported(layout, trained.model, trained.open())
    write_safetensors(folder / "model.safetensors", theirs.shapes, theirs.read, dtype, {"format": "pt"})
    for name, content in files.items():
        publish_text(folder / name, json.dumps(content, indent=1))
