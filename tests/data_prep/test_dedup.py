"""Copies, exact and near, within a source and against other datasets: what is found, what stays, and what is said."""

import csv
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, PngImagePlugin

from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.dedup import PAIRS
from vitscale.data_prep.exchange import gather
from vitscale.data_prep.manifest import read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.storage import LocalFolder
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

NEAR = 64  # as the settings propose
TWIN = "daisy/10993818044_4c19b86c82.jpg"  # a second shot of the photo before it: 2 bits apart, and all others 86


def dedup(exact: str = "keep", near: int = 0, against: tuple[Path, ...] = (), **settings: Any) -> ShardConfig:
    return ShardConfig(dedup=DedupConfig(exact, near, [str(path) for path in against]), workers=1, **settings)


def key_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def records_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in pq.read_table(out / "manifest").to_pylist()}


def sharded(source: Path, out: Path, config: ShardConfig) -> dict[str, dict[str, Any]]:
    """Shard, compare all that counts records with each other, and return the records by name."""
    info, records = shard(str(source), str(out), config), records_of(out)
    status = Counter(row["status"] for row in records.values())
    assert info["samples"] == status["kept"] == sum(info["class_counts"]) == read_dataset(out).samples
    assert (info["duplicate"], info["leaked"]) == (status["duplicate"], status["leaked"])
    assert sum(info["rejected"].values()) == status["rejected"]
    assert info["summary"]["status"] == dict(status)
    with open(out / "rejected.csv", newline="") as file:
        lost = [(row["name"], row["status"], row["reason"]) for row in csv.DictReader(file)]
    assert lost == [(name, r["status"], r["reason"]) for name, r in records.items() if r["status"] != "kept"]
    assert all((row["key"] is None) == (row["reason"] is not None) for row in records.values())
    return records


def status_of(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["status"] for name, row in records.items()}


# Exact copies


@pytest.fixture
def copies(make_folder) -> Path:
    """Five pictures a class; of the first one there is a copy in each class, of the second one two in its own."""
    source = make_folder(each=5)
    shutil.copy(source / "ant" / "000.jpg", source / "bee" / "copy.jpg")
    shutil.copy(source / "ant" / "000.jpg", source / "cat" / "copy.jpg")
    shutil.copy(source / "ant" / "001.png", source / "ant" / "x.png")
    shutil.copy(source / "ant" / "001.png", source / "ant" / "y.png")
    return source


def test_copies_are_kept_under_numbered_keys_in_source_order(copies: Path, tmp_path: Path) -> None:
    records = sharded(copies, tmp_path / "out", dedup("keep"))
    for name, others in (
        ("ant/000.jpg", ("bee/copy.jpg", "cat/copy.jpg")),
        ("ant/001.png", ("ant/x.png", "ant/y.png")),
    ):
        key = key_of(copies / name)
        assert [records[other]["key"] for other in (name, *others)] == [key, f"{key}-1", f"{key}-2"]
    samples = read_samples(LocalFolder(str(tmp_path / "out")), "train-000000.tar")
    labels = dict(zip(samples.keys, samples.labels.tolist(), strict=True))
    key = key_of(copies / "ant" / "000.jpg")
    assert [labels[key], labels[f"{key}-1"], labels[f"{key}-2"]] == [0, 1, 2]
    assert verify(str(tmp_path / "out"), workers=1).problems == []


def test_copies_are_dropped_but_the_first(copies: Path, tmp_path: Path) -> None:
    records = sharded(copies, tmp_path / "out", dedup("drop"))
    jpeg, png = key_of(copies / "ant" / "000.jpg"), key_of(copies / "ant" / "001.png")
    assert {name: row["reason"] for name, row in records.items() if row["status"] == "duplicate"} == {
        "ant/x.png": f"duplicate: exact copy of {png}",
        "ant/y.png": f"duplicate: exact copy of {png}",
        "bee/copy.jpg": f"duplicate: exact copy of {jpeg}",
        "cat/copy.jpg": f"duplicate: exact copy of {jpeg}",
    }
    assert len({row["key"] for row in records.values() if row["key"]}) == 15
    assert verify(str(tmp_path / "out"), workers=1).problems == []


