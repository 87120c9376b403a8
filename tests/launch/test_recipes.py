"""Every shipped recipe on 1 to 512 GPUs: its batches add up, and it fits; and an estimate's numbers against others."""

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.runs import TINY
from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import ViTConfig
from vitscale.pipeline.activations import Batch, bytes_an_image
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.estimate import Estimate, Form, data_size, estimate, image_bytes, lines
from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.planner import durations, peaks
from vitscale.pipeline.recipe import load_recipe
from vitscale.pipeline.schedule import lr_factor

SHIPPED = Path(__file__).parents[2] / "launch" / "recipes"
I1K = (1_281_167, 1000)  # images, classes
DATA = {
    "i21k": (14_197_122, 21_843), "i1k": I1K, "deit3": I1K, "base": I1K, "flowers": (1020, 102), "pets": (3680, 37),
    "vtab": (1000, 100),
}  # fmt: skip
SMALL = (50_000, 10)


def planned(recipe: str, ranks: int, *overrides: str, memory: float = 80e9) -> Estimate:
    images, classes = next((size for name, size in DATA.items() if name in recipe), SMALL)
    return estimate(load_recipe(recipe, list(overrides), SHIPPED), ranks, images, classes, memory)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_recipe_comes_out_on_any_number_of_gpus(recipe: str) -> None:
    memory, config = float("inf"), load_recipe(recipe, [], SHIPPED)
    batch = config.train.global_batch
    for ranks in (1, 8, 64, 512):
        if batch < ranks:
            with pytest.raises(UserError, match=rf"{batch} for {ranks} GPUs"):
                planned(recipe, ranks)
            continue
        found = planned(recipe, ranks)
        rows = found.accumulation * found.micro_batch * ranks
        assert 0 <= rows - batch < 2 * ranks * found.accumulation, "at most a pair of padding in each micro batch"
        assert found.fits, f"{found.needed / 1e9:.1f} GB on each of {ranks} GPUs"
        assert 0 <= found.warmup < found.steps
        assert found.states <= memory, "more GPUs hold less each"
        memory = found.states
    _, within = durations(config, planned(recipe, 1).images)
    for key, every in (("checkpoint.every", config.checkpoint.every), ("eval.every", config.eval.every)):
        steps = within(key, every)
        assert not steps or steps >= 90, f"{key} is {steps} steps: either costs the time of several"


def test_the_papers_pretraining_in_numbers() -> None:
    """4096 · 90 epochs of 14,197,122 images; table 6 of the ViT paper has 61.6 GMACs an image for L/16."""
    found = planned("vit-l16-i21k-pretrain", 64)
    assert (found.steps, found.warmup, found.micro_batch, found.accumulation) == (90 * 3466, 10_000, 64, 1)
    images = found.steps * 4096
    assert found.flop == pytest.approx(3 * 2 * 61.6e9 * images, rel=0.005), "its head has 21,843 classes"
    parameters = 304.33e6 + 20_843 * 1025 + 1024 * 1025
    assert found.parameters == pytest.approx(parameters, rel=1e-4)
    # bf16 at stage 2: a weight, and a 64th of a gradient and 3 float32 numbers (docs/training.md)
    assert found.states == pytest.approx(parameters * (2 + 14 / 64), rel=1e-4)
    assert found.checkpoint == pytest.approx(12 * parameters, rel=1e-4)
    assert found.peak == 790


def test_an_average_of_the_weights_and_the_stages_take_what_they_take() -> None:
    plain, averaged = (planned("vit-l16-i1k-finetune-384", 8, f"optim.ema={ema}") for ema in (0, 0.9999))
    assert averaged.states - plain.states == pytest.approx(4 / 8 * plain.parameters)
    partitioned = planned("vit-l16-i1k-finetune-384", 8, "engine.zero_stage=3")
    assert partitioned.states == pytest.approx(12 / 8 * plain.parameters)
    assert partitioned.buckets > plain.buckets, "weights are gathered there"


def test_what_does_not_fit_is_told() -> None:
    found = planned("vit-h14-i1k-finetune-518", 1, "engine.micro_batch=64")
    assert not found.fits
    assert planned("vit-h14-i1k-finetune-518", 1).fits, "auto takes what fits"
    assert planned("vit-h14-i1k-finetune-518", 1, "engine.micro_batch=64", "engine.recompute=blocks").fits
    assert planned("vit-h14-i1k-finetune-518", 1, memory=4e9).micro_batch == 0


def test_what_is_computed_again_takes_time() -> None:
    """A forward pass is a third of training; of half of the blocks, or of a head's frozen ones, accordingly less."""
    share = {
        ("none",): 0, ("selective",): 0, ("blocks",): 1, ("blocks", "engine.recompute_every=2"): 1 / 2,
        ("blocks", "finetune.freeze=12"): 1 / 2, ("blocks", "finetune.freeze=all"): 0,
        ("blocks", "finetune.lora_rank=8"): 1,
    }  # fmt: skip
    whole = planned("vit-l16-i1k-finetune-384", 8)
    for (recompute, *more), part in share.items():
        found = planned("vit-l16-i1k-finetune-384", 8, f"engine.recompute={recompute}", *more)
        assert found.again == pytest.approx(part * whole.flop / 3)
    found = planned("vit-l16-i1k-finetune-384", 8, "engine.recompute=blocks")
    assert found.flop == whole.flop
    hours = whole.flop * 4 / 3 / (0.4 * 790e12) / 3600
    last = list(lines(found, 0.4))[-1]
    assert f" {hours:,.1f} GPU-hours" in last
    assert f"at 40% of 790 TFLOP/s, with {whole.flop / 3:.3g} FLOP of recomputation" in last


