"""Grids on this machine: the best settings are found, trained on everything, and tested once; killed, it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from tests.pipeline.runs import TINY
from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.shard import shard
from vitscale.errors import UserError
from vitscale.launch.grid import FINAL, GridKind, run_name
from vitscale.launch.grid_local import check_here, run_here
from vitscale.launch.grid_table import place, result_line, table_of
from vitscale.launch.slurm import SlurmConfig
from vitscale.pipeline.status import lock_holder

SHORT = (*TINY, "data.workers=0", "eval.every=0", "checkpoint.every=0")
RATES = ("--grid", "optim.lr=[1e-12, 3e-3]")  # at the first nothing is learnt: the head stays at zero
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Path:
    """A run of two steps to fine-tune from."""
    run = tmp_path_factory.mktemp("trained") / "run"
    data = (f"data.train={digits.train}", f"run.dir={run}", "train.duration=2")
    command = [sys.executable, "-m", "vitscale.launch.cli", "pretrain", "digits-demo", *SHORT, *data]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run


def search(trained: Path, digits: Any, *more: str) -> tuple[str, ...]:
    """Words of a search over two rates with a tenth of the images held out, and the test set at its end."""
    data = (f"init_from={trained}", f"data.train={digits.train}", "data.dev=10%", "run.dir=runs")
    own = ("checkpoint.keep=1", "engine.micro_batch=30", "train.duration=100", *data)
    return ("finetune", "digits-demo", *SHORT, *own, *RATES, "--test", str(digits.test), *more)


def samples(run: Path) -> int:
    """Images of the training set of a run."""
    return json.loads(next(run.glob("checkpoints/step-*/state.json")).read_text())["dataset"]["samples"]


def test_the_best_settings_are_trained_on_everything_and_tested_once(
    vitscale: Command, trained: Path, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = vitscale(*search(trained, digits))
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "runs" / "results.json").read_text()
    told = json.loads(first)
    assert [row["settings"]["optim.lr"] for row in told["runs"]] == ["3e-3", "1e-12"]
    assert told["runs"][0]["dev_top1"] > told["runs"][1]["dev_top1"] + 0.05
    runs = tmp_path / "runs"
    assert [samples(runs / name) for name in ("lr=1e-12", "lr=3e-3", "final")] == [1294, 1294, 1438]
    assert told["test"]["run"] == "runs/final"
    assert told["test"]["images"] == 359
    found = json.loads((runs / "final" / "evaluations" / "test.json").read_text())
    shares = [row[place] / sum(row) for place, row in enumerate(found["confusion"])]
    assert told["test"]["top1"] == found["top1"] == sum(row[i] for i, row in enumerate(found["confusion"])) / 359
    assert told["test"]["mean_per_class"] == pytest.approx(sum(shares) / 10, abs=1e-12)
    assert list(runs.glob("*/evaluations")) == [runs / "final" / "evaluations"], "no other run was tested"
    assert f"Test: top-1 {found['top1']:.2%}" in done.stdout
    words = search(trained, digits)
    files = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    said = vitscale(*words, "--grid", "run.seed=[0, 1]")
    assert said.returncode == 2
    assert "--grid: got other runs (lr=1e-12, lr=1e-12,seed=0, lr=1e-12,seed=1, lr=3e-3, " in said.stderr
    monkeypatch.chdir(tmp_path)
    settings = tuple(word for word in words[2:] if "=" in word and "[" not in word)
    for test in (str(digits.train), ""):
        with pytest.raises(UserError, match=rf"{digits.test}, which this grid was tested on, once"):
            GridKind("digits-demo", (RATES[1],), (*settings, "data.train=."), test=test).check("grid", SlurmConfig())
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == files
    again: list[str] = []
    assert run_here(GridKind("digits-demo", (RATES[1],), settings, test=str(digits.test)), 1, again.append) == 0
    assert again[:2] == ["runs/lr=1e-12: complete already", "runs/lr=3e-3: complete already"]
    assert again[2].splitlines()[-1] == done.stdout.splitlines()[-1]
    assert (runs / "results.json").read_text() == first


def test_names_and_table() -> None:
    grid = GridKind("digits-demo", ("optim.lr=[1e-3, .003]", "data.train=[[{path: a/b}], c]"), ("run.dir=runs",))
    assert len(grid.runs) == 4
    assert grid.runs[1].words == ["optim.lr=1e-3", "data.train=c", "run.dir=runs/lr=1e-3,train=c"]
    assert (
        run_name({"optim.lr": "1", "model.name": "a/b", "optim.name": "x"}) == "optim.lr=1,model.name=a-b,optim.name=x"
    )
    assert [run.folder for run in GridKind("digits-demo", (), ("run.dir=runs",)).runs] == ["runs/final"]
    row = {"run": "r", "settings": {"a": "1"}, "state": "finished", "step": 1000, "val_top1": 0.5}
    made = table_of([row, {**row, "val_top1": None, "train_loss": 2}])
    assert made.header == ["a", "val top1", "train loss", "step", "state", "run"]
    assert made.rows == [["1", "0.5000", "", "1,000", "finished", "r"], ["1", "", "2.0000", "1,000", "finished", "r"]]
    assert table_of([{**row, "val_top1": None, "dev_top1": 0.5}]).header[1] == "dev top1"
    test = {"run": "r", "dataset": "d", "images": 1200, "top1": 0.5}
    assert result_line(test) == "Test: top-1 50.00% of r on d (1,200 images)"
    for word in ("optim.lr", "optim.lr=3", "=[1]", "optim.lr=[1", "run.dir=[a, b]"):
        with pytest.raises(UserError, match="--grid"):
            _ = GridKind("digits-demo", (word,), ("run.dir=runs",)).runs


def test_the_best_is_the_finished_one_of_the_highest_score_the_first_of_equals() -> None:
    rows: list[dict[str, Any]] = [
        {"run": "stopped", "state": "stopped", "val_top1": 0.99},
        {"run": "good", "state": "finished", "val_top1": 0.5, "val_loss": 2.0},
        {"run": "as good", "state": "finished", "val_top1": 0.5, "val_loss": 1.0},
        {"run": "better on average", "state": "finished", "val_top1": 0.1, "val_ema_top1": 0.6},
        {"run": "worse on average", "state": "finished", "val_top1": 0.9, "val_ema_top1": 0.2},
        {"run": "not measured", "state": "finished", "train_loss": 0.1},
        {"run": "diverged", "state": "finished", "train_loss": float("nan")},
    ]
    names = [row["run"] for row in sorted(rows, key=place)]
    assert names == [
        "better on average", "good", "as good", "worse on average", "not measured", "diverged", "stopped",
    ]  # fmt: skip
    labels = {"state": "finished", "val_map": 0.3, "val_top1": 0.9}
    assert place(labels)[1] == -0.3, "of images with several labels the mean average precision counts"
    assert place({"state": "finished", "dev_top1": 0.2, "dev_loss": 1.0}) < place(
        {"state": "finished", "dev_top1": 0.1}
    )


def refused(
    settings: tuple[str, ...], setting: str, said: str, vary: tuple[str, ...] = (RATES[1],), **more: str
) -> None:
    with pytest.raises(UserError) as error:
        check_here(GridKind("digits-demo", vary, (*SHORT, *settings), **more), 1)  # pyright: ignore[reportArgumentType]
    assert error.value.setting == setting
    assert said in str(error.value)


def test_what_cannot_be_is_refused_before_anything_runs(digits: Any, tmp_path: Path, vitscale: Command) -> None:
    data = (f"data.train={digits.train}", f"run.dir={tmp_path / 'runs'}")
    dev, val, test = "data.dev=10%", f"data.val={digits.test}", str(digits.test)
    refused(data, "data.dev", "Add data.dev=2%")
    refused((*data, val), "--test", f"../test, with images of data.val ({test})", test=f"{test}/../test")
    copies = {split: str(copytree(getattr(digits, split), tmp_path / split)) for split in ("train", "test")}
    for own, setting in (
        ((*data, dev), "data.train"),
        ((f"data.train=[{{path: {test}}}, {{path: {copies['train']}}}]", data[1], dev), "data.train"),
        ((f"data.train={test}", data[1], f"data.val={digits.train}"), "data.val"),
    ):
        for path in (str(digits.train), copies["train"]):
            refused(own, "--test", f"{path}, with images of {setting} (", test=path)
    suites = ("eval.suites=knn", f"eval.suites_data={copies['test']}")
    refused((*data, dev, *suites), "--test", "with images of eval.suites_data", test=test)
    other = f"data.train=[{digits.train}, {test}]"
    refused((data[1], dev), "--grid", "compared on the same images", vary=(other,))
    refused(data, "--grid", "compared on the same images", vary=("data.dev=[1%, 2%]",))
    refused(data, "--grid", "compared on the same images", vary=(f"data.val=[{digits.train}, {test}]",))
    refused((*data, dev), "--grid", "the same run as", vary=("optim.lr=[.001, 2e-3, 1e-3]",))
    refused((*data, dev, "optim.lr=.1"), "--grid", "optim.lr beside optim.lr=.1")
    check_here(GridKind("digits-demo", (other,), (*SHORT, data[1], val)), 1)
    refused((*data, dev, "eval.patience=3"), "eval.patience", "Vary train.duration", test=test)
    refused((*data, dev), "--test", "nowhere", test="nowhere")
    refused((*data, dev), "optim.lrr", "Did you mean 'optim.lr'?", vary=("optim.lrr=[1, 2]",))
    with pytest.raises(UserError, match=r"train.global_batch: got 5000; .* training images"):
        check_here(GridKind("digits-demo", ("train.global_batch=[30, 5000]",), (*data, dev)), 1)
    refused((*data, dev, "run.dir=s3://bucket/runs"), "run.dir", "s3://")
    refused((data[0], dev), "run.dir", "nothing")
    for name in ("0", "1"):
        copytree(digits.test_images / name, tmp_path / "images" / name)
    shard(str(tmp_path / "images"), str(tmp_path / "two"), ShardConfig(workers=1))
    refused((*data, dev), "--test", "2 classes that differ", test=str(tmp_path / "two"))
    said = vitscale("finetune", "digits-demo", *data, "--test", test)
    assert said.returncode == 2
    assert "--test: got" in said.stderr
    said = vitscale("finetune", "digits-demo", *data, dev, *RATES)
    assert "error: init_from: got nothing" in said.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(vitscale: Command, trained: Path, digits: Any, tmp_path: Path) -> None:
    """Killed in the first run, asked to stop in the second, killed in the final one: the same table in the end."""
    words = search(trained, digits, "checkpoint.every=5", "train.duration=200")
    whole = vitscale(*words, "run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    for name, number, code in (("lr=1e-12", signal.SIGKILL, -9), ("lr=3e-3", signal.SIGTERM, 75), ("final", 9, -9)):
        command = [sys.executable, "-m", "vitscale.launch.cli", *words]
        running = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 120
        while not list((tmp_path / "runs" / name / "checkpoints").glob("step-*")):
            assert running.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        running.send_signal(number)
        assert running.wait(60) == code
        while lock_holder(tmp_path / "runs" / name / ".lock") is not None:
            assert time.monotonic() < end, "the rank outlived its launcher"
            time.sleep(0.1)
    done = vitscale(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete already") >= 2
    ours, theirs = ((tmp_path / folder / "results.json").read_text() for folder in ("runs", "whole"))
    assert ours == theirs.replace("whole/", "runs/")


@pytest.mark.slow
def test_another_best_run_does_not_take_the_final_folder(
    vitscale: Command, trained: Path, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data.val the best run is tested itself; a grid that grows goes on with what is new."""
    own = [*SHORT, f"data.train={digits.train}", "run.dir=runs", "train.duration=20", "--nproc", "2"]
    fine = ("finetune", "digits-demo", *own, f"init_from={trained}", "--test", str(digits.test))
    held = [*fine, "data.dev=10%"]
    assert vitscale(*held, "--grid", "optim.lr=[1e-12]").returncode == 0
    said = vitscale(*held, "--grid", "optim.lr=[1e-12,3e-3]")
    assert said.returncode == 2
    assert "--grid: got other runs (lr=3e-3)" in said.stderr
    (tmp_path / "runs" / "final").rename(tmp_path / "before")
    said = vitscale(*held, "--grid", "optim.lr=[1e-12,3e-3]")
    assert said.stdout.count("complete already") == 1, said.stderr
    own = [*SHORT, f"data.train={digits.train}", f"data.val={digits.train}", "run.dir=other", "train.duration=2"]
    words = ("launch", "grid", "digits-demo", "--local", "--grid", "run.seed=[1, 2]", *own, "--test", digits.test)
    assert vitscale(*words).returncode == 0
    told = json.loads((tmp_path / "other" / "results.json").read_text())
    assert sorted(row["run"] for row in told["runs"]) == ["other/seed=1", "other/seed=2"]
    assert told["test"]["run"] == told["runs"][0]["run"]
    assert not (tmp_path / "other" / "final").exists()
    monkeypatch.chdir(tmp_path)
    settings = tuple(word for word in own if "=" in word)
    grid = GridKind("digits-demo", ("run.seed=[1, 2]",), settings, test=str(digits.test))
    assert [grid.final().number] == grid.numbers(FINAL), "where the job that follows the table looks for its words"
