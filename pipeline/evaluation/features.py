"""Frozen features of a dataset: what the classifier of a network sees of each image, computed once and kept on disk."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.model.network import Network
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.loader import Batch, EvaluationView, LoaderSettings, evaluation_batches
from vitscale.pipeline.data.store import Store, check_images
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.objectives.supervised import Supervised

Represent = Callable[[Batch], Tensor]  # what the classifier sees of a batch, float32 (B, D)
FORMAT = 1
DTYPES = ("float32", "float16")
DONE = "features.json"  # comes last: a folder with it is whole


@dataclass(frozen=True)
class Features:
    """Features (N, D) with labels and keys (N,), in the order of the dataset at any number of ranks.

    `parts` are memory-mapped, so that reading some rows takes the memory of these alone. `keys` are the numbers that
    stand for the keys of samples (`augment.key_number`).
    """

    parts: list[np.ndarray]
    labels: NDArray[np.int64]
    keys: NDArray[np.int64]

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
        return np.concatenate(found).astype(np.float32, copy=False)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of these numbers, float32 (n, D)."""
        taken, begin = np.empty((len(numbers), self.width), np.float32), 0
        for part in self.parts:
            here = (numbers >= begin) & (numbers < begin + len(part))
            taken[here] = part[numbers[here] - begin]
            begin += len(part)
        return taken

    def chunks(self, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows, `size` at a time, each with the number of its first."""
        for first in range(0, len(self), size):
            yield first, self.rows(first, min(first + size, len(self)))


def of_arrays(values_ND: np.ndarray, labels: np.ndarray, keys: np.ndarray | None = None) -> Features:
    """Features in memory; without `keys` the numbers of rows stand for them."""
    numbers = np.arange(len(labels)) if keys is None else keys
    return Features([values_ND], labels.astype(np.int64), numbers.astype(np.int64))


def identity(network: Network, preprocess: Preprocess, store: Store, dtype: str = "float32") -> dict[str, Any]:
    """What the features depend on: a digest of the weights by name, preprocessing, samples, and dtype."""
    digest = hashlib.blake2b(digest_size=16)
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

        def write(partial: Path) -> None:
            _write(represent, batches, images, world, partial, told["dtype"])

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
        parts = [np.load(folder / _name("values", *part), mmap_mode="r") for part in told["parts"]]
        labels, keys = (
            np.concatenate([np.load(folder / _name(kind, *part)) for part in told["parts"]])
            for kind in ("labels", "keys")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = sum(map(len, parts)) == len(labels) == len(keys) == told["images"]
    return Features(parts, labels, keys) if whole else None


def _compute(write: Callable[[Path], None], world: World, folder: Path, told: dict[str, Any]) -> None:
    """Compute and publish: all ranks `write` into one hidden folder, which rank 0 gives its name in the end."""
    partial = Path(gather(str(folder.with_name(f".{folder.name}-{os.getpid()}")))[0])
    error = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)
    except UserError as problem:
        error = problem
    except OSError as problem:
        error = UserError("--out", f"{problem}", "room for features", "Free some, or choose another folder.")
    try:
        agree(error)
        if world.main:
            parts = [(rank, world.size) for rank in range(world.size)]
            publish_text(partial / DONE, json.dumps({"format": FORMAT, "parts": parts, **told}))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        gather(None)
    finally:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()  # not inference_mode: partitioned weights that were gathered in it could not be trained
def _write(represent: Represent, batches: Iterator[Batch], images: int, world: World, folder: Path, dtype: str) -> None:
    """This rank's rows, written batch by batch to mapped files, which the kernel empties to disk as it sees fit."""
    low, high = order.rank_rows(images, world.rank, world.size)
    labels, keys = np.zeros(high - low, np.int64), np.zeros(high - low, np.int64)
    values = None
    for batch in batches:
        found_BD = represent(batch).cpu().numpy()
        if values is None:
            name = folder / _name("values", world.rank, world.size)
            shape = (high - low, found_BD.shape[1])
            values = np.lib.format.open_memmap(name, mode="w+", dtype=dtype, shape=shape)
        real = batch["weight"].cpu().numpy() > 0
        rows = batch["row"].cpu().numpy()[real] - low
        with np.errstate(over="ignore"):
            values[rows] = found_BD[real]
        labels[rows], keys[rows] = batch["label"].cpu().numpy()[real], batch["key"].cpu().numpy()[real]
        bad = ~np.isfinite(values[rows]).all(axis=1)
        if bad.any():
            got = f"features that are not finite as {dtype}, first of image {low + int(rows[bad.argmax()])}"
            raise UserError("CHECKPOINT", got, "finite ones", "Use another checkpoint of the run.")
    assert values is not None
    values.flush()
    np.save(folder / _name("labels", world.rank, world.size), labels)
    np.save(folder / _name("keys", world.rank, world.size), keys)


def _name(kind: str, rank: int, size: int) -> str:
    return f"{kind}-{rank:05d}-of-{size:05d}.npy"
