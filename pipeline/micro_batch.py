"""The largest micro batch that fits, found by trial, and what to say where memory ran out.

What fits is what an image takes (`activations`) in what is free on the device, but for what training keeps there
whatever the batch (`placement.States`), communication buckets, and a reserve.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from vitscale.errors import UserError
from vitscale.pipeline.activations import ROWS, Batch, bytes_an_image, free_memory
from vitscale.pipeline.config import STAGE_0_OPTIMIZERS, Config, FinetuneConfig
from vitscale.pipeline.console import say
from vitscale.pipeline.data import order
from vitscale.pipeline.distributed import World, agree, gather, launcher_place
from vitscale.pipeline.engine import model_states
from vitscale.pipeline.placement import Placement, States
from vitscale.pipeline.planner import Plan
from vitscale.pipeline.timing import DTYPES

RESERVE = {"cuda": 0.08, "cpu": 0.3}  # share of memory for gaps between tensors, libraries and copies of batches
FASTER = 1.05  # images a second that a larger micro batch has to bring on the CPU, as a ratio
LIVE = 1_000_000_000  # elements of gathered weights that DeepSpeed holds at a time at stage 3, by default

Make = Callable[[Plan], nn.Module]  # the objective of a plan, with any weights


# How much there is to take


@dataclass(frozen=True)
class Room:
    """Bytes that this rank may use on its device, and how many of them training keeps whatever the batch."""

    parameters: int
    states: States
    placement: Placement
    total: float
    fixed: float

    @property
    def left(self) -> float:
        """Bytes for images."""
        return self.total - self.fixed


def room(plan: Plan, world: World, make: Make) -> Room:
    """What there is on this rank's device, what this process holds of it included."""
    with torch.device("meta"):
        skeleton = make(plan)
    engine = plan.config.engine
    states, placement = model_states(skeleton, engine, plan.config.optim, world)
    parameters = sum(p.numel() for p in skeleton.parameters())
    fixed = states.on_device(parameters, engine.zero_stage, world.size, placement.offload)
    fixed += bucket_bytes(plan.config, parameters, placement, states.working)
    return Room(parameters, states, placement, _available(world.device) * (1 - RESERVE[world.device.type]), fixed)


def bucket_bytes(config: Config, parameters: int, placement: Placement, working: int) -> float:
    """Bytes of communication buckets, and at stage 3 of gathered weights."""
    if not config.engine.zero_stage:
        return 0.0
    held = (3 if placement.overlap else 2) * placement.bucket  # to reduce, and to gather
    if config.engine.zero_stage == 3:
        zero = config.engine.deepspeed.get("zero_optimization", {})
        held += min(parameters, zero.get("stage3_max_live_parameters", LIVE))
    return float(held * working)


def _available(device: torch.device) -> float:
    """Bytes that this process may come to hold: of its GPU, or as its share of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    place = launcher_place(os.environ)
    return psutil.virtual_memory().available / (place[3] if place else 1)


# The micro batch


@dataclass(frozen=True)
class Found:
    """The largest micro batch (0: not even one image fits), and the bytes that each image takes."""

    size: int
    an_image: float


def largest(
    build: Callable[[int], nn.Module],
    depth: int,
    batch_of: Callable[[int], Batch],
    left: float,
    device: torch.device,
    most: int,
    unit: int = 1,
) -> Found:
    """The largest micro batch of whole units, at most `most`, whose images fit into `left` bytes of the device.

    `build` makes the objective with so many blocks, of `depth` in all, on the device; `batch_of` a batch of so many
    images. On the CPU, which soon gains nothing by larger ones, no more than is worth it (`fastest`).
    """
    an_image = bytes_an_image(build, depth, batch_of, device)
    size = int(min(most, max(left, 0) // an_image)) // unit * unit
    if device.type == "cpu" and size > ROWS[0]:
        size = min(size, fastest(build(2), batch_of, size))
    free_memory()
    return Found(size, an_image)


def fastest(objective: nn.Module, batch_of: Callable[[int], Batch], most: int) -> int:
    """Doubled from 8 on, up to `most`, for as long as that makes training on an image at least 5% faster."""
    size = ROWS[0]
    rate = _images_a_second(objective, batch_of, size)
    while size < most:
        larger = min(2 * size, most)
        faster = _images_a_second(objective, batch_of, larger)
        if faster < FASTER * rate:
            break
        size, rate = larger, faster
    return size


def _images_a_second(objective: nn.Module, batch_of: Callable[[int], Batch], rows: int) -> float:
    batch, times = batch_of(rows), []
    for _ in range(3):  # the best of them: other processes now and then stop one
        began = time.perf_counter()
        objective(batch)[0].backward()
        times.append(time.perf_counter() - began)
    return rows / min(times)


def synthetic(plan: Plan, rows: int, device: torch.device) -> Batch:
    """A micro batch of noise in the form of the loader's; the global random numbers are left alone."""
    own = torch.Generator(device).manual_seed(0)
    shape, classes = (rows, *plan.model.height_width, 3), plan.model.num_classes
    whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
    targets = {"targets": torch.zeros(rows, classes, dtype=torch.bool, device=device)} if plan.train.multi else {}
    return {
        "pixels": torch.randint(256, shape, dtype=torch.uint8, device=device, generator=own),
        "key": torch.randint(2**62, (rows,), generator=own, **whole),
        "label": torch.zeros(rows, **whole),
        "epoch": torch.zeros(rows, **whole),
        "row": torch.arange(rows, **whole),
        "weight": torch.ones(rows, device=device),
        **targets,
    }


