"""The network where no rank holds all of it: its parameters partitioned over ranks by DeepSpeed ZeRO-3."""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vitscale.model.config import ViTConfig
from vitscale.model.initial import initial_weight
from vitscale.model.layers import EncoderBlock
from vitscale.model.network import compile_blocks
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.distributed import World

MODEL = ViTConfig(img_size=16, patch_size=4, depth=3, width=32, mlp_width=64, heads=4, num_classes=5, dropout=0.1)
ROWS, STEPS = 4, 4


def train(world: World, recompute: bool, whole_blocks: bool, partitioned: bool, compiled: bool) -> dict[str, Any]:
    """Losses on rank 0 of steps on noise, and how many weights are left gathered after a backward pass."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of calls it makes, at every one
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        # no weight is small enough to stay whole, and none is kept from one use to the next
        "zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 4096,
        },
    }  # fmt: skip
    with deepspeed.zero.Init(config_dict_or_path=config) if partitioned else nullcontext():
        model = VisionTransformer(MODEL, seed=None)
    held = sum(p.numel() for p in model.parameters())
    begin(model, deepspeed)
    model.recompute = "blocks" if recompute else "none"
    if whole_blocks:
        deepspeed.utils.set_z3_leaf_modules(model, [EncoderBlock])
    if compiled:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    generator = torch.Generator().manual_seed(world.rank)
    losses, gathered = [], 0
    for step in range(STEPS):
        torch.manual_seed(step * world.size + world.rank)  # dropout
        images = torch.randn(ROWS, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 5, (ROWS,), generator=generator)
        loss = F.cross_entropy(engine(images, torch.full((3, 2, ROWS), 1.25)), labels)
        engine.backward(loss)
        gathered += sum(p.numel() for p in model.parameters())
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return {"losses": losses, "held": held, "gathered": gathered}


def begin(model: VisionTransformer, deepspeed: Any) -> None:
    """Give a model its initial weights, and a classifier that is not zero."""
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            shape = tuple(parameter.shape)
            like = "blocks.0.attn.proj.weight" if name == "head.weight" else name
            parameter.copy_(initial_weight(like, shape, 1, VisionTransformer.rules(MODEL)))


def train_by_variants(world: World) -> list[dict[str, Any]]:
    # the last two: built whole
    variants = [(recompute, whole, True) for recompute in (False, True) for whole in (False, True)]
    return [train(world, *variant, False) for variant in [*variants, (False, False, False), (True, True, False)]]


@pytest.mark.slow
def test_recomputation_of_partitioned_blocks_changes_no_bit(ranks: Callable[..., Any]) -> None:
    """With the weights of a block gathered one module at a time, or all together; built partitioned, or whole."""
    plain, *others = ranks(__file__, "train_by_variants", 2)
    assert len(set(plain["losses"])) == STEPS
    for other in others:
        assert other["losses"] == plain["losses"]
        assert other["gathered"] == 0
    assert [each["held"] == 0 for each in [plain, *others]] == [True] * 4 + [False] * 2


def train_compiled(world: World) -> list[list[float]]:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    runs = [train(world, recompute, True, True, compiled=True)["losses"] for recompute in (False, True)]
    assert counters["stats"]["unique_graphs"] == 1, counters
    return runs


@pytest.mark.slow
def test_compiled_blocks_can_be_partitioned(ranks: Callable[..., Any]) -> None:
    one, other = ranks(__file__, "train_compiled", 2)
    assert one == pytest.approx(other, abs=1e-5)
    assert len(set(one)) == STEPS