def test_near_drops_exact_copies_too(copies: Path, tmp_path: Path) -> None:
    records = sharded(copies, tmp_path / "out", dedup("keep", near=1))
    assert records["bee/copy.jpg"]["reason"] == f"duplicate: exact copy of {key_of(copies / 'ant' / '000.jpg')}"
    assert status_of(records)["ant/y.png"] == "duplicate"


# Near copies of photos


def half_size(photo: Image.Image) -> bytes:
    return jpeg(photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BICUBIC))


def low_quality(photo: Image.Image) -> bytes:
    return jpeg(photo, 50)


def crop(photo: Image.Image) -> bytes:
    """5% of the width and of the height gone, from the sides alike."""
    x, y = photo.width * 0.025, photo.height * 0.025
    return jpeg(photo.crop((round(x), round(y), round(photo.width - x), round(photo.height - y))))


def brighter(photo: Image.Image) -> bytes:
    return jpeg(ImageEnhance.Brightness(photo).enhance(1.1))


def jpeg(photo: Image.Image, quality: int = 90) -> bytes:
    buffer = BytesIO()
    photo.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


CHANGES: tuple[Callable[[Image.Image], bytes], ...] = (half_size, low_quality, crop, brighter)


def photos_of(shared_data: Path, splits: tuple[str, ...], each: int) -> Iterator[tuple[str, Path]]:
    for split in splits:
        for kind in sorted((shared_data / "photos" / split).iterdir()):
            yield from ((f"{kind.name}/{path.name}", path) for path in sorted(kind.iterdir())[:each])


def check_photos(photos: list[tuple[str, Path]], folder: Path) -> None:
    """Shard photos and what was made of them; assert which are found."""
    for name, path in photos:
        place = folder / "source" / "a" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        with Image.open(path) as photo:
            for change in CHANGES:
                made = folder / "source" / "b" / change.__name__ / name
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_bytes(change(photo))
    records = sharded(folder / "source", folder / "out", dedup(near=NEAR))
    assert len(records) == 5 * len(photos)
    flagged = {name for name, _ in photos if records[f"a/{name}"]["status"] != "kept"}
    assert len(flagged - {TWIN}) <= 0.001 * len(photos)
    assert TWIN in flagged
    keys = {name: key_of(path) for name, path in photos}
    keys[TWIN] = next(keys[name] for name, _ in photos if records[f"a/{TWIN}"]["reason"].endswith(keys[name]))
    for change in CHANGES:
        found = 0
        for name, _ in photos:
            reason = records[f"b/{change.__name__}/{name}"]["reason"] or ""
            match = re.fullmatch(r"duplicate: near copy, (\d+) bits, of (\w{24})", reason)
            found += match is not None and match[2] == keys[name] and int(match[1]) <= NEAR
        assert found >= 0.95 * len(photos), f"{change.__name__}: {found} of {len(photos)}"


def test_changed_photos_are_found_and_others_told_apart(shared_data: Path, tmp_path: Path) -> None:
    check_photos(list(photos_of(shared_data, ("train",), each=30)), tmp_path)


@pytest.mark.slow
def test_changed_photos_are_found_among_nine_hundred(shared_data: Path, tmp_path: Path) -> None:
    check_photos(list(photos_of(shared_data, ("train", "val"), each=1000)), tmp_path)


# Near copies by the bit: pictures made for their hash


def picture_of(signs: np.ndarray) -> Image.Image:
    """A grey picture whose lowest 16×16 frequencies have these signs, which are its hash (see phash.py)."""
    frequencies = np.zeros((64, 64), np.float32)
    frequencies[:16, :16] = 100 * signs.reshape(16, 16)
    frequencies[0, 0] = 64 * 128
    return Image.fromarray(np.clip(np.rint(cv2.idct(frequencies)), 0, 255).astype(np.uint8))


def signs_of(seed: int) -> np.ndarray:
    """As many of each, as the hash is relative to the median; the mean is positive."""
    signs = np.random.default_rng(seed).permutation(np.repeat([-1, 1], 128))
    signs[0], signs[np.flatnonzero(signs == 1)[-1]] = 1, signs[0]
    return signs


