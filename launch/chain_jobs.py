"""A chain's jobs: what is submitted, what of that is alive, and the file that remembers it between commands."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitscale.launch import slurm_submit
from vitscale.launch.chain import Chain, Stage, made_here
from vitscale.launch.chain_stages import Job
from vitscale.launch.chain_state import (
    OVER,
    Record,
    State,
    Task,
    alive,
    cancel_jobs,
    known_state,
    locked,
    read_state,
    settle,
    submit_job,
    tasks_of,
)
from vitscale.launch.chain_training import TRAIN, TrainKind
from vitscale.launch.grid import FINAL, RESULTS, RUNS, TABLE, GridKind
from vitscale.launch.slurm import partitions, shown, submission
from vitscale.pipeline.config import Config, RunConfig, require

STEP = Path(__file__).with_name("step.sbatch")
SKIP = 'if "$command" launch step {} --check; then exit 0; fi'  # for pretrain.sbatch's `slurm.setup`


def submit_chain(chain: Chain, file: str, say: Callable[[str], None]) -> State:
    """Submit what is neither complete nor on its way, each stage after those that it waits for; say what was done.

    Raises `UserError` for what cannot be, before anything is submitted.
    """
    with locked(chain.logs):
        state = read_state(chain.logs) or State(chain.logs, str(Path.cwd()), file, {})
        require(state.folder == str(Path.cwd()), "logs", f"{chain.logs}, of a chain in {state.folder}",
                "a folder of its own", f"Change to {state.folder}, or choose another.")  # fmt: skip
        settle(state)
        tasks = tasks_of(state.jobs())
        complete, going = _sort(chain, state, tasks)
        todo = [stage for stage in chain.stages if stage.name not in complete and stage.name not in going]
        check_stages(chain, todo)
        _clear_away(chain, state, tasks, [stage.name for stage in todo])
        state.records = {stage.name: state.records.get(stage.name, Record(stage)) for stage in chain.stages}
        state.chain = file
        for stage in chain.stages:
            record = state.records[stage.name]
            if stage.name in complete:
                state.records[stage.name] = replace(record, stage=stage)
                say(f"{stage.name}: complete already")
            elif stage.name in going:
                say(f"{stage.name}: job {record.last} is on its way already")
            else:
                made = Record(stage, [], datetime.now(UTC).isoformat(timespec="seconds"))
                state.records[stage.name] = made
                _submit_stage(chain, made, state, complete)
                say(f"{stage.name}: {', '.join(_named(row) for row in made.jobs)}")
        state.write()
    return state


def _clear_away(chain: Chain, state: State, tasks: Mapping[int, list[Task]], todo: list[str]) -> None:
    """Cancel what is still queued of stages that are submitted anew. Raises `UserError` if one of them runs."""
    left = []
    for name, record in state.records.items():
        if name in todo or name not in [stage.name for stage in chain.stages]:
            for row in record.jobs:
                states = {task.state for task in tasks.get(row["job"], [])} - set(OVER)
                got = f"{name}, of which job {row['job']} is running, while it would be submitted anew"
                remedy = "Wait for it, or `vitscale cancel` first."
                require(states <= {"PENDING"}, "CHAIN", got, "a stage that is not running", remedy)
                left += [row["job"]] if states else []
    cancel_jobs(left)


def _sort(chain: Chain, state: State, tasks: Mapping[int, list[Task]]) -> tuple[set[str], set[str]]:
    """Names of the stages that are complete, and of those that are on their way with nothing new before them."""
    complete: set[str] = set()
    going: set[str] = set()
    for stage in chain.stages:
        if stage.kind.complete(chain.logs, stage.name):
            complete.add(stage.name)
            continue
        record = state.records.get(stage.name)
        if record is None or not alive(record, tasks):
            continue
        if all(each.name in complete or each.name in going for each in chain.before(stage)):
            same = record.stage.record() == stage.record()
            got = f"{stage.name}, which is on its way with other settings (job {record.last})"
            require(same, "CHAIN", got, "the settings that it was submitted with", "`vitscale cancel` it first.")
            going.add(stage.name)
    return complete, going


def check_stages(chain: Chain, stages: list[Stage]) -> None:
    """Raise `UserError` for stages that no partition can run, and recipes that do not fit the data that is there."""
    found = partitions() if stages else {}
    for stage in stages:
        slurm_submit.check_fits(stage.slurm, found)
        if isinstance(stage.kind, TrainKind) and not made_here(chain, stage):
            slurm_submit.check_recipe(stage.slurm, stage.kind.config)
        if isinstance(stage.kind, GridKind) and not made_here(chain, stage):
            for nodes in sorted({stage.slurm.fewest, stage.slurm.most}):
                stage.kind.check_data(nodes * stage.slurm.tasks)


def _submit_stage(chain: Chain, record: Record, state: State, complete: set[str]) -> None:
    stage = record.stage
    before = sorted(_last_jobs(chain, stage, state, complete))
    for number, job in enumerate(stage.kind.jobs()):
        dependency = dependency_of(job if number else None, before)
        script, arguments, options, log = prepare_job(chain.logs, stage, job)
        if isinstance(stage.kind, GridKind) and job.what == RUNS:
            _write_words(chain.logs, stage, RUNS)
        row = {"what": job.what, "tasks": job.tasks, "log": log}
        before = [submit_job(state, record, row, script, arguments, options, dependency)]


def _write_words(logs: Path, stage: Stage, what: str) -> None:
    """Leave the words of the runs of a grid, or of its final one, where the tasks of `prepare_job` look for them."""
    assert isinstance(stage.kind, GridKind)
    skip = "" if stage.slurm.container else SKIP.format(shown([str(logs), stage.name, what]))
    runs = stage.kind.runs if what == RUNS else [stage.kind.final()]
    stage.kind.write_words(logs / f"{stage.name}.words", runs, list(stage.slurm_words), skip)


def dependency_of(job: Job | None, before: list[int]) -> str:
    """Slurm's word for what a job waits for; the first job of a stage (None) waits for all to succeed."""
    kind = job.dependency if job else "afterok"
    return ":".join([kind, *map(str, before)]) if before else ""


