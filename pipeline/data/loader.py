"""Batches for one rank: sample numbers from the order → views of images, by torch's DataLoader."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitscale.data_prep.decode import ImageRejected, decode_rgb
from vitscale.errors import UserError
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Pixels, Preprocess, training_view
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, die_with_parent

Batch = dict[str, torch.Tensor]
Request = tuple[int, int]  # sample number, epoch
Row = tuple[Pixels, int, int]  # view, label, sample number


class View(Protocol):
    """How a decoded image becomes model input of `size` px a side. Picklable."""

    @property
    def size(self) -> int: ...
    def __call__(self, rgb: Pixels, epoch: int, key: str) -> Pixels: ...


@dataclass(frozen=True)
class TrainingView:
    """Random views, pure functions of (seed, epoch, sample key)."""

    size: int
    augment: AugmentConfig
    seed: int

    def __call__(self, rgb: Pixels, epoch: int, key: str) -> Pixels:
        return training_view(rgb, self.size, self.augment, self.seed, epoch, key)


@dataclass(frozen=True)
class EvaluationView:
    """The central view."""

    preprocess: Preprocess

    @property
    def size(self) -> int:
        return self.preprocess.img_size

    def __call__(self, rgb: Pixels, epoch: int, key: str) -> Pixels:
        return self.preprocess.view(rgb)


@dataclass(frozen=True)
class LoaderSettings:
    """Images of a micro batch, and loader processes (0: load in the rank itself)."""

    micro_batch: int
    workers: int


def training_batches(
    store: Store, view: View, settings: LoaderSettings, world: World, *, seed: int, global_batch: int, steps: range
) -> Iterator[Batch]:
    """This rank's micro batches of all `steps` in order, `order.accumulation(…)` of them a step."""

    def requests() -> Iterator[list[Request]]:
        for step in steps:
            epoch, numbers = order.global_batch(len(store), seed, global_batch, step)
            for micro in order.micro_batches(numbers, world.rank, world.size, settings.micro_batch):
                yield [(int(number), epoch) for number in micro]

    return _batches(store, view, requests(), settings, world)


def evaluation_batches(store: Store, view: View, settings: LoaderSettings, world: World) -> Iterator[Batch]:
    """This rank's share of every sample once: as many batches on every rank, some of them padding alone."""
    numbers = order.micro_batches(np.arange(len(store)), world.rank, world.size, settings.micro_batch)
    return _batches(store, view, ([(int(n), 0) for n in micro] for micro in numbers), settings, world)


class _Views(Dataset):
    """Map-style dataset of whole batches. A `UserError` is returned, not raised: workers would lose its text."""

    def __init__(self, store: Store, view: View) -> None:
        self.store, self.view = store, view

    def __getitems__(self, requests: list[Request]) -> list[Row] | UserError:
        try:
            return [self._row(number, epoch) for number, epoch in requests]
        except UserError as error:
            return error

    def _row(self, number: int, epoch: int) -> Row:
        sample = self.store.read(number)
        try:
            rgb = decode_rgb(sample.data)
        except ImageRejected as reason:
            where = f"{sample.key} in {sample.shard}: {reason}"
            raise UserError("data", where, "an image", "Run `vitscale verify` on the dataset.") from reason
        return self.view(rgb, epoch, sample.key), sample.label, number


@dataclass(frozen=True)
class _Collate:
    """Rows → tensors of `rows` rows: `pixels` uint8 (B, Y, X, 3), `label`, `number`, and `weight` 0 where padded."""

    rows: int
    size: int

    def __call__(self, rows: list[Row] | UserError) -> Batch | UserError:
        if isinstance(rows, UserError):
            return rows
        pixels = np.zeros((self.rows, self.size, self.size, 3), dtype=np.uint8)
        label, number = np.zeros((2, self.rows), dtype=np.int64)
        for i, row in enumerate(rows):
            pixels[i], label[i], number[i] = row
        weight = (np.arange(self.rows) < len(rows)).astype(np.float32)
        arrays = {"pixels": pixels, "label": label, "number": number, "weight": weight}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _die_with_rank(worker: int) -> None:
    die_with_parent()


def _batches(
    store: Store, view: View, requests: Iterable[list[Request]], settings: LoaderSettings, world: World
) -> Iterator[Batch]:
    cuda = world.device.type == "cuda"
    loader = DataLoader(
        _Views(store, view),
        batch_sampler=requests,  # pyright: ignore[reportArgumentType] (any iterable of lists will do)
        collate_fn=_Collate(settings.micro_batch, view.size),
        num_workers=settings.workers,
        pin_memory=cuda,
        worker_init_fn=_die_with_rank,
        generator=torch.Generator(),  # its own: the global one belongs to the model's dropout
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield {name: tensor.to(world.device, non_blocking=cuda) for name, tensor in batch.items()}
