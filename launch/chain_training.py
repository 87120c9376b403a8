"""The kinds of stages of a chain that train, evaluate and export."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitscale.errors import UserError
from vitscale.launch.chain_stages import Job, Kind, ShardKind, VerifyKind, read_by, run_complete
from vitscale.launch.recipes import RECIPES
from vitscale.launch.slurm import SlurmConfig
from vitscale.launch.slurm_submit import prepare
from vitscale.pipeline.config import Config, require, require_choice
from vitscale.pipeline.recipe import load_recipe

TRAIN = "train"  # the job of a training stage, which is pretrain.sbatch; all others are step.sbatch


@dataclass(frozen=True)
class TrainKind(Kind):
    """A run. Its job is pretrain.sbatch, which sees to its own attempts."""

    recipe: str
    settings: tuple[str, ...] = ()
    ranks: ClassVar[bool] = True

    @property
    def config(self) -> Config:
        return load_recipe(self.recipe, list(self.settings), RECIPES)

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        words = [word for word in self.settings if word.startswith("slurm.")]
        require(not words, f"{stage}.settings", words, "settings of the recipe", "Write them under `slurm:`.")
        require(
            bool(self.config.data.mixture), f"{stage}.settings", "no data.train", "a folder", "Add data.train=PATH."
        )
        prepare(self.recipe, [*self.settings, f"slurm.stage={self.name}", f"slurm.gpus_per_node={slurm.gpus_per_node}",
                              f"slurm.logs={slurm.logs or 'logs'}"])  # fmt: skip

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield from read_by(self.config)

    def outputs(self) -> list[str]:
        return [self.config.run.dir]

    def jobs(self) -> list[Job]:
        return [Job(TRAIN)]

    def complete(self, logs: Path, stage: str) -> bool:
        return run_complete(self.config)


@dataclass(frozen=True)
class PretrainKind(TrainKind):
    """From random weights."""

    name: ClassVar[str] = "pretrain"


@dataclass(frozen=True)
class FinetuneKind(TrainKind):
    """From a run, a checkpoint or an export: `init_from` in the settings."""

    name: ClassVar[str] = "finetune"


@dataclass(frozen=True)
class EvaluateKind(Kind):
    """Results on a dataset, by as many ranks as `slurm` says. `out`: the file; by default one in the run's folder.

    `suite`, `train` and `class_map` are as of `vitscale evaluate`.
    """

    checkpoint: str
    dataset: str
    out: str = ""
    weights: str = "auto"
    suite: str = ""
    train: str = ""
    class_map: str = ""
    device: str = "auto"
    micro_batch: int = 64
    workers: int = 1
    retries: int = 2
    name: ClassVar[str] = "evaluate"
    ranks: ClassVar[bool] = True

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        require_choice(f"{stage}.weights", self.weights, ("auto", "raw", "ema"))
        require_choice(f"{stage}.device", self.device, ("auto", "cpu", "cuda"))
        require(self.micro_batch > 0, f"{stage}.micro_batch", self.micro_batch, "at least 1 image", "64, say.")
        if self.suite:
            from vitscale.pipeline.evaluation.suites import parse

            parse(self.suite, f"{stage}.suite")
        got = f"{self.train} without {stage}.suite"
        require(bool(self.suite) or not self.train, f"{stage}.train", got, "a suite that needs it", "Leave it out.")

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield from (("checkpoint", self.checkpoint), ("dataset", self.dataset))
        yield from [("train", self.train)] if self.train else []

    def complete(self, logs: Path, stage: str) -> bool:
        if not _there(self.checkpoint) or not _there(self.dataset) or (self.out and not _there(self.out)):
            return False
        from vitscale.pipeline.evaluation import stage as evaluation
        from vitscale.pipeline.evaluation import suite_results, suites

        which = (self.weights, self.class_map)
        try:
            if self.suite:
                trained, store, _ = suite_results.check(self.checkpoint, self.dataset, self.suite, self.train, *which)
            else:
                trained, store = evaluation.check(self.checkpoint, self.dataset, *which)
            path = Path(self.out) if self.out else evaluation.results_path(trained, store)
            found = json.loads(path.read_text())
        except (UserError, OSError, ValueError):
            return False
        wanted = suites.parse(self.suite) if self.suite else {}
        keys = ("step", "weights", "checkpoint")
        same = all(found["origin"].get(key) == trained.origin.get(key) for key in keys)
        same = same and found["dataset"]["fingerprint"] == store.fingerprint
        return same and wanted.keys() <= found.get("suites", {}).keys()

    def words(self, what: str, task: int) -> list[str]:
        named = {"out": self.out, "weights": self.weights, "device": self.device, "suite": self.suite,
                 "train": self.train, "class-map": self.class_map}  # fmt: skip
        counts = ["--micro-batch", str(self.micro_batch), "--workers", str(self.workers)]
        return ["evaluate", self.checkpoint, self.dataset, *_options(named), *counts]


@dataclass(frozen=True)
class ExportKind(Kind):
    """The network in `format`, one or several with commas between."""

    source: str
    out: str
    format: str = "safetensors"
    dtype: str = "float32"
    weights: str = "auto"
    licence: str = ""
    retries: int = 2
    name: ClassVar[str] = "export"

    @property
    def formats(self) -> list[str]:
        return [name.strip() for name in self.format.split(",")]

    def check(self, stage: str, slurm: SlurmConfig) -> None:
        from vitscale.pipeline.export import DTYPES, FORMATS

        for name in self.formats:
            require_choice(f"{stage}.format", name, FORMATS)
        require_choice(f"{stage}.dtype", self.dtype, DTYPES)
        require_choice(f"{stage}.weights", self.weights, ("auto", "raw", "ema"))

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "source", self.source

    def outputs(self) -> list[str]:
        return [self.out]

    def complete(self, logs: Path, stage: str) -> bool:
        several = len(set(self.formats)) > 1
        if not Path(self.out).exists():
            return False
        for name in self.formats:
            try:
                made = json.loads(Path(self.out, name if several else "", "export.json").read_text())
            except (OSError, ValueError):
                made = {}
            same = made.get("format") == name and made.get("dtype") == self.dtype
            require(same, f"{stage}.out", f"{self.out}, which is no such export", "a new folder", "Choose another.")
        return True

    def words(self, what: str, task: int) -> list[str]:
        named = {"format": self.format, "dtype": self.dtype, "weights": self.weights, "licence": self.licence}
        return ["export", self.source, self.out, *_options(named)]


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (ShardKind, VerifyKind, PretrainKind, FinetuneKind, EvaluateKind, ExportKind)
}


def _options(named: dict[str, str]) -> list[str]:
    """`--KEY VALUE` of those that are not empty."""
    return [word for key, value in named.items() if value for word in (f"--{key}", value)]


def _there(path: str) -> bool:
    return "://" in path or Path(path).exists()
