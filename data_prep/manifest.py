"""The files of a dataset folder beside its tars: their schemas, and how they are read.

- `dataset.json`   what the set is; published last, so its presence means that all else is there
- `index.parquet`  one row per shard (`INDEX`)
- `manifest.parquet`  one row per image of the source, kept or rejected, in source order (`RECORDS`)
- `rejected.csv`   name and reason of the rejected, for people
- `<shard>.samples.parquet`  one row per sample of a shard, in its order (`SAMPLES`): random access into the tar
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.publish import publish
from vitscale.errors import UserError

SCHEMA_VERSION = 1
DATASET_FILE, INDEX_FILE, MANIFEST_FILE, REJECTED_FILE = (
    "dataset.json",
    "index.parquet",
    "manifest.parquet",
    "rejected.csv",
)
KEPT, REJECTED = "kept", "rejected"

RECORDS = pa.schema(
    [
        ("key", pa.string()),  # name of the sample in its shard; null where rejected
        ("name", pa.string()),  # where in the source
        ("format", pa.string()),  # of the source bytes, as Pillow names it
        ("width", pa.int32()),  # upright
        ("height", pa.int32()),
        ("bytes", pa.int64()),  # of the source bytes, as sha256 is
        ("sha256", pa.string()),
        ("label", pa.int32()),
        ("split", pa.string()),
        ("status", pa.string()),  # KEPT or REJECTED
        ("reason", pa.string()),  # category: detail; null where kept
    ]
)
INDEX = pa.schema([("shard", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])
SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("offset", pa.int64()),  # of the image bytes within the tar
        ("length", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """One row of the index; `name` is the file name of the tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """A published dataset folder. `info` is the whole of dataset.json."""

    path: Path
    split: str
    classes: tuple[str, ...]
    samples: int
    fingerprint: str
    shards: tuple[ShardEntry, ...]
    info: dict[str, Any]


@dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard, in its order: keys, and arrays (samples,) of labels, byte offsets and byte lengths."""

    keys: Sequence[str]
    labels: np.ndarray  # int32
    offsets: np.ndarray  # int64
    lengths: np.ndarray  # int64


def fingerprint(shards: Sequence[ShardEntry]) -> str:
    """Return the SHA-256 over names and SHA-256 of the shards: equal fingerprints are equal samples in equal order."""
    return hashlib.sha256("".join(f"{entry.name} {entry.sha256}\n" for entry in shards).encode()).hexdigest()


def write_table(path: Path, table: pa.Table) -> None:
    """Publish a table as Parquet."""
    with publish(path) as file:
        pq.write_table(table, file, compression="zstd")


def samples_path(folder: Path, shard: str) -> Path:
    """Return the sidecar of a shard: `train-000000.tar` has `train-000000.samples.parquet`."""
    return folder / f"{Path(shard).stem}.samples.parquet"


def read_samples(folder: Path, shard: str) -> ShardSamples:
    """Read the sidecar of a shard. Raises OSError or pyarrow.ArrowException where it is missing or damaged."""
    table = pq.read_table(samples_path(folder, shard), schema=SAMPLES)
    labels, offsets, lengths = (table.column(name).to_numpy() for name in ("label", "offset", "length"))
    return ShardSamples(table.column("key").to_pylist(), labels, offsets, lengths)


def read_info(folder: Path, setting: str) -> dict[str, Any]:
    """Read dataset.json, or raise `UserError` (`setting`) where there is none of a schema this version knows."""
    remedy = "Make it with `vitscale shard`, or correct the path."
    if not folder.is_dir():
        raise UserError(setting, f"{folder}, which is no folder", "a dataset folder", remedy)
    try:
        info = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
        version = int(info["schema_version"])
    except FileNotFoundError as error:
        raise UserError(setting, f"{folder}, without {DATASET_FILE}", "a dataset folder", remedy) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(setting, f"{folder}, with a damaged {DATASET_FILE}", "a dataset folder", remedy) from error
    if version > SCHEMA_VERSION:
        raise UserError(
            setting,
            f"{folder} of schema version {version}",
            f"at most {SCHEMA_VERSION}",
            "Use the vitscale that made it, or a newer one.",
        )
    return info


def read_dataset(path: str | Path, setting: str = "DATASET", check_files: bool = True) -> Dataset:
    """Read dataset.json and the index. Paths and errors are the user's: `setting` names what led here.

    `check_files` makes sure that the two agree, and that every shard and sidecar is there and every tar of the indexed
    size. Raises `UserError`
    where the folder is missing, empty, unfinished, damaged, or of a newer schema version.
    """
    folder = Path(path)
    info = read_info(folder, setting)
    try:
        rows = pq.read_table(folder / INDEX_FILE, schema=INDEX).to_pylist()
        shards = tuple(ShardEntry(row["shard"], row["samples"], row["bytes"], row["sha256"]) for row in rows)
        dataset = Dataset(
            folder, info["split"], tuple(info["classes"]), info["samples"], info["fingerprint"], shards, info
        )
        if check_files and (dataset.samples, dataset.fingerprint) != _totals(shards):
            raise ValueError("the index is not the one that dataset.json speaks of")
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            setting,
            f"{folder}, with a damaged {INDEX_FILE} or {DATASET_FILE}",
            "a whole dataset folder",
            "Copy it again.",
        ) from error
    if check_files and (absent := [entry.name for entry in shards if not _is_whole(folder, entry)]):
        raise UserError(
            setting,
            f"{folder}, where {len(absent)} of {len(shards)} shards are missing or cut short (first: {absent[0]})",
            "every shard of its index",
            "Copy the missing files, or shard again into another folder.",
        )
    return dataset


def _totals(shards: Sequence[ShardEntry]) -> tuple[int, str]:
    return sum(entry.samples for entry in shards), fingerprint(shards)


def _is_whole(folder: Path, entry: ShardEntry) -> bool:
    tar = folder / entry.name
    return tar.is_file() and tar.stat().st_size == entry.bytes and samples_path(folder, entry.name).is_file()
