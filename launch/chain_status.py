"""How a chain is doing: each stage's state, why, how far it is, and where its log is."""

import glob
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitscale.errors import UserError
from vitscale.launch.chain_state import NEVER, OVER, STATE_FILE, Record, State, Task, settle, tasks_of
from vitscale.launch.chain_training import TRAIN, TrainKind
from vitscale.launch.grid import RUNS, GridKind
from vitscale.launch.slurm import client

GONE = "unknown to Slurm"
NOISE = ("srun: ", "slurmstepd", "failed with exit code", "all ranks' output", "not requeued")
WORDS = {"BeginTime": "starts again in two minutes", "Resources": "no node is free", "Priority": "others are first"}
TAIL = 64 << 10  # bytes at the end of a log in which an error is looked for


@dataclass(frozen=True)
class JobReport:
    """A job of a stage: how many of its tasks are in which state, why, and its log (a pattern for an array)."""

    job: int
    what: str
    states: dict[str, int]
    reason: str
    log: str


@dataclass(frozen=True)
class StageReport:
    """A stage: `complete`, `running`, `pending`, `failed`, `cancelled`, or `missing` where nothing of it is on its way.

    `progress`: of a training stage what `vitscale status --json` tells; of a grid, runs that are complete and of all.
    """

    name: str
    kind: str
    state: str
    reason: str
    jobs: list[JobReport]
    progress: dict[str, Any]
    log: str


def report(state: State) -> list[StageReport]:
    """Every stage of a chain. Raises `UserError` if Slurm does not answer."""
    settle(state)
    tasks = tasks_of(state.jobs())
    reports: list[StageReport] = []
    with chdir(state.folder):
        for record in state.records.values():
            reports.append(_stage_report(state, record, tasks, reports))
    return reports


def _stage_report(state: State, record: Record, tasks: dict[int, list[Task]], before: list[StageReport]) -> StageReport:
    stage = record.stage
    jobs = [_job_report(row, tasks.get(row["job"], [])) for row in record.jobs]
    try:
        now, reason = ("complete", "") if stage.kind.complete(state.logs, stage.name) else _verdict(jobs)
    except UserError as error:
        now, reason = "missing", str(error)
    if now in ("running", "pending"):
        reasons = {WORDS.get(job.reason, job.reason) for job in jobs if job.reason not in ("", "Dependency")}
        waits = [each.name for each in before if each.name in stage.after and each.state in ("running", "pending")]
        reason = ", ".join(sorted(reasons)) or (f"waits for {', '.join(waits)}" if now == "pending" and waits else "")
    elif now == "cancelled":
        broken = [each.name for each in before if each.name in _closure(state, record) and each.state == "failed"]
        reason = f"{broken[0]} failed" if broken else "by hand, or by the cluster"
    shown = next((job for job in jobs if set(job.states) & {"RUNNING", "FAILED"}), jobs[-1] if jobs else None)
    return StageReport(stage.name, stage.kind.name, now, reason, jobs, _progress(record), shown.log if shown else "")


def _verdict(jobs: list[JobReport]) -> tuple[str, str]:
    """State and reason of a stage that is not complete, of its jobs."""
    found = {name for job in jobs for name in job.states}
    if found - {*OVER, "PENDING", GONE}:
        return "running", ""
    if jobs and "PENDING" in jobs[-1].states:
        return "pending", ""
    for job in jobs:
        if set(job.states) - {"COMPLETED", "CANCELLED", "PENDING", GONE}:
            return "failed", _why(job.log) or f"{job.what}: {', '.join(job.states)}"
    if "CANCELLED" in found:
        return "cancelled", ""
    return "missing", "ended without what it was to make" if "COMPLETED" in found else "submit the chain again"


def _closure(state: State, record: Record) -> set[str]:
    wanted = set(record.stage.after)
    for name in list(wanted):
        wanted |= _closure(state, state.records[name])
    return wanted


def _job_report(row: dict[str, Any], tasks: list[Task]) -> JobReport:
    told = ["CANCELLED" if task.reason == NEVER else task.state for task in tasks] or _account(row["job"]) or [GONE]
    states = Counter(told)
    reasons = sorted({task.reason for task in tasks if task.alive and task.reason not in ("None", "")})
    return JobReport(row["job"], row["what"], dict(states), ", ".join(reasons), row["log"].replace("%a", "*"))


def _account(job: int) -> list[str]:
    """States of a job's tasks that Slurm's database tells, if the cluster keeps one."""
    if not shutil.which("sacct"):
        return []
    try:
        told = client(
            ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State"], "sacct"
        )
    except UserError:  # there is the command, but no database
        return []
    return [line.split()[0] for line in told.splitlines() if line.strip()]


def _progress(record: Record) -> dict[str, Any]:
    kind = record.stage.kind
    if isinstance(kind, GridKind):
        return {"runs": len(kind.runs), "complete": len(kind.runs) - len(kind.missing())}
    if not isinstance(kind, TrainKind):
        return {}
    from vitscale.pipeline.status import read_status

    try:
        return asdict(read_status(kind.config.run.dir))
    except UserError:  # not begun
        return {}


def _why(pattern: str) -> str:
    """The last error in the logs of a job."""
    for path in sorted(glob.glob(pattern), key=os.path.getmtime, reverse=True):
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - TAIL, 0))
            said = file.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in said if line.strip() and not line.startswith(NOISE)]
        if found := [line for line in said if "error: " in line] or said:
            return found[-1]
    return ""


def lines(reports: list[StageReport]) -> Iterator[tuple[str, str]]:
    """What there is to say, as labels and texts."""
    for each in reports:
        numbers = ", ".join(str(job.job) for job in each.jobs)
        said = each.state + (f" ({each.reason})" if each.reason else "")
        yield each.name, said + (f"; job{'s' * (len(each.jobs) > 1)} {numbers}" if numbers else "")
        going = [job for job in each.jobs if len(each.jobs) > 1 or job.what not in (each.kind, TRAIN)]
        if going and each.state != "complete":
            states = [f"{job.what} {_counted(job.states)}" for job in going]
            yield "", ", ".join(states)
        if each.kind == "grid":
            yield "", f"{each.progress['complete']:,} of {each.progress['runs']:,} {RUNS} complete"
        elif each.progress:
            steps = f" of {each.progress['steps']:,}" if each.progress["steps"] else ""
            loss = each.progress["train"].get("loss")
            yield "", f"step {each.progress['step']:,}{steps}" + (f", loss {loss:.4f}" if loss is not None else "")
        if each.log and each.state in ("running", "failed"):
            yield "", each.log


def _counted(states: dict[str, int]) -> str:
    total = sum(states.values())
    if len(states) == 1:
        return next(iter(states)).lower()
    return " ".join(f"{count}/{total} {name.lower()}" for name, count in states.items())


def as_json(state: State, reports: list[StageReport]) -> str:
    """All of it as one JSON object."""
    rows = [asdict(each) for each in reports]
    return json.dumps({"chain": state.chain, "logs": str(state.logs), "stages": rows}, indent=1)


def is_chain(place: str) -> bool:
    """Whether that is the file of a chain, or the folder of its logs, and not a run."""
    path = Path(place)
    return path.suffix in (".yaml", ".yml") or (path / STATE_FILE).is_file()


def logs_of(chain_or_folder: str) -> Path:
    """The folder of logs of a chain: itself, or that which its file names. Raises `UserError`."""
    path = Path(chain_or_folder)
    if path.is_dir():
        return path.absolute()
    from vitscale.launch.chain import load_logs

    return load_logs(chain_or_folder)
