"""What an export has to compute: the logits of its source on fixed images, one block in memory at a time."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.model.build import build_network
from vitscale.model.layers import Block
from vitscale.pipeline.weights import open_trained

IMAGES = 4


def fixed_images(height: int, width: int | None = None) -> Tensor:
    """The images of noise (4, 3, height, width) that exports are compared on; square ones without `width`."""
    return torch.randn(IMAGES, 3, height, width or height, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def streamed_logits(config: Any, read: Callable[[str], Tensor], images: Tensor) -> Tensor:
    """Logits (B, K) of a network of `config` whose weights are read by name when they are needed, and then let go.

    At any time a block's weights are in memory, and what lies before the first block and after the last.
    """
    with torch.device("meta"):
        network = build_network(config, seed=None).eval()
    inside: set[str] = set()
    for prefix, block in network.named_modules():
        if isinstance(block, Block):
            inside |= {f"{prefix}.{name}" for name, _ in block.named_parameters()}
            block.register_forward_pre_hook(lambda block, _, prefix=prefix: fill(block, f"{prefix}.", read))
            block.register_forward_hook(lambda block, *_: let_go(block))
    outside = [name for name, _ in network.named_parameters() if name not in inside]
    network.load_state_dict({name: read(name) for name in outside}, assign=True, strict=False)
    return network(images)


def read_back(folder: Path, images: Tensor) -> Tensor:
    """Logits (B, K) of an export, by our own reading of its files."""
    trained = open_trained(str(folder), "OUT")
    return streamed_logits(trained.model, trained.open().read, images)


def fill(module: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> None:
    """Give a module on the meta device its weights."""
    weights = {name: read(prefix + name) for name, _ in module.named_parameters()}
    module.load_state_dict(weights, assign=True)


def let_go(module: nn.Module) -> None:
    """Give the memory of a module's weights back to the system, which the C library would keep for later."""
    module.to_empty(device="meta")
    with suppress(AttributeError, OSError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference of logits; infinite where a number is not finite, or shapes differ."""
    if got.shape != expected.shape or not (got.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return (got.float() - expected.float()).abs().max().item()
