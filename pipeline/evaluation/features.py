"""Frozen features of a dataset: what the classifier of a network sees of each image, computed once and kept on disk."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.data_prep.publish import publish_text, sync_folder
from vitscale.errors import UserError
from vitscale.model.network import Network
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.loader import Batch, EvaluationView, LoaderSettings, evaluation_batches
from vitscale.pipeline.data.store import Store, check_images
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.evaluation.feature_files import FeatureFile, create, open_file
from vitscale.pipeline.objectives.supervised import Supervised

Represent = Callable[[Batch], Tensor]  # what the classifier sees of a batch, float32 (B, D)
FORMAT = 2
DONE = "features.json"  # comes last: a folder with it is whole


@dataclass(frozen=True)
class Features:
    """Features (N, D) with labels and keys (N,), in the order of the dataset at any number of ranks.

    `parts` may be views of mapped `files`, which are let go after each reading, so that some rows take the memory of
    these alone, and all of them no more. `keys` are the numbers that stand for the keys of samples
    (`augment.key_number`).
    """

    parts: list[np.ndarray]
    labels: NDArray[np.int64]
    keys: NDArray[np.int64]
    files: Sequence[FeatureFile] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows `first` to `last` (excluded), float32 (n, D)."""
        found, begin = [], 0
        for part in self.parts:
            found.append(part[max(0, first - begin) : max(0, last - begin)])
            begin += len(part)
        rows = np.concatenate(found).astype(np.float32, copy=False)
        self._let_go()
        return rows

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of these numbers, float32 (n, D)."""
        taken, begin = np.empty((len(numbers), self.width), np.float32), 0
        for part in self.parts:
            here = (numbers >= begin) & (numbers < begin + len(part))
            taken[here] = part[numbers[here] - begin]
            begin += len(part)
        self._let_go()
        return taken

    def chunks(self, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows, `size` at a time, each with the number of its first."""
        for first in range(0, len(self), size):
            yield first, self.rows(first, min(first + size, len(self)))

    def _let_go(self) -> None:
        for file in self.files:
            file.let_go()


def of_arrays(values_ND: np.ndarray, labels: np.ndarray, keys: np.ndarray | None = None) -> Features:
    """Features in memory; without `keys` the numbers of rows stand for them."""
    numbers = np.arange(len(labels)) if keys is None else keys
    return Features([values_ND], labels.astype(np.int64), numbers.astype(np.int64))


def identity(network: Network, preprocess: Preprocess, store: Store, dtype: str = "float32") -> dict[str, Any]:
    """What the features depend on: a digest of the weights by name, preprocessing, samples, and dtype."""
    digest = hashlib.sha256()  # which processors have instructions for
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return identity_of(digest.hexdigest(), preprocess, store, dtype)


def identity_of(weights: str, preprocess: Preprocess, store: Store, dtype: str = "float32") -> dict[str, Any]:
    """`identity` of weights that have a name."""
    numbers = json.loads(json.dumps(asdict(preprocess)))  # lists, as it will be read back
    return {"weights": weights, "preprocess": numbers, "dataset": store.fingerprint, "dtype": dtype}


def features(
    network: Network,
    store: Store,
    preprocess: Preprocess,
    settings: LoaderSettings,
    world: World,
    root: Path,
    setting: str = "DATASET",
    dtype: str = "float32",
) -> Features:
    """The features of every image, from a folder in `root`, where they are computed first unless they are there.

    All ranks call it together, with a network in evaluation mode on the device; `root` is one that all of them share.
    Each computes its share of the images and writes it to files of its own; the folder appears whole or not at all, and
    features of other weights, preprocessing or samples never stand in for those asked for. Raises `UserError` on all
    ranks for an empty dataset, naming `setting`, and for features that are not finite (of float16: too large).
    """
    check_images(store, setting)
    told = gather(identity(network, preprocess, store, dtype) if world.main else None)[0]
    objective = Supervised(network, preprocess).eval()
    return features_of(
        lambda batch: objective(batch, predict="features"), told, store, preprocess, settings, world, root
    )


