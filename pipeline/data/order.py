"""Which samples make up a global batch: pure functions of (shard sizes, seed, streams, window, global batch, step).

No I/O and no state: the position in the data is one integer, the step. Resume is arithmetic, any number of ranks sees
the same global batch, and the shards that come next are known in advance.

An epoch permutes the shards, strings their samples together from a random place on, round to where it began, and deals
this sequence to streams of equal length, each a run of whole shards but for its ends. A stream is shuffled within
windows, and row i of the epoch is the next sample of stream i mod S. So about S windows are in use at a time, whatever
the size of the data: that bounds what a cache has to hold. A window as long as a stream shuffles all of it.

Random bits come from Philox counters (Salmon et al. 2011), whose raw output numpy keeps the same between versions,
unlike the methods of its Generator, and from SplitMix64 (Steele et al. 2014), which is arithmetic.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VERSION = 2  # of the order: a run goes on in the one that it began with
SHUFFLE = 0  # second word of the Philox key: streams that never meet
ROUNDS = 8  # of the permutation of a window
WHOLE = 2**40  # weights of a mixture are counted in parts of this

Numbers = NDArray[np.int64]
Words = NDArray[np.uint64]


def random_words(seed: int, stream: int, counter: tuple[int, int], count: int) -> Words:
    """`count` words of 64 random bits for (seed, stream, counter). Seed and counters are below 2**64."""
    philox = np.random.Philox(key=[seed, stream], counter=[0, 0, *counter])  # the first two count the words drawn
    return philox.random_raw(count)


def mixed(words: Words) -> Words:
    """Each word scrambled so that every bit depends on all of its bits: the finaliser of SplitMix64, a bijection."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(index: Numbers, size: Numbers, tweak: Words, keys: Words) -> Numbers:
    """Where `index` goes in a random permutation of 0 … `size` - 1, row by row, without making the others.

    Each `tweak` is another permutation. A Feistel network over two digits, of radix ⌈√size⌉ and what is left, to which
    rounds add in turn a hash of the other one (Black and Rogaway 2002); what leads out of the range goes round again.
    """
    first = np.ceil(np.sqrt(size)).astype(np.uint64)
    second = (size.astype(np.uint64) + first - np.uint64(1)) // first
    value = index.astype(np.uint64)
    rows = np.arange(len(value))
    while len(rows):
        radix, other, salt = first[rows], second[rows], tweak[rows]
        high, low = np.divmod(value[rows], radix)
        for key in keys.reshape(-1, 2):
            low += (mixed((high + salt) ^ key[0]) >> np.uint64(32)) * radix >> np.uint64(32)
            low -= np.where(low >= radix, radix, np.uint64(0))
            high += (mixed((low + salt) ^ key[1]) >> np.uint64(32)) * other >> np.uint64(32)
            high -= np.where(high >= other, other, np.uint64(0))
        value[rows] = high * radix + low
        rows = rows[value[rows] >= size[rows].astype(np.uint64)]
    return value.astype(np.int64)


class Epochs:
    """The order of one dataset, epoch after epoch: numbers of `used` of its samples, each at most once an epoch.

    `sizes` are the samples of its shards; sample numbers count through them in turn.
    """

    def __init__(self, sizes: Numbers, seed: int, streams: int, window: int, used: int, number: int = 0) -> None:
        self._sizes, self._starts = np.asarray(sizes, np.int64), np.cumsum(sizes) - sizes
        self.samples, self.used = int(np.sum(sizes)), used
        self._seed, self._streams, self._window, self._number = seed, min(streams, used), window, number
        self._epochs: dict[int, tuple[Numbers, Numbers, int, Words]] = {}  # the last two: a cache, no state

    def at(self, epoch: int, rows: Numbers) -> Numbers:
        """Numbers of the samples at these rows, from 0 to `used` - 1, of an epoch."""
        shards, ends, begin, keys = self._epoch(epoch)
        row, stream = np.divmod(rows, self._streams)
        shorter, longer = divmod(self.used, self._streams)
        length = shorter + (stream < longer)
        start = stream * shorter + np.minimum(stream, longer)
        window, within = np.divmod(row, self._window)
        base = window * self._window
        tweak = mixed(stream.astype(np.uint64) << np.uint64(40) ^ window.astype(np.uint64))
        within = permuted(within, np.minimum(self._window, length - base), tweak, keys)
        place = (begin + start + base + within) % self.samples
        shard = np.searchsorted(ends, place, side="right")
        return self._starts[shards[shard]] + place - (ends[shard] - self._sizes[shards[shard]])

    def _epoch(self, epoch: int) -> tuple[Numbers, Numbers, int, Words]:
        """Shards in their order, where each ends, where the sequence begins, and keys of the windows."""
        if epoch not in self._epochs:
            words = random_words(self._seed, SHUFFLE, (epoch, self._number), len(self._sizes) + 1 + ROUNDS)
            shards = np.argsort(words[: len(self._sizes)], kind="stable")
            begin = int(words[len(self._sizes)] % np.uint64(self.samples))
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = shards, np.cumsum(self._sizes[shards]), begin, words[-ROUNDS:]
        return self._epochs[epoch]


