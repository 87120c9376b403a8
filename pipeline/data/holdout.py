"""A share of the training images that is not trained on (`data.dev`), always the same ones of a dataset.

Which ones is a pure function of the sizes of its shards, whatever the seed, the ranks and the epoch: every shard gives
its share, the first rows of a permutation of its own. So they are of all classes, as shards are, and nothing is held
for each sample.
"""

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np

from vitscale.errors import UserError
from vitscale.pipeline.data.order import ROUNDS, Numbers, mixed, permuted, random_words
from vitscale.pipeline.data.store import OPEN_FILES, Store

STREAM = 4  # second word of the Philox key, which no order of data uses


def held_out(sizes: Numbers, share: float) -> Numbers:
    """How many samples of each shard are held out: of the first n shards together `share` of theirs, rounded, for any
    n, so that rounding never adds up."""
    return np.diff(np.rint(np.cumsum(sizes) * share).astype(np.int64), prepend=0)


def chosen(shard: int, size: int, count: int) -> Numbers:
    """Which `count` rows of a shard of `size`, the `shard`-th of its dataset, are held out, rising.

    Those of a smaller count are among them.
    """
    tweak = mixed(np.full(count, shard, np.uint64))
    return np.sort(permuted(np.arange(count), np.full(count, size), tweak, random_words(0, STREAM, (0, 0), ROUNDS)))


class Part(Store):
    """What is held out of the samples of `whole` (`held`), or what is left of them, in their order.

    Files, caches and what else is open belong to both parts and to `whole`.
    """

    def __init__(self, whole: Store, share: float, held: bool) -> None:
        vars(self).update(vars(whole))
        self._whole, self._samples = whole.fingerprint, whole.sizes
        self._share, self._held = share, held
        self._counts = [held_out(sizes, share) for sizes in self._samples]
        self._places = np.concatenate([np.arange(len(sizes)) for sizes in self._samples])  # in their datasets
        self._out = np.concatenate(self._counts)
        self._ends = np.cumsum(np.concatenate(self.sizes))
        self._rows: OrderedDict[int, Numbers] = OrderedDict()  # held out, of the shards last used

    @property
    def sizes(self) -> list[Numbers]:
        """Of each dataset, the samples of its shards that are of this part."""
        return self._counts if self._held else [n - k for n, k in zip(self._samples, self._counts, strict=True)]

    @property
    def name(self) -> str:
        """That of the whole, and which part it is."""
        return f"{super().name}-{'dev' if self._held else 'train'}"

    @property
    def fingerprint(self) -> str:
        """Digest of the samples and their order."""
        said = f"{self._whole} {self._share!r} {'held out' if self._held else 'left'}"
        return hashlib.sha256(said.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """As of the whole, and which part it is."""
        part = f"{self._share:.6g} held out" if self._held else f"all but {self._share:.6g}"
        return {**super().describe(), "part": part}

    def place(self, number: int) -> tuple[int, int]:
        """The number of a sample's shard, and its row there."""
        shard, place = super().place(number)
        rows = self._held_rows(shard)
        if self._held:
            return shard, int(rows[place])
        return shard, place + int(np.searchsorted(rows - np.arange(len(rows)), place, side="right"))

    def _held_rows(self, shard: int) -> Numbers:
        """Rows of a shard that are held out, rising."""
        if shard not in self._rows:
            if len(self._rows) == OPEN_FILES:
                self._rows.popitem(last=False)
            size = self._shards[shard][1].samples
            count = int(self._out[shard])
            self._rows[shard] = chosen(int(self._places[shard]), size, count)
        self._rows.move_to_end(shard)
        return self._rows[shard]


def split(whole: Store, share: float) -> tuple[Part, Part]:
    """What is left to train on, and what is held out: `share` of the samples of each dataset, rounded.

    Raises `UserError` (`data.dev`) where nothing is held out, or nothing is left of a dataset.
    """
    left, held = Part(whole, share, held=False), Part(whole, share, held=True)
    got = f"{share:.6g} of {sum(int(sizes.sum()) for sizes in whole.sizes):,} images"
    if not any(sizes.sum() for sizes in held.sizes):
        raise UserError("data.dev", got, "at least one image", "Raise it.")
    if not all(sizes.sum() for sizes in left.sizes):
        raise UserError("data.dev", got, "some images of each dataset to train on", "Lower it.")
    return left, held
