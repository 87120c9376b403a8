"""`vitscale index`: make a dataset of webdataset tars where they are. The tars stay as they are, byte for byte."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.executors import LocalExecutor
from vitscale.data_prep.integrity import ImageRejected
from vitscale.data_prep.manifest import (
    DATASET_FILE,
    INDEX_FILE,
    KEPT,
    MANIFEST,
    NO_LABEL,
    RECORDS,
    REJECTED,
    SAMPLES,
    SCHEMA_VERSION,
    ShardEntry,
    fingerprint,
    samples_name,
    write_index,
    write_table,
)
from vitscale.data_prep.records import Summary, rejected, summarise
from vitscale.data_prep.scan import examine
from vitscale.data_prep.shard import Progress, Tally
from vitscale.data_prep.source_tar import TarChunk, open_tars
from vitscale.data_prep.storage import Folder, open_folder
from vitscale.errors import UserError


@dataclass(frozen=True)
class _Task:
    folder: Folder
    number: int
    chunk: TarChunk
    config: ShardConfig


def index(
    path: str, split: str = "train", check: str = "full", workers: int = 0, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Write sidecars, manifest, index and dataset.json beside the tars of a folder; return dataset.json.

    Samples that cannot be used stay in their tar, and out of the sidecar, with their reason in the manifest. Raises
    `UserError` (FOLDER) where there are no tars, or a dataset.
    """
    config = ShardConfig(split=split, check=check, workers=workers)
    folder = open_folder(path, "FOLDER")
    entries, total, tally = [], Summary(), Tally()
    try:
        names = folder.names()
        tars = sorted(name for name in names if name.endswith(".tar"))
        if DATASET_FILE in names:
            raise UserError("FOLDER", f"{path}, which holds a dataset", "tars alone", "Nothing is left to do.")
        if not tars:
            raise UserError("FOLDER", f"{path}, without a .tar", "a folder of webdataset tars", "Check the path.")
        source = open_tars(folder.url.rsplit("/", 1)[-1], folder, tars)
        tasks = [_Task(folder, n, TarChunk((tar,), None, source.labelled), config) for n, tar in enumerate(tars)]
        with LocalExecutor(workers) as executor:
            for done, (entry, summary, keys) in enumerate(executor.map(_index_tar, tasks), start=1):
                entries.append(entry)
                total.add(summary)
                tally.images, tally.bytes = tally.images + keys, tally.bytes + entry.bytes
                tally.rejected += sum(summary.reasons.values())
                if on_progress:
                    on_progress("index", done, len(tasks), tally)
        return _publish(folder, source.name, entries, total, source.labelled, config)
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        raise UserError("FOLDER", got, "a folder that can be written, with room", "Free space, run again.") from error


def _index_tar(task: _Task) -> tuple[ShardEntry, Summary, int]:
    """Publish the sidecar and the part of the manifest of one tar."""
    records, samples = [], []
    for item in task.chunk.read(task.folder):
        stem = item.name.removeprefix(f"{task.chunk.files[0]}/")
        record: dict[str, Any] = {"name": item.name, "label": item.label, "labels": item.labels, "extra": item.extra}
        record |= {"split": task.config.split, "status": REJECTED, "reason": item.problem or None}
        if item.data is not None:
            record |= {"bytes": len(item.data), "sha256": hashlib.sha256(item.data).digest()}
            try:
                found = examine(item.data, task.config)
                record |= {"format": found.format, "width": found.width, "height": found.height}
                record |= {"phash": found.phash, "status": KEPT, "key": stem}
                label = NO_LABEL if item.label is None else item.label
                samples.append((stem, label, item.offset, len(item.data), item.labels))
            except ImageRejected as rejection:
                record["reason"] = str(rejection)
        records.append(record)
    name = task.chunk.files[0]
    table = pa.Table.from_pylist(records, schema=RECORDS)
    write_table(task.folder, f"{MANIFEST}/000-{task.number:06d}.parquet", table)
    columns = list(zip(*samples, strict=True)) or [[], [], [], [], []]
    write_table(task.folder, samples_name(name), pa.table([list(column) for column in columns], schema=SAMPLES))
    with task.folder.open(name) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(name, len(samples), task.folder.size(name) or 0, sha256), summarise(table), len(records)


def _publish(
    folder: Folder, name: str, entries: list[ShardEntry], total: Summary, labelled: str, config: ShardConfig
) -> dict[str, Any]:
    if not any(entry.samples for entry in entries):
        raise UserError("FOLDER", f"{name}, of which no image can be used", "readable images", "Look at the manifest.")
    write_index(folder, INDEX_FILE, entries)
    labels = {int(label): count for label, count in total.labels.items()}
    counts = [labels.get(label, 0) for label in range(1 + max(labels, default=-1))]
    info = {
        "schema_version": SCHEMA_VERSION,
        "split": config.split,
        "labels": labelled,
        "samples": sum(entry.samples for entry in entries),
        "rejected": rejected(total),
        "duplicate": 0,
        "leaked": 0,
        "shards": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "classes": [str(label) for label in range(len(counts))],
        "class_counts": counts,
        "max_pixels": config.max_pixels,
        "index": INDEX_FILE,
        "fingerprint": fingerprint(entries),
        "summary": total.counts(),
        "parts": [{"run": "", "source": name, "seed": None, "settings": {"check": config.check}}],
    }
    with folder.publish(DATASET_FILE) as file:
        file.write(json.dumps(info, indent=1, ensure_ascii=False).encode() + b"\n")
    return info
