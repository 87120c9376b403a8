"""`vitscale verify`: is a dataset folder whole, and does every image in it decode? Nothing is extracted or changed."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.executors import LocalExecutor
from vitscale.data_prep.integrity import ImageRejected
from vitscale.data_prep.manifest import (
    DATASET_FILE,
    KEPT,
    MANIFEST,
    NO_LABEL,
    RECORDS,
    Dataset,
    ShardEntry,
    ShardSamples,
    fingerprint,
    manifest_parts,
    read_dataset,
    read_samples,
    read_table,
)
from vitscale.data_prep.source_tar import IMAGE_SUFFIXES, TarChunk, members_of, open_tar, read_member
from vitscale.data_prep.sources import CLASS, MAX_FILE_BYTES
from vitscale.data_prep.storage import Folder


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and one line for each problem; without problems the dataset is as it was published."""

    path: str
    shards: int
    samples: int
    problems: list[str]


def verify(
    path: str,
    on_progress: Callable[[str, int, int], None] | None = None,
    workers: int = 0,
    part: tuple[int, int] = (1, 1),
) -> VerifyReport:
    """Check everything in a dataset folder against everything else, and decode every image.

    Checks size and SHA-256 of the tars, their members against the sidecars, labels, pixels, and the samples against
    manifest and dataset.json. Calls `on_progress("verify", tasks done, tasks)`; a task is a shard or a part of the
    manifest. `workers` 0: every available core. `part` (i, n) looks at every n-th shard from the i-th on, and leaves
    out what needs all of them. Raises `UserError` (DATASET) only where there is no readable dataset.json or index.
    """
    dataset = read_dataset(path, check_files=False)
    shards = dataset.shards[part[0] - 1 :: part[1]]
    manifests = manifest_parts(dataset) if part[1] == 1 else []
    classes = len(dataset.classes) if dataset.labelled == CLASS else None
    foreign = any(not made["run"] for made in dataset.info["parts"])  # tars that `index` left as they were
    check = partial(_check_foreign, dataset.labelled) if foreign else _check_members
    tasks = [
        partial(_check_shard, check, dataset.folder, classes, dataset.info["max_pixels"], entry) for entry in shards
    ]
    tasks += [partial(_check_manifest, dataset.folder, name) for name in manifests]
    problems: list[str] = []
    found, listed = _Digest(), _Digest()
    with LocalExecutor(workers) as executor:
        for done, (some, digest) in enumerate(executor.map(_call, tasks), start=1):
            problems += some
            (found if done <= len(shards) else listed).add(digest)
            if on_progress:
                on_progress("verify", done, len(tasks))
    if part[1] == 1:
        problems += _check_totals(dataset, found, listed, bool(manifests))
    return VerifyReport(str(path), len(shards), found.samples, problems)


@dataclass
class _Digest:
    """Samples, their labels, and a sum over hashes of (key, label), the same for any order."""

    samples: int = 0
    total: int = 0
    labels: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, keys: Sequence[str], labels: Sequence[int]) -> "_Digest":
        pairs = (f"{key} {label}".encode() for key, label in zip(keys, labels, strict=True))
        total = sum(int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest()) for pair in pairs)
        return cls(len(keys), total % 2**64, Counter(labels))

    def add(self, other: "_Digest") -> None:
        self.samples, self.total = self.samples + other.samples, (self.total + other.total) % 2**64
        self.labels.update(other.labels)


_CheckMembers = Callable[[Folder, str, ShardSamples, int], Iterator[str]]


def _call(check: Callable[[], tuple[list[str], _Digest]]) -> tuple[list[str], _Digest]:
    return check()


def _check_shard(
    check: _CheckMembers, folder: Folder, classes: int | None, max_pixels: int, entry: ShardEntry
) -> tuple[list[str], _Digest]:
    """Return the problems of one shard, and the digest of its sidecar."""
    try:
        samples = read_samples(folder, entry.name)
    except (OSError, pa.ArrowException) as error:
        return [f"{entry.name}: sidecar not readable: {_line(error)}"], _Digest()
    problems = [*_check_file(folder, entry), *_check_sidecar(entry, samples, classes)]
    try:
        problems += check(folder, entry.name, samples, max_pixels)
    except (OSError, tarfile.TarError) as error:
        problems.append(f"{entry.name}: tar not readable: {_line(error)}")
    return problems, _Digest.of(samples.keys, samples.labels.tolist())


