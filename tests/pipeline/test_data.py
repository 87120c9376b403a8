"""Samples, views and batches."""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitscale.data_prep.decode import decode_rgb
from vitscale.errors import UserError
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess, normalise, training_view
from vitscale.pipeline.data.loader import (
    EvaluationView,
    LoaderSettings,
    TrainingView,
    evaluation_batches,
    training_batches,
)
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World

CPU = torch.device("cpu")
PREPROCESS = Preprocess(16, 1.0)


def photo(height: int, width: int) -> np.ndarray:
    """A picture whose red is its column and whose green is its row."""
    column, row = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([column, row, np.zeros_like(row)], axis=-1).round().astype(np.uint8)


def test_store_reads_every_sample_across_shards(digits: Any) -> None:
    store = Store(str(digits.train), "data.train")
    samples = [store.read(number) for number in range(len(store))]
    assert len({sample.shard for sample in samples}) == 5
    assert len({sample.key for sample in samples}) == 1438
    assert store.classes == [str(digit) for digit in range(10)]
    counts = [len(list((digits.train_images / name).iterdir())) for name in store.classes]
    assert np.bincount([sample.label for sample in samples]).tolist() == counts
    assert all(decode_rgb(sample.data).shape[2] == 3 for sample in samples[:20])


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_store_refuses_a_damaged_folder(digits: Any, tmp_path: Path, damage: str) -> None:
    folder = copytree(digits.test, tmp_path / "test")
    victim = next(folder.glob("*.tar"))
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-5000])
    else:
        victim.unlink()
    with pytest.raises(UserError, match=r"^data\.val: .*" + victim.name):
        Store(str(folder), "data.val")


def test_a_shard_cut_while_it_is_read_is_named(digits: Any, tmp_path: Path) -> None:
    folder = copytree(digits.test, tmp_path / "test")
    store = Store(str(folder), "data.val")
    store.read(0)
    next(folder.glob("*.tar")).write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.val: .*0 of \d+ bytes"):
        store.read(1)


def test_views_are_pure_functions_of_seed_epoch_and_key() -> None:
    config, rgb = AugmentConfig(), photo(40, 60)
    views = {
        arguments: training_view(rgb, 16, config, *arguments)
        for arguments in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    first = views[0, 0, "a"]
    assert first.shape == (16, 16, 3)
    assert np.array_equal(first, training_view(rgb.copy(), 16, config, 0, 0, "a"))
    assert sum(np.array_equal(first, view) for view in views.values()) == 1


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.text(min_size=1, max_size=5),
    st.sampled_from(["resized", "shift", "none"]),
)
def test_any_picture_becomes_a_view(height: int, width: int, key: str, crop: str) -> None:
    view = training_view(photo(height, width), 16, AugmentConfig(crop=crop), 0, 0, key)
    assert (view.shape, view.dtype) == ((16, 16, 3), np.uint8)
    assert PREPROCESS.view(photo(height, width)).shape == (16, 16, 3)


def test_crops_cover_the_stated_areas_and_half_are_flipped() -> None:
    """Red rises by 255 over the width and green over the height: their spans tell the part that was taken."""
    config = AugmentConfig(scale_min=0.25)
    views = [training_view(photo(200, 200), 100, config, 0, 0, str(i)).astype(float) for i in range(500)]
    areas = [np.ptp(view[..., 0]) * np.ptp(view[..., 1]) / 255**2 for view in views]
    assert min(areas) >= 0.23  # a span ends half a pixel short of each edge
    assert max(areas) > 0.9
    assert np.mean(areas) == pytest.approx(0.6, abs=0.05)  # lower than 0.625: large parts of odd aspect do not fit
    flipped = sum(view[0, 0, 0] > view[0, -1, 0] for view in views)
    assert abs(flipped - 250) < 4 * math.sqrt(500 / 4)


def test_shifts_are_uniform_and_bounded() -> None:
    dot = np.zeros((32, 32, 3), dtype=np.uint8)
    dot[16, 16] = 255
    config = AugmentConfig(crop="shift", shift=0.125, flip=False)
    places = [np.argwhere(training_view(dot, 32, config, 0, 0, str(i))[..., 0])[0] for i in range(2000)]
    moved = np.array(places) - 16
    assert sorted(set(moved[:, 0])) == sorted(set(moved[:, 1])) == list(range(-4, 5))
    counts = np.bincount(moved[:, 0] + 4)
    assert abs(counts - 2000 / 9).max() < 5 * math.sqrt(2000 / 9)


