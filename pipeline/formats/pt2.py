"""A graph that PyTorch runs without our code: `torch.export.load`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.model.network import Network
from vitscale.pipeline.formats.capture import capture, check_size, exporting

FILE = "model.pt2"
LOADING = f"""import torch

program = torch.export.load("FOLDER/{FILE}")
# for a GPU: from torch.export.passes import move_to_device_pass; program = move_to_device_pass(program, "cuda")
logits = program.module()(images)  # float32 (B, 3, Y, X), normalised"""


def check(config: Any, dtype: torch.dtype, dynamic_size: bool) -> None:
    """Raise `UserError` if `write` would refuse a network of that configuration."""
    check_size(config, dynamic_size)


def write(network: Network, folder: Path, dtype: torch.dtype, dynamic_size: bool) -> None:
    """Write the graph that `capture` makes. Raises `UserError` as that does, and OSError."""
    program = capture(network, dtype, dynamic_size)
    with exporting():
        torch.export.save(program, folder / FILE)


@torch.no_grad()
def logits(folder: Path, images: Tensor) -> tuple[Tensor, str]:
    """Logits (B, K) of normalised float32 images by what was written, and what computed them."""
    with exporting():
        classifier = torch.export.load(folder / FILE).module()
        return classifier(images), f"torch {torch.__version__}"
