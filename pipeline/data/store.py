"""Random access to the samples of datasets: bytes by sample number, read by offset from their tars."""

import errno
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitscale.data_prep.manifest import (
    NO_LABEL,
    SAMPLES,
    Dataset,
    ShardEntry,
    ShardSamples,
    read_dataset,
    read_samples,
    read_table,
    samples_name,
)
from vitscale.data_prep.sources import CLASS, MULTI
from vitscale.data_prep.storage import LocalFolder
from vitscale.errors import UserError
from vitscale.pipeline.data.cache import ShardCache

OPEN_FILES = 256  # in each process; soft limits of 1,024 are common
HELD_SAMPLES = 2_000_000  # of sidecars that each process keeps, at about 50 bytes
ATTEMPTS, FIRST_DELAY = 3, 0.5  # to read a sample, and seconds before the second one; they double
PAUSE = 60.0  # seconds in which a shard that could not be read is not tried again


@dataclass(frozen=True)
class Sample:
    """One record's encoded image, its labels, its key, and the tar that it came from."""

    data: bytes
    labels: tuple[int, ...]
    key: str
    shard: str

    @property
    def label(self) -> int:
        """The one label of a sample that has one, else `NO_LABEL`."""
        return self.labels[0] if len(self.labels) == 1 else NO_LABEL


@dataclass(frozen=True)
class _Sidecar(ShardSamples):
    """The samples of a shard; of a multi-label set also all their labels in turn, and where those of each begin."""

    values: np.ndarray | None = None  # int32
    starts: np.ndarray | None = None  # int64 (samples + 1,)

    def labels_of(self, row: int) -> tuple[int, ...]:
        if self.values is None or self.starts is None:
            return (int(self.labels[row]),)
        return tuple(self.values[self.starts[row] : self.starts[row + 1]].tolist())


@dataclass(frozen=True)
class CacheSettings:
    """Where shards out of an object store are held, and up to how many bytes of them."""

    folder: Path
    limit: int


