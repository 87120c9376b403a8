"""Ends a rank that makes no step, so that a run that hangs can be started again, and leaves the stacks of its threads.

A collective waits for ever for a rank that is stuck, on the CPU in C++ and on a GPU in a kernel, and neither raises.
"""

import faulthandler
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from vitscale.errors import EXIT_HUNG, report_failure


class Watchdog:
    """While this context lasts, the process ends with exit code 76 if no `beat` comes for `seconds` (0: off).

    The stacks of all Python threads are then added to `folder/hangs/rank-00003.txt`, below a line with time, rank,
    host, process and step. A thread does this, which needs Python's lock: torch gives it up in collectives and copies
    from a GPU. Where a call into C keeps it, or the file system with `folder` hangs, C code writes the stacks to stderr
    a little later, and ends the process with exit code 1, the only one it has. A process stopped for as long (SIGSTOP)
    counts as hung.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._file = folder / "hangs" / f"rank-{rank:05}.txt"
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._step: int | None = None

    def __enter__(self) -> Self:
        self._seen = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._left.set()
        if self._seconds:
            self._thread.join()

    def beat(self, step: int | None = None) -> None:
        """Something got done: a step, whose number is kept, or a part of an evaluation or a save."""
        if step is not None:
            self._step = step
        self._seen = time.monotonic()

    def _watch(self) -> None:
        spare = min(60.0, self._seconds)  # for writing stacks, before C code takes over
        while (left := self._seen + self._seconds - time.monotonic()) > 0:
            # 2 is stderr, whatever Python has put in its place
            faulthandler.dump_traceback_later(left + spare, exit=True, file=2)
            if self._left.wait(min(left, spare / 2)):  # what C code knows of beats is never older than that
                faulthandler.cancel_dump_traceback_later()
                return
        self._end()  # nothing is cancelled: this may hang in its turn

    def _end(self) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        step = "before the first step" if self._step is None else f"last step {self._step}"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                place = f"rank {self._rank}, host {socket.gethostname()}, process {os.getpid()}"
                file.write(f"{now}: {place}: no step for {self._seconds:g} s, {step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            where = f"stacks are in {self._file}"
        except OSError as error:
            faulthandler.dump_traceback(2, all_threads=True)
            where = f"stacks are above, as {self._file} cannot be written ({error.strerror})"
        said = f"no step for {self._seconds:g} s (guard.step_timeout), {step}; {where}"
        try:
            report_failure(f"error: rank {self._rank}: {said}. Run the same command again to go on.")
        finally:
            os._exit(EXIT_HUNG)  # nothing is flushed: the main thread may hold the lock of what hangs
