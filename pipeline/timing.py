"""Where the time goes: seconds by name on the host and on the device, and what the device could do at best."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by their names in a recipe
CUDA_SIDES, CPU_SIDES = (8192, 4096, 2048, 1024), (256, 512, 1024)  # of the matrices whose product is timed
CPU_SECONDS, CPU_LONGEST = 0.03, 0.07  # of trying for each side, and of one product


class Event(Protocol):
    """The part of `torch.cuda.Event` that a stopwatch uses."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float: ...


def cuda_event() -> Event:
    """An event with a time, not yet recorded."""
    return torch.cuda.Event(enable_timing=True)


class Stopwatch:
    """Adds up seconds by name: `with watch("forward"): …`.

    On CUDA such a section is timed by two events of the current stream: it lasts from when the device begins what it
    holds to when the device is done with it, gaps in which the host is late included, and the host waits for neither.
    `watch.host("data")` times the host, whatever the device; on the CPU the two are one. Sections of different names
    may nest, and a section that raises counts as well.
    """

    def __init__(
        self,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        event: Callable[[], Event] = cuda_event,
    ) -> None:
        self.clock, self._event, self._on_device = clock, event, device.type == "cuda"
        self._sums: dict[str, float] = {}
        self._free: list[Event] = []
        self._open: deque[tuple[str, Event, Event]] = deque()  # sections not yet read, in the order of their ends

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to the sum of `name`."""
        if not self._on_device:
            with self.host(name):
                yield
            return
        start = self._take_event()
        start.record()
        try:
            yield
        finally:
            end = self._take_event()
            end.record()
            self._open.append((name, start, end))

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Add the host's time of the block to the sum of `name`."""
        began = self.clock()
        try:
            yield
        finally:
            self._add(name, self.clock() - began)

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, which begin at zero again. On CUDA waits for the last section's end."""
        if self._open:
            self._open[-1][2].synchronize()
        while self._open:
            self._read_first()
        sums, self._sums = self._sums, {}
        return sums

    def _take_event(self) -> Event:
        """An event out of the pool, which stays small: sections that the device is done with are read first."""
        while not self._free and self._open and self._open[0][2].query():
            self._read_first()
        return self._free.pop() if self._free else self._event()

    def _read_first(self) -> None:
        name, start, end = self._open.popleft()
        self._add(name, start.elapsed_time(end) / 1e3)  # CUDA says milliseconds
        self._free += (start, end)

    def _add(self, name: str, seconds: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + seconds


def measured_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a large product of square random matrices: what this device does at best, as it is now.

    On CUDA of side 8192 (less where memory is short), the median of 10, with TF32 if that is allowed for float32. On
    the CPU with the threads of this process, the best of all products of sides up to 1024 that fit into about 0.2 s, as
    other processes now and then stop a thread that all wait for. Random data, because zeros draw less power
    and so run at a higher clock.
    """
    watch = Stopwatch(device, clock)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        side = next((side for side in CUDA_SIDES if 16 * side**2 < free), CUDA_SIDES[-1])  # 4 in float32, at most
        multiply = product(side, device, dtype)
        for i in range(15):  # all under way before the first is read, so that the GPU does not wait between them
            with watch(str(i)):
                multiply()
        seconds = statistics.median(list(watch.take().values())[5:])  # by then clocks have risen
        del multiply
        torch.cuda.empty_cache()
        return 2 * side**3 / seconds
    peak = 0.0
    for side in CPU_SIDES:
        multiply, taken, began = product(side, device, dtype), [], clock()
        while len(taken) < 2 or clock() - began < CPU_SECONDS:
            with watch.host("product"):
                multiply()
            taken.append(watch.take()["product"])
        peak = max(peak, 2 * side**3 / min(taken))
        if 8 * min(taken) > CPU_LONGEST:  # what one of the next side takes
            break
    return peak


def product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A function that multiplies two random matrices of `side`; it has been called once, which starts threads."""
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
    a, b = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return lambda: torch.mm(a, b, out=out)
