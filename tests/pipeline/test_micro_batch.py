"""The micro batch that is found by trial: what is measured is what is taken, and what fits is what is said to fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.pipeline.runs import TINY, command, losses
from vitscale.errors import UserError
from vitscale.launch.recipes import RECIPES
from vitscale.pipeline import micro_batch, planner
from vitscale.pipeline import train as training
from vitscale.pipeline.activations import taken
from vitscale.pipeline.distributed import World
from vitscale.pipeline.micro_batch import Room
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.placement import Placement, States
from vitscale.pipeline.planner import Plan
from vitscale.pipeline.recipe import load_recipe
from vitscale.pipeline.train import make_objective


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than these networks do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
SMALL = ("model.depth=6", "model.width=64", "model.mlp_width=256")
MIXED = ("augment.mixup=0.8", "augment.cutmix=1", "augment.randaugment_ops=2", "augment.erase=0.25")


def make_plan(train: str | Path, folder: str | Path, *more: str, world_size: int = 1) -> Plan:
    words = (*TINY, f"data.train={train}", f"run.dir={folder}", "data.workers=0", *more)
    return planner.plan(load_recipe("digits-demo", list(words), RECIPES), world_size)


def image(plan: Plan) -> float:
    return micro_batch.find(plan, ALONE, make_objective, 0, 0).an_image


def allocated(plan: Plan, rows: int) -> int:
    """The most bytes that torch's allocator gave out in a forward and backward pass of the whole network."""
    objective = make_objective(plan)
    batch = micro_batch.synthetic(plan, rows, CPU)
    objective(batch)[0].backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective(batch)[0].backward()
    now = most = 0
    kineto: Any = profiler.profiler
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_what_is_taken_grows_by_the_same_for_each_image(digits: Any, tmp_path: Path) -> None:
    """But for float64 tables, which are as large for few images as for many; the first pass makes the gradients."""
    plan = make_plan(digits.train, tmp_path, *SMALL)
    objective = make_objective(plan)
    of = [taken(objective, lambda rows: micro_batch.synthetic(plan, rows, CPU), rows, CPU) for rows in (8, 8, 16, 32)]
    first, second = of[1].growth(of[2], 8), of[2].growth(of[3], 16)
    assert (second.held, second.backward) == pytest.approx((first.held, first.backward), rel=1e-3)
    assert of[1].held / 8 == pytest.approx(first.held, rel=0.02)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("engine.recompute=blocks",),
        ("model.dropout=0.1", "model.drop_path=0.1"),
        ("objective.loss=sigmoid", *MIXED),
    ],
)
def test_two_small_networks_tell_what_the_whole_one_takes(digits: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Against torch's own allocator, at 6 blocks: what it rounds, and the batch itself, which it gave out before, are
    3 of at least 120 kB."""
    plan = make_plan(digits.train, tmp_path, *SMALL, *more)
    assert image(plan) == pytest.approx((allocated(plan, 32) - allocated(plan, 16)) / 16, rel=0.05)


def test_recomputing_and_16_bits_take_less(digits: Any, tmp_path: Path) -> None:
    """Of 6 blocks, of which one is there at a time: more than a third of the memory, less than a half. Of 16 bits all
    but the loss."""
    plan = make_plan(digits.train, tmp_path, *SMALL)
    recomputing = make_plan(digits.train, tmp_path, *SMALL, "engine.recompute=blocks")
    bf16 = make_plan(digits.train, tmp_path, *SMALL, "engine.dtype=bf16")
    assert image(recomputing) < 0.5 * image(plan)
    assert image(bf16) == pytest.approx(0.5 * image(plan), rel=0.05)


def test_the_largest_fits_and_one_more_would_not(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "fastest", lambda objective, batch_of, most: most)
    plan = make_plan(digits.train, tmp_path)
    each = image(plan)
    for images, unit, size in ((20.5, 1, 20), (20.5, 2, 20), (21.5, 2, 20), (0.5, 1, 0), (1.5, 2, 0), (200, 1, 64)):
        loader = replace(plan.loader, pairs=unit == 2)
        left = images * each
        assert micro_batch.find(replace(plan, loader=loader), ALONE, make_objective, left, 64).size == size


def test_a_cpu_takes_no_more_than_makes_it_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {8: 100.0, 16: 110.0, 32: 114.0, 64: 200.0}
    monkeypatch.setattr(micro_batch, "_images_a_second", lambda objective, batch_of, rows: rates[rows])
    assert micro_batch.fastest(torch.nn.Identity(), lambda rows: {}, 64) == 16
    assert micro_batch.fastest(torch.nn.Identity(), lambda rows: {}, 8) == 8


def agreed(world: World, data: str, folder: str) -> list[Any]:
    """What two ranks of different memory settle on, and what they say where one of them has none."""
    plan = make_plan(data, folder, "engine.micro_batch=auto", "train.global_batch=64", world_size=world.size)
    each = image(plan)
    have = micro_batch.room(plan, world, make_objective)
    micro_batch.fastest = lambda objective, batch_of, most: most
    rooms = [have.fixed + images * each for images in (30.5, 12.5)]
    micro_batch.room = lambda *_: replace(have, total=rooms[world.rank])
    found = micro_batch.fitted(plan, world, make_objective).loader.micro_batch
    rooms[1] = 0
    try:
        micro_batch.fitted(plan, world, make_objective)
        said = ""
    except UserError as error:
        said = str(error)
    return micro_batch.gather([plan.loader.micro_batch, found, said])


def test_ranks_agree_on_what_fits_on_all(ranks: Callable[..., Any], digits: Any, tmp_path: Path) -> None:
    """12 images on the smaller rank: a share of 32 is three micro batches, for which 11 suffice."""
    one, other = ranks(__file__, "agreed", 2, str(digits.train), str(tmp_path))
    assert one == other
    assert one[:2] == [32, 11]
    assert "engine.zero_stage: got 2, at which" in one[2]
    assert "expected room for an image in the 0.0000 GB of rank 1" in one[2]


@pytest.mark.slow
def test_a_run_that_finds_its_micro_batch_trains_alike(digits: Any, tmp_path: Path) -> None:
    """Sums in another order leave about 1e-6 in the losses."""
    for name, more in (("eight", ()), ("auto", ("engine.micro_batch=auto",))):
        said = command(digits, tmp_path / name, "train.duration=6", "eval.every=0", *more)
        assert said.returncode == 0, said.stderr
    assert "of 30 found by trial: 0." in said.stdout
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "eight"), abs=1e-4)


def run_out(module: Any, inputs: Any, output: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def told(world: World, data: str, folder: str) -> list[str]:
    """What training says that runs out of memory in a forward pass: with room for 5 images, and for half the states."""
    plan = make_plan(data, folder, "engine.micro_batch=30")
    have, each = micro_batch.room(plan, world, make_objective), image(plan)

    def failing(made: Plan) -> Supervised:
        objective = make_objective(made)
        if made is plan:  # not those of the trial
            objective.model.get_submodule("blocks.1").register_forward_hook(run_out)
        return objective

    training.make_objective = failing
    said = []
    for total in (have.fixed + 5.5 * each, have.fixed / 2):
        micro_batch.room = lambda *_, total=total: replace(have, total=total)
        try:
            training.train(plan, world)
        except UserError as error:
            said.append(str(error))
    return said


def test_running_out_of_memory_says_what_would_fit(ranks: Callable[..., Any], digits: Any, tmp_path: Path) -> None:
    batch, states = ranks(__file__, "told", 1, str(digits.train), str(tmp_path / "run"))
    assert "engine.micro_batch: got 30, for which the memory of rank 0 did not suffice (an image takes 0.0" in batch
    assert batch.endswith("Set engine.micro_batch=5, which should fit, or engine.recompute=blocks.")
    assert "engine.zero_stage: got 2, at which" in states
    assert "(states alone: 0.0004 GB at 0, 0.0005 GB at 1, 0.0005 GB at 2, 0.0005 GB at 3)" in states
    assert states.endswith("or a smaller model. engine.recompute=blocks makes an image take less.")


@pytest.mark.parametrize(
    ("memory", "remedy"),
    [
        (6e9, "Set engine.zero_stage=2, which keeps 5.50 GB,"),  # 2 + 14 / 4 bytes a parameter
        (5e9, "Set engine.zero_stage=3, which keeps 4.00 GB,"),  # 16 / 4
        (3e9, "Set engine.zero_stage=3 engine.offload=optimizer, which keeps 1.00 GB,"),  # 4 / 4
        (0.9e9, "Set engine.zero_stage=3 engine.offload=all, which keeps 0.5000 GB,"),  # 2 / 4
        (0.1e9, "Train on more ranks or larger devices, or a smaller model."),
    ],
)
def test_states_that_do_not_fit(digits: Any, tmp_path: Path, memory: float, remedy: str) -> None:
    """A billion parameters in bf16 on 4 GPUs: weight and gradient of 2 bytes each, a master and two moments of 4."""
    plan = make_plan(digits.train, tmp_path, "engine.dtype=bf16", "engine.zero_stage=1")
    have = Room(10**9, States("bf16", 2), Placement(2, True, "none", True, ""), memory, 7e9)
    said = str(micro_batch._no_room(plan, World(0, 4, 0, torch.device("cuda")), have))
    assert "(states alone: 7.00 GB at 1, 5.50 GB at 2, 4.00 GB at 3)" in said
    assert remedy in said