def differing(signs: np.ndarray, bits: int, skip: int = 0) -> np.ndarray:
    """Signs that differ in an even number of bits, all of high frequencies, past the first `skip` of these."""
    high = np.arange(10 * 16, 16 * 16)  # in no band, so that every pair of them meets
    turned = signs.copy()
    for sign in (-1, 1):
        turned[high[signs[high] == sign][skip // 2 : (skip + bits) // 2]] = -sign
    return turned


def write_pictures(folder: Path, pictures: dict[str, np.ndarray]) -> Path:
    for name, signs in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture_of(signs).save(folder / name)
    return folder


def test_the_limit_is_exact(tmp_path: Path) -> None:
    a, b = signs_of(0), signs_of(1)
    pictures = {"x/a.png": a, "x/b.png": b, "y/a10.png": differing(a, 10), "y/a12.png": differing(a, 12, 20)}
    source = write_pictures(tmp_path / "source", pictures | {"y/b30.png": differing(b, 30)})
    base = {name: key_of(source / name) for name in pictures}
    expected = {
        9: {},
        10: {"y/a10.png": (10, base["x/a.png"])},
        12: {"y/a10.png": (10, base["x/a.png"]), "y/a12.png": (12, base["x/a.png"])},
        30: {
            "y/a10.png": (10, base["x/a.png"]),
            "y/a12.png": (12, base["x/a.png"]),
            "y/b30.png": (30, base["x/b.png"]),
        },
    }
    for near, found in expected.items():
        records = sharded(source, tmp_path / f"out{near}", dedup(near=near))
        reasons = {name: row["reason"] for name, row in records.items() if row["reason"]}
        assert reasons == {name: f"duplicate: near copy, {bits} bits, of {key}" for name, (bits, key) in found.items()}


def test_the_first_in_source_order_stays(tmp_path: Path) -> None:
    a = signs_of(0)
    pictures = {"x/changed.png": differing(a, 8), "y/as it was.png": a, "z/again.png": differing(a, 6)}
    records = sharded(write_pictures(tmp_path / "source", pictures), tmp_path / "out", dedup(near=14))
    assert status_of(records) == {"x/changed.png": "kept", "y/as it was.png": "duplicate", "z/again.png": "duplicate"}


def test_a_copy_of_a_copy_is_one_even_where_that_went(tmp_path: Path) -> None:
    """Whether a record is a duplicate does not depend on what became of others, so that no order of work matters."""
    a = signs_of(0)
    pictures = {"x/1.png": a, "x/2.png": differing(a, 10), "x/3.png": differing(a, 20)}
    source = write_pictures(tmp_path / "source", pictures)
    records = sharded(source, tmp_path / "out", dedup(near=10))
    assert [row["reason"] for row in records.values()] == [
        None,
        f"duplicate: near copy, 10 bits, of {key_of(source / 'x/1.png')}",
        f"duplicate: near copy, 10 bits, of {key_of(source / 'x/2.png')}",
    ]


def test_two_thousand_pictures_that_look_the_same_leave_one(tmp_path: Path) -> None:
    """A placeholder under many URLs: equal hashes, bytes that differ. Pairs with the first one do, not all pairs."""
    (tmp_path / "source" / "blank").mkdir(parents=True)
    blank = picture_of(signs_of(0)).resize((16, 16))
    for number in range(2000):
        comment = PngImagePlugin.PngInfo()
        comment.add_text("Comment", str(number))
        blank.save(tmp_path / "source" / "blank" / f"{number:04d}.png", pnginfo=comment)
    config = dedup(near=NEAR)
    for stage in ("scan", "match"):
        shard(str(tmp_path / "source"), str(tmp_path / "out"), config, stage=stage)
    pairs = gather(LocalFolder(str(tmp_path / "out" / "work")), ["match/0000.arrow"], 0, PAIRS)
    assert len(pairs) == 1999
    records = sharded(tmp_path / "source", tmp_path / "out", config)
    assert [name for name, row in records.items() if row["status"] == "kept"] == ["blank/0000.png"]


# Leaks


def test_what_another_set_has_leaks(shared_data: Path, tmp_path: Path) -> None:
    photos = [path for _, path in photos_of(shared_data, ("val",), each=4)]
    for number, path in enumerate(photos[:10]):
        held = tmp_path / ("held" if number < 8 else "more") / "a"
        held.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, held)
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    for number, path in enumerate(photos):
        if 4 <= number < 10:
            with Image.open(path) as photo:
                (source / f"{number:02d}.jpg").write_bytes(half_size(photo))
        else:
            shutil.copy(path, source / f"{number:02d}.jpg")
    shutil.copy(photos[0], source / "90.jpg")  # a copy of what leaked leaks too
    shutil.copy(photos[12], source / "91.jpg")
    against = tmp_path / "test-set", tmp_path / "other-set"
    for name, out in zip(("held", "more"), against, strict=True):
        shard(str(tmp_path / name), str(out), dedup(split="test"))

    exact = sharded(source.parent, tmp_path / "exact", dedup(against=against))
    leaks = {name: row["reason"] for name, row in exact.items() if row["status"] == "leaked"}
    said = "leaked: exact copy of a sample of test-set"
    assert leaks == {f"a/{name}.jpg": said for name in ("00", "01", "02", "03", "90")}
    assert exact["a/91.jpg"]["status"] == "kept"

    near = sharded(source.parent, tmp_path / "near", dedup(near=NEAR, against=against))
    leaks = {name: row["reason"] for name, row in near.items() if row["status"] == "leaked"}
    assert sorted(leaks) == [f"a/{name}.jpg" for name in [*(f"{n:02d}" for n in range(10)), "90"]]
    for number in range(4, 10):
        name = "test-set" if number < 8 else "other-set"
        assert re.fullmatch(rf"leaked: near copy, \d+ bits, of a sample of {name}", leaks[f"a/{number:02d}.jpg"])
    assert near["a/91.jpg"]["reason"] == f"duplicate: exact copy of {key_of(photos[12])}"
    assert verify(str(tmp_path / "near"), workers=1).problems == []


def test_a_leak_comes_before_a_duplicate_and_only_kept_samples_leak(tmp_path: Path) -> None:
    a, b = signs_of(0), signs_of(1)
    held = write_pictures(tmp_path / "held", {"x/1.png": a, "x/2.png": b, "x/3.png": differing(b, 10)})
    shard(str(held), str(tmp_path / "test"), dedup(near=10))  # which leaves out x/3
    pictures = {"x/1.png": differing(a, 10), "x/2.png": differing(a, 14), "x/3.png": differing(b, 20), "x/4.png": b}
    source = write_pictures(tmp_path / "source", pictures)
    records = sharded(source, tmp_path / "out", dedup(near=14, against=(tmp_path / "test",)))
    assert [row["reason"] for row in records.values()] == [
        "leaked: near copy, 10 bits, of a sample of test",
        "leaked: near copy, 14 bits, of a sample of test",  # though it is a copy of x/1 too
        None,  # 10 bits from what the test set left out itself
        "leaked: exact copy of a sample of test",
    ]


def test_another_set_in_the_same_place_is_another_one(make_folder, tmp_path: Path) -> None:
    source, held = make_folder(), tmp_path / "held"
    for count in (2, 3):
        shutil.rmtree(held, ignore_errors=True)
        (tmp_path / f"first {count}" / "ant").mkdir(parents=True)
        for path in sorted((source / "ant").iterdir())[:count]:
            shutil.copy(path, tmp_path / f"first {count}" / "ant")
        shard(str(tmp_path / f"first {count}"), str(held), dedup(split="test"))
        assert shard(str(source), str(tmp_path / f"out{count}"), dedup(against=(held,)))["leaked"] == count
    with pytest.raises(UserError, match="another source or other settings"):
        shard(str(source), str(tmp_path / "out2"), dedup(against=(held,)))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"exact": "never"}, "dedup.exact"),
        ({"near": 97}, "dedup.near"),
        ({"near": True}, "dedup.near"),
        ({"against": "shards/test"}, "dedup.against"),
        ({"against": [""]}, "dedup.against"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError) as error:
        DedupConfig(**settings)
    assert error.value.setting == setting


def test_what_is_compared_with_must_be_a_dataset(make_folder, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        shard(str(make_folder()), str(tmp_path / "out"), dedup(against=(tmp_path / "nothing",)))
    assert error.value.setting == "dedup.against"
    assert not (tmp_path / "out").exists()


def test_near_duplicates_need_pixels() -> None:
    with pytest.raises(UserError, match=r"check=full or dedup\.near=0"):
        dedup(near=8, check="header")
