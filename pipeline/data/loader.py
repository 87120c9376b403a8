"""Batches for one rank: sample numbers from the order → views of images, by torch's DataLoader."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import finalize

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitscale.data_prep.decode import ImageRejected, decode_rgb
from vitscale.errors import UserError
from vitscale.model.config import Size, height_width
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Pixels, Preprocess, key_number, training_view
from vitscale.pipeline.data.order import Order
from vitscale.pipeline.data.store import Sample, Store
from vitscale.pipeline.data.workers import worker_deaths, worker_options
from vitscale.pipeline.distributed import World

Batch = dict[str, torch.Tensor]
NUMBERS = ("label", "number", "epoch", "row", "key", "digest", "skipped")
AHEAD = 4  # micro batches that each worker has ready: images differ in the time they take
LOOK_AHEAD = 500_000  # samples of the order whose shards are fetched ahead of their use
LOOK_EVERY, LOOKS = 64, 32  # steps from one look ahead to the next, and batches that it looks at


class Request(NamedTuple):
    """A sample by number, in an epoch, for a row of the global batch."""

    number: int
    epoch: int
    row: int


class View(Protocol):
    """How an encoded image becomes model input of `size` px. Picklable. Raises `ImageRejected`."""

    @property
    def size(self) -> Size: ...
    def __call__(self, data: bytes, epoch: int, key: str) -> Pixels: ...


@dataclass(frozen=True)
class TrainingView:
    """Random views, pure functions of (seed, epoch, sample key)."""

    size: Size
    augment: AugmentConfig
    seed: int

    def __call__(self, data: bytes, epoch: int, key: str) -> Pixels:
        return training_view(data, self.size, self.augment, self.seed, epoch, key)


@dataclass(frozen=True)
class EvaluationView:
    """The central view."""

    preprocess: Preprocess

    @property
    def size(self) -> Size:
        return self.preprocess.img_size

    def __call__(self, data: bytes, epoch: int, key: str) -> Pixels:
        return self.preprocess.view(decode_rgb(data))


@dataclass(frozen=True)
class LoaderSettings:
    """Images of a micro batch, and loader processes (0: load in the rank itself).

    `pairs` keeps rows 2i and 2i + 1 of a global batch together. With `skip` a sample that cannot be read is replaced by
    the next one that can.
    """

    micro_batch: int
    workers: int
    pairs: bool = False
    skip: bool = False

    @property
    def unit(self) -> int:
        """Rows that stay together."""
        return 2 if self.pairs else 1


def training_batches(
    store: Store, plan: Order, view: View, settings: LoaderSettings, world: World, steps: range
) -> Iterator[Batch]:
    """This rank's micro batches of all `steps` in order, `order.accumulation(…)` of them a step."""

    def requests() -> Iterator[list[Request]]:
        for step in steps:
            if store.remote and (step - steps.start) % LOOK_EVERY == 0:
                last = min(steps.stop, step + max(2 * LOOK_EVERY, LOOK_AHEAD // plan.size))
                looks = np.unique(np.linspace(step, last - 1, LOOKS).astype(int))
                store.fetch_ahead(np.concatenate([plan.batch(int(look))[0] for look in looks]))
            numbers, epochs = plan.batch(step)
            rows = np.arange(len(numbers))
            for micro in order.micro_batches(rows, world.rank, world.size, settings.micro_batch, settings.unit):
                yield [Request(int(numbers[row]), int(epochs[row]), int(row)) for row in micro]

    return _batches(store, view, requests, settings, world)


def evaluation_batches(store: Store, view: View, settings: LoaderSettings, world: World) -> Iterator[Batch]:
    """This rank's share of every sample once: as many batches on every rank, some of them padding alone.

    A row whose sample cannot be read has weight zero, where `settings` say to go on without it.
    """
    micros = order.micro_batches(np.arange(len(store)), world.rank, world.size, settings.micro_batch)

    def requests() -> Iterator[list[Request]]:
        for micro in micros:
            yield [Request(int(number), 0, int(number)) for number in micro]

    for batch in _batches(store, view, requests, settings, world):
        yield {**batch, "weight": batch["weight"] * (batch["skipped"] == 0)}


class _Slots:
    """Memory for the pixels of micro batches, which workers write and this process reads.

    It is used again once nothing refers to the tensor that was lent of it: fresh memory for each would cost a worker a
    tenth of its time.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._memory = [torch.empty(shape, dtype=torch.uint8).share_memory_() for _ in range(count)]
        self._free = deque(range(count))

    def take(self) -> int | None:
        """The number of a free one, if there is one."""
        return self._free.popleft() if self._free else None

    def array(self, slot: int) -> Pixels:
        return self._memory[slot].numpy()

    def lend(self, slot: int) -> torch.Tensor:
        """Its tensor, which this process alone reads from now on."""
        array = self.array(slot)[:]  # lives as long as the memory of any tensor made of it
        finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)


Micro = tuple[int | None, list[Request]]  # a slot for its pixels, and what it asks for
Loaded = tuple[int | None, torch.Tensor | None, torch.Tensor]  # slot, pixels where there is none, and numbers
NONE = -1  # in place of a label, where an image has fewer of them than another


class _Views(Dataset):
    """Map-style dataset of whole micro batches, padded to `rows` rows.

    Numbers are int64 (len(NUMBERS), B): in one tensor, as each takes a file descriptor and a message on its way out of
    a worker. Of a multi-label set the labels follow in further rows, as many as the image with the most of them has.
    A `UserError` is returned, not raised: workers would lose its text.
    """

    def __init__(self, store: Store, view: View, rows: int, skip: bool, slots: _Slots) -> None:
        self.store, self.view, self.rows, self.skip, self.slots = store, view, rows, skip, slots

    def __getitems__(self, micro: Micro) -> Loaded | UserError:
        slot, requests = micro
        shape = (self.rows, *height_width(self.view.size), 3)
        pixels = np.empty(shape, np.uint8) if slot is None else self.slots.array(slot)
        numbers = np.zeros((len(NUMBERS), self.rows), dtype=np.int64)
        numbers[NUMBERS.index("row")] = -1
        pixels[len(requests) :] = 0
        labels: list[tuple[int, ...]] = []
        try:
            for i, request in enumerate(requests):
                pixels[i], sample, number = self._row(request)
                skipped, key = number != request.number, key_number(sample.key)
                digest = key_number(f"{request.row} {sample.key}")
                numbers[:, i] = sample.label, number, request.epoch, request.row, key, digest, skipped
                labels.append(sample.labels)
        except UserError as error:
            return error
        if self.store.multi:
            numbers = np.concatenate([numbers, self._rows_of(labels)])
        return slot, torch.from_numpy(pixels) if slot is None else None, torch.from_numpy(numbers)

    def _rows_of(self, labels: list[tuple[int, ...]]) -> np.ndarray:
        """Labels of each image, one below the other: int64 (most labels of an image, at least 1; B)."""
        rows = np.full((max([1, *map(len, labels)]), self.rows), NONE, dtype=np.int64)
        for i, each in enumerate(labels):
            rows[: len(each), i] = each
        return rows

    def _row(self, request: Request) -> tuple[Pixels, Sample, int]:
        """A view, its sample, and its number: that of another sample where it stands in for the one asked for."""
        number, samples = request.number, len(self.store)
        while True:
            try:
                sample = self.store.read(number)
                return self._view(sample, request.epoch), sample, number
            except UserError:
                number = (number + 1) % samples
                if not self.skip or number == request.number:
                    raise

    def _view(self, sample: Sample, epoch: int) -> Pixels:
        try:
            return self.view(sample.data, epoch, sample.key)
        except ImageRejected as reason:
            where = f"{sample.key} in {sample.shard}: {reason}"
            remedy = "Run `vitscale verify` on the dataset and shard it again, or train without: data.on_error=skip."
            raise UserError("data", where, "an image", remedy) from reason


def _batches(
    store: Store, view: View, requests: Callable[[], Iterator[list[Request]]], settings: LoaderSettings, world: World
) -> Iterator[Batch]:
    cuda = world.device.type == "cuda"  # there, torch copies each batch to pinned memory, and the slots would not help
    rows = settings.micro_batch
    slots = _Slots(0 if cuda else settings.workers * (AHEAD + 1), (rows, *height_width(view.size), 3))
    loader = DataLoader(
        _Views(store, view, rows, settings.skip, slots),
        batch_sampler=((slots.take(), asked) for asked in requests()),  # pyright: ignore[reportArgumentType]
        pin_memory=cuda,
        **worker_options(settings.workers, AHEAD),
    )
    with worker_deaths(settings.workers):
        batches = _named(loader, slots)
        batches = _on_device(batches, world.device) if cuda else batches
        yield from _with_targets(batches, len(store.classes)) if store.multi else batches


def _named(loaded: Iterable[Loaded | UserError], slots: _Slots) -> Iterator[Batch]:
    """Batches as they are used: `pixels` uint8 (B, Y, X, 3), and of each row

    - `label`, `number` of the sample, `epoch`, `row` of the global batch (-1 where padded), `weight` (0 where padded)
    - of multi-label sets `labels` (M, B), -1 where a row has fewer; `label` means nothing there
    - `key`, 64 bits that stand for the sample's key, and `digest`, for its key in this row
    - `skipped`, 1 where the sample stands in for one that cannot be read
    """
    for each in loaded:
        if isinstance(each, UserError):
            raise each
        slot, pixels, numbers = each
        if pixels is None:
            assert slot is not None
            pixels = slots.lend(slot)
        named = dict(zip(NUMBERS, numbers, strict=False))
        if len(numbers) > len(NUMBERS):
            named["labels"] = numbers[len(NUMBERS) :]
        yield {"pixels": pixels, "weight": (named["row"] >= 0).float(), **named}
        del pixels  # else its slot is not free before the next one came


def _with_targets(batches: Iterator[Batch], classes: int) -> Iterator[Batch]:
    """Batches of a multi-label set with `targets`, bool (B, K), true for the labels of each image.

    Made where they are used: of 21,843 classes, those of 256 images take 5.6 MB.
    """
    for batch in batches:
        labels = batch.pop("labels")
        targets = torch.zeros((labels.shape[1], classes + 1), dtype=torch.bool, device=labels.device)
        targets.scatter_(1, torch.where(labels < 0, classes, labels).T, True)
        yield {**batch, "targets": targets[:, :classes]}
        del batch  # and the slot of its pixels


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Each batch on a GPU, copied on a stream of its own while the one before it is worked on."""
    copying = torch.cuda.Stream(device)
    waiting: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            waiting.append((moved, copying.record_event()))
        if len(waiting) > 1:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(batch: Batch, copied: "torch.cuda.Event") -> Batch:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.values():
        tensor.record_stream(current)  # its memory is not used again before this stream is done with it
    return batch
