"""Low-rank changes of linear layers (LoRA, Hu et al. 2021, arXiv:2106.09685).

Our own: peft would bring transformers and accelerate, rename parameters, and hold whole models to add matrices up.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.model.initial import Rules
from vitscale.model.interop.maps import Tensors
from vitscale.model.layers import Block
from vitscale.model.network import Network

DOWN, UP = ".lora_a", ".lora_b"  # ends of names

# The paper's code (microsoft/LoRA, `loralib/layers.py`): Kaiming uniform with a = √5, so within 1 / √inputs; B is zero
RULES: Rules = ((r"\.lora_a$", lambda weight, generator: _uniform(weight, weight.shape[1] ** -0.5, generator)),)


def _uniform(weight: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return weight.uniform_(-bound, bound, generator=generator)


class LoraLinear(nn.Linear):
    """A linear layer with `scale` times `lora_b` (out, r) `lora_a` (r, in) added to its weight: (…, in) → (…, out)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rank: int, scale: float) -> None:
        super().__init__(inputs, outputs, bias)
        self.scale = scale
        self.lora_a = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.weight, self.bias) + low * self.scale


def add_lora(network: Network, rank: int, alpha: float, on: str) -> None:
    """Swap the layers of `targets` for a `LoraLinear` each, of scale `alpha / rank`. Other names stay as they are."""
    for parent, name, linear in list(targets(network, on)):
        bias = linear.bias is not None
        setattr(parent, name, LoraLinear(linear.in_features, linear.out_features, bias, rank, alpha / rank))


def targets(network: Network, on: str) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of its blocks, of `attention` or `all`, each with the module it is of and its name there."""
    for block in network.modules():
        for place, module in block.named_modules() if isinstance(block, Block) else ():
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and (on == "all" or place == "attn"):
                    yield module, name, child


def added_up(tensors: Tensors, alpha: float) -> Tensors:
    """The tensors of a plain network: in place of each A and B, `alpha / r` times B A is added to the weight.

    Raises `ValueError` if one of them is missing or does not fit the weight, or if `alpha` is no number above 0.
    """
    shapes = {name: shape for name, shape in tensors.shapes.items() if not name.endswith((DOWN, UP))}
    changed = {name.removesuffix(DOWN) for name in tensors.shapes if name.endswith(DOWN)}
    changed |= {name.removesuffix(UP) for name in tensors.shapes if name.endswith(UP)}
    if changed and not 0 < alpha < math.inf:
        raise ValueError(f"{len(changed)} layers with matrices, and an alpha of {alpha}")
    for name in sorted(changed):
        down, up, weight = (tensors.shapes.get(name + end) for end in (DOWN, UP, ".weight"))
        fits = down and up and weight and len(down) == len(up) == 2 and down[0] == up[1]
        if not fits or (up[0], down[1]) != tuple(weight):
            raise ValueError(f"{name} of shape {weight} with matrices of {down} and {up}")

    def read(name: str) -> Tensor:
        weight, layer = tensors.read(name), name.removesuffix(".weight")
        if layer == name or layer not in changed:
            return weight
        down, up = tensors.read(layer + DOWN), tensors.read(layer + UP)
        return torch.addmm(weight, up, down, alpha=alpha / len(down))

    return Tensors(shapes, read)
