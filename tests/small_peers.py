"""Small networks of transformers and timm with random weights, for tests to compare with."""

from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "image_size": 56, "patch_size": 4, "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4,
    "num_labels": 7,
}  # fmt: skip
DINOV2 = {**SIZES, "mlp_ratio": 4, "num_register_tokens": 3}
# name: class, class of its configuration, and that
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "intermediate_size": 96}),
    "vit_tanh": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SIZES, "intermediate_size": 96, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-5},
    ),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**SIZES, "intermediate_size": 96}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**SIZES, "intermediate_size": 96}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {k: v for k, v in DINOV2.items() if "regi" not in k}),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINOV2),
    "dinov2_swiglu": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**DINOV2, "use_swiglu_ffn": True},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 48, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3,
         "num_labels": 7},
    ),
}  # fmt: skip


def transformers_network(name: str) -> Any:
    """One of `TRANSFORMERS` in evaluation mode, with random weights; those of a DINOv2's head for patches are zero."""
    import transformers

    network, config, sizes = TRANSFORMERS[name]
    theirs = randomised(getattr(transformers, network)(getattr(transformers, config)(**sizes)))
    if name.startswith("dinov2"):
        with torch.no_grad():
            theirs.classifier.weight[:, sizes["hidden_size"] :] = 0
    return theirs


def randomised(network: Any, seed: int = 0) -> Any:
    """The network in evaluation mode with weights that leave nothing out: normal, factors of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(std=0.1, generator=generator)
            weight += float(name.endswith(("gamma", "lambda1")) or ("norm" in name and name.endswith("weight")))
    return network.eval()


def images(*sides: int, seed: int = 0) -> Tensor:
    """Two images of noise, of one side or two."""
    height, width = (*sides, *sides)[:2]
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def gradients(network: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of the sum of squares of logits by all parameters."""
    named = dict(network.named_parameters())
    found = torch.autograd.grad(logits.square().sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}
