"""Runs on a real Slurm of three nodes: submitted, given notice, killed, resized, refused; compared with local ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import TINY, command, losses
from tests.slurm_cluster import SlurmCluster
from vitscale.errors import UserError
from vitscale.launch import slurm as clients
from vitscale.pipeline.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "pretrain.sbatch"
BIN = Path(sys.executable).parent
SHORT = ("engine.zero_stage=2", "data.workers=0", "eval.every=0")
# long enough to be met in mid-run: a step takes 10 to 40 ms
LONG = (*SHORT, "train.duration=150", "checkpoint.every=20")
# What the same ranks compute is equal bit for bit on CPUs; metrics.jsonl has all digits
SAME = 1e-6

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(slurm: SlurmCluster, digits: Any, tmp_path: Path) -> Launch:
    """`launch("slurm.nodes=2", …)`: what `vitscale launch slurm` says, for a tiny run in tmp_path/run."""

    def run(*words: str, data: str = str(digits.train)) -> subprocess.CompletedProcess[str]:
        own = (f"data.train={data}", f"data.val={digits.test}", f"run.dir={tmp_path / 'run'}", "slurm.doctor=false")
        line = [str(BIN / "vitscale"), "launch", "slurm", "digits-demo", *TINY, *SHORT, *own, *words]
        env = {**slurm.env, "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)

    return run


@pytest.fixture
def submitted(launch: Launch) -> Callable[..., int]:
    """`submitted("slurm.nodes=2", …)`: the number of the job that `launch` submitted."""

    def run(*words: str) -> int:
        done = launch(*words)
        assert done.returncode == 0, done.stderr
        found = re.match(r"job (\d+)", done.stdout)
        assert found
        return int(found[1])

    return run


@pytest.fixture(scope="module")
def whole(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `LONG` on two local processes, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = command(digits, folder, *LONG, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    return folder


def wait_for_checkpoint(folder: Path, step: int, seconds: float = 60) -> None:
    """Until the run has saved after `step` steps or later ones."""
    end = time.monotonic() + seconds
    while not any(int(path.name[5:]) >= step for path in (folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < end, f"no checkpoint of step {step}: {output(folder)}"
        time.sleep(0.05)


def output(folder: Path) -> str:
    """What the batch scripts of a run said, and their ranks."""
    files = [*sorted((folder / "logs").glob("*.out")), *sorted((folder / "logs").glob("*/rank-*.log"))]
    return "\n".join(path.read_text() for path in files)


def digests(folder: Path) -> list[Any]:
    return [row["samples"] for row in read_metrics(folder) if row["kind"] == "train"]


def test_two_nodes_train_as_two_local_ranks(
    slurm: SlurmCluster, submitted: Callable[..., int], digits: Any, tmp_path: Path
) -> None:
    job = submitted("slurm.nodes=2", "slurm.time=10")
    done = command(digits, tmp_path / "local", *SHORT, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "local"), abs=SAME)
    assert (tmp_path / "run" / "checkpoints" / "step-00000012").is_dir()
    started = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert started[0]["world_size"] == 2
    merged = (tmp_path / "run" / "logs" / str(job) / "merged.log").read_text()
    assert "rank 0: trained to step 12" in merged


def test_notice_saves_requeues_and_goes_on_exactly(
    slurm: SlurmCluster, submitted: Callable[..., int], whole: Path, tmp_path: Path
) -> None:
    """The signal is the one that Slurm sends the batch script before the time limit."""
    job = submitted(*LONG, "slurm.nodes=2")
    wait_for_checkpoint(tmp_path / "run", 20)
    slurm.client("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait(job, "PENDING", "COMPLETED", hurry=False)
    said = output(tmp_path / "run")
    assert re.search(r"saved at step \d+ of 150 after SIGUSR1", said), said
    assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    assert slurm.show(job)["Restarts"] == "1"
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=SAME)
    assert digests(tmp_path / "run") == digests(whole)


def test_killed_node_is_replaced(
    slurm: SlurmCluster, submitted: Callable[..., int], whole: Path, tmp_path: Path
) -> None:
    job = submitted(*LONG, "slurm.nodes=2")
    wait_for_checkpoint(tmp_path / "run", 40)
    lost = slurm.nodes[1]
    slurm.kill(lost)
    try:
        assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    finally:
        slurm.boot(lost)
    assert slurm.show(job)["Restarts"] == "1"
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=SAME)


@pytest.mark.slow
def test_goes_on_on_three_nodes_then_one(
    slurm: SlurmCluster, submitted: Callable[..., int], whole: Path, tmp_path: Path
) -> None:
    first, second, third = slurm.nodes
    slurm.drain(third)
    try:
        job = submitted(*LONG, "slurm.nodes=1-3")
        for step, away, back in ((20, (), (third,)), (60, (first, second), ())):
            wait_for_checkpoint(tmp_path / "run", step)
            slurm.drain(*away)
            slurm.drain(*back, back=True)
            slurm.client("scancel", "--batch", "--signal=USR1", str(job))
            slurm.wait(job, "PENDING", hurry=False)
            slurm.wait(job, "RUNNING")
        assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    finally:
        slurm.drain(first, second, back=True)
    started = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["world_size"] for start in started] == [2, 3, 1]
    assert digests(tmp_path / "run") == digests(whole)
    # other ranks sum in another order, which grows with the steps
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-3)


def test_refused_before_submission(launch: Launch, slurm: SlurmCluster, tmp_path: Path) -> None:
    cases = {
        (
            "slurm.partition=mian",
        ): "slurm.partition: got 'mian'; expected one of main, urgent, short. Did you mean 'main'",
        ("slurm.nodes=5",): "slurm.nodes: got 5; expected at most 3 in partition main.",
        ("slurm.nodes=2", "slurm.partition=short"): "choose slurm.partition=main, urgent",
        ("slurm.gpus_per_node=8",): "slurm.gpus_per_node: got 8; expected at most 0 on a node of partition main.",
        ("data.workers=8",): "slurm.cpus_per_task: got 9 for each of 1 ranks; expected at most 4 on a node",
        ("slurm.nodse=2",): "slurm.nodes",
        ("model.depht=2",): "model.depth",
        ("train.global_batch=2", "slurm.nodes=3"): "train.global_batch: got 2 for 3 ranks",
        ("slurm.time=2",): "slurm.time: got '2' with slurm.signal_seconds 180",
    }
    for words, expected in cases.items():
        done = launch(*words)
        assert done.returncode == 2, done.stdout
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
    done = launch(data=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "data.train: got" in done.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_command_and_the_script(launch: Launch) -> None:
    done = launch("slurm.nodes=8", "slurm.gpus_per_node=8", "slurm.time=24:00:00", "--dry-run")
    first = done.stdout.splitlines()[0]
    assert "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=1 --time=24:00:00" in first
    assert SCRIPT.read_text() in done.stdout


def test_user_error_in_the_job_is_told_once_and_not_requeued(slurm: SlurmCluster, digits: Any, tmp_path: Path) -> None:
    """By sbatch alone, as by hand; nothing is checked before."""
    words = ("digits-demo", f"data.train={digits.train}", f"run.dir={tmp_path / 'run'}", "model.depht=2")
    path = {"PATH": f"{BIN}:{slurm.env['PATH']}"}
    job = slurm.submit("--nodes=2", f"--output={tmp_path}/out", SCRIPT, *words, env=path)
    assert slurm.wait(job) == "FAILED"
    shown = slurm.show(job)
    said = (tmp_path / "out").read_text()
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0"), said
    assert said.count("model.depth") == 1
    assert said.count("error:") == 1


def stub(tmp_path: Path, rank: str) -> str:
    """A command that stands for vitscale on the nodes: ranks run the lines `rank`, all else is the real one."""
    path = tmp_path / "vitscale"
    path.write_text(f'#!/bin/bash\nif [ "$2" = rank ]; then\n{rank}\nfi\nexec {BIN}/vitscale "$@"\n')
    path.chmod(0o755)
    return f"slurm.command={path}"


@pytest.mark.slow
def test_killed_rank_is_requeued_elsewhere(slurm: SlurmCluster, submitted: Callable[..., int], tmp_path: Path) -> None:
    """A killed task fails a job: the batch script requeues it, here not onto that node."""
    once = f'[ "$SLURM_PROCID" = 1 ] && mkdir {tmp_path}/once && hostname >{tmp_path}/host && kill -9 $$'
    job = submitted(stub(tmp_path, once), "slurm.nodes=2", "slurm.exclude_failed=true")
    assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    host = (tmp_path / "host").read_text().strip()
    assert f"error: rank 1 on {host} ended: Killed" in output(tmp_path / "run")
    shown = slurm.show(job)
    assert (shown["Restarts"], shown["ExcNodeList"]) == ("1", host)


def test_a_node_without_the_data_is_named_before_training_and_shunned(
    slurm: SlurmCluster, submitted: Callable[..., int], tmp_path: Path
) -> None:
    once = f"""if [ "$3" = doctor ] && [ "$SLURM_PROCID" = 1 ] && mkdir {tmp_path}/once; then
    hostname >{tmp_path}/host; set -- "${{@/#data.train=*/data.train=/nowhere}}"; fi"""
    job = submitted(stub(tmp_path, once), "slurm.nodes=2", "slurm.exclude_failed=true", "slurm.doctor=true")
    assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    host = (tmp_path / "host").read_text().strip()
    said = (tmp_path / "run" / "logs" / f"slurm-{job}.out").read_text()
    assert re.search(rf"error: node {host}: data not readable: .*/nowhere", said)
    shown = slurm.show(job)
    assert (shown["Restarts"], shown["ExcNodeList"]) == ("1", host)


@pytest.mark.slow
def test_three_failures_without_a_checkpoint_end_it(
    slurm: SlurmCluster, submitted: Callable[..., int], tmp_path: Path
) -> None:
    job = submitted(stub(tmp_path, "kill -9 $$"), "slurm.nodes=2")
    assert slurm.wait(job) == "FAILED"
    assert slurm.show(job)["Restarts"] == "2"
    assert "it failed 3 times in a row, and no checkpoint came of it" in output(tmp_path / "run")


def test_cancelled_stays_cancelled(slurm: SlurmCluster, submitted: Callable[..., int], tmp_path: Path) -> None:
    """`scancel` sends SIGTERM, after which ranks save and end as if they were to be requeued."""
    job = submitted(stub(tmp_path, "trap 'exit 75' TERM USR1; touch $VITSCALE_RANK_LOGS/on; sleep 60 & wait"))
    while not list((tmp_path / "run" / "logs").glob("*/on")):
        time.sleep(0.1)
    slurm.client("scancel", str(job))
    assert slurm.wait(job) == "CANCELLED"
    time.sleep(2)
    assert slurm.state(job) == "CANCELLED"


def test_job_that_cannot_be_requeued_submits_itself_again(
    slurm: SlurmCluster, submitted: Callable[..., int], tmp_path: Path
) -> None:
    once = f"mkdir {tmp_path}/once 2>/dev/null && exit 75; exit 0"
    job = submitted(stub(tmp_path, once), "slurm.requeue=false")
    assert slurm.wait(job) == "FAILED"
    assert slurm.wait(job + 1) == "COMPLETED"


def test_clients(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Slurm is asked, by the functions that all of launching uses."""
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    found = clients.partitions()
    assert list(found) == ["main", "urgent", "short"]
    main, short = found["main"], found["short"]
    assert (main.nodes, main.cpus, main.gpus, main.most_minutes, main.default, main.up) == (3, 4, 0, inf, True, True)
    assert (short.nodes, short.most_minutes, short.default) == (1, 30, False)
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/bash\nexit $1\n")
    options = [f"--output={tmp_path}/out"]
    first = clients.submit(script, ["0"], options)
    second = clients.submit(script, ["3"], options, dependency=f"afterok:{first}")
    assert [slurm.wait(job) for job in (first, second)] == ["COMPLETED", "FAILED"]
    with pytest.raises(UserError, match=r"slurm\.options: got `sbatch` says: invalid partition specified: none"):
        clients.submit(script, [], [*options, "--partition=none"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no `sbatch` on PATH"):
        clients.submit(script, [], options)


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("1:30", 1.5), ("24:00:00", 1440), ("7-00", 10080), ("1-2:3", 1563), ("", inf)]
)
def test_times(text: str, expected: float) -> None:
    assert clients.minutes(text, "slurm.time") == expected


