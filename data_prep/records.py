"""Fifth stage: the manifest, a part for each chunk of the source, and what it adds up to.

- `manifest/GGG-NNNN.parquet`  the records of chunk NNNN with their keys and status (`RECORDS`); GGG counts appends
- `work/rejected/NNNN.csv`     those not kept, for people
- `work/summary/NNNN.json`     counts (`Summary`): the done-marker
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.csv import WriteOptions, write_csv

from vitscale.data_prep.dedup import STATUS
from vitscale.data_prep.exchange import gather
from vitscale.data_prep.manifest import DUPLICATE, KEPT, LEAKED, MANIFEST, RECORDS, read_table, write_table
from vitscale.data_prep.scan import SCAN
from vitscale.data_prep.storage import Folder

EXAMPLES = 12  # of each kind, and of pairs


@dataclass
class Summary:
    """Counts over records. Keys are text, as JSON wants them: `sides` by the shorter side, rounded down to 32 px."""

    status: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)  # category → records not kept
    formats: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)  # of kept records, as are the following
    sides: dict[str, int] = field(default_factory=dict)
    source_bytes: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)  # category → names
    pairs: list[list[int]] = field(default_factory=list)  # chunk and row of near duplicates and of their copies

    def counts(self) -> dict[str, Any]:
        """What is kept in dataset.json."""
        return {name: getattr(self, name) for name in ("status", "reasons", "formats", "sides", "source_bytes")}

    def add(self, other: "Summary") -> None:
        """Add another's counts; of examples the first ones stay."""
        for name in ("status", "reasons", "formats", "labels", "sides"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count
        self.source_bytes += other.source_bytes
        for category, names in other.examples.items():
            self.examples[category] = (self.examples.get(category, []) + names)[:EXAMPLES]
        self.pairs = (self.pairs + other.pairs)[:EXAMPLES]


@dataclass(frozen=True)
class RecordsTask:
    """The records of one chunk."""

    work: Folder
    out: Folder
    number: int
    generation: int
    buckets: int


def write_records(task: RecordsTask) -> tuple[int, int, int]:
    """Publish the manifest of a chunk and its summary."""
    name = f"{task.number:04d}"
    scanned = read_table(task.work, f"scan/{name}.parquet", SCAN)
    names = [f"status/{bucket:04d}.arrow" for bucket in range(task.buckets)]
    decided = gather(task.work, names, task.number, STATUS)
    rows = decided["row"].to_numpy()
    columns = {}
    for column in ("key", "status", "reason"):
        values = np.array(scanned[column].to_pylist(), dtype=object)
        values[rows] = decided[column].to_pylist()
        columns[column] = pa.array(values, pa.string())
    records = pa.table([columns.get(f.name, scanned[f.name]) for f in RECORDS], schema=RECORDS)
    write_table(task.out, f"{MANIFEST}/{task.generation:03d}-{name}.parquet", records)
    lost = records.filter(pa.array(records["status"].to_numpy(zero_copy_only=False) != KEPT))
    with task.work.publish(f"rejected/{name}.csv") as file:
        write_csv(lost.select(["name", "status", "reason"]), file, WriteOptions(include_header=False))
    summary = summarise(records)
    near = decided.filter(decided["other_chunk"].is_valid())
    for row, other_chunk, other_row in zip(
        *(near[c].to_pylist() for c in ("row", "other_chunk", "other_row")), strict=True
    ):
        if other_chunk >= 0 and len(summary.pairs) < EXAMPLES:
            summary.pairs.append([task.number, row, other_chunk, other_row])
    with task.work.publish(f"summary/{name}.json") as file:
        file.write(json.dumps(asdict(summary), ensure_ascii=False).encode())
    return len(records), 0, len(lost)


def summarise(records: pa.Table) -> Summary:
    """Add up records."""
    status = records["status"].to_pylist()
    kept = records.filter(pa.array([verdict == KEPT for verdict in status], pa.bool_()))
    summary = Summary(status=dict(Counter(status)), source_bytes=int(np.sum(kept["bytes"].to_numpy())))
    for name, reason in zip(records["name"].to_pylist(), records["reason"].to_pylist(), strict=True):
        if reason is not None:
            category = reason.split(":")[0]
            summary.reasons[category] = summary.reasons.get(category, 0) + 1
            examples = summary.examples.setdefault(category, [])
            if len(examples) < EXAMPLES:
                examples.append(f"{name}: {reason}")
    labels = [*kept["label"].to_pylist(), *(one for many in kept["labels"].to_pylist() for one in many or [])]
    summary.labels = _text(Counter(label for label in labels if label is not None))
    summary.formats = dict(Counter(kept["format"].to_pylist()))
    shorter = np.minimum(kept["width"].to_numpy(), kept["height"].to_numpy()) // 32 * 32
    summary.sides = _text(Counter(shorter.tolist()))
    return summary


def read_summary(work: Folder, chunks: int) -> Summary:
    """The sum over all chunks."""
    total = Summary()
    for number in range(chunks):
        total.add(Summary(**json.loads(work.read(f"summary/{number:04d}.json"))))
    return total


def rejected(summary: Summary) -> dict[str, int]:
    """Categories of the rejected alone, without duplicates and leaks."""
    return {name: count for name, count in sorted(summary.reasons.items()) if name not in (DUPLICATE, LEAKED)}


def _text(counts: "Counter[Any]") -> dict[str, int]:
    return {str(key): count for key, count in sorted(counts.items())}
