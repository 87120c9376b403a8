"""The order of samples: exact, the same for any number of ranks, and the same in every version of numpy."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vitscale.pipeline.data.order import (
    Order,
    accumulation,
    micro_batch_size,
    micro_batches,
    mixed,
    permuted,
    random_words,
    rank_rows,
)

SIZES = st.integers(1, 400)
GOLDEN_HEAD = [475, 4682, 6891, 7119, 425, 4702, 6884, 7135]
GOLDEN_DIGEST = "6ace8eb148a6adefa4e8870b9780c47704d8f0774241baec14f1b01210e429b3"


def order_of(sizes: list[int], size: int, seed: int = 0, streams: int = 16, window: int = 16384) -> Order:
    return Order([np.array(sizes)], [1], seed=seed, streams=streams, window=window, size=size)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """Sample numbers of a whole epoch."""
    batches = [order.batch(epoch * order.steps + step) for step in range(order.steps)]
    assert {int(of) for _, epochs in batches for of in epochs} == {epoch}
    return np.concatenate([numbers for numbers, _ in batches])


def test_golden_order() -> None:
    """Digests from numpy 2.4: a run must see the same data after an upgrade."""
    single = order_of([1000] * 9 + [37], 100, seed=7, streams=4, window=128)
    mixture = Order([np.full(5, 90), np.full(2, 70)], [3, 1], seed=7, streams=4, window=32, size=50)
    orders = [single.batch(step) for step in (0, 1, 89, 90, 1_000_000)] + [mixture.batch(s) for s in (0, 8, 9, 12_345)]
    numbers = np.concatenate([part for batch in orders for part in batch])
    assert numbers[:8].tolist() == GOLDEN_HEAD
    assert hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest() == GOLDEN_DIGEST


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    seed=st.integers(0, 2**63),
    size=SIZES,
    epoch=st.integers(0, 5),
    streams=st.integers(1, 40),
    window=st.integers(1, 100),
)
def test_an_epoch_takes_every_sample_once_but_the_remainder(
    sizes: list[int], seed: int, size: int, epoch: int, streams: int, window: int
) -> None:
    samples = sum(sizes)
    size = min(size, samples)
    taken = epoch_of(order_of(sizes, size, seed, streams, window), epoch)
    assert len(taken) == samples // size * size
    assert len(np.unique(taken)) == len(taken)
    assert taken.min() >= 0
    assert taken.max() < samples


@settings(max_examples=30, deadline=None)
@given(
    sets=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    size=st.integers(90, 200),
    seed=st.integers(0, 2**31),
    begin=st.integers(0, 10**9),
)
def test_a_mixture_keeps_its_shares_and_goes_through_each_set_evenly(
    sets: list[list[int]], weights: list[float], size: int, seed: int, begin: int
) -> None:
    weights = weights[: len(sets)]
    size = min(size, sum(map(sum, sets)))
    assume(min(weights) / sum(weights) * size >= 1)
    order = Order([np.array(s) for s in sets], weights, seed=seed, streams=3, window=20, size=size)
    ends = np.cumsum([sum(s) for s in sets])
    steps = 60
    batches = [order.batch(begin + step) for step in range(steps)]
    assert {len(numbers) for numbers, _ in batches} == {size}
    of = [np.searchsorted(ends, numbers, side="right") for numbers, _ in batches]
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        for batch in of:
            assert abs((batch == number).sum() - share * size) < 2
        assert abs(sum((batch == number).sum() for batch in of) - steps * share * size) < 2
    seen = Counter(zip(np.concatenate([n for n, _ in batches]), np.concatenate([e for _, e in batches]), strict=True))
    assert max(seen.values()) == 1  # no sample twice in one of its epochs


def test_a_thousand_batches_hold_exact_shares() -> None:
    order = Order([np.full(20, 100), np.full(7, 30)], [3, 1], seed=1, streams=4, window=64, size=50)
    for begin in (0, 17, 10**6):
        second = sum(int((order.batch(begin + step)[0] >= 2000).sum()) for step in range(1000))
        assert second == 12_500


@given(size=SIZES, world=st.integers(1, 64), micro=st.integers(2, 50), unit=st.sampled_from([1, 2]))
def test_ranks_share_a_global_batch_without_gaps(size: int, world: int, micro: int, unit: int) -> None:
    rows = np.arange(size)
    micro = micro_batch_size(size, world, micro, unit)
    cuts = [micro_batches(rows, rank, world, micro, unit) for rank in range(world)]
    assert {len(cut) for cut in cuts} == {accumulation(size, world, micro, unit)}
    assert all(len(part) <= micro for cut in cuts for part in cut)
    assert np.concatenate([part for cut in cuts for part in cut]).tolist() == rows.tolist()
    assert all(len(part) == 0 or part[0] % unit == 0 for cut in cuts for part in cut)
    if unit == 1:
        assert [rank_rows(size, r, world)[0] for r in range(world)] == [r * size // world for r in range(world)]


@given(size=SIZES, world=st.integers(1, 64), most=st.integers(2, 50), unit=st.sampled_from([1, 2]))
def test_micro_batches_are_as_small_as_their_number_allows(size: int, world: int, most: int, unit: int) -> None:
    smallest = micro_batch_size(size, world, most, unit)
    assert smallest <= most
    assert smallest % unit == 0
    assert accumulation(size, world, smallest, unit) == accumulation(size, world, most, unit)
    less = smallest - unit
    assert less == 0 or accumulation(size, world, less, unit) > accumulation(size, world, most, unit)


@pytest.mark.parametrize("sizes", [[103], [20, 20, 20, 20, 23]])
def test_epochs_differ_and_leave_out_other_samples(sizes: list[int]) -> None:
    order = order_of(sizes, 10, seed=1)
    left_out = [tuple(sorted(set(range(103)) - set(epoch_of(order, epoch).tolist()))) for epoch in range(20)]
    assert all(len(left) == 3 for left in left_out)
    assert len(set(left_out)) > 15  # of a single shard 103 are possible


@pytest.mark.parametrize(("streams", "window"), [(16, 16384), (16, 256), (64, 1024), (1, 4096)])
@pytest.mark.parametrize("epoch", [0, 1, 12])
def test_order_is_uncorrelated_with_source_and_next_epoch(streams: int, window: int, epoch: int) -> None:
    """Rank correlations of 20,000 samples in 200 shards against 0.

    Of samples they are within 4 standard errors, 1/√n, for n samples; where windows keep neighbours together, n is the
    number of shards. Steps from one sample to the next are a third of the whole on average, as in a permutation.
    """
    order = order_of([100] * 200, 100, 3, streams, window)
    now, then = (np.argsort(epoch_of(order, e)).astype(float) for e in (epoch, epoch + 1))
    whole = window * streams >= 20_000
    bound = 4 / np.sqrt(20_000 if whole else 200)
    assert abs(np.corrcoef(now, np.arange(20_000))[0, 1]) < bound
    assert abs(np.corrcoef(now, then)[0, 1]) < bound
    if streams > 1:  # neighbours in the batches come from everywhere; one stream alone has those of a window
        numbers = epoch_of(order, epoch)
        assert np.abs(np.diff(numbers)).mean() == pytest.approx(20_000 / 3, rel=0.1)


def test_neighbours_in_a_shard_are_spread_over_a_stream() -> None:
    """In a true permutation two given samples are a third of the epoch apart on average: so they are here, as windows
    are as long as streams. Standard error: the deviation of the distance, 0.236 n, over √4950 pairs."""
    distances = []
    for epoch in range(4):
        place = np.argsort(epoch_of(order_of([100] * 50, 100, 5), epoch)).reshape(50, 100)
        distances.append(np.abs(np.diff(place, axis=1)))
    mean = np.mean(distances) / 5000
    assert mean == pytest.approx(1 / 3, abs=4 * 0.236 / np.sqrt(4 * 4950))


@given(size=st.integers(1, 3000), tweak=st.integers(0, 2**63))
def test_a_permutation_is_one(size: int, tweak: int) -> None:
    keys = random_words(tweak, 0, (0, 0), 8)
    found = permuted(np.arange(size), np.full(size, size), np.full(size, tweak, np.uint64), keys)
    assert sorted(found.tolist()) == list(range(size))


def test_permutations_of_four_are_all_as_frequent() -> None:
    """Chi squared of 24 kinds among 24 × 400: 23 on average; above 50 in one of a thousand."""
    trials = 24 * 400
    tweak = np.repeat(mixed(np.arange(trials, dtype=np.uint64)), 4)
    index, size = np.tile(np.arange(4), trials), np.full(4 * trials, 4)
    found = permuted(index, size, tweak, random_words(5, 0, (0, 0), 8)).reshape(trials, 4)
    counts = np.array(list(Counter(map(tuple, found.tolist())).values()))
    assert len(counts) == 24
    assert ((counts - 400) ** 2 / 400).sum() < 50


def test_windows_bound_the_shards_in_use() -> None:
    """100 steps of 64 rows take 100 samples further in each of 4 streams: of at most 3 shards each at once."""
    order = order_of([100] * 400, 64, 2, streams=4, window=200)
    for begin in range(0, order.steps - 10, 37):
        numbers = np.concatenate([order.batch(begin + step)[0] for step in range(2)])
        assert len(np.unique(numbers // 100)) <= 4 * 5


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_larger_than_the_data_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        order_of([4, 6], size)


def test_a_share_of_less_than_a_sample_is_refused() -> None:
    sets = [np.array([500]), np.array([500])]
    with pytest.raises(ValueError, match="is no sample of a batch"):
        Order(sets, [1, 0.001], seed=0, streams=1, window=8, size=100)


def test_any_step_comes_at_once_and_alone() -> None:
    """The order of step a million does not depend on what was asked for before."""
    fresh, used = order_of([300] * 7, 128), order_of([300] * 7, 128)
    for step in itertools.chain(range(40), [999_999]):
        used.batch(step)
    assert np.array_equal(fresh.batch(1_000_000)[0], used.batch(1_000_000)[0])