def _last_jobs(chain: Chain, stage: Stage, state: State, complete: set[str]) -> set[int]:
    """The jobs that a stage waits for; through a stage that is complete, those that it would have waited for."""
    by_name, found = {each.name: each for each in chain.stages}, set()
    for name in stage.after:
        found |= _last_jobs(chain, by_name[name], state, complete) if name in complete else {state.records[name].last}
    return found


def prepare_job(logs: Path, stage: Stage, job: Job) -> tuple[Path, list[str], list[str], str]:
    """Script, its words, sbatch's options and the log of a job of a stage. Submits nothing."""
    place, slurm = [str(logs), stage.name], stage.slurm
    many = f"{job.tasks} tasks" if job.tasks else ""
    log = str(logs / f"{stage.name}-{job.what}-{'%A_%a' if job.tasks else '%j'}.out")
    more = ["--kill-on-invalid-dep=yes", f"--job-name={stage.name}-{job.what}" if many else f"--job-name={stage.name}"]
    if isinstance(stage.kind, TrainKind):
        words = [*stage.kind.settings, *stage.slurm_words, f"slurm.stage={stage.kind.name}"]
        prepared = slurm_submit.prepare(stage.kind.recipe, words)
        skip = [] if slurm.container else [f"slurm.setup={SKIP.format(shown([*place, TRAIN]))}"]
        options = [*prepared.options, *more, f"--output={log}"]
        return slurm_submit.SCRIPT, [*prepared.arguments, *skip], options, log
    if isinstance(stage.kind, GridKind) and job.what in (RUNS, FINAL):
        numbers = ",".join(map(str, stage.kind.numbers(job.what)))
        more.append(f"--array={numbers}{f'%{stage.kind.at_once}' if stage.kind.at_once else ''}")
        words = [f"slurm.words={logs / f'{stage.name}.words'}"]
        options = stage.kind.prepare_run(stage.kind.runs[0], list(stage.slurm_words)).options
        return slurm_submit.SCRIPT, words, [*options, *more, f"--output={log}"], log
    if isinstance(stage.kind, GridKind) and job.what in (TABLE, RESULTS):
        slurm = replace(slurm, nodes=1, gpus_per_node=0, gpu_type="", tasks_per_node=0, cpus_per_task=1)
    slurm = replace(slurm, cpus_per_task=slurm.cpus_per_task or 1 + getattr(stage.kind, "workers", 0))
    more += [f"--array=1-{job.tasks}"] if job.tasks else []
    own = [f"slurm.logs={logs}", f"slurm.retries={getattr(stage.kind, 'retries', 0) if job.retries else 0}"]
    words = [*slurm_submit.arguments(slurm), *own, "launch", "step", *place, job.what]
    named = Config(run=RunConfig(dir=stage.name))
    return STEP, words, [*slurm_submit.options(slurm, named, logs), *more, f"--output={log}"], log


def dry_run(chain: Chain, say: Callable[[str], None]) -> None:
    """Say the commands that would submit all stages, were none of them complete, as lines for a shell."""
    for stage in chain.stages:
        waits = [f"${_variable(name)}" for name in stage.after]
        for number, job in enumerate(stage.kind.jobs()):
            script, arguments, options, _ = prepare_job(chain.logs, stage, job)
            kind = job.dependency if number else "afterok"
            words = submission(script, arguments, options, ":".join([kind, *waits]) if waits else "")
            said = " ".join(word if word.startswith("--dependency=") else shown([word]) for word in words)
            say(f"{_variable(stage.name)}=$({said})")
            waits = [f"${_variable(stage.name)}"]


def _variable(name: str) -> str:
    return re.sub(r"\W", "_", name)


def cancel_chain(logs: Path) -> dict[str, list[int]]:
    """Cancel all of a chain that is queued or running; returns the jobs by stage. Raises `UserError`."""
    with locked(logs):
        state = known_state(logs)
        settle(state)
        tasks = tasks_of(state.jobs())
        left = {
            name: [
                row["job"] for row in record.jobs if any(task.state not in OVER for task in tasks.get(row["job"], []))
            ]
            for name, record in state.records.items()
        }
        cancel_jobs([job for jobs in left.values() for job in jobs])
    return {name: jobs for name, jobs in left.items() if jobs}


def do_step(logs: Path, name: str, what: str, check: bool, run: Callable[[list[str]], int]) -> int:
    """What a job of a stage does when it starts: nothing if the stage is complete. Returns the exit code.

    `check` alone answers with 0 if it is, else 1. `run` does a command of vitscale.
    """
    state = known_state(logs)
    os.chdir(state.folder)
    stage, task = state.records[name].stage, int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    grid = stage.kind if isinstance(stage.kind, GridKind) else None
    if grid.job_complete(what, task) if grid else stage.kind.complete(logs, name):
        print(f"{name}: complete already")
        return 0
    if check:
        return 1
    if grid and what in (TABLE, RESULTS):
        code = grid.write_table()
        if what == TABLE and grid.test and not code:
            _write_words(logs, stage, FINAL)
        return code
    code = run(stage.kind.words(what, task))
    if not code:
        stage.kind.done(logs, name, task)
    return code


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['what']} as job {row['job']}" + (f" of {row['tasks']} tasks" if row["tasks"] else "")
