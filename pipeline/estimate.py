"""What a recipe comes to on so many GPUs and images: batches, steps, memory and arithmetic, without data or a GPU.

States are counted by their formula (`placement`). What an image takes is measured as for a run (`activations`), on
tensors that have shapes and no memory, with attention that keeps no N × N weights, as that of GPUs. Augmentation on the
device, gaps between tensors and torch.compile are not in it: a trial on a GPU (`engine.micro_batch=auto`) has the last
word.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import ArchitectureConfig, in_pixels
from vitscale.model.flops import forward_macs
from vitscale.pipeline.activations import ROWS, Batch, bytes_an_image, taken
from vitscale.pipeline.config import Config, FinetuneConfig
from vitscale.pipeline.console import count
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import model_states
from vitscale.pipeline.finetune import check_trained, choose_trained, image_flops
from vitscale.pipeline.micro_batch import RESERVE, around_frozen, bucket_bytes
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.placement import Placement, place
from vitscale.pipeline.planner import durations, peaks
from vitscale.pipeline.timing import DTYPES

# TFLOP/s of a large matrix product on an H200: in 16 bits as measured with random data; in TF32 half of that, as its
# data sheet has it; in float32 as that says
PEAKS = {"16 bits": 790.0, "tf32": 395.0, "fp32": 67.0}
MFU = 0.4  # share of that: assumed, between the 17% of DINOv3's ViT-L and the 55% of ViT-22B


@dataclass(frozen=True)
class Form:
    """What decides how much an image takes: the network, what of it is trained, its numbers, and whether labels are
    mixed."""

    model: ArchitectureConfig
    dtype: str
    recompute: str
    recompute_every: int
    loss: str
    mixes: bool
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class Estimate:
    """A recipe on `ranks` GPUs. Bytes are of each GPU, but for `checkpoint`; `an_image` is one of a micro batch.

    `micro_batch` is 0 where not even one image fits. `flop` is of the whole training, and `again` what
    recomputation adds.
    """

    model: ArchitectureConfig
    parameters: int
    images: int
    ranks: int
    global_batch: int
    micro_batch: int
    accumulation: int
    steps: int
    warmup: int
    steps_an_epoch: int
    states: float
    buckets: float
    an_image: float
    memory: float
    checkpoint: float
    flop: float
    again: float
    peak: float
    placement: Placement

    @property
    def needed(self) -> float:
        """Bytes on each GPU at the peak of a step."""
        return self.states + self.buckets + self.micro_batch * self.an_image

    @property
    def fits(self) -> bool:
        """Whether that leaves the reserve which a trial would leave."""
        return self.micro_batch > 0 and self.needed <= self.memory * (1 - RESERVE["cuda"])


def data_size(config: Config, images: int, classes: int) -> tuple[int, int]:
    """Images and classes as given, or where that is 0, of the recipe's `data.train`."""
    if images and classes:
        return images, classes
    if not config.data.mixture:
        remedy = "ImageNet-21k has --images 14197122 --classes 21843, ImageNet-1k --images 1281167 --classes 1000."
        got = f"{images or 'no'} images, {classes or 'no'} classes"
        raise UserError("--images", got, "numbers of both, or data.train=FOLDER", remedy)
    store = Store([path for path, _ in config.data.mixture], "data.train", check=False)
    return images or len(store), classes or len(store.classes)


