"""A function mapped over tasks: by processes of this machine, or by a Ray cluster.

Parts of one stage, on machines that share the folders alone, need no executor in common: see `shard.py`, `part`.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from vitscale.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 4  # tasks handed out for each worker
THREADS = 8  # workers up to which light work needs no processes, whose start takes longer than a small set


class Executor(Protocol):
    """Yields `function(task)` in the order of the tasks. An exception of the function ends the map, and is raised.

    `light` says that the function mostly reads, hashes and writes, which threads of one process do side by side.
    """

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], light: bool = False
    ) -> Iterator[Result]: ...
    def __enter__(self) -> "Executor": ...
    def __exit__(self, *exception: Any) -> None: ...


def make_executor(kind: str, workers: int) -> Executor:
    """`local` processes or `ray`; `workers` 0 stands for every available core."""
    return RayExecutor(workers) if kind == "ray" else LocalExecutor(workers)


def available_cores() -> int:
    """Count the cores this process may use, which on a shared machine can be fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalExecutor:
    """Processes of this machine, started when first needed; they end when this one does, however it ends.

    One worker runs in this process. A worker process that dies raises `UserError` (workers).
    """

    def __init__(self, workers: int = 0) -> None:
        self._workers = workers or available_cores()
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task], light: bool = False) -> Iterator[Result]:
        """Yield the results in order."""
        tasks = list(tasks)
        if self._workers == 1 or len(tasks) < 2:
            yield from map(function, tasks)
            return
        if light and self._pool is None and self._workers <= THREADS:
            with ThreadPoolExecutor(self._workers) as pool:
                yield from _in_order(lambda task: pool.submit(function, task), _result, tasks, AHEAD * self._workers)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # fork is not safe once threads run, as pyarrow's do
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_start_worker)
        try:
            yield from _in_order(lambda task: self._pool.submit(function, task), _result, tasks, AHEAD * self._workers)
        except BrokenProcessPool as error:
            raise UserError(
                "workers",
                f"{self._workers}, of which one process died",
                "processes that live to the end of the work",
                "It may have run out of memory, or a decoder crashed: try fewer workers.",
            ) from error

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool is not None:  # waited for: tasks may still write after an exception, and a process that ends
            self._pool.shutdown(cancel_futures=True)  # meanwhile may wake it by a pipe that was closed just now
            self._pool = None


class RayExecutor:
    """A Ray cluster: the one that RAY_ADDRESS names, or one on this machine with `workers` cores (0: all)."""

    def __init__(self, workers: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("executor", "ray", "the package ray", "Install vitscale[ray].") from error
        self._ray, self._owner = ray, not ray.is_initialized()
        if self._owner:
            cores = None if "RAY_ADDRESS" in os.environ else workers or available_cores()
            ray.init(num_cpus=cores, log_to_driver=False, include_dashboard=False)
        self._ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task], light: bool = False) -> Iterator[Result]:
        """Yield the results in order."""
        remote = self._ray.remote(num_cpus=1, max_retries=2)(function)
        try:
            yield from _in_order(remote.remote, self._ray.get, tasks, self._ahead)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            got = f"ray ({' '.join(str(error).split())[:300]})"
            raise UserError(
                "executor", got, "workers that live to the end of the work", "Run again to go on."
            ) from error

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._owner:
            self._ray.shutdown()


def _in_order(
    submit: Callable[[Any], Any], result: Callable[[Any], Result], tasks: Iterable[Any], ahead: int
) -> Iterator[Result]:
    """Hand out tasks, at most `ahead` of them before the oldest is done."""
    waiting: deque[Any] = deque()
    for task in tasks:
        if len(waiting) == ahead:
            yield result(waiting.popleft())
        waiting.append(submit(task))
    while waiting:
        yield result(waiting.popleft())


def _result(future: "Future[Result]") -> Result:
    return future.result()


def _start_worker() -> None:
    """One thread for OpenCV, as there is a process for each core. And let this worker end at once when its parent is
    killed, so that a new run never meets an old one's writes."""
    import cv2

    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
