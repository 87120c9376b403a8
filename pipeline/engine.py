"""Forward, backward and the optimizer step over all ranks, by DeepSpeed ZeRO. The sole deepspeed import.

A step takes the micro batches of this rank and returns sums over the global batch. The loss and its gradient are
normalised by the size of the global batch, whatever the number of ranks, micro batches and padded rows.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.errors import UserError
from vitscale.pipeline.config import EngineConfig, OptimConfig
from vitscale.pipeline.distributed import World, sum_over_ranks
from vitscale.pipeline.optim import STATE_KEYS, build_optimizer

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Fragment:
    """A range of a named parameter, flattened, that this rank holds in float32.

    `tensors` are 1-D views of the engine's own memory: `weight` and the optimizer's state. Reading them saves,
    writing into them restores.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    def narrow(self, low: int, high: int) -> "Fragment":
        """The part of this fragment from `low` to `high`, counted within it."""
        parts = {kind: tensor[low:high] for kind, tensor in self.tensors.items()}
        return Fragment(self.name, self.start + low, parts)


class Engine:
    """An objective under training: a module whose `forward(batch)` returns `(loss sum, {name: sum})`.

    The module starts with equal weights on every rank. `accumulation` is the number of micro batches of a step.
    """

    def __init__(
        self, objective: nn.Module, config: EngineConfig, optim: OptimConfig, world: World, accumulation: int
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else DeepSpeed guesses, and says so on every rank
        deepspeed = _import_deepspeed()
        self.world, self.stage, self.accumulation, self.clip = world, config.zero_stage, accumulation, optim.clip
        self.shapes = {name: tuple(p.shape) for name, p in objective.named_parameters()}
        objective.to(world.device)
        optimizer = build_optimizer(objective, optim, world.device)
        self._deepspeed, self.optimizer, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(config, optim, accumulation, sum(p.numel() for p in objective.parameters())),
            dist_init_required=False,
        )
        self._adam = getattr(self.optimizer, "optimizer", self.optimizer)  # beneath ZeRO's wrapper
        self.reset_optimizer(step=0)

    @property
    def objective(self) -> nn.Module:
        """The module, to be called by all ranks alike; at stage 3 its parameters are gathered in passing."""
        return self._deepspeed

    def train_step(self, batches: Iterable[Batch], global_batch: int, lr: float) -> dict[str, float]:
        """One optimizer step at learning rate `lr`; `batches` yields this rank's `accumulation` micro batches.

        Returns the metrics' sums over the global batch divided by its size, and `grad_norm` before clipping. Raises
        `UserError`, and leaves the weights as they were, if the loss or the gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.train()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            loss_sum, metrics = self._deepspeed(batch)
            # DeepSpeed averages gradients over ranks: the mean over the global batch is asked for
            self._deepspeed.backward(loss_sum * (self.world.size / global_batch), scale_wrt_gas=False)
            for name, value in {"loss": loss_sum, **metrics}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
            if i < self.accumulation - 1:
                self._deepspeed.step()  # only counts the micro batch
        totals = sum_over_ranks(torch.stack(list(sums.values()))).tolist()
        means = {name: total / global_batch for name, total in zip(sums, totals, strict=True)}
        _check_finite("loss", means["loss"])
        norm = self._clip() if self.stage == 0 else 0.0  # ZeRO clips its partitions in its step
        _check_finite("grad_norm", norm)
        self._deepspeed.step()
        if self.stage:
            norm = float(self._deepspeed.get_global_grad_norm())
            _check_finite("grad_norm", norm)  # DeepSpeed left the weights as they were
        return {**means, "grad_norm": norm}

    def _clip(self) -> float:
        """Norm of the whole gradient at stage 0, which is then cut to `optim.clip`."""
        gradients = [p for p in self._deepspeed.module.parameters() if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(gradients, self.clip or math.inf))

    def reset_optimizer(self, step: int) -> None:
        """Give every weight zero moments after `step` steps, as if the optimizer had begun there."""
        for flat in self._flat_tensors():
            counter = torch.tensor(float(step), device=flat.device if self._adam.defaults.get("fused") else "cpu")
            self._adam.state[flat] = {"step": counter, **{key: torch.zeros_like(flat) for key in STATE_KEYS}}

    def fragments(self) -> Iterator[Fragment]:
        """What this rank has to restore to resume: its partition, or all of every parameter at stage 0."""
        for name, parameter in self._deepspeed.module.named_parameters():
            if self.stage == 0:
                yield self._fragment(name, 0, parameter, 0, parameter.numel())
            elif self.stage == 3:
                yield from self._fragment_stage3(name, parameter)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                place = mapping.get_hp_fragment_address()
                yield self._fragment(name, mapping.lp_fragment_address.start, flat, place.start, place.numel)

    def owned_fragments(self) -> Iterator[Fragment]:
        """What this rank has to save, so that all ranks together save every weight once."""
        rank, size = self.world.rank, self.world.size
        for fragment in self.fragments():
            if self.stage == 0:
                count = fragment.tensors["weight"].numel()
                fragment = fragment.narrow(rank * count // size, (rank + 1) * count // size)
            if fragment.tensors["weight"].numel():
                yield fragment

    def _fragment(self, name: str, start: int, flat: Tensor, offset: int, count: int) -> Fragment:
        state = self._adam.state[flat]
        tensors = {"weight": flat, **{key: state[key] for key in STATE_KEYS}}
        views = {kind: tensor.detach().view(-1)[offset : offset + count] for kind, tensor in tensors.items()}
        return Fragment(name, start, views)

    def _fragment_stage3(self, name: str, parameter: Any) -> Iterator[Fragment]:
        group, offset, partition = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = self.world.rank * partition
        count = min(partition, parameter.ds_numel - start)  # the last partition is padded
        if count > 0:
            yield self._fragment(name, start, self.optimizer.fp32_partitioned_groups_flat[group], offset, count)

    def _flat_tensors(self) -> list[Tensor]:
        """The tensors that the optimizer steps: whole parameters, or this rank's flat float32 partitions."""
        if self.stage == 0:
            return list(self._deepspeed.module.parameters())
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        remedy = "Lower optim.lr or lengthen schedule.warmup, in another run.dir."
        raise UserError(name, value, "a finite number; training stopped before this step", remedy)


def _import_deepspeed() -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # calls DeepSpeed makes
    # Its all-reduce for CPUs is compiled at every start, and leaves named shared memory behind a crash: use gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(config: EngineConfig, optim: OptimConfig, accumulation: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many parameters; `engine.deepspeed` overrides any of it.

    Buckets are no larger than the model: DeepSpeed's default of 500 million elements would reserve 2 GB for any.
    """
    bucket = min(500_000_000, -(-parameters // 1024) * 1024)  # DeepSpeed asks for an even number
    ours = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip if config.zero_stage else 0.0,
        "bf16": {"enabled": config.dtype == "bf16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    return merge(ours, config.deepspeed)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts merged key by key, `over` winning."""
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
