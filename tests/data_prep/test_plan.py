"""Order and cuts, as properties."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data_prep.dedup import rank
from vitscale.data_prep.plan import cut


def shuffled(keys: list[str], seed: int) -> list[int]:
    """Positions of the keys in the order of their ranks."""
    return sorted(range(len(keys)), key=lambda at: rank(keys[at], seed))


@settings(deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 10**4))
def test_cut_covers_all_in_equal_parts(samples: int, shard_samples: int) -> None:
    shards = -(-samples // shard_samples)
    cuts = cut(samples, shards)
    lengths = {end - start for start, end in pairwise(cuts)}
    assert (cuts[0], cuts[-1], len(cuts)) == (0, samples, shards + 1)
    assert max(lengths) - min(lengths) <= 1
    assert 1 <= max(lengths) <= shard_samples


def test_cut_of_nothing() -> None:
    assert cut(0, 0) == [0]


@settings(deadline=None)
@given(st.sets(st.text("0123456789abcdef", min_size=1), min_size=2), st.integers(0, 2**63 - 1))
def test_order_depends_on_keys_and_seed_alone(keys: set[str], seed: int) -> None:
    forward, backward = sorted(keys), sorted(keys, reverse=True)
    order = shuffled(forward, seed)
    assert sorted(order) == list(range(len(keys)))
    assert [forward[at] for at in order] == [backward[at] for at in shuffled(backward, seed)]


def test_order_of_published_datasets_stays() -> None:
    keys = [f"{number:024x}" for number in range(8)]
    assert shuffled(keys, 0) == [4, 3, 2, 1, 7, 5, 6, 0]
    assert shuffled(keys, 1) == [1, 4, 3, 6, 7, 2, 0, 5]
