"""`results.parquet`: a row for each number of all evaluations in its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.publish import publish
from vitscale.pipeline.evaluation.bootstrap import Interval

NAME = "results.parquet"
OLDEST = 7  # columns that all versions have written
ROWS = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("dataset", pa.string()),
        ("suite", pa.string()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),  # null where there is no interval
        ("ci_high", pa.float64()),
        ("weights", pa.string()),  # raw or ema; null of other projects' files
        ("fingerprint", pa.string()),  # of the dataset
        ("class_map", pa.string()),  # sha256, or `subset`; null where classes are the checkpoint's
    ]
)


@dataclass(frozen=True)
class Subject:
    """What was measured, and on what; names of columns."""

    checkpoint: str
    dataset: str
    weights: str | None = None
    fingerprint: str | None = None
    class_map: str | None = None

    def replaces(self, row: dict[str, Any], suites: dict[str, Any]) -> bool:
        """Whether an earlier row gives way: of a suite that was run again, or of other images at the same path."""
        if any(row[name] != getattr(self, name) for name in ("checkpoint", "dataset", "weights", "class_map")):
            return False
        return row["suite"] in suites or row["fingerprint"] != self.fingerprint


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if it is not there.

    Raises OSError or pyarrow.ArrowException for one that is damaged, or of something else.
    """
    if not path.exists():
        return []
    if pq.read_schema(path).names[:OLDEST] != ROWS.names[:OLDEST]:
        raise pa.ArrowInvalid("a table of something else")
    return pq.read_table(path, schema=ROWS).to_pylist()


def add_rows(path: Path, subject: Subject, suites: dict[str, dict[str, Any]]) -> None:
    """Put the numbers of some suites into a Parquet file, in place of earlier ones. Whole or not at all.

    Numbers are floats, or `Interval`s; None is left out. Raises OSError or pyarrow.ArrowException.
    """
    rows = [row for row in read_rows(path) if not subject.replaces(row, suites)]
    for suite, values in suites.items():
        for name, value in values.items():
            if value is None:
                continue
            numbers = value if isinstance(value, Interval) else (float(value), np.nan, np.nan)
            known = [None if np.isnan(number) else number for number in numbers]
            row = dict(zip(("value", "ci_low", "ci_high"), known, strict=True))
            rows.append({**vars(subject), "suite": suite, "name": name, **row})
    with publish(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), file)
