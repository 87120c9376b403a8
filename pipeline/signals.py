"""Signals that ask a run to save and stop: SIGTERM and SIGUSR1, as clusters send before they take a machine back."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While this context lasts, the stop signals are noted, and nothing else happens. Of the main thread.

    `asked` is the name of the first that came (`SIGTERM`), empty until then; those after it change nothing. Processes
    forked meanwhile note them too, to no effect: loader processes have `leave_stopping_to_the_rank` besides.
    """

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that C code installed

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name


def leave_stopping_to_the_rank() -> None:
    """In a loader process: end on a SIGTERM of its rank alone, not on those that ask the rank to save.

    Slurm signals every process of a step, and a rank whose loader dies cannot go on to its next save. torch's own
    handler ends the process whoever sends the signal. A thread waits for it, as Python's handlers are not told of the
    sender, and as torch also ends processes that are stuck.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for threads that start from now on too
    threading.Thread(target=_end_with_rank, args=(os.getppid(),), name="end-with-rank", daemon=True).start()


def _end_with_rank(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)
