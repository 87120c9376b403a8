"""Third stage: which sample goes where. Pure functions of the content of the images and the seed.

`work/plan/NNNN.parquet` holds the kept records of one bucket of rank (`NAMED`), in the order of the shards. How many
are in the buckets before it (`Layout`) tells where its first sample goes, so that no process sorts them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.dedup import COUNTS, NAMED, BucketTask
from vitscale.data_prep.exchange import gather
from vitscale.data_prep.manifest import read_table
from vitscale.data_prep.storage import Folder

ROWS = 16_384  # in a row group of a plan, which a shard reads whole where it needs one of them


@dataclass(frozen=True)
class Layout:
    """Cuts of the shuffled samples, each from 0 to their number: into `buckets`, and into `shards`."""

    buckets: tuple[int, ...]
    shards: tuple[int, ...]


def plan(task: BucketTask) -> None:
    """Write one bucket of rank in its order."""
    names = [f"named/{number:04d}.arrow" for number in range(task.buckets)]
    table = gather(task.work, names, task.number, NAMED)
    table = table.sort_by([("rank", "ascending"), ("key", "ascending")])
    with task.work.publish(f"plan/{task.number:04d}.parquet") as file:
        pq.write_table(table, file, compression="zstd", row_group_size=ROWS)


def layout(work: Folder, buckets: int, shard_samples: int, shard_bytes: int) -> Layout:
    """The cuts, from what all tasks of `dedup` counted. `shard_bytes` 0: shards of at most `shard_samples`."""
    tables = [read_table(work, f"dedup/{number:04d}.parquet", COUNTS) for number in range(buckets)]
    samples = sum(table["samples"].to_numpy() for table in tables)
    total = int(np.sum(samples))
    size = sum(int(np.sum(table["bytes"].to_numpy())) for table in tables)
    count = -(-size // shard_bytes) if shard_bytes else -(-total // shard_samples)
    ends = np.cumsum(samples)
    return Layout((0, *ends.tolist()), tuple(cut(total, min(count, total))))


def cut(samples: int, shards: int) -> list[int]:
    """Cuts, from 0 to `samples`, of as many parts; their lengths are equal or one apart."""
    return [shard * samples // shards for shard in range(shards + 1)] if shards else [0]


def planned(work: Folder, cuts: Sequence[int], start: int, stop: int) -> pa.Table:
    """Rows of `NAMED` of the samples from `start` to `stop`, in order; `cuts` are those of the buckets."""
    tables = [NAMED.empty_table()]
    for number, (low, high) in enumerate(pairwise(cuts)):
        if low >= stop or high <= start or low == high:
            continue
        with work.open_arrow(f"plan/{number:04d}.parquet") as file, pq.ParquetFile(file) as parquet:
            first, last = max(start - low, 0), min(stop, high) - low
            groups = range(first // ROWS, -(-last // ROWS))
            rows = parquet.read_row_groups(list(groups), use_threads=False).cast(NAMED)
            tables.append(rows.slice(first - groups.start * ROWS, last - first))
    return pa.concat_tables(tables).combine_chunks()
