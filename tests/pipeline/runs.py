"""Small runs on the digits through the command line, and what they left."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.weights import open_trained

TINY = (
    "model.depth=2", "model.width=32", "model.mlp_width=64", "model.heads=2", "model.patch_size=8",
    "train.global_batch=30", "train.duration=12", "run.log_every=1", "engine.micro_batch=8",
    "checkpoint.every=4", "checkpoint.keep=3", "eval.every=6", "data.workers=1",
)  # fmt: skip


def losses(folder: Path) -> list[float]:
    """Training loss of each step; every step once, in order."""
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def words(digits: Any, folder: Path, *more: str) -> list[str]:
    data = (f"data.train={digits.train}", f"data.val={digits.test}", f"run.dir={folder}")
    return [sys.executable, "-m", "vitscale.launch.cli", "pretrain", "digits-demo", *TINY, *data, *more]


def command(digits: Any, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words(digits, folder, *more), capture_output=True, text=True, env=env, timeout=300)


def wait_for(path: Path, running: subprocess.Popen) -> None:
    """Until `path` is there; fails if the process ends first or a minute goes by."""
    for _ in range(1200):
        if path.exists():
            return
        assert running.poll() is None, f"ended with {running.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (dict(open_trained(str(folder), "x").tensors()) for folder in (one, other))
    return all((ours[name] == theirs[name]).all() for name in theirs)
