"""Reading a dataset folder, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.manifest import read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.storage import LocalFolder
from vitscale.errors import UserError


@pytest.fixture
def out(make_folder, tmp_path: Path) -> Path:
    shard(str(make_folder()), str(tmp_path / "out"), ShardConfig(shard_samples=8, workers=1))
    return tmp_path / "out"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_dataset(path, "data.train")
    assert error.value.setting == "data.train"
    return str(error.value)


def test_what_is_read(out: Path) -> None:
    dataset = read_dataset(out, "data.train")
    assert (dataset.split, dataset.classes, dataset.samples) == ("train", ("ant", "bee", "cat"), 21)
    assert [entry.name for entry in dataset.shards] == [f"train-00000{number}.tar" for number in range(3)]
    samples = read_samples(LocalFolder(str(out)), dataset.shards[0].name)
    assert (samples.labels.dtype, samples.offsets.dtype, samples.lengths.dtype) == (np.int32, np.int64, np.int64)
    assert len(samples.keys) == len(samples.labels) == dataset.shards[0].samples


def test_no_dataset(tmp_path: Path) -> None:
    assert "vitscale shard" in refusal(tmp_path)
    assert "which is no folder" in refusal(tmp_path / "missing")


@pytest.mark.parametrize("version", [1, 99])
def test_other_schema(out: Path, version: int) -> None:
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(info | {"schema_version": version}))
    assert f"schema version {version}; expected version 2" in refusal(out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 2, "split": "train"}'])
def test_damaged_dataset_file(out: Path, text: str) -> None:
    (out / "dataset.json").write_text(text)
    assert "damaged" in refusal(out)


def test_damaged_index(out: Path) -> None:
    (out / "index.parquet").write_bytes(b"PAR1")
    assert "damaged index.parquet" in refusal(out)


def test_missing_shards(out: Path) -> None:
    (out / "train-000001.samples.parquet").unlink()
    assert "1 of 3 shards are missing or cut short (first: train-000001.tar)" in refusal(out)
    (out / "train-000000.tar").write_bytes(b"")
    assert "2 of 3 shards" in refusal(out)
    assert len(read_dataset(out, check_files=False).shards) == 3
