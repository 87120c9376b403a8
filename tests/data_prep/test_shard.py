"""From a source to a published dataset: what is in it, and that nothing but source and settings decides its bytes."""

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from webdataset.compat import WebDataset

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.manifest import read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.sources import open_source
from vitscale.data_prep.storage import LocalFolder
from vitscale.errors import UserError

SMALL = ShardConfig(shard_samples=8, workers=1)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "manifest").to_pylist()


def refusal(source: Path, out: Path, config: ShardConfig = SMALL) -> UserError:
    with pytest.raises(UserError) as error:
        shard(str(source), str(out), config)
    return error.value


def test_any_webdataset_reader_reads_what_was_put_in(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    info = shard(str(source), str(out), SMALL)
    assert [entry.samples for entry in read_dataset(out).shards] == [7, 7, 7]  # 21 in the fewest shards of at most 8
    assert info["class_counts"] == [7, 7, 7]
    listed = open_source(str(source))
    originals = {
        hashlib.sha256(item.data).hexdigest()[:24]: (item.data, item.label)
        for chunk in listed.chunks
        for item in chunk.read(listed.folder)
        if item.data is not None
    }
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    reader: Any = WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(reader)
    assert {sample["__key__"] for sample in samples} == set(originals)
    for sample in samples:
        data, label = originals[sample["__key__"]]
        assert sample["cls"] == label
        # kept JPEGs are equal; PNGs pass through JPEG at quality 95: at most 1 of 255 off on average (measured 0.6)
        difference = np.abs(sample["jpg"].astype(int) - decode_rgb(data)).mean()
        assert difference == 0 if data.startswith(b"\xff\xd8") else difference < 1


def test_sidecars_give_random_access(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    shard(str(source), str(out), SMALL)
    records = {row["key"]: row for row in records_of(out)}
    for entry in read_dataset(out).shards:
        samples, tar = read_samples(LocalFolder(str(out)), entry.name), (out / entry.name).read_bytes()
        assert hashlib.sha256(tar).hexdigest() == entry.sha256
        for key, label, offset, length in zip(
            samples.keys, samples.labels, samples.offsets, samples.lengths, strict=True
        ):
            image, record = tar[offset : offset + length], records.pop(key)
            assert label == record["label"]
            assert decode_rgb(image).shape == (record["height"], record["width"], 3) == (20, 28, 3)
            if record["format"] == "JPEG":
                assert image == (source / record["name"]).read_bytes()
                assert hashlib.sha256(image).digest() == record["sha256"]
    assert records == {}


def test_bytes_do_not_depend_on_workers_or_listing_order(make_folder, tmp_path: Path) -> None:
    one = make_folder("one/images")
    two = make_folder("two/images", step=-1)  # the same files, made in reverse order
    shard(str(one), str(tmp_path / "a"), SMALL)
    shard(str(two), str(tmp_path / "b"), ShardConfig(shard_samples=8, workers=2))
    a, b = bytes_of(tmp_path / "a"), bytes_of(tmp_path / "b")
    assert a == b
    assert sorted(a) == sorted(
        [f"train-00000{number}.{suffix}" for number in range(3) for suffix in ("samples.parquet", "tar")]
        + ["card.html", "card.md", "dataset.json", "index.parquet", "manifest/000-0000.parquet", "rejected.csv"]
    )
    assert not any(str(tmp_path).encode() in content for content in a.values())


def test_seed_changes_the_order_and_nothing_else(make_folder, tmp_path: Path) -> None:
    source = make_folder()
    orders = []
    for seed in (0, 1):
        shard(str(source), str(tmp_path / str(seed)), ShardConfig(seed=seed, workers=1))
        orders.append(read_samples(LocalFolder(str(tmp_path / str(seed))), "train-000000.tar").keys)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_rejected_images_are_listed_with_reasons(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(each=4), tmp_path / "out"
    whole = (source / "ant" / "000.jpg").read_bytes()
    (source / "ant" / "cut, short.jpg").write_bytes(whole[:-10])
    (source / "bee" / "page.jpg").write_bytes(b"<html>")
    (source / "cat" / "empty.jpg").touch()
    (source / "cat" / "gone.jpg").symlink_to("nowhere")
    info = shard(str(source), str(out), SMALL)
    assert info["samples"] == 12
    assert info["rejected"] == {"empty file": 1, "not an image": 1, "truncated": 1, "unreadable": 1}
    with open(out / "rejected.csv", newline="") as file:
        rows = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert rows == {
        "ant/cut, short.jpg": "truncated: Premature end of JPEG file",
        "bee/page.jpg": "not an image",
        "cat/empty.jpg": "empty file",
        "cat/gone.jpg": "unreadable: No such file or directory",
    }
    records = records_of(out)
    assert {row["name"]: row["reason"] for row in records if row["status"] == "rejected"} == rows
    assert all((row["key"] is None) == (row["status"] == "rejected") for row in records)


def test_exact_copies_get_keys_of_their_own(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(classes=("ant",), each=1), tmp_path / "out"
    for name in ("1.jpg", "2.jpg"):
        shutil.copy(source / "ant" / "000.jpg", source / "ant" / name)
    shard(str(source), str(out), SMALL)
    key = hashlib.sha256((source / "ant" / "000.jpg").read_bytes()).hexdigest()[:24]
    assert sorted(read_samples(LocalFolder(str(out)), "train-000000.tar").keys) == [key, f"{key}-1", f"{key}-2"]


def test_a_class_without_a_readable_image_stays_a_class(make_folder, tmp_path: Path) -> None:
    source = make_folder(each=1)
    (source / "bee" / "000.jpg").write_bytes(b"<html>")
    (source / "dog").mkdir()
    info = shard(str(source), str(tmp_path / "out"), SMALL)
    assert (info["classes"], info["class_counts"]) == (["ant", "bee", "cat", "dog"], [1, 0, 1, 0])


def test_a_label_that_names_no_class_is_rejected(make_parquet, picture, encode, tmp_path: Path) -> None:
    images = [encode(picture(number), "PNG") for number in range(4)]
    source = make_parquet(images, [0, 2, 1, None], ["no", "yes"])
    info = shard(str(source), str(tmp_path / "out"), SMALL)
    assert (info["samples"], info["class_counts"], info["rejected"]) == (2, [1, 1], {"label": 2})
    reasons = {row["name"]: row["reason"] for row in records_of(tmp_path / "out") if row["status"] == "rejected"}
    assert reasons == {
        "train.parquet:1": "label: 2 of 2 classes",
        "train.parquet:3": "label: 'None' is no class number",
    }


def test_nothing_but_rejected_images(make_parquet, tmp_path: Path) -> None:
    error = refusal(make_parquet([b"x", b"y"], [0, 1], ["no", "yes"]), tmp_path / "out")
    assert "of which no image is kept (first: not an image)" in str(error)


def test_a_complete_dataset_is_left_alone(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    first = shard(str(source), str(out), SMALL)
    assert first.pop("already_complete") is False
    assert first == json.loads((out / "dataset.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    moved = source.rename(tmp_path / "elsewhere")
    again = shard(str(moved), str(out), ShardConfig(shard_samples=8, workers=2))
    assert again == first | {"already_complete": True}
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before


def test_other_settings_or_source_are_refused(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    shard(str(source), str(out), SMALL)
    before = bytes_of(out)
    assert refusal(source, out, ShardConfig(shard_samples=8, seed=1)).setting == "OUT"
    (source / "ant" / "new.jpg").write_bytes(b"one more")
    assert "another source or other settings" in str(refusal(source, out))
    assert bytes_of(out) == before


def test_files_of_the_users_are_never_touched(make_folder, tmp_path: Path) -> None:
    source, out = make_folder(), tmp_path / "out"
    out.mkdir()
    for name in ("thesis.txt", "train-000000.tar", "index.parquet", "x.partial"):
        (out / name).write_bytes(b"mine")
        assert name in str(refusal(source, out))
        assert bytes_of(out) == {name: b"mine"}
        (out / name).unlink()
    (tmp_path / "file").write_bytes(b"mine")
    assert "which is a file" in str(refusal(source, tmp_path / "file"))
    assert "within SOURCE" in str(refusal(source, source / "shards"))


def test_cifar10_rows_arrive_unchanged(shared_data: Path, tmp_path: Path) -> None:
    whole = pq.ParquetFile(shared_data / "cifar10" / "test-00000-of-00001.parquet")
    rows = whole.read_row_groups([0, 1]).slice(850, 300)
    pq.write_table(rows, tmp_path / "test-00000-of-00001.parquet", row_group_size=100)
    info = shard(str(tmp_path / "test-*.parquet"), str(tmp_path / "out"), ShardConfig(split="test", shard_samples=128))
    assert info["samples"] == 300
    assert info["classes"][:2] == ["airplane", "automobile"]
    expected = sorted((row["image"]["bytes"], row["label"]) for row in rows.to_pylist())
    found = []
    for entry in read_dataset(tmp_path / "out").shards:
        samples, tar = (
            read_samples(LocalFolder(str(tmp_path / "out")), entry.name),
            (tmp_path / "out" / entry.name).read_bytes(),
        )
        for label, start, length in zip(samples.labels, samples.offsets, samples.lengths, strict=True):
            found.append((tar[start : start + length], label))
    assert sorted(found) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("split", "a/b"), ("split", ""), ("seed", -1), ("shard_samples", 0), ("jpeg_quality", 101), ("workers", 1.5)],
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        ShardConfig(**{name: value})  # pyright: ignore[reportArgumentType]
    assert error.value.setting == name
