"""Evaluation while a run trains, by the engine's network: accuracy, and suites of `vitscale evaluate --suite`.

All ranks call these functions together. The order of the data and the random numbers of training are left alone.
"""

import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig
from vitscale.pipeline.config import Config
from vitscale.pipeline.console import say
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.loader import Batch, EvaluationView, evaluation_batches
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.evaluation import suites
from vitscale.pipeline.evaluation.bootstrap import Interval
from vitscale.pipeline.evaluation.classification import classification
from vitscale.pipeline.evaluation.features import Features, features_of, identity_of
from vitscale.pipeline.evaluation.suite_results import DETAIL
from vitscale.pipeline.run_folder import SCRATCH
from vitscale.pipeline.watchdog import Watchdog
from vitscale.pipeline.weights import Trained

if TYPE_CHECKING:
    from vitscale.pipeline.planner import Plan  # which has the `Suites`

BEAT = 10.0  # seconds from one beat of the watchdog to the next, while a rank works on features
UNLOGGED = ("class/", "bin")  # beginnings of names of numbers that a suite gives for each class, or bin
COMMAND = {"--suite": "eval.suites", "DATASET": "eval.suites_data", "--train": "eval.suites_train"}  # as settings


def evaluate(plan: "Plan", world: World, engine: Engine, watchdog: Watchdog) -> dict[str, float]:
    """Accuracy of the weights, and of their average where there is one, whose values are named `ema_…`."""
    values = _accuracy(plan, world, engine, watchdog)
    if engine.averages:
        with engine.averaged():
            averaged = _accuracy(plan, world, engine, watchdog)
        values |= {f"ema_{name}": value for name, value in averaged.items()}
    return values


def score(values: dict[str, float]) -> tuple[str, float]:
    """Name and value of what tells the better evaluation: of the average where there is one, as that is exported."""
    kind = "ema_" if any(name.startswith("ema_") for name in values) else ""
    name = f"{kind}map" if f"{kind}map" in values else f"{kind}top1"
    return name, gather(values[name])[0]


def _accuracy(plan: "Plan", world: World, engine: Engine, watchdog: Watchdog) -> dict[str, float]:
    assert plan.val is not None
    batches = _beaten(evaluation_batches(plan.val, EvaluationView(plan.preprocess), plan.loader, world), watchdog)
    engine.objective.eval()
    found = classification(engine.objective, batches, plan.model.num_classes, plan.config.objective.loss)
    return {name: value for name, value in found if name in ("top1", "top5", "loss", "map") and value is not None}


def _beaten(batches: Iterator[Batch], watchdog: Watchdog) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        watchdog.beat()


@dataclass(frozen=True)
class Suites:
    """`eval.suites`, checked: names with their options, on what images, with features of which, every so many steps."""

    chosen: dict[str, str]
    store: Store
    train: Store | None
    every: int

    @property
    def on_features(self) -> bool:
        """Whether features are computed."""
        return not self.chosen.keys().isdisjoint(suites.ON_FEATURES)


def planned(
    config: Config,
    model: ArchitectureConfig,
    preprocess: Preprocess,
    train: Store,
    val: Store | None,
    open_store: Callable[[str, str], Store],
    every: int,
) -> Suites | None:
    """The suites of a recipe, None where it names none. `open_store` opens a path for a setting.

    Raises `UserError` for what they could not do, before training begins.
    """
    own = config.eval
    if not own.suites:
        for name, value in (("data", own.suites_data), ("train", own.suites_train)):
            if value:
                raise UserError(f"eval.suites_{name}", value, "nothing without eval.suites", "Add eval.suites=knn.")
        return None
    chosen = suites.parse(own.suites, "eval.suites")
    if "robustness" in chosen:
        remedy = "Run `vitscale evaluate --suite robustness` on a checkpoint."
        raise UserError("eval.suites", "robustness", "suites that look at no more than logits and features", remedy)
    if config.data.on_error == "skip":
        remedy = "Leave eval.suites empty, or take out what cannot be read."
        raise UserError("data.on_error", "skip with eval.suites, which count every image", "stop", remedy)
    store = open_store(own.suites_data, "eval.suites_data") if own.suites_data else val
    if store is None:
        raise UserError("eval.suites_data", "nothing", "images to evaluate on", "Add it, data.val or data.dev.")
    on_features = not chosen.keys().isdisjoint(suites.ON_FEATURES)
    of_train = open_store(own.suites_train, "eval.suites_train") if own.suites_train else train if on_features else None
    try:
        suites.check(chosen, _described(config, model, preprocess, train), store, of_train)
    except UserError as error:
        texts = [str(error.got), error.expected, error.remedy]
        for word, setting in COMMAND.items():
            texts = [text.replace(word, setting) for text in texts]
        raise UserError(COMMAND.get(error.setting, error.setting), *texts) from error
    return Suites(chosen, store, of_train, every)


