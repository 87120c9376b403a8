"""Where a model's states are kept, and how DeepSpeed moves them: chosen from the model, the ranks and the memory."""

from dataclasses import dataclass
from typing import Any

from vitscale.pipeline.config import EngineConfig, OptimConfig, merge

BUCKET, BUCKETS = 500_000_000, 8  # elements: DeepSpeed's default at most; pieces that overlap with the backward pass
CPU_BUCKET = 1 << 21  # elements: larger ones are new pages each time, which cost more than they save
FULL = 0.6  # share of a GPU's memory that states may take; the rest is for activations and buckets


@dataclass(frozen=True)
class States:
    """Bytes per parameter of what training keeps: `kept` float32 numbers besides the weight (moments, average).

    Of all parameters so many are `frozen`: of those there is the weight that the network computes with alone.
    """

    dtype: str
    kept: int
    frozen: int = 0

    @property
    def working(self) -> int:
        """Bytes of a weight, and of its gradient, as the network computes with it."""
        return 4 if self.dtype == "fp32" else 2

    def bytes_a_rank(self, parameters: int, stage: int, ranks: int) -> float:
        """Bytes on each rank (Rajbhandari et al. 2020, section 3; stages 1 to 3 keep float32 masters in any dtype)."""
        weights, gradients, kept = self.working, self.working, 4 * self.kept + (4 if stage else 0)
        kept = kept / ranks if stage >= 1 else kept
        gradients = gradients / ranks if stage >= 2 else gradients
        weights = weights / ranks if stage >= 3 else weights
        return parameters * weights + (parameters - self.frozen) * (gradients + kept)

    def on_device(self, parameters: int, stage: int, ranks: int, offload: str) -> float:
        """The part of `bytes_a_rank` that stays on the device where `offload` moves the rest to the host's memory."""
        states = 0 if offload == "none" else 4 * (1 + self.kept) * (parameters - self.frozen)
        weights = self.working * parameters if offload == "all" else 0
        return self.bytes_a_rank(parameters, stage, ranks) - (states + weights) / ranks


@dataclass(frozen=True)
class Placement:
    """Elements of a communication bucket, whether it overlaps with computing, what the host's memory holds (`none`, the
    `optimizer` state or `all`), whether the devices are GPUs, and why."""

    bucket: int
    overlap: bool
    offload: str
    cuda: bool
    why: str


def place(config: EngineConfig, parameters: int, ranks: int, states: States, memory: int | None) -> Placement:
    """The placement of a model of so many parameters on GPUs of `memory` bytes each, or on CPUs (None).

    `engine.offload` decides where it is not `auto`; at stage 0, which has no partitions, nothing is moved.
    """
    stage = config.zero_stage
    overlap = memory is not None and ranks > 1 and stage > 0
    trained = parameters - states.frozen
    size = trained // BUCKETS if overlap else trained
    most = CPU_BUCKET if memory is None else BUCKET
    bucket = min(most, max(2, -(-size // 1024) * 1024))  # DeepSpeed asks for an even number
    need = states.bytes_a_rank(parameters, stage, ranks)
    offload, reason = config.offload, "as engine.offload says"
    if offload == "auto":
        offload, reason = "none", "on CPUs there is nowhere to move them" if memory is None else ""
        if memory is not None:
            moved = states.on_device(parameters, stage, ranks, "optimizer")
            fits = need <= FULL * memory
            offload = "none" if fits or stage == 0 else "optimizer" if moved <= FULL * memory else "all"
            offload = "optimizer" if offload == "all" and stage < 3 else offload
            reason = f"{need / 1e9:.1f} GB of {memory / 1e9:.0f} GB on each GPU"
    where = {"none": "all states stay on the device", "optimizer": "the optimizer's state is in the host's memory",
             "all": "parameters and the optimizer's state are in the host's memory"}[offload]  # fmt: skip
    how = "overlapping with the backward pass" if overlap else "one after the other"
    why = (
        f"{parameters:,} parameters{f', of which {trained:,} are trained' if states.frozen else ''},"
        f" {need / 1e9:,.2g} GB of states a rank: {where} ({reason});"
        f" buckets of {bucket:,} elements, {how}"
    )
    return Placement(bucket, overlap, offload, memory is not None, why)


def deepspeed_config(
    config: EngineConfig, optim: OptimConfig, accumulation: int, placement: Placement
) -> dict[str, Any]:
    """DeepSpeed's configuration; `engine.deepspeed` overrides any of it."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": placement.bucket,
        "allgather_bucket_size": placement.bucket,
        "overlap_comm": placement.overlap,
        "reduce_scatter": placement.cuda,  # gloo reduces whole buckets in any case, and without it copies less
    }
    if placement.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": placement.cuda}
    if placement.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": placement.cuda}
    ours = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip if config.zero_stage else 0.0,
        # without the check a gradient that is not finite would be stepped into
        "bf16": {"enabled": config.dtype == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": config.dtype == "fp16", "loss_scale": 0},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # what they are equal to is tested here
        "zero_force_ds_cpu_optimizer": False,
    }
    return merge(ours, config.deepspeed)
