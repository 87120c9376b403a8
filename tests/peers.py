"""Other projects' implementations, for tests and benchmarks to compare with."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

APART = Path(sys.prefix) / "peers"  # where the Makefile installs them


@cache
def import_timm() -> Any:
    """The module timm, which imports torchvision.

    Beside a torch without CUDA, torchvision's compiled part does not load; its import needs no more of that than the
    declaration of two operators. Other libraries that find torchvision would fail, so that it lies apart.
    """
    if APART.is_dir() and str(APART) not in sys.path:
        sys.path.append(str(APART))
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # which it has to outlive
    import timm  # pyright: ignore[reportMissingImports]

    return timm


_kept: list[Any] = []
