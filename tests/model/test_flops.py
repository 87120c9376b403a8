"""Counted arithmetic against published tables, and against what torch counts while the network runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model.config import ViTConfig
from vitscale.model.flops import forward_macs, training_flops
from vitscale.model.registry import ModelConfig
from vitscale.model.vit import VisionTransformer


@pytest.mark.parametrize(
    ("name", "gmacs", "digits"),
    [
        ("vit_tiny_patch16_224", 1.26, 2),
        ("vit_small_patch16_224", 4.61, 2),
        ("vit_base_patch16_224", 17.58, 2),
        ("vit_large_patch16_224", 61.60, 2),
        ("vit_huge_patch14_224", 167.4, 1),
    ],
)
def test_published_counts(name: str, gmacs: float, digits: int) -> None:
    """timm's table counts (by fvcore) 5 operations for each element of every layer norm as well; to the last digit."""
    config = ModelConfig(name).resolve(1000)
    norms = (2 * config.depth + 1) * (config.patches + 1) * config.width
    assert round((forward_macs(config) + 5 * norms) / 1e9, digits) == gmacs
    assert forward_macs(config) == pytest.approx(gmacs * 1e9, rel=0.006)  # norms are 0.5% of the smallest


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(img_size=32, patch_size=8, depth=2, width=24, mlp_width=40, heads=3, num_classes=7),
        ViTConfig(img_size=30, patch_size=6, depth=3, width=16, mlp_width=64, heads=2, num_classes=5, pre_logits=True),
        ViTConfig(img_size=14, patch_size=14, depth=1, width=8, mlp_width=8, heads=1, num_classes=1, dropout=0.1),
    ],
)
def test_torch_counts_the_same(config: ViTConfig) -> None:
    """Forward exactly; backward twice that, but for the first layer, whose input needs no gradient."""
    network, batch = VisionTransformer(config), 3
    images = torch.randn(batch, 3, *config.height_width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = network(images)
    assert forward.get_total_flops() == 2 * batch * forward_macs(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        network(images).sum().backward()
    embedding = 2 * batch * config.patches * 3 * config.patch_size**2 * config.width
    assert both.get_total_flops() == batch * training_flops(config) - embedding
    assert logits.shape == (batch, config.num_classes)


def test_another_resolution() -> None:
    """B/16 at 384 px takes 55.54 GMACs in timm's table, norms as above."""
    config = ModelConfig("vit_base_patch16_224").resolve(1000)
    at_384 = ModelConfig("vit_base_patch16_384").resolve(1000)
    assert forward_macs(config, 384) == forward_macs(at_384)
    norms = 25 * (24**2 + 1) * 768
    assert round((forward_macs(at_384) + 5 * norms) / 1e9, 2) == 55.54
