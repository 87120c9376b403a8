"""Every kind of damage is found, and named by shard or sample."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.data_prep.manifest import read_samples
from vitscale.data_prep.shard import ShardConfig, shard
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
    assert calls == [("verify", 1, 3), ("verify", 2, 3), ("verify", 3, 3)]


def test_one_changed_bit(out: Path) -> None:
    samples = read_samples(out, TAR)
    middle = int(samples.offsets[3] + samples.lengths[3] // 2)
    change(out / TAR, lambda data: data.__setitem__(middle, data[middle] ^ 1))
    assert f"{TAR}: SHA-256 differs from the index" in problems(out)


def test_an_image_that_does_not_decode_is_named(out: Path) -> None:
    samples = read_samples(out, TAR)
    end = int(samples.offsets[3] + samples.lengths[3])
    change(out / TAR, lambda data: data.__setitem__(end - 1, 0))
    assert f"{TAR}: {samples.keys[3]}: truncated: JPEG without an end-of-image marker" in problems(out)


def test_a_changed_label_is_named(out: Path) -> None:
    samples = read_samples(out, TAR)
    text = int(samples.offsets[0] + -(-samples.lengths[0] // 512) * 512 + 512)
    change(out / TAR, lambda data: data.__setitem__(text, ord("7")))
    assert f"{TAR}: {samples.keys[0]}: label member differs from the sidecar" in problems(out)


def test_a_truncated_shard(out: Path) -> None:
    samples = read_samples(out, TAR)
    size = (out / TAR).stat().st_size
    start = int(samples.offsets[4]) - 512
    change(out / TAR, lambda data: data.__delitem__(slice(start, None)))
    found = problems(out)
    assert f"{TAR}: {start} bytes instead of {size}" in found
    assert any(line.startswith(f"{TAR}: {samples.keys[4]}: missing") for line in found)


def test_a_shard_cut_within_an_image(out: Path) -> None:
    samples = read_samples(out, TAR)
    middle = int(samples.offsets[4] + samples.lengths[4] // 2)
    change(out / TAR, lambda data: data.__delitem__(slice(middle, None)))
    assert f"{TAR}: tar not readable: unexpected end of data" in problems(out)


def test_missing_files(out: Path) -> None:
    (out / TAR).unlink()
    (out / "train-000002.samples.parquet").unlink()
    (out / "manifest.parquet").unlink()
    found = problems(out)
    assert sum(line.startswith(f"{TAR}: tar not readable") for line in found) == 1
    assert sum(line.startswith("train-000002.tar: sidecar not readable") for line in found) == 1
    assert "dataset.json: 21 samples, but the shards list 14" in found
    assert any(line.startswith("manifest.parquet: not readable") for line in found)


def test_a_tar_of_something_else(out: Path) -> None:
    (out / TAR).write_bytes((out / "train-000000.tar").read_bytes())
    assert sum("differs from the sidecar" in line for line in problems(out)) == 14  # image and label of 7 samples
    (out / TAR).write_bytes(b"no tar" * 500)
    assert any(line.startswith(f"{TAR}: tar not readable") for line in problems(out))


def test_labels_out_of_range_and_other_than_the_manifest(out: Path) -> None:
    sidecar = out / "train-000001.samples.parquet"
    table = pq.read_table(sidecar)
    labels = pa.array([9, *table["label"].to_pylist()[1:]], pa.int32())
    pq.write_table(table.set_column(1, "label", labels), sidecar)
    key = table["key"][0].as_py()
    found = problems(out)
    assert f"{TAR}: {key}: label 9 of 3 classes" in found
    assert "manifest.parquet: its kept records differ from the samples in the shards" in found
    assert "dataset.json: class counts differ from the labels in the shards" in found


def test_a_changed_fingerprint(out: Path) -> None:
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(info | {"fingerprint": "0"}))
    assert problems(out) == ["dataset.json: fingerprint differs from the index"]


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vitscale shard") as error:
        verify(str(tmp_path))
    assert error.value.setting == "DATASET"
