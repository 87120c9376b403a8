"""The export that vitscale itself reads: `model.safetensors` and `config.json`."""

import json
from pathlib import Path

import torch
from torch import Tensor

from vitscale.data_prep.publish import publish_text
from vitscale.pipeline.formats.check import read_back
from vitscale.pipeline.run_folder import versions
from vitscale.pipeline.tensor_file import write_safetensors
from vitscale.pipeline.weights import EXPORT_FORMAT, Trained, describe

LOADING = """import vitscale

classifier = vitscale.load("FOLDER")
print(classifier.predict(["image.jpg"]))"""


def write(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, architecture, preprocessing, classes and origin. Raises OSError."""
    tensors = trained.open()
    write_safetensors(folder / "model.safetensors", tensors.shapes, tensors.read, dtype, {"format": "pt"})
    description = describe(trained.model, trained.classes, trained.preprocess)
    config = {"format": EXPORT_FORMAT, **description, "origin": trained.origin, "versions": versions()}
    publish_text(folder / "config.json", json.dumps(config, indent=1))


def logits(folder: Path, images: Tensor) -> tuple[Tensor, str]:
    """Logits (B, K) of what was written, read back as float32."""
    return read_back(folder, images), "vitscale"
