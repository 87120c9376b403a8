"""How ranks that may not all be there find each other, and who is missing: by a store alone, without collectives."""

import json
import os
import platform
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, TCPStore

from vitscale.errors import UserError
from vitscale.launch.node import HOSTS, places
from vitscale.pipeline.distributed import launcher_place, tasks_per_node
from vitscale.pipeline.verdict import named_ranks

POLL = 0.05


@dataclass
class Meeting:
    """This rank's place among all, and the store by which they talk. `wait`: seconds for any of its steps."""

    store: Any
    rank: int
    size: int
    local_rank: int
    local_size: int
    wait: float
    host: str = field(default_factory=platform.node)

    def tell(self, name: str, value: Any) -> None:
        """Let all ranks know."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str, wait: float) -> Any:
        """What was told under a name. Raises `TimeoutError` if that is nothing within `wait` seconds."""
        try:
            self.store.wait([name], timedelta(seconds=wait))
            return json.loads(self.store.get(name))
        except RuntimeError as error:
            raise TimeoutError(name) from error

    def told(self, kind: str, wait: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What ranks (default: all) told under `KIND/RANK`, as soon as they have or `wait` seconds have passed."""
        left, came = set(range(self.size) if ranks is None else ranks), {}
        deadline = time.monotonic() + wait
        while True:
            for rank in sorted(left):
                if self.store.check([f"{kind}/{rank}"]):
                    came[rank] = json.loads(self.store.get(f"{kind}/{rank}"))
            left -= set(came)
            if not left or time.monotonic() > deadline:
                return came
            time.sleep(POLL)


def meet(wait: float, env: Mapping[str, str] = os.environ) -> Meeting:
    """Reach the rendezvous of the launcher around this process. Raises `UserError` where nobody answers there."""
    place = launcher_place(env)
    if place is None:
        return Meeting(HashStore(), 0, 1, 0, 1, wait)
    rank, size, local_rank, local_size = place
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not server:
            _knock(address, port, wait)
        store = TCPStore(address, port, size, server, timedelta(seconds=wait), wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            "MASTER_ADDR",
            f"{address}:{port}, which rank {rank} on node {platform.node()} could not reach in {wait:g} s ({said})",
            "rank 0 to listen there",
            "See whether rank 0 started, its name stands for an address of the right network, and ports are open.",
        ) from error
    return Meeting(PrefixStore("doctor", store), rank, size, local_rank, local_size, wait)


def _knock(address: str, port: int, wait: float) -> None:
    """Until somebody listens; torch's own attempts fill the screen."""
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def expected_hosts(env: Mapping[str, str]) -> list[str]:
    """The host of each rank, as far as the launcher says; else nothing."""
    if HOSTS in env:
        return [host for host, slots in places(env[HOSTS]) for _ in range(slots)]
    if "SLURM_STEP_NODELIST" in env and "RANK" not in env:
        hosts = all_hosts(env["SLURM_STEP_NODELIST"])
        tasks = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        return [host for host, number in zip(hosts, tasks, strict=False) for _ in range(number)]
    return []


def all_hosts(nodelist: str) -> list[str]:
    """The hosts of Slurm's short form: `gpu[003-004,12],login` → gpu003, gpu004, gpu12, login."""
    hosts = []
    for part in re.split(r",(?![^[]*\])", nodelist):
        match = re.fullmatch(r"(.*?)\[([^]]*)\](.*)", part)
        if not match:
            hosts.append(part)
            continue
        for piece in match[2].split(","):
            first, _, last = piece.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            hosts += [host for i in numbers for host in all_hosts(f"{match[1]}{i:0{len(first)}}{match[3]}")]
    return hosts


def absent(arrived: dict[int, str], size: int, expected: list[str], wait: float) -> list[str]:
    """A line for each node whose ranks did not all arrive, or one for all of them where their nodes are unknown."""
    missing = [rank for rank in range(size) if rank not in arrived]
    if not missing:
        return []
    if len(expected) < size:
        came = ", ".join(dict.fromkeys(arrived.values()))
        return [f"{named_ranks(missing)} of {size} did not arrive within {wait:g} s; those of these nodes did: {came}"]
    lost = {host: [rank for rank in missing if expected[rank] == host] for host in dict.fromkeys(expected)}
    said = f"did not arrive within {wait:g} s"
    return [f"node {host}: {named_ranks(ranks)} {said}" for host, ranks in lost.items() if ranks]
