"""`vitscale evaluate … --suite`: suites on a checkpoint, and the files of what they find."""

import re
from typing import Any

import numpy as np

from vitscale.errors import UserError
from vitscale.pipeline.console import say
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.evaluation import stage, suites
from vitscale.pipeline.evaluation.bootstrap import Interval, mean_intervals
from vitscale.pipeline.evaluation.class_map import mapped
from vitscale.pipeline.mirror import shown
from vitscale.pipeline.weights import Trained, check_kind, open_trained

SHOWN = 16  # lines of a suite on the screen
DETAIL = re.compile(r"^(bin\d|class/)|_[1-5]$|_top5$|_(20|30|40|60|70|80)$|_l2_")  # not shown there


def check(
    source: str, dataset: str, suite: str, train: str, weights: str, class_map: str = ""
) -> tuple[Trained, Store, Store | None]:
    """Open everything. Raises `UserError` for what the suites could not do.

    With `class_map` the checkpoint is a classifier of the dataset's classes, which suites on features do not ask for.
    """
    chosen = suites.parse(suite)
    trained, store = open_trained(source, "CHECKPOINT", weights), Store(dataset, "DATASET")
    check_kind(trained, weights, "--weights")
    train_store = Store(train, "--train") if train else None
    classify = set(chosen) - set(suites.ON_FEATURES)
    if class_map and not classify:
        expected = "nothing for suites on features alone"
        raise UserError("--class-map", class_map, expected, "Leave it out: they take datasets of any classes.")
    trained = mapped(trained, store.classes, class_map) if class_map else trained
    if classify:
        stage.check_same_classes(trained, store)
    suites.check(chosen, trained, store, train_store)
    return trained, store, train_store


def evaluate(
    source: str,
    dataset: str,
    suite: str,
    train: str,
    weights: str,
    out: str,
    settings: LoaderSettings,
    world: World,
    class_map: str = "",
) -> None:
    """Run suites on all ranks together; rank 0 writes the results and says what they are.

    Accuracy and the confusion matrix come with them as without `--suite`, if the dataset has the checkpoint's classes.
    """
    suites.parse(suite)
    found = gather(shown(open_trained(source, "CHECKPOINT", weights).path))[0]
    trained, store, train_store = check(found, dataset, suite, train, weights, class_map)
    path = stage.place_of_results(out, trained, store, world)
    task = suites.Task(trained, store, train_store, settings, world, path.parent, path.stem)
    if store.classes == trained.classes:
        results = stage.evaluate(trained, store, settings, world, task.objective)
    else:
        results = {**stage.about(trained, store), "classes": store.classes, "images": len(store), "suites": {}}
    found_by = suites.run(suites.parse(suite), task)
    measured = {name: with_intervals(values) if world.main else {} for name, values in found_by}
    if world.main:
        results["suites"] |= measured
        stage.write_results(results, path)
        for note in trained.notes:
            say(note)
        for name, values in measured.items():
            say(f"{name} of {shown(trained.path)} on {dataset}:")
            for line in lines(values):
                say(f"  {line}")
            for line in suites.left_out(name, values, train_store):
                say(f"  {line}")
        say(f"{len(store):,} images; {stage.written(path)}")


def with_intervals(values: dict[str, Any]) -> dict[str, Any]:
    """Arrays (images,) as their means with intervals, all by the same resamples; other values as they are."""
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    found: dict[str, Any] = {}
    for length in {len(value) for value in arrays.values()}:  # real labels are of fewer images
        names = [name for name, value in arrays.items() if len(value) == length]
        found |= zip(names, mean_intervals(np.stack([arrays[name] for name in names], axis=1)), strict=True)
    return {name: found.get(name, value) for name, value in values.items()}


def lines(values: dict[str, Any]) -> list[str]:
    """The values that say most, for a terminal."""
    main = {name: value for name, value in values.items() if not DETAIL.search(name)}
    width = max(map(len, main), default=0)
    found = []
    for name, value in list(main.items())[:SHOWN]:
        if isinstance(value, Interval):
            found.append(f"{name:{width}}  {value.value:.4f}  ({value.low:.4f} to {value.high:.4f})")
        else:
            found.append(f"{name:{width}}  {value:.4g}")
    left = len(values) - len(found)
    return [*found, *([f"and {left:,} more"] if left else [])]
