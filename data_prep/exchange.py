"""Rows on their way from the tasks that make them to the tasks that need them.

Each task of a stage writes its rows to one Arrow file, a record batch for each bucket; a task of the next stage reads
its bucket out of all of these. So every row meets the rows it must be compared or sorted with, and no process holds
more than one file's rows or one bucket's.
"""

from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from vitscale.data_prep.storage import Folder


def bucket_of(digests: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of uniformly distributed digests, uint8 (rows, bytes ≥ 4): the higher the digest the higher it is."""
    high = np.ascontiguousarray(digests[:, :4]).view(">u4")[:, 0].astype(np.uint64)
    return (high * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def scatter(file: BinaryIO, parts: Iterable[tuple[pa.Table, np.ndarray]], buckets: int, schema: pa.Schema) -> None:
    """Write tables with the bucket of each row; within a bucket rows keep their order, table after table.

    Each table of `parts` makes its own `buckets` batches, and `gather` names it by its number.
    """
    writer = None
    for table, bucket in parts:
        order = np.argsort(bucket, kind="stable")
        counts = np.bincount(bucket, minlength=buckets)
        if writer is None:
            writer = pa.ipc.new_file(file, schema)
        rows = table.take(pa.array(order)).combine_chunks()
        for start, count in zip(np.cumsum(counts) - counts, counts, strict=True):
            batches = rows.slice(start, count).to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema))
    assert writer is not None, "no table to scatter"
    writer.close()


def gather(folder: Folder, names: Sequence[str], batch: int, schema: pa.Schema) -> pa.Table:
    """Rows of one bucket out of all files, in the order of the files; `batch` is table × buckets + bucket."""
    batches = []
    for name in names:
        with folder.open_arrow(name) as file, pa.ipc.open_file(file) as reader:
            batches.append(reader.get_batch(batch))
    return pa.Table.from_batches(batches, schema).combine_chunks()