def test_evaluation_takes_the_centre_and_normalises() -> None:
    view = Preprocess(img_size=20, crop=0.5).view(photo(40, 80))
    assert view[0, :, 0].mean() == pytest.approx(127.5, abs=1)
    assert view[0, -1, 0] - view[0, 0, 0] == pytest.approx(255 * 19 / 79, abs=2)
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    preprocess = Preprocess(1, 1.0, mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 2.0))
    assert normalise(pixels, preprocess).flatten().tolist() == pytest.approx([-1, 0, 0.5], abs=1e-6)


def collect(store: Store, world_size: int, micro_batch: int, workers: int, steps: range) -> list[list[int]]:
    """Sample numbers of each global batch, put together from all ranks."""
    view = TrainingView(16, AugmentConfig(), 0)
    by_rank = []
    for rank in range(world_size):
        world = World(rank, world_size, rank, CPU)
        settings = LoaderSettings(micro_batch, workers)
        batches = list(training_batches(store, view, settings, world, seed=3, global_batch=50, steps=steps))
        accumulation = order.accumulation(50, world_size, micro_batch)
        assert len(batches) == accumulation * len(steps)
        assert all(batch["pixels"].shape == (micro_batch, 16, 16, 3) for batch in batches)
        numbers = [batch["number"][batch["weight"] > 0].tolist() for batch in batches]
        starts = range(0, len(numbers), accumulation)
        by_rank.append([list(chain.from_iterable(numbers[i : i + accumulation])) for i in starts])
    return [list(chain.from_iterable(parts)) for parts in zip(*by_rank, strict=True)]


def test_global_batches_are_the_same_for_any_ranks_workers_and_micro_batches(digits: Any) -> None:
    store = Store(str(digits.train), "data.train")
    expected = [order.global_batch(len(store), 3, 50, step)[1].tolist() for step in range(27, 31)]  # into epoch 1
    for world_size, micro_batch, workers in ((1, 50, 0), (2, 8, 1), (3, 7, 0), (7, 3, 0), (50, 4, 0)):
        assert collect(store, world_size, micro_batch, workers, range(27, 31)) == expected


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_sees_every_sample_once(digits: Any, world_size: int) -> None:
    store = Store(str(digits.test), "data.val")
    seen, lengths = [], set()
    for rank in range(world_size):
        world = World(rank, world_size, rank, CPU)
        batches = list(evaluation_batches(store, EvaluationView(PREPROCESS), LoaderSettings(16, 0), world))
        lengths.add(len(batches))
        seen += [number for batch in batches for number in batch["number"][batch["weight"] > 0].tolist()]
    assert seen == list(range(len(store)))
    assert len(lengths) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(
    digits: Any, tmp_path: Path, workers: int, corrupt: Callable[[Path], str]
) -> None:
    folder = copytree(digits.test, tmp_path / "test")
    key = corrupt(next(folder.glob("*.tar")))
    world = World(0, 1, 0, CPU)
    batches = evaluation_batches(
        Store(str(folder), "data.val"), EvaluationView(PREPROCESS), LoaderSettings(16, workers), world
    )
    with pytest.raises(UserError, match=key):
        list(batches)


@pytest.fixture
def corrupt() -> Callable[[Path], str]:
    """Overwrite the first image of a tar with zeros; returns its key."""

    def spoil(tar: Path) -> str:
        from vitscale.data_prep.manifest import read_samples
        from vitscale.data_prep.storage import LocalFolder

        samples = read_samples(LocalFolder(str(tar.parent)), tar.name)
        with tar.open("r+b") as file:
            file.seek(samples.offsets[5])
            file.write(bytes(int(samples.lengths[5])))
        return samples.keys[5]

    return spoil


def test_grey_digits_decode_to_their_pixels(digits: Any) -> None:
    """JPEG at quality 95 moves a grey level by a few."""
    store = Store(str(digits.test), "data.val")
    sample = store.read(0)
    originals = [np.array(Image.open(path).convert("RGB")) for path in digits.test_images.rglob("*.png")]
    decoded = decode_rgb(sample.data).astype(float)
    differences = [abs(decoded - other).max() for other in originals if other.shape == decoded.shape]
    assert min(differences) <= 12
