"""Several processes on this machine: starting the ranks, passing signals on to them, and telling why they failed.

torch's elastic launcher is not used, as it ends ranks 30 s after a SIGTERM, while they may be saving still, and keeps
SIGUSR1 to itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from vitscale.errors import (
    EXIT_DONE,
    EXIT_HUNG,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_USER,
    FAILURE_FILE,
    UserError,
)
from vitscale.pipeline.signals import STOP_SIGNALS, STOPPING

LAUNCHER = "VITSCALE_LAUNCHER"  # environment of a rank: the process id of its launcher, with which it ends
GRACE = 5.0  # seconds that ranks have to end by themselves once one has failed: most lose it, and say so
LAST_WAIT = 30.0  # seconds for the kernel to end a killed rank, which a dead file system may hold for ever
POLL = 0.05
EXIT_CODES = (EXIT_USER, EXIT_REQUEUE, EXIT_HUNG, EXIT_INTERRUPTED)  # those of a rank that become the launcher's
AGAIN = "Run the same command again to go on."


class Failure(NamedTuple):
    """Why a rank ended: its exit code, what there is to say, and its place in time; the first one is told."""

    consequence: int  # 0: a cause; 1: maybe the loss of another rank; 2: none at all, as it was asked to end
    time: int  # ns
    code: int
    text: str


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    file: Path  # what `report_failure` leaves
    ended: int = 0  # ns, when seen
    killed: bool = False  # by this launcher

    @property
    def failed(self) -> bool:
        """Whether it ended in a way that the others may not survive."""
        return self.process.returncode not in (None, EXIT_DONE, EXIT_REQUEUE)

    def alive(self) -> bool:
        if self.process.poll() is None:
            return True
        self.ended = self.ended or time.monotonic_ns()
        return False

    def failure(self, passed: set[int]) -> Failure | None:
        """Why it ended, unless it is done or was killed here. `passed` are the signals that were passed on to it."""
        code = self.process.returncode
        if code in (None, EXIT_DONE) or self.killed:
            return None
        if -code in passed:  # it had nothing yet, or nothing more, to save
            text = f"ended by {signal.Signals(-code).name}; run the same command again to go on"
            return Failure(0, self.ended, EXIT_REQUEUE, text)
        if code < 0:
            # ranks abort themselves when they lose another one; nothing else of what kills them comes of that
            aborted, name = code == -signal.SIGABRT, _signal_name(-code)
            memory = ", as when memory runs out" if code == -signal.SIGKILL else ""
            text = f"error: rank {self.number} ended: killed by {name}{memory}. {AGAIN}"
            return Failure(int(aborted), self.ended, EXIT_INTERNAL, text)
        known = code if code in EXIT_CODES else EXIT_INTERNAL
        try:
            told = json.loads(self.file.read_text())
            return Failure(2 if code == EXIT_REQUEUE else int(not told["cause"]), told["time"], known, told["text"])
        except (OSError, ValueError):  # it said nothing: other ranks that end alike may have spoken for it
            text = f"error: rank {self.number} ended: exit code {code}. {AGAIN}"
            if code == EXIT_HUNG:
                text = f"error: rank {self.number} hung, and could not say where; its stacks are above. {AGAIN}"
            return Failure(2 if code == EXIT_REQUEUE else 1, self.ended, known, "" if code == EXIT_REQUEUE else text)


def under_launcher() -> bool:
    """Whether this process was started as one of several ranks (torchrun, srun), and joins them."""
    from vitscale.pipeline.distributed import launcher_place

    return launcher_place(os.environ) is not None


def launch(command: list[str], processes: int) -> int:
    """Run `vitscale COMMAND` as `processes` ranks and wait for them. Returns the exit code, one of `vitscale.errors`.

    SIGTERM and SIGUSR1 are passed on, and waited for as long as ranks take to save. If a rank fails the others are
    ended, and what the first one to fail said is printed once. After Ctrl-C, which they are told of as by SIGTERM,
    raises `KeyboardInterrupt` with what was saved, once they have ended; a second one ends them at once.
    """
    # -P: like the console script, do not import from the working directory
    return run([sys.executable, "-P", "-m", "vitscale.launch.cli", *command], processes)


def run(program: list[str], processes: int) -> int:
    """`launch` of any program whose ranks read torch's variables (RANK, WORLD_SIZE, …); from the main thread."""
    from torch.distributed import TCPStore

    # The store where ranks meet is this process's, so that nobody can take its port before a rank does
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    with TemporaryDirectory(prefix="vitscale-") as folder, _noted(*STOP_SIGNALS, signal.SIGINT) as signals:
        try:
            for number in range(processes):
                file = Path(folder) / f"rank-{number:05}.json"
                env = {**os.environ, **_variables(number, processes, store.port), FAILURE_FILE: str(file)}
                ranks.append(_Rank(number, subprocess.Popen(program, env=env), file))
            passed = _wait(ranks, signals)
        finally:
            _kill(ranks)
        failures = [failure for rank in ranks if (failure := rank.failure(passed))]
        if signal.SIGINT in passed:
            raise KeyboardInterrupt(*[each.text for each in failures if each.consequence == 2 and each.text][:1])
    if not failures:
        return EXIT_DONE
    first = min(failures)
    silent = [rank for rank in ranks if rank.killed]
    if first.code == EXIT_HUNG and silent:
        numbers = ", ".join(str(rank.number) for rank in silent)
        print(f"killed, as {'they' if len(silent) > 1 else 'it'} did not answer: rank {numbers}", file=sys.stderr)
    if first.text:
        print(first.text, file=sys.stderr, flush=True)
    return first.code