def check_scratch(plan: "Plan", world: World) -> None:
    """Raise `UserError` on all ranks unless all of them see the folder where features lie for a while."""
    if plan.suites is None or not plan.suites.on_features:
        return
    probe, error = plan.folder / SCRATCH / gather(secrets.token_hex(4))[0], None
    try:
        if world.main:
            probe.mkdir(parents=True)
    except OSError as problem:
        error = UserError("run.dir", str(problem), "a folder that can be written", "Choose another.")
    agree(error)
    if not probe.is_dir():
        got = f"{plan.folder}, which rank {world.rank} does not see as rank 0 does"
        remedy = "Use a folder that all nodes share, or leave knn, fewshot and linear out of eval.suites."
        error = UserError("run.dir", got, "one folder for the features of all ranks", remedy)
    agree(error)
    if world.local_rank == 0:
        shutil.rmtree(probe.parent, ignore_errors=True)


def measure(plan: "Plan", world: World, engine: Engine, watchdog: Watchdog, step: int) -> dict[str, float]:
    """What suites find, on rank 0, as `knn/k10_top1`: means over the images, of the average where there is one.

    Features of a network that goes on changing are of no use again: they lie in a folder of the run's, which is removed
    in the end, or by the next start of the run.
    """
    assert plan.suites is not None
    own, trained = plan.suites, _described(plan.config, plan.model, plan.preprocess, plan.train)
    folder, values = plan.folder / SCRATCH, {}
    task = _Task(trained, own.store, own.train, plan.loader, world, folder, "", engine, watchdog)
    engine.objective.eval()
    with engine.averaged() if engine.averages else nullcontext():
        try:
            for suite, found in suites.run(own.chosen, task):
                logged = {name: value for name, value in found.items() if not name.startswith(UNLOGGED)}
                values |= {f"{suite}/{name}": number(value) for name, value in logged.items()}
        except UserError as error:  # on all ranks alike
            if error.setting != "CHECKPOINT":
                raise
            if world.main:
                say(f"step {step}: eval.suites passed over for {error.got}")
    gather(None)
    if world.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return values


def number(value: Any) -> float:
    """What is logged of a number, one with an interval, or an array (images,) that stands for its mean."""
    return float(value.value if isinstance(value, Interval) else np.mean(value))


def told(values: dict[str, float]) -> str:
    """The values that say most, in a line."""
    main = {name: value for name, value in values.items() if not DETAIL.search(name.partition("/")[2])}
    return "  ".join(f"{name} {value:.4f}" for name, value in main.items())


@dataclass(frozen=True)
class _Task(suites.Task):
    """Of the network under training, which all ranks have to call together; each batch is a beat of the watchdog."""

    engine: Engine
    watchdog: Watchdog

    @property
    def working(self) -> AbstractContextManager[Any]:
        return _beating(self.watchdog)

    @cached_property
    def objective(self) -> Any:
        def called(batch: Batch, predict: Any = True) -> Tensor:
            self.watchdog.beat()
            return self.engine.objective(batch, predict=predict)

        return called

    @cached_property
    def features(self) -> tuple[Features, Features]:
        assert self.train is not None
        preprocess = self.trained.preprocess
        train, test = (
            features_of(
                lambda batch: self.objective(batch, predict="features"),
                identity_of("those of now", preprocess, store),
                store,
                preprocess,
                self.settings,
                self.world,
                self.folder,
            )
            for store in (self.train, self.store)
        )
        return train, test


@contextmanager
def _beating(watchdog: Watchdog) -> Iterator[None]:
    """Beat while the block runs: a hang in it ends with the time limit of the collective that others wait in."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(BEAT):
            watchdog.beat()

    thread = threading.Thread(target=run, daemon=True, name="beating")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        watchdog.beat()


def _described(config: Config, model: ArchitectureConfig, preprocess: Preprocess, train: Store) -> Trained:
    """The network of a run as suites want it described; its weights are the engine's."""

    def none() -> Any:
        raise NotImplementedError

    return Trained(Path(config.run.dir), model, train.classes, preprocess, {}, none)
