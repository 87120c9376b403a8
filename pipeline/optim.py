"""The groups of parameters that are treated alike, the optimizer over them, and what it keeps for each weight.

An optimizer's state of a tensor holds tensors (moments) and, in `step`, a count of steps. Torch's own is used where
there is one: Adam with decoupled decay, and SGD.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.pipeline.config import OptimConfig
from vitscale.pipeline.optimizers import Adafactor, Lamb, Lion, MomentOptimizer, Muon

BLOCK = re.compile(r"((layers|stages)\.\d+\.)?blocks\.\d+\.")  # of any network, not of the stem of one
INPUTS = ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token")  # what is added or put to the patches
UNDECAYED = (*INPUTS, "latent", "relative_position_bias_table")  # the last part of a name; latent: a pool's query


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of the trained parameters of an objective, whose network is its `model`; in each, in the order they come.

    Matrices and kernels first, which decay by `weight_decay`, the classifier by `head_weight_decay` where it is set;
    then the spared: norms, biases, positions and tokens. With `layer_decay` d, `lr_scale` is d^(depth + 1 - layer):
    layer 0 makes tokens of an image, i + 1 is the i-th block, depth + 1 all that comes after (Bao et al. 2021,
    arXiv:2106.08254, as in their code and MAE's). For Muon, the blocks' matrices are apart, with their `parts`.

    Each group has `params`, `name`, `weight_decay`, `lr_scale` and `spared`; no two are alike in all but `params`.
    """
    named = [(name.removeprefix("model."), p) for name, p in module.named_parameters() if p.requires_grad]
    layers, depth = layers_of([name.removeprefix("model.") for name, _ in module.named_parameters()])
    groups: dict[tuple[bool, float, float, int], dict[str, Any]] = {}
    for name, p in named:
        ndim = len(getattr(p, "ds_shape", p.shape))  # a parameter that ZeRO partitioned has lost its own shape
        spared = ndim < 2 or name.endswith(UNDECAYED)
        decay = 0.0 if spared else config.weight_decay
        if not spared and name.startswith("head") and config.head_weight_decay is not None:
            decay = config.head_weight_decay
        scale = config.layer_decay ** (depth + 1 - layers[name])
        parts = _parts(name, ndim) if config.name == "muon" else 0
        key = (spared, decay, scale, parts)
        if key not in groups:
            what = "spared" if spared else f"decayed by {decay:g}"
            what += f", {('', 'matrices', 'queries, keys and values')[min(parts, 2)]}" if parts else ""
            what += f", at {scale:.3g} of the rate" if scale < 1 else ""
            settings = {"weight_decay": decay, "lr_scale": scale, "spared": spared}
            groups[key] = {"params": [], "name": what, **settings, **({"parts": parts} if parts else {})}
        groups[key]["params"].append(p)
    return sorted(groups.values(), key=lambda group: group["spared"])


def layers_of(names: list[str]) -> tuple[dict[str, int], int]:
    """The layer of each parameter of a network, from 0 (before the blocks) to depth + 1 (after them), and the depth.

    What lies between two blocks, as where a Swin merges patches, is of the layer of the second.
    """
    blocks = list(dict.fromkeys(block[0] for name in names if (block := BLOCK.match(name))))
    numbers = {block: number for number, block in enumerate(blocks, 1)}
    layers = {}
    for name in names:
        block, stage = BLOCK.match(name), re.match(r"(layers|stages)\.\d+\.", name)
        if block:
            layers[name] = numbers[block[0]]
        elif stage:
            layers[name] = next(number for found, number in numbers.items() if found.startswith(stage[0]))
        else:
            layers[name] = 0 if name.startswith(("patch_embed.", "stem.", "norm_pre.", *INPUTS)) else len(blocks) + 1
    return layers, len(blocks)


def _parts(name: str, ndim: int) -> int:
    """Of how many matrices a parameter of the network consists that Muon is for; 0 if it is not.

    Query, key and value are better orthogonalised apart than as the one matrix they lie in (Jordan et al. 2024).
    """
    if ndim != 2 or not BLOCK.match(name):
        return 0
    return 3 if name.endswith("qkv.weight") else 1


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`, at learning rate 0: the loop sets each group's rate before every step.

    torch's are fused: on two CPU cores six times as fast as loops over tensors. `momentum` is that of `sgd` and `muon`;
    the latter uses the betas and `eps` for what is not a matrix of a block. For `adafactor`, `beta1` is the momentum
    and `beta2` the cap of the second moments' decay. The decay of `sgd` is torch's, added to the gradient, as its
    recipes have it; of all others it is decoupled, but of `lamb`, where it is part of what is scaled.
    """
    groups = parameter_groups(module, config)
    betas = (config.beta1, config.beta2)
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        case "lion":
            return Lion(groups, lr=0.0, betas=betas)
        case "lamb":
            return Lamb(groups, lr=0.0, betas=betas, eps=config.eps)
        case "adafactor":
            return Adafactor(groups, lr=0.0, betas=betas)
        case "muon":
            return Muon(groups, lr=0.0, momentum=config.momentum, betas=betas, eps=config.eps)
    raise ValueError(f"optim.name {config.name!r} has no optimizer")


def fresh_state(optimizer: torch.optim.Optimizer, tensor: Tensor, step: int) -> None:
    """Give one tensor zero moments after `step` steps, as if the optimizer had begun there.

    `tensor` is a parameter of the optimizer, or a flat one that stands for parameters of its groups.
    """
    if isinstance(optimizer, MomentOptimizer):
        group = next((g for g in optimizer.param_groups if any(p is tensor for p in g["params"])), optimizer.defaults)
        optimizer.begin(tensor, group, step)
    elif isinstance(optimizer, torch.optim.SGD):  # counts no steps; zero momentum becomes the first gradient
        kept = {"momentum_buffer": torch.zeros_like(tensor)} if optimizer.defaults["momentum"] else {}
        optimizer.state[tensor] = kept
    else:
        count = torch.tensor(float(step), dtype=torch.float32, device=tensor.device)
        kept = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[tensor] = {"step": count, **kept}


def state_tensors(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for a tensor besides the count of steps: its own memory, to read and to write into."""
    return {key: value for key, value in optimizer.state[tensor].items() if key != "step"}
