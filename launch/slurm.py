"""Slurm: the settings `slurm.…`, and what is asked of its clients, each within a time and with errors as paragraphs."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from vitscale.errors import UserError
from vitscale.pipeline.config import require, require_choice

TIMEOUT = 60.0  # seconds for a client: a busy controller answers within its own MessageTimeout, of 10 s by default
CHECK = "Ask `sinfo`, and the people who run the cluster if it does not answer."
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
NODES = re.compile(r"(\d+)(?:-(\d+))?")
OWN_OPTIONS = ("--nodes", "--ntasks", "--ntasks-per-node", "--output", "--error", "--signal", "--array", "--wrap")


@dataclass(frozen=True)
class SlurmConfig:
    """`slurm.` – what is asked of Slurm; empty settings are left to the cluster's defaults.

    `nodes`: a number, or `2-8` for as many as there are. A rank has one GPU; without GPUs (`gpus_per_node=0`) there are
    `tasks_per_node` ranks on a node. `cpus_per_task`: cores of a rank; by default one, and one for each of
    `data.workers`. `signal_seconds` before the time limit the run saves and is requeued: let it be
    longer than a step and a save. `time`: `24:00:00`, `7-00` or minutes.

    `modules` are loaded, and `setup`, a line of bash, is run before the ranks are started. `container`: an image for
    `container_runtime`, pyxis or apptainer, with `mounts` (`/data` or `/data:/data`). `command`: the vitscale of the
    nodes; by default the one that submits, in a container that on its PATH. `logs`: a folder; by default `logs` in
    run.dir. `exclude_failed`: do not go on on a node whose rank was killed or hung, or that
    the check before training finds unfit; `doctor=false` leaves that out. `options`: more options of sbatch.
    """

    nodes: Any = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    tasks_per_node: int = 0
    cpus_per_task: int = 0
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    signal_seconds: int = 180
    exclude: str = ""
    constraint: str = ""
    reservation: str = ""
    mail: str = ""
    stage: str = "pretrain"
    requeue: bool = True
    exclude_failed: bool = False
    doctor: bool = True
    modules: list[str] = field(default_factory=list)
    setup: str = ""
    container: str = ""
    container_runtime: str = "pyxis"
    mounts: list[str] = field(default_factory=list)
    command: str = ""
    logs: str = ""
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = NODES.fullmatch(str(self.nodes))
        sound = bool(found) and 0 < self.fewest <= self.most
        require(sound, "slurm.nodes", self.nodes, "a number of nodes, or MIN-MAX", "slurm.nodes=2, say.")
        for key in ("gpus_per_node", "tasks_per_node", "cpus_per_task"):
            value = getattr(self, key)
            require(value >= 0, f"slurm.{key}", value, "0 or more", "Leave it out for the default.")
        got = f"{self.tasks_per_node} with {self.gpus_per_node} GPUs a node"
        one_each = self.tasks_per_node in (0, self.gpus_per_node) or not self.gpus_per_node
        require(one_each, "slurm.tasks_per_node", got, "one task for each GPU", "Leave it out.")
        require(self.signal_seconds > 0, "slurm.signal_seconds", self.signal_seconds, "at least 1 s", "180, say.")
        limit = minutes(self.time, "slurm.time") * 60
        remedy = "Ask for more time, or lower slurm.signal_seconds."
        got = f"{self.time!r} with slurm.signal_seconds {self.signal_seconds}"
        # Slurm signals up to a minute earlier than it was asked to
        require(limit > self.signal_seconds + 60, "slurm.time", got, "a minute more than that at least", remedy)
        require_choice("slurm.stage", self.stage, ("pretrain", "finetune"))
        require_choice("slurm.container_runtime", self.container_runtime, ("pyxis", "apptainer"))
        got = ", ".join(self.mounts)
        require(bool(self.container) or not self.mounts, "slurm.mounts", got, "slurm.container beside it", "Add it.")
        for option in self.options:
            name = option.split("=")[0]
            require(option.startswith("--"), "slurm.options", option, "--name=value", "Write it as sbatch has it.")
            require(name not in OWN_OPTIONS, "slurm.options", option, "none that vitscale decides", "Leave it out.")

    @property
    def fewest(self) -> int:
        """Nodes at least."""
        return int(str(self.nodes).split("-")[0])

    @property
    def most(self) -> int:
        """Nodes at most."""
        return int(str(self.nodes).split("-")[-1])

    @property
    def tasks(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node or self.tasks_per_node or 1


@dataclass(frozen=True)
class Partition:
    """A partition: its nodes that are not down, what a job may take of them, and the most that one node has."""

    name: str
    up: bool
    default: bool
    nodes: int
    gpus: int
    cpus: int
    most_minutes: float


def submit(script: Path, arguments: list[str], options: list[str], dependency: str = "") -> int:
    """Submit `script arguments` with sbatch's `options`; returns the job's number.

    `dependency` is Slurm's, such as `afterok:12`. Raises `UserError` with what sbatch says against it.
    """
    return int(client(submission(script, arguments, options, dependency), "slurm.options").split(";")[0])


def submission(script: Path, arguments: list[str], options: list[str], dependency: str = "") -> list[str]:
    """The words of the command that `submit` runs."""
    after = [f"--dependency={dependency}"] if dependency else []
    return ["sbatch", "--parsable", *after, *options, str(script), *arguments]


def partitions() -> dict[str, Partition]:
    """The partitions of the cluster by name. Raises `UserError` if Slurm does not answer."""
    told = [_pairs(row) for row in client(["scontrol", "show", "partition", "--oneliner"], "slurm").splitlines()]
    nodes: dict[str, list[tuple[int, int]]] = {}
    for row in client(["sinfo", "--noheader", "--Node", "--format=%R|%c|%G|%T"], "slurm").splitlines():
        name, cpus, gres, state = row.strip().split("|")
        if not state.startswith(("down", "drained", "fail")):
            gpus = sum(int(count) for count in re.findall(r"gpu(?::[\w.-]*[A-Za-z][\w.-]*)?:(\d+)", gres))
            nodes.setdefault(name, []).append((int(cpus.rstrip("+")), gpus))
    found = {}
    for pairs in told:
        name, most = pairs["PartitionName"], pairs.get("MaxNodes", "UNLIMITED")
        own = nodes.get(name, [])
        found[name] = Partition(
            name=name,
            up=pairs.get("State") == "UP",
            default=pairs.get("Default") == "YES",
            nodes=min(len(own), int(most)) if most.isdigit() else len(own),
            gpus=max((gpus for _, gpus in own), default=0),
            cpus=max((cpus for cpus, _ in own), default=0),
            most_minutes=minutes(pairs.get("MaxTime", ""), "MaxTime"),
        )
    return found


def client(words: list[str], setting: str, env: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's clients prints. Raises `UserError`, on `setting`, if it is missing, fails or hangs."""
    if not shutil.which(words[0]):
        got = f"no `{words[0]}` on PATH"
        remedy = "Submit from a login node, or train on this machine with `vitscale pretrain … --nproc N`."
        raise UserError("slurm", got, "Slurm's commands", remedy)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **(env or {})})
    except subprocess.TimeoutExpired as error:
        raise UserError("slurm", f"no answer of `{words[0]}` in {TIMEOUT:g} s", "one", CHECK) from error
    if done.returncode:
        said = " ".join(re.sub(rf"\b{words[0]}: (error: )?", "", done.stderr or done.stdout).split())
        expected = "an answer" if setting == "slurm" else "what the cluster allows"
        raise UserError(setting, f"`{words[0]}` says: {said.rstrip('.')}", expected, CHECK)
    return done.stdout


def minutes(text: str, setting: str) -> float:
    """Slurm's time in minutes: `90`, `1:30` (minutes, seconds), `24:00:00`, `7-00`, `UNLIMITED`; inf where empty."""
    if not text or text.upper() in ("UNLIMITED", "INFINITE"):
        return inf
    found = TIME.fullmatch(text)
    require(bool(found), setting, repr(text), "24:00:00, 7-00 or minutes", "Write it as sbatch has it.")
    assert found
    days, *rest = (None if part is None else int(part) for part in found.groups())
    first, second, third = rest[0] or 0, rest[1], rest[2]
    if days is not None:
        return days * 1440 + first * 60 + (second or 0) + (third or 0) / 60
    if third is not None:
        return first * 60 + (second or 0) + third / 60
    return first + (second or 0) / 60


def shown(words: list[str]) -> str:
    """A command as one would type it."""
    return shlex.join(words)


def _pairs(row: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in row.split() if "=" in word)
