"""The log of a run: `metrics.jsonl`, one JSON object a line, TensorBoard events with the same numbers, and rates."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.data_prep.publish import publish_text
from vitscale.pipeline.distributed import sum_over_ranks

PLAIN_LINE_EVERY = 5.0  # seconds between lines where there is no terminal for a progress bar


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard files in a run's folder. For rank 0.

    Opening it for a resume at `step` drops the rows that were written after that step, so that none is there twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by readers

        path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(folder) if row["step"] <= step]
        publish_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, samples: Sequence[str] = (), **values: float) -> None:
        """One row: `{"step": …, "kind": "train" | "eval", …}`; steps are counted from 1, when taken.

        `samples` are digests of the global batches of the steps up to this one.
        """
        seen = {"samples": " ".join(samples)} if samples else {}
        self._file.write(json.dumps({"step": step, "kind": kind, **values, **seen}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both logs."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl`; a last line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Timed:
    """An iterator that adds up the seconds spent waiting for it."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - began


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
    """Rates since the last reading, without what evaluation and saving took."""

    def __init__(self, batches: Timed, first: int) -> None:
        self._batches, self._line = batches, 0.0
        self.restart(first)

    def restart(self, done: int) -> None:
        """Begin a new reading after `done` steps."""
        self._step, self._began, self._waited = done, time.perf_counter(), self._batches.waited

    def read(self, done: int, global_batch: int) -> dict[str, float]:
        """`images_per_s` over all ranks, and `data_wait`, the share of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rates = {
            "images_per_s": (done - self._step) * global_batch / seconds,
            "data_wait": (self._batches.waited - self._waited) / seconds,
        }
        self.restart(done)
        return rates

    def line_due(self) -> bool:
        """Whether `PLAIN_LINE_EVERY` seconds passed since this last said so."""
        due = time.monotonic() - self._line >= PLAIN_LINE_EVERY
        if due:
            self._line = time.monotonic()
        return due
