"""A grid: the runs of all combinations of some settings, and a table of what came of them, the best first."""

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.launch.chain_stages import Job, Kind, run_complete
from vitscale.launch.recipes import RECIPES
from vitscale.launch.slurm import SlurmConfig
from vitscale.launch.slurm_submit import Submission, prepare
from vitscale.pipeline.config import Config, require
from vitscale.pipeline.recipe import load_recipe

RUNS, TABLE = "runs", "table"  # the jobs of a grid
RESULTS = "results.json"
MOST = 10_000  # runs; a Slurm array has at most 1,001 tasks unless the cluster was set up for more
SCORES = ("top1", "ema_top1", "map", "ema_map")  # of the last evaluation, the higher the better


@dataclass(frozen=True)
class Run:
    """A run of a grid: its number from 1, the settings that make it, by key, and its folder."""

    number: int
    settings: dict[str, str]
    folder: str

    @property
    def words(self) -> list[str]:
        """Settings for the recipe."""
        return [*(f"{key}={value}" for key, value in self.settings.items()), f"run.dir={self.folder}"]


@dataclass(frozen=True)
class GridKind(Kind):
    """All combinations of `vary`, such as `optim.lr=[1e-3, 3e-3]`, each a run in a folder of its own in run.dir.

    At most `at_once` of them at a time (0: as many as the cluster has room for).
    """

    recipe: str
    vary: tuple[str, ...]
    settings: tuple[str, ...] = ()
    at_once: int = 0
    name: ClassVar[str] = "grid"
    ranks: ClassVar[bool] = True

    @cached_property
    def folder(self) -> str:
        """run.dir, which holds the folders of the runs."""
        return self.config().run.dir.rstrip("/")

    @cached_property
    def runs(self) -> list[Run]:
        """The combinations, the last setting changing fastest. Raises `UserError`."""
        values = dict(_values(word) for word in self.vary)
        require(
            len(values) == len(self.vary), "--grid", ", ".join(self.vary), "each setting once", "Join their values."
        )
        total = math.prod(len(each) for each in values.values())
        require(total <= MOST, "--grid", f"{total:,} combinations", f"at most {MOST:,}", "Vary less at once.")
        rows = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
        names = [run_name(row) for row in rows]
        return [
            Run(number, row, f"{self.folder}/{name}" if names.count(name) == 1 else f"{self.folder}/{name}-{number}")
            for number, (row, name) in enumerate(zip(rows, names, strict=True), start=1)
        ]

    def config(self, run: Run | None = None) -> Config:
        """The recipe of a run, or of none."""
        return load_recipe(self.recipe, [*self.settings, *(run.words if run else [])], RECIPES)

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        require(bool(self.folder), "run.dir", "nothing", "a folder for all runs", "Add run.dir=PATH.")
        require("://" not in self.folder, "run.dir", self.folder, "a folder that all nodes see", "Choose a path.")
        require(bool(self.config().data.mixture), "data.train", "nothing", "a folder", "Add data.train=PATH.")
        for run in self.runs:
            self.prepare_run(run, [f"slurm.gpus_per_node={slurm.gpus_per_node}"])

    def prepare_run(self, run: Run, slurm_words: list[str]) -> Submission:
        """What would be submitted for a run by itself. Raises `UserError` for what it cannot be."""
        stage = "finetune" if self.config(run).init_from else "pretrain"
        return prepare(self.recipe, [*self.settings, *run.words, *slurm_words, f"slurm.stage={stage}"])

    def inputs(self) -> Iterator[tuple[str, str]]:
        config = self.config()
        named = [*(("data.train", path) for path, _ in config.data.mixture), ("data.val", config.data.val)]
        yield from ((setting, path) for setting, path in [*named, ("init_from", config.init_from)] if path)

    def outputs(self) -> list[str]:
        return [self.folder]

    def jobs(self) -> list[Job]:
        missing = [Job(RUNS, len(self.missing()))] if self.missing() else []
        return [*missing, Job(TABLE, retries=False, dependency="afterany")]

    def missing(self) -> list[int]:
        """Numbers of the runs that are not at their last step."""
        return [run.number for run in self.runs if not run_complete(self.config(run))]

    def complete(self, logs: Path, stage: str) -> bool:
        try:
            rows = json.loads(Path(self.folder, RESULTS).read_text())["runs"]
        except (OSError, ValueError, KeyError):
            return False
        told = {row["run"] for row in rows if row["state"] == "finished"}
        return told == {run.folder for run in self.runs} and not self.missing()

    def write_words(self, folder: Path, slurm_words: list[str], skip: str) -> None:
        """Leave the words of `pretrain.sbatch` for each run in a file by its number, each word ended by a NUL."""
        folder.mkdir(parents=True, exist_ok=True)
        for run in self.runs:
            made = [*self.prepare_run(run, slurm_words).arguments, *([f"slurm.setup={skip}"] if skip else [])]
            publish_text(folder / str(run.number), "".join(f"{word}\0" for word in made))

    def write_table(self, say: Callable[[str], None] = print) -> int:
        """Write `results.json` and `results.md` into run.dir, and say the table; 1 if a run is not finished, else 0."""
        rows = sorted((result(run, self.config(run)) for run in self.runs), key=_order)
        table = markdown(rows)
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            publish_text(Path(self.folder, RESULTS), json.dumps({"recipe": self.recipe, "runs": rows}, indent=1) + "\n")
            publish_text(Path(self.folder, "results.md"), table)
        except OSError as error:
            raise UserError("run.dir", f"{error}", "a folder that can be written", "Choose another.") from error
        say(table.rstrip())
        return int(any(row["state"] != "finished" for row in rows))

    def run_here(self, nproc: int, say: Callable[[str], None]) -> int:
        """Do the runs one after another on this machine, on `nproc` processes each; then `write_table`."""
        for run in self.runs:
            if run_complete(self.config(run)):
                say(f"{run.folder}: complete already")
                continue
            say(f"{run.folder}: {', '.join(run.words[:-1])}")
            stage = "finetune" if self.config(run).init_from else "pretrain"
            words = [stage, self.recipe, *self.settings, *run.words, "--nproc", str(nproc)]
            done = subprocess.run([sys.executable, "-P", "-m", "vitscale.launch.cli", *words])
            if done.returncode:
                say(f"{run.folder}: ended with exit code {done.returncode}")
        return self.write_table(say)


