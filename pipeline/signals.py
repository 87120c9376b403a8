"""Signals that ask a run to save and stop: SIGTERM and SIGUSR1, as clusters send before they take a machine back, and
SIGINT, which is Ctrl-C."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from vitscale.errors import FAILURE_FILE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPING = "\nstopping: what trains saves first; Ctrl-C again ends it at once\n"


class StopSignals:
    """While this context lasts, the stop signals are noted, and nothing else happens. Of the main thread.

    `asked` is the name of the first that came (`SIGTERM`), empty until then; those after it change nothing, except that
    a second SIGINT raises `KeyboardInterrupt`. Where SIGINT is ignored, it stays so. Processes forked meanwhile note
    them too, to no effect: loader processes have `leave_stopping_to_the_rank` besides.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._interrupts = 0

    def __enter__(self) -> Self:
        interrupt = () if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else (signal.SIGINT,)
        self._previous = {number: signal.signal(number, self._note) for number in (*STOP_SIGNALS, *interrupt)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that C code installed

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT and FAILURE_FILE not in os.environ:  # else the launcher says it
            os.write(2, STOPPING.encode())


def leave_stopping_to_the_rank() -> None:
    """In a loader process: end on a SIGTERM of its rank alone, not on signals that ask the rank to save.

    Slurm signals every process of a step, and a rank whose loader dies cannot go on to its next save. torch's own
    handler ends the process whoever sends the signal. A thread waits for it, as Python's handlers are not told of the
    sender, and as torch also ends processes that are stuck.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for threads that start from now on too
    threading.Thread(target=_end_with_rank, args=(os.getppid(),), name="end-with-rank", daemon=True).start()


def _end_with_rank(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)
