"""`vitscale evaluate`: a trained classifier on datasets, and the file of results."""

import json
from pathlib import Path
from typing import Any

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings, evaluation_batches, worker_deaths
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.evaluation.classification import classification
from vitscale.pipeline.mirror import send, shown
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.planner import check_classes
from vitscale.pipeline.weights import Trained, open_trained

MOST_SHOWN_CLASSES = 20


def check(source: str, dataset: str, weights: str = "auto") -> tuple[Trained, Store]:
    """Open both. Raises `UserError` if either cannot be read, or if their classes differ."""
    trained, store = open_trained(source, "CHECKPOINT", weights), Store(dataset, "DATASET")
    check_classes("DATASET", store.classes, shown(trained.path), trained.classes)
    return trained, store


def check_alike(source: str, dataset: str, weights: str = "auto") -> tuple[Trained, Store]:
    """`check` for all ranks together: each opens the checkpoint that rank 0 found."""
    return check(gather(shown(open_trained(source, "CHECKPOINT", weights).path))[0], dataset, weights)


def evaluate(trained: Trained, store: Store, settings: LoaderSettings, world: World) -> dict[str, Any]:
    """Results of a classifier on every image of a dataset, on all ranks alike.

    The loss is softmax cross-entropy, of images with several labels sigmoid cross-entropy.
    """
    objective = Supervised(trained.load(), trained.preprocess).eval().to(world.device)
    batches = evaluation_batches(store, EvaluationView(trained.preprocess), settings, world)
    with worker_deaths(settings.workers):
        loss = "sigmoid" if store.multi else "softmax"
        results = dict(classification(objective, batches, len(trained.classes), loss))
    return {"origin": trained.origin, "dataset": store.describe(), "classes": trained.classes, **results}


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
    """Write results as JSON, whole or not at all. Raises `UserError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, json.dumps(results))
        send(path)
    except OSError as error:
        raise UserError("--out", f"{error}", "a file that can be written", "Choose another.") from error


def results_path(trained: Trained, store: Store) -> Path:
    """Where results go unless the user says: `evaluations/` beside the checkpoints, or in the export."""
    folder, step = trained.path, trained.origin.get("step") or 0
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    elif folder.is_file():  # of another project
        folder = folder.parent
    return folder / "evaluations" / f"step-{step:08d}-{store.name}-{store.fingerprint[:8]}.json"