def test_a_rate_that_never_gets_to_its_peak(vitscale: Callable[..., Any], digits: Any) -> None:
    """A plan refuses it; training says so, and goes on."""
    assert planned("digits-demo", 1, "train.duration=20", "schedule.warmup=15", "schedule.cooldown=6").warmup == 15
    for warmup, cooldown in ((21, 0), (15, 7), (0, 21)):
        own = ("train.duration=20", f"schedule.warmup={warmup}", f"schedule.cooldown={cooldown}")
        with pytest.raises(UserError, match=f"20 steps with {warmup} of warm-up, {cooldown} of cool-down"):
            planned("digits-demo", 1, *own)
    for steps, warmup, cooldown in itertools.product((1, 5), range(8), range(8)):
        rates = [
            lr_factor(step, kind="cosine", total=steps, warmup=warmup, cooldown=cooldown, timescale=1)
            for step in range(steps)
        ]
        assert peaks(steps, warmup, cooldown) == (max(rates) == 1)
    own = ("train.duration=1", "schedule.warmup=2", "eval.every=0", f"data.train={digits.train}", "run.dir=a")
    said = vitscale("pretrain", "digits-demo", *TINY, *own)
    assert (
        "\nwarning: 2 steps of warm-up and 0 of cool-down in a run of 1: the rate never gets to optim.lr\n"
        in said.stdout
    )


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_tensors_that_are_not_there_take_what_real_ones_do(recompute: str) -> None:
    model = ViTConfig(32, 4, depth=4, width=64, mlp_width=128, heads=2, num_classes=10, drop_path=0.1)

    def build(blocks: int) -> Supervised:
        network = build_network(ViTConfig(**{**vars(model), "depth": blocks}), seed=0)
        network.recompute = recompute
        return Supervised(network, Preprocess(32, 1.0))

    def batch_of(rows: int) -> Batch:
        whole = {name: torch.zeros(rows, dtype=torch.int64) for name in ("label", "key", "epoch")}
        return {"pixels": torch.zeros(rows, 32, 32, 3, dtype=torch.uint8), "weight": torch.ones(rows), **whole}

    real = bytes_an_image(build, 4, batch_of, torch.device("cpu"))
    said = image_bytes(Form(model, "fp32", recompute, 1, "softmax", mixes=False))
    assert said == pytest.approx(real, rel=0.02), "kernels' workspaces are real, and differ"


def test_the_command(vitscale: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    words = ("recipe", "plan", "vit-l16-i21k-pretrain", "--gpus", 64, "--images", 14_197_122, "--classes", 21_843)
    said = vitscale(*words, "--gpu-memory", 2, "engine.micro_batch=32", "--mfu", 0.5)
    assert said.returncode == 1, said.stderr
    assert "311,940 steps (10,000 of warm-up), 90.00 epochs of 3,466 steps" in said.stdout
    assert "4,096 images on 64 GPUs: 2 micro batches of 32\n" in said.stdout
    assert "an estimate, not measured: 332.0 GPU-hours, 5.2 hours on 64 GPUs, at 50% of 790 TFLOP/s\n" in said.stdout
    assert "\ndoes not fit: set engine.micro_batch=" in said.stdout


def test_a_recipe_alone_does_not_know_its_images(digits: Any) -> None:
    config = load_recipe("digits-demo", [f"data.train={digits.train}"], SHIPPED)
    assert data_size(config, 0, 0) == (1438, 10)
    with pytest.raises(UserError, match="--images: got no images, 10 classes; "):
        data_size(load_recipe("digits-demo", [], SHIPPED), 0, 10)


@pytest.mark.slow
def test_recipes_of_papers_train_when_made_small(vitscale: Callable[..., Any], digits: Any, tmp_path: Path) -> None:
    """Their settings, down to the optimizer and the numbers, with a network and batches for two CPU cores."""
    small = ("model.depth=2", "model.width=32", "model.mlp_width=64", "model.heads=2", "data.workers=0")
    small += ("train.global_batch=8", "train.duration=3", "eval.every=0", "checkpoint.every=0", "schedule.warmup=1")
    data = f"data.train={digits.train}"

    def run(stage: str, recipe: str, *more: str) -> None:
        size = "model.img_size=28" if "14" in recipe.split("-")[1] else "model.img_size=32"
        said = vitscale(stage, recipe, *small, size, data, f"run.dir={recipe}", *more)
        assert said.returncode == 0, f"{recipe}: {said.stderr}"
        rows = [row for row in read_metrics(tmp_path / recipe) if row["kind"] == "train"]
        assert rows[-1]["step"] == 3

    log = "run.log_every=1"
    for recipe in ("vit-l16-i21k-pretrain", "vit-h14-i21k-pretrain", "vit-s16-i1k-90ep", "vit-b16-i1k-augreg"):
        run("pretrain", recipe, log)
    run("pretrain", "vit-l16-deit3", log)
    run("finetune", "vit-l16-i1k-finetune-384", "init_from=vit-l16-i21k-pretrain", log)
    run("finetune", "vit-h14-i1k-finetune-518", "init_from=vit-h14-i21k-pretrain", log)
