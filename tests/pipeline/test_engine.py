"""ZeRO 0 to 3 against plain PyTorch loops, and checkpoints that any stage and world size goes on from.

Each test starts its ranks once and goes through all stages in them: starting is what costs.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitscale.errors import UserError
from vitscale.model.config import ViTConfig
from vitscale.model.initial import initial_weight
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline import checkpoint
from vitscale.pipeline.config import EngineConfig, OptimConfig, merge
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.distributed import World, gather, sum_over_ranks
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.incidents import trace
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.optim import build_optimizer
from vitscale.pipeline.placement import Placement, deepspeed_config
from vitscale.pipeline.saver import Saver

GLOBAL_BATCH, MICRO_BATCH, SAMPLES = 21, 4, 105  # ragged on purpose: 21 rows on 2 ranks are 3 micro batches
MODEL = ViTConfig(img_size=16, patch_size=4, depth=2, width=32, mlp_width=64, heads=4, num_classes=5, pre_logits=True)
OPTIM = OptimConfig(weight_decay=0.1, clip=0.5)
LR = 1e-3
# at stage 3, else all of so small a model would be held whole on every rank
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
ORDER = order.Order([np.array([SAMPLES])], [1], seed=0, streams=1, window=SAMPLES, size=GLOBAL_BATCH)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with labels, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 5, (SAMPLES,), generator=generator)


def batches(step: int, world: World) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's padded micro batches of a step."""
    pixels, labels = data()
    rows, _ = ORDER.batch(step)
    for micro in order.micro_batches(rows, world.rank, world.size, MICRO_BATCH):
        index = torch.zeros(MICRO_BATCH, dtype=torch.long)
        index[: len(micro)] = torch.from_numpy(micro.copy())
        weight = (torch.arange(MICRO_BATCH) < len(micro)).float()
        yield {"pixels": pixels[index], "label": labels[index], "weight": weight}


def make_engine(
    world: World,
    stage: int,
    dtype: str = "fp32",
    optim: OptimConfig = OPTIM,
    recompute: str = "none",
    **engine: Any,
) -> Engine:
    deepspeed = merge(PARTITIONED, engine.pop("deepspeed", {}))
    config = EngineConfig(zero_stage=stage, dtype=dtype, micro_batch=MICRO_BATCH, deepspeed=deepspeed, **engine)
    accumulation = order.accumulation(GLOBAL_BATCH, world.size, MICRO_BATCH)

    def build() -> Supervised:
        model = VisionTransformer(MODEL, seed=None)
        model.recompute = recompute
        return Supervised(model, Preprocess(16, 1.0))

    made = Engine(build, config, optim, world, accumulation)
    rules = VisionTransformer.rules(MODEL)
    made.load(lambda name: initial_weight(name.removeprefix("model."), made.shapes[name], 1, rules))
    return made


def steps(engine: Engine, world: World, first: int, last: int, lr: float = LR) -> list[dict[str, float]]:
    taken = [engine.train_step(batches(step, world), GLOBAL_BATCH, lr) for step in range(first, last)]
    assert not any(step.refused for step in taken)
    return [step.means for step in taken]


