"""Results of several evaluations in one table; the files that evaluations leave."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.pipeline.exports import write_export
from vitscale.errors import UserError
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import stage, suite_results
from vitscale.pipeline.evaluation.bootstrap import Interval, wilson
from vitscale.pipeline.evaluation.compare import FORMATS, check_plot, compare, plot
from vitscale.pipeline.evaluation.rows import ROWS, Subject, add_rows, read_rows
from vitscale.pipeline.evaluation.tables import Table, latex, markdown, text

ALONE = World(0, 1, 0, torch.device("cpu"))
SETTINGS = LoaderSettings(60, 0)
NUMBERS = [str(number) for number in range(10)]


def test_intervals_of_shares_are_wilsons() -> None:
    from scipy.stats import binomtest

    for right, images in ((0, 10), (1, 10), (7, 10), (10, 10), (334, 359), (0, 1), (123_456, 1_000_000)):
        found = wilson(right / images, images)
        expected = binomtest(right, images).proportion_ci(method="wilson")
        assert found.value == right / images
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-14)
        assert 0 <= found.low <= found.value <= found.high <= 1 or right in (0, images)


def test_evaluations_leave_both_files_which_suites_add_to(digits: Any, tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", NUMBERS)
    trained, store = stage.check(str(export), str(digits.test))
    path = stage.results_path(trained, store)
    plain = stage.evaluate(trained, store, SETTINGS, ALONE)
    stage.write_results(plain, path)
    for suite, train in (("calibration", ""), ("knn", str(digits.train))):
        suite_results.evaluate(str(export), str(digits.test), suite, train, "auto", "", SETTINGS, ALONE)
    found = json.loads(path.read_text())
    assert list(found["suites"]) == ["accuracy", "calibration", "knn"]
    assert found["suites"]["accuracy"]["top1"]["value"] == found["top1"] == plain["top1"]
    assert found["confusion"] == plain["confusion"]
    rows = read_rows(path.with_name("results.parquet"))
    told = {(row["suite"], row["name"]): [row["value"], row["ci_low"], row["ci_high"]] for row in rows}
    values = {(suite, name): value for suite, of in found["suites"].items() for name, value in of.items()}
    assert len(rows) == len(told) == len(values)
    for key, value in values.items():
        assert told[key] == (list(value.values()) if isinstance(value, dict) else [value, None, None])
    assert {(row["checkpoint"], row["fingerprint"]) for row in rows} == {(str(export), store.fingerprint)}
    again = compare([str(export)])
    assert again.header == ["top1", "top5", "knn k20_top1", "calibration ece"]
    assert again.cells[again.subjects[0], again.columns[0]] == wilson(found["top1"], 359)

    stage.write_results({**plain, "origin": {"step": 6}}, path)  # trained anew
    assert list(json.loads(path.read_text())["suites"]) == ["accuracy"]
    path.write_text("{")
    stage.write_results(plain, path)
    assert list(json.loads(path.read_text())["suites"]) == ["accuracy"]
    path.with_name("results.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"^--out: got "):
        stage.write_results(plain, path)
    with pytest.raises(UserError, match=r"^RUNS: got .*results.parquet: "):
        compare([str(export)])


def test_rows_give_way_to_those_of_the_same_suite_weights_images_and_classes(tmp_path: Path) -> None:
    file = tmp_path / "results.parquet"
    one = Subject("a", "d", "raw", "f", None)
    add_rows(file, one, {"knn": {"x": Interval(1, 0, 2), "y": 3}, "real": {"x": 1, "none": None}})
    add_rows(file, Subject("a", "d", "ema", "f", None), {"knn": {"x": 4}})
    add_rows(file, one, {"knn": {"z": math.nan}})
    rows = [(row["weights"], row["suite"], row["name"], row["value"]) for row in read_rows(file)]
    assert rows == [("raw", "real", "x", 1), ("ema", "knn", "x", 4), ("raw", "knn", "z", None)]
    add_rows(file, Subject("a", "d", "raw", "f", "map"), {"knn": {"x": 5}})
    assert [row["value"] for row in read_rows(file)] == [1, 4, None, 5]  # beside those without a map
    add_rows(file, Subject("a", "d", "raw", "g", None), {"real": {"x": 6}})  # of other images
    add_rows(file, Subject("a", "d", "ema", "g", None), {"real": {"x": 7}})
    assert [row["value"] for row in read_rows(file)] == [5, 6, 7]
    assert pq.read_table(file).schema == ROWS
    pq.write_table(pq.read_table(file).select(ROWS.names[:7]), file)  # as earlier versions have left it
    assert [row["class_map"] for row in read_rows(file)] == [None, None, None]


def fill(file: Path, *measured: tuple[Subject, dict[str, dict[str, Any]]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    for subject, suites in measured:
        add_rows(file, subject, suites)
    return file


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, one of them with two checkpoints and both kinds of weights, and an export."""
    monkeypatch.chdir(tmp_path)
    accuracy = {"accuracy": {"top1": Interval(0.5, 0.4, 0.6), "loss": 1.5}}
    better = {"accuracy": {"top1": Interval(0.75, 0.7, 0.8), "loss": 1.0}, "knn": {"k20_top1": Interval(0.25, 0, 0.5)}}
    early, late = (f"runs/a_1/checkpoints/step-{step:08d}" for step in (4, 12))
    fill(
        Path("runs/a_1/evaluations/results.parquet"),
        (Subject(early, "/data/val", "raw", "f"), accuracy),
        (Subject(late, "/data/val", "raw", "f"), accuracy),
        (Subject(late, "/data/val", "ema", "f"), better),
    )
    other = Subject("/elsewhere/b&b/checkpoints/step-00000099", "/copy/val", "raw", "f")
    fill(Path("runs/b&b/evaluations/results.parquet"), (other, better))
    fill(Path("exported/evaluations/results.parquet"), (Subject("exported", "/data/sketch", None, "g"), accuracy))
    Path(early).mkdir(parents=True)


