"""Samples, views and batches."""

import math
import time
from collections.abc import Callable
from io import BytesIO
from itertools import chain
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitscale.data_prep.decode import decode_rgb, encode
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
from vitscale.pipeline.metrics import Seen

CPU = torch.device("cpu")
PREPROCESS = Preprocess(16, 1.0)


def encoded(rgb: np.ndarray) -> bytes:
    return encode(rgb, "png")


def order_for(store: Store, size: int = 50, seed: int = 3) -> order.Order:
    return order.Order(store.sizes, [1] * len(store.sizes), seed=seed, streams=4, window=64, size=size)


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
        arguments: training_view(encoded(rgb), 16, config, *arguments)
        for arguments in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    first = views[0, 0, "a"]
    assert first.shape == (16, 16, 3)
    assert np.array_equal(first, training_view(encoded(rgb), 16, config, 0, 0, "a"))
    assert sum(np.array_equal(first, view) for view in views.values()) == 1


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.text(min_size=1, max_size=5),
    st.sampled_from(["resized", "shift", "none"]),
)
def test_any_picture_becomes_a_view(height: int, width: int, key: str, crop: str) -> None:
    view = training_view(encoded(photo(height, width)), 16, AugmentConfig(crop=crop), 0, 0, key)
    assert (view.shape, view.dtype) == ((16, 16, 3), np.uint8)
    assert PREPROCESS.view(photo(height, width)).shape == (16, 16, 3)


def test_views_of_other_shapes_show_things_as_they_are() -> None:
    """Where red rises over the width as green over the height: a view of twice the width shows twice the red."""
    square = np.zeros((240, 240, 3), dtype=np.uint8)
    square[..., 0], square[..., 1] = np.arange(240), np.arange(240)[:, None]
    whole = Preprocess((30, 60), 1.0).view(square)
    assert whole.shape == (30, 60, 3)
    assert np.ptp(whole[..., 0].astype(int)) == pytest.approx(2 * np.ptp(whole[..., 1].astype(int)), abs=6)
    assert whole[..., 1].mean() == pytest.approx(119.5, abs=1)  # the centre
    for view in (encoded(square), encode(square, "jpeg", 95)):
        cuts = [training_view(view, (30, 60), AugmentConfig(flip=False), 0, 0, str(i)).astype(int) for i in range(300)]
        spans = [np.ptp(cut[..., 0]) / np.ptp(cut[..., 1]) for cut in cuts if np.ptp(cut[..., 1]) > 50]
        assert all(cut.shape == (30, 60, 3) for cut in cuts)
        assert np.median(spans) == pytest.approx(2, rel=0.1)
        assert (min(spans), max(spans)) == pytest.approx((2 * 3 / 4, 2 * 4 / 3), rel=0.15)
    moved = training_view(encoded(square), (30, 60), AugmentConfig(crop="shift", flip=False), 0, 0, "a")
    assert moved.shape == (30, 60, 3)


def test_crops_cover_the_stated_areas_and_half_are_flipped() -> None:
    """Red rises by 255 over the width and green over the height: their spans tell the part that was taken."""
    config, data = AugmentConfig(scale_min=0.25), encoded(photo(200, 200))
    views = [training_view(data, 100, config, 0, 0, str(i)).astype(float) for i in range(500)]
    areas = [np.ptp(view[..., 0]) * np.ptp(view[..., 1]) / 255**2 for view in views]
    assert min(areas) >= 0.23  # a span ends half a pixel short of each edge
    assert max(areas) > 0.9
    assert np.mean(areas) == pytest.approx(0.6, abs=0.05)  # lower than 0.625: large parts of odd aspect do not fit
    flipped = sum(view[0, 0, 0] > view[0, -1, 0] for view in views)
    assert abs(flipped - 250) < 4 * math.sqrt(500 / 4)


def test_shifts_are_uniform_and_bounded() -> None:
    dot = np.zeros((32, 32, 3), dtype=np.uint8)
    dot[16, 16] = 255
    config, data = AugmentConfig(crop="shift", shift=0.125, flip=False), encoded(dot)
    places = [np.argwhere(training_view(data, 32, config, 0, 0, str(i))[..., 0])[0] for i in range(2000)]
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
    view = TrainingView((16, 24), AugmentConfig(), 0)
    by_rank = []
    for rank in range(world_size):
        world = World(rank, world_size, rank, CPU)
        settings = LoaderSettings(micro_batch, workers)
        batches = list(training_batches(store, order_for(store), view, settings, world, steps))
        accumulation = order.accumulation(50, world_size, micro_batch)
        assert len(batches) == accumulation * len(steps)
        assert all(batch["pixels"].shape == (micro_batch, 16, 24, 3) for batch in batches)
        numbers = [batch["number"][batch["weight"] > 0].tolist() for batch in batches]
        starts = range(0, len(numbers), accumulation)
        by_rank.append([list(chain.from_iterable(numbers[i : i + accumulation])) for i in starts])
    return [list(chain.from_iterable(parts)) for parts in zip(*by_rank, strict=True)]


