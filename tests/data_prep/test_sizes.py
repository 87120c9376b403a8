"""How large shards and pictures become: shards by bytes, pictures by their shorter side."""

import math
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitscale.data_prep import phash
from vitscale.data_prep.config import ResizeConfig, ShardConfig
from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.integrity import image_format
from vitscale.data_prep.manifest import read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.verify import verify
from vitscale.data_prep.write import stored_size
from vitscale.errors import UserError

ENDING = 1024  # bytes that end a tar


def stored(out: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Record and stored bytes of each sample, by the name in the source."""
    records, found = {row["key"]: row for row in pq.read_table(out / "manifest").to_pylist()}, {}
    dataset = read_dataset(out)
    for entry in dataset.shards:
        samples = read_samples(dataset.folder, entry.name)
        for key, offset, length in zip(samples.keys, samples.offsets, samples.lengths, strict=True):
            found[records[key]["name"]] = records[key], dataset.folder.read(entry.name, int(offset), int(length))
    return found


# Shards


@pytest.mark.parametrize("target", [1, 2, 100])
def test_shards_by_bytes(encode, tmp_path: Path, target: int) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "source" / "noise").mkdir(parents=True)
    for number in range(100):
        side = int(random.integers(40, 240))
        noise = encode(random.integers(0, 256, (side, side, 3), np.uint8), "JPEG", quality=95)
        (tmp_path / "source" / "noise" / f"{number}.jpg").write_bytes(noise)
    out = tmp_path / "out"
    info = shard(str(tmp_path / "source"), str(out), ShardConfig(shard_samples=7, shard_mb=target, workers=1))
    dataset = read_dataset(out)
    lengths = [read_samples(dataset.folder, entry.name).lengths for entry in dataset.shards]
    total = int(stored_size(np.concatenate(lengths)).sum())
    assert len(dataset.shards) == math.ceil(total / (target * 10**6))
    assert (len(dataset.shards) > 1) == (target < 100)
    counts = [entry.samples for entry in dataset.shards]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == info["samples"] == 100
    for entry, sizes in zip(dataset.shards, lengths, strict=True):
        assert entry.bytes == stored_size(sizes).sum() + ENDING == (out / entry.name).stat().st_size
    assert verify(str(out), workers=1).problems == []


def test_no_shard_is_empty_where_pictures_are_larger_than_shards(encode, tmp_path: Path) -> None:
    (tmp_path / "source" / "noise").mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (900, 900, 3), np.uint8)
        (tmp_path / "source" / "noise" / f"{number}.jpg").write_bytes(encode(noise, "JPEG", quality=100))
    shard(str(tmp_path / "source"), str(tmp_path / "out"), ShardConfig(shard_mb=1, workers=1))
    assert [entry.samples for entry in read_dataset(tmp_path / "out").shards] == [1, 1, 1]
    assert read_dataset(tmp_path / "out").shards[0].bytes > 10**6


# Pictures


@settings(deadline=None)
@given(st.integers(1, 65_535), st.integers(1, 65_535), st.integers(1, 65_535))
def test_the_shorter_side_is_what_is_asked_for(height: int, width: int, shorter: int) -> None:
    target = ResizeConfig(shorter).target(height, width)
    if min(height, width) <= shorter:
        assert target is None
        return
    assert target is not None
    assert min(target) == shorter
    for side, now in zip((height, width), target, strict=True):
        assert now <= side
        assert abs(now - side * shorter / min(height, width)) <= 0.5


def test_no_size_asked_for_leaves_pictures_alone() -> None:
    assert ResizeConfig().target(1, 65_535) is None
    with pytest.raises(UserError) as error:
        ResizeConfig(-1)
    assert error.value.setting == "resize.shorter"


@pytest.fixture
def photos(shared_data: Path, tmp_path: Path) -> Path:
    """25 photos as they are, and four of them as turned JPEG, PNG, WebP and a small JPEG; sides from 147 to 640."""
    folder = tmp_path / "photos"
    for kind in sorted((shared_data / "photos" / "val").iterdir()):
        (folder / kind.name).mkdir(parents=True)
        for path in sorted(kind.iterdir())[:5]:
            (folder / kind.name / path.name).write_bytes(path.read_bytes())
    images = [Image.open(path) for path in sorted((folder / "daisy").iterdir())[:4]]
    exif = images[0].getexif()
    exif[0x0112] = 6
    images[0].save(folder / "daisy" / "turned.jpg", quality=95, exif=exif)
    images[1].save(folder / "daisy" / "plain.png")
    images[2].save(folder / "daisy" / "plain.webp", lossless=True)
    images[3].resize((60, 90)).save(folder / "daisy" / "small.jpg")
    return folder


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_pictures_are_made_smaller_and_never_larger(photos: Path, tmp_path: Path, format: str) -> None:
    shard(str(photos), str(tmp_path / "plain"), ShardConfig(workers=1))
    config = ShardConfig(workers=1, format=format, resize=ResizeConfig(160))
    shard(str(photos), str(tmp_path / "out"), config)
    plain, made = stored(tmp_path / "plain"), stored(tmp_path / "out")
    assert made.keys() == plain.keys()
    assert len(made) == 29
    smaller = 0
    for name, (record, data) in made.items():
        source = (photos / name).read_bytes()
        rgb, now = decode_rgb(source), decode_rgb(data)
        assert (record["height"], record["width"]) == rgb.shape[:2]  # the manifest is about the source
        if min(rgb.shape[:2]) <= 160:
            assert now.shape == rgb.shape
            assert data == source or name.endswith(("turned.jpg", "png", "webp"))
            continue
        smaller += 1
        assert min(now.shape[:2]) == 160
        assert max(now.shape[:2]) == round(max(rgb.shape[:2]) * 160 / min(rgb.shape[:2]))
        assert image_format(data) == {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[format]
        hashes = [np.frombuffer(row["phash"], np.uint8)[None] for row in (record, plain[name][0])]
        assert phash.distance(*hashes)[0] <= 26  # as phash.py has it for pictures of half the size
        expected = cv2.resize(rgb, now.shape[1::-1], interpolation=cv2.INTER_AREA)
        if not name.endswith(("turned.jpg", ".png", ".webp")):
            # decoded at a fraction of its size, whose last pixels reach beyond the picture: measured 25.6 to 52 dB
            assert decibels(now, expected) > 24
        elif format == "jpeg":
            assert decibels(now, expected) > 35  # measured 38.9 to 43.3, by quality 95
        else:
            np.testing.assert_array_equal(now, expected)
    assert smaller >= 20
    assert made["daisy/small.jpg"][1] == (photos / "daisy" / "small.jpg").read_bytes()
    assert verify(str(tmp_path / "out"), workers=1).problems == []


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("webp", "WEBP")])
def test_without_loss_is_without_loss(make_folder, tmp_path: Path, encode, picture, format: str, kind: str) -> None:
    """Pictures that cannot be stored as they are; upright JPEGs are, whatever the format."""
    source = make_folder()
    alpha = Image.fromarray(picture(50)).convert("RGBA")
    alpha.putalpha(Image.fromarray(picture(51)[..., 0]))
    (source / "ant" / "alpha.png").write_bytes(encode(alpha, "PNG"))
    (source / "ant" / "grey.bmp").write_bytes(encode(picture(52)[..., 0], "BMP"))
    (source / "ant" / "few.gif").write_bytes(encode(picture(53), "GIF"))
    shard(str(source), str(tmp_path / "out"), ShardConfig(workers=1, format=format))
    made = stored(tmp_path / "out")
    assert len(made) == 24
    for name, (_, data) in made.items():
        original = (source / name).read_bytes()
        np.testing.assert_array_equal(decode_rgb(data), decode_rgb(original))
        assert data == original if name.endswith(".jpg") else image_format(data) == kind
    suffixes = {member.suffix for member in map(Path, members_of(tmp_path / "out"))}
    assert suffixes == {".jpg", f".{format}", ".cls"}
    assert verify(str(tmp_path / "out"), workers=1).problems == []


def members_of(out: Path) -> list[str]:
    with tarfile.open(out / "train-000000.tar") as archive:
        return archive.getnames()