class Store:
    """The samples 0 … len - 1 of folders that `vitscale shard` wrote, one folder after the other, in order of shards.

    Sidecars are read when first needed, in each process anew; the last used tars stay open (`OPEN_FILES`), the last
    used sidecars in memory (`HELD_SAMPLES`). Shards in an object store are held on a local disk as `cache` says.
    `check` makes sure now that every shard is there. Raises `UserError` naming `setting` for a folder that is missing,
    incomplete or damaged, and for folders without labels, or whose classes differ.
    """

    def __init__(
        self, paths: str | Sequence[str], setting: str, cache: CacheSettings | None = None, check: bool = True
    ) -> None:
        self._setting = setting
        paths = [paths] if isinstance(paths, str) else list(paths)
        self._datasets = [read_dataset(path, setting, check_files=check) for path in paths]
        for path, dataset in zip(paths, self._datasets, strict=True):
            if dataset.labelled not in (CLASS, MULTI):
                got = f"{path}, whose labels are of the kind {dataset.labelled}"
                raise UserError(setting, got, "a dataset with class labels", "Shard a source that has them.")
            if dataset.labelled != self._datasets[0].labelled:
                got = f"{path} and {paths[0]}, of which one has several labels an image"
                raise UserError(setting, got, "datasets with labels of one kind", "Train on one of them.")
            if dataset.classes != self._datasets[0].classes:
                got = f"{path}, with other classes than {paths[0]}"
                raise UserError(
                    setting, got, "datasets of the same classes, in the same order", "Train on one of them."
                )
        self._shards = [(dataset, shard) for dataset in self._datasets for shard in dataset.shards]
        self._ends = np.cumsum([shard.samples for _, shard in self._shards])
        self._caches = [_cache(dataset, cache, setting) for dataset in self._datasets]
        self._files: OrderedDict[int, int] = OrderedDict()  # shard → descriptor, the last used at the end
        self._sidecars: OrderedDict[int, _Sidecar] = OrderedDict()
        self._broken: dict[int, tuple[float, UserError]] = {}  # shards that could not be read, and when

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def sizes(self) -> list[np.ndarray]:
        """Of each dataset, the samples of its shards."""
        return [np.array([shard.samples for shard in dataset.shards]) for dataset in self._datasets]

    @property
    def multi(self) -> bool:
        """Whether images have any number of labels, and not one each."""
        return self._datasets[0].labelled == MULTI

    @property
    def remote(self) -> bool:
        """Whether shards come out of an object store."""
        return any(self._caches)

    def check_cache(self, streams: int, window: int, limit: int) -> None:
        """Raise `UserError` where a cache of `limit` bytes cannot hold the shards of one window of every stream."""
        shards = [shard for _, shard in self._shards]
        size = sum(shard.bytes for shard in shards)
        need = min(size, streams * (window * size // len(self) + max(shard.bytes for shard in shards)))
        if self.remote and limit < need:
            got = f"{limit / 1e9:g} for {streams} windows of {window} images"
            remedy = "Raise it, or lower data.window or data.streams."
            raise UserError("data.cache_gb", got, f"at least {need / 1e9:.3g}, and room for the coming shards", remedy)

    @property
    def name(self) -> str:
        """Last component of the first folder's path."""
        return self._datasets[0].folder.url.rsplit("/", 1)[-1]

    @property
    def fingerprint(self) -> str:
        """Digest of the samples and their order."""
        prints = [dataset.fingerprint for dataset in self._datasets]
        return prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()

    @cached_property
    def classes(self) -> list[str]:
        """Class names in the order of labels."""
        return list(self._datasets[0].classes)

    def describe(self) -> dict[str, Any]:
        """Path, split, samples and fingerprint, for results."""
        first = self._datasets[0]
        return {
            "path": first.folder.url, "split": first.split, "samples": len(self), "fingerprint": self.fingerprint
        }  # fmt: skip

    def place(self, number: int) -> tuple[int, int]:
        """The number of a sample's shard, and its row there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard - 1] if shard else 0)

    def read(self, number: int) -> Sample:
        """Read one sample, trying `ATTEMPTS` times. Raises `UserError` naming the shard that cannot be read."""
        shard, row = self.place(number)
        if shard in self._broken and time.monotonic() - self._broken[shard][0] < PAUSE:
            raise self._broken[shard][1]
        for attempt in range(ATTEMPTS):
            try:
                return self._read(shard, row)
            except (OSError, pa.ArrowException, IndexError) as error:
                self._forget(shard)  # a network file system may have another file by now
                problem = str(error)
                if isinstance(error, IndexError) or attempt == ATTEMPTS - 1:
                    break
                time.sleep(FIRST_DELAY * 2**attempt)
            except UserError as error:  # of the cache, which has tried often enough
                self._broken[shard] = time.monotonic(), error
                raise
        self._broken[shard] = time.monotonic(), self._unreadable(shard, problem)
        raise self._broken[shard][1]

    def fetch_ahead(self, numbers: np.ndarray) -> None:
        """Have the shards of these samples, the next ones in this order, fetched from their object store."""
        places = np.searchsorted(self._ends, numbers, side="right")
        _, first = np.unique(places, return_index=True)
        coming = [self._shards[place] for place in places[np.sort(first)]]
        for dataset, cache in zip(self._datasets, self._caches, strict=True):
            if cache:
                cache.fetch_ahead([shard for of, shard in coming if of is dataset])

    def close(self) -> None:
        """Close all files, and stop fetching ahead."""
        for cache in self._caches:
            if cache:
                cache.close()
        while self._files:
            os.close(self._files.popitem()[1])

    def _read(self, shard: int, row: int) -> Sample:
        sidecar, file = self._open(shard)
        length = int(sidecar.lengths[row])
        data = os.pread(file, length, int(sidecar.offsets[row]))
        if len(data) != length:
            raise OSError(errno.EIO, f"{len(data)} of {length} bytes of a sample")
        return Sample(data, sidecar.labels_of(row), sidecar.keys[row].decode(), self._shards[shard][1].name)

    def _open(self, shard: int) -> tuple[_Sidecar, int]:
        if shard not in self._sidecars:
            sidecar = self._read_sidecar(shard)
            held = len(sidecar.labels) + sum(len(other.labels) for other in self._sidecars.values())
            while self._sidecars and held > HELD_SAMPLES:
                held -= len(self._sidecars.popitem(last=False)[1].labels)
            self._sidecars[shard] = sidecar
        if shard not in self._files:
            if len(self._files) == OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._open_file(*self._shards[shard])
        self._files.move_to_end(shard)
        self._sidecars.move_to_end(shard)
        return self._sidecars[shard], self._files[shard]

    def _open_file(self, dataset: Dataset, shard: ShardEntry) -> int:
        cache = next(cache for of, cache in zip(self._datasets, self._caches, strict=True) if of is dataset)
        if cache is None:
            return os.open(f"{dataset.folder.url}/{shard.name}", os.O_RDONLY | os.O_CLOEXEC)
        for other, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:  # the cache gave its place to another, which it takes until it is closed
                os.close(self._files.pop(other))
        return cache.open(shard)

    def _read_sidecar(self, shard: int) -> _Sidecar:
        dataset, entry = self._shards[shard]
        if self.multi:
            sidecar = _read_labels(dataset, entry)
        else:
            sidecar = _Sidecar(**vars(read_samples(dataset.folder, entry.name)))
        labels = sidecar.labels if sidecar.values is None else sidecar.values
        known = (labels >= 0) & (labels < len(self.classes))
        placed = (sidecar.offsets >= 0) & (sidecar.lengths >= 0)
        if len(sidecar.labels) != entry.samples or not (known.all() and placed.all()):
            raise IndexError("samples, labels, offsets or lengths that cannot be in its sidecar")
        return replace(sidecar, keys=np.array(sidecar.keys, dtype=np.bytes_))  # a third of the memory of a list

    def _forget(self, shard: int) -> None:
        self._sidecars.pop(shard, None)
        if shard in self._files:
            os.close(self._files.pop(shard))

    def _unreadable(self, shard: int, got: str) -> UserError:
        dataset, entry = self._shards[shard]
        where = f"{dataset.folder.url}/{entry.name}: {got}"
        return UserError(self._setting, where, "a whole shard", "Run `vitscale verify` on it.")

    def __getstate__(self) -> dict[str, Any]:  # descriptors belong to one process
        return {**self.__dict__, "_files": OrderedDict(), "_sidecars": OrderedDict()}


def _read_labels(dataset: Dataset, entry: ShardEntry) -> _Sidecar:
    """The sidecar of a shard of a multi-label set. A sample without a list has no label."""
    table = read_table(dataset.folder, samples_name(entry.name), SAMPLES)
    label, offset, length = (table.column(name).to_numpy() for name in ("label", "offset", "length"))
    lists = table.column("labels").combine_chunks()
    values = pc.call_function("list_flatten", [lists]).fill_null(NO_LABEL)  # one that cannot be
    counts = pc.call_function("list_value_length", [lists]).fill_null(0).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return _Sidecar(table.column("key").to_pylist(), label, offset, length, values.to_numpy(), starts)


def _cache(dataset: Dataset, settings: CacheSettings | None, setting: str) -> ShardCache | None:
    if isinstance(dataset.folder, LocalFolder):
        return None
    if settings is None:
        got = f"{dataset.folder.url} without data.cache"
        raise UserError(setting, got, "a folder for its shards on a local disk", "Add data.cache=/local/disk/FOLDER.")
    return ShardCache(dataset.folder, settings.folder, settings.limit)


def check_classes(setting: str, got: list[str], other: str, expected: list[str]) -> None:
    """Raise `UserError` unless a dataset has exactly the classes of `other`, in the same order."""
    if got != expected:
        differing = sorted(set(got) ^ set(expected))
        names = ", ".join(repr(name) for name in differing[:4]) or "the same names in another order"
        raise UserError(
            setting,
            f"{len(got)} classes that differ ({names})",
            f"the {len(expected)} classes of {other}",
            "Use a dataset of the same classes, or fine-tune on this one.",
        )


def check_images(store: Store, setting: str) -> None:
    """Raise `UserError`, naming `setting`, for a dataset without images."""
    if not sum(int(sizes.sum()) for sizes in store.sizes):
        raise UserError(setting, "a dataset without images", "at least one image", "Shard a source that has some.")