def test_global_batches_are_the_same_for_any_ranks_workers_and_micro_batches(digits: Any) -> None:
    store = Store(str(digits.train), "data.train")
    expected = [order_for(store).batch(step)[0].tolist() for step in range(27, 31)]  # into epoch 1
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


def test_evaluation_goes_on_without_an_image_if_told_to(
    digits: Any, tmp_path: Path, corrupt: Callable[[Path], str]
) -> None:
    folder = copytree(digits.test, tmp_path / "test")
    corrupt(next(folder.glob("*.tar")))
    world, settings = World(0, 1, 0, CPU), LoaderSettings(16, 0, skip=True)
    batches = list(evaluation_batches(Store(str(folder), "data.val"), EvaluationView(PREPROCESS), settings, world))
    assert sum(int(batch["skipped"].sum()) for batch in batches) == 1
    counted = torch.cat([batch["number"][batch["weight"] > 0] for batch in batches])
    assert sorted(counted.tolist()) == [number for number in range(359) if number != 5]


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


def test_views_of_a_halved_jpeg_are_those_of_the_whole() -> None:
    """A part of at least twice the size is decoded at half of it: the same picture but for rounded edges.

    The picture rises by 255 over 400 px: an edge off by half a pixel of the halved one moves a level by 0.6.
    """
    rgb = photo(400, 400)
    config = AugmentConfig(scale_min=1.0, flip=False)
    whole, halved = (training_view(data, 64, config, 0, 0, "a") for data in (encoded(rgb), encode(rgb, "jpeg", 95)))
    assert np.abs(whole.astype(float) - halved).mean() < 1.5
    assert np.abs(whole.astype(float) - halved).max() < 8


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3, 6, 8]))
@settings(max_examples=60, deadline=None)
def test_any_jpeg_becomes_a_view(height: int, width: int, orientation: int) -> None:
    buffer, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(height, width)).save(buffer, "JPEG", exif=exif)
    assert training_view(buffer.getvalue(), 16, AugmentConfig(), 0, 0, f"{height}").shape == (16, 16, 3)


def digests(store: Store, world_size: int, micro_batch: int, workers: int, steps: range) -> list[str]:
    """The digest of each step, put together from all ranks."""
    sums = np.zeros(len(steps), np.uint64)
    for rank in range(world_size):
        batches = training_batches(
            store, order_for(store), TrainingView(16, AugmentConfig(), 0), LoaderSettings(micro_batch, workers),
            World(rank, world_size, rank, CPU), steps,
        )  # fmt: skip
        seen = Seen(batches, order.accumulation(50, world_size, micro_batch))
        assert sum("digest" in batch for batch in seen) == 0
        sums += np.array([int(digest, 16) for digest in seen.take()[0]], np.uint64)
    return [f"{digest:016x}" for digest in sums.tolist()]


def test_digests_tell_samples_and_rows_whatever_the_ranks(digits: Any) -> None:
    store = Store(str(digits.train), "data.train")
    expected = digests(store, 1, 50, 0, range(26, 32))
    assert len(set(expected)) == 6
    assert digests(store, 3, 7, 1, range(26, 32)) == expected
    for first in range(26, 32):  # a resume at every step
        assert digests(store, 2, 16, 0, range(first, 32)) == expected[first - 26 :]


def test_pairs_stay_together(digits: Any) -> None:
    store = Store(str(digits.train), "data.train")
    plan = order_for(store, 51)
    micro = order.micro_batch_size(51, 3, 7, unit=2)
    rows = []
    for rank in range(3):
        settings = LoaderSettings(micro, 0, pairs=True)
        view, world = TrainingView(16, AugmentConfig(), 0), World(rank, 3, rank, CPU)
        for batch in training_batches(store, plan, view, settings, world, range(1)):
            real = batch["row"][batch["weight"] > 0].tolist()
            assert all(a + 1 == b for a, b in zip(real[0::2], real[1::2], strict=False))
            assert all(row % 2 == 0 for row in real[0::2])
            assert batch["row"][batch["weight"] == 0].tolist() == [-1] * (micro - len(real))
            rows += real
    assert rows == list(range(51))


