"""Tables that grow row by row, as Parquet, CSV or JSON lines: in memory are a few thousand rows at a time."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.publish import publish
from vitscale.errors import UserError
from vitscale.pipeline.out_file import check_out

SUFFIXES = (".parquet", ".csv", ".jsonl")
GROUP = 8_192  # rows of a row group
BEGINNINGS = {".csv": b"file,", ".jsonl": b'{"file": '}  # of what `predict` writes
FIRST = (["file"], ["key"])  # column of what `predict` and `embed` write


def check_table(path: str, setting: str, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """The path of a table to write. Raises `UserError` as `check_out` does, also for a file that is no such table."""
    return check_out(path, setting, suffixes, _is_ours)


def _is_ours(path: Path) -> bool:
    """Whether a file begins as a table of ours. Raises OSError or ValueError for one that is damaged."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return pq.read_schema(path).names[:1] in FIRST
    with open(path, "rb") as file:
        return file.read(16).startswith(BEGINNINGS[kind])


def write_table(path: Path, setting: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write all batches, in place of a file that is there, whole or not at all. Raises `UserError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as file:
            if path.suffix.lower() == ".parquet":
                with pq.ParquetWriter(file, schema) as writer:
                    for table in _groups(batches):
                        writer.write_table(table)
                return
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            if path.suffix.lower() == ".csv":
                rows = csv.writer(text)
                rows.writerow(schema.names)
                rows.writerows(row.values() for batch in batches for row in batch.to_pylist())
            else:
                text.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for batch in batches for row in batch.to_pylist()
                )
            text.detach()  # flushes, and leaves the file open
    except OSError as error:
        raise UserError(setting, f"{path}: {error}", "a file that can be written", "Choose another.") from error


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= GROUP:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)
