"""`vitscale shard`: list the source → scan (decode and hash every image) → plan → write shards → publish dataset.json.

The result is a pure function of source, settings and software versions: any number of worker processes, any order in
which the file system lists names, and any number of interruptions give the same bytes.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.csv import write_csv

from vitscale.data_prep.decode import MAX_PIXELS
from vitscale.data_prep.executors import available_cores, parallel_map
from vitscale.data_prep.manifest import (
    DATASET_FILE,
    INDEX,
    INDEX_FILE,
    MANIFEST_FILE,
    RECORDS,
    REJECTED_FILE,
    SCHEMA_VERSION,
    ShardEntry,
    fingerprint,
    write_table,
)
from vitscale.data_prep.out_folder import claim, find_complete, release
from vitscale.data_prep.plan import assign_keys, cut, shuffled
from vitscale.data_prep.publish import publish
from vitscale.data_prep.scan import scan_chunk
from vitscale.data_prep.sources import Chunk, Source, open_source
from vitscale.data_prep.write import ShardTask, write_shard
from vitscale.errors import UserError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ShardConfig:
    """Settings of a run. `shard_samples` is the most a shard holds; `workers` 0 stands for every available core.

    `jpeg_quality` is of pictures that cannot be stored as they are. Raises `UserError`, naming the field.
    """

    split: str = "train"
    seed: int = 0
    shard_samples: int = 10_000
    jpeg_quality: int = 95
    max_pixels: int = MAX_PIXELS
    workers: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.split):
            raise UserError(
                "split", repr(self.split), "a word of letters, digits, - and _", "It becomes part of file names."
            )
        self._check_range("seed", 0, 2**63 - 1)
        self._check_range("shard_samples", 1, 10**9)
        self._check_range("jpeg_quality", 1, 100)
        self._check_range("max_pixels", 1, MAX_PIXELS)
        self._check_range("workers", 0, 1024)

    def _check_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise UserError(name, repr(value), f"a whole number from {low} to {high}", "Correct the setting.")


def shard(source: str, out: str, config: ShardConfig, on_progress: Progress | None = None) -> dict[str, Any]:
    """Shard `source` (see `open_source`) into the folder `out`; return dataset.json and `already_complete`.

    `on_progress(stage, done, total)` is called with images done while scanning ("scan") and shards while writing
    ("write"). Where `out` holds this very dataset, nothing is written. An interrupted run is continued. Raises
    `UserError` for bad settings, an unusable source, an `out` that holds anything else, and a disk that is full.
    """
    report = on_progress or (lambda stage, done, total: None)
    listed = open_source(source)
    folder = Path(out).absolute()
    _refuse_nested(source, folder)
    run = _run_digest(listed, config)
    with _writing(out):
        if complete := find_complete(folder, run):
            release(folder)
            return complete | {"already_complete": True}
    records = _scan(listed, config, report)
    _check_kept(listed, records)
    with _writing(out):
        claim(folder, run)
        info = _write(listed, records, folder, config, report) | {"run": run}
        _publish_json(folder / DATASET_FILE, info)
        release(folder)
    return info | {"already_complete": False}


@contextmanager
def _writing(out: str) -> Iterator[None]:
    """Turn what the file system refuses into an error for the user; sources report their own."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "OUT",
            f"{out} ({error.strerror or error})",
            "a folder that can be written, with room",
            "Free space, run again.",
        ) from error


def _refuse_nested(source: str, out: Path) -> None:
    """Refuse to write shards among the images, where the next run would list them."""
    if out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError("OUT", f"{out}, within SOURCE", "a folder outside of it", "Choose another folder for OUT.")


def _run_digest(source: Source, config: ShardConfig) -> str:
    """Name what would be made of what, apart from software versions."""
    settings = asdict(config)
    del settings["workers"]
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, source.digest, source.classes, settings]).encode()).hexdigest()


def _scan(source: Source, config: ShardConfig, report: Progress) -> pa.Table:
    """Return the records of the whole source, in its order, with keys."""
    scan = partial(scan_chunk, split=config.split, max_pixels=config.max_pixels)
    total, done, parts = sum(map(len, source.chunks)), 0, []
    for part in parallel_map(scan, source.chunks, _workers(config)):
        parts.append(part)
        done += len(part)
        report("scan", done, total)
    records = pa.concat_tables(parts)
    keys = np.full(len(records), None, dtype=object)
    keys[_is_kept(records)] = assign_keys(_kept(records)["sha256"].to_pylist())
    return records.set_column(0, RECORDS.field("key"), pa.array(keys, pa.string()))


