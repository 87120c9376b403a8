"""`vitscale evaluate … --suite`: suites on a checkpoint, and the files of what they find."""

import fcntl
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.publish import publish
from vitscale.errors import UserError
from vitscale.pipeline.console import say
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.evaluation import stage, suites
from vitscale.pipeline.evaluation.bootstrap import Interval, mean_intervals
from vitscale.pipeline.mirror import send, shown
from vitscale.pipeline.weights import Trained, open_trained

ROWS = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("dataset", pa.string()),
        ("suite", pa.string()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),  # null where there is no interval
        ("ci_high", pa.float64()),
    ]
)
SHOWN = 16  # lines of a suite on the screen
DETAIL = re.compile(r"^(bin\d|class/)|_[1-5]$|_top5$|_(20|30|40|60|70|80)$|_l2_")  # not shown there


def check(source: str, dataset: str, suite: str, train: str, weights: str) -> tuple[Trained, Store, Store | None]:
    """Open everything. Raises `UserError` for what the suites could not do."""
    chosen = suites.parse(suite)
    trained, store = open_trained(source, "CHECKPOINT", weights), Store(dataset, "DATASET")
    train_store = Store(train, "--train") if train else None
    suites.check(chosen, trained, store, train_store)
    return trained, store, train_store


def evaluate(
    source: str, dataset: str, suite: str, train: str, weights: str, out: str, settings: LoaderSettings, world: World
) -> None:
    """Run suites on all ranks together; rank 0 writes the results and says what they are.

    Accuracy and the confusion matrix come with them as without `--suite`, if the dataset has the checkpoint's classes.
    """
    suites.parse(suite)
    found = gather(shown(open_trained(source, "CHECKPOINT", weights).path))[0]
    trained, store, train_store = check(found, dataset, suite, train, weights)
    path = Path(out) if out else stage.results_path(trained, store)
    task = suites.Task(trained, store, train_store, settings, world, path.parent, path.stem)
    if store.classes == trained.classes:
        results = stage.evaluate(trained, store, settings, world)
    else:
        results = {"origin": trained.origin, "dataset": store.describe(), "classes": store.classes}
    found_by = suites.run(suites.parse(suite), task)
    measured = {name: with_intervals(values) if world.main else {} for name, values in found_by}
    if world.main:
        results["suites"] = {name: {key: _json(value) for key, value in of.items()} for name, of in measured.items()}
        stage.write_results(results, path)
        rows = path.with_name("results.parquet")
        add_rows(rows, shown(trained.path), store.describe()["path"], measured)
        for note in trained.notes:
            say(note)
        for name, values in measured.items():
            say(f"{name} of {shown(trained.path)} on {dataset}:")
            for line in lines(values):
                say(f"  {line}")
        say(f"{len(store):,} images; all of this in {shown(path)}, a row for each number in {shown(rows)}")


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


def add_rows(path: Path, checkpoint: str, dataset: str, measured: dict[str, dict[str, Any]]) -> None:
    """Put rows into a Parquet file, in place of those of the same checkpoint, dataset and suite.

    Whole or not at all, and one process after the other. Raises `UserError` if it cannot be written.
    """
    rows = []
    for suite, values in measured.items():
        for name, value in values.items():
            ends = value if isinstance(value, Interval) else Interval(float(value), np.nan, np.nan)
            ends = [None if np.isnan(each) else each for each in ends]
            rows.append(dict(zip(ROWS.names, (checkpoint, dataset, suite, name, *ends), strict=True)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = pq.read_table(path, schema=ROWS).to_pylist() if path.exists() else []
            kept = [row for row in kept if (row["checkpoint"], row["dataset"]) != (checkpoint, dataset)
                    or row["suite"] not in measured]  # fmt: skip
            with publish(path) as file:
                pq.write_table(pa.Table.from_pylist(kept + rows, schema=ROWS), file)
        send(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError("--out", f"{path}: {error}", "a file that can be written", "Choose another.") from error


def _json(value: Any) -> Any:
    return value._asdict() if isinstance(value, Interval) else value