def train_with_ddp(world: World, count: int) -> list[dict[str, float]]:
    """Losses and gradient norms of a plain loop with PyTorch's DistributedDataParallel, each rank on its share."""
    pixels, labels = data()
    model = VisionTransformer(MODEL, seed=1)
    ddp: Any = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = build_optimizer(Supervised(model, Preprocess(16, 1.0)), OPTIM)
    rows = []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = LR
        numbers = torch.from_numpy(ORDER.batch(step)[0])[world.rank :: world.size]
        images = (pixels[numbers].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        loss = torch.nn.functional.cross_entropy(ddp(images), labels[numbers], reduction="sum")
        optimizer.zero_grad()
        (loss * world.size / GLOBAL_BATCH).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        total = sum_over_ranks(loss.detach().clone())
        rows.append({"loss": float(total) / GLOBAL_BATCH, "grad_norm": float(norm)})
    return rows


def train_all_stages(world: World, count: int) -> dict[str, list[dict[str, float]]]:
    """Losses, accuracies and gradient norms of `count` steps at each stage, in bf16 and fp16 at stage 2, and with
    blocks computed again in the backward pass at stage 3; and those of DistributedDataParallel."""
    rows = {str(stage): steps(make_engine(world, stage), world, 0, count) for stage in range(4)}
    rows["recompute"] = steps(make_engine(world, 3, recompute="blocks"), world, 0, 20)
    rows["ddp"] = train_with_ddp(world, count)
    for dtype in ("bf16", "fp16"):
        more = {"fp16": {"initial_scale_power": 8}} if dtype == "fp16" else {}  # the default overflows at first
        rows[dtype] = steps(make_engine(world, 2, dtype, deepspeed=more), world, 0, count)
    return rows


def plain_loop(count: int, lr: float = LR, optim: OptimConfig = OPTIM) -> list[dict[str, float]]:
    """The same training by PyTorch alone, on whole batches."""
    pixels, labels = data()
    objective = Supervised(VisionTransformer(MODEL, seed=1), Preprocess(16, 1.0))
    optimizer = build_optimizer(objective, optim)
    rows = []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        numbers = torch.from_numpy(ORDER.batch(step)[0])
        logits: Any = objective({"pixels": pixels[numbers]}, predict=True)
        loss = torch.nn.functional.cross_entropy(logits, labels[numbers])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), optim.clip)
        optimizer.step()
        top1 = (logits.argmax(dim=1) == labels[numbers]).double().mean().item()
        rows.append({"loss": loss.item(), "top1": top1, "grad_norm": norm.item()})
    return rows


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=SLOW) for size in (1, 3, 4))])
def test_stages_equal_a_plain_loop(ranks: Callable[..., Any], world_size: int) -> None:
    """Over 50 steps; sums in another order leave 1e-7 in a loss, which 50 steps at 1e-3 carry to about 1e-5."""
    expected = plain_loop(50)
    got = ranks(__file__, "train_all_stages", world_size, 50)
    assert len(expected) == len(got["ddp"]) == 50
    for stage in ("0", "1", "2", "3", "recompute", "ddp"):
        for step, (row, wanted) in enumerate(zip(got[stage], expected, strict=False)):
            assert row == pytest.approx({key: wanted[key] for key in row}, abs=1e-4), f"stage {stage}, step {step}"
    for dtype, tolerance in (("bf16", 4e-2), ("fp16", 5e-3)):  # 8 and 11 bits: 2⁻⁸ and 2⁻¹¹ in logits of order one
        losses = [row["loss"] for row in got[dtype][:20]]
        assert losses == pytest.approx([row["loss"] for row in expected[:20]], abs=tolerance), dtype


def save_and_resume(world: World, folder: str) -> dict[str, list[float]]:
    """At every stage: 4 steps, save, 4 steps. Then from each checkpoint at every stage: 4 steps."""
    rows: dict[str, list[float]] = {}
    for stage in range(4):
        engine = make_engine(world, stage, optim=replace(OPTIM, ema=0.9))
        steps(engine, world, 0, 4)
        Saver(Path(folder) / str(stage), world, keep=1, background=False).save(engine, {"step": 4})
        rows[f"{stage}"] = after(engine, world)
    return rows | resume(world, folder)


def after(engine: Engine, world: World) -> list[float]:
    """Losses of steps 4 to 8, then that of the averaged weights in step 8, which is not taken."""
    losses = [row["loss"] for row in steps(engine, world, 4, 8)]
    with engine.averaged():
        averaged = engine.train_step(batches(8, world), GLOBAL_BATCH, 0.0, limit=0.0)
    assert averaged.refused == "spike"
    return [*losses, averaged.means["loss"]]


def resume(world: World, folder: str) -> dict[str, list[float]]:
    """Go on at every stage from the checkpoints that each stage wrote."""
    rows = {}
    for saved in range(4):
        reader = checkpoint.Reader(checkpoint.checkpoints(Path(folder) / str(saved))[0])
        for stage in range(4):
            engine = make_engine(world, stage, optim=replace(OPTIM, ema=0.9))
            checkpoint.restore(reader, engine, steps=4)
            rows[f"{saved}→{stage}"] = after(engine, world)
    return rows


