"""First stage: look at every image of a chunk, and write down what it is, or why it is rejected.

Each image is read and decoded once. Bytes that could not be taken from the source again as they are to be stored (that
were encoded anew, or have no place of their own there) are spooled, so that the writing of shards copies and no more.

- `work/scan/NNNN.parquet`  the records of chunk NNNN (`RECORDS` and `PLACES`), in their order: the done-marker
- `work/keys/NNNN.arrow`    those that may be kept (`KEYS`), in buckets of their SHA-256
- `work/near/NNNN.arrow`    their perceptual hashes (`NEAR`), in buckets of bands (see phash.py), if they are asked for
- `work/spool/NNNN.bin`     spooled bytes
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscale.data_prep import phash
from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.decode import check_pixels, decode_plain_jpeg, decode_rgb, encode, inspect
from vitscale.data_prep.exchange import bucket_of, scatter
from vitscale.data_prep.integrity import ImageRejected, check_whole, image_format, jpeg_header
from vitscale.data_prep.manifest import HASH_BYTES, KEPT, PHASH_BYTES, RECORDS, REJECTED, read_table, write_table
from vitscale.data_prep.sources import Chunk, Item
from vitscale.data_prep.storage import Folder

PLACES = [
    ("file", pa.large_string()),  # of the source; null where spooled
    ("offset", pa.int64()),  # in that file, or in the chunk's spool
    ("length", pa.int64()),  # of the bytes to store
]
SCAN = pa.schema([*RECORDS, *(pa.field(*place) for place in PLACES)])
KEYS = pa.schema(
    [
        ("sha256", pa.binary(HASH_BYTES)),
        ("chunk", pa.int32()),
        ("row", pa.int32()),
        ("label", pa.int32()),
        ("labels", pa.list_(pa.int32())),
        ("extra", pa.large_string()),
        *PLACES,
    ]
)
NEAR = pa.schema(
    [
        ("band", pa.uint64()),
        ("phash", pa.binary(PHASH_BYTES)),
        ("sha256", pa.binary(HASH_BYTES)),
        ("chunk", pa.int32()),
        ("row", pa.int32()),
    ]
)
HASHED_KEYS = pa.schema([*KEYS, ("phash", pa.binary(PHASH_BYTES))])
REFERENCE = -(2**31)  # chunk number of records of dedup.against; parts of the set that is appended to end with -1
_ROWS = 8192  # records in memory before they are written


@dataclass(frozen=True)
class ScanTask:
    """One chunk to look at; `buckets` and `bits` are of the exchange (bits 0: no perceptual hashes are exchanged)."""

    source: Folder
    work: Folder
    number: int
    chunk: Chunk
    config: ShardConfig
    buckets: int
    bits: int


@dataclass(frozen=True)
class Examined:
    """What an image is. `stored` are the bytes to store, None where they are the source's own."""

    format: str
    width: int
    height: int
    phash: bytes | None
    stored: bytes | None


def scan(task: ScanTask) -> tuple[int, int, int]:
    """Write the files of a chunk; return its images, bytes, and how many were rejected."""
    name, kept, images, read, rejected = f"{task.number:04d}", [], 0, 0, 0
    with (
        task.work.publish(f"scan/{name}.parquet") as marker,
        pq.ParquetWriter(marker, SCAN, compression="zstd") as table,
    ):
        with _Spool(task.work, f"spool/{name}.bin") as spool:
            for rows in _some(_records(task, spool), _ROWS):
                records = pa.Table.from_pylist(rows, schema=SCAN)
                table.write_table(records)
                kept.append(_keys(records, task.number, images))
                images += len(records)
                read += sum(row.get("bytes") or 0 for row in rows)
                rejected += sum(row["status"] == REJECTED for row in rows)
        keys = pa.concat_tables([HASHED_KEYS.empty_table(), *kept])
        write_keys(task.work, name, keys, task.buckets, task.bits)
    return images, read, rejected


@dataclass(frozen=True)
class ExistingTask:
    """One part of the manifest of a published set that is appended to; `chunk` is its number among the chunks."""

    out: Folder
    work: Folder
    number: int
    chunk: int
    part: str
    buckets: int
    bits: int


def scan_existing(task: ExistingTask) -> tuple[int, int, int]:
    """Put the kept records of the part among the keys: with their negative chunk they come before all new ones."""
    records = read_table(task.out, task.part, RECORDS)
    records = records.filter(pc.equal(records["status"], KEPT))
    empty = pa.nulls(len(records), pa.int64())
    for name, kind in PLACES:
        records = records.append_column(name, empty.cast(kind))
    rows = np.arange(len(records), dtype=np.int32)
    records = records.append_column("chunk", pa.array(np.full(len(rows), task.chunk, np.int32)))
    records = records.append_column("row", pa.array(rows))
    write_keys(
        task.work, f"e{task.number:04d}", records.select(HASHED_KEYS.names).cast(HASHED_KEYS), task.buckets, task.bits
    )
    write_table(task.work, f"scan/e{task.number:04d}.parquet", pa.table({"samples": [len(rows)]}))
    return 0, 0, 0


def write_keys(work: Folder, name: str, keys: pa.Table, buckets: int, bits: int) -> None:
    """Write `keys`, rows of `HASHED_KEYS`, for the next stages."""
    if bits:
        hashed = keys.filter(keys["phash"].is_valid())
        with work.publish(f"near/{name}.arrow") as file:
            scatter(file, near_tables(hashed, bits, buckets), buckets, NEAR)
    with work.publish(f"keys/{name}.arrow") as file:
        scatter(file, [(keys.select(KEYS.names), bucket_of(matrix(keys["sha256"]), buckets))], buckets, KEYS)


