"""Runs that are killed or run out of room, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitscale.data_prep.shard import ShardConfig, shard
from vitscale.errors import UserError

CONFIG = ShardConfig(shard_samples=4, workers=1)
KILLED = """
import os, signal, sys
from vitscale.data_prep.shard import ShardConfig, shard
source, out, workers, stage, at = sys.argv[1:]
def kill(*progress):
    if progress[:2] == (stage, int(at)):
        os.kill(os.getpid(), signal.SIGKILL)
shard(source, out, ShardConfig(shard_samples=4, workers=int(workers)), kill)
"""
SHORT_OF_ROOM = """
import resource, sys
from vitscale.data_prep.shard import ShardConfig, shard
from vitscale.errors import UserError
source, out, workers, room = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
try:
    shard(source, out, ShardConfig(shard_samples=4, workers=int(workers)))
except UserError as error:
    print(error)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_then_continued(make_folder, tmp_path: Path, workers: int) -> None:
    source, out = make_folder(), tmp_path / "out"
    shard(str(source), str(tmp_path / "undisturbed"), CONFIG)
    for stage, at in (("scan", 21), ("write", 1), ("write", 3), ("write", 6)):  # of 21 images and 6 shards
        assert run(KILLED, source, out, workers, stage, at).returncode == -9
        assert not (out / "dataset.json").exists()
    assert len(list(out.glob("*.tar"))) == 6
    (out / "train-000000.tar.x1.partial").write_bytes(b"cut off")  # what a kill within a write leaves
    kept = (out / "train-000001.tar").stat().st_mtime_ns
    assert shard(str(source), str(out), CONFIG)["already_complete"] is False
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")
    assert (out / "train-000001.tar").stat().st_mtime_ns == kept  # continued, not written again


def test_an_interrupted_run_of_other_settings_is_refused(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    run(KILLED, source, out, 1, "write", 2)
    before = bytes_of(out)
    with pytest.raises(UserError, match="interrupted run of another source, settings or versions"):
        shard(str(source), str(out), ShardConfig(shard_samples=5, workers=1))
    assert bytes_of(out) == before
    (out / "thesis.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"other files \(thesis\.txt\)"):
        shard(str(source), str(out), CONFIG)


def test_killed_between_publishing_and_releasing(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    run(KILLED, source, out, 1, "write", 1)
    claim = (out / "unfinished.json").read_bytes()
    shard(str(source), str(out), CONFIG)
    (out / "unfinished.json").write_bytes(claim)
    assert shard(str(source), str(out), CONFIG)["already_complete"] is True
    assert not (out / "unfinished.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_room(make_folder, tmp_path: Path, workers: int) -> None:
    source, out = make_folder(), tmp_path / "out"
    finished = run(SHORT_OF_ROOM, source, out, workers, 4000)  # a shard of four small pictures takes 10 kB
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"OUT: got {out} (File too large)")
    assert [path.name for path in out.iterdir()] == ["unfinished.json"]
    assert shard(str(source), str(out), CONFIG)["samples"] == 21


def test_settings_file_holds_no_traces_of_the_machine(make_folder, tmp_path: Path) -> None:
    run(KILLED, make_folder(), tmp_path / "out", 1, "write", 1)
    assert sorted(json.loads((tmp_path / "out" / "unfinished.json").read_text())) == ["pillow", "pyarrow", "run"]