def features_of(
    represent: Represent,
    told: dict[str, Any],
    store: Store,
    preprocess: Preprocess,
    settings: LoaderSettings,
    world: World,
    root: Path,
) -> Features:
    """`features` by any function of a batch on the device, of which `told` is the identity on all ranks."""
    name = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = root / f"{store.name}-{name}"
    found = gather(read(folder) is not None if world.main else None)[0]
    if not found:
        batches, images = evaluation_batches(store, EvaluationView(preprocess), settings, world), len(store)

        def write(partial: Path) -> int:
            return _write(represent, batches, images, world, partial, told["dtype"])

        _compute(write, world, folder, {"images": images, **told})
    kept = read(folder)
    remedy = "Give all nodes one folder for results."
    missing = UserError("--out", f"{folder}, which this node cannot see", "a folder that all ranks share", remedy)
    agree(None if kept else missing)
    assert kept is not None
    return kept


def read(folder: Path) -> Features | None:
    """What a folder of features holds; None where there is none, or not all of it."""
    try:
        told = json.loads((folder / DONE).read_text())
        if told["format"] != FORMAT:
            return None
        files, size = [], told["ranks"]
        for rank in range(size):
            low, high = order.rank_rows(told["images"], rank, size)
            files.append(open_file(folder / _name(rank, size), high - low, told["width"], told["dtype"]))
        labels, keys = (np.concatenate([getattr(file, kind) for file in files]) for kind in ("labels", "keys"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Features([file.features for file in files], labels, keys, files)


def _compute(write: Callable[[Path], int], world: World, folder: Path, told: dict[str, Any]) -> None:
    """Compute and publish: all ranks `write` into one hidden folder, which rank 0 gives its name in the end.

    `write` returns the width of the features.
    """
    partial = Path(gather(str(folder.with_name(f".{folder.name}-{os.getpid()}")))[0])

    def publish() -> None:
        publish_text(partial / DONE, json.dumps({"format": FORMAT, "ranks": world.size, "width": width, **told}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)

    try:
        with _agreed():
            partial.mkdir(parents=True, exist_ok=True)
            width = write(partial)
        with _agreed():
            if world.main:
                publish()
    finally:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _agreed() -> Iterator[None]:
    """Raise on every rank what the block raised on any: a `UserError`, also for a disk that cannot be written."""
    error = None
    try:
        yield
    except UserError as problem:
        error = problem
    except OSError as problem:
        error = UserError("--out", f"{problem}", "room for features", "Free some, or choose another folder.")
    agree(error)


@torch.no_grad()  # not inference_mode: partitioned weights that were gathered in it could not be trained
def _write(represent: Represent, batches: Iterator[Batch], images: int, world: World, folder: Path, dtype: str) -> int:
    """This rank's rows, written batch by batch to a mapped file, which the kernel empties to disk as it sees fit."""
    low, high = order.rank_rows(images, world.rank, world.size)
    file = None
    for batch in batches:
        found_BD = represent(batch).cpu().numpy()
        if file is None:
            file = create(folder / _name(world.rank, world.size), high - low, found_BD.shape[1], dtype)
        real = batch["weight"].cpu().numpy() > 0
        rows = batch["row"].cpu().numpy()[real] - low
        with np.errstate(over="ignore"):
            file.features[rows] = found_BD[real]
        file.labels[rows], file.keys[rows] = batch["label"].cpu().numpy()[real], batch["key"].cpu().numpy()[real]
        bad = ~np.isfinite(file.features[rows]).all(axis=1)
        if bad.any():
            got = f"features that are not finite as {dtype}, first of image {low + int(rows[bad.argmax()])}"
            raise UserError("CHECKPOINT", got, "finite ones", "Use another checkpoint of the run.")
        file.let_go()
    assert file is not None
    file.sync()
    return file.features.shape[1]


def _name(rank: int, size: int) -> str:
    return f"features-{rank:05d}-of-{size:05d}.safetensors"
