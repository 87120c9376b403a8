"""The order of samples: exact, the same for any number of ranks, and the same in every version of numpy."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.pipeline.data.order import (
    accumulation,
    epoch_permutation,
    global_batch,
    micro_batch_size,
    micro_batches,
    rank_rows,
)

SIZES = st.integers(1, 400)
GOLDEN_HEAD = [8206, 4435, 1069, 9157, 3271, 3651, 3922, 7783]
GOLDEN_DIGEST = "ce484acffe8012bb52ba8414c3dcfbed924070a99c63d27a35b2e03280c015af"


def test_golden_order() -> None:
    """Digests from numpy 2.4: a run must see the same data after an upgrade."""
    order = np.concatenate([epoch_permutation(10_000, 7, epoch) for epoch in range(3)])
    assert order[:8].tolist() == GOLDEN_HEAD
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == GOLDEN_DIGEST


@given(samples=SIZES, seed=st.integers(0, 2**63), size=SIZES, epoch=st.integers(0, 5))
def test_an_epoch_takes_every_sample_once_but_the_remainder(samples: int, seed: int, size: int, epoch: int) -> None:
    size = min(size, samples)
    per_epoch = samples // size
    batches = [global_batch(samples, seed, size, epoch * per_epoch + i) for i in range(per_epoch)]
    assert {of for of, _ in batches} == {epoch}
    taken = np.concatenate([numbers for _, numbers in batches])
    assert len(taken) == per_epoch * size
    assert len(np.unique(taken)) == len(taken)
    assert taken.min() >= 0
    assert taken.max() < samples


@given(size=SIZES, world=st.integers(1, 64), micro=st.integers(1, 50))
def test_ranks_share_a_global_batch_without_gaps(size: int, world: int, micro: int) -> None:
    rows = np.arange(size)
    cuts = [micro_batches(rows, rank, world, micro) for rank in range(world)]
    assert {len(cut) for cut in cuts} == {accumulation(size, world, micro)}
    assert all(len(part) <= micro for cut in cuts for part in cut)
    assert np.concatenate([part for cut in cuts for part in cut]).tolist() == rows.tolist()
    assert [rank_rows(size, rank, world)[0] for rank in range(world)] == [rank * size // world for rank in range(world)]


@given(size=SIZES, world=st.integers(1, 64), most=st.integers(1, 50))
def test_micro_batches_are_as_small_as_their_number_allows(size: int, world: int, most: int) -> None:
    smallest = micro_batch_size(size, world, most)
    assert smallest <= most
    assert accumulation(size, world, smallest) == accumulation(size, world, most)
    assert smallest == 1 or accumulation(size, world, smallest - 1) > accumulation(size, world, most)


def test_epochs_differ_and_leave_out_other_samples() -> None:
    left_out = []
    for epoch in range(20):
        taken = np.concatenate([global_batch(103, 1, 10, epoch * 10 + i)[1] for i in range(10)])
        left_out.append(tuple(sorted(set(range(103)) - set(taken.tolist()))))
    assert all(len(left) == 3 for left in left_out)
    assert len(set(left_out)) == 20


@pytest.mark.parametrize("epoch", [0, 1, 12])
def test_order_is_uncorrelated_with_source_and_next_epoch(epoch: int) -> None:
    """Rank correlations of 20,000 samples are within 4 standard errors (1/√n) of 0."""
    samples = 20_000
    now, then = (epoch_permutation(samples, 3, e).astype(float) for e in (epoch, epoch + 1))
    bound = 4 / np.sqrt(samples)
    assert abs(np.corrcoef(now, np.arange(samples))[0, 1]) < bound
    assert abs(np.corrcoef(now, then)[0, 1]) < bound
    assert abs(np.corrcoef(now[:-1], now[1:])[0, 1]) < bound


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        global_batch(10, 0, 11, 0)