@pytest.mark.usefixtures("runs")
def test_tables_name_what_differs() -> None:
    found = compare(["runs/a_1/", "runs/b&b"], "top1,knn/*")
    assert found.labels == ["runs/a_1 step 4", "runs/a_1 step 12 raw", "runs/a_1 step 12 ema", "runs/b&b"]
    assert found.header == ["top1", "knn k20_top1"]  # of the same images, by another path
    assert FORMATS["text"](found).splitlines()[:5] == [
        "                                        top1            knn k20_top1",
        "runs/a_1 step 4       0.5000 (0.4000–0.6000)                       –",
        "runs/a_1 step 12 raw  0.5000 (0.4000–0.6000)                       –",
        "runs/a_1 step 12 ema  0.7500 (0.7000–0.8000)  0.2500 (0.0000–0.5000)",
        "runs/b&b              0.7500 (0.7000–0.8000)  0.2500 (0.0000–0.5000)",
    ]
    notes = found.notes()
    assert notes[0] == "All on /data/val."
    assert "whether one checkpoint is better" in notes[1]
    missing = "runs/a_1/checkpoints/step-00000004 /data/val --suite knn --train DATASET`"
    assert notes[2] == f"Not measured yet: `vitscale evaluate {missing}"
    assert "| runs/b&b | 0.7500 (0.7000–0.8000) |" in FORMATS["markdown"](found)
    tex = FORMATS["latex"](found)
    assert r"runs/b\&b & 0.7500 (0.7000--0.8000) & 0.2500" in tex
    assert r"runs/a\_1 step 12 ema" in tex
    told = json.loads(FORMATS["json"](found))
    assert [row["value"] for row in told] == [0.5, 0.5, 0.75, 0.25, 0.75, 0.25]
    assert told[2] == {
        "label": "runs/a_1 step 12 ema", "place": "runs/a_1", "step": "12", "weights": "ema", "dataset": "/data/val",
        "class_map": None, "suite": "accuracy", "name": "top1", "value": 0.75, "ci_low": 0.7, "ci_high": 0.8,
    }  # fmt: skip

    one = compare(["runs/a_1/checkpoints/step-00000004", "exported"], "accuracy/*")
    assert one.labels == ["runs/a_1", "exported"]
    assert one.header == ["val top1", "val loss", "sketch top1", "sketch loss"]
    assert json.loads(FORMATS["json"](one))[1]["ci_low"] is None
    assert compare(["runs/b&b/evaluations/results.parquet"]).labels == ["/elsewhere/b&b"]


