"""Initial weights as pure functions of the seed and of each parameter's name and shape."""

import hashlib
import math

import torch
from torch import Tensor, nn


def initial_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole of one parameter of a Vision Transformer in float32 on the CPU, as in the paper's own code.

    Xavier uniform for the dense layers of the encoder, with query, key and value taken as three layers; MLP biases
    N(0, 1e-6); positions N(0, 0.02); LeCun normal for the patches and the hidden layer of the head; all else zero
    (class token, classifier, other biases) or one (norm scales): google-research/vision_transformer,
    `vit_jax/models_vit.py`.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    weight = torch.zeros(shape, dtype=torch.float32, device="cpu")
    fan_in = math.prod(shape[1:])
    if name == "pos_embed":
        return weight.normal_(std=0.02, generator=generator)
    if name.endswith("qkv.weight"):
        bound = math.sqrt(6 / (2 * fan_in))
        return weight.uniform_(-bound, bound, generator=generator)
    if name.startswith("blocks.") and len(shape) == 2:
        bound = math.sqrt(6 / (fan_in + shape[0]))
        return weight.uniform_(-bound, bound, generator=generator)
    if name.startswith("blocks.") and ".mlp." in name:
        return weight.normal_(std=1e-6, generator=generator)
    if name in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
        std = lecun_std(fan_in)
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return weight.fill_(1.0)
    return weight


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter of a model its `initial_weight`; those on the meta device, which hold none, are left out."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial_weight(name, tuple(parameter.shape), seed))


def lecun_std(fan_in: int) -> float:
    """Deviation to give a normal cut at two deviations so that the result has variance 1 / fan_in (as in JAX)."""
    return math.sqrt(1 / fan_in) / 0.87962566103423978
