"""Runs that are killed or run out of room, in processes of their own: what comes out is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.shard import STAGES, shard
from vitscale.errors import UserError

CONFIG = ShardConfig(shard_samples=4, workers=1, dedup=DedupConfig("drop", near=4))
PROGRAM = """
import os, resource, signal, sys
from vitscale.data_prep import shard as module
from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.errors import UserError
source, out, workers, stage, at, room = sys.argv[1:]
module.BUCKET_RECORDS = 10  # several tasks in each stage; the undisturbed run has one
def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
def disturb(*progress):
    if progress[:2] == (stage, int(at)):
        limit() if int(room) else os.kill(os.getpid(), signal.SIGKILL)
if int(room) and not stage:
    limit()
print("begin", flush=True)
try:
    config = ShardConfig(shard_samples=4, workers=int(workers), dedup=DedupConfig("drop", near=4))
    module.shard(source, out, config, disturb)
except UserError as error:
    print(error)
"""


def start(source: Path, out: Path, workers: int, stage: str = "", at: int = 0, room: int = 0) -> subprocess.Popen[str]:
    """Begin a run that is killed after task `at` of `stage`, or from then on may write files of `room` bytes only."""
    command = [sys.executable, "-c", PROGRAM, *map(str, (source, out, workers, stage, at, room))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, **options: int) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **options)  # pyright: ignore[reportArgumentType]
    output, errors = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, output, errors)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(make_folder) -> Path:
    """A table of 42 rows in 7 chunks: JPEG and PNG, exact and near copies, and files that are no images."""
    folder = make_folder(each=12)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    whole = (folder / names[0]).read_bytes()
    (folder / "page.jpg").write_bytes(b"<html>")
    (folder / "cut.jpg").write_bytes(whole[:-9])
    (folder / "near.jpg").write_bytes(whole[:2] + b"\xff\xfe\0\x04no" + whole[2:])  # with a comment: the same pixels
    names += ["page.jpg", names[0], "near.jpg", "gone.jpg", "cut.jpg", names[1]]
    table = pa.table({"path": names, "label": [row % 3 for row in range(len(names))]})
    pq.write_table(table, folder / "table.parquet", row_group_size=6)
    return folder / "table.parquet"


@pytest.fixture
def undisturbed(source: Path, tmp_path: Path) -> dict[str, bytes]:
    info = shard(str(source), str(tmp_path / "undisturbed"), CONFIG)
    assert info["rejected"] == {"not an image": 1, "truncated": 1, "unreadable": 1}
    assert info["duplicate"] >= 3
    assert info["shards"] >= 6
    return bytes_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_every_stage_then_continued(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    for at, stage in enumerate(STAGES, start=1):
        at = min(at, 4)
        killed = run(source, out, workers, stage, at)
        assert killed.returncode == -signal.SIGKILL, f"{stage}: {killed.stdout}{killed.stderr}"
        assert not (out / "dataset.json").exists()
    (out / "train-000000.tar.x1.partial").write_bytes(b"cut off")  # what a kill within a write leaves
    (out / "manifest" / "000-0000.parquet.x1.partial").write_bytes(b"cut off")
    kept = (out / "train-000001.tar").stat().st_mtime_ns
    finished = run(source, out, workers)
    assert (finished.returncode, finished.stdout) == (0, "begin\n"), finished.stderr
    assert bytes_of(out) == undisturbed
    assert (out / "train-000001.tar").stat().st_mtime_ns == kept  # continued, not written again


def kill_at_random(source: Path, undisturbed: dict[str, bytes], folder: Path, kills: int) -> None:
    """Kill runs at moments drawn uniformly from the time that one takes, each going on where the last one ended."""
    random, number = np.random.default_rng(0), 0
    process = begun(source, folder / "timed")
    began = time.monotonic()
    process.communicate()
    longest = time.monotonic() - began
    while kills:
        out = folder / f"out{number}"
        process = begun(source, out)
        try:
            process.wait(random.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        kills -= process.returncode == -signal.SIGKILL
        if not kills or (out / "dataset.json").exists():
            finished = run(source, out, 2)
            assert (finished.returncode, finished.stdout) == (0, "begin\n"), finished.stderr
            assert bytes_of(out) == undisturbed
            number += 1


def begun(source: Path, out: Path) -> subprocess.Popen[str]:
    """A run whose imports are done."""
    process = start(source, out, 2)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


@pytest.mark.slow
def test_killed_at_ten_random_moments(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    kill_at_random(source, undisturbed, tmp_path, kills=10)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    kill_at_random(source, undisturbed, tmp_path, kills=100)


def test_an_interrupted_run_of_other_settings_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, 1, "write", 2)
    before = bytes_of(out)
    with pytest.raises(UserError, match="interrupted run of another source, settings or versions"):
        shard(str(source), str(out), ShardConfig(shard_samples=5, workers=1))
    assert bytes_of(out) == before
    (out / "thesis.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"other files \(thesis\.txt\)"):
        shard(str(source), str(out), CONFIG)


def test_killed_between_publishing_and_releasing(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, 1, "write", 1)
    claim, work = (out / "unfinished.json").read_bytes(), bytes_of(out / "work")
    assert run(source, out, 1).returncode == 0
    (out / "unfinished.json").write_bytes(claim)
    for name, content in work.items():
        (out / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "work" / name).write_bytes(content)
    assert shard(str(source), str(out), CONFIG)["already_complete"] is True
    assert bytes_of(out) == undisturbed


@pytest.mark.parametrize(
    ("workers", "room", "stage", "at", "tars"),
    [
        (1, 1000, "", 0, 0),
        (2, 1000, "", 0, 0),
        (1, 1000, "match", 5, 0),
        (1, 9000, "plan", 5, 0),
        (1, 9000, "write", 9, 9),
    ],
    ids=["scan", "scan by two", "dedup", "write", "card"],
)
def test_no_room(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: int, room: int, stage: str, at: int, tars: int
) -> None:
    out = tmp_path / "out"
    finished = run(source, out, workers, stage, at, room)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"begin\nOUT: got {out} (File too large)")
    assert not list(out.rglob("*.partial"))
    assert len(list(out.glob("*.tar"))) == tars
    assert not (out / "dataset.json").exists()
    assert run(source, out, workers).stdout == "begin\n"
    assert bytes_of(out) == undisturbed


def test_a_file_that_changes_during_the_run_is_named(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", 1, "scan", 7)
    victim = source.parent / "ant" / "002.jpg"
    victim.write_bytes(victim.read_bytes()[::-1])
    said = run(source, tmp_path / "out", 1).stdout
    assert said.startswith("begin\nSOURCE: got ant/002.jpg, which changed during the run")


def test_settings_file_holds_no_traces_of_the_machine(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", 1, "write", 1)
    claim = json.loads((tmp_path / "out" / "unfinished.json").read_text())
    assert sorted(claim) == ["numpy", "opencv-python-headless", "pillow", "pyarrow", "run", "simplejpeg"]
    name = os.uname().nodename.encode()
    traces = [str(tmp_path).encode(), *([name] if len(name) > 5 else [])]  # a shorter one is in JPEGs by chance
    assert not any(trace in content for content in bytes_of(tmp_path / "out").values() for trace in traces)