class Order:
    """Global batches of one dataset, or of several mixed in fixed shares.

    `sets` holds for each dataset the samples of its shards; sample numbers count through the datasets in turn. With
    one dataset an epoch takes each sample at most once: the last N mod G of its order are left out, other ones each
    epoch. Several are each gone through on their own, again and again, in the shares `weights`: of every batch each
    takes its share, rounded so that the rounding never adds up to a whole sample over any number of batches.

    Raises `ValueError` where a global batch is larger than the data, or a share less than one sample of it.
    """

    def __init__(
        self, sets: Sequence[Numbers], weights: Sequence[float], *, seed: int, streams: int, window: int, size: int
    ) -> None:
        self.samples, self.size, self._seed = sum(int(np.sum(sizes)) for sizes in sets), size, seed
        if not 0 < size <= self.samples:
            raise ValueError(f"a global batch of {size} cannot be drawn from {self.samples} samples")
        self._cuts = [round(WHOLE * sum(weights[:n]) / sum(weights)) for n in range(len(sets) + 1)]
        if len(sets) > 1 and min(np.diff(self._cuts)) * size < WHOLE - 2 * size:  # but for rounding
            raise ValueError(f"the least share, {min(weights)} of {sum(weights)}, is no sample of a batch of {size}")
        totals = [int(np.sum(sizes)) for sizes in sets]
        used = [totals[0] // size * size] if len(sets) == 1 else totals
        self._sets = [Epochs(s, seed, streams, window, u, n) for n, (s, u) in enumerate(zip(sets, used, strict=True))]
        self._offsets = np.cumsum([0, *totals])

    @property
    def steps(self) -> int:
        """Steps of an epoch; of several datasets, as many as their samples together make."""
        return self.samples // self.size

    def batch(self, step: int) -> tuple[Numbers, Numbers]:
        """Numbers of the samples of optimizer step `step`, and the epoch of each: int64 (G,)."""
        if len(self._sets) == 1:
            epoch, batch = divmod(step, self.steps)
            rows = np.arange(batch * self.size, (batch + 1) * self.size)
            return self._sets[0].at(epoch, rows), np.full(self.size, epoch)
        numbers, epochs = [], []
        for order, offset, low, high in zip(self._sets, self._offsets, self._cuts, self._cuts[1:], strict=False):
            first, stop = (self._taken(low, high, end) for end in (step, step + 1))
            for epoch in range(first // order.used, -(-stop // order.used)):
                start, end = max(first, epoch * order.used), min(stop, (epoch + 1) * order.used)
                numbers.append(offset + order.at(epoch, np.arange(start, end) - epoch * order.used))
                epochs.append(np.full(end - start, epoch))
        keys = random_words(self._seed, SHUFFLE, (step, len(self._sets)), ROUNDS)  # a rank gets some of each
        sizes, tweak = np.full(self.size, self.size), np.zeros(self.size, np.uint64)
        rows = permuted(np.arange(self.size), sizes, tweak, keys)
        return np.concatenate(numbers)[rows], np.concatenate(epochs)[rows]

    def _taken(self, low: int, high: int, steps: int) -> int:
        """Samples that so many steps take of a dataset, whose share lies between these cuts."""
        return high * self.size * steps // WHOLE - low * self.size * steps // WHOLE


def rank_rows(size: int, rank: int, world: int, unit: int = 1) -> tuple[int, int]:
    """First and last (excluded) row that `rank` takes of a global batch of `size` rows: ⌊rG/W⌋ to ⌊(r+1)G/W⌋.

    With `unit` 2, rows 2i and 2i + 1 stay together.
    """
    units = -(-size // unit)
    return min(size, rank * units // world * unit), min(size, (rank + 1) * units // world * unit)


def accumulation(size: int, world: int, micro_batch: int, unit: int = 1) -> int:
    """Micro batches that every rank runs for a global batch of `size` rows, short and empty ones included."""
    most_units = math.ceil(math.ceil(size / unit) / world)
    return math.ceil(most_units / (micro_batch // unit))


def micro_batch_size(size: int, world: int, most: int, unit: int = 1) -> int:
    """The smallest micro batch, of whole units, that needs no more of them than `most` rows would: the least padding.

    64 rows at most for 65 rows a rank are two of 33, not 64 and one of padding.
    """
    units = math.ceil(math.ceil(size / unit) / world)
    return math.ceil(units / accumulation(size, world, most, unit)) * unit


def micro_batches(rows: Numbers, rank: int, world: int, micro_batch: int, unit: int = 1) -> list[Numbers]:
    """The rows of one rank cut into `accumulation(…)` micro batches, as many on every rank; some may be short."""
    low, high = rank_rows(len(rows), rank, world, unit)
    count = accumulation(len(rows), world, micro_batch, unit)
    return [rows[low:high][i * micro_batch : (i + 1) * micro_batch] for i in range(count)]
