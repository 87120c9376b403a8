"""Places given by launchers, and agreement between ranks."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from vitscale.errors import UserError
from vitscale.pipeline.distributed import World, agree, first_host, launcher_place, tasks_per_node, use_cuda

STEP = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}  # fmt: skip


def test_torchrun_and_srun_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is as it was in the end
        monkeypatch.delenv(name)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launcher_place(torchrun) == (3, 4, 1, 2)
    assert "MASTER_ADDR" not in os.environ
    assert launcher_place(STEP) == (5, 8, 1, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu007", "20192")


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[003-007,12],login", "gpu003"),
        ("n[1,3]-ib", "n1-ib"),
        ("r[1-2]n[03-04]", "r1n03"),
    ],
)
def test_first_host_of_slurms_short_form(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_tasks_of_slurms_short_form() -> None:
    assert tasks_per_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]


def test_a_batch_script_is_no_rank() -> None:
    """sbatch sets SLURM_PROCID=0 in the script itself, outside of any step."""
    assert launcher_place({key: value for key, value in STEP.items() if key != "SLURM_STEP_ID"}) is None
    assert launcher_place({}) is None


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert use_cuda("auto", 2)
    assert not use_cuda("cpu", 3)
    with pytest.raises(UserError, match=r"--nproc: got 3 processes on a node with 2 GPUs.*Use --nproc 2"):
        use_cuda("auto", 3)


def disagree(world: World, kind: str) -> str:
    """What each rank raises when rank 1 alone has an error."""
    error: Exception = UserError("x", "rank 1", "none", "Look.") if kind == "user" else OSError("rank 1")
    try:
        agree(error if world.rank == 1 else None)
    except Exception as raised:
        return repr(raised)
    return "nothing"


@pytest.mark.parametrize(("kind", "raised"), [("user", "UserError('x', 'rank 1'"), ("other", 'RuntimeError("OSError')])
def test_an_error_of_one_rank_is_raised_on_all(ranks: Callable[..., Any], kind: str, raised: str) -> None:
    assert ranks(__file__, "disagree", 2, kind).startswith(raised)
