"""Which samples make up a global batch: pure functions of (samples, seed, global batch, step). No I/O, no state.

The position in the data is one integer, the step: resume is arithmetic, and any number of ranks sees the same
global batch. Random bits come straight from Philox counters (Salmon et al. 2011), whose raw output numpy keeps
the same between versions, unlike the methods of its Generator.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SHUFFLE, AUGMENT = 0, 1  # second word of the Philox key: streams that never meet


def random_words(seed: int, stream: int, counter: tuple[int, int], count: int) -> NDArray[np.uint64]:
    """`count` words of 64 random bits for (seed, stream, counter). Seed and counters are below 2**64."""
    philox = np.random.Philox(key=[seed, stream], counter=[0, 0, *counter])  # the first two count the words drawn
    return philox.random_raw(count)


@lru_cache(maxsize=2)
def epoch_permutation(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All sample numbers 0 … `samples` - 1, each once, in the order of this epoch. Read-only."""
    order = np.argsort(random_words(seed, SHUFFLE, (epoch, 0), samples), kind="stable")
    order.flags.writeable = False
    return order


def global_batch(samples: int, seed: int, size: int, step: int) -> tuple[int, NDArray[np.int64]]:
    """Epoch and sample numbers (`size` of them) of optimizer step `step`.

    Within an epoch no sample occurs twice; the last `samples` mod `size` of its order are left out, other ones each
    epoch. Raises `ValueError` if a batch is larger than the data.
    """
    if not 0 < size <= samples:
        raise ValueError(f"a global batch of {size} cannot be drawn from {samples} samples without repeating some")
    epoch, batch = divmod(step, samples // size)
    return epoch, epoch_permutation(samples, seed, epoch)[batch * size : (batch + 1) * size]


def rank_rows(size: int, rank: int, world: int) -> tuple[int, int]:
    """First and last (excluded) row that `rank` takes of a global batch of `size` rows: ⌊rG/W⌋ to ⌊(r+1)G/W⌋."""
    return rank * size // world, (rank + 1) * size // world


def accumulation(size: int, world: int, micro_batch: int) -> int:
    """Micro batches that every rank runs for a global batch of `size` rows, short and empty ones included."""
    most_rows = -(-size // world)
    return -(-most_rows // micro_batch)


def micro_batch_size(size: int, world: int, most: int) -> int:
    """The smallest micro batch that needs no more of them than `most` rows would: the least padding.

    64 rows at most for 65 rows a rank are two of 33, not 64 and one of padding.
    """
    return math.ceil(math.ceil(size / world) / accumulation(size, world, most))


def micro_batches(rows: NDArray[np.int64], rank: int, world: int, micro_batch: int) -> list[NDArray[np.int64]]:
    """The rows of one rank cut into `accumulation(…)` micro batches, as many on every rank; some may be short."""
    low, high = rank_rows(len(rows), rank, world)
    count = accumulation(len(rows), world, micro_batch)
    return [rows[low:high][i * micro_batch : (i + 1) * micro_batch] for i in range(count)]