def test_several_datasets_are_mixed_in_their_shares(digits: Any, tmp_path: Path) -> None:
    store = Store([str(digits.train), str(digits.test)], "data.train")
    assert len(store) == 1438 + 359
    keys = {store.read(number).key for number in range(1438, 1438 + 359)}
    plan = order.Order(store.sizes, [4, 1], seed=3, streams=4, window=64, size=50)
    view, world = TrainingView(16, AugmentConfig(), 0), World(0, 1, 0, CPU)
    for batch in training_batches(store, plan, view, LoaderSettings(50, 0), world, range(40)):
        assert (batch["number"] >= 1438).sum() == 10
    assert store.read(1438).key in keys
    other = Store(str(digits.test), "data.val")
    assert store.read(1438 + 17) == other.read(17)
    renamed = copytree(digits.test, tmp_path / "renamed")
    info = (renamed / "dataset.json").read_text()
    (renamed / "dataset.json").write_text(info.replace('"9"', '"nine"'))
    with pytest.raises(UserError, match=r"data\.train: got .*renamed, with other classes"):
        Store([str(digits.train), str(renamed)], "data.train")


def damage(folder: Path, kind: str, tar: Path) -> None:
    """What happens to a shard: its neighbours in the folder are left alone."""
    if kind == "gone":
        tar.unlink()
    elif kind == "cut":
        tar.write_bytes(tar.read_bytes()[:2000])
    elif kind == "replaced":
        tar.write_bytes(bytes(tar.stat().st_size))
    else:
        (folder / tar.name.replace(".tar", ".samples.parquet")).write_bytes(b"PAR1 and no more")


@pytest.mark.parametrize("kind", ["gone", "cut", "replaced", "sidecar"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_in_mid_epoch_stops_or_is_stepped_over(
    digits: Any, tmp_path: Path, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscale.pipeline.data.store.FIRST_DELAY", 0.01)
    folder = copytree(digits.train, tmp_path / "train")
    store = Store(str(folder), "data.train")
    plan, world, view = order_for(store), World(0, 1, 0, CPU), TrainingView(16, AugmentConfig(), 0)
    tar = sorted(folder.glob("*.tar"))[2]
    lost = range(int(store.sizes[0][:2].sum()), int(store.sizes[0][:3].sum()))

    def run(skip: bool) -> list[dict[str, torch.Tensor]]:
        steps = range(28)
        settings = LoaderSettings(50, workers, skip=skip)
        return list(training_batches(Store(str(folder), "data.train", check=False), plan, view, settings, world, steps))

    sound = run(skip=True)
    assert sum(int(batch["skipped"].sum()) for batch in sound) == 0
    damage(folder, kind, tar)
    with pytest.raises(UserError, match=tar.name.removesuffix(".tar")):
        run(skip=False)
    batches, again = run(skip=True), run(skip=True)
    skipped = torch.cat([batch["skipped"] for batch in batches])
    assert [batch["weight"].sum() for batch in batches] == [50] * 28  # no batch shrinks
    before, after = (torch.cat([batch["number"] for batch in some]) for some in (sound, batches))
    assert torch.equal(before[skipped == 0], after[skipped == 0])
    assert set(before[skipped == 1].tolist()) <= set(lost)
    if kind != "cut":  # of which the first samples are left
        assert int(skipped.sum()) == sum(number in lost for number in before.tolist())
        assert set(after[skipped == 1].tolist()) == {lost.stop}
    assert torch.equal(after, torch.cat([batch["number"] for batch in again]))


def test_a_read_that_fails_once_is_tried_again(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.pipeline.data.store.FIRST_DELAY", 0.01)
    folder = copytree(digits.test, tmp_path / "test")
    store, tar = Store(str(folder), "data.val"), next(folder.glob("*.tar"))
    expected = store.read(0)
    whole = tar.read_bytes()
    tar.write_bytes(b"")
    monkeypatch.setattr(time, "sleep", lambda seconds: tar.write_bytes(whole))  # the file comes back in the meantime
    assert store.read(0) == expected


def test_sidecars_in_memory_are_bounded(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.pipeline.data.store.HELD_SAMPLES", 700)
    store, free = Store(str(digits.train), "data.train"), Store(str(digits.train), "data.train")
    for number in np.random.default_rng(0).permutation(len(store))[:300]:
        store.read(int(number))
        held = sum(len(sidecar.labels) for sidecar in store._sidecars.values())
        assert held <= 700
    assert [store.read(n) for n in range(0, 1438, 97)] == [free.read(n) for n in range(0, 1438, 97)]


def test_pixels_stay_as_long_as_anything_of_them_is_held(digits: Any) -> None:
    """Workers write into memory that is used again: not while a part of a batch, though not the batch, is kept."""
    store = Store(str(digits.train), "data.train")
    view, world = TrainingView(16, AugmentConfig(), 0), World(0, 1, 0, CPU)

    def pixels(workers: int, kept: slice) -> list[torch.Tensor]:
        settings = LoaderSettings(25, workers)
        batches = training_batches(store, order_for(store), view, settings, world, range(28))
        return [batch["pixels"][kept] for number, batch in enumerate(batches) if number % 3 == 0]

    expected = pixels(0, slice(None))
    assert all(map(torch.equal, pixels(2, slice(None)), expected))
    assert all(torch.equal(ours, whole[3:5]) for ours, whole in zip(pixels(1, slice(3, 5)), expected, strict=True))
