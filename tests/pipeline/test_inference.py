"""Predictions of many files: as of one, in bounded batches, and with the bad ones among them."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vitscale as library
from tests.pipeline.exports import write_export
from vitscale.errors import UserError
from vitscale.pipeline import image_files, table_files
from vitscale.pipeline.image_files import count_images
from vitscale.pipeline.inference import Classifier, load
from vitscale.pipeline.prediction import Tally, find_files, predict_files

CLASSES = ["ant", "bee", 'c"a,t', "dög"]
BAD = {
    "images/b/bad.jpg": "not an image",
    "images/b/cut.png": "truncated: PNG without an IEND chunk",
    "images/b/empty.png": "empty file",
    "images/b/gone.png": "unreadable: No such file or directory",
    "images/b/pipe.png": "not a file",
}


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """In a folder with 23 images of many sizes and forms, and five files that are none."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for folder in ("images/a/deep", "images/b", "images/.hidden"):
        Path(folder).mkdir(parents=True)
    for number in range(21):
        height, width = random.integers(1, 90, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        name = ("images/a/deep/{}.png", "images/a/{}.JPEG", "images/{}.webp")[number % 3]
        Image.fromarray(pixels).save(name.format(number))
    Path("images/ü.png").write_bytes(Path("images/a/deep/0.png").read_bytes())
    Path(os.fsdecode(b"images/\xff\xfe.png")).write_bytes(Path("images/a/deep/0.png").read_bytes())
    whole = Path("images/a/deep/0.png").read_bytes()
    for name, data in (("bad.jpg", b"<html>"), ("cut.png", whole[:-20]), ("empty.png", b"")):
        Path("images/b", name).write_bytes(data)
    os.mkfifo("images/b/pipe.png")
    Path("images/b/gone.png").symlink_to("nowhere")
    Path("images/.hidden/x.png").write_bytes(whole)
    Path("images/notes.txt").write_text("no image")
    Path("images/loop").symlink_to("..", target_is_directory=True)
    return load(write_export(tmp_path / "export", CLASSES))


def predict(classifier: Classifier, out: str, size: int = 5, workers: int = 0, places: Any = ("images",)) -> Tally:
    files = find_files(list(places), "FILES", classifier.preprocess, size, workers)
    return predict_files(classifier, files, Path(out), 3, lambda done, total, text="": None)


def test_every_file_has_a_row_in_each_format(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "GROUP", 8)
    for suffix, workers in (("parquet", 2), ("csv", 0), ("jsonl", 0)):
        tally = predict(classifier, f"out.{suffix}", workers=workers)
        assert (tally.files, tally.unread) == (28, 5)
        assert "5 of them not read" in str(tally)
    rows = pq.read_table("out.parquet").to_pylist()
    assert pq.ParquetFile("out.parquet").num_row_groups == 3  # 28 rows, two batches of five each
    columns = ["file", *(f"{kind}_{n}" for n in (1, 2, 3) for kind in ("class", "probability")), "error"]
    assert list(rows[0]) == columns
    assert {row["file"]: row["error"] for row in rows if row["error"]} == BAD
    names = [row["file"] for row in rows]
    assert len(set(names)) == 28
    assert {"images/ü.png", r"images/\xff\xfe.png"} < set(names)
    for row in rows:
        if row["error"]:
            assert not any(row[name] for name in columns[1:-1])
            continue
        (expected,) = classifier.predict([row["file"].replace(r"\xff\xfe", os.fsdecode(b"\xff\xfe"))], 3)
        assert [row[f"class_{n}"] for n in (1, 2, 3)] == expected.classes
        # float32 products of a batch may round otherwise than those of one image
        assert [row[f"probability_{n}"] for n in (1, 2, 3)] == pytest.approx(expected.probabilities, abs=1e-6)
    lines = Path("out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    with open("out.csv", encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    assert told == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert not list(Path.cwd().glob("*.partial"))


def test_batches_of_bad_files_alone_and_files_by_name(classifier: Classifier) -> None:
    names = ["images/b/bad.jpg", "images/b/empty.png", "images/notes.txt", "images/ü.png", "images/ü.png"]
    assert str(predict(classifier, "out.parquet", 2, 0, names)).startswith("5 images in ")
    rows = pq.read_table("out.parquet").to_pylist()
    assert [row["file"] for row in rows] == names
    assert [bool(row["error"]) for row in rows] == [True, True, True, False, False]
    assert rows[3] == rows[4]


def test_an_image_that_breaks_the_decoder_does_not_end_the_run(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(data: bytes) -> Any:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(image_files, "decode_rgb", decode)
    with pytest.raises(UserError, match=r"^FILES: got 28 files, none of which could be read.* `error` of out\.jsonl"):
        predict(classifier, "out.jsonl")
    assert len(Path("out.jsonl").read_text().splitlines()) == 28
    assert "MemoryError: cannot allocate" in Path("out.jsonl").read_text()


def test_what_cannot_be_is_refused_and_leaves_nothing(classifier: Classifier, tmp_path: Path) -> None:
    for places, reason in ((["nowhere"], "nowhere: No such file"), (["export"], "got export; expected files that end")):
        with pytest.raises(UserError, match=f"^FILES: got .*{reason[4:]}"):
            count_images(places, "FILES")
    Path("out.csv").write_text("earlier")
    spoilt = load(write_export(tmp_path / "spoilt", CLASSES, spoilt=True))
    with pytest.raises(UserError, match=r"^CHECKPOINT: got probabilities that are not finite"):
        predict(spoilt, "out.csv")
    with pytest.raises(UserError, match=r"^CHECKPOINT: got probabilities that are not finite"):
        spoilt.predict(["images/ü.png"])
    network: Any = spoilt.network
    network.norm.bias.data[0] = torch.inf
    with pytest.raises(UserError, match=r"^CHECKPOINT: got features that are not finite"):
        spoilt.embed(["images/ü.png"])
    assert Path("out.csv").read_text() == "earlier"
    assert not list(Path.cwd().glob("*.partial"))
    Path("file").touch()
    with pytest.raises(UserError, match=r"^--out: got file/out\.csv: "):
        predict(classifier, "file/out.csv")
    Path("folder.csv").mkdir()
    picture = Path("images/ü.png").read_bytes()
    for name in ("keep.csv", "keep.JSONL", "keep.parquet"):
        Path(name).write_bytes(picture)
    pq.write_table(pa.table({"x": [1], "file": ["theirs"]}), "theirs.parquet")
    kept = ("out.csv", "keep.csv", "keep.JSONL", "keep.parquet", "theirs.parquet")
    for bad in ("out.txt", "out", "s3://bucket/out.csv", "folder.csv", "file/out.csv", *kept):
        with pytest.raises(UserError, match=r"^--out: got "):
            table_files.check_table(bad, "--out")
    for suffix in ("csv", "JSONL", "PARQUET"):
        for _ in range(2):  # the second time in place of the first
            predict(classifier, str(table_files.check_table(f"new.{suffix}", "--out")), places=["images/ü.png"])
    assert pq.read_table("new.PARQUET").num_rows == 1
    assert Path("new.JSONL").read_text(encoding="utf-8").startswith('{"file": ')


def test_memory_does_not_grow_with_the_files(classifier: Classifier) -> None:
    """Rows and pixels held at a time are those of a few batches, whatever the number of files."""
    held = []
    whole = classifier.probabilities_of

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        held.append(len(pixels))
        return whole(pixels)

    classifier.probabilities_of = watched
    predict(classifier, "out.parquet", 7, 0, ["images/ü.png"] * 100)
    assert held == [7] * 14 + [2]


def test_features_of_files_in_python(classifier: Classifier) -> None:
    files = ["images/ü.png", "images/a/1.JPEG", "images/a/deep/0.png"]
    found = library.load("export").embed(files)
    assert (found.shape, found.dtype) == ((3, 16), torch.float32)
    assert torch.equal(found[0], found[2])
    network: Any = classifier.network
    logits = network.head(found)
    expected = [prediction.probabilities[0] for prediction in classifier.predict(files, 1)]
    # the head of features is the classifier: float32, of batches that are cut otherwise
    assert logits.softmax(dim=1).max(dim=1).values.tolist() == pytest.approx(expected, abs=1e-6)
    many = classifier.embed(files * 15)  # more than a forward takes
    torch.testing.assert_close(many.reshape(15, 3, 16), found.expand(15, 3, 16), atol=1e-6, rtol=0)
    assert classifier.embed([]).shape == (0, 16)
    assert torch.equal(classifier.embed(Path(files[1])), classifier.embed(files[1:2]))
    assert classifier.predict(files[1]) == classifier.predict([Path(files[1])])
    with pytest.raises(UserError, match=r"^FILES: got images/b/bad\.jpg: not an image"):
        classifier.embed(["images/b/bad.jpg"])
    for none in (3, [3], None, b"images"):
        with pytest.raises(UserError, match=r"^FILES: got .* expected paths of image files"):
            classifier.predict(none)  # pyright: ignore[reportArgumentType]


def test_the_command(classifier: Classifier, vitscale: Callable[..., Any]) -> None:
    said = vitscale("predict", "export", "images", "--out", "deep/er/out.csv", "--micro-batch", 6, "--top", 9)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("28 images in ")
    assert "5 of them not read: see the column `error`; classes in deep/er/out.csv" in said.stdout
    assert Path("deep/er/out.csv").read_text().startswith("file,class_1,probability_1,class_2,probability_2,class_3,")
    said = vitscale("predict", "export", "images/a", "--top", 1)  # a folder, printed
    assert [line.split(": ")[0] for line in said.stdout.splitlines()] == sorted(
        str(path) for path in Path("images/a").rglob("*.*")
    )
    said = vitscale("predict", "export", "images/b", "images/a/1.JPEG", "--top", 1)
    assert (said.returncode, said.stdout.count("\n")) == (2, 1)
    assert said.stdout.startswith("images/a/1.JPEG: ")
    assert said.stderr.startswith("error: FILES: got 5 of 6 files that are none: images/b/bad.jpg: not an image; ")
    assert all(name in said.stderr for name in BAD)
