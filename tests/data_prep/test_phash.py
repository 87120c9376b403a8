"""Perceptual hashes: which rows are found to be near each other, against comparing all with all."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data_prep import phash


def random_hashes(random: np.random.Generator, rows: int) -> np.ndarray:
    return random.integers(0, 256, (rows, 32), np.uint8)


def flipped(hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The hashes with the bits at `places` (rows, n) turned over."""
    bits = np.unpackbits(hashes, axis=1)
    np.put_along_axis(bits, places, 1 - np.take_along_axis(bits, places, axis=1), axis=1)
    return np.packbits(bits, axis=1)


def differing_bits(one: np.ndarray, other: np.ndarray) -> int:
    return int((np.unpackbits(one) != np.unpackbits(other)).sum())


def first_copies(band: np.ndarray, hashes: np.ndarray, limit: int) -> dict[int, tuple[int, int]]:
    """Of each row near an earlier one of its band: the earliest of these, and the distance. All against all."""
    found = {}
    for later in range(len(band)):
        for earlier in range(later):
            bits = differing_bits(hashes[later], hashes[earlier])
            if band[earlier] == band[later] and bits <= limit:
                found[later] = (earlier, bits)
                break
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(1, 5), st.integers(0, 64), st.integers(0, 20))
def test_near_pairs_are_those_of_comparing_all(seed: int, rows: int, groups: int, limit: int, planted: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random_hashes(random, rows)
    for later in random.integers(0, rows, planted) if rows else []:
        places = random.permutation(256)[: random.integers(0, 2 * limit + 1)]
        hashes[later] = flipped(hashes[random.integers(0, rows)][None], places[None])[0]
    band = np.sort(random.integers(0, groups, rows)).astype(np.uint64)
    last = {}
    for later, earlier, bits in phash.near_pairs(band, hashes, limit):
        for one, other, distance in zip(later.tolist(), earlier.tolist(), bits.tolist(), strict=True):
            assert other < one
            assert band[other] == band[one]
            assert differing_bits(hashes[one], hashes[other]) == distance <= limit
            last[one] = (other, distance)
    assert last == first_copies(band, hashes, limit)


def test_two_thousand_equal_hashes_are_two_thousand_pairs() -> None:
    hashes = np.repeat(random_hashes(np.random.default_rng(0), 1), 2000, axis=0)
    pairs = list(phash.near_pairs(np.zeros(2000, np.uint64), hashes, limit=0))
    later, earlier, bits = (np.concatenate(column) for column in zip(*pairs, strict=True))
    assert later.tolist() == list(range(1, 2000))
    assert set(earlier) == {0}
    assert set(bits) == {0}


def test_in_a_large_group_each_row_is_compared_with_those_just_before() -> None:
    """Two pictures in turn, and both once more at the end: far from the first of the group, near some before them."""
    random = np.random.default_rng(0)
    hashes = random_hashes(random, 3)[[0, *[1, 2] * 500]]
    found: dict[int, int] = {}
    for later, earlier, _ in phash.near_pairs(np.zeros(1001, np.uint64), hashes, limit=16):
        found |= dict(zip(later.tolist(), earlier.tolist(), strict=True))
    assert sorted(found) == list(range(3, 1001))
    assert all((later - earlier) % 2 == 0 and later - earlier <= phash.GROUP for later, earlier in found.items())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(phash.MIN_BAND, 40))
def test_bands_are_bits_of_the_lowest_frequencies(seed: int, rows: int, bits: int) -> None:
    hashes = random_hashes(np.random.default_rng(seed), rows)
    tables = list(phash.bands(hashes, bits))
    assert len(tables) == phash.TABLES
    assert all(band.dtype == np.uint64 and band.shape == (rows,) and (band < 2**bits).all() for band in tables)
    high = [row * 16 + column for row in range(16) for column in range(16) if row + column > 11 or max(row, column) > 9]
    others = flipped(hashes, np.tile([0, *high], (rows, 1)))
    for one, other in zip(tables, phash.bands(others, bits), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bit_of_the_lowest_frequencies_is_in_some_bands_and_not_in_others() -> None:
    hashes = random_hashes(np.random.default_rng(0), 1)
    before = np.concatenate(list(phash.bands(hashes, 14)))
    for place in (1, 16, 17, 34, 9 * 16 + 2):
        after = np.concatenate(list(phash.bands(flipped(hashes, np.array([[place]])), 14)))
        # 14 of 71 bits are in each of 32 bands: a bit is in 6.3 on average, with a deviation of 2.2
        assert 1 <= (before != after).sum() <= 16


@pytest.mark.parametrize(
    ("pictures", "bits"), [(0, 14), (1, 14), (2**18, 14), (2**18 + 1, 15), (10**7, 20), (10**10, 30)]
)
def test_bands_grow_with_the_set(pictures: int, bits: int) -> None:
    assert phash.band_bits(pictures) == bits


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 20))
def test_distance_counts_bits(seed: int, rows: int) -> None:
    one, other = random_hashes(np.random.default_rng(seed), 2 * rows).reshape(2, rows, 32)
    expected = [differing_bits(a, b) for a, b in zip(one, other, strict=True)]
    assert phash.distance(one, other).tolist() == expected


def test_the_hash_is_the_signs_of_low_frequencies() -> None:
    """A picture made of chosen frequencies has the hash of their signs, at its size and at three times that."""
    signs = np.random.default_rng(0).permutation(np.repeat([-1, 1], 128))
    signs[0], signs[np.flatnonzero(signs == 1)[-1]] = 1, signs[0]  # the mean is positive
    frequencies = np.zeros((64, 64), np.float32)
    frequencies[:16, :16] = 100 * signs.reshape(16, 16)
    frequencies[0, 0] = 64 * 128
    grey = np.clip(np.rint(cv2.idct(frequencies)), 0, 255).astype(np.uint8)
    expected = np.packbits(signs > 0).tobytes()
    assert phash.perceptual_hash(grey) == expected
    assert phash.perceptual_hash(np.repeat(np.repeat(grey, 3, axis=0), 3, axis=1)) == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2), (65, 63)])
def test_pictures_of_every_size_have_a_hash(shape: tuple[int, int]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert len(phash.perceptual_hash(grey)) == 32


@given(st.integers(0, 255))
@settings(deadline=None)
def test_plain_pictures_are_near_each_other(value: int) -> None:
    hashed = np.frombuffer(phash.perceptual_hash(np.full((40, 50), value, np.uint8)), np.uint8)
    assert differing_bits(hashed, np.zeros(32, np.uint8)) <= 1


def test_grey_is_the_luma_of_jpeg() -> None:
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    # ITU-R BT.601: 0.299, 0.587, 0.114
    assert phash.grey_of(rgb).tolist() == [[76, 150, 29, 255]]
