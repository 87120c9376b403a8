"""What a kind of stage is to a chain: what it reads and makes, if that is complete, its jobs; and those of data."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.publish import publish_text
from vitscale.data_prep.shard import STAGES
from vitscale.errors import UserError
from vitscale.launch.slurm import SlurmConfig
from vitscale.pipeline.config import Config, require
from vitscale.pipeline.recipe import compose_overrides


@dataclass(frozen=True)
class Job:
    """A job of a stage: `what` it does, for `vitscale launch step`, and its number of tasks; 0: it is no array."""

    what: str
    tasks: int = 0
    retries: bool = True
    dependency: str = "afterok"


def read_by(config: Config) -> Iterator[tuple[str, str]]:
    """Settings of a recipe and the paths that training reads by them."""
    yield from (("data.train", path) for path, _ in config.data.mixture)
    named = {"data.val": config.data.val, "init_from": config.init_from,
             "eval.suites_data": config.eval.suites_data, "eval.suites_train": config.eval.suites_train}  # fmt: skip
    yield from ((setting, path) for setting, path in named.items() if path)


@dataclass(frozen=True)
class Kind:
    """A kind of stage with its settings. `ranks`: it may run as several ranks on several nodes."""

    name: ClassVar[str]
    ranks: ClassVar[bool] = False

    def record(self) -> dict[str, Any]:
        """Its settings as JSON has them."""
        return json.loads(json.dumps(asdict(self)))

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        """Raise `UserError` for what can be known to fail, without a look at data."""

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Settings and paths that it reads."""
        yield from ()

    def outputs(self) -> list[str]:
        """Folders that it makes."""
        return []

    def jobs(self) -> list[Job]:
        """What is submitted, each after the one before."""
        return [Job(self.name)]

    @property
    def last(self) -> str:
        """What its last job does."""
        return self.jobs()[-1].what

    def complete(self, logs: Path, stage: str) -> bool:
        """Whether what it makes is there, by cheap means. Raises `UserError` if it is of other settings."""
        raise NotImplementedError

    def words(self, what: str, task: int) -> list[str]:
        """Words of the command `vitscale` of one of its jobs, and of task `task` (from 1) of an array."""
        raise NotImplementedError

    def done(self, logs: Path, stage: str, task: int) -> None:
        """Note that a task's command succeeded, for kinds that leave nothing else."""


@dataclass(frozen=True)
class ShardKind(Kind):
    """Images → shards; with `array` in so many parts. A part that fails is tried `retries` more times."""

    source: str
    out: str
    array: int = 0
    retries: int = 2
    settings: tuple[str, ...] = ()
    name: ClassVar[str] = "shard"

    @property
    def config(self) -> ShardConfig:
        return compose_overrides(ShardConfig, list(self.settings))

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        _ = self.config

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "source", self.source
        yield from (("dedup.against", path) for path in self.config.dedup.against)

    def outputs(self) -> list[str]:
        return [self.out]

    def jobs(self) -> list[Job]:
        if not self.array:
            return [Job("shard")]
        stages = [name for name in STAGES if name != "match" or self.config.dedup.near]
        return [*(Job(name, self.array) for name in stages), Job("publish")]

    def complete(self, logs: Path, stage: str) -> bool:
        from vitscale.data_prep.manifest import DATASET_FILE, read_dataset

        if "://" not in self.out and not Path(self.out, DATASET_FILE).exists():
            return False
        try:
            info = read_dataset(self.out, "OUT").info
        except UserError:
            return False
        wanted = asdict(self.config)
        made = [{**part["settings"], "seed": part["seed"], "split": info["split"]} for part in info["parts"]]
        same = any(all(part.get(key) == wanted[key] for key in part if key in wanted) for part in made)
        require(same, f"{stage}.out", f"{self.out}, a dataset of other settings", "a new folder, or one of these",
                "Choose another folder, or remove this one if you no longer need it.")  # fmt: skip
        return True

    def words(self, what: str, task: int) -> list[str]:
        # as many processes as the task has CPUs: not every Slurm binds a task to them
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or "0"
        workers = [] if any(word.startswith("workers=") for word in self.settings) else [f"workers={cpus}"]
        command = ["shard", self.source, self.out, *self.settings, *workers]
        if what == "publish":
            return [*command, "--publish"]
        return [*command, "--stage", what, "--part", f"{task}/{self.array}"] if self.array else command


@dataclass(frozen=True)
class VerifyKind(Kind):
    """Every shard and image of a dataset checked; with `array` in so many parts."""

    dataset: str
    array: int = 0
    retries: int = 0  # what is damaged stays so
    name: ClassVar[str] = "verify"

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "dataset", self.dataset

    def jobs(self) -> list[Job]:
        return [Job("verify", self.array)]

    def complete(self, logs: Path, stage: str) -> bool:
        markers = [self._marker(logs, stage, task) for task in range(1, max(self.array, 1) + 1)]
        if not all(marker.exists() for marker in markers):
            return False
        return {marker.read_text() for marker in markers} == {self._fingerprint()}

    def words(self, what: str, task: int) -> list[str]:
        return ["verify", self.dataset, *(["--part", f"{task}/{self.array}"] if self.array else [])]

    def done(self, logs: Path, stage: str, task: int) -> None:
        publish_text(self._marker(logs, stage, task), self._fingerprint())

    def _marker(self, logs: Path, stage: str, task: int) -> Path:
        return logs / f"{stage}-{task if self.array else 1}-of-{max(self.array, 1)}.verified"

    def _fingerprint(self) -> str:
        from vitscale.data_prep.manifest import read_dataset

        try:
            return read_dataset(self.dataset).fingerprint
        except UserError:
            return ""


def run_complete(config: Config) -> bool:
    """Whether a run is at its last step, or ended early. Raises `UserError` if its folder holds one of another
    recipe."""
    if "://" not in config.run.dir and not Path(config.run.dir, "checkpoints").exists():
        return False
    from vitscale.pipeline import checkpoint
    from vitscale.pipeline.mirror import working_folder
    from vitscale.pipeline.planner import find_resume
    from vitscale.pipeline.run_folder import complete
    from vitscale.pipeline.schedule import parse_duration

    newest, _ = checkpoint.newest_sound(working_folder(config.run.dir) / "checkpoints")
    if newest is None:
        return False
    state = checkpoint.read_state(newest)
    find_resume(config, state["dataset"]["fingerprint"])
    sizes = {"samples": state["dataset"]["samples"], "global_batch": config.train.global_batch}
    return complete(state, parse_duration(config.train.duration, "train.duration", **sizes), config.eval.patience)


def inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or in it."""
    path, folder = (each if "://" in each else os.path.abspath(each) for each in (path, folder))
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")
