"""Datasets of other classes than the checkpoint's: the numbers of a classifier of the mapped ones alone."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.pipeline.exports import write_export
from vitscale.errors import UserError
from vitscale.pipeline.data.augment import normalise
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import stage, suite_results
from vitscale.pipeline.evaluation.class_map import mapped
from vitscale.pipeline.weights import open_trained

ALONE = World(0, 1, 0, torch.device("cpu"))
WORDS = ["nine", "eight", "seven", "six", "five", "four", "three", "two", "one", "zero"]  # numbers of classes change
KNOWN = [*WORDS[:6], "cat", *WORDS[6:], "dog", "nought", "nil"]  # some classes besides, and three of one digit
MAP: dict[str, Any] = {str(number): WORDS[9 - number] for number in range(1, 10)} | {"0": ["nil", "zero", "nought"]}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export") / "export", KNOWN)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(MAP))
    return path


def evaluate(world: World, source: str, dataset: str, class_map: str) -> dict[str, Any]:
    trained, store = stage.check_alike(source, dataset, "auto", class_map)
    return stage.evaluate(trained, store, LoaderSettings(50, 0), world)


def naive(export: Path, dataset: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits of the mapped classes in float64, found one by one."""
    trained, store = open_trained(str(export), "x"), Store(str(dataset), "x")
    network, view = trained.load(), EvaluationView(trained.preprocess)
    samples = [store.read(number) for number in range(len(store))]
    pixels = torch.from_numpy(np.stack([view(sample.data, 0, sample.key) for sample in samples]))
    with torch.no_grad():
        logits = network(normalise(pixels, trained.preprocess)).double().tolist()
    names = [[MAP[name]] if isinstance(MAP[name], str) else MAP[name] for name in store.classes]
    found = [[max(row[KNOWN.index(name)] for name in those) for those in names] for row in logits]
    return np.array([sample.label for sample in samples]), np.array(found)


def test_numbers_are_those_of_the_mapped_classes_at_any_number_of_ranks(
    export: Path, digits: Any, file: Path, ranks: Callable[..., Any]
) -> None:
    from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

    label, logits = naive(export, digits.test)
    one = evaluate(ALONE, str(export), str(digits.test), str(file))
    assert one["images"] == 359
    for name, k in (("top1", 1), ("top5", 5)):
        assert one[name] == top_k_accuracy_score(label, logits, k=k)
        assert one["suites"]["accuracy"][name].value == one[name]
    assert one["confusion"] == confusion_matrix(label, logits.argmax(axis=1)).tolist()
    assert sum(map(sum, one["confusion"])) > one["confusion"][0][0] > 0  # of the class that three stand for
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert one["loss"] == pytest.approx(log_loss(label, shares), rel=1e-6)  # float32 logits
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert one["class_map"] == {"source": str(file), "sha256": digest, "classes": 10, "checkpoint_classes": 12}
    assert one["classes"] == [str(number) for number in range(10)]
    two = ranks(__file__, "evaluate", 2, str(export), str(digits.test), str(file))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)  # batches are cut otherwise
    assert {**two, "loss": 0, "suites": 0} == {**one, "loss": 0, "suites": 0}


