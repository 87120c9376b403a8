"""A function mapped over tasks by several processes of one machine."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vitscale.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Count the cores this process may use, which on a shared machine can be fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield `function(task)` in the order of the tasks; `function` and tasks must be picklable.

    One worker, or one task, runs in this process. An exception of the function ends the map and is raised here; a
    worker process that dies raises `UserError` (workers). The processes end when this one does, however it ends.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe once threads run, as pyarrow's do
    try:
        with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as executor:
            yield from executor.map(function, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "workers",
            f"{workers}, of which one process died",
            "processes that live to the end of the work",
            "It may have run out of memory, or a decoder crashed: try fewer workers.",
        ) from error


def _end_with_parent() -> None:
    """Let this worker end at once when its parent is killed, so that a new run never meets an old one's writes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
