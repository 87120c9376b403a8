"""Fourth stage: write one shard, a plain tar that any webdataset reader reads, its sidecar, and its row of the index.

A sample is two or three members: the image, `<key>.jpg` (or `.png`, `.webp`), its label in ASCII, `<key>.cls`, and, for
several labels or what else the source says, `<key>.json`. Headers are ustar with no time, owner or name of the machine,
so that equal samples make equal tars.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from vitscale.data_prep.integrity import image_format
from vitscale.data_prep.manifest import INDEX, NO_LABEL, SAMPLES, samples_name, write_table
from vitscale.data_prep.sources import to_json
from vitscale.data_prep.storage import Folder, LocalFolder
from vitscale.errors import UserError

_BLOCK = 512  # a tar is made of these (POSIX ustar)
_PIECE = 2**22  # bytes hashed and written at once
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_BLANK = sum(_EMPTY[:124]) + sum(_EMPTY[136:148]) + 8 * ord(" ") + sum(_EMPTY[156:])  # the checksum counts as blanks
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


@dataclass(frozen=True)
class WriteTask:
    """One shard to write: the samples from `start` to `stop` of the plan, whose buckets are cut at `cuts`."""

    source: Folder
    work: Folder
    out: Folder
    name: str
    number: int
    cuts: tuple[int, ...]
    start: int
    stop: int


def write(task: WriteTask) -> tuple[int, int, int]:
    """Publish the tar, the sidecar and, as the done-marker, `work/shards/NNNNNN.parquet` (`INDEX`).

    One image is in memory at a time. Returns images, bytes of the tar, and 0. Raises OSError where a folder refuses,
    `UserError` (SOURCE) where an image changed since the scan.
    """
    from vitscale.data_prep.plan import planned

    rows = planned(task.work, task.cuts, task.start, task.stop)
    with task.out.publish(task.name) as file:
        hashed = _Hashed(file, isinstance(task.out, LocalFolder))
        places = [_write_sample(task, row, hashed) for row in rows.to_pylist()]
        hashed.write(bytes(2 * _BLOCK))  # the end of an archive
        hashed.flush()
    columns = {
        "key": rows["key"],
        "label": rows["label"].combine_chunks().fill_null(NO_LABEL),
        "offset": [offset for offset, _ in places],
        "length": [length for _, length in places],
        "labels": rows["labels"],
    }
    write_table(task.out, samples_name(task.name), pa.table(columns, schema=SAMPLES))
    row = [[task.name], [len(rows)], [hashed.size], [hashed.digest.hexdigest()]]
    write_table(task.work, f"shards/{task.number:06d}.parquet", pa.table(row, schema=INDEX))
    return len(rows), hashed.size, 0


def stored_size(lengths: np.ndarray) -> np.ndarray:
    """Bytes that samples with a label take in a tar, by the length of their images."""
    return (lengths + _BLOCK - 1) // _BLOCK * _BLOCK + 3 * _BLOCK


class _Hashed:
    """A file that is hashed as it is written, in large pieces: threads side by side hand over seldom."""

    def __init__(self, file: BinaryIO, local: bool) -> None:
        self._file, self._local, self._parts, self._held = file, local, [], 0
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, *parts: bytes) -> None:
        self._parts += parts
        self._held += sum(map(len, parts))
        if self._held >= _PIECE:
            self.flush()

    def tell(self) -> int:
        return self.size + self._held

    def flush(self) -> None:
        piece = b"".join(self._parts)
        self._file.write(piece)
        if self._local and hasattr(os, "posix_fadvise"):  # to the disk now: later there is only waiting left to do
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.digest.update(piece)
        self.size += len(piece)
        self._parts, self._held = [], 0


def _write_sample(task: WriteTask, row: dict[str, Any], file: _Hashed) -> tuple[int, int]:
    """Write the members of a sample; return the (offset, length) of its image within the tar."""
    data = _stored_bytes(task, row)
    key, offset = row["key"], file.tell() + _BLOCK
    suffix = _SUFFIXES[image_format(data) or "JPEG"]
    members = [(f"{key}.{suffix}", data)]
    if row["label"] is not None:
        members.append((f"{key}.cls", str(row["label"]).encode()))
    if row["labels"] is not None or row["extra"] is not None:
        values = json.loads(row["extra"] or "{}") | ({"labels": row["labels"]} if row["labels"] is not None else {})
        members.append((f"{key}.json", to_json(values)))
    for member in members:
        file.write(*_member(*member))
    return offset, len(data)


def _stored_bytes(task: WriteTask, row: dict[str, Any]) -> bytes:
    """The bytes to store, out of the spool or, checked against their hash, out of the source."""
    if row["file"] is None:
        data = read_bytes(task.work, f"spool/{row['chunk']:04d}.bin", row["offset"], row["length"])
        if len(data) == row["length"]:
            return data
        raise OSError(f"{task.work.url}/spool/{row['chunk']:04d}.bin ends early")
    try:
        data = read_bytes(task.source, row["file"], row["offset"], row["length"])
    except OSError as error:
        got = f"{row['file']} ({error.strerror or error})"
        raise UserError(
            "SOURCE", got, "files that stay readable during the run", "Mend that, and run again."
        ) from error
    if hashlib.sha256(data).digest() != row["sha256"]:
        got = f"{row['file']}, which changed during the run"
        raise UserError("SOURCE", got, "files that stay as they are", "Shard into another folder, from the start.")
    return data


def read_bytes(folder: Folder, name: str, offset: int, length: int) -> bytes:
    """Bytes of a file; local files that many samples lie in stay open."""
    if isinstance(folder, LocalFolder) and (offset or name.endswith((".tar", ".bin"))):
        path = f"{folder.url}/{name}"
        status = os.stat(path)
        file = _opened(path, status.st_ino, status.st_mtime_ns)  # held: another thread may push it out of the cache
        return os.pread(file.fileno(), length, offset)
    return folder.read(name, offset, length)


@lru_cache(maxsize=64)
def _opened(path: str, inode: int, changed: int) -> BinaryIO:
    """A file as it is now; one that takes its place later is another one."""
    return open(path, "rb", buffering=0)


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, content and padding of a member. POSIX.1-1988 ustar: name at 0, size at 124, checksum at 148."""
    path, size = name.encode("ascii"), b"%011o" % len(data)
    checksum = b"%06o\0 " % (_BLANK + sum(path) + sum(size))
    header = path + _EMPTY[len(path) : 124] + size + _EMPTY[135:148] + checksum + _EMPTY[156:]
    return header, data, bytes(-len(data) % _BLOCK)
