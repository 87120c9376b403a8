"""`vitscale verify`: is a dataset folder whole, and does every image in it decode? Nothing is extracted or changed."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.executors import available_cores, parallel_map
from vitscale.data_prep.integrity import ImageRejected
from vitscale.data_prep.manifest import (
    KEPT,
    MANIFEST_FILE,
    RECORDS,
    Dataset,
    ShardEntry,
    ShardSamples,
    fingerprint,
    read_dataset,
    read_samples,
)


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and one line for each problem; without problems the dataset is as it was published."""

    path: str
    shards: int
    samples: int
    problems: list[str]


def verify(path: str, on_progress: Callable[[str, int, int], None] | None = None, workers: int = 0) -> VerifyReport:
    """Check everything in a dataset folder against everything else, and decode every image.

    Checks size and SHA-256 of the tars, their members against the sidecars, labels, pixels, and the samples against
    manifest and dataset.json. Calls `on_progress("verify", shards done, shards)`. `workers` 0: every available core.
    Raises `UserError` (DATASET) only where there is no readable dataset.json or index to check against.
    """
    dataset = read_dataset(path, check_files=False)
    problems: list[str] = []
    found: list[tuple[str, int]] = []
    check = partial(_check_shard, dataset.path, len(dataset.classes), dataset.info["settings"]["max_pixels"])
    checked = parallel_map(check, dataset.shards, workers or available_cores())
    for done, (shard_problems, pairs) in enumerate(checked, start=1):
        problems += shard_problems
        found += pairs
        if on_progress:
            on_progress("verify", done, len(dataset.shards))
    problems += _check_totals(dataset, found)
    return VerifyReport(str(path), len(dataset.shards), len(found), problems)


def _check_shard(
    folder: Path, class_count: int, max_pixels: int, entry: ShardEntry
) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the problems of one shard, and the (key, label) pairs that its sidecar lists."""
    try:
        samples = read_samples(folder, entry.name)
    except (OSError, pa.ArrowException) as error:
        return [f"{entry.name}: sidecar not readable: {_line(error)}"], []
    problems = [*_check_file(folder / entry.name, entry), *_check_sidecar(entry, samples, class_count)]
    try:
        problems += _check_members(folder / entry.name, samples, max_pixels)
    except (OSError, tarfile.TarError) as error:
        problems.append(f"{entry.name}: tar not readable: {_line(error)}")
    return problems, list(zip(samples.keys, samples.labels.tolist(), strict=True))


def _check_file(tar: Path, entry: ShardEntry) -> Iterator[str]:
    """Compare a tar with its row of the index."""
    if not tar.exists():
        return  # reported once, where the members are read
    if (size := tar.stat().st_size) != entry.bytes:
        yield f"{entry.name}: {size} bytes instead of {entry.bytes}"
    with open(tar, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            yield f"{entry.name}: SHA-256 differs from the index"


def _check_sidecar(entry: ShardEntry, samples: ShardSamples, class_count: int) -> Iterator[str]:
    if len(samples.keys) != entry.samples:
        yield f"{entry.name}: sidecar lists {len(samples.keys)} samples instead of {entry.samples}"
    for key, label in zip(samples.keys, samples.labels, strict=True):
        if not 0 <= label < class_count:
            yield f"{entry.name}: {key}: label {label} of {class_count} classes"


def _check_members(tar: Path, samples: ShardSamples, max_pixels: int) -> Iterator[str]:
    """Compare the members with the sidecar, in order, and decode the images."""
    with tarfile.open(tar, "r:") as archive:
        for key, label, offset, length in zip(
            samples.keys, samples.labels, samples.offsets, samples.lengths, strict=True
        ):
            image, text = archive.next(), archive.next()
            if image is None or text is None:
                yield f"{tar.name}: {key}: missing, as is all that follows"
                return
            if (image.name, image.offset_data, image.size) != (f"{key}.jpg", offset, length):
                yield f"{tar.name}: {key}: member {image.name} at {image.offset_data} differs from the sidecar"
            if (text.name, _content(archive, text)) != (f"{key}.cls", str(label).encode()):
                yield f"{tar.name}: {key}: label member differs from the sidecar"
            try:
                decode_rgb(_content(archive, image), max_pixels)
            except ImageRejected as rejection:
                yield f"{tar.name}: {key}: {rejection}"
        if (extra := archive.next()) is not None:
            yield f"{tar.name}: member {extra.name} is not in the sidecar"


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a regular member, b"" of any other."""
    file = archive.extractfile(member) if member.isreg() else None
    return file.read() if file else b""


def _check_totals(dataset: Dataset, found: list[tuple[str, int]]) -> Iterator[str]:
    """Compare the samples of all shards with the manifest and dataset.json."""
    counts = Counter(label for _, label in found)
    if len(found) != dataset.samples:
        yield f"dataset.json: {dataset.samples} samples, but the shards list {len(found)}"
    elif [counts[label] for label in range(len(dataset.classes))] != dataset.info["class_counts"]:
        yield "dataset.json: class counts differ from the labels in the shards"
    if fingerprint(dataset.shards) != dataset.fingerprint:
        yield "dataset.json: fingerprint differs from the index"
    try:
        records = pq.read_table(dataset.path / MANIFEST_FILE, schema=RECORDS, filters=[("status", "=", KEPT)])
    except (OSError, pa.ArrowException) as error:
        yield f"{MANIFEST_FILE}: not readable: {_line(error)}"
        return
    listed = zip(records["key"].to_pylist(), records["label"].to_pylist(), strict=True)
    if sorted(listed) != sorted(found):
        yield f"{MANIFEST_FILE}: its kept records differ from the samples in the shards"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