@pytest.mark.slow
def test_checkpoints_resume_at_any_stage_and_world_size(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Bit for bit at the same stage and world size; elsewhere within what another order of sums leaves."""
    folder = str(tmp_path / "checkpoints")
    rows = ranks(__file__, "save_and_resume", 2, folder)
    for saved in range(4):
        assert rows[f"{saved}→{saved}"] == rows[str(saved)]
        for stage in range(4):
            assert rows[f"{saved}→{stage}"] == pytest.approx(rows["0"], abs=1e-5)
    for world_size in (1, 3):
        got = ranks(__file__, "resume", world_size, folder)
        assert len(got) == 16
        for name, losses in got.items():
            assert losses == pytest.approx(rows["0"], abs=1e-5), name


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """What the network computes with, gathered in DeepSpeed's own way."""
    import deepspeed

    module: Any = engine.objective.module
    parameters = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if engine.stage == 3 else nullcontext():
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def average_naively(world: World, count: int) -> dict[str, float]:
    """Largest difference between the engine's Polyak average and one of whole weights, at each stage."""
    differences = {}
    for stage in range(4):
        engine = make_engine(world, stage, optim=replace(OPTIM, ema=0.9))
        naive = {name: weight.double() for name, weight in whole_weights(engine).items()}
        for step in range(count):
            steps(engine, world, step, step + 1)
            for name, weight in whole_weights(engine).items():
                naive[name] = 0.9 * naive[name] + 0.1 * weight.double()
        raw = whole_weights(engine)
        with engine.averaged():
            averaged = whole_weights(engine)
        worst = max((averaged[name] - naive[name]).abs().max().item() for name in naive)
        moved = max((averaged[name] - raw[name]).abs().max().item() for name in naive)
        back = all(torch.equal(weight, raw[name]) for name, weight in whole_weights(engine).items())
        differences[str(stage)] = worst if back and moved > 1e-3 else math.inf
    return differences


@pytest.mark.slow
def test_the_average_is_that_of_whole_weights(ranks: Callable[..., Any]) -> None:
    """50 steps; float32 rounds an average of numbers of order 0.1 by about 1e-8 a step."""
    assert all(difference < 1e-6 for difference in ranks(__file__, "average_naively", 2, 50).values())


OTHERS = {
    "sgd": (replace(OPTIM, name="sgd", weight_decay=0.0, momentum=0.9), 0.1),
    "lion": (replace(OPTIM, name="lion"), 1e-4),
    "lamb": (replace(OPTIM, name="lamb", layer_decay=0.7, head_weight_decay=1.0), 1e-2),
    "adafactor": (replace(OPTIM, name="adafactor"), 1e-3),
    "muon": (replace(OPTIM, name="muon"), 1e-3),
}


def train_with_others(world: World, count: int) -> dict[str, list[float]]:
    """Losses of each optimizer at each stage it is for."""
    rows = {}
    for name, (optim, lr) in OTHERS.items():
        for stage in (0,) if name in ("adafactor", "muon") else range(4):
            engine = make_engine(world, stage, optim=optim)
            rows[f"{name} {stage}"] = [row["loss"] for row in steps(engine, world, 0, count, lr)]
    return rows


@SLOW
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_optimizer_equals_a_plain_loop_at_every_stage(ranks: Callable[..., Any], world_size: int) -> None:
    """Over 20 steps. Lion takes the sign of sums, which rounding can turn: such a weight moves by 2 lr."""
    got = ranks(__file__, "train_with_others", world_size, 20)
    for name, (optim, lr) in OTHERS.items():
        expected = [row["loss"] for row in plain_loop(20, lr, optim)]
        assert expected[-1] < expected[0]
        for key in (key for key in got if key.startswith(name)):
            assert got[key] == pytest.approx(expected, abs=1e-3 if name == "lion" else 1e-4), key


class Spoilt(torch.autograd.Function):
    """Passes values through, and makes the gradient not a number."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * math.nan


def diverge(world: World) -> list[Any]:
    """At each stage: what becomes of a step whose loss, then whose gradient alone is not finite on the last rank, which
    module each rank blames, and whether training goes on as if there had not been such a step."""
    said: list[Any] = []
    last = world.rank == world.size - 1

    def spoil(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        return Spoilt.apply(output) if last else output

    for stage in range(4):
        engine, plain = make_engine(world, stage), make_engine(world, stage)
        expected = steps(plain, world, 0, 2)
        weight = math.inf if last else 1.0
        endless = [{**batch, "weight": batch["weight"] * weight} for batch in batches(0, world)]
        said.append(refused(engine, endless))
        module: Any = engine.objective.module
        hook = module.model.blocks[1].mlp.fc1.register_forward_hook(spoil)
        said.append(refused(engine, list(batches(0, world))))
        said.append(gather(trace(engine, batches(0, world), GLOBAL_BATCH)))
        hook.remove()
        hook = module.model.norm.bias.register_hook(lambda gradient: gradient * math.inf)
        said.append(trace(engine, batches(0, world), GLOBAL_BATCH))
        hook.remove()
        said.append(steps(engine, world, 0, 2) == expected)
    return said


def refused(engine: Engine, given: list[dict[str, torch.Tensor]]) -> str:
    before = {f.name: {kind: t.clone() for kind, t in f.tensors.items()} for f in engine.fragments()}
    step = engine.train_step(given, GLOBAL_BATCH, LR)
    same = all(torch.equal(before[f.name][kind], t) for f in engine.fragments() for kind, t in f.tensors.items())
    return f"{step.refused} {same}"


@pytest.mark.slow
def test_what_is_not_finite_is_taken_on_no_rank_and_leaves_no_trace(ranks: Callable[..., Any]) -> None:
    blamed = ["", "model.blocks.1.mlp.fc1 (Linear): its backward pass was the first that is not finite"]
    weight = "model.norm (LayerNorm): its backward pass was the first that is not finite"
    assert ranks(__file__, "diverge", 2) == ["loss True", "grad_norm True", blamed, weight, True] * 4


def overflow(world: World) -> list[Any]:
    """fp16 at a loss scale that is too large: what became of the first steps, the scale after, and the losses."""
    rows: list[Any] = []
    for stage in (1, 2, 3):
        engine = make_engine(world, stage, "fp16", deepspeed={"fp16": {"initial_scale_power": 24, "hysteresis": 1}})
        taken = [engine.train_step(batches(0, world), GLOBAL_BATCH, 0.0) for _ in range(12)]
        rows.append([[step.refused for step in taken], engine.loss_scale["cur_scale"], taken[-1].means["grad_norm"]])
    return rows


@pytest.mark.slow
def test_the_loss_scale_of_fp16_is_lowered_until_gradients_fit(ranks: Callable[..., Any]) -> None:
    for words, scale, norm in ranks(__file__, "overflow", 2):
        lowered = words.count("overflow")
        assert 0 < lowered < 12
        assert words == ["overflow"] * lowered + [""] * (12 - lowered)
        assert scale == 2 ** (24 - lowered)
        assert norm == pytest.approx(plain_loop(1)[0]["grad_norm"], rel=2e-2)


def train_offloaded(world: World, count: int) -> dict[str, list[float]]:
    """Losses with states in the host's memory."""
    rows = {}
    for offload, stage in (("none", 2), ("optimizer", 1), ("optimizer", 2), ("optimizer", 3), ("all", 3)):
        engine = make_engine(world, stage, offload=offload, optim=replace(OPTIM, ema=0.9))
        rows[f"{offload} {stage}"] = [row["loss"] for row in steps(engine, world, 0, count)]
    return rows


@pytest.mark.slow
def test_offload_changes_no_loss(ranks: Callable[..., Any]) -> None:
    got = ranks(__file__, "train_offloaded", 2, 8)
    for name, losses in got.items():
        assert losses == pytest.approx(got["none 2"], abs=1e-5), name


def hold(world: World) -> list[int]:
    """Elements of weights held by this rank at stage 3, once built."""
    engine = make_engine(world, 3)
    module: Any = engine.objective.module
    whole = sum(p.numel() for p in module.parameters())
    parts = sum(p.ds_tensor.numel() for p in module.parameters())
    return [whole, parts, engine.parameters]


def test_stage_3_holds_a_part_of_the_model_on_each_rank(ranks: Callable[..., Any]) -> None:
    whole, parts, parameters = ranks(__file__, "hold", 3)
    assert parts < parameters / 3 * 1.02  # parts are padded to equal length
    assert whole < parameters * 0.1  # the smallest weights are whole everywhere


def compare(world: World) -> list[Any]:
    """Checksums of equal weights, and after a bit flipped on the last rank."""
    sums = []
    for stage in range(4):
        engine = make_engine(world, stage)
        steps(engine, world, 0, 2)
        sums.append(gather(engine.checksum()))
        if world.rank == world.size - 1:
            module: Any = engine.objective.module
            module.model.norm.weight.data.view(-1).view(torch.int32)[:1] ^= 1
        sums.append(gather(engine.checksum()))
    return sums


def test_checksums_tell_a_rank_with_another_bit(ranks: Callable[..., Any]) -> None:
    got = ranks(__file__, "compare", 3)
    for equal, flipped in zip(got[:6:2], got[1:6:2], strict=True):
        assert len(set(equal)) == 1
        assert flipped[0] == flipped[1] != flipped[2]
    assert got[6] == [None] * 3


def test_deepspeed_settings_that_the_recipe_decides_are_refused() -> None:
    for key, value in (
        ("fp16.enabled", {"fp16": {"enabled": True}}),
        ("zero_optimization.stage", {"zero_optimization": {"stage": 3}}),
        ("train_batch_size", {"train_batch_size": 4}),
    ):
        with pytest.raises(UserError, match=rf"engine\.deepspeed\.{key}"):
            EngineConfig(deepspeed=value)


def test_deepspeed_settings_pass_through() -> None:
    config = EngineConfig(deepspeed={"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5})
    made = deepspeed_config(config, OPTIM, 2, Placement(1024, False, "optimizer", False, ""))
    assert made["zero_optimization"]["overlap_comm"] is True
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 1024
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["steps_per_print"] == 5
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
