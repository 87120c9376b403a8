"""`vitscale embed`: what the classifier of a network sees of each image of a dataset, as one Parquet file."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vitscale.data_prep.manifest import DATASET_FILE, SAMPLES, read_dataset, read_table, samples_name
from vitscale.errors import UserError
from vitscale.pipeline.console import Advance, progress, say
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.data.workers import worker_deaths
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.evaluation.features import Features, features
from vitscale.pipeline.image_files import count_images
from vitscale.pipeline.inference import Classifier, check_finite
from vitscale.pipeline.mirror import shown
from vitscale.pipeline.out_file import alike
from vitscale.pipeline.prediction import Files, Tally, find_files, write_rows
from vitscale.pipeline.table_files import GROUP, check_table, write_table
from vitscale.pipeline.weights import Trained, check_kind, open_trained, open_trained_alike

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Settings:
    """Type of the features, images of a forward and loader processes of each rank, and kind of weights."""

    dtype: str = "float32"
    micro_batch: int = 64
    workers: int = 1
    weights: str = "auto"


def check(checkpoint: str, source: str, weights: str, nproc: int) -> None:
    """Raise `UserError` for a checkpoint or a source that cannot be read, and for several processes for image files."""
    check_kind(open_trained(checkpoint, "CHECKPOINT", weights), weights, "--weights")
    if _is_dataset(source):
        Store(source, "SOURCE")
        return
    _check_alone(nproc)
    count_images([source], "SOURCE")


def check_place(out: str) -> Path:
    """The path of the table to write. Raises `UserError` as `check_table`."""
    return check_table(out, "OUT", (".parquet",))


def _check_alone(processes: int) -> None:
    if processes > 1:
        remedy = "Leave it out, or shard the images first."
        raise UserError("--nproc", f"{processes} for image files", "1, or a dataset of shards", remedy)


def embed(checkpoint: str, source: str, out: Path, settings: Settings, world: World) -> None:
    """Write the features of a source to `out` on all ranks together, and say what they are."""
    alike(lambda: check_place(str(out)), world)
    trained = open_trained_alike(checkpoint, "CHECKPOINT", settings.weights)
    check_kind(trained, settings.weights, "--weights")
    if world.main:
        for note in trained.notes:
            say(note)
    if _is_dataset(source):
        images, width = embed_dataset(trained, source, out, settings, world)
        if world.main:
            say(f"{images:,} images; {width:,} features of each in {out}")
        return
    _check_alone(world.size)
    files = find_files([source], "SOURCE", trained.preprocess, settings.micro_batch, settings.workers)
    classifier = Classifier(trained, world.device)
    with progress("embedding") as advance:
        tally = embed_files(classifier, files, out, settings.dtype, advance)
    say(f"{tally}; {classifier.width():,} features of each in {out}")


def _is_dataset(source: str) -> bool:
    return "://" in source or (Path(source) / DATASET_FILE).is_file()


def embed_dataset(trained: Trained, source: str, out: Path, settings: Settings, world: World) -> tuple[int, int]:
    """Write features of a dataset, a row an image in its order: `key`, `label`, `class`, `features`; of images with
    several labels `labels` and `classes`. Returns how many, and their width.

    Each rank computes its share, in a folder beside `out` that all of them share; rank 0 writes the file, whole or not
    at all. Raises `UserError` on all ranks for a dataset without images, for features that are not finite, and if `out`
    cannot be written.
    """
    store, scratch = Store(source, "SOURCE"), out.with_name(f".{out.name}.features")
    if world.main:
        shutil.rmtree(scratch, ignore_errors=True)  # of a command that was killed
    gather(None)
    loader, dtype = LoaderSettings(settings.micro_batch, settings.workers), settings.dtype
    try:
        network = trained.load().to(world.device)
        with worker_deaths(settings.workers):
            found = features(network, store, trained.preprocess, loader, world, scratch, "SOURCE", dtype)
        error = None
        if world.main:
            try:
                _write(trained, store, source, found, out, dtype)
            except UserError as problem:
                error = problem
        agree(error)
        return len(found), found.width
    finally:
        if world.main:
            shutil.rmtree(scratch, ignore_errors=True)


def embed_files(classifier: Classifier, files: Files, out: Path, dtype: str, advance: Advance) -> Tally:
    """Write the features of image files, `file`, `features`, `error`; as `predict_files` otherwise."""
    kind = pa.list_(pa.type_for_alias(dtype), classifier.width())

    def columns(pixels: Tensor) -> list[pa.Array]:
        return [_lists(classifier.features_of(pixels).numpy(), dtype)]

    return write_rows(files, out, "OUT", [("features", kind)], columns, advance)


def _lists(values_BD: np.ndarray, dtype: str) -> pa.FixedSizeListArray:
    """Features as a column of lists of one length. Raises `UserError` for those that are not finite."""
    with np.errstate(over="ignore"):
        values_BD = values_BD.astype(dtype)
    check_finite(torch.from_numpy(values_BD), f"features that are not finite as {dtype}")
    return pa.FixedSizeListArray.from_arrays(pa.array(values_BD.ravel()), values_BD.shape[1])


def _write(trained: Trained, store: Store, source: str, found: Features, out: Path, dtype: str) -> None:
    """The features with what the dataset tells of each image."""
    kind = pa.list_(pa.type_for_alias(dtype), found.width)
    if store.multi:
        told = [("labels", pa.list_(pa.int32())), ("classes", pa.list_(pa.string()))]
    else:
        told = [("label", pa.int32()), ("class", pa.string())]
    about = json.dumps({"checkpoint": shown(trained.path), "dataset": store.describe()})
    schema = pa.schema([("key", pa.string()), *told, ("features", kind)], metadata={"vitscale": about})

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        for samples in _samples(source):
            for batch in samples.to_batches(GROUP):
                values = _lists(found.rows(first, first + len(batch)), dtype)
                columns = [batch["key"], *_labels(batch, store), values]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
                first += len(batch)

    write_table(out, "OUT", schema, batches())


def _labels(batch: pa.RecordBatch, store: Store) -> tuple[pa.Array, pa.Array]:
    """Numbers and names of the classes of each image."""
    if store.multi:
        labels = batch["labels"]
        names = [None if those is None else [store.classes[each] for each in those] for those in labels.to_pylist()]
        return labels, pa.array(names, pa.list_(pa.string()))
    return batch["label"], pa.array(store.classes, pa.string()).take(batch["label"])


def _samples(source: str) -> Iterator[pa.Table]:
    """The sidecar of each shard, in order."""
    dataset = read_dataset(source, "SOURCE")
    for shard in dataset.shards:
        try:
            yield read_table(dataset.folder, samples_name(shard.name), SAMPLES)
        except (OSError, pa.ArrowException) as error:
            got = f"{source}/{samples_name(shard.name)}: {error}"
            raise UserError("SOURCE", got, "a whole dataset", "Run `vitscale verify` on it.") from error
