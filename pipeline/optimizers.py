"""Optimizers that torch does not have: Lion, LAMB, Muon, and Adafactor in the form that trained Vision Transformers.

They step parameters, or flat float32 tensors that hold ranges of several parameters, as ZeRO does. Lion treats every
element alike; LAMB needs to be told what a flat tensor holds (`Lamb.place`); Adafactor and Muon need whole parameters.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitscale.pipeline.distributed import sum_over_ranks

Group = dict[str, Any]  # a param group: settings by name, and `params`
State = dict[str, Tensor]  # of one tensor: moments by name, and `step`
FACTOR_FROM, DECAY_POWER, TINY = 32, 0.8, 1e-30  # Adafactor of google-research/big_vision, `big_vision/optax.py`
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Jordan et al. 2024, kellerjordan.github.io/posts/muon
MUON_RMS = 0.2  # root mean square of an AdamW update (Liu et al. 2025, arXiv:2502.16982, section 2.2)


class MomentOptimizer(torch.optim.Optimizer):
    """Steps what has a gradient, group by group. A subclass says what it keeps of a tensor and how it moves it.

    `step` in a tensor's state counts its steps, in float32 on the CPU, where it is read without waiting for a GPU.
    """

    def moments(self, tensor: Tensor, group: Group) -> State:
        """All that is kept of a tensor besides `step`, at zero."""
        raise NotImplementedError

    def advance(self, group: Group, tensors: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        """Move the tensors of a group and their states, whose `step` already counts this step."""
        raise NotImplementedError

    def begin(self, tensor: Tensor, group: Group, step: int = 0) -> None:
        """Give a tensor zero moments after `step` steps."""
        count = torch.tensor(float(step), dtype=torch.float32, device="cpu")
        self.state[tensor] = {"step": count, **self.moments(tensor, group)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step with the gradients at hand; `closure`, if any, computes them and the loss that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            for tensor in tensors:
                if not self.state[tensor]:
                    self.begin(tensor, group)
                self.state[tensor]["step"] += 1
            if tensors:
                gradients = [tensor.grad for tensor in tensors]
                self.advance(group, tensors, gradients, [self.state[tensor] for tensor in tensors])
        return loss


class Lion(MomentOptimizer):
    """The sign of an average of gradients, and decoupled decay (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

    def __init__(self, params: list[Group], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def moments(self, tensor: Tensor, group: Group) -> State:
        return {"exp_avg": torch.zeros_like(tensor)}

    def advance(self, group: Group, tensors: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        beta1, beta2 = group["betas"]
        averages = [state["exp_avg"] for state in states]
        updates = torch._foreach_lerp(averages, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(averages, gradients, 1 - beta2)
        decay_and_move(group, tensors, updates)


class Lamb(MomentOptimizer):
    """Adam's update, decayed and scaled to the norm of each parameter (You et al. 2020, arXiv:1904.00962, algorithm 2).

    As in timm and in apex's FusedLAMB, with which DeiT III was trained: with bias correction, the decay within the
    update, φ(x) = x, a ratio of 1 where either norm is 0, and none for spared groups (norms, biases, positions,
    tokens). Those two leave out whatever is not decayed; here matrices are scaled without a decay too, as in the paper.
    Clipping of the whole gradient is left to the caller.
    """

    def __init__(self, params: list[Group], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "spared": False})
        self._places: dict[Tensor, tuple[list[int], Tensor, int]] = {}

    def place(self, flat: Tensor, segments: list[tuple[int, int, int]], count: int) -> None:
        """Say what a flat tensor holds: this rank's ranges of `count` parameters, of which other ranks hold the rest.

        `segments`: (index of the parameter, offset in `flat`, elements). Where there are none there is padding, which
        counts for no parameter. All ranks place their tensors, and from then on step them in the same order. Raises
        `ValueError` for segments that overlap, that are beyond the tensor, or of a parameter beyond `count`.
        """
        sizes, owners, end = [], [], 0
        for index, offset, size in sorted((part for part in segments if part[2]), key=lambda part: part[1]):
            if offset < end or offset + size > len(flat) or not 0 <= index < count:
                raise ValueError(f"segment {(index, offset, size)} of {len(flat)} elements and {count} parameters")
            sizes += [offset - end, size]
            owners += [count, index]  # padding is of the parameter after the last
            end = offset + size
        sizes, owners = [*sizes, len(flat) - end], [*owners, count]
        kept = [i for i, size in enumerate(sizes) if size]
        index = torch.tensor([owners[i] for i in kept], device=flat.device)
        self._places[flat] = [sizes[i] for i in kept], index, count

    def moments(self, tensor: Tensor, group: Group) -> State:
        return {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}

    def advance(self, group: Group, tensors: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        updates = adam_updates(group, gradients, states)
        if group["weight_decay"]:
            torch._foreach_add_(updates, tensors, alpha=group["weight_decay"])
        if not group["spared"]:
            self._scale(tensors, updates)
        torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    def _scale(self, tensors: list[Tensor], updates: list[Tensor]) -> None:
        """Multiply each parameter's update by its trust ratio."""
        whole = [i for i, tensor in enumerate(tensors) if tensor not in self._places]
        if whole:
            own = [updates[i] for i in whole]
            squares_2P = squared_norms([tensors[i] for i in whole], own)
            torch._foreach_mul_(own, list(trust_ratios(squares_2P).unbind()))
        for tensor, update in zip(tensors, updates, strict=True):
            if tensor in self._places:
                sizes, index, count = self._places[tensor]
                parts = list(update.split(sizes))
                squares_2S = squared_norms(list(tensor.split(sizes)), parts)
                squares_2P = squares_2S.new_zeros(2, count + 1).index_add_(1, index, squares_2S)
                ratios = trust_ratios(sum_anywhere(squares_2P[:, :count].contiguous()))
                ratios = torch.cat([ratios, ratios.new_ones(1)])  # of the padding
                torch._foreach_mul_(parts, list(ratios[index].unbind()))


class Adafactor(MomentOptimizer):
    """Adafactor with momentum in 16 bits (Zhai et al. 2022, arXiv:2106.04560, section 3.4).

    As big_vision's `scale_by_adafactor`: second moments factored over the two largest dimensions where both are at
    least 32 (Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4), their decay 1 - step^-0.8 capped at the second of
    `betas`; no clipping, no relative step size, no scaling by the parameter. The decay is AdamW's, that is times `lr`:
    big_vision's `wd` is `lr` times this. The average is taken in float32, and kept in bfloat16.
    """

    def __init__(self, params: list[Group], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def moments(self, tensor: Tensor, group: Group) -> State:
        average = torch.zeros_like(tensor, dtype=torch.bfloat16)
        dims = factored_dims(tensor)
        if dims is None:
            return {"exp_avg": average, "exp_avg_sq": torch.zeros_like(tensor)}
        row, column = (tensor.new_zeros([1 if i == dim else n for i, n in enumerate(tensor.shape)]) for dim in dims)
        return {"exp_avg": average, "exp_avg_sq_row": row, "exp_avg_sq_col": column}

    def advance(self, group: Group, tensors: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        beta1, cap = group["betas"]
        updates = []
        for tensor, gradient, state in zip(tensors, gradients, states, strict=True):
            new = 1 - min(cap, 1 - float(state["step"]) ** -DECAY_POWER)  # weight of this step's squares
            squares, dims = gradient.square().add_(TINY), factored_dims(tensor)
            if dims is None:
                update = state["exp_avg_sq"].lerp_(squares, new).rsqrt().mul_(gradient)
            else:
                row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
                row.lerp_(squares.mean(dims[0], keepdim=True), new)
                column.lerp_(squares.mean(dims[1], keepdim=True), new)
                update = gradient * (row / row.mean(dims[1], keepdim=True)).rsqrt() * column.rsqrt()
            average = state["exp_avg"].float().lerp_(update, 1 - beta1)
            state["exp_avg"].copy_(average)
            updates.append(average)
        decay_and_move(group, tensors, updates)


class Muon(MomentOptimizer):
    """Orthogonalised momentum for matrices, AdamW for all else (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    `parts` of a group: of how many matrices, one below the other, each of its tensors consists (query, key and value:
    3); 0: AdamW. Nesterov momentum, and 5 Newton–Schulz iterations, in bfloat16 on GPUs. An update of R × C elements is
    scaled by 0.2 √max(R, C), to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one
    learning rate and one decay, AdamW's, serve both.
    """

    def __init__(self, params: list[Group], lr: float, momentum: float, betas: tuple[float, float], eps: float) -> None:
        adam = {"betas": betas, "eps": eps}
        super().__init__(params, {"lr": lr, "momentum": momentum, **adam, "weight_decay": 0.0, "parts": 0})

    def moments(self, tensor: Tensor, group: Group) -> State:
        keys = ("momentum_buffer",) if group["parts"] else ("exp_avg", "exp_avg_sq")
        return {key: torch.zeros_like(tensor) for key in keys}

    def advance(self, group: Group, tensors: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        if group["parts"] == 0:
            decay_and_move(group, tensors, adam_updates(group, gradients, states))
            return
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = []
        for ahead in torch._foreach_lerp(gradients, momenta, group["momentum"]):
            matrices_PRC = ahead.unflatten(0, (group["parts"], -1))
            scale = MUON_RMS * math.sqrt(max(matrices_PRC.shape[1:]))
            updates.append(orthogonalised(matrices_PRC).mul_(scale).flatten(0, 1))
        decay_and_move(group, tensors, updates)


def decay_and_move(group: Group, tensors: list[Tensor], updates: list[Tensor]) -> None:
    """Decoupled decay, then a step against the updates (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    if group["weight_decay"]:
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(tensors, updates, alpha=-group["lr"])


def adam_updates(group: Group, gradients: list[Tensor], states: list[State]) -> list[Tensor]:
    """m̂ / (√v̂ + ε) with bias correction (Kingma and Ba 2015, arXiv:1412.6980), after moving both moments."""
    beta1, beta2 = group["betas"]
    averages, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    steps = [float(state["step"]) for state in states]
    torch._foreach_lerp_(averages, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(denominators, group["eps"])
    updates = torch._foreach_div(averages, denominators)
    torch._foreach_div_(updates, [1 - beta1**step for step in steps])
    return list(updates)


def squared_norms(tensors: list[Tensor], updates: list[Tensor]) -> Tensor:
    """Squared norms of P tensors and of their updates, (2, P) in float64: sums of them over ranks lose nothing."""
    norms = [torch.stack(torch._foreach_norm(part)) for part in (tensors, updates)]
    return torch.stack(norms).double().square()


def trust_ratios(squares_2P: Tensor) -> Tensor:
    """‖w‖ / ‖update‖ in float32 from both squares, 1 where either is 0."""
    ratios = (squares_2P[0] / squares_2P[1]).sqrt()
    return torch.where((squares_2P > 0).all(dim=0), ratios, 1.0).float()


def sum_anywhere(values: Tensor) -> Tensor:
    """`sum_over_ranks` also of the host's memory where ranks talk through NCCL, which reaches that of GPUs alone."""
    if values.device.type == "cpu" and dist.is_initialized() and dist.get_backend() == "nccl":
        return sum_over_ranks(values.cuda()).cpu()
    return sum_over_ranks(values)


def factored_dims(tensor: Tensor) -> tuple[int, int] | None:
    """The largest and the second largest dimension (of equal ones the later is the larger); None if one is too small.

    Those of optax's `scale_by_factored_rms`. For dense layers and kernels they do not depend on the layout.
    """
    order = sorted(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
    return (order[-1], order[-2]) if tensor.ndim > 1 and tensor.shape[order[-2]] >= FACTOR_FROM else None


def orthogonalised(matrices_PRC: Tensor) -> Tensor:
    """About U Vᵀ for each U S Vᵀ: its singular values are brought to within some 0.3 of 1 by a quintic iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrices_PRC / (torch.linalg.vector_norm(matrices_PRC, dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller of both Gram matrices
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_PRC.dtype)