def estimate(config: Config, ranks: int, images: int, classes: int, memory: float, peak: float = 0.0) -> Estimate:
    """What `config` comes to on `ranks` GPUs of `memory` bytes each; `peak` in TFLOP/s, 0 for `PEAKS`.

    Raises `UserError` for batches, durations and sizes that do not fit each other.
    """
    batch, unit = config.train.global_batch, 2 if config.augment.mixes else 1
    if batch < ranks:
        got = f"{batch} for {ranks} GPUs"
        raise UserError("train.global_batch", got, "at least one image a GPU", "Raise it, or use fewer GPUs.")
    if batch > images:
        raise UserError("train.global_batch", batch, f"at most the {images:,} training images", "Lower it.")
    model = config.model.resolve(classes)
    steps, within = durations(config, images)
    warmup = within("schedule.warmup", config.schedule.warmup)
    cooldown = within("schedule.cooldown", config.schedule.cooldown)
    if not peaks(steps, warmup, cooldown):
        got = f"{config.train.duration}, {count(steps, 'step')} with {warmup:,} of warm-up, {cooldown:,} of cool-down"
        raise UserError("train.duration", got, "steps for both", "Make it longer.")
    engine = config.engine
    check_trained(config, model)
    form = Form(
        model, engine.dtype, engine.recompute, engine.recompute_every, config.objective.loss, unit == 2, config.finetune
    )
    skeleton = objective(form, model.depth)
    states, _ = model_states(skeleton, engine, config.optim, World(0, ranks, 0, torch.device("cpu")))
    parameters = sum(p.numel() for p in skeleton.parameters())
    placement = place(engine, parameters, ranks, states, int(memory))
    kept = states.on_device(parameters, engine.zero_stage, ranks, placement.offload)
    buckets = bucket_bytes(config, parameters, placement, states.working)
    an_image = image_bytes(form)
    most = batch if engine.micro_batch == "auto" else max(engine.micro_batch, unit)
    if engine.micro_batch == "auto":
        room = memory * (1 - RESERVE["cuda"]) - kept - buckets
        most = int(min(most, max(room, 0) // an_image)) // unit * unit
    micro = order.micro_batch_size(batch, ranks, most, unit) if most else 0
    return Estimate(
        model=model,
        parameters=parameters,
        images=images,
        ranks=ranks,
        global_batch=batch,
        micro_batch=micro,
        accumulation=order.accumulation(batch, ranks, micro, unit) if micro else 0,
        steps=steps,
        warmup=warmup,
        steps_an_epoch=images // batch,
        states=kept,
        buckets=buckets,
        an_image=an_image,
        memory=memory,
        checkpoint=4.0 * (parameters + states.kept * (parameters - states.frozen)),
        flop=float(image_flops(model, config.finetune)) * steps * batch,
        again=recomputed_flops(form) * steps * batch,
        peak=peak or PEAKS["16 bits" if engine.dtype != "fp32" else "tf32" if engine.tf32 else "fp32"],
        placement=placement,
    )


def objective(form: Form, blocks: int) -> Supervised:
    """The objective with so many blocks on the meta device, without augmentation: that depends on values."""
    model = replace(cast(Any, form.model), depth=blocks) if form.model.alike else form.model
    with torch.device("meta"):
        network = build_network(model, seed=None)
        choose_trained(network, form.finetune)
    network.recompute, network.recompute_every = form.recompute, form.recompute_every
    return Supervised(network, Preprocess(model.img_size, 1.0), loss=form.loss)


def recomputed_flops(form: Form) -> float:
    """Floating-point operations of what is computed again for an image: a forward pass, by the share of its blocks.

    Blocks that no gradient goes through are not computed again, and `selective` keeps the results of matrix products.
    At most: uncompiled, what nothing backward needs is left out, such as the last product of a block without a layer
    scale.
    """
    if form.recompute != "blocks":
        return 0.0
    depth, frozen = form.model.depth, form.finetune.freeze
    again = sum(frozen != "all" and number >= frozen for number in range(0, depth, form.recompute_every))
    return 2.0 * forward_macs(form.model) * again / depth


@lru_cache(maxsize=64)
def image_bytes(form: Form) -> float:
    """Bytes that each image of a micro batch takes at the peak of a step, of tensors that are not there."""
    cpu, dtype, model = torch.device("cpu"), DTYPES[form.dtype], form.model
    short, before, after = around_frozen(form.finetune, model.depth)

    def build(blocks: int) -> nn.Module:
        made = objective(replace(form, finetune=short), before + blocks) if model.alike else objective(form, blocks)
        for module in made.modules():  # `Module.to` cannot
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kind = dtype if tensor.is_floating_point() else tensor.dtype
                        fake = torch.empty(tensor.shape, dtype=kind, device=cpu)
                        parameter = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
        return made

    def batch_of(rows: int) -> Batch:
        pixels = torch.zeros(rows, *model.height_width, 3, dtype=torch.uint8)
        whole = {name: torch.zeros(rows, dtype=torch.int64) for name in ("label", "key", "epoch")}
        mixed = {"targets": torch.zeros(rows, model.num_classes)} if form.mixes else {}
        return {"pixels": pixels, "weight": torch.ones(rows), **whole, **mixed}

    with FakeTensorMode(allow_non_fake_inputs=True):
        if model.alike:
            return bytes_an_image(build, after, batch_of, cpu)
        whole = build(model.depth)
        taken(whole, batch_of, ROWS[-1], cpu)  # makes gradients
        less, more = (taken(whole, batch_of, rows, cpu) for rows in (ROWS[-1], 2 * ROWS[-1]))
        grown = less.growth(more, ROWS[-1])
        return max(grown.forward, grown.backward)


def lines(found: Estimate, mfu: float) -> Iterator[str]:
    """The estimate for people; `mfu` is the assumed share of the peak."""
    gpus, batches = count(found.ranks, "GPU"), "micro batches" if found.accumulation != 1 else "micro batch"
    many = found.steps * found.global_batch
    yield f"model       {found.parameters:,} parameters, images of {in_pixels(found.model.img_size)}"
    yield (
        f"batch       {found.global_batch:,} images on {gpus}: {found.accumulation:,} {batches} of"
        f" {found.micro_batch:,}{_padding(found)}"
    )
    yield (
        f"length      {count(found.steps, 'step')} ({found.warmup:,} of warm-up), {many / found.images:,.2f} epochs of"
        f" {count(found.steps_an_epoch, 'step')}, {many:,} images"
    )
    yield (
        f"memory      {_gb(found.states)} of states, {_gb(found.buckets)} of buckets, {found.micro_batch:,} ×"
        f" {_gb(found.an_image)} of images: {_gb(found.needed)} of {_gb(found.memory)} on each GPU"
    )
    yield f"placement   {found.placement.why}"
    yield f"checkpoint  {_gb(found.checkpoint)}"
    yield f"arithmetic  {found.flop:.3g} FLOP"
    hours = (found.flop + found.again) / (found.peak * 1e12 * mfu) / 3600
    took = f"{hours / found.ranks:,.1f} hours on {gpus}"
    share = f"{mfu:.0%} of {found.peak:g} TFLOP/s"
    share += f", with {found.again:.3g} FLOP of recomputation" if found.again else ""
    yield f"time        an estimate, not measured: {hours:,.1f} GPU-hours, {took}, at {share}"
    if not found.fits:
        yield f"does not fit: {_remedy(found)}"


def _padding(found: Estimate) -> str:
    rows = found.accumulation * found.micro_batch * found.ranks - found.global_batch
    return f", with {count(rows, 'row')} of padding" if rows > 0 else ""


def _remedy(found: Estimate) -> str:
    room = found.memory * (1 - RESERVE["cuda"]) - found.states - found.buckets
    fitting = math.floor(max(room, 0) / found.an_image)
    if fitting:
        return f"set engine.micro_batch={fitting}, or engine.recompute=blocks, which makes an image take less"
    return "raise engine.zero_stage, set engine.recompute=blocks, use more GPUs or larger ones"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.{1 if size >= 1e10 else 2 if size >= 1e9 else 4}f} GB"
