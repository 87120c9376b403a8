"""Evaluations beyond accuracy, by name: `vitscale evaluate CHECKPOINT DATASET --suite knn,calibration --train …`."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitscale.errors import UserError
from vitscale.pipeline.data import order
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings
from vitscale.pipeline.data.store import Store, check_classes, check_images
from vitscale.pipeline.data.workers import worker_deaths
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.evaluation import calibration as calibrating
from vitscale.pipeline.evaluation import corruptions as corrupting
from vitscale.pipeline.evaluation import fewshot as few
from vitscale.pipeline.evaluation import knn as nearest
from vitscale.pipeline.evaluation import linear as probing
from vitscale.pipeline.evaluation import robustness as robust
from vitscale.pipeline.evaluation.features import Features, features
from vitscale.pipeline.evaluation.outcomes import Outcomes, in_order, outcomes
from vitscale.pipeline.evaluation.stage import opened
from vitscale.pipeline.mirror import shown
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.weights import Trained

Values = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Task:
    """A checkpoint, what it is evaluated on, and what training features come from; `name` for files beside results, of
    which there are none without it."""

    trained: Trained
    store: Store
    train: Store | None
    settings: LoaderSettings
    world: World
    folder: Path
    name: str

    @property
    def working(self) -> AbstractContextManager[Any]:
        """What is entered while a rank works on features, or waits for one that does."""
        return nullcontext()

    @cached_property
    def objective(self) -> Supervised:
        return opened(self.trained, self.world)

    @cached_property
    def outcomes(self) -> Outcomes:
        view = EvaluationView(self.trained.preprocess)
        return outcomes(self.objective, self.store, view, self.settings, self.world)

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Of the training images and of those evaluated."""
        assert self.train is not None
        root, preprocess = self.folder / "features", self.trained.preprocess
        model: Any = self.objective.model
        found = [
            features(model, store, preprocess, self.settings, self.world, root, setting)
            for store, setting in ((self.train, "--train"), (self.store, "DATASET"))
        ]
        return found[0], found[1]


def knn(task: Task, option: str) -> Values:
    """Weighted k nearest neighbours, each rank with its share of the images."""
    (train, test), world = task.features, task.world
    low, high = order.rank_rows(len(test), world.rank, world.size)
    with task.working:
        own = dict(nearest.knn(train, test, len(task.store.classes), range(low, high), device=world.device))
        columns = torch.from_numpy(np.stack(list(own.values()), axis=1))
        whole = in_order([(torch.arange(low, high), columns)], len(test), len(own), world)
    yield from zip(own, whole.T, strict=True)


def fewshot(task: Task, option: str) -> Values:
    """Least squares on few images of each class; with `fewshot=grid` at 31 penalties."""
    train, test = task.features
    l2s = few.GRID if option == "grid" else (few.L2,)
    classes, device = len(task.store.classes), task.world.device
    yield from _alone(task, lambda: few.fewshot(train, test, classes, l2s=l2s, device=device))


def linear(task: Task, option: str) -> Values:
    """Linear classifiers on features: SGD, and logistic regression."""
    train, test = task.features
    yield from _alone(task, lambda: probing.linear(train, test, len(task.store.classes), task.world.device))


def calibration(task: Task, option: str) -> Values:
    """Calibration and accuracy by class, and a plot of reliability beside the results."""
    found, classes = task.outcomes, task.trained.classes

    def plot() -> Values:
        table = calibrating.reliability(found.confidence, (found.best == found.label).astype(np.float64))
        task.folder.mkdir(parents=True, exist_ok=True)
        calibrating.reliability_plot(task.folder / f"{task.name}-reliability.png", table, task.name)
        yield from ()

    if task.name:
        yield from _alone(task, plot)
    yield from calibrating.calibration(found, classes)


def real(task: Task, option: str) -> Values:
    """Accuracy against reassessed labels, of a file: `real=FILE`."""
    labels = calibrating.read_real(option, task.store.describe()["path"], task.store.classes)
    yield from calibrating.real(task.outcomes, labels)


def corruptions(task: Task, option: str) -> Values:
    """Fifteen corruptions at five severities, or some: `corruptions=fog+snow`."""
    kinds = option.split("+") if option else list(corrupting.KINDS)
    classes, preprocess = len(task.trained.classes), task.trained.preprocess
    yield from corrupting.corruptions(task.objective, task.store, preprocess, task.settings, task.world, classes, kinds)


def robustness(task: Task, option: str) -> Values:
    """Occluded and shuffled patches, and other resolutions."""
    yield from robust.robustness(task.objective, task.store, task.settings, task.world)


