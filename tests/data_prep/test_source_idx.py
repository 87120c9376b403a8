"""IDX files: the pixels and labels of a pair arrive as they are, and files that are none are refused."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.manifest import manifest_parts, read_dataset
from vitscale.data_prep.shard import shard
from vitscale.data_prep.sources import open_source
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    """Values in the format, http://yann.lecun.com/exdb/mnist."""
    return struct.pack(f">BBBB{values.ndim}i", 0, 0, kind, values.ndim, *values.shape) + values.tobytes()


def write(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Noise, of which no pixel survives a lossy step: uint8 (30, 5, 7)."""
    return np.random.default_rng(0).integers(0, 256, (30, 5, 7)).astype(np.uint8)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return (np.arange(30) % 4 + np.arange(30) % 2).astype(np.uint8)  # 0 2 2 4


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert error.value.setting == "SOURCE"
    return error.value


@pytest.mark.parametrize(
    ("images_file", "labels_file"),
    [
        (IMAGES, LABELS),
        (f"{IMAGES}.gz", f"{LABELS}.gz"),
        (f"{IMAGES}.gz", LABELS),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte.gz"),
    ],
)
def test_pixels_and_labels_arrive_as_they_are(
    tmp_path: Path, pictures, labels, images_file: str, labels_file: str
) -> None:
    write(tmp_path / "in", images_file, idx(pictures))
    write(tmp_path / "in", labels_file, idx(labels))
    config = ShardConfig(shard_samples=8, format="png", workers=1)
    info = shard(str(tmp_path / "in"), str(tmp_path / "out"), config)
    assert (info["classes"], info["class_counts"]) == (list("01234"), np.bincount(labels).tolist())
    named = shard(str(tmp_path / "in" / images_file), str(tmp_path / "named"), config)
    assert named["fingerprint"] == info["fingerprint"]
    report = verify(str(tmp_path / "out"), workers=1)
    assert (report.problems, report.samples) == ([], 30)

    (part,) = manifest_parts(read_dataset(tmp_path / "out"))
    records = pq.read_table(tmp_path / "out" / part).to_pylist()
    rows = {record["key"]: int(record["name"].removeprefix(f"{images_file}:")) for record in records}
    found, numbers = np.zeros_like(pictures), np.zeros_like(labels)
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                key, suffix = member.name.split(".")
                file = archive.extractfile(member)
                assert file is not None
                if suffix == "cls":
                    numbers[rows[key]] = int(file.read())
                    continue
                rgb = np.asarray(Image.open(io.BytesIO(file.read())))
                assert (rgb == rgb[..., :1]).all()
                found[rows[key]] = rgb[..., 0]
    assert (found == pictures).all()
    assert (numbers == labels).all()


def test_without_labels_and_in_several_chunks(tmp_path: Path) -> None:
    numbers = np.arange(5000, dtype=">u4").view(np.uint8).reshape(-1, 2, 2)
    source = open_source(str(write(tmp_path / "in", f"{IMAGES}.gz", idx(numbers))))
    assert (source.labelled, source.classes, source.images) == ("none", [], 5000)
    assert [chunk.images for chunk in source.chunks] == [4096, 904]
    items = list(source.chunks[1].read(source.folder))
    assert [items[0].name, items[-1].name] == [f"{IMAGES}.gz:4096", f"{IMAGES}.gz:4999"]
    assert items[0].label is None
    for item, number in zip(items, range(4096, 5000), strict=True):
        assert item.data is not None
        assert np.asarray(Image.open(io.BytesIO(item.data))).tobytes() == number.to_bytes(4, "big")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_that_are_none_are_refused(tmp_path: Path, pictures, labels, suffix: str) -> None:
    images, huge = idx(pictures), struct.pack(">BBBBiii", 0, 0, 8, 3, 60_000, 30_000, 30_000)
    for content in (b"", images[:11], idx(labels), idx(pictures, kind=0x0D), b"\1" + images[1:], huge + bytes(100)):
        path = write(tmp_path / "in", f"{IMAGES}{suffix}", content)
        assert "an IDX file of 3 dimensions" in str(refusal(path))
    for shape in ((0, 5, 7), (-1, 5, 7), (30, 0, 7), (2, 2**16, 2**16)):
        path = write(tmp_path / "in", f"{IMAGES}{suffix}", struct.pack(">BBBBiii", 0, 0, 8, 3, *shape) + bytes(100))
        assert "an IDX file of 3 dimensions" in str(refusal(path))
    write(tmp_path / "in", f"{IMAGES}{suffix}", images)
    write(tmp_path / "in", f"{LABELS}{suffix}", images)
    assert "an IDX file of 1 dimensions" in str(refusal(tmp_path / "in"))
    write(tmp_path / "in", f"{LABELS}{suffix}", idx(labels[:-1]))
    assert "30 images and 29 labels" in str(refusal(tmp_path / "in"))


def test_truncated_files_are_refused(tmp_path: Path, pictures, labels) -> None:
    write(tmp_path / "in", LABELS, idx(labels))
    write(tmp_path / "in", IMAGES, idx(pictures)[:-1])
    assert "the file ends early" in str(refusal(tmp_path / "in"))
    (tmp_path / "in" / IMAGES).unlink()
    for count, content in enumerate((gzip.compress(idx(pictures)[:-1]), gzip.compress(idx(pictures))[:-20])):
        (tmp_path / "in" / f"{IMAGES}.gz").write_bytes(content)
        with pytest.raises(UserError, match="a whole IDX file") as error:
            shard(str(tmp_path / "in"), str(tmp_path / f"out{count}"), ShardConfig(workers=1))
        assert error.value.setting == "SOURCE"
    (tmp_path / "in" / f"{IMAGES}.gz").write_bytes(idx(pictures))
    assert "Not a gzipped file" in str(refusal(tmp_path / "in"))


def test_training_and_test_files_are_not_mixed(tmp_path: Path, pictures, labels) -> None:
    for split in ("train", "t10k"):
        write(tmp_path / "in", f"{split}-images-idx3-ubyte", idx(pictures))
        write(tmp_path / "in", f"{split}-labels-idx1-ubyte", idx(labels))
    assert "t10k-images-idx3-ubyte, train-images-idx3-ubyte" in str(refusal(tmp_path / "in"))
    source = open_source(str(tmp_path / "in" / "t10k-images-idx3-ubyte"))
    assert (source.images, source.labelled) == (30, "class")