@pytest.mark.slow
def test_rank_killed_in_mid_run(
    slurm: SlurmCluster, submitted: Callable[..., int], whole: Path, tmp_path: Path
) -> None:
    job = submitted(*LONG, "slurm.nodes=2")
    wait_for_checkpoint(tmp_path / "run", 40)
    os.kill(process_of_rank(job, 1), signal.SIGKILL)
    assert slurm.wait(job) == "COMPLETED", output(tmp_path / "run")
    assert re.search(r"error: rank 1 on \S+ ended: Killed", output(tmp_path / "run"))
    assert slurm.show(job)["Restarts"] == "1"
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=SAME)


def process_of_rank(job: int, rank: int) -> int:
    """The process of a rank, seen from outside its node: the first of those with its variables."""
    marks = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marks <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0")):
                found.append(int(folder.name))
    return min(found)


@pytest.mark.slow
def test_time_limit(slurm: SlurmCluster, submitted: Callable[..., int], tmp_path: Path) -> None:
    """Slurm's own notice, 30 to 90 s before the limit of two minutes."""
    job = submitted(*LONG, "train.duration=30000", "slurm.nodes=2", "slurm.time=2", "slurm.signal_seconds=30")
    assert slurm.wait(job, "RUNNING", "FAILED") == "RUNNING"
    assert slurm.wait(job, "PENDING", "FAILED", "TIMEOUT", seconds=180, hurry=False) == "PENDING"
    slurm.client("scancel", str(job))
    assert re.search(r"saved at step \d+ of 30000 after SIGUSR1", output(tmp_path / "run"))


@pytest.mark.slow
def test_two_jobs_share_a_node(slurm: SlurmCluster, digits: Any, tmp_path: Path) -> None:
    """Each finds its own ranks: their ports come of the jobs' numbers."""
    jobs = []
    for name in ("a", "b"):
        words = (*TINY, *SHORT, f"data.train={digits.train}", f"run.dir={tmp_path / name}")
        path = {"PATH": f"{BIN}:{slurm.env['PATH']}", "OMP_NUM_THREADS": "1"}
        asked = ("--nodes=1", "--ntasks-per-node=2", f"--nodelist={slurm.nodes[0]}", f"--output={tmp_path}/{name}.out")
        jobs.append(slurm.submit(*asked, SCRIPT, "digits-demo", *words, env=path))
    assert [slurm.wait(job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert os.listdir(tmp_path / "a" / "checkpoints")
