"""`vitscale embed`: a row for each image of a dataset or of files, the same at any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.pipeline.exports import write_export
from tests.pipeline.test_multilabel import NAMES, labels_of, number_of, several
from vitscale.errors import UserError
from vitscale.pipeline.data.augment import normalise
from vitscale.pipeline.data.loader import EvaluationView
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.embed import Settings, check, embed
from vitscale.pipeline.weights import open_trained

ALONE = World(0, 1, 0, torch.device("cpu"))
CLASSES = [str(number) for number in range(7)]  # fewer than the datasets have: features need none of them
__all__ = ["several"]  # a fixture


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export") / "export", CLASSES)


def run(world: World, checkpoint: str, source: str, out: str, dtype: str = "float32") -> None:
    embed(checkpoint, source, Path(out), Settings(dtype, 50, 0), world)


def values_of(table: pa.Table) -> np.ndarray:
    """Features (N, D)."""
    return np.stack(table.column("features").to_numpy())


def test_features_of_a_dataset_are_those_of_the_network(
    export: Path, digits: Any, tmp_path: Path, vitscale: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(ALONE, str(export), str(digits.train), str(out / "1.parquet"))
    said = vitscale("embed", export, digits.train, out / "2.parquet", "--nproc", 2)
    assert said.returncode == 0, said.stderr
    assert f"1,438 images; 16 features of each in {out}/2.parquet" in said.stdout
    run(ALONE, str(export), str(digits.train), str(out / "16.parquet"), "float16")
    assert sorted(path.name for path in out.iterdir()) == ["1.parquet", "16.parquet", "2.parquet"]
    one, two, half = (pq.read_table(out / f"{name}.parquet") for name in ("1", "2", "16"))
    trained, store = open_trained(str(export), "x"), Store(str(digits.train), "x")
    network: Any = trained.load()
    view = EvaluationView(trained.preprocess)
    samples = [store.read(number) for number in range(len(store))]
    pixels = torch.from_numpy(np.stack([view(sample.data, 0, sample.key) for sample in samples]))
    with torch.inference_mode():
        expected = network.representation(network.forward_features(normalise(pixels, trained.preprocess))).numpy()
    assert one.schema.field("features").type == pa.list_(pa.float32(), 16)
    assert one.column_names == ["key", "label", "class", "features"]
    assert one.column("key").to_pylist() == [sample.key for sample in samples]
    assert one.column("label").to_pylist() == [sample.label for sample in samples]
    assert one.column("class").to_pylist() == [store.classes[sample.label] for sample in samples]
    for table in (one, two):  # values of up to 3; products of batches of other sizes may round otherwise
        np.testing.assert_allclose(values_of(table), expected, atol=2e-6)
    assert one.drop_columns("features") == two.drop_columns("features")
    assert half.schema.field("features").type == pa.list_(pa.float16(), 16)
    assert (values_of(half) == values_of(one).astype(np.float16)).all()
    told = json.loads(one.schema.metadata[b"vitscale"])
    assert told == {"checkpoint": str(export), "dataset": store.describe()}


def test_several_labels_are_all_there(export: Path, several: Path, tmp_path: Path) -> None:
    run(ALONE, str(export), str(several), str(tmp_path / "out.parquet"))
    numbers, rows = number_of(several), pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(rows) == 60
    for row in rows:
        assert row["labels"] == labels_of(numbers[row["key"]])
        assert row["classes"] == [NAMES[label] for label in row["labels"]]


def test_features_of_files_are_those_of_the_same_images_in_a_dataset(export: Path, digits: Any, tmp_path: Path) -> None:
    store, folder = Store(str(digits.test), "x"), tmp_path / "images"
    folder.mkdir()
    samples = {sample.key: sample.data for sample in map(store.read, range(60))}
    for key, data in samples.items():
        (folder / f"{key}.jpg").write_bytes(data)
    (folder / "!.png").write_bytes(b"no image")
    run(ALONE, str(export), str(folder), str(tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["file", "features", "error"]
    assert [Path(file).stem for file in table.column("file").to_pylist()] == ["!", *sorted(samples)]
    assert table.column("error").to_pylist() == ["not an image", *[None] * 60]
    assert table.column("features").null_count == 1
    run(ALONE, str(export), str(digits.test), str(tmp_path / "dataset.parquet"))
    known = pq.read_table(tmp_path / "dataset.parquet").slice(0, 60).sort_by("key")
    np.testing.assert_allclose(values_of(table.slice(1)), values_of(known), atol=2e-6)  # as above
    run(ALONE, str(export), str(folder / f"{min(samples)}.jpg"), str(tmp_path / "one.parquet"), "float16")
    one = pq.read_table(tmp_path / "one.parquet")
    assert (one.num_rows, one.schema.field("features").type) == (1, pa.list_(pa.float16(), 16))


def test_what_cannot_be_is_refused_and_leaves_nothing(export: Path, digits: Any, tmp_path: Path) -> None:
    spoilt = write_export(tmp_path / "spoilt", CLASSES, spoilt=True)
    out = tmp_path / "out" / "x.parquet"
    out.parent.mkdir()
    pq.write_table(pa.table({"file": ["earlier"]}), out)
    for source in (digits.test, digits.test_images):
        with pytest.raises(UserError, match=r"^CHECKPOINT: got features that are not finite as float16"):
            run(ALONE, str(spoilt), str(source), str(out), "float16")
        assert [path.name for path in out.parent.iterdir()] == ["x.parquet"]
        assert pq.read_table(out).to_pylist() == [{"file": "earlier"}]
    with pytest.raises(UserError, match=r"^SOURCE: got nowhere: No such file"):
        check(str(export), "nowhere", "auto", 1)
    with pytest.raises(UserError, match=r"^--nproc: got 2 for image files"):
        check(str(export), str(digits.test_images), "auto", 2)
    with pytest.raises(UserError, match=r"^CHECKPOINT: got "):
        check(str(digits.test), str(digits.test), "auto", 1)
    with pytest.raises(UserError, match=r"^--weights: got raw for .*, where there are no two kinds of weights"):
        check(str(export), str(digits.test), "raw", 1)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(UserError, match=r"^SOURCE: got 1 file, none of which could be read"):
        run(ALONE, str(export), str(tmp_path / "bad.png"), str(tmp_path / "none.parquet"))
    with pytest.raises(UserError, match=r"^OUT: got s3:/.*; expected a file of this machine"):
        run(ALONE, str(export), str(digits.test), "s3://bucket/x.parquet")
    out.write_text("notes")
    with pytest.raises(UserError, match=r"^OUT: got .*x\.parquet, which holds something else"):
        run(ALONE, str(export), str(digits.test), str(out))
