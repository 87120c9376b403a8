"""A trace of some steps for Chrome (chrome://tracing, ui.perfetto.dev), and a table of their operators."""

import gzip
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vitscale.data_prep.publish import publish, publish_text
from vitscale.pipeline.console import say
from vitscale.pipeline.distributed import World
from vitscale.pipeline.mirror import shown
from vitscale.pipeline.run_folder import writing

ROWS = 100  # operators in the table


class Profiler:
    """Records the steps of `window` (counted from 0) on rank 0, and nothing else; around the loop, told of each step.

    Leaves `profile/steps-FIRST-LAST` in the run's folder (LAST is the first step not recorded), with
    `rank-00000.json.gz`, which the viewers open as it is, and `table.txt`, operators by the time spent in themselves,
    on the GPU if there is one. A loop that begins at step `first`, within the window or past it, records what is left.
    Raises `UserError` if they cannot be written.
    """

    def __init__(self, window: range, folder: Path, world: World, first: int = 0) -> None:
        self._window, self._folder, self._next = window if world.main else range(0), folder, first
        self._cuda = world.device.type == "cuda"
        self._profile: profile | None = None  # while recording
        self._begun = 0  # step at which the recording began
        self._mark: record_function | None = None  # around a step, so that the trace shows it

    def __enter__(self) -> Self:
        self._begin_step()
        return self

    def step(self, done: int) -> None:
        """Say that `done` steps are over."""
        if self._profile is None and done not in self._window:
            return
        self._end_step()
        self._next = done
        if self._profile and done not in self._window:
            self._write()
        self._begin_step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was recorded if the loop ended within the window; drop it if it failed."""
        self._end_step()
        if self._profile and kind is None and self._next > self._begun:
            self._write()
        elif self._profile:
            self._profile.stop()
            self._profile = None

    def _begin_step(self) -> None:
        if self._next not in self._window:
            return
        if self._profile is None:
            self._begun = self._next
            cuda = [ProfilerActivity.CUDA] if self._cuda else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
            if self._cuda:
                torch.cuda.synchronize()  # what earlier steps still do is not of this one
            self._profile.start()
        self._mark = record_function(f"step {self._next}")
        self._mark.__enter__()

    def _end_step(self) -> None:
        if self._mark:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _write(self) -> None:
        assert self._profile is not None
        done, self._profile = self._profile, None
        done.stop()  # waits for the device
        out = self._folder / "profile" / f"steps-{self._begun}-{self._next}"
        by = f"self_{'device' if self._cuda else 'cpu'}_time_total"
        with writing(self._folder):
            out.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=out, prefix=".") as beside:
                plain = Path(beside) / "trace.json"
                done.export_chrome_trace(str(plain))
                with (
                    plain.open("rb") as trace,
                    publish(out / "rank-00000.json.gz") as file,
                    gzip.open(file, "wb", compresslevel=3) as packed,
                ):
                    shutil.copyfileobj(trace, packed)
            publish_text(out / "table.txt", done.key_averages().table(sort_by=by, row_limit=ROWS))
        say(f"profile of steps {self._begun} to {self._next}: {shown(out)}")
