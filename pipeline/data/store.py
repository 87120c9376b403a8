"""Random access to the samples of a dataset: bytes by sample number, read by offset from its tars."""

import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vitscale.data_prep.manifest import ShardSamples, read_dataset, read_samples
from vitscale.data_prep.storage import LocalFolder
from vitscale.errors import UserError

OPEN_FILES = 256  # in each process; soft limits of 1,024 are common


@dataclass(frozen=True)
class Sample:
    """One record's encoded image, its label, its key, and the tar that it came from."""

    data: bytes
    label: int
    key: str
    shard: str


class Store:
    """The samples 0 … len - 1 of a folder that `vitscale shard` wrote, in the order of its shards.

    Files and sidecars are opened when first read, in each process anew; the last `OPEN_FILES` tars stay open, and
    sidecars stay in memory (about 50 bytes a sample). Raises `UserError` naming `setting` for a
    folder that is missing, incomplete or damaged.
    """

    def __init__(self, path: str, setting: str) -> None:
        self._dataset, self._setting = read_dataset(path, setting), setting
        if not isinstance(self._dataset.folder, LocalFolder):
            raise UserError(setting, path, "a folder of a local or network file system", "Copy the dataset there.")
        if self._dataset.labelled != "class":
            got = f"{path}, whose labels are of the kind {self._dataset.labelled}"
            raise UserError(setting, got, "a dataset with one class label an image", "Shard a source that has them.")
        self._folder = self._dataset.folder
        self._ends = np.cumsum([shard.samples for shard in self._dataset.shards])
        self._files: OrderedDict[int, int] = OrderedDict()  # shard → descriptor, the last used at the end
        self._sidecars: dict[int, ShardSamples] = {}

    def __len__(self) -> int:
        return self._dataset.samples

    @property
    def path(self) -> Path:
        """The dataset's folder."""
        return self._folder.path

    @property
    def fingerprint(self) -> str:
        """Digest of the samples and their order."""
        return self._dataset.fingerprint

    @cached_property
    def classes(self) -> list[str]:
        """Class names in the order of labels."""
        return list(self._dataset.classes)

    def describe(self) -> dict[str, Any]:
        """Path, split, samples and fingerprint, for results."""
        return {
            "path": str(self.path), "split": self._dataset.split, "samples": len(self), "fingerprint": self.fingerprint
        }  # fmt: skip

    def read(self, number: int) -> Sample:
        """Read one sample. Raises `UserError` naming the shard if it has changed or cannot be read."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        row = number - int(self._ends[shard - 1]) if shard else number
        name = self._dataset.shards[shard].name
        try:
            sidecar, file = self._open(shard)
            length = int(sidecar.lengths[row])
            data = os.pread(file, length, int(sidecar.offsets[row]))
        except (OSError, pa.ArrowException, IndexError) as error:
            raise self._unreadable(name, str(error)) from error
        if len(data) != length:
            raise self._unreadable(name, f"{len(data)} of {length} bytes of a sample")
        return Sample(data, int(sidecar.labels[row]), sidecar.keys[row].decode(), name)

    def _open(self, shard: int) -> tuple[ShardSamples, int]:
        name = self._dataset.shards[shard].name
        if shard not in self._sidecars:
            self._sidecars[shard] = self._read_sidecar(name)
        if shard not in self._files:
            if len(self._files) == OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._sidecars[shard], self._files[shard]

    def _read_sidecar(self, name: str) -> ShardSamples:
        samples = read_samples(self._folder, name)
        fits = (samples.labels >= 0) & (samples.labels < len(self.classes)) & (samples.lengths >= 0)
        if not (fits & (samples.offsets >= 0)).all():
            raise self._unreadable(name, "labels, offsets or lengths that cannot be in its sidecar")
        return replace(samples, keys=np.array(samples.keys, dtype=np.bytes_))  # a third of the memory of a list

    def _unreadable(self, name: str, got: str) -> UserError:
        return UserError(self._setting, f"{self.path / name}: {got}", "a whole shard", "Run `vitscale verify` on it.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_sidecars": {}}  # descriptors belong to one process