def _variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a rank reads from its environment."""
    variables = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHER: os.getpid(),
        "TORCHELASTIC_USE_AGENT_STORE": True,  # rank 0 too is a client (torch.distributed.rendezvous)
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // processes)),
    }  # fmt: skip
    return {name: str(value) for name, value in variables.items()}


@contextmanager
def _noted(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Signals that come while the block runs, in a list, instead of what they would do. Those ignored stay so."""
    came: list[int] = []
    previous = {number: signal.getsignal(number) for number in numbers}
    previous = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _wait(ranks: list[_Rank], signals: list[int]) -> set[int]:
    """Until all ranks have ended, or one failed and the others had their grace. Returns the signals that came."""
    passed: set[int] = set()
    deadline = inf
    while alive := [rank for rank in ranks if rank.alive()]:
        while signals:
            number = signals.pop(0)
            interrupt = number == signal.SIGINT
            if interrupt and number in passed:
                return passed
            if interrupt:
                print(STOPPING, end="", file=sys.stderr, flush=True)
            for rank in alive:  # a terminal sends Ctrl-C to all of its processes, and two of them end a rank at once
                rank.process.send_signal(signal.SIGTERM if interrupt else number)
            passed.add(number)
        if deadline == inf and any(rank.failed for rank in ranks):
            deadline = time.monotonic() + GRACE
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL)
    return passed


def _kill(ranks: list[_Rank]) -> None:
    """End what is left, by SIGKILL: SIGTERM asks to save, which a rank without the others cannot."""
    left = [rank for rank in ranks if rank.alive()]
    for rank in left:
        rank.killed = True
        rank.process.kill()
    deadline = time.monotonic() + LAST_WAIT
    while any(rank.alive() for rank in left) and time.monotonic() < deadline:
        time.sleep(POLL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


def check_processes(processes: int, device: str, setting: str) -> None:
    """Raise `UserError` if this machine cannot run so many ranks on `device` (`auto`, `cpu`, `cuda`), as `setting`."""
    from vitscale.pipeline.distributed import use_cuda

    if processes < 1:
        raise UserError("--nproc", processes, "at least 1 process", "Leave it out for one.")
    use_cuda(device, processes, setting)
