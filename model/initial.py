"""Initial weights as pure functions of the seed and of each parameter's name and shape."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator], Tensor]  # fills a tensor and returns it
Rules = Sequence[tuple[str, Draw]]  # the first whose pattern is found in a parameter's name holds; without one: zeros


def initial_weight(name: str, shape: tuple[int, ...], seed: int, rules: Rules) -> Tensor:
    """The whole of one parameter in float32 on the CPU, by the rules of its network."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    weight = torch.zeros(shape, dtype=torch.float32, device="cpu")
    draw = next((draw for pattern, draw in rules if re.search(pattern, name)), None)
    return weight if draw is None else draw(weight, generator)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, rules: Rules) -> None:
    """Give every parameter of a model its `initial_weight`; those on the meta device, which hold none, are left out."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial_weight(name, tuple(parameter.shape), seed, rules))


def constant(value: float) -> Draw:
    """The same number everywhere."""
    return lambda weight, _: weight.fill_(value)


def normal(std: float) -> Draw:
    """A normal distribution around 0."""
    return lambda weight, generator: weight.normal_(std=std, generator=generator)


def truncated(std: float) -> Draw:
    """A normal distribution of this deviation cut at -2 and 2, which for the usual 0.02 is no cut (DeiT, Swin)."""
    return lambda weight, generator: nn.init.trunc_normal_(weight, std=std, generator=generator)


def xavier(parts: int = 1) -> Draw:
    """Glorot uniform, by numbers of inputs and outputs; of `parts` layers of as many outputs in one matrix."""

    def draw(weight: Tensor, generator: torch.Generator) -> Tensor:
        bound = math.sqrt(6 / (math.prod(weight.shape[1:]) + weight.shape[0] // parts))
        return weight.uniform_(-bound, bound, generator=generator)

    return draw


def lecun(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A normal distribution cut at two deviations, of variance 1 / inputs (as in JAX)."""
    std = math.sqrt(1 / math.prod(weight.shape[1:])) / 0.87962566103423978  # of a unit normal cut at two deviations
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def kaiming(weight: Tensor, generator: torch.Generator) -> Tensor:
    """He normal by outputs, for convolutions before a ReLU: variance 2 / (outputs × area of the kernel)."""
    return weight.normal_(std=math.sqrt(2 / (weight.shape[0] * math.prod(weight.shape[2:]))), generator=generator)
