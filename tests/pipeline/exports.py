"""Exports of small networks with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vitscale.model.config import ViTConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.weights import describe


def write_export(folder: Path, classes: list[str], seed: int = 0, spoilt: bool = False) -> Path:
    """A network for images of 32 px; `spoilt`: some of its weights are so large that its logits are no numbers."""
    folder.mkdir(parents=True)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "width": 16, "mlp_width": 32, "heads": 2}
    model = ViTConfig(**sizes, num_classes=len(classes))
    state = VisionTransformer(model, seed=1).state_dict()
    state["head.weight"] = torch.randn(state["head.weight"].shape, generator=torch.Generator().manual_seed(seed))
    if spoilt:
        state["norm.bias"][3:] = 3e38
    save_file(state, folder / "model.safetensors")
    described = describe(model, classes, Preprocess(32, 1.0))
    (folder / "config.json").write_text(json.dumps({"format": 1, **described, "origin": {"step": 5}}))
    return folder
