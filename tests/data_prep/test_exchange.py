"""Rows on their way between tasks: each arrives once, in its bucket, in its order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data_prep.exchange import bucket_of, gather, scatter
from vitscale.data_prep.storage import LocalFolder

SCHEMA = pa.schema([("file", pa.int32()), ("row", pa.int32()), ("text", pa.string()), ("many", pa.list_(pa.int32()))])


def table_of(file: int, rows: range) -> pa.Table:
    """Rows that name themselves, with texts and lists of varied length, and nulls."""
    texts = [None if row % 5 == 0 else "é" * (row % 4) for row in rows]
    many = [None if row % 3 == 0 else list(range(row % 4)) for row in rows]
    return pa.table([[file] * len(rows), list(rows), texts, many], schema=SCHEMA)


def scattered(folder: Path, name: str, parts: list[tuple[pa.Table, np.ndarray]], buckets: int) -> None:
    with LocalFolder(str(folder)).publish(name) as file:
        scatter(file, iter(parts), buckets, SCHEMA)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 9), st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=2), max_size=4))
def test_every_row_arrives_once_in_its_bucket_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, buckets: int, files: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    expected: dict[int, list[dict]] = {batch: [] for batch in range(2 * buckets)}
    names = [f"{file}.arrow" for file in range(len(files))]
    for file, lengths in enumerate(files):
        parts, first = [], 0
        for table_number, length in enumerate(lengths):
            table = table_of(file, range(first, first + length))
            bucket = data.draw(st.lists(st.integers(0, buckets - 1), min_size=length, max_size=length))
            for row, at in zip(table.to_pylist(), bucket, strict=True):
                expected[table_number * buckets + at].append(row)
            sliced = pa.concat_tables([table.slice(0, length // 2), table.slice(length // 2)])  # of several chunks
            parts.append((sliced, np.array(bucket, np.int64)))
            first += length
        scattered(folder, names[file], parts, buckets)
    for batch, rows in expected.items():
        found = gather(LocalFolder(str(folder)), names, batch, SCHEMA)
        assert found.schema == SCHEMA
        assert found.to_pylist() == rows


def test_empty_tables_make_empty_buckets(tmp_path: Path) -> None:
    scattered(tmp_path, "a", [(SCHEMA.empty_table(), np.zeros(0, np.int64))], 3)
    for batch in range(3):
        found = gather(LocalFolder(str(tmp_path)), ["a", "a"], batch, SCHEMA)
        assert (found.schema, len(found)) == (SCHEMA, 0)


def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    scattered(tmp_path, "a", [(table_of(0, range(20)), np.arange(20) % 4)], 4)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(pa.ArrowException):
        gather(LocalFolder(str(tmp_path)), ["a"], 0, SCHEMA)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=4, max_size=4)), st.integers(1, 4096))
def test_buckets_are_in_the_order_of_digests(prefixes: list[bytes], buckets: int) -> None:
    digests = [prefix + bytes(28) for prefix in [bytes(4), *prefixes, b"\xff" * 4]]
    rows = np.frombuffer(b"".join(sorted(digests)), np.uint8).reshape(-1, 32)
    found = bucket_of(rows, buckets)
    assert (found[0], found[-1]) == (0, buckets - 1)
    assert (np.diff(found) >= 0).all()


def test_buckets_are_of_equal_size() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (100_000, 16), np.uint8)
    counts = np.bincount(bucket_of(digests, 10), minlength=10)
    assert np.abs(counts - 10_000).max() < 5 * 10_000**0.5  # five deviations of a Poisson count
