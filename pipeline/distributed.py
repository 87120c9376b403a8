"""Processes that train together: joining the group, and the few collectives used outside the engine."""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from vitscale.errors import EXIT_DONE, UserError

TIMEOUT = timedelta(hours=1)  # a collective that waits longer ends the run instead of hanging for ever
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, `local_rank` on its node, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes shared files."""
        return self.rank == 0


def join(device: str = "auto") -> World:
    """Join the process group of the launcher around this process, or a group of one.

    `device` is `auto`, `cpu` or `cuda`: NCCL on GPUs, gloo on CPUs. Raises `UserError` if there are more processes
    on a node than GPUs.
    """
    place = launcher_place(os.environ)
    rank, size, local_rank, local_size = place or (0, 1, 0, 1)
    bound = "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1  # srun shows each task its own GPU
    cuda = use_cuda(device, 1 if bound else local_size)
    target = torch.device("cuda", 0 if bound else local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(target)
    elif local_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # read by DeepSpeed
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        options = {"device_id": target} if cuda else {}
        if place is None:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT, **options)
    return World(rank, size, local_rank, target)


def leave(code: int = EXIT_DONE) -> NoReturn:
    """End this process, which joined, with an exit code, once every rank got this far."""
    dist.barrier()
    dist.destroy_process_group()
    end(code)


def end(code: int) -> NoReturn:
    """End this process at once, without waiting for other ranks or tearing the interpreter down.

    DeepSpeed holds on to process groups, whose gloo threads therefore outlive `destroy_process_group`, and abort if
    they still let go of a tensor while the interpreter ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent(parent: int = 0) -> None:
    """Have the kernel kill this process when the one that started it dies, so that it does not go on alone (Linux).

    It is killed here if that one, process `parent` where it is known, died before the kernel was asked.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def launcher_place(env: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """(rank, world size, local rank, local size) given by a launcher around this process; None if there is none.

    Understands torchrun's variables (RANK, WORLD_SIZE, …) and those of a Slurm step (`srun`), for which it also sets
    the address and port of the rendezvous.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        return int(env["RANK"]), size, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:  # a batch script has the first alone, and starts no ranks
        job_and_step = int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])  # two steps of a job may run at once
        os.environ.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20_000 + job_and_step % 12_000))  # Linux itself uses 32,768 and more
        local_size = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), local_size
    return None


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: `gpu[003-007,12],login` → `gpu003`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodelist)[0])


def tasks_per_node(short: str) -> list[int]:
    """Slurm's short form of tasks on each node: `2(x3),1` → [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in short.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def use_cuda(device: str, local_processes: int, setting: str = "engine.device") -> bool:
    """Whether processes take GPUs, one each. `device` is the user's choice, by `setting`.

    Raises `UserError` if `local_processes` do not fit this node.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if local_processes > gpus:
        raise UserError(
            "--nproc",
            f"{local_processes} processes on a node with {gpus} GPUs ({setting} {device})",
            "at most one process per GPU",
            f"Use --nproc {gpus}, or {setting} cpu." if gpus else f"Set {setting} to cpu.",
        )
    return True


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """One small Python object of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(error: Exception | None) -> None:
    """Raise on every rank if any rank brings an error, so that no rank waits for one that failed."""
    errors = gather(error if error is None or isinstance(error, UserError) else RuntimeError(repr(error)))
    first = next((other for other in errors if other is not None), None)
    if first is not None:
        raise error or first
