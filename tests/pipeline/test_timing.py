"""Seconds by name on the host, and on a device that works behind it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch

from vitscale.pipeline import timing
from vitscale.pipeline.timing import Stopwatch


def test_sums_of_the_host() -> None:
    now = [100.0]
    watch = Stopwatch(torch.device("cpu"), clock=lambda: now[0])
    for seconds in (0.25, 0.5):
        with watch("forward"):
            now[0] += seconds
            with watch("inner"):
                now[0] += 1.0
    with suppress(KeyError), watch.host("data"):
        now[0] += 4.0
        raise KeyError
    now[0] += 8.0
    assert watch.take() == {"forward": 2.75, "inner": 2.0, "data": 4.0}
    assert watch.take() == {}


@dataclass
class Device:
    """A stand-in for a stream: work takes seconds of its own after the host gave it, and events mark places in it."""

    host: float = 0.0
    busy_until: float = 0.0
    made: int = 0
    waits: int = 0
    marks: dict[int, float] = field(default_factory=dict)

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.host) + seconds

    def event(self) -> "Mark":
        self.made += 1
        return Mark(self, self.made)


@dataclass
class Mark:
    """An event of the stand-in."""

    device: Device
    number: int

    def record(self) -> None:
        self.device.marks[self.number] = max(self.device.busy_until, self.device.host)

    def query(self) -> bool:
        return self.device.marks[self.number] <= self.device.host

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.host = max(self.device.host, self.device.marks[self.number])

    def elapsed_time(self, end: "Mark") -> float:
        """Milliseconds; CUDA raises if the device has not come to the end yet."""
        assert end.query()
        return (self.device.marks[end.number] - self.device.marks[self.number]) * 1e3


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def watch(device: Device) -> Stopwatch:
    return Stopwatch(torch.device("cuda"), clock=lambda: device.host, event=device.event)


def test_sections_on_a_device_are_timed_without_waiting(device: Device, watch: Stopwatch) -> None:
    device.work(5.0)  # of before, which is none of the sections'
    for _ in range(3):
        with watch("forward"):
            device.work(1.0)
        with watch("backward"):
            device.work(2.0)
        with watch.host("data"):
            device.host += 0.5
    assert (device.host, device.waits) == (1.5, 0)
    sums = watch.take()
    assert (device.host, device.waits) == (14.0, 1)
    assert sums == pytest.approx({"forward": 3.0, "backward": 6.0, "data": 1.5})
    assert watch.take() == {}
    assert device.waits == 1


def test_a_late_host_shows_in_the_section(device: Device, watch: Stopwatch) -> None:
    with watch("forward"):
        device.work(1.0)
        device.host += 3.0  # two of which the device idles
        device.work(1.0)
    assert watch.take() == {"forward": 4.0}


@pytest.mark.parametrize(("takes", "most"), [(0.1, 6), (10.0, 2000)])
def test_events_are_used_again(device: Device, watch: Stopwatch, takes: float, most: int) -> None:
    """A device that keeps up needs a handful of events for any number of sections; one that does not, two for each,
    once."""
    for _ in range(2):
        for _ in range(1000):
            with watch("step"):
                device.work(takes)
            device.host += 1.0
        assert watch.take() == {"step": pytest.approx(1000 * takes)}
    assert device.made <= most


@pytest.mark.parametrize(("flops", "sides"), [(1e12, [256, 512, 1024]), (20e9, [256, 512]), (1e9, [256])])
def test_measured_peak_of_a_disturbed_cpu(flops: float, sides: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in that does so many FLOP/s, but for every second product, which is stopped for 10 ms; in 0.2 s."""
    now, tried, calls = [0.0], [], count()

    def product(side: int, *_: object) -> Callable[[], object]:
        def multiply() -> None:
            now[0] += 2 * side**3 / flops + (0.01 if next(calls) % 2 else 0.0)

        tried.append(side)
        return multiply

    monkeypatch.setattr(timing, "product", product)
    peak = timing.measured_peak(torch.device("cpu"), torch.float32, clock=lambda: now[0])
    assert (peak, tried) == (pytest.approx(flops), sides)
    assert now[0] < 0.2


@pytest.mark.parametrize("dtype", timing.DTYPES.values())
def test_measured_peak_leaves_random_numbers_alone(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert timing.measured_peak(torch.device("cpu"), dtype) > 0
    assert torch.equal(torch.get_rng_state(), state)
