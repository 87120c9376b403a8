"""Checkpoints on disk: whole or not at all, and damage is told from soundness."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitscale.errors import UserError
from vitscale.pipeline import checkpoint
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import Fragment

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
    return checkpoint.save(folder, Source(), {"step": step, "note": "x"}, WORLD, keep)  # pyright: ignore


def test_weights_and_any_range_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    weights = dict(checkpoint.Reader(path).weights("model."))
    assert torch.equal(weights["a"], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(weights["b"], torch.arange(5.0) + 100)
    assert set(weights) == {"a", "b"}
    reader = checkpoint.Reader(path)
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
        dict(checkpoint.Reader(path).weights("model."))


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
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found, warnings = checkpoint.newest_sound(tmp_path)
    assert (found, warnings) == (tmp_path / "step-00000001", [])


def test_what_a_killed_save_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.partial").mkdir()
    (tmp_path / ".step-00000009.partial" / "rank-00000.safetensors").write_bytes(b"half")
    assert checkpoint.newest_sound(tmp_path) == (None, [])
    save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
