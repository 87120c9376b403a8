"""A grid: the runs of all combinations of some settings, the best of them, and what that is on a test set."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vitscale.data_prep.manifest import read_dataset
from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.launch.chain_stages import Job, Kind, read_by, run_complete
from vitscale.launch.chain_training import EvaluateKind
from vitscale.launch.grid_checks import check_split, check_unseen, check_values, same_images, same_path
from vitscale.launch.grid_table import place, result_line, result_of, row_of, table_of
from vitscale.launch.recipes import RECIPES
from vitscale.launch.slurm import SlurmConfig
from vitscale.launch.slurm_submit import Submission, prepare
from vitscale.pipeline.config import Config, require
from vitscale.pipeline.evaluation import tables
from vitscale.pipeline.recipe import load_recipe

RUNS, TABLE, FINAL, TEST, RESULTS = "runs", "table", "final", "test", "results"  # the jobs of a grid
FILE = "results.json"
MOST = 10_000  # runs; a Slurm array has at most 1,001 tasks unless the cluster was set up for more
# of the final run: all of data.train, and nothing to evaluate on
WHOLE = dict.fromkeys(("data.dev", "data.val", "eval.suites", "eval.suites_data", "eval.suites_train"), "''")


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

    At most `at_once` of them at a time (0: as many as the cluster has room for). With `test`, a dataset, the best
    settings are then trained on the whole of data.train, in `final` of run.dir, and that network is evaluated on it
    (Dosovitskiy et al. 2020, appendix B.1.1). Where no data.dev was held out, the best run is such a network itself.
    """

    recipe: str
    vary: tuple[str, ...]
    settings: tuple[str, ...] = ()
    at_once: int = 0
    test: str = ""
    name: ClassVar[str] = "grid"
    ranks: ClassVar[bool] = True
    workers: ClassVar[int] = 1  # of the evaluation
    retries: ClassVar[int] = 2

    @cached_property
    def folder(self) -> str:
        """run.dir, which holds the folders of the runs."""
        return self.config().run.dir.rstrip("/")

    @cached_property
    def runs(self) -> list[Run]:
        """The combinations, the last setting changing fastest; of nothing varied one, `final`. Raises `UserError`."""
        values = dict(_values(word) for word in self.vary)
        require(
            len(values) == len(self.vary), "--grid", ", ".join(self.vary), "each setting once", "Join their values."
        )
        total = math.prod(len(each) for each in values.values())
        require(total <= MOST, "--grid", f"{total:,} combinations", f"at most {MOST:,}", "Vary less at once.")
        rows = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
        names = [run_name(row) or FINAL for row in rows]
        return [
            Run(number, row, f"{self.folder}/{name}" if names.count(name) == 1 else f"{self.folder}/{name}-{number}")
            for number, (row, name) in enumerate(zip(rows, names, strict=True), start=1)
        ]

    def config(self, run: Run | None = None) -> Config:
        """The recipe of a run, or of none."""
        words = tuple(run.words) if run else ()
        if words not in self._configs:
            self._configs[words] = load_recipe(self.recipe, [*self.settings, *words], RECIPES)
        return self._configs[words]

    @cached_property
    def _configs(self) -> dict[tuple[str, ...], Config]:
        """Those that were composed, by the words of their runs."""
        return {}

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        require(bool(self.folder), "run.dir", "nothing", "a folder for all runs", "Add run.dir=PATH.")
        require("://" not in self.folder, "run.dir", self.folder, "a folder that all nodes see", "Choose a path.")
        configs = {run.folder: self.config(run) for run in self.runs}
        there = all(config.data.mixture for config in configs.values())
        require(there, "data.train", "nothing", "a folder", "Add data.train=PATH.")
        check_split(list(configs.values()), self.test)
        check_values(self.settings, configs, list(self.runs[0].settings))
        if self.test:
            check_unseen(self.test, list(configs.values()), same_path)
        self._check_open()
        for run in self.runs:
            self.prepare_run(run, [f"slurm.gpus_per_node={slurm.gpus_per_node}"])

    def _check_open(self) -> None:
        """Raise `UserError` for another test set than this grid was tested on, and for other runs than a final run was
        chosen from."""
        files = list(Path(self.folder).glob(f"*/evaluations/{TEST}.json"))
        for dataset in (told["dataset"] for told in map(_read, files) if "dataset" in told):
            require(_fingerprint(self.test) in (dataset["fingerprint"], None), "--test", self.test or "nothing",
                    f"{dataset['path']}, which this grid was tested on, once",
                    "Give that, or choose another run.dir.")  # fmt: skip
        final = Path(self.folder, FINAL)
        chosen = {Path(row["run"]).name for row in _read(Path(self.folder, FILE)).get("runs", [])}
        if chosen and (files or final.exists()):
            other = ", ".join(sorted(chosen ^ {Path(run.folder).name for run in self.runs}))
            remedy = "Choose another run.dir" + ("." if files else f", or remove {final}.")
            require(not other, "--grid", f"other runs ({other}) than the test was prepared with", "the same", remedy)

    def check_data(self, ranks: int) -> None:
        """Plan every run on its data, for so many ranks. Raises `UserError` for what can be known to fail."""
        from vitscale.pipeline.data.store import Store, check_classes
        from vitscale.pipeline.planner import plan

        test = Store(self.test, "--test") if self.test else None
        for run in self.runs:
            train = plan(self.config(run), ranks).train
            if test:
                check_classes("--test", test.classes, "data.train", train.classes)
        if test:
            check_unseen(self.test, [self.config(run) for run in self.runs], same_images)

    def prepare_run(self, run: Run, slurm_words: list[str]) -> Submission:
        """What would be submitted for a run by itself. Raises `UserError` for what it cannot be."""
        return prepare(self.recipe, [*self.settings, *run.words, *slurm_words, f"slurm.stage={self.command(run)}"])

    def command(self, run: Run) -> str:
        """The command of vitscale that a run is."""
        return "finetune" if self.config(run).init_from else "pretrain"

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield from dict.fromkeys(pair for run in self.runs for pair in read_by(self.config(run)))
        yield from [("test", self.test)] if self.test else []

    def outputs(self) -> list[str]:
        return [self.folder]

    def jobs(self) -> list[Job]:
        missing = [Job(RUNS, len(self.missing()))] if self.missing() else []
        told = [*missing, Job(TABLE, retries=False, dependency="afterany")]
        return [*told, Job(FINAL, 1), Job(TEST), Job(RESULTS, retries=False)] if self.test else told

    def numbers(self, what: str) -> list[int]:
        """The tasks of the array `RUNS` or `FINAL`."""
        return self.missing() if what == RUNS else [len(self.runs) + 1]

    def missing(self) -> list[int]:
        """Numbers of the runs that are not at their last step."""
        return [run.number for run in self.runs if not run_complete(self.config(run))]

    def job_complete(self, what: str, task: int) -> bool:
        """Whether a job, and task of an array, has nothing to do."""
        if what == RUNS:
            return run_complete(self.config(self.runs[task - 1]))
        if what == FINAL:
            return run_complete(self.config(self.final()))
        return what == TEST and bool(self.tested())

    def complete(self, logs: Path, stage: str) -> bool:
        results = _read(Path(self.folder, FILE))
        told = {row["run"] for row in results.get("runs", []) if row["state"] == "finished"}
        tested = results.get("test", {}).get("dataset", "")
        return told == {run.folder for run in self.runs} and tested == self.test and not self.missing()

    def words(self, what: str, task: int) -> list[str]:
        return self.evaluation(self.final()).words(what, task)

    def write_words(self, folder: Path, runs: list[Run], slurm_words: list[str], skip: str) -> None:
        """Leave the words of `pretrain.sbatch` for each run in a file by its number, each word ended by a NUL."""
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            made = [*self.prepare_run(run, slurm_words).arguments, *([f"slurm.setup={skip}"] if skip else [])]
            publish_text(folder / str(run.number), "".join(f"{word}\0" for word in made))

    def ranked(self) -> list[tuple[Run, dict[str, Any]]]:
        """The runs with their rows, the best first; of equal ones the first."""
        pairs = [(run, row_of(run.settings, self.config(run))) for run in self.runs]
        return sorted(pairs, key=lambda pair: place(pair[1]))

    def final(self) -> Run:
        """The run that the test set is for: the best settings on the whole of data.train, by the number after all runs.

        Raises `UserError` as long as a run is not finished.
        """
        best = self.ranked()[0][0]
        left = ", ".join(self.runs[number - 1].folder for number in self.missing())
        require(not left, "--grid", f"{left}, not at the last step", "finished runs to choose from",
                "Run the same command again, or take its values out.")  # fmt: skip
        (number,) = self.numbers(FINAL)
        if not self.config(best).data.dev:
            return replace(best, number=number)
        return Run(number, {**best.settings, **WHOLE}, f"{self.folder}/{FINAL}")

    def evaluation(self, final: Run) -> EvaluateKind:
        """The evaluation of the final run on the test set."""
        out, device = f"{final.folder}/evaluations/{TEST}.json", self.config(final).engine.device
        return EvaluateKind(final.folder, self.test, out, device=device, workers=self.workers)

    def tested(self) -> dict[str, Any] | None:
        """Results of the final run on the test set; None as long as there are none."""
        try:
            final = self.final()
            kind = self.evaluation(final)
            sound = run_complete(self.config(final)) and kind.complete(Path(), "")
        except UserError:  # not trained yet, or a folder of other settings
            return None
        return result_of(final.folder, self.test, Path(kind.out)) if sound else None

    def write_table(self, say: Callable[[str], None] = print) -> int:
        """Write `results.json` and `results.md` into run.dir, and say the table; 1 if a run is not finished, else 0."""
        rows = [row for _, row in self.ranked()]
        test = self.tested() if self.test else None
        told = {"recipe": self.recipe, "runs": rows, **({"test": test} if test else {})}
        said = f"\n{result_line(test)}\n" if test else ""
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            publish_text(Path(self.folder, FILE), json.dumps(told, indent=1) + "\n")
            publish_text(Path(self.folder, "results.md"), tables.markdown(table_of(rows)) + "\n" + said)
        except OSError as error:
            raise UserError("run.dir", f"{error}", "a folder that can be written", "Choose another.") from error
        say(tables.text(table_of(rows)) + said.rstrip())
        return int(any(row["state"] != "finished" for row in rows))


def run_name(settings: dict[str, str]) -> str:
    """A name of a folder: `lr=.001,seed=2`; the sections are left out where that leaves the keys apart."""
    short = [key.rsplit(".", 1)[-1] for key in settings]
    keys = short if len(set(short)) == len(short) else list(settings)
    name = ",".join(f"{key}={value}" for key, value in zip(keys, settings.values(), strict=True))
    return re.sub(r"[^\w.,=+%-]+", "-", name)[:120]


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
    return key, [value if isinstance(value, str) else json.dumps(value) for value in values]


def _read(file: Path) -> dict[str, Any]:
    """JSON of a file of results; nothing where it is not there, or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _fingerprint(dataset: str) -> str | None:
    """That of a dataset, empty for none; None as long as it is not there."""
    try:
        return read_dataset(dataset, "--test", check_files=False).fingerprint if dataset else ""
    except UserError:
        return None
