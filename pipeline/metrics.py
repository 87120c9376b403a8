"""The log of a run: `metrics.jsonl`, one JSON object a line, TensorBoard and W&B with the same numbers; and rates."""

import errno
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from vitscale.model.config import ArchitectureConfig
from vitscale.pipeline.config import Config
from vitscale.pipeline.distributed import World, sum_over_ranks
from vitscale.pipeline.finetune import image_flops
from vitscale.pipeline.timing import DTYPES, Stopwatch, measured_peak
from vitscale.pipeline.wandb_run import WandbRun

PLAIN_LINE_EVERY = 5.0  # seconds between lines where there is no terminal for a progress bar
BLOCK = 1 << 20  # bytes read at once from the end of a log
SPLIT = ("data", "forward", "backward", "step")  # sections of a step, as the loop and the engine name them


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard files in a run's folder, and to W&B. For rank 0.

    `wandb` is the project there, if any, and `recipe` what it is told of the run's settings.
    Opening it for a resume at `step` drops the rows that were written after that step, so that none is there twice.
    Raises OSError where it cannot write.
    """

    def __init__(self, folder: Path, step: int, wandb: str = "", recipe: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._wandb = WandbRun(folder, wandb, recipe or {}) if wandb else None
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by readers

        path = self._folder / "metrics.jsonl"
        self._file = path.open("ab", buffering=0)  # a row is one write: a crash leaves at most one cut line, the last
        os.truncate(path, next((end for end, row in rows_backwards(self._folder) if row["step"] <= step), 0))
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, samples: Sequence[str] = (), **values: float | str) -> None:
        """One row: `{"step": …, "kind": "train" | "eval" | "suite" | "incident", …}`; steps taken are counted from 1.

        `samples` are digests of the global batches of the steps up to this one. What is not finite is written as null,
        JSON having no word for it; numbers alone go to TensorBoard and W&B.
        """
        sound = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        seen = {"samples": " ".join(samples)} if samples else {}
        row = (json.dumps({"step": step, "kind": kind, **sound, **seen}) + "\n").encode()
        if self._file.write(row) != len(row):  # how a disk that fills up says so first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        numbers = {f"{kind}/{name}": value for name, value in sound.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.write(step, numbers)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: training went back to there."""
        self._file.close()
        self._board.close()
        self._open(step)

    def close(self) -> None:
        """Flush and close the logs."""
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl`; a last line cut short by a crash is left out."""
    path, rows = folder / "metrics.jsonl", []
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                row = _row(line)
                if row is None:
                    break
                rows.append(row)
    return rows


def rows_backwards(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a run's `metrics.jsonl` from the last to the first, each with the place where its line ends in the file.

    Reads no more of the file than is asked for. What is no whole line, such as a last one cut short, is left out.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""  # `rest`: the end of a line that begins before `at`
        while at:
            start = max(at - BLOCK, 0)
            file.seek(start)
            lines = (file.read(at - start) + rest).splitlines(keepends=True)
            at, rest = start, lines.pop(0) if start else b""
            end = at + len(rest) + sum(map(len, lines))
            for line in reversed(lines):
                row = _row(line)
                if row is not None:
                    yield end, row
                end -= len(line)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if that was cut short."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


class Seen:
    """Passes micro batches on, and keeps of each step a digest of the keys of its samples and of their rows.

    The digest of a step is the sum, modulo 2^64, of the digests of its rows over all ranks: any number of ranks and
    micro batches gives the same.
    """

    def __init__(self, batches: Iterator[dict[str, Tensor]], accumulation: int) -> None:
        self._batches, self._accumulation = batches, accumulation
        self._taken: list[Tensor] = []
        self._skipped: list[Tensor] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        self._taken.append(batch.pop("digest").sum())
        self._skipped.append(batch.pop("skipped").sum())
        return batch

    def take(self) -> tuple[list[str], int]:
        """Digests of the steps since the last call, in hexadecimal, and how many samples stood in for others.

        All ranks call it together.
        """
        steps = torch.stack(self._taken).view(-1, self._accumulation).sum(dim=1)
        *digests, skipped = sum_over_ranks(torch.cat([steps, torch.stack(self._skipped).sum()[None]])).tolist()
        self._taken, self._skipped = [], []
        return [f"{digest % 2**64:016x}" for digest in digests], skipped


class Meter:
    """What training achieves between two readings, without what evaluation and saving took.

    `watch` holds the sections `SPLIT`, and `evaluation` and `save` in the host's time; `total` is the last step. The
    device's peak is measured now, on every rank.
    """

    def __init__(
        self, watch: Stopwatch, world: World, model: ArchitectureConfig, config: Config, first: int, total: int
    ) -> None:
        self._watch, self._world, self._total, self._size = watch, world, total, config.train.global_batch
        self.flops = image_flops(model, config.finetune)  # of one image
        self.peak = measured_peak(world.device, DTYPES[config.engine.dtype])  # FLOP/s of a rank's device at best
        self._process = psutil.Process()
        self._pace = (0, 0.0)  # steps and seconds since the first reading, which began with a cold start
        self._warm, self._line = False, -math.inf
        self.restart(first)

    def restart(self, done: int) -> None:
        """Begin a new reading after `done` steps."""
        self._watch.take()
        self._done, self._began = done, self._watch.clock()
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._world.device)

    def read(self, done: int) -> dict[str, float]:
        """What was achieved since the last reading, `done` steps being taken. All ranks call it together.

        - `images_per_s` over all ranks, `images_per_s_per_rank`, `tflops` (10^12 FLOP/s) of a rank, and `mfu`, their
          share of the device's peak (Chowdhery et al. 2022, appendix B; what is computed twice counts once).
        - `step_ms`, and as means over the ranks `data_ms`, `forward_ms`, `backward_ms`, `optimizer_ms` of a step; what
          they leave of it is the loop's own, and on a GPU what the host does while the device works.
        - `data_wait`: the share of the time that the rank that waited longest for data spent so. The others wait for
          it in the backward pass.
        - `slowest_rank` and `slowest_ratio`: all ranks take equally long for a step, so that they differ in what they
          do by themselves, waiting for data and the forward pass; the rank that takes longest, and how many times the
          median of the others. (At ZeRO stage 3 the forward pass gathers weights, which evens it out.)
        - `memory_gb`: the most that a rank used since the last reading, of its GPU, or of the host's memory for the
          rank's own process if it has none; `host_memory_gb`: what is in use on this host, by whomsoever. 10^9 bytes.
        - `eval_s`, `save_s` if there were any; `eta_s` to the last step, at the pace so far, these included.
        """
        taken = self._watch.take()
        steps, wall = done - self._done, max(self._watch.clock() - self._began, 1e-9)
        paused = {name: taken[name] for name in ("evaluation", "save") if name in taken}
        seconds = max(wall - sum(paused.values()), 1e-9)
        table = self._of_all_ranks([*(taken.get(name, 0.0) for name in SPLIT), self._memory()])
        *split, memory = zip(*table, strict=True)
        data, forward = split[:2]
        means = [statistics.fmean(of_ranks) / max(steps, 1) * 1e3 for of_ranks in split]
        rate = steps * self._size / seconds
        values = {
            "images_per_s": rate,
            "images_per_s_per_rank": rate / self._world.size,
            "step_ms": seconds / max(steps, 1) * 1e3,
            **dict(zip(("data_ms", "forward_ms", "backward_ms", "optimizer_ms"), means, strict=True)),
            "data_wait": max(data) / seconds,
            "tflops": rate / self._world.size * self.flops / 1e12,
            "mfu": rate / self._world.size * self.flops / self.peak,
            **straggler([a + b for a, b in zip(data, forward, strict=True)]),
            "memory_gb": max(memory) / 1e9,
            "host_memory_gb": _host_memory() / 1e9,
            **{{"evaluation": "eval_s", "save": "save_s"}[name]: value for name, value in paused.items()},
            "eta_s": self._seconds_left(done, steps, wall),
        }
        self._done, self._began = done, self._began + wall
        return values

    def line_due(self) -> bool:
        """Whether `PLAIN_LINE_EVERY` seconds passed since this last said so."""
        due = time.monotonic() - self._line >= PLAIN_LINE_EVERY
        if due:
            self._line = time.monotonic()
        return due

    def _of_all_ranks(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, by one collective and one transfer from the device."""
        if self._world.size == 1:
            return [values]
        table = torch.zeros(self._world.size, len(values), dtype=torch.float64)
        table[self._world.rank] = torch.tensor(values, dtype=torch.float64)
        return sum_over_ranks(table.to(self._world.device)).tolist()

    def _memory(self) -> float:
        """Bytes: the most allocated on the GPU since the last call, or what this process occupies."""
        if self._world.device.type != "cuda":
            return self._process.memory_info().rss
        most = torch.cuda.max_memory_allocated(self._world.device)
        torch.cuda.reset_peak_memory_stats(self._world.device)
        return most

    def _seconds_left(self, done: int, steps: int, wall: float) -> float:
        if self._warm:
            self._pace = (self._pace[0] + steps, self._pace[1] + wall)
        self._warm = True
        known_steps, known_seconds = self._pace if self._pace[0] > 0 else (max(steps, 1), wall)
        return (self._total - done) * known_seconds / known_steps


def straggler(seconds: Sequence[float]) -> dict[str, float]:
    """Which rank took longest for what ranks do by themselves, and how many times the median of the others.

    Nothing for one rank, and for ranks that did nothing.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = [*seconds[:slowest], *seconds[slowest + 1 :]]
    usual = statistics.median(others) if others else 0.0
    return {"slowest_rank": slowest, "slowest_ratio": seconds[slowest] / usual} if usual > 0 else {}


def _host_memory() -> int:
    """Bytes in use on this host that could not be had by dropping caches."""
    memory = psutil.virtual_memory()
    return memory.total - memory.available


def line(row: Mapping[str, Any]) -> str:
    """A row of training in one line, for the progress bar; what the row does not have is left out."""
    parts = {
        "loss": "loss {:.4f}",
        "top1": "top-1 {:.1%}",
        "lr": "lr {:.2e}",
        "images_per_s": "{:,.0f} images/s",
        "mfu": "MFU {:.1%}",
        "data_wait": "data wait {:.0%}",
    }
    said = [text.format(row[key]) for key, text in parts.items() if row.get(key) is not None]
    return "  ".join([*said, f"ETA {hours(row['eta_s'])}"] if "eta_s" in row else said)


def hours(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
