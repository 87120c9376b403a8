"""`vitscale evaluate`: a trained classifier on datasets, and the file of results."""

import fcntl
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings, evaluation_batches
from vitscale.pipeline.data.store import Store, check_classes, check_images
from vitscale.pipeline.data.workers import worker_deaths
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.evaluation.bootstrap import Interval, wilson
from vitscale.pipeline.evaluation.class_map import SUBSET, MappedTrained, mapped
from vitscale.pipeline.evaluation.classification import classification
from vitscale.pipeline.evaluation.rows import NAME, Subject, add_rows, read_rows
from vitscale.pipeline.mirror import send, shown
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.out_file import alike, check_out
from vitscale.pipeline.weights import Trained, check_kind, open_trained

MOST_SHOWN_CLASSES = 20
SAME = ("checkpoint", "origin", "dataset", "class_map")  # what results have to be of, to stand in one file


def check(source: str, dataset: str, weights: str = "auto", class_map: str = "") -> tuple[Trained, Store]:
    """Open both. Raises `UserError` if either cannot be read, without images, or if classes differ.

    With `class_map`, a file or `subset`, the checkpoint is a classifier of the dataset's classes (`class_map.mapped`).
    """
    trained, store = open_trained(source, "CHECKPOINT", weights), Store(dataset, "DATASET")
    check_kind(trained, weights, "--weights")
    check_images(store, "DATASET")
    trained = mapped(trained, store.classes, class_map) if class_map else trained
    check_same_classes(trained, store)
    return trained, store


def check_alike(source: str, dataset: str, weights: str = "auto", class_map: str = "") -> tuple[Trained, Store]:
    """`check` for all ranks together: each opens the checkpoint that rank 0 found."""
    return check(gather(shown(open_trained(source, "CHECKPOINT", weights).path))[0], dataset, weights, class_map)


def check_same_classes(trained: Trained, store: Store) -> None:
    """Raise `UserError` for classes that are not the checkpoint's, which says how to map them."""
    if store.classes != trained.classes and set(store.classes) <= set(trained.classes):
        got = f"{len(store.classes)} classes, which are among the {len(trained.classes)} of {shown(trained.path)}"
        remedy = f"Add --class-map {SUBSET}: logits of the others are left out."
        raise UserError("DATASET", got, "the same classes, in the same order", remedy)
    try:
        check_classes("DATASET", store.classes, shown(trained.path), trained.classes)
    except UserError as error:
        raise UserError(error.setting, error.got, error.expected, f"{error.remedy} Or add --class-map FILE.") from None


def opened(trained: Trained, world: World) -> Supervised:
    """The network with its preprocessing, on the device of this rank."""
    return Supervised(trained.load(), trained.preprocess).eval().to(world.device)


def evaluate(
    trained: Trained, store: Store, settings: LoaderSettings, world: World, objective: Supervised | None = None
) -> dict[str, Any]:
    """Results of a classifier, which may be `opened` already, on every image of a dataset, on all ranks alike.

    The loss is softmax cross-entropy, of images with several labels sigmoid cross-entropy. Raises `UserError` for
    logits that are not finite.
    """
    objective = objective or opened(trained, world)
    batches = evaluation_batches(store, EvaluationView(trained.preprocess), settings, world)
    with worker_deaths(settings.workers):
        loss = "sigmoid" if store.multi else "softmax"
        results = dict(classification(objective, batches, len(trained.classes), loss))
    if not math.isfinite(results["loss"]):
        got = "logits that are not finite"
        raise UserError("CHECKPOINT", got, "finite ones", "Use another checkpoint of the run.")
    return {**about(trained, store), **results, "suites": {"accuracy": dict(_accuracy(results))}}


def about(trained: Trained, store: Store) -> dict[str, Any]:
    """What was measured, and on what, for results."""
    class_map = trained.class_map.describe() if isinstance(trained, MappedTrained) else None
    return {
        "checkpoint": shown(trained.path), "origin": trained.origin, "dataset": store.describe(),
        "classes": trained.classes, "class_map": class_map,
    }  # fmt: skip


