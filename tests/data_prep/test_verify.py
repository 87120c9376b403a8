"""Every kind of damage is found, and named by shard or sample."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.manifest import read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.storage import LocalFolder
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

TAR = "train-000001.tar"


@pytest.fixture
def out(make_folder, tmp_path: Path) -> Path:
    shard(str(make_folder()), str(tmp_path / "out"), ShardConfig(shard_samples=8, workers=1))
    return tmp_path / "out"


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def problems(out: Path) -> list[str]:
    return verify(str(out), workers=1).problems


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_dataset(out: Path, workers: int) -> None:
    calls = []
    report = verify(str(out), lambda *progress: calls.append(progress), workers)
    assert (report.problems, report.shards, report.samples) == ([], 3, 21)
    assert calls == [("verify", done, 4) for done in range(1, 5)]  # three shards, one part of the manifest


def test_parts_cover_all_shards_and_find_the_same(out: Path) -> None:
    (out / TAR).write_bytes((out / TAR).read_bytes()[:-1])
    reports = [verify(str(out), workers=1, part=(number, 2)) for number in (1, 2)]
    assert [(report.shards, report.samples) for report in reports] == [(2, 14), (1, 7)]
    assert [bool(report.problems) for report in reports] == [False, True]


@pytest.mark.parametrize("labels", [None, [[0], [0, 1], []]])
def test_sets_without_one_label_an_image_are_whole(tmp_path: Path, picture, encode, labels: list | None) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number), "PNG"))
    columns = {"path": [f"{number}.png" for number in range(3)]} | ({"labels": labels} if labels else {})
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    shard(str(tmp_path / "table.parquet"), str(tmp_path / "out"), ShardConfig(workers=1))
    report = verify(str(tmp_path / "out"), workers=1)
    assert (report.problems, report.samples) == ([], 3)


def test_one_changed_bit(out: Path) -> None:
    samples = read_samples(LocalFolder(str(out)), TAR)
    middle = int(samples.offsets[3] + samples.lengths[3] // 2)
    change(out / TAR, lambda data: data.__setitem__(middle, data[middle] ^ 1))
    assert f"{TAR}: SHA-256 differs from the index" in problems(out)


def test_an_image_that_does_not_decode_is_named(out: Path) -> None:
    samples = read_samples(LocalFolder(str(out)), TAR)
    end = int(samples.offsets[3] + samples.lengths[3])
    change(out / TAR, lambda data: data.__setitem__(end - 1, 0))
    assert f"{TAR}: {samples.keys[3]}: truncated: Premature end of JPEG file" in problems(out)


def test_a_changed_label_is_named(out: Path) -> None:
    samples = read_samples(LocalFolder(str(out)), TAR)
    text = int(samples.offsets[0] + -(-samples.lengths[0] // 512) * 512 + 512)
    change(out / TAR, lambda data: data.__setitem__(text, ord("7")))
    assert f"{TAR}: {samples.keys[0]}: label member differs from the sidecar" in problems(out)


def test_a_truncated_shard(out: Path) -> None:
    samples = read_samples(LocalFolder(str(out)), TAR)
    size = (out / TAR).stat().st_size
    start = int(samples.offsets[4]) - 512
    change(out / TAR, lambda data: data.__delitem__(slice(start, None)))
    found = problems(out)
    assert f"{TAR}: {start} bytes instead of {size}" in found
    assert any(line.startswith(f"{TAR}: {samples.keys[4]}: missing") for line in found)


def test_a_shard_cut_within_an_image(out: Path) -> None:
    samples = read_samples(LocalFolder(str(out)), TAR)
    middle = int(samples.offsets[4] + samples.lengths[4] // 2)
    change(out / TAR, lambda data: data.__delitem__(slice(middle, None)))
    assert f"{TAR}: tar not readable: unexpected end of data" in problems(out)


def test_missing_files(out: Path) -> None:
    (out / TAR).unlink()
    (out / "train-000002.samples.parquet").unlink()
    (out / "manifest" / "000-0000.parquet").unlink()
    found = problems(out)
    assert sum(line.startswith(f"{TAR}: tar not readable") for line in found) == 1
    assert sum(line.startswith("train-000002.tar: sidecar not readable") for line in found) == 1
    assert "dataset.json: 21 samples, but the shards list 14" in found
    assert "manifest: missing" in found


def test_a_tar_of_something_else(out: Path) -> None:
    (out / TAR).write_bytes((out / "train-000000.tar").read_bytes())
    first = read_samples(LocalFolder(str(out)), TAR).keys[0]
    assert f"{TAR}: {first}: missing, as is all that follows" in problems(out)
    (out / TAR).write_bytes(b"no tar" * 500)
    assert any(line.startswith(f"{TAR}: tar not readable") for line in problems(out))


def test_members_of_another_size_than_the_sidecars(out: Path) -> None:
    sidecar = out / "train-000001.samples.parquet"
    table = pq.read_table(sidecar)
    lengths = pa.array([length + 1 for length in table["length"].to_pylist()], pa.int64())
    pq.write_table(table.set_column(3, "length", lengths), sidecar)
    assert sum("differs from the sidecar" in line for line in problems(out)) == 7


def test_a_damaged_manifest(out: Path) -> None:
    part = out / "manifest" / "000-0000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    assert any(line.startswith("manifest/000-0000.parquet: not readable") for line in problems(out))


def test_labels_out_of_range_and_other_than_the_manifest(out: Path) -> None:
    sidecar = out / "train-000001.samples.parquet"
    table = pq.read_table(sidecar)
    labels = pa.array([9, *table["label"].to_pylist()[1:]], pa.int32())
    pq.write_table(table.set_column(1, "label", labels), sidecar)
    key = table["key"][0].as_py()
    found = problems(out)
    assert f"{TAR}: {key}: label 9 of 3 classes" in found
    assert "manifest: its kept records differ from the samples in the shards" in found
    assert "dataset.json: class counts differ from the labels in the shards" in found


def test_a_changed_fingerprint(out: Path) -> None:
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(info | {"fingerprint": "0"}))
    assert problems(out) == ["dataset.json: fingerprint differs from the index"]


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vitscale shard") as error:
        verify(str(tmp_path))
    assert error.value.setting == "DATASET"
