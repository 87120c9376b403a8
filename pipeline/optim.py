"""Optimizers and the groups of parameters that they treat alike."""

import torch
from torch import nn

from vitscale.pipeline.config import OptimConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight, besides its count of steps


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels decay; norms, biases, positions and the class token do not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    spared = {name for name, p in named if p.ndim < 2 or name.endswith(("pos_embed", "cls_token"))}
    return [
        {"params": [p for name, p in named if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, at learning rate 0: the loop sets the rate before every step."""
    groups = parameter_groups(module, config.weight_decay)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=device.type == "cuda")