def near_tables(keys: pa.Table, bits: int, buckets: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """For each table of bands: (`NEAR`, buckets) of the rows of `keys`."""
    for band in phash.bands(matrix(keys["phash"]), bits):
        columns = [pa.array(band), *(keys[name] for name in NEAR.names[1:])]
        yield (
            pa.table(columns, schema=NEAR),
            (band * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).astype(np.int64) % buckets,
        )


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of hashes of 32 bytes as uint8 (rows, 32); null becomes zeros."""
    filled = column.combine_chunks().fill_null(bytes(HASH_BYTES))
    if isinstance(filled, pa.ChunkedArray):
        filled = pa.concat_arrays(filled.chunks) if filled.num_chunks else pa.array([], pa.binary(HASH_BYTES))
    data = np.frombuffer(filled.buffers()[1] or b"", np.uint8)
    return data[filled.offset * HASH_BYTES : (filled.offset + len(filled)) * HASH_BYTES].reshape(-1, HASH_BYTES)


def _keys(records: pa.Table, chunk: int, first: int) -> pa.Table:
    rows = pa.array(np.arange(first, first + len(records), dtype=np.int32))
    chunks = pa.array(np.full(len(records), chunk, np.int32))
    table = records.append_column("row", rows).append_column("chunk", chunks)
    table = table.filter(pc.equal(table["status"], KEPT))
    return table.select(HASHED_KEYS.names).cast(HASHED_KEYS)


def _records(task: ScanTask, spool: "_Spool") -> Iterator[dict[str, Any]]:
    for item in task.chunk.read(task.source):
        yield _record(item, task.config, spool)


def _record(item: Item, config: ShardConfig, spool: "_Spool") -> dict[str, Any]:
    """Return one row; columns that are not known stay away and become null."""
    record: dict[str, Any] = {
        "name": item.name,
        "label": item.label,
        "labels": item.labels,
        "extra": item.extra,
        "split": config.split,
        "status": REJECTED,
    }
    if item.data is None:
        return record | {"reason": item.problem}
    record |= {"bytes": len(item.data), "sha256": hashlib.sha256(item.data).digest()}
    try:
        found = examine(item.data, config)
    except ImageRejected as rejection:
        return record | {"reason": str(rejection)}
    record |= {"format": found.format, "width": found.width, "height": found.height, "phash": found.phash}
    record["status"] = KEPT
    if found.stored is None and item.file is not None:
        return record | {"file": item.file, "offset": item.offset, "length": len(item.data)}
    data = item.data if found.stored is None else found.stored
    return record | {"offset": spool.append(data), "length": len(data)}


def examine(data: bytes, config: ShardConfig) -> Examined:
    """Look at one image by the policy of decode.py and the settings. Raises `ImageRejected`.

    Bytes are kept where they are an upright JPEG of 8 bits, grey or YCbCr, that need not be made smaller.
    """
    header = jpeg_header(data) if image_format(data) == "JPEG" else None
    if header and header.orientation == 1:
        height, width = header.height, header.width
        smaller = config.resize.target(height, width)
        if config.check == "header" and not smaller:
            check_pixels(width, height, config.max_pixels)
            check_whole(data, "JPEG")
            return Examined("JPEG", width, height, None, None)
        kind, least = ("RGB", smaller) if smaller else ("GRAY", (phash.GRID, phash.GRID))
        pixels = decode_plain_jpeg(data, width, height, config.max_pixels, kind, least)
        if pixels is not None and not smaller:
            return Examined("JPEG", width, height, phash.perceptual_hash(pixels[:, :, 0]), None)
        if pixels is not None:
            return _encoded("JPEG", width, height, pixels, config)
    rgb, info = decode_rgb(data, config.max_pixels), inspect(data, config.max_pixels)
    height, width, _ = rgb.shape
    if info.keep and not config.resize.target(height, width):
        return Examined(info.format, width, height, phash.perceptual_hash(phash.grey_of(rgb)), None)
    return _encoded(info.format, width, height, rgb, config)


def _encoded(format: str, width: int, height: int, rgb: np.ndarray, config: ShardConfig) -> Examined:
    """Made smaller where asked for, by area averaging, and encoded anew."""
    target = config.resize.target(height, width)
    if target and target != rgb.shape[:2]:
        rgb = cv2.resize(rgb, target[::-1], interpolation=cv2.INTER_AREA)
    hashed = phash.perceptual_hash(phash.grey_of(rgb))
    return Examined(format, width, height, hashed, encode(rgb, config.format, config.jpeg_quality))


class _Spool:
    """A file of bytes one after the other, which appears with the first of them."""

    def __init__(self, work: Folder, name: str) -> None:
        self._work, self._name, self._context, self._size = work, name, None, 0
        self._file: BinaryIO | None = None

    def append(self, data: bytes) -> int:
        """Write bytes; return their offset."""
        if self._file is None:
            self._context = self._work.publish(self._name)
            self._file = self._context.__enter__()
        self._file.write(data)
        self._size += len(data)
        return self._size - len(data)

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*exception)


def _some(rows: Iterator[dict[str, Any]], count: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch
