"""The cost of the order of samples: opening an index, one step, and the memory of both.

    python benchmarks/order.py [--shards 20000] [--samples 10000000] [--out FILE.json]

Makes a dataset without images: empty tars and sidecars of the sizes that its index tells. Prints what the order of one
step takes, at steps far apart and at neighbouring ones, and beside it the mean distance of two samples that are
neighbours in a shard, in parts of the epoch: in a true permutation a third.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from vitscale.data_prep.manifest import SCHEMA_VERSION, ShardEntry, fingerprint, samples_name, write_index
from vitscale.data_prep.storage import open_folder
from vitscale.pipeline.data.order import Order
from vitscale.pipeline.data.store import Store


def make(root: Path, shards: int, samples: int) -> None:
    sizes = np.diff(np.arange(shards + 1) * samples // shards)
    entries = [ShardEntry(f"train-{n:06d}.tar", int(size), 0, f"{n:064x}") for n, size in enumerate(sizes)]
    folder = open_folder(str(root), "OUT")
    write_index(folder, "index.parquet", entries)
    for entry in entries:
        (root / entry.name).touch()
        (root / samples_name(entry.name)).touch()
    info = {
        "schema_version": SCHEMA_VERSION, "split": "train", "labels": "class", "classes": ["a"], "samples": samples,
        "fingerprint": fingerprint(entries), "index": "index.parquet", "parts": [],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(info))


def milliseconds(order: Order, steps: list[int]) -> float:
    """Median of the time for one step."""
    times = []
    for step in steps:
        begun = time.perf_counter()
        order.batch(step)
        times.append(time.perf_counter() - begun)
    return float(np.median(times)) * 1000


def neighbours(order: Order, shards: int, samples: int) -> float:
    """Mean distance of neighbours in a shard, in parts of the epoch, from samples of the first steps of it."""
    place = np.full(samples, -1)
    for step in range(order.steps):
        place[order.batch(step)[0]] = step
    pairs = np.stack([place[:-1], place[1:]])
    sound = (pairs >= 0).all(axis=0) & (np.arange(1, samples) % (samples // shards) != 0)
    return float(np.abs(np.diff(pairs[:, sound], axis=0)).mean() / order.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), arguments.shards, arguments.samples)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        store = Store(temporary, "data.train")
        results["seconds to open the index and look for every shard (≤ 2)"] = time.perf_counter() - begun
        order = Order(store.sizes, [1], seed=0, streams=16, window=65536, size=arguments.batch)
        results["ms, first step of an epoch"] = milliseconds(order, [0])
        results["ms, a step, neighbouring ones (≤ 1)"] = milliseconds(order, list(range(1, 300)))
        results["MB more than before"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        results["MB of the process (≤ 300)"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results["ms, a step a million later"] = milliseconds(order, [1_000_000])
    small = Order([np.full(1000, 1000)], [1], seed=0, streams=16, window=65536, size=1024)
    results["neighbours of a shard, distance in epochs, 1 M samples (1/3)"] = neighbours(small, 1000, 1_000_000)
    huge = Order([np.full(325_000, 30_769)], [1], seed=0, streams=16, window=65536, size=arguments.batch)
    results["ms, first step of an epoch of 10 billion in 325,000 shards"] = milliseconds(huge, [0])
    results["ms, a step of it"] = milliseconds(huge, list(range(1, 100)))
    for name, value in results.items():
        print(f"{name:65} {value:10.3f}")
    if arguments.out:
        told = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "shards": arguments.shards,
            "samples": arguments.samples,
            "global_batch": arguments.batch,
            "results": {name: round(value, 3) for name, value in results.items()},
        }
        arguments.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
