"""The files of a dataset folder beside its tars: their schemas, and how they are read.

- `dataset.json`   what the set is; published last, so its presence means that all else is there
- `index.parquet`  one row per shard (`INDEX`); an appended set has a new one, which dataset.json names
- `manifest/*.parquet`  one row per image of the source, kept or not, in source order (`RECORDS`)
- `rejected.csv`   name, status and reason of all that were not kept, for people
- `<shard>.samples.parquet`  one row per sample of a shard, in its order (`SAMPLES`): random access into the tar
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.storage import Folder, LocalFolder, open_folder
from vitscale.errors import UserError

SCHEMA_VERSION = 2
DATASET_FILE, INDEX_FILE, REJECTED_FILE, MANIFEST = "dataset.json", "index.parquet", "rejected.csv", "manifest"
KEPT, REJECTED, DUPLICATE, LEAKED = "kept", "rejected", "duplicate", "leaked"
NO_LABEL = -1  # in sidecars of sets without labels, or with several an image
HASH_BYTES, PHASH_BYTES = 32, 32

RECORDS = pa.schema(
    [
        ("key", pa.string()),  # name of the sample in its shard; null where not kept
        ("name", pa.string()),  # where in the source
        ("format", pa.string()),  # of the source bytes, as Pillow names it
        ("width", pa.int32()),  # upright
        ("height", pa.int32()),
        ("bytes", pa.int64()),  # of the source bytes, as sha256 is
        ("sha256", pa.binary(HASH_BYTES)),
        ("phash", pa.binary(PHASH_BYTES)),  # see phash.py; null where pixels were not looked at
        ("label", pa.int32()),  # null where there is none, or several
        ("labels", pa.list_(pa.int32())),  # of a multi-label set
        ("extra", pa.string()),  # further columns or members of the source, as a JSON object
        ("split", pa.string()),
        ("status", pa.string()),  # KEPT, REJECTED, DUPLICATE (of the same set) or LEAKED (into a set of dedup.against)
        ("reason", pa.string()),  # category: detail; null where kept
    ]
)
INDEX = pa.schema([("shard", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])
SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # NO_LABEL where there is none, or several
        ("offset", pa.int64()),  # of the image bytes within the tar
        ("length", pa.int64()),
        ("labels", pa.list_(pa.int32())),  # of a multi-label set
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
    """A published dataset folder. `info` is the whole of dataset.json, `labelled` one of class, multi and none."""

    folder: Folder
    split: str
    labelled: str
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


def write_table(folder: Folder, name: str, table: pa.Table) -> None:
    """Publish a table as Parquet."""
    with folder.publish(name) as file:
        pq.write_table(table, file, compression="zstd")


def read_table(folder: Folder, name: str, schema: pa.Schema) -> pa.Table:
    """Read the columns of a schema. Raises OSError or pyarrow.ArrowException where they are missing or damaged."""
    with folder.open_arrow(name) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        table = parquet.read(schema.names, use_threads=False)
    if missing := set(schema.names) - set(table.column_names):
        raise pa.ArrowInvalid(f"{name} has no column {', '.join(sorted(missing))}")
    return table.select(schema.names).cast(schema)


def write_index(folder: Folder, name: str, shards: Sequence[ShardEntry]) -> None:
    """Publish the index of a dataset."""
    columns = [[getattr(entry, field) for entry in shards] for field in ("name", "samples", "bytes", "sha256")]
    write_table(folder, name, pa.table(columns, schema=INDEX))


def samples_name(shard: str) -> str:
    """Return the sidecar of a shard: `train-000000.tar` has `train-000000.samples.parquet`."""
    return f"{shard.removesuffix('.tar')}.samples.parquet"


def read_samples(folder: Folder, shard: str) -> ShardSamples:
    """Read the sidecar of a shard. Raises OSError or pyarrow.ArrowException where it is missing or damaged."""
    table = read_table(folder, samples_name(shard), SAMPLES)
    labels, offsets, lengths = (table.column(name).to_numpy() for name in ("label", "offset", "length"))
    return ShardSamples(table.column("key").to_pylist(), labels, offsets, lengths)


def manifest_parts(dataset: "Dataset") -> list[str]:
    """Names of the manifest's files, in the order of the source; without those of an append that is not published."""
    names = sorted(name for name in dataset.folder.names(MANIFEST) if re.fullmatch(r"\d+-\d+\.parquet", name))
    return [f"{MANIFEST}/{name}" for name in names if int(name.split("-")[0]) < len(dataset.info["parts"])]


def read_info(folder: Folder, setting: str) -> dict[str, Any]:
    """Read dataset.json, or raise `UserError` (`setting`) where there is none of the schema of this version."""
    remedy = "Make it with `vitscale shard`, or correct the path."
    try:
        info = json.loads(folder.read(DATASET_FILE))
        version = int(info["schema_version"])
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(folder, LocalFolder) and not folder.path.is_dir():
            raise UserError(setting, f"{folder.url}, which is no folder", "a dataset folder", remedy) from error
        raise UserError(setting, f"{folder.url}, without {DATASET_FILE}", "a dataset folder", remedy) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(setting, f"{folder.url}, with a damaged {DATASET_FILE}", "a dataset folder", remedy) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            setting,
            f"{folder.url} of schema version {version}",
            f"version {SCHEMA_VERSION}",
            "Use the vitscale that made it, or shard again.",
        )
    return info


def read_dataset(path: str | Path, setting: str = "DATASET", check_files: bool = True) -> Dataset:
    """Read dataset.json and the index. Paths and errors are the user's: `setting` names what led here.

    `check_files` makes sure that the two agree, and that every shard and sidecar is there and every tar of the indexed
    size. Raises `UserError` where the folder is missing, empty, unfinished, damaged, or of another schema version.
    """
    folder = open_folder(str(path), setting)
    info = read_info(folder, setting)
    try:
        rows = read_table(folder, str(info["index"]), INDEX).to_pylist()
        shards = tuple(ShardEntry(row["shard"], row["samples"], row["bytes"], row["sha256"]) for row in rows)
        classes, split, labelled = tuple(info["classes"]), info["split"], info["labels"]
        dataset = Dataset(folder, split, labelled, classes, info["samples"], info["fingerprint"], shards, info)
        if check_files and (dataset.samples, dataset.fingerprint) != _totals(shards):
            raise ValueError("the index is not the one that dataset.json speaks of")
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            setting,
            f"{folder.url}, with a damaged {INDEX_FILE} or {DATASET_FILE}",
            "a whole dataset folder",
            "Copy it again.",
        ) from error
    if check_files and (absent := _absent(folder, shards)):
        raise UserError(
            setting,
            f"{folder.url}, where {len(absent)} of {len(shards)} shards are missing or cut short (first: {absent[0]})",
            "every shard of its index",
            "Copy the missing files, or shard again into another folder.",
        )
    return dataset


def _totals(shards: Sequence[ShardEntry]) -> tuple[int, str]:
    return sum(entry.samples for entry in shards), fingerprint(shards)


def _absent(folder: Folder, shards: Sequence[ShardEntry]) -> list[str]:
    if isinstance(folder, LocalFolder):
        sizes = {name: folder.size(name) for entry in shards for name in (entry.name, samples_name(entry.name))}
    else:
        sizes = dict(folder.walk())  # one listing, not a request for each file
    return [e.name for e in shards if sizes.get(e.name) != e.bytes or sizes.get(samples_name(e.name)) is None]
