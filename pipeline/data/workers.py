"""Processes that load images for this one: how torch's DataLoader starts them, and what is said when one dies."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkContext, ForkProcess
from types import TracebackType
from typing import Any

import cv2
import torch

from vitscale.errors import UserError
from vitscale.pipeline.distributed import die_with_parent
from vitscale.pipeline.signals import leave_stopping_to_the_rank

ANSWER = 10.0  # seconds that a new process has


class _Worker(ForkProcess):
    """A forked process that is started again until it answers.

    In Python 3.11 a child waits for ever if some thread was about to take up Python while it was forked, as gloo's do
    to let go of the tensors of a collective: the lock on the list of threads is then held, and is made anew too late
    (from 3.12 on, first). Right after a collective this was one fork in a thousand.
    """

    answer: Connection

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 (as multiprocessing has it)
        while True:
            reader, process_obj.answer = Pipe(duplex=False)
            started = ForkProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]
            process_obj.answer.close()
            with reader:
                if reader.poll(ANSWER):  # also if it died
                    return started
            started.kill()
            started.wait()

    def run(self) -> None:
        self.answer.send_bytes(b"here")
        self.answer.close()
        super().run()


class _Context(ForkContext):
    Process = _Worker


def worker_options(workers: int, ahead: int) -> dict[str, Any]:
    """Arguments of a DataLoader with so many processes (0: none), each of which has `ahead` batches ready."""
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": _as_it_is}
    options["generator"] = torch.Generator()  # its own: the global one belongs to the model's dropout
    if workers:
        context = {"multiprocessing_context": _Context(), "worker_init_fn": _start_worker}
        options |= {"prefetch_factor": ahead, **context}
    return options


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # not 1, which would wait for threads that a fork does not take along
    sys.excepthook = _unless_left
    die_with_parent()
    leave_stopping_to_the_rank()


def _unless_left(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Show an error, but not that the rank ended while a thread of this process handed it the memory of a batch."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, where)


@contextmanager
def worker_deaths(workers: int) -> Iterator[None]:
    """Turn what torch raises when a worker dies, wherever this process is at that moment, into `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        got = f"{workers}, of which one died ({' '.join(str(error).split())[:200]})"
        remedy = "It may have run out of memory: try fewer workers. Run again to go on."
        raise UserError("data.workers", got, "processes that live as long as the rank", remedy) from error
