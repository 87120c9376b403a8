"""What comes of an attempt, from the logs that ranks and srun left: no Slurm needed."""

import json
import os
from pathlib import Path

import pytest

from vitscale.launch.slurm_end import end_attempt, first_failure, merge, progress
from vitscale.launch.slurm_rank import Stamped, begin_rank

NOW = "2026-01-02T03:04:"


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "logs" / "7"
    folder.mkdir(parents=True)
    return folder


def srun(attempt: Path, *rows: tuple[float, str]) -> None:
    (attempt / "srun.log").write_text("".join(f"{NOW}{second:06.3f} srun: error: {text}\n" for second, text in rows))


def failed(attempt: Path, rank: int, text: str, second: float, cause: bool = False) -> None:
    file = attempt / f"rank-{rank:05}.json"
    file.write_text(json.dumps({"text": text, "cause": cause, "time": 0}))
    os.utime(file, (second, second))


def end(attempt: Path, code: int, asked: bool = False) -> tuple[str, str, str]:
    action, node, said = end_attempt(attempt, str(attempt.parents[1]), code, asked)
    return action, node, "\n".join(said)


def test_killed_rank_is_told_not_those_that_lost_it(attempt: Path) -> None:
    failed(attempt, 0, "internal error: connection closed by peer", 100)
    srun(attempt, (1, "n1: task 0: Exited with exit code 1"), (1.2, "n2: task 1: Killed"), (31, "n1: task 2: Killed"))
    action, node, said = end(attempt, 137)
    assert (action, node) == ("requeue", "n2")
    assert "error: rank 1 on n2 ended: Killed" in said
    assert "connection closed" not in said
    last = (attempt / "merged.log").read_text().splitlines()[-1]
    assert last == "first: error: rank 1 on n2 ended: Killed"


def test_lost_node_is_requeued_before_slurm_notices(attempt: Path) -> None:
    text = "internal error: RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
    failed(attempt, 0, text, 100)
    srun(attempt, (1, "n1: task 0: Exited with exit code 1"))
    action, node, said = end(attempt, 1)
    assert (action, node) == ("requeue", "")
    assert "a rank or its node was lost, as rank 0 on n1 noticed" in said


def test_who_lost_another_is_not_told(attempt: Path) -> None:
    failed(attempt, 0, "internal error: RuntimeError: Connection closed by peer", 100)
    failed(attempt, 1, "internal error: KeyError: 'x'", 101)
    srun(attempt, (1, "n1: tasks 0-1: Exited with exit code 1"))
    action, _, said = end(attempt, 1)
    assert action == "1"
    assert "KeyError" in said
    assert "peer" not in said


def test_setting_is_told_before_all(attempt: Path) -> None:
    failed(attempt, 1, "error: said later", 101, cause=True)
    failed(attempt, 3, "error: data.train: gone", 100, cause=True)
    failed(attempt, 0, "internal error: lost another", 99)
    srun(attempt, (1, "n1: task 0: Exited with exit code 1"), (1, "n1: tasks 1,3: Exited with exit code 2"))
    action, _, said = end(attempt, 2)
    assert action == "2"
    assert "data.train: gone" in said
    assert "said later" not in said


def test_internal_error_is_not_requeued(attempt: Path) -> None:
    failed(attempt, 4, "internal error: KeyError: 'x'", 100)
    srun(attempt, (1, "n2: task 4: Exited with exit code 1"), (31, "n1: tasks 0-3: Killed"))
    action, _, said = end(attempt, 137)
    assert action == "1"
    assert "KeyError" in said


@pytest.mark.parametrize(
    ("row", "asked", "node", "text"),
    [
        ("n2: task 5: Exited with exit code 76", False, "n2", "rank 5: no step for 60 s"),
        ("Node failure on n3", False, "n3", "node n3 failed"),
        ("n1: task 0: User defined signal 1", True, "", "asked to stop before there was anything to save"),
        ("n1: task 0: Out Of Memory", False, "n1", "rank 0 on n1 ended: Out Of Memory"),
        ("Unable to create step for job 7: bad luck", False, "", "Unable to create step"),
    ],
)
def test_requeued_after(attempt: Path, row: str, asked: bool, node: str, text: str) -> None:
    if "76" in row:
        failed(attempt, 5, "error: rank 5: no step for 60 s", 100)
    srun(attempt, (1, row), *([(32, "n1: tasks 0-3: Killed")] if ": task" in row else []))
    action, shunned, said = end(attempt, 137, asked)
    assert (action, shunned) == ("requeue", node)
    assert text in said


def test_saved_ranks_are_not_counted_even_if_others_were_ended(attempt: Path) -> None:
    failed(attempt, 0, "saved at step 9 of 12 after SIGUSR1", 100)
    srun(attempt, (1, "n1: task 1: Exited with exit code 75"), (1.1, "n1: task 0: Terminated"))
    for _ in range(5):
        action, _, said = end(attempt, 143, asked=True)
        assert action == "requeue"
        assert "saved at step 9" in said
    assert not (attempt.parent / "failures.json").exists()


def test_failures_are_counted_until_a_checkpoint_comes(attempt: Path) -> None:
    srun(attempt, (1, "n1: task 0: Killed"))
    run = attempt.parents[1]
    seen = []
    for step in (0, 4, 4, 8, 8, 8):
        (run / "checkpoints" / f"step-{step:08}").mkdir(parents=True, exist_ok=True)
        seen.append(end(attempt, 137)[0])
    assert seen == ["requeue"] * 5 + ["1"]
    assert end(attempt, 137)[0] == "requeue"  # submitted again, it has its three attempts
    assert end(attempt, 0)[0] == "0"
    assert not (attempt.parent / "failures.json").exists()


def test_progress_of_a_run_in_an_object_store_is_what_it_began_with(attempt: Path) -> None:
    (attempt / "rank-00000.log").write_text(f"{NOW}01.000 hello\n{NOW}02.000 going on from step 40: s3://b/r\n")
    assert progress(attempt, "s3://b/r") == "going on from step 40: s3://b/r"


def test_logs_are_merged_in_time(attempt: Path) -> None:
    (attempt / "rank-00000.log").write_text(f"{NOW}01.000 one\n  of C code\n{NOW}03.000 three\n")
    (attempt / "rank-00010.log").write_text(f"{NOW}02.000 two\n")
    assert merge(attempt).read_text().splitlines() == [
        f"{NOW}01.000 rank 0: one", f"{NOW}01.000 rank 0:   of C code", f"{NOW}02.000 rank 10: two",
        f"{NOW}03.000 rank 0: three",
    ]  # fmt: skip


def test_program_that_is_not_there(attempt: Path) -> None:
    (attempt / "rank-00001.log").write_text("slurmstepd: error: execve(): vitscale: No such file or directory\n")
    srun(attempt, (1, "n1: task 1: Exited with exit code 2"))
    found = first_failure(attempt, 2, asked=False)
    assert found.code == 2
    assert found.text == "error: rank 1: slurmstepd: error: execve(): vitscale: No such file or directory"


def test_stamped_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        stream = Stamped(file)
        print("one", 1, file=stream)
        stream.write("two\nthree")
    rows = (tmp_path / "log").read_text().splitlines()
    assert [row[24:] for row in rows] == ["one 1", "two", "three"]
    assert all(row[10] == "T" and row[19] == "." for row in rows)


def test_without_a_folder_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITSCALE_RANK_LOGS", raising=False)
    begin_rank()
    assert "VITSCALE_FAILURE_FILE" not in os.environ
