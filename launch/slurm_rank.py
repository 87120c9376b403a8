"""What a rank under `pretrain.sbatch` does besides its work: stamps its lines with the time, keeps why it failed."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from vitscale.errors import FAILURE_FILE

LOGS = "VITSCALE_RANK_LOGS"  # environment: the folder of one attempt's logs


class Stamped:
    """A stream that begins every line with the time (UTC, ms), so that those of all ranks can be merged.

    What C code writes goes past it, without a time: such lines belong to the one above them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun = stream, False

    def write(self, text: str) -> int:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        for piece in text.splitlines(keepends=True):
            self._stream.write(piece if self._begun else f"{now} {piece}")
            self._begun = not piece.endswith("\n")
        if not self._begun:
            self._stream.flush()
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def begin_rank() -> None:
    """Stamp this process's lines, and name the file for its failure, where the batch script gave a folder."""
    folder = os.environ.get(LOGS)
    if not folder:
        return
    os.environ[FAILURE_FILE] = str(failure_file(Path(folder), int(os.environ["SLURM_PROCID"])))
    sys.stdout, sys.stderr = Stamped(sys.stdout), Stamped(sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]


def failure_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves why it failed."""
    return folder / f"rank-{rank:05}.json"