def test_suites_see_the_mapped_classes(export: Path, digits: Any, file: Path, tmp_path: Path) -> None:
    label, logits = naive(export, digits.test)
    out, settings = str(tmp_path / "found.json"), LoaderSettings(60, 0)
    words = (str(export), str(digits.test), "calibration,robustness,corruptions=contrast", "", "auto", out)
    suite_results.evaluate(*words, settings, ALONE, str(file))
    found = json.loads((tmp_path / "found.json").read_text())
    right = (logits.argmax(axis=1) == label).mean()
    assert found["top1"] == found["suites"]["calibration"]["top1"]["value"] == right
    shares = [found["suites"]["calibration"][f"class/{number}"] for number in range(10)]
    expected = [(logits.argmax(axis=1) == label)[label == number].mean() for number in range(10)]
    assert shares == pytest.approx(expected, abs=1e-15)
    assert found["suites"]["robustness"]["occlusion_random_90"]["value"] > 0  # of 10 classes a tenth is chance
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["suite"] for row in rows} == {"accuracy", "calibration", "robustness", "corruptions"}
    assert {row["class_map"] for row in rows} == {found["class_map"]["sha256"]}

    file.write_text(json.dumps({**MAP, "0": "nil"}))  # other numbers, beside which the earlier ones would not stand
    trained, store = stage.check(str(export), str(digits.test), "auto", str(file))
    stage.write_results(stage.evaluate(trained, store, settings, ALONE), tmp_path / "found.json")
    assert list(json.loads((tmp_path / "found.json").read_text())["suites"]) == ["accuracy"]
    again = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert again[: len(rows)] == rows  # those of the other map stand beside them
    assert {row["suite"] for row in again[len(rows) :]} == {"accuracy"}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert stage.results_path(trained, store).name.endswith(f"-map-{digest[:8]}.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ["x", "y"], "b": "z z"}',
        "a,x\na,y\nb,z z\n",
        'a,"x",y\r\n"b",z z\r\n',
        "a\tx\n\nb\tz z\na\ty",
        "\ufeffb,z z\na,x,y",
    ],
)
def test_a_map_is_json_or_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "map").write_text(text)
    export = write_export(tmp_path / "export", ["z z", "w", "y", "x"])
    found = mapped(open_trained(str(export), "x"), ["a", "b"], str(tmp_path / "map"))
    assert [sorted(those) for those in found.class_map.numbers] == [[2, 3], [0]]
    assert found.classes == ["a", "b"]
    (tmp_path / "spaces").write_text("a x\nb  w\n")
    assert mapped(open_trained(str(export), "x"), ["a", "b"], str(tmp_path / "spaces")).class_map.numbers == (
        (3,),
        (1,),
    )


def test_maps_that_cannot_be_are_refused(export: Path, digits: Any, file: Path, tmp_path: Path) -> None:
    def refused(told: object, suite: str = "") -> str:
        file.write_text(told if isinstance(told, str) else json.dumps(told))
        places = str(export), str(digits.test)
        with pytest.raises(UserError) as error:
            suite_results.check(*places, suite, str(digits.train), "auto", str(file)) if suite else stage.check(
                *places, "auto", str(file)
            )
        assert str(error.value).startswith("--class-map: got ")
        return str(error.value)

    assert "Did you mean 'seven'?" in refused({**MAP, "7": "sevn"})
    assert "'11'; expected a class of the dataset. Did you mean '1'?" in refused({**MAP, "11": "dog"})
    assert "Its classes are 'nine', " in refused({**MAP, "7": "qqqqq"})
    few = {name: MAP[name] for name in ("1", "2", "3")}
    assert "without 7 of the dataset's 10 classes ('0', '4', '5', '6')" in refused(few)
    assert "'one' for '1' and for '2'" in refused({**MAP, "2": "one"})
    assert "one or more names of classes" in refused({**MAP, "2": []})
    assert "one or more names of classes" in refused({**MAP, "2": 3})
    assert "one or more names of classes" in refused("1\n2\n")
    assert "an object" in refused("[1, 2]")
    assert "JSON" in refused('{"1": ')
    assert "without 10 of" in refused("")
    assert "nothing for suites on features alone" in refused(MAP, "knn")
    for place, reason in (("nowhere.json", "No such file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(UserError, match=f"^--class-map: got .*: {reason}"):
            stage.check(str(export), str(digits.test), "auto", place)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no text in UTF-8"):
        stage.check(str(export), str(digits.test), "auto", str(file))


def test_some_of_the_checkpoints_classes_need_no_file(
    digits: Any, tmp_path: Path, vitscale: Callable[..., Any]
) -> None:
    export = write_export(tmp_path / "export", ["cat", *(str(number) for number in reversed(range(10)))])
    places = str(export), str(digits.test)
    told = r"^DATASET: got 10 classes, which are among the 11 of .* Add --class-map subset"
    with pytest.raises(UserError, match=told):
        stage.check(*places)
    with pytest.raises(UserError, match=told):
        suite_results.check(*places, "calibration", "", "auto")
    said = vitscale("evaluate", export, digits.test, "--class-map", "subset", "--out", "found.json")
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["class_map"] == {"source": "subset", "sha256": None, "classes": 10, "checkpoint_classes": 10}
    assert sum(map(sum, found["confusion"])) == 359
    assert stage.results_path(*stage.check(*places, "auto", "subset")).name.endswith("-subset.json")
