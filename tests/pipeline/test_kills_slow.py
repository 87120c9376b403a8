"""Whole runs killed again and again, at any moment."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.runs import command, losses, same_weights, words
from vitscale.pipeline import checkpoint
from vitscale.pipeline.distributed import World

KILLS = 60
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(digits: Any, tmp_path: Path) -> None:
    """Both ranks and the launcher by kill -9, within the start and while every step is saved; the stage and the number
    of ranks stay, so that every bit is the same."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    more = ("--nproc", "2", "train.duration=600", "checkpoint.every=1", "optim.ema=0.9", "eval.every=0")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments, newest = random.Random(0), 0
    for _ in range(KILLS):
        running = subprocess.Popen(words(digits, folder, *more), env=env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        begun, seconds = log_size(folder), moments.uniform(0, 1.5)
        while moments.random() > 0.002 and log_size(folder) == begun:  # now and then within the start
            assert running.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        found, warnings = checkpoint.newest_sound(folder / "checkpoints", ALONE)
        assert not warnings
        step = checkpoint.read_state(found)["step"] if found else 0
        assert step >= newest
        newest = step
    assert newest >= KILLS // 4
    assert command(digits, folder, *more).returncode == 0
    assert command(digits, whole, *more).returncode == 0
    assert losses(folder) == losses(whole)
    assert same_weights(folder, whole)


def log_size(folder: Path) -> int:
    """Bytes of a run's log, which a start cuts to its checkpoint and steps lengthen."""
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0
