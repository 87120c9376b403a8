"""What `vitscale status` says of a run in each of its states, without disturbing it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vitscale.errors import UserError
from vitscale.pipeline import status as module
from vitscale.pipeline.config import Config, DataConfig, TrainConfig
from vitscale.pipeline.recipe import to_yaml
from vitscale.pipeline.status import lines, lock_holder, read_status

HOLD = """
import sys
from pathlib import Path
import torch
from vitscale.pipeline.distributed import World
from vitscale.pipeline.run_folder import run_lock
with run_lock(Path(sys.argv[1]), World(0, 1, 0, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""
TRAIN = {
    "loss": 5.12345, "grad_norm": 1.234, "top1": 0.123, "lr": 3e-4, "images_per_s": 12_345.6,
    "images_per_s_per_rank": 771.6, "step_ms": 331.0, "data_ms": 2.0, "forward_ms": 110.0, "backward_ms": 200.0,
    "optimizer_ms": 15.0, "data_wait": 0.006, "tflops": 287.0, "mfu": 0.363, "slowest_rank": 5, "slowest_ratio": 1.318,
    "memory_gb": 61.2, "host_memory_gb": 210.3, "eta_s": 29_553.0, "skipped": 0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 250 steps of 40 images, 10 epochs of 1,000, that has just been started on this host."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = Config(data=DataConfig(val="somewhere"), train=TrainConfig(global_batch=40, duration="10ep"))
    (folder / "recipe.yaml").write_text(to_yaml(config))
    start = {"host": platform.node(), "world_size": 16}
    (folder / "environment.json").write_text(json.dumps([{"host": "before"}, start]))
    return folder


def log(folder: Path, *rows: dict[str, Any], age: float = 0.0) -> None:
    """Append rows to the log, the last of them `age` seconds ago."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    written = time.time() - age
    os.utime(folder / "metrics.jsonl", times=(written, written))


def save(folder: Path, step: int, age: float = 0.0, **more: Any) -> None:
    """What `status` reads of a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = {"format": 1, "step": step, "dataset": {"samples": 1000}, **more}
    (path / "state.json").write_text(json.dumps(state))
    written = time.time() - age
    os.utime(path / "state.json", times=(written, written))


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Another process holds the run's folder, as a run does; gives its id."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield holder.pid
    holder.communicate()
    assert holder.returncode == 0


def test_a_run_that_goes_on(run: Path) -> None:
    with held(run) as pid:
        found = read_status(str(run))
        assert (found.state, found.pid, found.step, found.steps, found.row_age) == ("running", pid, 0, None, None)
        assert dict(lines(found))["run"] == f"{run}: running on {platform.node()} (process {pid}); no row yet"
        save(run, 100, age=700.0, position={"rollbacks": 1})
        evaluation = {"step": 100, "kind": "eval", "top1": 0.25, "loss": 3.5}
        log(run, evaluation, {"step": 120, "kind": "train", **TRAIN, "samples": "00 00"}, age=12.0)
        log(run, {"step": 121, "kind": "incident", "refused": "loss", "loss": None}, age=12.0)
        for name in ("incidents/step-00000080", "incidents/step-00000121", "hangs"):
            (run / name).mkdir(parents=True)
        (run / "hangs" / "rank-00003.txt").touch()
        found = read_status(str(run))
        assert lock_holder(run / ".lock") == pid  # still: asking took nothing
    assert (found.state, found.step, found.steps, found.examples, found.epoch) == ("running", 120, 250, 4800, 4.8)
    assert (found.ranks, found.rollbacks, found.evaluation) == (16, 1, evaluation)
    assert found.train == {"step": 120, "kind": "train", **TRAIN}
    assert found.row_age == pytest.approx(12.0, abs=5.0)  # two processes may well wait for a core
    assert found.checkpoint_age == pytest.approx(700.0, abs=5.0)
    said = dict(lines(found))
    assert said.pop("run").startswith(f"{run}: running on {platform.node()} (process {pid}); last row 0:00:1")
    assert said.pop("checkpoint").startswith("step-00000100, 0:11:4")
    assert said == {
        "progress": "step 120 of 250 (48.0%)  4,800 images  epoch 4.80  ETA 8:12:33",
        "training": "loss 5.1235  top-1 12.30%  lr 3.00e-04  gradient norm 1.23",
        "speed": "12,346 images/s  772 a rank  287 TFLOP/s a rank  MFU 36.3%  0.6% of the time waiting for data",
        "step": "331.0 ms: data 2.0, forward 110.0, backward 200.0, optimizer 15.0, other 4.0",
        "memory": "61.2 GB the most of a rank  210.3 GB in use on the host of rank 0",
        "slowest": "rank 5: 1.32 times the median of the others, before they meet",
        "evaluation": "after step 100: top1 0.2500  loss 3.5000",
        "incidents": "2, the last step-00000121; 1 rollback",
        "hangs": "rank-00003.txt",
    }


def test_a_run_that_does_not(run: Path) -> None:
    """Stopped, finished, and one that another host began, whose locks this one may not see."""
    assert read_status(str(run)).state == "stopped"
    assert dict(lines(read_status(str(run)))) == {
        "run": f"{run}: stopped before its first row", "progress": "step 0  0 images"
    }  # fmt: skip
    save(run, 100)
    log(run, {"step": 120, "kind": "train", **TRAIN}, age=100_000.0)
    found = read_status(str(run))
    assert (found.state, found.pid, found.step, found.evaluation) == ("stopped", None, 120, {})
    said = dict(lines(found))
    assert said["run"].startswith(f"{run}: stopped; last row 27:46:4")
    assert said["progress"] == "step 120 of 250 (48.0%)  4,800 images  epoch 4.80"  # nothing is coming
    (run / "environment.json").write_text(json.dumps([{"host": "node-7", "steps": 240}]))
    found = read_status(str(run))
    assert (found.state, found.steps) == ("elsewhere", 240)
    assert dict(lines(found))["run"].startswith(f"{run}: last started on node-7, which this host cannot see; last row")
    save(run, 240)
    assert read_status(str(run)).state == "finished"
    (run / "environment.json").write_text("damaged")
    found = read_status(str(run))
    assert (found.state, found.steps, found.host) == ("stopped", 250, None)
    save(run, 250)
    found = read_status(str(run))
    assert (found.state, found.step, found.checkpoint) == ("finished", 250, "step-00000250")
    (run / "checkpoints" / "step-00000250" / "state.json").write_text('{"format"')  # passed over, as a resume would
    assert read_status(str(run)).checkpoint == "step-00000240"


@pytest.mark.parametrize(("duration", "steps"), [("70", 70), ("4000ex", 100), ("10ep", None), ("nonsense", None)])
def test_steps_before_the_first_checkpoint(run: Path, duration: str, steps: int | None) -> None:
    (run / "recipe.yaml").write_text(f"train: {{global_batch: 40, duration: '{duration}'}}\nof_a_later_version: 1\n")
    assert read_status(str(run)).steps == steps


def test_a_long_log_is_read_from_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 MB the last few rows are read; an evaluation is looked for further back, but not for ever."""
    row = json.dumps({"step": 1, "kind": "train", "loss": 1.0, "samples": "0" * 10_000}) + "\n"
    with (run / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 1, "kind": "eval", "top1": 0.5}) + "\n")
        file.writelines(row for _ in range(4000))
    parsed = []
    real = json.loads

    def counted(line: Any) -> Any:
        parsed.append(len(line))
        return real(line)

    monkeypatch.setattr("vitscale.pipeline.metrics.json.loads", counted)
    found = read_status(str(run))
    assert (found.train["loss"], found.evaluation) == (1.0, {})
    assert module.LOOKED_AT < sum(parsed) < module.LOOKED_AT * 1.1
    parsed.clear()
    log(run, {"step": 4000, "kind": "eval", "top1": 0.75}, {"step": 4001, "kind": "train", "loss": 2.0})
    found = read_status(str(run))
    assert (found.train["loss"], found.evaluation["top1"]) == (2.0, 0.75)
    assert sum(parsed) < 1000


def test_the_command(vitscale: Callable[..., subprocess.CompletedProcess[str]], run: Path, tmp_path: Path) -> None:
    """Plain text where there is no terminal, JSON when asked for, one paragraph for what is no run."""
    save(run, 100)
    log(run, {"step": 120, "kind": "train", **TRAIN})
    said = vitscale("status", run)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[1] == "progress   step 120 of 250 (48.0%)  4,800 images  epoch 4.80"
    told = json.loads(vitscale("status", run, "--json").stdout)
    assert (told["state"], told["step"], told["train"]["mfu"]) == ("stopped", 120, 0.363)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "environment.json", "metrics.jsonl", "recipe.yaml"
    ]  # fmt: skip
    refused = vitscale("status", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: RUN: got {tmp_path}, which holds no recipe.yaml; expected the folder of")
    with pytest.raises(UserError, match="RUN"):
        read_status(str(tmp_path / "nowhere"))
