"""`vitscale evaluate --suite`: the same numbers at any number of ranks, in both files; refusals before long work."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.pipeline.exports import write_export
from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.shard import shard
from vitscale.errors import UserError
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import stage, suite_results
from vitscale.pipeline.evaluation.suites import SUITES, parse

ALONE = World(0, 1, 0, torch.device("cpu"))
ALL = "knn,fewshot,linear,calibration,robustness,corruptions=contrast"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export") / "export", [str(number) for number in range(10)])


def some(digits: Any, root: Path, images: int, without: int = 0) -> Path:
    """A dataset of so many of the training images of each class, fewer of one."""
    for folder in digits.train_images.iterdir():
        (root / "images" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[: images - without if folder.name == "3" else images]:
            copy(file, root / "images" / folder.name)
    shard(str(root / "images"), str(root / "some"), ShardConfig())
    return root / "some"


def evaluate(world: World, source: str, dataset: str, suite: str, train: str, out: str) -> None:
    suite_results.evaluate(source, dataset, suite, train, "auto", out, LoaderSettings(60, 0), world)


def test_numbers_are_the_same_at_any_number_of_ranks(
    export: Path, digits: Any, tmp_path: Path, ranks: Callable[..., Any]
) -> None:
    words = (str(export), str(digits.test), ALL, str(some(digits, tmp_path, 30)))
    evaluate(ALONE, *words, str(tmp_path / "1" / "found.json"))
    ranks(__file__, "evaluate", 2, *words, str(tmp_path / "2" / "found.json"))
    found = [json.loads((tmp_path / size / "found.json").read_text()) for size in ("1", "2")]
    assert list(found[0]["suites"]) == ["accuracy", *(name.partition("=")[0] for name in ALL.split(","))]
    rows = [pq.read_table(tmp_path / size / "results.parquet").to_pylist() for size in ("1", "2")]
    assert len(rows[0]) == sum(map(len, found[0]["suites"].values())) > 90
    for one, two in zip(*rows, strict=True):
        names = ("checkpoint", "dataset", "suite", "name")
        assert [one[name] for name in names] == [two[name] for name in names]
        value = found[0]["suites"][one["suite"]][one["name"]]
        told = (value["value"], value["low"], value["high"]) if isinstance(value, dict) else (value, None, None)
        for name, each in zip(("value", "ci_low", "ci_high"), told, strict=True):
            assert one[name] == each
            # shares of right answers are equal; probabilities are float32, of batches that were cut otherwise
            exact = ("top1", "top5", "mean_per_class")
            loose = one["suite"] in ("accuracy", "calibration") and one["name"] not in exact
            assert two[name] == (pytest.approx(each, abs=1e-6) if loose else each), (one, two)
    assert found[0]["top1"] == found[0]["suites"]["calibration"]["top1"]["value"]
    assert len(list((tmp_path / "1" / "features").iterdir())) == 2  # of two datasets, computed once
    assert (tmp_path / "1" / "found-reliability.png").exists()


def test_features_suites_take_datasets_of_other_classes(digits: Any, tmp_path: Path) -> None:
    source, out = write_export(tmp_path / "export", ["a", "b"]), tmp_path / "found.json"
    evaluate(ALONE, str(source), str(digits.test), "knn", str(digits.train), str(out))
    found = json.loads(out.read_text())
    assert "top1" not in found
    assert found["suites"]["knn"]["k10_top1"]["value"] > 0.4  # chance is a tenth


def test_what_cannot_be_is_refused_before_long_work(
    export: Path, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(suite: str, train: str = "", source: Path = export, dataset: Path = digits.test) -> str:
        with pytest.raises(UserError) as error:
            suite_results.check(str(source), str(dataset), suite, train, "auto")
        return str(error.value)

    train = str(digits.train)
    assert refused("knn,umap").startswith("--suite: got umap; expected some of knn, fewshot")
    assert refused("knn,,linear").startswith("--suite: got nothing")
    assert refused("knn,knn", train).startswith("--suite: got knn twice")
    assert refused("knn=5", train).startswith("--suite: got knn=5; expected knn")
    assert refused("real").startswith("--suite: got real without a file")
    assert refused("real=none.json").startswith("--suite: got real=none.json")
    (tmp_path / "real.json").write_text('{"nowhere": [1]}')
    assert "labels of none of the images" in refused(f"corruptions=fog,real={tmp_path}/real.json")
    assert refused("corruptions=rain").startswith("--suite: got corruptions=rain")
    assert refused("corruptions=").startswith("--suite: got corruptions=; expected corruptions or")
    assert refused("corruptions=fog+fog").startswith("--suite: got corruptions=fog twice")
    assert refused("corruptions=fogg").endswith("Did you mean 'fog'?")
    assert refused("KNN", train).endswith("Did you mean 'knn'?")
    assert refused("").startswith("--suite: got nothing")
    for suite in ("knn", "fewshot", "linear"):
        assert refused(suite, str(digits.test)).startswith(f"--train: got {digits.test}, with the same images as")
    assert refused("knn,linear,calibration").startswith("--train: got nothing, for knn, linear; expected a dataset")
    assert refused("calibration", train).startswith(f"--train: got {train}; expected nothing without one of knn")
    assert refused("knn", "nowhere").startswith("--train: got ")
    other = write_export(tmp_path / "export", ["a", "b"])
    assert "expected the 2 classes of" in refused("knn,calibration", train, other)
    fewer = copytree(digits.train, tmp_path / "fewer")
    told = json.loads((fewer / "dataset.json").read_text())
    told["classes"][0] = "nought"
    (fewer / "dataset.json").write_text(json.dumps(told))
    assert refused("knn", str(fewer)).startswith("--train: got 10 classes that differ ('0', 'nought')")
    monkeypatch.setattr(Store, "sizes", [np.zeros(0, np.int64)])
    assert refused("calibration").startswith("DATASET: got a dataset without images")


def test_numbers_that_take_more_training_images_are_left_out(
    export: Path, digits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, out = some(digits, tmp_path, 6, without=2), tmp_path / "found.json"
    evaluate(ALONE, str(export), str(digits.test), "knn,fewshot", str(few), str(out))
    suites = json.loads(out.read_text())["suites"]
    assert [name for name in suites["knn"] if name.endswith("top1")] == ["k10_top1", "k20_top1"]
    assert list(suites["fewshot"]) == ["1shot"]
    said = capsys.readouterr().out
    assert "without k of 100, 200: there are 58 training images" in said
    assert "without 5, 10, 25 shots: some class has fewer training images" in said


def test_results_take_the_place_of_nothing_else(export: Path, digits: Any, tmp_path: Path) -> None:
    """Found before the work, and on all ranks alike."""
    trained, store = stage.check(str(export), str(digits.test))

    def refused(out: Path) -> str:
        with pytest.raises(UserError, match=r"^--out: got ") as error:
            evaluate(ALONE, str(export), str(digits.test), "calibration", "", str(out))
        return str(error.value)

    (tmp_path / "folder.json").mkdir()
    (tmp_path / "shard.tar").write_bytes(b"images")
    (tmp_path / "labels.json").write_text('{"a": [1]}')
    assert "a folder; expected a file" in refused(tmp_path / "folder.json")
    assert "ends in .json" in refused(tmp_path / "shard.tar")
    assert "labels.json, which holds something else" in refused(tmp_path / "labels.json")
    assert "Not a directory" in refused(tmp_path / "shard.tar" / "new" / "found.json")
    assert "File name too long" in refused(tmp_path / f"{'x' * 245}.json")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "results.parquet")
    assert "results.parquet: a table of something else" in refused(tmp_path / "found.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder.json", "labels.json", "results.parquet", "shard.tar"
    ]  # fmt: skip
    (tmp_path / "results.parquet").unlink()
    for _ in range(2):  # the second time in place of the first
        assert stage.place_of_results(str(tmp_path / "found.JSON"), trained, store, ALONE) == tmp_path / "found.JSON"
        stage.write_results({**stage.about(trained, store), "suites": {}}, tmp_path / "found.JSON")


def test_a_full_disk_is_no_bug_of_ours(export: Path, digits: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # room for what says where, not for the plot
        with pytest.raises(UserError, match=r"^--out: got .*File too large; expected a folder that can be written"):
            evaluate(ALONE, str(export), str(digits.test), "calibration", "", str(tmp_path / "found.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_options_of_suites() -> None:
    assert parse("fewshot=grid, corruptions=fog+snow,knn") == {"fewshot": "grid", "corruptions": "fog+snow", "knn": ""}
    assert set(parse(",".join(name for name in SUITES if name != "real"))) == set(SUITES) - {"real"}


def test_the_command(export: Path, digits: Any, vitscale: Callable[..., Any], tmp_path: Path) -> None:
    said = vitscale("evaluate", export, digits.test, "--suite", "calibration", "--out", tmp_path / "found.json")
    assert said.returncode == 0, said.stderr
    assert "\n  ece" in said.stdout
    assert "a row for each number in" in said.stdout
    said = vitscale("evaluate", export, digits.test, "--suite", "knn", "--nproc", 2)
    assert (said.returncode, said.stderr.startswith("error: --train: got nothing, for knn")) == (2, True)
    said = vitscale("evaluate", export, digits.test, "--suite", "", "--out", tmp_path)
    assert (said.returncode, said.stderr.startswith("error: --suite: got nothing")) == (2, True)
    said = vitscale("evaluate", export, digits.test, "--out", tmp_path / "x.tar", "--nproc", 2)
    assert (said.returncode, said.stderr.startswith("error: --out: got ")) == (2, True)