def _check_manifest(folder: Folder, name: str) -> tuple[list[str], _Digest]:
    """Return the problems of a part of the manifest, and the digest of its kept records."""
    try:
        records = read_table(folder, name, RECORDS)
        records = records.filter(pc.equal(records["status"], KEPT))
    except (OSError, pa.ArrowException) as error:
        return [f"{name}: not readable: {_line(error)}"], _Digest()
    return [], _Digest.of(records["key"].to_pylist(), records["label"].fill_null(NO_LABEL).to_pylist())


def _check_file(folder: Folder, entry: ShardEntry) -> Iterator[str]:
    """Compare a tar with its row of the index."""
    if (size := folder.size(entry.name)) is None:
        return  # reported once, where the members are read
    if size != entry.bytes:
        yield f"{entry.name}: {size} bytes instead of {entry.bytes}"
    with folder.open(entry.name) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            yield f"{entry.name}: SHA-256 differs from the index"


def _check_sidecar(entry: ShardEntry, samples: ShardSamples, classes: int | None) -> Iterator[str]:
    """Compare a sidecar with its row of the index, and labels with `classes` (None: images have no class each)."""
    if len(samples.keys) != entry.samples:
        yield f"{entry.name}: sidecar lists {len(samples.keys)} samples instead of {entry.samples}"
    for key, label in zip(samples.keys, samples.labels, strict=True):
        if not (label == NO_LABEL if classes is None else 0 <= label < classes):
            yield f"{entry.name}: {key}: label {label} of {classes or 'no'} classes"


def _check_members(folder: Folder, name: str, samples: ShardSamples, max_pixels: int) -> Iterator[str]:
    """Compare the members with the sidecar, in order, and decode the images."""
    with folder.open(name) as file, open_tar(file) as archive:
        headers = members_of(archive)
        member = next(headers, None)
        for key, label, offset, length in zip(
            samples.keys, samples.labels, samples.offsets, samples.lengths, strict=True
        ):
            image, members = None, {}
            while member is not None and member.name.split(".", 1)[0] == key:
                suffix = member.name[len(key) + 1 :]
                members[suffix] = _content(file, member)
                if suffix in IMAGE_SUFFIXES:
                    image = member
                member = next(headers, None)
            if image is None:
                yield f"{name}: {key}: missing, as is all that follows"
                return
            if (image.offset_data, image.size) != (offset, length):
                yield f"{name}: {key}: member {image.name} at {image.offset_data} differs from the sidecar"
            if label != NO_LABEL and members.get("cls") != str(label).encode():
                yield f"{name}: {key}: label member differs from the sidecar"
            try:
                decode_rgb(members[image.name[len(key) + 1 :]], max_pixels)
            except ImageRejected as rejection:
                yield f"{name}: {key}: {rejection}"
        if member is not None:
            yield f"{name}: member {member.name} is not in the sidecar"


def _check_foreign(labelled: str, folder: Folder, name: str, samples: ShardSamples, max_pixels: int) -> Iterator[str]:
    """As `_check_members`, for a tar of another maker, of which the sidecar may leave samples out."""
    items = TarChunk((name,), None, labelled).read(folder)
    for key, label, offset, length in zip(samples.keys, samples.labels, samples.offsets, samples.lengths, strict=True):
        item = next((item for item in items if item.data is not None and item.offset == offset), None)
        if item is None or item.data is None:
            yield f"{name}: {key}: missing, as is all that follows"
            return
        if (item.name, len(item.data)) != (f"{name}/{key}", length):
            yield f"{name}: {key}: member {item.name} at {offset} differs from the sidecar"
        if label != (NO_LABEL if item.label is None else item.label):
            yield f"{name}: {key}: label member differs from the sidecar"
        try:
            decode_rgb(item.data, max_pixels)
        except ImageRejected as rejection:
            yield f"{name}: {key}: {rejection}"


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a plain member, b"" of any other."""
    return read_member(file, member) if member.isreg() and 0 <= member.size <= MAX_FILE_BYTES else b""


def _check_totals(dataset: Dataset, found: _Digest, listed: _Digest, manifest: bool) -> Iterator[str]:
    """Compare the samples of all shards with the manifest and dataset.json."""
    if found.samples != dataset.samples:
        yield f"{DATASET_FILE}: {dataset.samples} samples, but the shards list {found.samples}"
    elif dataset.labelled == CLASS:
        counts = [found.labels[label] for label in range(len(dataset.classes))]
        if counts != dataset.info["class_counts"]:
            yield f"{DATASET_FILE}: class counts differ from the labels in the shards"
    if fingerprint(dataset.shards) != dataset.fingerprint:
        yield f"{DATASET_FILE}: fingerprint differs from the index"
    if not manifest:
        yield f"{MANIFEST}: missing"
    elif (listed.samples, listed.total) != (found.samples, found.total):
        yield f"{MANIFEST}: its kept records differ from the samples in the shards"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
