"""Deduplicating, naming and shuffling of synthetic records: time and memory, at one million and at ten.

    python benchmarks/planning.py [--millions 1 10] [--out FILE.json]

Writes what `scan` would leave for so many images of a local folder, then runs the stages dedup and plan in one process.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from vitscale.data_prep.config import DedupConfig
from vitscale.data_prep.dedup import BucketTask, dedup
from vitscale.data_prep.plan import layout, plan
from vitscale.data_prep.scan import HASHED_KEYS, write_keys
from vitscale.data_prep.shard import bucket_count
from vitscale.data_prep.storage import open_folder

CHUNK = 50_000


def make(work: str, records: int) -> None:
    """Keys of `records` images, one in a hundred a copy of another."""
    folder, buckets = open_folder(work, "work"), bucket_count(records)
    for number in range(records // CHUNK):
        random = np.random.Generator(np.random.Philox(key=number))
        sha = random.integers(0, 256, (CHUNK, 32), dtype=np.uint8)
        sha[: CHUNK // 100] = np.random.Generator(np.random.Philox(key=0)).integers(
            0, 256, (CHUNK // 100, 32), dtype=np.uint8
        )
        rows = np.arange(CHUNK, dtype=np.int32)
        columns = {
            "sha256": pa.array([row.tobytes() for row in sha], pa.binary(32)),
            "chunk": np.full(CHUNK, number, np.int32),
            "row": rows,
            "label": (rows % 1000).astype(np.int32),
            "labels": pa.nulls(CHUNK, pa.list_(pa.int32())),
            "extra": pa.nulls(CHUNK, pa.large_string()),
            "file": pa.array([f"n{row % 1000:08d}/n{row % 1000:08d}_{number * CHUNK + row}.JPEG" for row in rows]),
            "offset": np.zeros(CHUNK, np.int64),
            "length": np.full(CHUNK, 65_000, np.int64),
            "phash": pa.nulls(CHUNK, pa.binary(32)),
        }
        write_keys(folder, f"{number:04d}", pa.table(columns).select(HASHED_KEYS.names).cast(HASHED_KEYS), buckets, 0)


def measure(work: str, records: int) -> None:
    """Run the stages; print seconds, and the peak of memory in MB."""
    folder, buckets, chunks = open_folder(work, "work"), bucket_count(records), records // CHUNK
    names = tuple(f"{number:04d}" for number in range(chunks))
    tasks = [BucketTask(folder, n, names, buckets, 0, chunks, 0, DedupConfig(), ()) for n in range(buckets)]
    start = time.perf_counter()
    for stage in (dedup, plan):
        for task in tasks:
            stage(task)
    cuts = layout(folder, buckets, 10_000, 0)
    seconds = time.perf_counter() - start
    assert cuts.shards[-1] == records
    print(json.dumps([round(seconds, 1), round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, work, records = arguments.run
        return {"make": make, "measure": measure}[what](work, int(records))
    rows = {}
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory() as work:
            for what in ("make", "measure"):
                command = [sys.executable, __file__, "--run", what, work, str(millions * 10**6)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[f"{millions} M"] = dict(zip(("seconds", "peak_mb"), json.loads(said), strict=True))
            print(f"{millions} M records: {rows[f'{millions} M']}", flush=True)
    if arguments.out:
        told = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"1 core, {platform.machine()}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__},
            "records": rows,
        }
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
