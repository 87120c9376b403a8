"""What was submitted of a chain: the file that remembers it between commands, and what Slurm says of its jobs."""

import fcntl
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.launch.chain import Stage
from vitscale.launch.slurm import client, submit

STATE_FILE = "chain.json"
NEVER = "DependencyNeverSatisfied"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
        "PREEMPTED")  # fmt: skip


@dataclass
class Record:
    """A stage and what was submitted of it: rows with `job`, `what`, `tasks` (0: no array) and `log`."""

    stage: Stage
    jobs: list[dict[str, Any]] = field(default_factory=list)
    submitted: str = ""

    @property
    def last(self) -> int:
        """The job that ends the stage; 0 if none was submitted."""
        return self.jobs[-1]["job"] if self.jobs else 0


@dataclass
class State:
    """What the state file holds."""

    logs: Path
    folder: str  # in which relative paths are meant
    chain: str
    records: dict[str, Record]

    def jobs(self) -> set[int]:
        """All of its jobs."""
        return {row["job"] for record in self.records.values() for row in record.jobs}

    def write(self) -> None:
        """Write the file, whole or not at all. Raises `UserError`."""
        rows = [
            {**record.stage.record(), "submitted": record.submitted, "jobs": record.jobs}
            for record in self.records.values()
        ]
        text = json.dumps({"version": 1, "chain": self.chain, "folder": self.folder, "stages": rows}, indent=1)
        try:
            publish_text(self.logs / STATE_FILE, text + "\n")
        except OSError as error:
            raise _unwritable(self.logs, error) from error


@dataclass(frozen=True)
class Task:
    """A job, or a task of an array, as Slurm tells of it."""

    job: int
    task: str
    state: str
    reason: str
    nodes: str

    @property
    def alive(self) -> bool:
        """Whether it runs, or may do so."""
        return self.state not in OVER and self.reason != NEVER


def read_state(logs: Path) -> State | None:
    """The state of a chain; None if nothing was submitted. Raises `UserError` if it cannot be read."""
    path = logs / STATE_FILE
    try:
        tree = json.loads(path.read_text())
        found = {row["name"]: Record(Stage.from_record(row), row["jobs"], row["submitted"]) for row in tree["stages"]}
        return State(logs, tree["folder"], tree["chain"], found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("logs", f"{path} ({error!r})", "a state file of a chain", "Choose another folder.") from error


def tasks_of(jobs: set[int]) -> dict[int, list[Task]]:
    """Every task of these jobs, of those that Slurm still knows. Raises `UserError`."""
    found: dict[int, list[Task]] = {}
    if not jobs:
        return found
    for row in client(["squeue", "--array", "--states=all", "--noheader", "--format=%F|%K|%T|%r|%N"], "squeue").split(
        "\n"
    ):
        job, *rest = row.strip().split("|")
        if job.isdigit() and int(job) in jobs:
            found.setdefault(int(job), []).append(Task(int(job), *rest))
    return found


def alive(record: Record, tasks: Mapping[int, list[Task]]) -> bool:
    """Whether all of a stage was submitted, and the job that ends it is still to come."""
    whole = bool(record.jobs) and record.jobs[-1]["what"] == record.stage.kind.last
    return whole and any(task.alive for task in tasks.get(record.last, []))


def submit_job(
    state: State, record: Record, row: dict[str, Any], script: Path, words: list[str], options: list[str], after: str
) -> int:
    """Submit a job of a stage and remember it. Returns its number; raises `UserError` if Slurm refuses.

    It is noted before, by a comment that it carries: sbatch may be killed, or give up on a busy controller, that has
    the job nevertheless. `settle` finds out.
    """
    row = {**row, "job": 0, "token": f"vitscale-{secrets.token_hex(8)}"}
    own = any(option.startswith("--comment") for option in options)
    record.jobs.append(row)
    state.write()
    row["job"] = submit(script, words, [*options, *([] if own else [f"--comment={row['token']}"])], after)
    row["log"] = row["log"].replace("%A", str(row["job"])).replace("%j", str(row["job"]))
    state.write()
    return row["job"]


def settle(state: State) -> None:
    """Give the jobs whose submission was cut short their numbers; forget those that Slurm never got."""
    unknown = {row["token"]: row for record in state.records.values() for row in record.jobs if not row["job"]}
    if not unknown:
        return
    for line in client(["squeue", "--states=all", "--noheader", "--format=%F|%k"], "squeue").splitlines():
        job, _, comment = line.strip().partition("|")
        if comment in unknown:
            unknown[comment]["job"] = int(job)
            unknown[comment]["log"] = unknown[comment]["log"].replace("%A", job).replace("%j", job)
    for record in state.records.values():
        record.jobs = [row for row in record.jobs if row["job"]]


@contextmanager
def locked(logs: Path) -> Iterator[None]:
    """Hold a chain's folder while it is submitted or cancelled. Raises `UserError`."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        file = (logs / ".chain.lock").open("w")
    except OSError as error:
        raise _unwritable(logs, error) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError("logs", f"{logs}, in use by another command", "a free one", "Wait for it.") from error
        yield


def known_state(logs: Path) -> State:
    """The state in a folder. Raises `UserError` if there is none."""
    state = read_state(logs)
    if state is None:
        raise UserError(
            "CHAIN_OR_FOLDER", f"{logs}, where nothing was submitted", "a chain that was", "Submit it first."
        )
    return state


def cancel_jobs(jobs: list[int]) -> None:
    """Cancel jobs by their numbers, the last first, so that none begins meanwhile. Raises `UserError`."""
    if jobs:
        client(["scancel", *map(str, sorted(jobs, reverse=True))], "scancel")


def _unwritable(logs: Path, error: OSError) -> UserError:
    return UserError("logs", f"{logs} ({error.strerror})", "a folder that can be written", "Choose another.")
