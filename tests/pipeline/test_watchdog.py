"""A rank that hangs, in Python, in a collective and in C that keeps Python's lock, ends, and leaves its stacks."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_INTERNAL
from vitscale.launch import local

PRELUDE = """
import os, re, signal, sys, time
from pathlib import Path
from vitscale.pipeline.watchdog import Watchdog

def hang():
    time.sleep(60)

def hang_with_lock():
    re.match("(a+)+$", "a" * 64 + "b")

folder = Path(sys.argv[1])
"""


def start(folder: Path, source: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + source, str(folder)], stderr=subprocess.PIPE, text=True)


def test_ranks_that_hang_end(tmp_path: Path) -> None:
    with_beats = "with Watchdog(0.8, folder, {}) as dog:\n    for step in range(8): time.sleep(0.2); dog.beat(step)\n"
    (tmp_path / "file").write_text("")
    hung = start(tmp_path, with_beats.format(3) + "    dog.beat(); hang()")
    early = start(tmp_path / "file", "with Watchdog(0.8, folder, 0): hang()")  # a folder that cannot be
    locked = start(tmp_path, "with Watchdog(0.8, folder, 4): hang_with_lock()")
    left = start(tmp_path, with_beats.format(5) + "time.sleep(1.2)")
    off = start(tmp_path, "with Watchdog(0, folder, 6) as dog: dog.beat(1); time.sleep(1)")
    said = {process: process.communicate(timeout=60)[1] for process in (hung, early, locked, left, off)}
    assert [process.returncode for process in said] == [EXIT_HUNG, EXIT_HUNG, EXIT_INTERNAL, EXIT_DONE, EXIT_DONE], said
    file = tmp_path / "hangs" / "rank-00003.txt"
    reason = "no step for 0.8 s (guard.step_timeout), last step 7"
    remedy = "Run the same command again to go on."
    assert said[hung] == f"error: rank 3: {reason}; stacks are in {file}. {remedy}\n"
    first, _, stacks = file.read_text().partition("\n")
    assert f"rank 3, host {socket.gethostname()}, process {hung.pid}: no step for 0.8 s, last step 7" in first
    assert "in hang\n" in stacks
    assert "before the first step; stacks are above, as " in said[early]
    assert "(Not a directory). Run the same" in said[early]
    assert "in hang\n" in said[early]
    assert "in hang_with_lock\n" in said[locked]  # by C code
    assert (said[left], said[off]) == ("", "")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_stopped_rank_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stops (SIGSTOP); the other hangs in a collective, its watchdog ends it, and the launcher kills the first."""
    source = f"""{PRELUDE}
import torch
import torch.distributed as dist
from vitscale.pipeline.distributed import join

def meet():
    dist.all_reduce(torch.ones(1))

world = join("cpu")
with Watchdog(1, folder, world.rank) as dog:
    for step in range(1, 4):
        meet()
        dog.beat(step)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    meet()
"""
    monkeypatch.setattr(local, "GRACE", 0.5)
    begun = time.monotonic()
    assert local.run([sys.executable, "-c", source, str(tmp_path)], 2) == EXIT_HUNG
    assert time.monotonic() - begun < 60  # a collective waits for half an hour
    killed, said = capfd.readouterr().err.splitlines()[-2:]
    assert killed == "killed, as it did not answer: rank 1"
    assert said.startswith("error: rank 0: no step for 1 s (guard.step_timeout), last step 3; stacks are in ")
    assert "in meet\n" in (tmp_path / "hangs" / "rank-00000.txt").read_text()
