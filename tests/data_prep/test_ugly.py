"""Awkward images through whole runs: what must be kept is kept, what must be refused is refused with its reason."""

import csv
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitscale.data_prep.config import ResizeConfig, ShardConfig
from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.manifest import manifest_parts, read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.storage import LocalFolder
from vitscale.data_prep.verify import verify

REASONS = {
    "gif_bomb.gif": "too many pixels",
    "jpeg_bomb_65535.jpg": "too many pixels",
    "jpeg_empty.jpg": "empty file",
    "jpeg_truncated.jpg": "truncated",
    "not_an_image.jpg": "not an image",
    "png_bad_idat_crc.png": "corrupt",
    "png_truncated.png": "truncated",
}
CONFIGS = {
    "full": ShardConfig(workers=1),
    "header": ShardConfig(workers=1, check="header"),
    "small png": ShardConfig(workers=1, format="png", resize=ResizeConfig(24)),
    "small webp": ShardConfig(workers=1, format="webp", resize=ResizeConfig(100)),
}


@pytest.fixture(scope="module")
def verdicts(shared_data: Path) -> dict[str, str]:
    with open(shared_data / "ugly" / "manifest.csv", newline="") as file:
        return {row["file"]: row["verdict"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def source(shared_data: Path, verdicts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ugly") / "images" / "any"
    folder.mkdir(parents=True)
    for name in verdicts:
        shutil.copy(shared_data / "ugly" / name, folder)
    return folder.parent


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_image_gets_its_verdict(kind: str, source: Path, verdicts: dict[str, str], tmp_path: Path) -> None:
    info = shard(str(source), str(tmp_path / "out"), CONFIGS[kind])
    parts = manifest_parts(read_dataset(tmp_path / "out"))
    rows = {row["name"][4:]: row for part in parts for row in pq.read_table(tmp_path / "out" / part).to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        name: "rejected" if verdict == "reject" else "kept" for name, verdict in verdicts.items()
    }
    assert {name: row["reason"].split(":")[0] for name, row in rows.items() if row["reason"]} == REASONS
    report = verify(str(tmp_path / "out"), workers=1)
    assert (report.problems, report.samples) == ([], info["samples"]) == ([], 16)

    samples = read_samples(LocalFolder(str(tmp_path / "out")), "train-000000.tar")
    tar = (tmp_path / "out" / "train-000000.tar").read_bytes()
    stored = {
        key: tar[start : start + length]
        for key, start, length in zip(samples.keys, samples.offsets, samples.lengths, strict=True)
    }
    shorter = CONFIGS[kind].resize.shorter
    for name, row in rows.items():
        if row["status"] != "kept":
            continue
        data, original = stored[row["key"]], decode_rgb((source / "any" / name).read_bytes())
        assert (row["height"], row["width"]) == original.shape[:2]
        shown = np.asarray(Image.open(BytesIO(data)).convert("RGB"))  # what any reader sees, also without EXIF
        scale = min(1, shorter / min(original.shape[:2])) if shorter else 1
        assert shown.shape[:2] == tuple(round(side * scale) for side in original.shape[:2])
        if scale == 1:
            assert np.abs(shown.astype(int) - original).mean() <= (3 if CONFIGS[kind].format == "jpeg" else 0)


def test_they_do_no_harm_in_tars_either(source: Path, verdicts: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, name in enumerate(sorted(verdicts)):
            archive.add(source / "any" / name, f"{number:03d}.jpg")
    info = shard(str(tmp_path / "in.tar"), str(tmp_path / "out"), CONFIGS["header"])
    assert (info["samples"], sum(info["rejected"].values())) == (16, 7)
    assert info["rejected"] == shard(str(source), str(tmp_path / "two"), CONFIGS["header"])["rejected"]