def _is_kept(records: pa.Table) -> np.ndarray:
    return records["reason"].is_null().to_numpy()


def _kept(records: pa.Table) -> pa.Table:
    return records.filter(pa.array(_is_kept(records)))


def _rejected(records: pa.Table) -> pa.Table:
    return records.filter(pa.array(~_is_kept(records)))


def _check_kept(source: Source, records: pa.Table) -> None:
    """Raise `UserError` (SOURCE) where no image was kept, or none of a class that must have some."""
    kept = set(_kept(records)["label"].to_pylist())
    if not kept:
        raise UserError(
            "SOURCE",
            f"{source.name}, where all {len(records)} images are rejected (first: {records['reason'][0].as_py()})",
            "at least one readable image",
            "Check that these are JPEG, PNG, GIF, WebP, BMP or TIFF files.",
        )
    empty = [name for label, name in enumerate(source.classes) if label not in kept]
    if empty and source.needs_every_class:
        raise UserError(
            "SOURCE",
            f"{source.name}, without a readable image in the class folders {', '.join(empty)}",
            "at least one in each",
            "Add images, or remove the folders.",
        )


def _write(source: Source, records: pa.Table, folder: Path, config: ShardConfig, report: Progress) -> dict[str, Any]:
    """Publish all but dataset.json, and return its content."""
    tasks = _plan(source, records, folder, config)
    shards: list[ShardEntry] = []
    for entry in parallel_map(write_shard, tasks, _workers(config)):
        shards.append(entry)
        report("write", len(shards), len(tasks))
    columns = [[getattr(entry, name) for entry in shards] for name in ("name", "samples", "bytes", "sha256")]
    write_table(folder / INDEX_FILE, pa.table(columns, schema=INDEX))
    write_table(folder / MANIFEST_FILE, records)
    with publish(folder / REJECTED_FILE) as file:
        write_csv(_rejected(records).select(["name", "reason"]), file)
    return _describe(source, records, shards, config)


def _plan(source: Source, records: pa.Table, folder: Path, config: ShardConfig) -> list[ShardTask]:
    """Assign every kept record its shard and position."""
    rows = np.flatnonzero(_is_kept(records))
    keys, labels = (_kept(records)[name].to_pylist() for name in ("key", "label"))
    order = np.array(shuffled(keys, config.seed))
    starts = np.cumsum([0, *map(len, source.chunks)])
    tasks = []
    for number, (start, end) in enumerate(cut(len(order), config.shard_samples)):
        chosen = order[start:end]
        tasks.append(
            ShardTask(
                folder=str(folder),
                name=f"{config.split}-{number:06d}.tar",
                keys=[keys[sample] for sample in chosen],
                labels=[labels[sample] for sample in chosen],
                picks=_picks(source, starts, rows[chosen]),
                jpeg_quality=config.jpeg_quality,
                max_pixels=config.max_pixels,
            )
        )
    return tasks


def _picks(source: Source, starts: np.ndarray, rows: np.ndarray) -> list[tuple[Chunk, list[int]]]:
    """Group the source rows of a shard by chunk, each with its position in the shard."""
    positions = np.argsort(rows)
    chunks, firsts = np.unique(np.searchsorted(starts, rows[positions], side="right") - 1, return_index=True)
    return [
        (source.chunks[chunk].pick((rows[members] - starts[chunk]).tolist()), members.tolist())
        for chunk, members in zip(chunks, np.split(positions, firsts[1:]), strict=True)
    ]


def _describe(source: Source, records: pa.Table, shards: Sequence[ShardEntry], config: ShardConfig) -> dict[str, Any]:
    """Return the content of dataset.json."""
    counts = Counter(_kept(records)["label"].to_pylist())
    reasons = Counter(reason.split(":")[0] for reason in _rejected(records)["reason"].to_pylist())
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source.name,
        "split": config.split,
        "seed": config.seed,
        "settings": {name: getattr(config, name) for name in ("shard_samples", "jpeg_quality", "max_pixels")},
        "samples": sum(counts.values()),
        "rejected": dict(sorted(reasons.items())),
        "shards": len(shards),
        "bytes": sum(entry.bytes for entry in shards),
        "classes": source.classes,
        "class_counts": [counts[label] for label in range(len(source.classes))],
        "fingerprint": fingerprint(shards),
    }


def _publish_json(path: Path, content: dict[str, Any]) -> None:
    with publish(path) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _workers(config: ShardConfig) -> int:
    return config.workers or available_cores()