SUITES: dict[str, Callable[[Task, str], Values]] = {
    "knn": knn,
    "fewshot": fewshot,
    "linear": linear,
    "calibration": calibration,
    "real": real,
    "corruptions": corruptions,
    "robustness": robustness,
}
ON_FEATURES = ("knn", "fewshot", "linear")  # those need --train, and no classes of the checkpoint's
OPTIONS = {
    "fewshot": "fewshot or fewshot=grid",
    "real": "real=FILE",
    "corruptions": "corruptions or corruptions=fog+snow",
}


def parse(text: str, setting: str = "--suite") -> dict[str, str]:
    """`knn,corruptions=fog+snow` → {"knn": "", "corruptions": "fog+snow"}. Raises `UserError`, naming `setting`, for
    what there is not."""
    chosen: dict[str, str] = {}
    for each in text.split(","):
        name, sign, option = each.strip().partition("=")
        if name not in SUITES or name in chosen:
            got = f"{name or 'nothing'}{' twice' if name in chosen else ''}"
            near = [] if name in chosen else difflib.get_close_matches(name.lower(), SUITES, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else "Separate them with commas."
            raise UserError(setting, got, f"some of {', '.join(SUITES)}", remedy)
        if name == "real" and not option:
            raise UserError(setting, "real without a file", "real=FILE", "Name the file of labels.")
        if (
            (sign and not option)
            or (option and name not in OPTIONS)
            or (name == "fewshot" and option not in ("", "grid"))
        ):
            raise UserError(setting, each, OPTIONS.get(name, name), "Change it.")
        chosen[name] = option
    return chosen


def check(chosen: dict[str, str], trained: Trained, store: Store, train: Store | None) -> None:
    """Raise `UserError` for what would fail after long work: no images, other classes, several labels, no `--train`."""
    on_features = [name for name in chosen if name in ON_FEATURES]
    if on_features and train is None:
        got = f"nothing, for {', '.join(on_features)}"
        raise UserError("--train", got, "a dataset to take training features from", "Add --train shards/train.")
    if train is not None and not on_features:
        expected = f"nothing without one of {', '.join(ON_FEATURES)}"
        raise UserError("--train", train.describe()["path"], expected, "Leave it out, or add a suite.")
    if train is not None and train.fingerprint == store.fingerprint:
        got = f"{train.describe()['path']}, with the same images as DATASET"
        raise UserError("--train", got, "other images than those evaluated", "Name those that were trained on, say.")
    for setting, each in (("DATASET", store), ("--train", train)):
        if each is None:
            continue
        check_images(each, setting)
        if each.multi:
            got = f"{each.describe()['path']}, with several labels an image"
            raise UserError(setting, got, "one label an image for --suite", "Evaluate it without --suite.")
    if len(on_features) < len(chosen):
        check_classes("DATASET", store.classes, shown(trained.path), trained.classes)
    if train is not None:
        check_classes("--train", train.classes, "DATASET", store.classes)
    if "corruptions" in chosen:
        option = chosen["corruptions"]
        corrupting.check_corruptions(option.split("+") if option else [], trained.preprocess)
    if "real" in chosen:
        calibrating.read_real(chosen["real"], store.describe()["path"], store.classes)


def left_out(name: str, found: Iterable[str], train: Store | None) -> Iterator[str]:
    """What to say of the numbers that a suite cannot give for so few training images; `found` are those it gave."""
    there = set(found)
    if name == "knn" and train is not None:
        ks = [str(k) for k in nearest.KS if f"k{k}_top1" not in there]
        if ks:
            yield f"without k of {', '.join(ks)}: there are {len(train):,} training images"
    if name == "fewshot":
        given = {each.partition("shot")[0] for each in there}
        shots = [str(shot) for shot in few.SHOTS if str(shot) not in given]
        if shots:
            yield f"without {', '.join(shots)} shots: some class has fewer training images"


def run(chosen: dict[str, str], task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each suite with its values by name: numbers, or arrays (images,) that stand for their means."""
    with worker_deaths(task.settings.workers):
        for name, option in chosen.items():
            yield name, dict(SUITES[name](task, option))
            gather(None)


def _alone(task: Task, work: Callable[[], Values]) -> Values:
    """What rank 0 finds, while the others wait; they get nothing. A disk that cannot be written is a `UserError`."""
    error, found = None, []
    with task.working:
        if task.world.main:
            try:
                found = list(work())
            except UserError as problem:
                error = problem
            except OSError as problem:
                got = f"{task.folder}: {problem.strerror}"
                error = UserError("--out", got, "a folder that can be written", "Choose another.")
        agree(error)
    yield from found
