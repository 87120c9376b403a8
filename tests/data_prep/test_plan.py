"""Keys, order and cuts, as properties."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data_prep.plan import assign_keys, cut, shuffled


def test_keys_are_content_hashes_and_copies_are_numbered() -> None:
    one, other = "a" * 64, "b" * 64
    assert assign_keys([one, other, one, one]) == ["a" * 24, "b" * 24, "a" * 24 + "-1", "a" * 24 + "-2"]


@settings(deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 10**4))
def test_cut_covers_all_in_equal_parts(samples: int, shard_samples: int) -> None:
    parts = cut(samples, shard_samples)
    lengths = {end - start for start, end in parts}
    assert len(parts) == -(-samples // shard_samples)
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= shard_samples
    assert [parts[0][0], *(end for _, end in parts)] == [*(start for start, _ in parts), samples]


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