def run_name(settings: dict[str, str]) -> str:
    """A name of a folder: `lr=.001,seed=2`; the sections are left out where that leaves the keys apart."""
    short = [key.rsplit(".", 1)[-1] for key in settings]
    keys = short if len(set(short)) == len(short) else list(settings)
    name = ",".join(f"{key}={value}" for key, value in zip(keys, settings.values(), strict=True))
    return re.sub(r"[^\w.,=+%-]+", "-", name)[:120]


def result(run: Run, config: Config) -> dict[str, Any]:
    """A row of the table: settings, state, steps, and the last loss and evaluation of the log."""
    row: dict[str, Any] = {"run": run.folder, "settings": run.settings, "state": "not begun", "step": 0}
    try:
        from vitscale.pipeline.status import read_status

        status = read_status(run.folder)
    except UserError:
        return row
    row |= {"state": status.state, "step": status.step, "train_loss": status.train.get("loss")}
    if run_complete(config):
        row["state"] = "finished"
    return row | {f"val_{key}": value for key, value in status.evaluation.items() if key in ("loss", *SCORES)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: settings, then what was measured."""
    keys = list(rows[0]["settings"])
    measured = [key for key in ("val_top1", "val_ema_top1", "val_map", "val_ema_map", "val_loss", "train_loss")
                if any(row.get(key) is not None for row in rows)]  # fmt: skip
    head = [*keys, *(key.replace("_", " ") for key in measured), "step", "state", "run"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        values = [_number(row.get(key)) for key in measured]
        lines.append([*row["settings"].values(), *values, f"{row['step']:,}", row["state"], row["run"]])
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """The best first: finished ones by their score, then by their loss."""
    scores = [row[f"val_{key}"] for key in SCORES if row.get(f"val_{key}") is not None]
    loss = next((row[key] for key in ("val_loss", "train_loss") if row.get(key) is not None), math.inf)
    return row["state"] != "finished", -max(scores, default=-math.inf), loss


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _values(word: str) -> tuple[str, list[str]]:
    """Key and values of `optim.lr=[1e-3, 3e-3]`, as they are written. Raises `UserError`."""
    key, _, text = word.partition("=")
    try:
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        values = None
    sound = bool(key) and isinstance(values, list) and bool(values)
    require(sound, "--grid", repr(word), "SETTING=[VALUE, …]", "Quote it for the shell.")
    require(key != "run.dir", "--grid", word, "settings of training", "run.dir is the folder of all runs.")
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    require(len(set(texts)) == len(texts), "--grid", word, "values that differ", "Take one out.")
    return key, texts
