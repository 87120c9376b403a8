"""How a command ends when it does not succeed: exceptions, exit codes, and to whom a failing process says why.

Imports nothing of ours, so that every folder may import it.
"""

import json
import os
import sys
import time
from pathlib import Path

EXIT_DONE = 0
EXIT_INTERNAL = 1  # an error of ours, or a rank that was killed
EXIT_USER = 2  # a `UserError`; also what click gives a command that it cannot read
EXIT_REQUEUE = 75  # sysexits.h EX_TEMPFAIL: saved after a signal; the same command, started again, goes on
EXIT_HUNG = 76  # no step for too long; the same command, started again, goes on from the last checkpoint
EXIT_UNFIT = 77  # the nodes of a job are not fit for it; the same job, on others, may go on
EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells have it

FAILURE_FILE = "VITSCALE_FAILURE_FILE"  # environment: where a rank tells its launcher why it fails


class UserError(Exception):
    """A setting, file or command of the user's that cannot work, said in one short paragraph.

    `setting` is what the user wrote or can change (`data.train`, `--nproc`), `got` its value as found,
    `expected` what would be accepted, and `remedy` what to do next. The command line prints `str(error)` and ends
    with exit code 2; the traceback shows only with `--debug`. It is no ValueError, so that nobody who expects one of
    bad data takes it for that.
    """

    def __init__(self, setting: str, got: object, expected: str, remedy: str) -> None:
        self.setting, self.got, self.expected, self.remedy = setting, got, expected, remedy
        super().__init__(setting, got, expected, remedy)

    def __str__(self) -> str:
        return f"{self.setting}: got {self.got}; expected {self.expected}. {self.remedy}"


class Requeue(Exception):  # noqa: N818 (no error)
    """The work was asked to stop, is saved, and wants to be started again: exit code 75.

    Its text says what was done ("saved at step 120 after SIGTERM"); the command line adds what to do next. To be raised
    on every rank, as each then waits for the others before it ends. `interrupted`: it was asked by Ctrl-C, and nobody
    starts it again of himself.
    """

    def __init__(self, text: str, interrupted: bool = False) -> None:
        self.interrupted = interrupted
        super().__init__(text)


def report_failure(text: str, cause: bool = False) -> None:
    """Say why this process fails: to the launcher that waits for it (`launch.local`), else on stderr.

    The launcher tells what the earliest failure said. One that is known to be a `cause`, not the loss of another
    rank, comes before all others. A process has one failure: what it says after that is not told.
    """
    file = os.environ.get(FAILURE_FILE)
    if not file:
        print(text, file=sys.stderr, flush=True)
    elif not Path(file).exists():
        beside = Path(f"{file}.{os.getpid()}")
        # a clock that all processes of a machine share, and that nobody sets
        beside.write_text(json.dumps({"text": text, "cause": cause, "time": time.monotonic_ns()}))
        beside.replace(file)
