"""Which sample goes where: pure functions of the content of the images and the seed."""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

KEY_DIGITS = 24  # of a SHA-256 in hexadecimal: 96 bits, so that even 10⁹ images collide with probability 10⁻¹¹


def assign_keys(hashes: Sequence[str]) -> list[str]:
    """Return a unique key for each content hash: its first digits, with -1, -2, … for further copies in order."""
    copies: Counter[str] = Counter()
    keys = []
    for content in hashes:
        base = content[:KEY_DIGITS]
        keys.append(f"{base}-{copies[base]}" if copies[base] else base)
        copies[base] += 1
    return keys


def shuffled(keys: Sequence[str], seed: int) -> list[int]:
    """Return the positions of the keys in the order of blake2b(seed ‖ key): random, yet free of their given order."""
    prefix = seed.to_bytes(8, "little")
    ranks = [blake2b(prefix + key.encode(), digest_size=16).digest() for key in keys]
    return sorted(range(len(keys)), key=ranks.__getitem__)


def cut(samples: int, shard_samples: int) -> list[tuple[int, int]]:
    """Cut `samples` into the fewest (start, end) of at most `shard_samples`, their lengths equal or one apart."""
    shards = -(-samples // shard_samples)
    return [(shard * samples // shards, (shard + 1) * samples // shards) for shard in range(shards)]