def _accuracy(results: dict[str, Any]) -> Iterator[tuple[str, Interval | float]]:
    """Yield what there is of top-1, top-5, mean average precision and loss, the shares with intervals."""
    for name in ("top1", "top5", "map", "loss"):
        value = results.get(name)
        if value is not None:
            yield name, wilson(value, results["images"]) if name in ("top1", "top5") else value


def confusion_lines(results: dict[str, Any]) -> list[str]:
    """The confusion matrix as text, a class a line, if there is one, of few enough classes for a terminal."""
    classes, matrix = results["classes"], results["confusion"]
    if matrix is None or len(classes) > MOST_SHOWN_CLASSES:
        return []
    width = max(len(str(max(map(max, matrix)))), 4)
    label = max(len(name) for name in classes)
    rows = [f"{name:>{label}} " + "".join(f"{count or '.':>{width}}" for count in row)
            for name, row in zip(classes, matrix, strict=True)]  # fmt: skip
    return ["images of a class (row) taken for each class (column, in the same order):", *rows]


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, and a row for each number of their suites into `results.parquet` beside it.

    What the file has of the same checkpoint, images and classes by earlier commands stays in it, unless it was found
    anew. Both are whole at any time, and written by one process after the other. Raises `UserError` if that fails.
    """
    of, origin, class_map = results["dataset"], results["origin"], results["class_map"]
    by = class_map and (class_map["sha256"] or class_map["source"])
    subject = Subject(results["checkpoint"], of["path"], origin.get("weights"), of["fingerprint"], by)
    rows = path.with_name(NAME)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{NAME}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            earlier = _earlier(path, results)
            told = {suite: dict(zip(values, map(_json, values.values()), strict=True))
                    for suite, values in results["suites"].items()}  # fmt: skip
            whole = {**earlier, **results, "suites": {**earlier.get("suites", {}), **told}}
            publish_text(path, json.dumps(whole))
            send(path)
            add_rows(rows, subject, results["suites"])
            send(rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError("--out", f"{error}", "a file that can be written", "Choose another.") from error


def written(path: Path) -> str:
    """Where to find the results that were written to `path`."""
    return f"all of this in {shown(path)}, a row for each number in {shown(path.with_name(NAME))}"


def _earlier(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What a file of results has already, if it is of the same weights, images and classes; else nothing."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    new = json.loads(json.dumps({name: results[name] for name in SAME}))
    return found if isinstance(found, dict) and all(found.get(name) == new[name] for name in SAME) else {}


def _json(value: Any) -> Any:
    return value._asdict() if isinstance(value, Interval) else value


def results_path(trained: Trained, store: Store) -> Path:
    """Where results go unless the user says: `evaluations/` beside the checkpoints, or in the export."""
    folder, step = trained.path, trained.origin.get("step") or 0
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    elif folder.is_file():  # of another project
        folder = folder.parent
    name = f"step-{step:08d}-{store.name}-{store.fingerprint[:8]}"
    if isinstance(trained, MappedTrained):
        name += f"-map-{trained.class_map.sha256[:8]}" if trained.class_map.sha256 else f"-{SUBSET}"
    return folder / "evaluations" / f"{name}.json"


def check_results(out: str, trained: Trained, store: Store) -> Path:
    """Where results go: `out`, or else `results_path`.

    Raises `UserError` where they could not be written, or would take the place of something else.
    """
    path = check_out(out or str(results_path(trained, store)), "--out", (".json",), _is_results if out else None)
    rows = path.with_name(NAME)
    try:
        read_rows(rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError("--out", f"{rows}: {error}", "rows of results, or none", "Choose another folder.") from error
    return path


def place_of_results(out: str, trained: Trained, store: Store, world: World) -> Path:
    """`check_results` by rank 0 for all ranks together."""
    alike(lambda: check_results(out, trained, store), world)
    return Path(out) if out else results_path(trained, store)


def _is_results(path: Path) -> bool:
    found = json.loads(path.read_text())
    return isinstance(found, dict) and {"checkpoint", "origin", "dataset", "classes"} <= found.keys()
