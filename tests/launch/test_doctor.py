"""The doctor: what it concludes from hand-made reports, and real ranks that differ, are missing, or have no rank 0."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.slurm_cluster import SlurmCluster
from vitscale.launch.meeting import absent, all_hosts, expected_hosts
from vitscale.pipeline.verdict import Report, named_ranks, verdict
from vitscale.pipeline.vitals import neighbours

Command = Callable[..., subprocess.CompletedProcess[str]]
H200 = {"name": "NVIDIA H200", "gb": 150.0, "used_gb": 0.5}


def healthy(ranks: int = 8, a_node: int = 2) -> list[Report]:
    """Reports of ranks that differ by what is mere chance."""
    return [
        Report(
            rank=rank,
            host=f"gpu{rank // a_node:02}",
            versions={"torch": "2.11.0", "python": "3.11.7"},
            gpus=[H200],
            free_gb={"/dev/shm": 500.0, "run.dir": 9000.0},
            clock=0.001 * rank,
            seconds={
                "matrix product": 0.0013 * (1 + 0.01 * rank),
                "all-reduce": 0.002,
                "exchange": 0.001 + 0.0001 * rank,
                "storage read": 0.001 * (1 + rank % 3),
            },
        )
        for rank in range(ranks)
    ]


def test_healthy_nodes_have_nothing_odd() -> None:
    assert verdict(healthy()) == []
    assert verdict(healthy(1)) == []
    assert verdict([]) == []


@pytest.mark.parametrize(
    ("rank", "change", "line"),
    [
        (7, {"seconds": {"matrix product": 0.00285}}, "node gpu03: matrix product 2.1 times the median (rank 7)"),
        (2, {"seconds": {"exchange": 0.013}}, "node gpu01: exchange 9.3 times the median (rank 2)"),
        (2, {"seconds": {"storage read": 0.1}}, "node gpu01: storage read 50.0 times the median (rank 2)"),
        (3, {"versions": {"torch": "2.10.0"}}, "node gpu01: torch 2.10.0, others 2.11.0 (rank 3)"),
        (0, {"clock": -35.0}, "node gpu00: clock 35.0 s behind the others (rank 0)"),
        (6, {"gpus": [{**H200, "used_gb": 60.25}]}, "node gpu03: GPU: 60.2 of 150 GB in use by others (rank 6)"),
        (6, {"gpus": []}, "node gpu03: no GPU, others NVIDIA H200 of 150 GB (rank 6)"),
        (5, {"free_gb": {"/dev/shm": 0.064}}, "node gpu02: /dev/shm: 0.06 GB free (rank 5)"),
        (4, {"problems": ["data not readable: /data"]}, "node gpu02: data not readable: /data (rank 4)"),
    ],
)
def test_one_odd_rank_is_named(rank: int, change: dict[str, Any], line: str) -> None:
    reports = healthy()
    merged = {key: {**getattr(reports[rank], key), **value} if isinstance(value, dict) else value
              for key, value in change.items()}  # fmt: skip
    reports[rank] = replace(reports[rank], **merged)
    assert verdict(reports) == [line]


def test_a_node_has_one_line_and_what_all_share_is_said_once() -> None:
    reports = healthy()
    for rank in (6, 7):
        seconds = {**reports[rank].seconds, "matrix product": 0.0026 + 0.001 * (rank - 6)}
        reports[rank] = replace(reports[rank], versions={"torch": "2.10.0", "python": "3.11.7"}, seconds=seconds)
    assert verdict(reports) == ["node gpu03: torch 2.10.0, others 2.11.0; matrix product 2.7 times the median"]
    nowhere = [replace(report, problems=["data not readable: /data"]) for report in healthy()]
    assert verdict(nowhere) == ["every node: data not readable: /data"]


def test_two_nodes_that_differ_are_both_named() -> None:
    first, second = healthy(2, a_node=1)
    seconds = {**second.seconds, "matrix product": 0.0065}
    second = replace(second, versions={"torch": "2.10.0", "python": "3.11.7"}, seconds=seconds)
    assert verdict([first, second]) == [
        "nodes differ: torch 2.11.0 on gpu00; 2.10.0 on gpu01",
        "node gpu01: matrix product 5.0 times the other's",
    ]


def test_who_is_missing() -> None:
    hosts = all_hosts("gpu[009-010,12],login,r[1-2]n[01-02]")
    assert hosts == ["gpu009", "gpu010", "gpu12", "login", "r1n01", "r1n02", "r2n01", "r2n02"]
    step = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    expected = ["gpu1", "gpu1", "gpu2", "gpu2"]
    assert expected_hosts(step) == expected == expected_hosts({"VITSCALE_HOSTS": "gpu1:2,gpu2:2"})
    assert expected_hosts({"RANK": "0"}) == []
    assert absent(dict(enumerate(expected)), 4, expected, 9) == []
    assert absent({0: "gpu1", 1: "gpu1"}, 4, expected, 9) == ["node gpu2: ranks 2-3 did not arrive within 9 s"]
    said = "ranks 1-2 of 4 did not arrive within 9 s; those of these nodes did: gpu1, gpu2"
    assert absent({0: "gpu1", 3: "gpu2"}, 4, [], 9) == [said]
    assert named_ranks([8, 0, 1, 2]) == "ranks 0-2, 8"


@pytest.mark.parametrize(("size", "local"), [(2, 2), (3, 1), (16, 8), (24, 8), (32, 4), (7, 4)])
def test_partners_of_an_exchange_are_each_others(size: int, local: int) -> None:
    pairs = [neighbours(rank, size, local) for rank in range(size)]
    for rank, both in enumerate(pairs):
        assert any(other is not None for other in both)
        for turn, other in enumerate(both):
            assert other is None or (other != rank and pairs[other][turn] == rank)
            if other is not None and size % local == 0 and size > local:
                assert other // local != rank // local, "another node"


def test_two_real_ranks(vitscale: Command, digits: Any, tmp_path: Path) -> None:
    said = vitscale("doctor", f"data.train={digits.train}", "run.dir=runs/a", "--nproc", 2, "--json")
    found = json.loads(said.stdout)
    assert found["ranks"] == 2
    assert [line for line in found["bad"] if "times the other's" not in line] == [], "they share two busy cores"
    assert said.returncode == (1 if found["bad"] else 0), said.stderr
    for rank, report in enumerate(found["reports"]):
        assert report["rank"] == rank
        assert report["host"] == found["arrived"][str(rank)]
        assert set(report["seconds"]) == {"matrix product", "all-reduce", "exchange", "storage read"}
        assert all(seconds > 0 for seconds in report["seconds"].values())
        assert set(report["free_gb"]) == {"run.dir", "/dev/shm"}
        assert {"python", "torch", "deepspeed", "vitscale"} <= set(report["versions"])
        assert abs(report["clock"]) < 2
    assert list(tmp_path.iterdir()) == [], "the file by which ranks know the folder is removed"


def test_a_node_without_the_data_and_one_that_is_not_there(vitscale: Command, digits: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "3"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_STEP_NODELIST": "gpu[1-3]", "SLURM_LOCALID": "0"}
    step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        data = digits.train if rank == 0 else "nowhere"
        env = {**step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}
        return vitscale("doctor", f"data.train={data}", "--timeout", 8, env=env)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(run, range(2))
    assert (first.returncode, second.returncode) == (1, 0), first.stderr + second.stderr
    assert "node gpu3: rank 2 did not arrive within 8 s\n" in first.stdout
    assert "data not readable: data.train: got " in first.stdout
    assert "nowhere, which is no folder" in first.stdout
    assert "(rank 1)" in first.stdout
    assert second.stdout == ""


@pytest.mark.slow
def test_a_real_slurm(slurm: SlurmCluster, digits: Any, tmp_path: Path) -> None:
    """One task on each of three nodes; data that only the third cannot read."""
    data = tmp_path / "data"
    data.symlink_to(digits.train)
    program = f"[ $SLURM_PROCID = 2 ] && d=nowhere || d={data}; exec {sys.executable} -m vitscale.launch.cli doctor"
    line = ["srun", "--nodes=3", "--ntasks-per-node=1", "bash", "-c", f"{program} data.train=$d run.dir={tmp_path}"]
    env = {**slurm.env, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(line, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert said.returncode == 1, said.stdout + said.stderr
    (odd,) = [text for text in said.stdout.splitlines() if "data not readable" in text]
    assert re.match(r"node \w+: ", odd)
    assert "nowhere, which is no folder" in odd
    rows = said.stdout.splitlines()[1:4]
    hosts = [row.split()[1] for row in rows]
    assert len(set(hosts)) == 3
    assert odd.startswith(f"node {hosts[2]}: ")


def test_nobody_at_the_rendezvous(vitscale: Command) -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    said = vitscale("doctor", "--timeout", 1, env=env)
    assert said.returncode == 2
    assert said.stderr.startswith("error: MASTER_ADDR: got 127.0.0.1:9, which rank 1 on node "), said.stderr
    assert "Connection refused" in said.stderr
