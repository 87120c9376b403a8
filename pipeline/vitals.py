"""What a process finds out about its node and its GPUs: versions, memory, disks, data, and how long things take."""

import os
import re
import shutil
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vitscale.pipeline.data.store import Store
from vitscale.pipeline.run_folder import commit, versions
from vitscale.pipeline.timing import measured_peak

DRIVER = Path("/proc/driver/nvidia/version")
READS, READ_SECONDS = 64, 2.0  # samples to read at most, and for how long
REDUCED = {"cuda": 1 << 24, "cpu": 1 << 18}  # float32 numbers of an all-reduce and of an exchange
TIMES = 10


def all_versions() -> dict[str, str]:
    """Versions that nodes have to share: packages, code, and what belongs to GPUs."""
    found = {**versions(), "commit": (commit() or "")[:12], "CUDA": str(torch.version.cuda or "")}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
        found["driver"] = driver[1] if driver else ""
    return {name: value for name, value in found.items() if value}


def gpus(devices: list[torch.device]) -> list[dict[str, Any]]:
    """Name, memory and memory in use of each, in GB; what this process itself holds is not counted."""
    found = []
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        used = total - free - torch.cuda.memory_reserved(device)
        found.append({"name": torch.cuda.get_device_name(device), "gb": total / 1e9, "used_gb": used / 1e9})
    return found


def free_gb(run_dir: str) -> dict[str, float]:
    """Free space where runs need it; an object store's is not asked for."""
    places = {"/dev/shm": Path("/dev/shm")}
    if run_dir and "://" not in run_dir:
        places["run.dir"] = existing(Path(run_dir))
    return {name: shutil.disk_usage(path).free / 1e9 for name, path in places.items() if path.exists()}


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def product_seconds(devices: list[torch.device]) -> float:
    """Seconds for 10¹² operations of a matrix product in bf16 (on CPUs float32), on the slowest of the devices."""
    return max(1e12 / measured_peak(each, torch.bfloat16 if each.type == "cuda" else torch.float32) for each in devices)


def read_seconds(paths: list[str], rank: int) -> float:
    """Seconds for a megabyte of samples from all over the data, other ones on each rank.

    Raises `UserError` for data that cannot be read.
    """
    store = Store(paths, "data.train", check=False)
    numbers = np.random.default_rng(rank).integers(len(store), size=READS)
    size, began = 0, time.monotonic()
    for number in numbers:
        size += len(store.read(int(number)).data)
        if time.monotonic() - began > READ_SECONDS:
            break
    taken = time.monotonic() - began
    store.close()
    return taken / size * 1e6


def network_seconds(
    store: Any, rank: int, size: int, local_size: int, device: torch.device, wait: float
) -> dict[str, float]:
    """Join all ranks as a run does, and time an all-reduce and an exchange with a neighbouring node.

    Each waits `wait` seconds at most. Of two neighbours the faster one counts, so that a slow node does not make those
    beside it look slow.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    options = {"device_id": device} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=wait), **options
    )
    sent = torch.ones(REDUCED[device.type], device=device)
    got = torch.empty_like(sent)

    def timed(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(TIMES):
            dist.all_reduce(torch.ones(1, device=device))  # begin together
            _wait_for(device)
            began = time.perf_counter()
            work()
            _wait_for(device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[TIMES // 3 :])

    def exchange(other: int | None) -> None:
        if other is not None:
            both = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, got, other)]
            for each in dist.batch_isend_irecv(both):
                each.wait()

    found = {"all-reduce": timed(lambda: dist.all_reduce(sent / size))}
    exchanges = [(other, timed(lambda other=other: exchange(other))) for other in neighbours(rank, size, local_size)]
    real = [seconds for other, seconds in exchanges if other is not None]
    return found | ({"exchange": min(real)} if real else {})


def neighbours(rank: int, size: int, local_size: int) -> list[int | None]:
    """Whom a rank exchanges with in each of two rounds: ranks of its own number on the nodes beside its own, in a ring.

    On one node the ranks themselves are the ring. Without a partner, as one of an odd number has in one round: None.
    """
    block = local_size if size % local_size == 0 and size > local_size else 1
    node, nodes, place = rank // block, size // block, rank % block
    others = [node ^ 1, node + 1 if node % 2 else node - 1]
    others[1] = others[1] % nodes if nodes % 2 == 0 else others[1]
    return [other * block + place if 0 <= other < nodes and other != node else None for other in others]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def marker(run_dir: str) -> Path | None:
    """Write a small file into the run's folder, or the nearest one above, for other nodes to look for; None for none.

    Raises `OSError` where that cannot be done.
    """
    if not run_dir or "://" in run_dir:
        return None
    path = existing(Path(run_dir)) / f".vitscale-doctor-{os.getpid()}-{time.time_ns()}"
    path.write_text("to be removed\n")
    return path