def find(plan: Plan, world: World, make: Make, left: float, most: int) -> Found:
    """`largest` for this rank of a run, up to `most` images. No other rank takes part."""
    alike = plan.model.alike  # else the whole network is tried
    short, before, after = around_frozen(plan.config.finetune, plan.model.depth)

    def build(blocks: int) -> nn.Module:
        chosen = plan
        if alike:
            config = replace(plan.config, finetune=short)
            chosen = replace(plan, model=replace(plan.model, depth=before + blocks), config=config)
        with world.device:
            objective = make(chosen)
        return objective.to(DTYPES[plan.config.engine.dtype])

    def batch_of(rows: int) -> Batch:
        return synthetic(plan, rows, world.device)

    return largest(build, after if alike else 1, batch_of, left, world.device, most, plan.loader.unit)


def around_frozen(config: FinetuneConfig, depth: int) -> tuple[FinetuneConfig, int, int]:
    """How to try a network whose first blocks are frozen, and keep nothing for the backward pass: the settings by which
    one of them, or none, stands for all, the number of these, and of those that come after the frozen ones."""
    frozen = 0 if config.freeze == "all" else config.freeze
    before = min(frozen, 1)
    return replace(config, freeze=before or config.freeze), before, depth - frozen


def fitted(plan: Plan, world: World, make: Make) -> Plan:
    """The plan with the micro batch that is found by trial, the same on all ranks, if its recipe asks for that.

    `make` makes the objective of a plan. Of sizes that need as many micro batches a step the smallest is taken. All
    ranks call it. Raises `UserError` on each of them where on any not even one image fits.
    """
    if plan.config.engine.micro_batch != "auto":
        return plan
    have, share, unit = room(plan, world, make), plan.loader.micro_batch, plan.loader.unit
    found = find(plan, world, make, have.left, share)
    agree(None if found.size >= unit else _no_room(plan, world, have))
    size = order.micro_batch_size(plan.config.train.global_batch, world.size, min(gather(found.size)), unit)
    if world.main:
        say(
            f"micro batch {size} of {share} found by trial: {_gb(found.an_image)} an image, {_gb(have.left)} for them"
            f" beside {_gb(have.fixed)} of states and buckets"
        )
    return replace(plan, loader=replace(plan.loader, micro_batch=size))


# Where memory ran out


@contextmanager
def memory_told(plan: Plan, world: World, make: Make) -> Iterator[None]:
    """Turn a device's running out of memory into `UserError`, which says what would fit. Any rank may do so alone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what the step had made so far
        free_memory()
        raise out_of_memory(plan, world, make) from error


def out_of_memory(plan: Plan, world: World, make: Make) -> UserError:
    """What to say where training ran out of memory. No other rank takes part: they may wait for this one."""
    have, now, unit = room(plan, world, make), plan.loader.micro_batch, plan.loader.unit
    if have.left <= 0:
        return _no_room(plan, world, have)
    found = find(plan, world, make, have.left, now * 7 // 8)  # less than now, even where gaps between tensors are why
    if found.size < unit:
        return _no_room(plan, world, have)
    size = order.micro_batch_size(plan.config.train.global_batch, world.size, found.size, unit)
    said = f"an image takes {_gb(found.an_image)}, states and buckets {_gb(have.fixed)}"
    savings = "".join(f", or {saving}" for saving in _savings(plan.config, world, have))
    return UserError(
        "engine.micro_batch",
        f"{now}, for which the memory of rank {world.rank} did not suffice ({said})",
        f"images that fit into its {_gb(have.total)}",
        f"Set engine.micro_batch={size}, which should fit{savings}.",
    )


def _no_room(plan: Plan, world: World, have: Room) -> UserError:
    """What to say where states leave no room for an image."""
    config, stage = plan.config, plan.config.engine.zero_stage
    stages = (0,) if config.optim.name in STAGE_0_OPTIMIZERS else (0, 1, 2, 3)
    stages = stages if config.engine.dtype == "fp32" else stages[1:]

    def need(stage: int, offload: str = "none") -> float:
        return have.states.on_device(have.parameters, stage, world.size, offload)

    table = ", ".join(f"{_gb(need(other))} at {other}" for other in stages)
    choices = [(other, "none") for other in stages if other > stage]
    if world.device.type == "cuda":
        choices += [(max(stage, 1), "optimizer"), (3, "optimizer"), (3, "all")] if 3 in stages else []
    fitting = [choice for choice in choices if need(*choice) < min(have.total, need(stage, have.placement.offload))]
    remedy = "Train on more ranks or larger devices, or a smaller model."
    if fitting:
        other, offload = fitting[0]
        more = f" engine.offload={offload}" if offload != "none" else ""
        remedy = f"Set engine.zero_stage={other}{more}, which keeps {_gb(need(other, offload))}, or use more ranks."
    if config.engine.recompute == "none":
        remedy += " engine.recompute=blocks makes an image take less."
    return UserError(
        "engine.zero_stage",
        f"{stage}, at which {have.parameters:,} parameters take {_gb(have.fixed)} with buckets on each of {world.size}"
        f" ranks (states alone: {table})",
        f"room for an image in the {_gb(have.total)} of rank {world.rank}",
        remedy,
    )


def _savings(config: Config, world: World, have: Room) -> list[str]:
    """Settings that take less memory than those of the recipe do."""
    stage, partitions = config.engine.zero_stage, config.optim.name not in STAGE_0_OPTIMIZERS
    choices = {
        "engine.recompute=blocks": config.engine.recompute == "none",
        "engine.zero_stage=3": partitions and stage < 3 and world.size > 1,
        "engine.offload=optimizer": stage > 0 and have.placement.cuda and have.placement.offload == "none",
    }
    return [choice for choice, saves in choices.items() if saves]


def _gb(count: float) -> str:
    """Bytes in 10⁹, to two digits and no finer than a tenth of a megabyte."""
    return f"{count / 1e9:.{2 if count >= 1e9 else 4}f} GB"
