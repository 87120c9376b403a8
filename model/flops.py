"""How much arithmetic a network asks for."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model.build import build_network
from vitscale.model.config import ArchitectureConfig, Size


@lru_cache(maxsize=64)
def forward_macs(config: Any, size: Size | None = None) -> int:
    """Multiply-adds of the forward pass of one image of `size` in px (default: `config.img_size`).

    Matrix products and convolutions, as torch counts them while the network runs without memory or values. Biases,
    norms, softmax, GELU, residuals, Fourier transforms and the interpolation of positions are not counted. (timm's
    tables, by fvcore, add 5 operations an element for every layer norm: 0.1% of B/16.)
    """
    if size is not None:  # else the resizing of positions would count
        config = replace(config, img_size=size)
    with torch.device("meta"), torch.no_grad():
        network = build_network(config, seed=None).eval()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, *config.height_width))
    return counter.get_total_flops() // 2


def parameters(config: ArchitectureConfig) -> int:
    """Learnt numbers of a network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(config, seed=None).parameters())


def training_flops(config: ArchitectureConfig, size: Size | None = None) -> int:
    """Floating-point operations of training on one image: 2 to a multiply-add, 3 forward passes' worth.

    A backward pass costs two forward passes: gradients of inputs and of weights. What is computed a second time to
    save memory does not count, so that a share of the device's peak (MFU) is one of useful work: Chowdhery et al. 2022
    (PaLM, arXiv:2204.02311), appendix B.
    """
    return 3 * 2 * forward_macs(config, size)
