"""ZeRO 0 to 3 against a plain PyTorch loop, and checkpoints that any stage and world size goes on from.

Each test starts its ranks once and goes through all stages in them: starting is what costs.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitscale.errors import UserError
from vitscale.model.registry import ViTConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline import checkpoint
from vitscale.pipeline.config import EngineConfig, OptimConfig
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import Engine, deepspeed_config, merge
from vitscale.pipeline.objectives.supervised import Supervised

GLOBAL_BATCH, MICRO_BATCH, SAMPLES = 21, 4, 105  # ragged on purpose: 21 rows on 2 ranks are 3 micro batches
MODEL = ViTConfig(img_size=16, patch_size=4, depth=2, width=32, mlp_width=64, heads=4, num_classes=5, pre_logits=True)
OPTIM = OptimConfig(weight_decay=0.1, clip=0.5)
LR = 1e-3
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


def make_engine(world: World, stage: int, dtype: str = "fp32", weights: dict | None = None) -> Engine:
    model = VisionTransformer(MODEL, seed=1)
    if weights:
        model.load_state_dict(weights)
    config = EngineConfig(zero_stage=stage, dtype=dtype, micro_batch=MICRO_BATCH)
    accumulation = order.accumulation(GLOBAL_BATCH, world.size, MICRO_BATCH)
    return Engine(Supervised(model, Preprocess(16, 1.0)), config, OPTIM, world, accumulation)


def steps(engine: Engine, world: World, first: int, last: int) -> list[dict[str, float]]:
    return [engine.train_step(batches(step, world), GLOBAL_BATCH, LR) for step in range(first, last)]


def train_all_stages(world: World, count: int) -> dict[str, list[dict[str, float]]]:
    """Losses, accuracies and gradient norms of `count` steps at each stage, and in bf16 at stage 2."""
    rows = {str(stage): steps(make_engine(world, stage), world, 0, count) for stage in range(4)}
    return {**rows, "bf16": steps(make_engine(world, 2, "bf16"), world, 0, count)}


def plain_loop(count: int) -> list[dict[str, float]]:
    """The same training by PyTorch alone, on whole batches."""
    pixels, labels = data()
    objective = Supervised(VisionTransformer(MODEL, seed=1), Preprocess(16, 1.0))
    spared = [p for n, p in objective.named_parameters() if p.ndim < 2 or n.endswith(("pos_embed", "cls_token"))]
    decayed = [p for p in objective.parameters() if not any(p is q for q in spared)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR)
    rows = []
    for step in range(count):
        numbers = torch.from_numpy(ORDER.batch(step)[0])
        logits = objective({"pixels": pixels[numbers]}, predict=True)
        loss = torch.nn.functional.cross_entropy(logits, labels[numbers])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        adamw.step()
        top1 = (logits.argmax(dim=1) == labels[numbers]).double().mean().item()
        rows.append({"loss": loss.item(), "top1": top1, "grad_norm": norm.item()})
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stages_equal_a_plain_loop(ranks: Callable[..., Any], world_size: int) -> None:
    """Over 20 steps; sums in another order leave 1e-7 in a loss, which 20 steps at 1e-3 carry to about 1e-5."""
    expected = plain_loop(20)
    got = ranks(__file__, "train_all_stages", world_size, 20)
    for stage in ("0", "1", "2", "3"):
        for step, (row, wanted) in enumerate(zip(got[stage], expected, strict=True)):
            assert row == pytest.approx(wanted, abs=1e-4), f"stage {stage}, step {step}"
    losses = [row["loss"] for row in got["bf16"]]
    # bf16 keeps 8 bits: a relative error of 2⁻⁸ in logits of order one
    assert losses == pytest.approx([row["loss"] for row in expected], abs=2e-2)


def save_and_resume(world: World, folder: str) -> dict[str, list[float]]:
    """At every stage: 4 steps, save, 4 steps. Then from each checkpoint at every stage: 4 steps."""
    rows: dict[str, list[float]] = {}
    for stage in range(4):
        engine = make_engine(world, stage)
        steps(engine, world, 0, 4)
        checkpoint.save(Path(folder) / str(stage), engine, {"step": 4}, world, keep=1)
        rows[f"{stage}"] = [row["loss"] for row in steps(engine, world, 4, 8)]
    for saved in range(4):
        rows.update(resume(world, folder, saved))
    return rows


def resume(world: World, folder: str, saved: int) -> dict[str, list[float]]:
    """Go on at every stage from the checkpoint that stage `saved` wrote."""
    rows = {}
    reader = checkpoint.Reader(checkpoint.checkpoints(Path(folder) / str(saved))[0])
    for stage in range(4):
        engine = make_engine(world, stage, weights=dict(reader.weights("model.")))
        checkpoint.restore(reader, engine, step=4)
        rows[f"{saved}→{stage}"] = [row["loss"] for row in steps(engine, world, 4, 8)]
    return rows


def test_checkpoints_resume_at_any_stage_and_world_size(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Bit for bit at the same stage and world size; elsewhere within what another order of sums leaves."""
    folder = str(tmp_path / "checkpoints")
    rows = ranks(__file__, "save_and_resume", 2, folder)
    for saved in range(4):
        assert rows[f"{saved}→{saved}"] == rows[str(saved)]
        for stage in range(4):
            assert rows[f"{saved}→{stage}"] == pytest.approx(rows["0"], abs=1e-5)
    for world_size in (1, 3):
        for saved in (2, 3):
            for got in ranks(__file__, "resume", world_size, folder, saved).values():
                assert got == pytest.approx(rows["0"], abs=1e-5)


class Spoilt(torch.autograd.Function):
    """Passes values through, and makes the gradient not a number."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * math.nan


def diverge(world: World) -> list[str]:
    """What stops training at each stage when the loss, then the gradient alone, is not finite."""
    said = []
    for stage in range(4):
        engine = make_engine(world, stage)
        before = {fragment.name: fragment.tensors["weight"].clone() for fragment in engine.fragments()}
        endless = [{**batch, "weight": batch["weight"] * math.inf} for batch in batches(0, world)]
        said.append(stopped(engine, endless, before))
        engine = make_engine(world, stage)
        objective: Any = engine.objective.module
        objective.model.head.register_forward_hook(lambda *told: Spoilt.apply(told[-1]))
        said.append(stopped(engine, list(batches(0, world)), before))
    return said


def stopped(engine: Engine, given: list[dict[str, torch.Tensor]], before: dict[str, torch.Tensor]) -> str:
    try:
        engine.train_step(given, GLOBAL_BATCH, LR)
    except UserError as error:
        same = all(torch.equal(before[f.name], f.tensors["weight"]) for f in engine.fragments())
        return f"{error.setting} {same}"
    return "went on"


def test_what_is_not_finite_stops_every_rank_and_leaves_the_weights(ranks: Callable[..., Any]) -> None:
    assert ranks(__file__, "diverge", 2) == ["loss True", "grad_norm True"] * 4


def test_deepspeed_settings_that_the_recipe_decides_are_refused() -> None:
    for key, value in (("fp16", {"enabled": True}), ("zero_optimization", {"stage": 3}), ("train_batch_size", 4)):
        with pytest.raises(UserError, match=rf"engine\.deepspeed\.{key}"):
            EngineConfig(deepspeed={key: value})


def test_deepspeed_settings_pass_through_and_buckets_fit_the_model() -> None:
    config = EngineConfig(deepspeed={"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5})
    made = deepspeed_config(config, OPTIM, accumulation=2, parameters=1000)
    assert made["zero_optimization"]["overlap_comm"] is True
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 1024
    assert made["steps_per_print"] == 5
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
