"""What of a network an image passes by in a step of training: branches (stochastic depth), and patches of its own.

Pure functions of (seed, epoch, sample key): neither the rank nor a row's place in its batch counts.
"""

from functools import lru_cache

import torch
from torch import Tensor

from vitscale.pipeline.data.device_augment import DROP_PATH, PATCH_DROP, uniforms


def keep_factors(seed: int, rate: float, blocks: int, key: Tensor, epoch: Tensor) -> Tensor:
    """Factors of the two branches of each block, float32 (L, 2, B), for samples of these `key` (B,) and `epoch` (B,).

    A branch is dropped (0) with the probability of its block, which rises linearly from 0 at the first to `rate` at the
    last (Huang et al. 2016, section 3; DeiT), and kept ones are raised to leave the mean as it is. Each image and each
    branch is drawn on its own, as in timm. The same bits on any device.
    """
    draws_L2B = uniforms(seed, DROP_PATH, key, epoch, 2 * blocks).unflatten(1, (blocks, 2)).permute(1, 2, 0)
    rates_L11, raised_L11 = _rates(rate, blocks, key.device)
    return (draws_L2B >= rates_L11) * raised_L11


def kept_patches(seed: int, rate: float, patches: int, key: Tensor, epoch: Tensor) -> Tensor:
    """Numbers (B, M) of the patches that are kept where a share `rate` of all is dropped, at least one, in their order.

    Each set of M is as likely as any other (patch dropout; Liu et al. 2022, arXiv:2208.07220; FLIP, Li et al. 2023).
    """
    count = max(1, round(patches * (1 - rate)))
    draws_BN = uniforms(seed, PATCH_DROP, key, epoch, patches)
    return draws_BN.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


@lru_cache(maxsize=8)
def _rates(rate: float, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rate of each block in float64, and the factor of its kept branches in float32: (L, 1, 1)."""
    rates = [rate * block / max(blocks - 1, 1) for block in range(blocks)]
    raised = torch.tensor([1 / (1 - one) for one in rates], dtype=torch.float32, device=device)
    return torch.tensor(rates, dtype=torch.float64, device=device)[:, None, None], raised[:, None, None]
