"""The launcher with real processes: signals passed on, failing ranks, who is told of, and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vitscale.errors import EXIT_INTERNAL, EXIT_REQUEUE, EXIT_USER
from vitscale.launch import local

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from vitscale.errors import report_failure

rank, launcher = int(os.environ["RANK"]), os.getppid()

def meet(name):
    (Path(sys.argv[1]) / f"{name}-{rank}").touch()
    while len(list(Path(sys.argv[1]).glob(f"{name}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run(source)`: what two ranks of the source end with, from this process as their launcher; grace of 0.5 s."""
    monkeypatch.setattr(local, "GRACE", 0.5)
    return lambda source: local.run([sys.executable, "-c", PRELUDE + source, str(tmp_path)], 2)


def test_ranks_know_their_place(run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = "import json; (Path(sys.argv[1]) / f'{rank}.json').write_text(json.dumps(dict(os.environ)))"
    assert run(source) == 0
    for rank in range(2):
        env = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
        assert env[local.LAUNCHER] == str(os.getpid())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signals_are_passed_on_and_slow_ranks_waited_for(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """One rank ends at once, the other after more than the grace that a failure leaves, in spite of a second signal."""
    source = f"""
def asked(number, _):
    global came
    came = number
    time.sleep(1.2 * rank)
    report_failure(f"rank {{rank}} saved after {{signal.Signals(number).name}}")
    os._exit(75)

signal.signal(signal.{name}, asked)
meet("ready")
if rank == 0:
    os.kill(launcher, signal.{name})
else:
    time.sleep(0.3)
    os.kill(launcher, signal.{name})
time.sleep(60)
"""
    assert run(source) == EXIT_REQUEUE
    assert capfd.readouterr().err == f"rank 0 saved after {name}\n"


def test_a_signal_that_comes_too_early_asks_for_another_start(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """One rank notes it already, and waits in vain for the one that it ended."""
    source = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
meet("ready")
if rank == 0:
    os.kill(launcher, signal.SIGTERM)
time.sleep(60)
"""
    assert run(source) == EXIT_REQUEUE
    assert capfd.readouterr().err == "ended by SIGTERM; run the same command again to go on\n"


def test_ctrl_c_and_a_second_one(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Ranks that end do so by themselves; one that ignores it is killed at once by the second."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with `&` ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    source = "meet('ready')\nif rank == 0: os.kill(launcher, signal.SIGINT)\n"
    source += "meet('sent')\nif rank == 1: sys.exit(130)\ntime.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run(source)
    monkeypatch.setattr(local, "GRACE", 60.0)
    twice = "signal.signal(signal.SIGTERM, signal.SIG_IGN); meet('again')\nif rank == 0:\n"
    twice += "    for _ in range(2): os.kill(launcher, signal.SIGINT); time.sleep(0.5)\ntime.sleep(60)"
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(twice)
    assert time.monotonic() - begun < 30


def test_a_failing_rank_ends_those_that_wait_for_it(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They do not even end on SIGTERM; the code of the failure becomes the launcher's, or 1 if it is another one."""
    source = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(Path(sys.argv[1]) / f"pid-{rank}").write_text(str(os.getpid()))
meet("ready")
if rank == 1:
    report_failure("error: data: got nothing", cause=True)
    sys.exit(2)
time.sleep(60)
"""
    assert run(source) == EXIT_USER
    assert capfd.readouterr().err == "error: data: got nothing\n"
    assert not Path(f"/proc/{(tmp_path / 'pid-0').read_text()}").exists()
    assert run("sys.exit(3 * rank)") == EXIT_INTERNAL
    assert capfd.readouterr().err == "error: rank 1 ended: exit code 3. Run the same command again to go on.\n"


def test_a_killed_rank_is_named_and_not_those_that_lose_it(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    source = """
meet("ready")
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
report_failure("internal error: connection lost")
sys.exit(1)
"""
    assert run(source) == EXIT_INTERNAL
    said = "error: rank 1 ended: killed by SIGKILL, as when memory runs out. Run the same command again to go on.\n"
    assert capfd.readouterr().err == said


def test_a_cause_comes_before_what_was_said_earlier(run: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    source = """
if rank == 1:
    meet("said")
report_failure(f"error: said by rank {rank}", cause=rank == 1)
report_failure("error: said after that", cause=True)
if rank == 0:
    meet("said")
sys.exit(1 + rank)
"""
    assert run(source) == EXIT_USER
    assert capfd.readouterr().err == "error: said by rank 1\n"


def test_of_equals_the_earliest_is_told(run: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    source = "time.sleep(0.1 * (1 - rank)); report_failure(f'error: said by rank {rank}'); sys.exit(1 + rank)"
    assert run(source) == EXIT_USER
    assert capfd.readouterr().err == "error: said by rank 1\n"


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    """Also a rank that asks the kernel for it when its launcher is dead already."""
    source = f"""{PRELUDE}
from vitscale.pipeline.distributed import die_with_parent
if rank == 1:
    die_with_parent(launcher)
(Path(sys.argv[1]) / f"pid-{{rank}}").write_text(str(os.getpid()))
meet("ready")
while rank == 0 and os.getppid() == launcher:
    time.sleep(0.01)
if rank == 0:
    time.sleep(0.5)
    die_with_parent(launcher)
time.sleep(60)
"""
    program = [sys.executable, "-c", source, str(tmp_path)]
    script = f"from vitscale.launch.local import run; run({program!r}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    until(lambda: not any(alive(pid) for pid in pids))


def until(done: Callable[[], bool]) -> None:
    """Wait for it; fails after half a minute."""
    for _ in range(3000):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("not after 30 s")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended may stay, as a zombie, until its new parent asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