@pytest.mark.usefixtures("runs")
def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each number where a row for each checkpoint is too long; columns below where both are."""
    found = compare(["runs/a_1", "runs/b&b"], "accuracy/*,knn/*")
    monkeypatch.setenv("COLUMNS", "80")
    assert FORMATS["text"](found).splitlines()[0].split("  ")[-1] == "knn k20_top1"
    monkeypatch.setenv("COLUMNS", "60")  # too few for two intervals beside names of checkpoints
    lines = FORMATS["text"](found).splitlines()
    assert [lines[0].split(), lines[5], lines[6].split()] == [["top1", "loss"], "", ["knn", "k20_top1"]]
    assert max(map(len, lines[:11])) <= 60
    table = Table(["", "x", "y", "z"], [["one", "1" * 30, "2", "3"]])
    assert [line.split() for line in text(table, 33).splitlines()] == [["one"], ["x", "1" * 30], ["y", "2"], ["z", "3"]]
    assert text(Table(["", "x", "y"], [["one", "1", "2"], ["two", "3", "4"]]), 8).split("\n\n") == [
        "     x\none  1\ntwo  3", "     y\none  2\ntwo  4",
    ]  # fmt: skip


@pytest.mark.usefixtures("runs")
def test_class_maps_are_columns_of_their_own_and_commands_few() -> None:
    step = "runs/a_1/checkpoints/step-00000012"
    for class_map, value in (("subset", 0.6), ("0123456789abcdef", 0.7)):
        subject = Subject(step, "/data/val", "ema", "f", class_map)
        fill(Path("runs/a_1/evaluations/results.parquet"), (subject, {"accuracy": {"top1": value}, "real": {"x": 1}}))
    found = compare(["runs/a_1", "runs/b&b"], "top1,knn/*,real/x")
    assert found.header == [
        "top1",
        "top1 subset",
        "top1 map 01234567",
        "knn k20_top1",
        "real x subset",
        "real x map 01234567",
    ]
    ema = found.subjects[found.labels.index("runs/a_1 step 12 ema")]
    assert [found.cells[ema, column].value for column in found.columns[:3]] == [0.75, 0.6, 0.7]
    missing = [note.removeprefix("Not measured yet: ") for note in found.notes() if note.startswith("Not measured")]
    assert missing == [
        "`vitscale evaluate runs/a_1/checkpoints/step-00000004 /data/val --suite real=FILE --class-map subset`",
        "`vitscale evaluate runs/a_1/checkpoints/step-00000004 /data/val --suite real=FILE --class-map FILE`",
        "`vitscale evaluate runs/a_1/checkpoints/step-00000004 /data/val --suite knn --train DATASET`",
        "more, by 5 other commands.",
    ]


@pytest.mark.usefixtures("runs")
def test_what_is_missing_is_said_with_the_command_that_finds_it() -> None:
    def refused(places: list[str], metric: str = "") -> str:
        with pytest.raises(UserError) as error:
            compare(places, metric)
        return str(error.value)

    Path("empty").mkdir()
    assert "Run `vitscale evaluate empty DATASET`." in refused(["runs/a_1", "empty"])
    assert "no such file" in refused(["nowhere"])
    assert "runs/a_1/checkpoints/step-00000007" in refused(["runs/a_1/checkpoints/step-00000007"])
    said = refused(["runs/b&b", "exported"], "knn/*")
    assert said.startswith("RUNS: got exported, without knn/k20_top1")
    assert "Run `vitscale evaluate exported /copy/val --suite knn --train DATASET`." in said
    said = refused(["exported"], "calibration/ece")
    assert "--metric: got calibration/ece; expected one of accuracy/loss, accuracy/top1. " in said
    assert "`vitscale evaluate exported DATASET --suite calibration`" in said


@pytest.mark.usefixtures("runs")
def test_the_plot_is_a_picture() -> None:
    pytest.importorskip("matplotlib")
    found = compare(["runs/a_1", "runs/b&b", "exported"], "accuracy/*")
    for name, begin in (("plot.png", b"\x89PNG"), ("deep/er/plot.SVG", b"<?xml"), ("plot.pdf", b"%PDF")):
        plot(found, check_plot(name))
        assert Path(name).read_bytes().startswith(begin)
    Path("folder.png").mkdir()
    for name in ("plot.jpg", "plot", "folder.png", "plot.pdf/plot.png"):
        with pytest.raises(UserError, match=r"^--plot: got "):
            check_plot(name)
    with pytest.raises(UserError, match=r"^--plot: got "):
        plot(compare(["exported"]), Path("plot.pdf/plot.png"))


def test_tables_are_escaped() -> None:
    table = Table(["", "a|b"], [[r"50% of $x_1$ & {y}~^#\z", "1–2"]])
    assert text(table).splitlines()[1] == r"50% of $x_1$ & {y}~^#\z  1–2"
    assert markdown(table).splitlines() == ["|  | a\\|b |", "|---|---:|", r"| 50% of $x_1$ & {y}~^#\\z | 1–2 |"]
    row = latex(table).splitlines()[4]
    assert row == r"50\% of \$x\_1\$ \& \{y\}\textasciitilde{}\textasciicircum{}\#\textbackslash{}z & 1--2 \\"


def test_what_cannot_be_evaluated_is_said(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = write_export(tmp_path / "spoilt", NUMBERS, spoilt=True)
    trained, store = stage.check(str(spoilt), str(digits.test))
    with pytest.raises(UserError, match=r"^CHECKPOINT: got logits that are not finite"):
        stage.evaluate(trained, store, SETTINGS, ALONE)
    told = json.loads((spoilt / "config.json").read_text())
    told["preprocess"]["img_size"] = 48
    (spoilt / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"^CHECKPOINT: got .*preprocessing to 48 px for a model of 32 px"):
        stage.check(str(spoilt), str(digits.test))
    monkeypatch.setattr(Store, "sizes", [np.zeros(0, np.int64)])
    export = write_export(tmp_path / "export", NUMBERS)
    with pytest.raises(UserError, match=r"^DATASET: got a dataset without images"):
        stage.check(str(export), str(digits.test))


def test_the_command(digits: Any, tmp_path: Path, vitscale: Callable[..., Any]) -> None:
    for seed, name in enumerate("ab"):
        export = write_export(tmp_path / name, NUMBERS, seed)
        trained, store = stage.check(str(export), str(digits.test))
        results = stage.evaluate(trained, store, SETTINGS, ALONE)
        stage.write_results(results, stage.results_path(trained, store))
    said = vitscale("compare", "a", "b", "--format", "latex", "--metric", "top1", "--plot", "plot.png")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("\\begin{tabular}{lr}\n\\hline\n & top1 \\\\\n\\hline\na & 0.")
    assert (tmp_path / "plot.png").exists()
