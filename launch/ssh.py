"""Runs on hosts that ssh reaches, named by a hostfile as DeepSpeed has them: `gpu01 slots=8`, a line a host.

One ssh a host starts the ranks there (`node`), in this folder and with this Python, which all hosts are to have at the
same place. DeepSpeed's own launcher is not used: it needs pdsh, and ends ranks 30 s after a SIGTERM, while they may be
saving still. Signals go to the hosts as lines on stdin, so that no terminal is needed there, and if this process dies,
its end of stdin tells the hosts to save and stop.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import IO

from vitscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_INTERNAL, EXIT_REQUEUE, EXIT_USER, UserError
from vitscale.launch.local import _noted
from vitscale.launch.node import HOSTS, STDIN, written
from vitscale.pipeline.signals import STOP_SIGNALS

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15"
UNREACHED = 255  # ssh's own exit code
LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
CARRIED = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "VITSCALE_")  # variables that hosts get: no secrets, `ps` shows them
GRACE, LAST_WAIT = 15.0, 60.0  # seconds for other hosts to end once one has failed, and for their ranks to be killed
POLL = 0.05


def read_hostfile(path: str) -> list[tuple[str, int]]:
    """Hosts and their numbers of ranks. Raises `UserError` for a file that is missing or of another form."""
    expected = "lines such as `gpu01 slots=8`"
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("HOSTFILE", f"{path} ({error})", f"a file with {expected}", "Write one.") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if not match or int(match[2]) < 1 or match[1] in hosts or match[1].startswith("-"):
            what = "a host again" if match and match[1] in hosts else repr(line.strip())
            raise UserError(
                "HOSTFILE", f"{what} in line {number} of {path}", f"{expected}, each host once", "Correct it."
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError("HOSTFILE", f"{path} without a host", expected, "Add them.")
    return list(hosts.items())


def commands(
    hosts: list[tuple[str, int]], words: list[str], port: int, master: str = "", more: Iterable[str] = ()
) -> list[str]:
    """The shell's line for each host. Rank 0 is on the first one, which others reach as `master`, by default its name.

    `more` are names of variables that go to the hosts besides `CARRIED`.
    """
    names = set(more)
    carried = {name: value for name, value in os.environ.items() if name.startswith(CARRIED) or name in names}
    program = [sys.executable, "-P", "-m", "vitscale.launch.cli", "launch", "node", *words]
    lines = []
    for node in range(len(hosts)):
        own = {"RANK": node, "MASTER_ADDR": master or hosts[0][0], "MASTER_PORT": port}
        env = {**carried, HOSTS: written(hosts), STDIN: 1, **own}
        said = shlex.join(["env", *(f"{name}={value}" for name, value in env.items()), *program])
        lines.append(f"cd {shlex.quote(str(Path.cwd()))} && exec {said}")
    return lines


def run_hosts(hosts: list[str], lines: list[str], ssh: str = SSH, alone: bool = False) -> int:
    """Run the line of each host over ssh and wait for all. Returns the exit code, one of `vitscale.errors`.

    SIGTERM and SIGUSR1 are passed on. If a host fails, the others have a grace to end by themselves, unless each is to
    end `alone`. What they say on stderr comes here with the host's name before it. Raises `KeyboardInterrupt` after
    Ctrl-C.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    readers = []
    with _noted(*STOP_SIGNALS, signal.SIGINT) as signals:
        try:
            for host, line in zip(hosts, lines, strict=True):
                program = [*shlex.split(ssh), host, line]
                # in a session of its own: a terminal's Ctrl-C would end ssh before the ranks
                process = subprocess.Popen(program, stdin=-1, stderr=-1, start_new_session=True)
                processes[host] = process
                readers.append(threading.Thread(target=_repeat, args=(host, process.stderr), daemon=True))
                readers[-1].start()
            passed = _wait(processes, signals, alone)
        except FileNotFoundError as error:
            raise UserError("--ssh", error.filename, "a program that is there", "Install it, or name it.") from error
        finally:
            _kill(processes)
        for reader in readers:
            reader.join(timeout=5)
        if signal.SIGINT in passed:
            raise KeyboardInterrupt
    return _verdict({host: process.returncode for host, process in processes.items()})


def _repeat(host: str, stream: IO[bytes]) -> None:
    for line in stream:
        sys.stderr.write(f"{host}: {line.decode(errors='replace')}")
        sys.stderr.flush()


def _wait(processes: dict[str, subprocess.Popen[bytes]], signals: list[int], alone: bool) -> set[int]:
    """Until all have ended, or one failed and the others had their grace. Returns the signals that came."""
    passed: set[int] = set()
    deadline, ending = inf, False
    while alive := [process for process in processes.values() if process.poll() is None]:
        while signals:
            number = signals.pop(0)
            _send(alive, signal.Signals(number))
            if number == signal.SIGINT and number in passed:
                return passed
            passed.add(number)
        failed = any(process.returncode not in (None, EXIT_DONE, EXIT_REQUEUE) for process in processes.values())
        if failed and deadline == inf and not alone:
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            if ending:
                break
            ending, deadline = True, time.monotonic() + LAST_WAIT
            _send(alive, signal.SIGINT)
            time.sleep(1)
            _send(alive, signal.SIGINT)  # the second one kills ranks
        time.sleep(POLL)
    return passed


def _send(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        with suppress(OSError, ValueError):  # it has just ended
            assert process.stdin
            process.stdin.write(f"{number.name}\n".encode())
            process.stdin.flush()


def _kill(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    for process in processes.values():
        with suppress(OSError):
            assert process.stdin
            process.stdin.close()
        if process.poll() is None:
            process.kill()
            process.wait()


def _verdict(codes: dict[str, int]) -> int:
    """The exit code that tells most, and a line on what happened where it is not plain."""
    lost = [host for host, code in codes.items() if code == UNREACHED or code < 0]
    told = [code for code in (EXIT_USER, EXIT_HUNG) if code in codes.values()]
    if told:
        return told[0]
    if lost:
        print(f"error: {', '.join(lost)}: not reached by ssh, or lost. Run the same command again.", file=sys.stderr)
        return EXIT_INTERNAL
    failed = [code for code in codes.values() if code not in (EXIT_DONE, EXIT_REQUEUE)]
    return EXIT_INTERNAL if failed else max(codes.values())
