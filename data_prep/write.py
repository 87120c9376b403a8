"""Second pass: write one shard, a plain tar that any webdataset reader reads, and its sidecar.

Each sample is two members, `<key>.jpg` and `<key>.cls` (the label in ASCII). Headers are ustar with no time, owner or
name of the machine, so that equal samples make equal tars.
"""

import hashlib
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from vitscale.data_prep.decode import decode_rgb, encode_jpeg, inspect
from vitscale.data_prep.manifest import SAMPLES, ShardEntry, read_samples, samples_path, write_table
from vitscale.data_prep.plan import KEY_DIGITS
from vitscale.data_prep.publish import PARTIAL, publish
from vitscale.data_prep.sources import Chunk, Item
from vitscale.errors import UserError

_BLOCK = 512  # a tar is made of these (POSIX ustar)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. `picks` are the chunks to read, and for each of their images its position in the shard."""

    folder: str
    name: str
    keys: list[str]
    labels: list[int]
    picks: list[tuple[Chunk, list[int]]]
    jpeg_quality: int
    max_pixels: int


def write_shard(task: ShardTask) -> ShardEntry:
    """Publish the tar, then the sidecar, and return the index entry; what an earlier run published is left as it is.

    Reads each chunk once. At most one image and one chunk's reading are in memory, the rest in an unnamed file.
    Raises OSError where the folder cannot be written, `UserError` (SOURCE) where an image changed since the scan.
    """
    folder = Path(task.folder)
    tar = folder / task.name
    if not _is_published(folder, task):
        with tempfile.TemporaryFile(suffix=PARTIAL, dir=folder) as spool:
            places = _spool_images(task, spool)
            with publish(tar) as file:
                offsets = _write_tar(task, spool, places, file)
        columns = [task.keys, task.labels, offsets, [length for _, length in places]]
        write_table(samples_path(folder, task.name), pa.table(columns, schema=SAMPLES))
    with open(tar, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(task.name, len(task.keys), tar.stat().st_size, sha256)


def _is_published(folder: Path, task: ShardTask) -> bool:
    """Tell whether an interrupted run got this far; keys are content hashes, so equal keys are equal images."""
    try:
        samples = read_samples(folder, task.name)
    except (OSError, pa.ArrowException):  # absent, or of no use
        return False
    return (folder / task.name).exists() and samples.keys == task.keys and samples.labels.tolist() == task.labels


def _spool_images(task: ShardTask, spool: BinaryIO) -> list[tuple[int, int]]:
    """Write the images to `spool` in the order in which they are read; return (offset, length) by shard position."""
    places = [(0, 0)] * len(task.keys)
    for chunk, positions in task.picks:
        for item, position in zip(chunk.read(), positions, strict=True):
            jpeg = _stored_bytes(item, task.keys[position], task)
            places[position] = spool.tell(), len(jpeg)
            spool.write(jpeg)
    return places


def _stored_bytes(item: Item, key: str, task: ShardTask) -> bytes:
    """Return the JPEG to store: the source bytes where they may be kept, else the picture encoded anew."""
    if item.data is None or not key.startswith(hashlib.sha256(item.data).hexdigest()[:KEY_DIGITS]):
        raise UserError(
            "SOURCE", f"{item.name}, which changed during the run", "files that stay as they are", "Run again."
        )
    if inspect(item.data, task.max_pixels).keep:
        return item.data
    return encode_jpeg(decode_rgb(item.data, task.max_pixels), task.jpeg_quality)


def _write_tar(task: ShardTask, spool: BinaryIO, places: list[tuple[int, int]], file: BinaryIO) -> list[int]:
    """Write the members in shard order; return the offset of each image's bytes within the tar."""
    offsets = []
    for key, label, (start, length) in zip(task.keys, task.labels, places, strict=True):
        spool.seek(start)
        offsets.append(file.tell() + _BLOCK)
        for part in (*_member(f"{key}.jpg", spool.read(length)), *_member(f"{key}.cls", str(label).encode())):
            file.write(part)
    file.write(bytes(2 * _BLOCK))
    return offsets


def _member(name: str, data: bytes) -> Iterator[bytes]:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    yield header.tobuf(tarfile.USTAR_FORMAT)
    yield data
    yield bytes(-len(data) % _BLOCK)
