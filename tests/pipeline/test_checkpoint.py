"""Checkpoints on disk: whole or not at all, and damage is told from soundness."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vitscale.errors import UserError
from vitscale.pipeline import checkpoint
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import Fragment
from vitscale.pipeline.saver import Saver

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Source:
    """What `checkpoint.save` asks of an engine: shapes and fragments."""

    def __init__(self) -> None:
        self.shapes = {"model.a": (3, 4), "model.b": (5,), "other": (2,)}

    def owned_fragments(self) -> Iterator[Fragment]:
        for i, (name, start, count) in enumerate(
            (("model.a", 0, 7), ("model.a", 7, 5), ("model.b", 0, 5), ("other", 0, 2))
        ):
            values = torch.arange(start, start + count, dtype=torch.float32) + 100 * (name == "model.b")
            yield Fragment(name, start, {"weight": values, "exp_avg": values * 2, "exp_avg_sq": values * i})


def save(folder: Path, step: int, keep: int = 2) -> Path:
    saver = Saver(folder, WORLD, keep, background=False)
    saver.save(Source(), {"step": step, "note": "x"})  # pyright: ignore[reportArgumentType]
    return folder / f"step-{step:08d}"


def test_weights_and_any_range_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    reader = checkpoint.Reader(path)
    assert torch.equal(reader.tensor("model.a"), torch.arange(12.0).reshape(3, 4))
    assert torch.equal(reader.tensor("model.b", "exp_avg"), 2 * (torch.arange(5.0) + 100))
    assert set(reader.shapes) == {"model.a", "model.b", "other"}
    assert torch.equal(reader.tensor("model.a", "ema"), reader.tensor("model.a"))  # no average is kept
    for low in range(12):
        for high in range(low, 13):
            out = torch.full((high - low,), -1.0)
            reader.fill("model.a", "exp_avg", low, out)
            assert torch.equal(out, torch.arange(low, high) * 2.0)
    with pytest.raises(UserError, match="elements 12 to 13"):
        reader.fill("model.a", "weight", 11, torch.empty(2))
    assert checkpoint.read_state(path)["note"] == "x"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 300):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000300", "step-00000010"]


def test_what_damaged_checkpoints_came_after_goes_when_the_run_has_passed_them(tmp_path: Path) -> None:
    """Retention must not prefer a damaged later checkpoint to the one just written."""
    save(tmp_path, 1)
    for step in (200, 300):
        (save(tmp_path, step, keep=9) / "state.json").unlink()
    save(tmp_path, 100, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000100"]


def test_a_flipped_bit_is_passed_over_when_all_ranks_look(tmp_path: Path) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert checkpoint.newest_sound(tmp_path)[0] == tmp_path / "step-00000002"  # sizes alone
    found, warnings = checkpoint.newest_sound(tmp_path, WORLD)
    assert found == tmp_path / "step-00000001"
    assert "sha256" in warnings[0]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / file
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-9] if damage == "cut" else b"")
    found, warnings = checkpoint.newest_sound(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(warnings) == 1
    assert str(victim) in warnings[0]


def test_a_flipped_bit_is_found_when_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    victim = path / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=r"rank-00000.safetensors: sha256"):
        checkpoint.Reader(path).tensor("model.a")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_state(path)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # writes beyond 200 bytes fail
    try:
        with pytest.raises(UserError, match=r"run\.dir"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    found, warnings = checkpoint.newest_sound(tmp_path)
    assert (found, warnings) == (tmp_path / "step-00000001", [])


def test_what_a_killed_save_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.partial").mkdir()
    (tmp_path / ".step-00000009.partial" / "rank-00000.safetensors").write_bytes(b"half")
    assert checkpoint.newest_sound(tmp_path) == (None, [])
    save(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]


class Large(Source):
    """Of 16 MB, so that writing takes a while; every value is the step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.shapes = {"model.a": (1 << 20,)}
        self.values = torch.full((1 << 20,), float(step))

    def owned_fragments(self) -> Iterator[Fragment]:
        yield Fragment("model.a", 0, dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "ema"), self.values))


def save_without_end(folder: Path, first: int) -> None:
    saver = Saver(folder, WORLD, keep=2)
    for step in range(first, 10**6):
        saver.save(Large(step), {"step": step})  # pyright: ignore[reportArgumentType]


def test_a_process_killed_at_any_moment_of_a_save_leaves_sound_checkpoints(tmp_path: Path) -> None:
    """100 times: what bears the name of a checkpoint is one, whole, and none that was finished is lost."""
    moments = random.Random(0)
    newest = 0
    for _ in range(100):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # those of the parent are not there
            save_without_end(tmp_path, newest + 1)
        time.sleep(moments.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found, warnings = checkpoint.newest_sound(tmp_path, WORLD)
        assert not warnings
        step = checkpoint.read_state(found)["step"] if found else 0
        assert step >= newest
        newest = step
        if found:
            assert (checkpoint.Reader(found).tensor("model.a", "ema") == step).all()
    assert newest >= 5  # so many were finished


def test_what_is_saved_is_read_by_the_library(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model.a|exp_avg|7"), torch.arange(7.0, 12.0) * 2)
        assert len(file.keys()) == 12
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_a_save_in_the_background_is_published_when_it_is_committed(tmp_path: Path) -> None:
    saver = Saver(tmp_path, WORLD, keep=1)
    saver.save(Source(), {"step": 1})  # pyright: ignore[reportArgumentType]
    assert not checkpoint.checkpoints(tmp_path)
    while not saver.ready:
        time.sleep(0.001)
    saver.commit()
    assert not saver.ready
    saver.finish()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]


def test_one_of_each_so_many_steps_is_kept_for_good(tmp_path: Path) -> None:
    saver = Saver(tmp_path, WORLD, 2, lambda step: step % 4 == 0, background=False)
    for step in range(1, 12):
        saver.save(Source(), {"step": step})  # pyright: ignore[reportArgumentType]
    assert [int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)] == [11, 10, 8, 4]


def test_a_folder_that_cannot_be_written_stops_the_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: got .*Not a directory.* while saving"):
        save(tmp_path / "file" / "checkpoints", 1)
