"""The profiler records exactly the steps asked for, wherever the loop begins and ends."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from vitscale.pipeline.distributed import World
from vitscale.pipeline.profiler import Profiler

MAIN = World(0, 2, 0, torch.device("cpu"))


def loop(folder: Path, window: range, first: int, last: int, world: World = MAIN, fails_at: int | None = None) -> None:
    """Steps `first` to `last`, each with one product of its own size."""
    with Profiler(window, folder, world, first) as profiler:
        for step in range(first, last):
            torch.mm(torch.ones(step + 1, 1), torch.ones(1, 1))
            if step == fails_at:
                raise KeyError
            profiler.step(step + 1)


def recorded(folder: Path) -> dict[str, tuple[list[str], list[int]]]:
    """By the name of each profile: the steps that the trace shows, and the rows of the products in it."""
    found = {}
    for path in (folder / "profile").glob("*/rank-00000.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        products = [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]
        assert "aten::mm" in (path.parent / "table.txt").read_text()
        assert {file.name for file in path.parent.iterdir()} == {path.name, "table.txt"}
        found[path.parent.name] = sorted(steps), products
    return found


@pytest.mark.parametrize(
    ("first", "last", "name", "steps"),
    [
        (0, 9, "steps-3-5", [3, 4]),  # all of it
        (3, 5, "steps-3-5", [3, 4]),  # nothing besides
        (4, 9, "steps-4-5", [4]),  # what a resume has left of it
    ],
)
def test_exactly_the_steps(tmp_path: Path, first: int, last: int, name: str, steps: list[int]) -> None:
    loop(tmp_path, range(3, 5), first, last)
    assert recorded(tmp_path) == {name: ([f"step {step}" for step in steps], [step + 1 for step in steps])}


def test_a_run_that_ends_within_the_window(tmp_path: Path) -> None:
    """What comes after its last step shows as another one, in which nothing is done."""
    loop(tmp_path, range(3, 6), 0, 4)
    assert recorded(tmp_path) == {"steps-3-4": (["step 3", "step 4"], [4])}


def test_from_the_first_step(tmp_path: Path) -> None:
    loop(tmp_path, range(2), 0, 4)
    assert recorded(tmp_path) == {"steps-0-2": (["step 0", "step 1"], [1, 2])}


def test_nothing_without_a_window_past_it_on_other_ranks_and_after_an_error(tmp_path: Path) -> None:
    loop(tmp_path, range(0), 0, 4)
    loop(tmp_path, range(3, 5), 5, 9)
    loop(tmp_path, range(3, 5), 0, 3)
    loop(tmp_path, range(3, 5), 0, 9, World(1, 2, 1, torch.device("cpu")))
    with pytest.raises(KeyError):
        loop(tmp_path, range(3, 5), 0, 9, fails_at=4)
    assert not (tmp_path / "profile").exists()
    loop(tmp_path, range(3, 5), 0, 9)  # the one that failed left nothing behind in torch either
    assert recorded(tmp_path) == {"steps-3-5": (["step 3", "step 4"], [4, 5])}
