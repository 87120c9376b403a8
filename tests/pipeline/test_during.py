"""Evaluation while a run trains: suites that disturb nothing, and an end where nothing gets better."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import TINY, command, losses, same_weights, wait_for, words
from vitscale.errors import UserError
from vitscale.launch.chain_stages import run_complete
from vitscale.launch.recipes import RECIPES
from vitscale.pipeline.checkpoint import checkpoints
from vitscale.pipeline.config import Config
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import during, suite_results, suites
from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.planner import plan
from vitscale.pipeline.position import Position
from vitscale.pipeline.recipe import load_recipe
from vitscale.pipeline.run_folder import read_best
from vitscale.pipeline.status import lines, read_status
from vitscale.pipeline.train import train
from vitscale.pipeline.watchdog import Watchdog
from vitscale.pipeline.weights import open_trained

QUICK = ("train.duration=4", "data.workers=0", "checkpoint.every=0", "eval.every=2", "guard.compare_every=0")
RANDOM = ("model.dropout=0.2", "optim.ema=0.5")  # what draws random numbers of torch's


def config_of(train_set: str, folder: str, *more: str) -> Config:
    return load_recipe("digits-demo", [*TINY, f"data.train={train_set}", f"run.dir={folder}", *more], RECIPES)


def with_and_without(world: World, folder: str, train_set: str, stage: int) -> None:
    """Two runs, the second with suites; a folder of features that a crash left lies in its way."""
    more = [*QUICK, *RANDOM, "data.dev=10%", f"engine.zero_stage={stage}"]
    left = Path(folder, "with", ".suites", "train-train-0123")
    if world.main:
        left.mkdir(parents=True)
    own = ["eval.suites=knn,fewshot,calibration", "eval.suites_every=2"]
    for name, settings in (("without", []), ("with", own)):
        config = config_of(train_set, f"{folder}/{name}", *more, *settings)
        train(plan(config, world.size), world)


@pytest.mark.parametrize(("size", "stage"), [(1, 0), (2, 2)])
def test_suites_disturb_nothing(digits: Any, tmp_path: Path, ranks: Callable[..., Any], size: int, stage: int) -> None:
    """The same losses, samples, evaluations and weights, bit for bit, with suites on the way."""
    ranks(__file__, "with_and_without", size, str(tmp_path), str(digits.train), stage)
    ours, theirs = tmp_path / "with", tmp_path / "without"
    assert losses(ours) == losses(theirs)
    rows = {run: read_metrics(run) for run in (ours, theirs)}
    for kind, names in (("train", ("samples", "weight_norm")), ("eval", ("top1", "loss", "ema_top1"))):
        found = [[[row[name] for name in names] for row in rows[run] if row["kind"] == kind] for run in (ours, theirs)]
        assert len(found[0]) == (4 if kind == "train" else 2)
        assert found[0] == found[1]
    assert same_weights(ours, theirs)
    measured = [row for row in rows[ours] if row["kind"] == "suite"]
    assert [row["step"] for row in measured] == [2, 4]
    for row in measured:
        assert {"knn/k10_top1", "fewshot/5shot", "calibration/ece"} < set(row)
        assert not any(name.startswith("calibration/class/") for name in row)
    assert measured[0]["fewshot/5shot"] != measured[1]["fewshot/5shot"]  # of the network as it is
    assert not (ours / ".suites").exists()


def train_and_evaluate(world: World, folder: str, train_set: str, test_set: str) -> dict[str, dict[str, float]]:
    """What suites find at the end of training at stage 3, and of the checkpoint."""
    more = [f"eval.suites_data={test_set}", "eval.suites=knn,fewshot,calibration", "engine.zero_stage=3"]
    deepspeed = "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    config = config_of(train_set, folder, *QUICK, "optim.ema=0.5", f"data.val={test_set}", deepspeed, *more)
    train(plan(config, world.size), world)
    trained, store, features = suite_results.check(folder, test_set, "knn,fewshot,calibration", train_set, "auto")
    task = suites.Task(trained, store, features, LoaderSettings(50, 0), world, Path(folder, "again"), "")
    found = suites.run({"knn": "", "fewshot": "", "calibration": ""}, task)
    return {suite: {name: during.number(value) for name, value in values.items()} for suite, values in found}


def test_suites_in_training_are_those_of_the_checkpoint(digits: Any, tmp_path: Path, ranks: Callable[..., Any]) -> None:
    """At stage 3 with every weight partitioned, of the average. Shares of right answers are the same; probabilities
    are float32, of batches that were cut otherwise."""
    later = ranks(__file__, "train_and_evaluate", 2, str(tmp_path / "run"), str(digits.train), str(digits.test))
    row = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "suite"][-1]
    for suite, values in later.items():
        for name, value in values.items():
            if not name.startswith(during.UNLOGGED):
                tolerance = 1e-6 if suite == "calibration" else 1e-12
                assert row[f"{suite}/{name}"] == pytest.approx(value, abs=tolerance), name


PATIENT = ("eval.every=2", "eval.patience=2", "checkpoint.every=0")
# a rate that is 0 in float32: weights that never change are never better than at first, and the last step is known
STILL = (*PATIENT, "optim.lr=1e-60", "optim.ema=0.5", "checkpoint.keep=1")


@pytest.mark.slow
def test_a_run_ends_where_nothing_gets_better(digits: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("data.dev=10%", *STILL, "data.workers=0")
    said = command(digits, folder, *more)
    assert said.returncode == 0, said.stderr
    evaluations = [row for row in read_metrics(folder) if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    score = evaluations[0]["ema_top1"]
    best = {"step": 2, "name": "ema_top1", "score": score}
    told = f"trained to step 6 of 12; the best checkpoint is of step 2, ema_top1 {score:.4f}, and 2 evaluations since"
    assert told in said.stdout
    assert read_best(folder) == best
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-00000006", "step-00000002"]
    assert open_trained(str(folder), "x").origin["step"] == 2
    found = read_status(str(folder))
    assert (found.state, found.step, found.steps, found.worse) == ("finished", 6, 12, 2)
    assert {"kind": "eval", **evaluations[0]} == found.evaluation
    shown = dict(lines(found))
    assert "finished early, by eval.patience" in shown["run"]
    assert shown["evaluation"].endswith("; 2 evaluations since had no better")
    config = load_recipe(str(folder / "recipe.yaml"), [], RECIPES)
    assert run_complete(config)
    before = (folder / "metrics.jsonl").read_bytes()
    again = command(digits, folder, *more)
    assert (again.returncode, f"already {told}" in again.stdout) == (0, True)
    assert (folder / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(folder / "checkpoints" / "step-00000006")  # as if it had been killed before that was there
    assert not run_complete(config)
    assert command(digits, folder, *more).returncode == 0
    assert [row["step"] for row in read_metrics(folder) if row["kind"] == "eval"] == [2, 4, 6]
    assert open_trained(str(folder), "x").origin["step"] == 2
    longer = command(digits, folder, *more, "eval.patience=3", "train.duration=12")
    assert "going on from step 6" in longer.stdout
    assert "trained to step 8" in longer.stdout
    plain = command(digits, folder, *more, "eval.patience=0")
    assert "going on from step 8" in plain.stdout
    assert open_trained(str(folder), "x").origin["step"] == 12
    assert not (folder / "best.json").exists()


@pytest.mark.slow
def test_a_killed_run_ends_at_the_same_step(digits: Any, tmp_path: Path) -> None:
    """Two ranks, all killed with -9 once the count has begun."""
    more = (*PATIENT, "optim.ema=0.999", "train.duration=200", "--nproc", "2")
    assert command(digits, tmp_path / "a", *more).returncode == 0
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = words(digits, tmp_path / "b", *more)
    running = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(tmp_path / "b" / "checkpoints" / "step-00000004", running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert command(digits, tmp_path / "b", *more).returncode == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert 6 <= len(losses(tmp_path / "a")) < 200
    assert read_best(tmp_path / "b") == read_best(tmp_path / "a")
    assert same_weights(tmp_path / "b", tmp_path / "a")


def test_evaluations_are_judged_by_what_is_exported() -> None:
    assert during.score({"top1": 0.5, "top5": 0.9, "loss": 1.0}) == ("top1", 0.5)
    assert during.score({"top1": 0.5, "map": 0.4, "loss": 1.0}) == ("map", 0.4)
    assert during.score({"top1": 0.5, "map": 0.4, "ema_top1": 0.6, "ema_map": 0.3}) == ("ema_map", 0.3)
    position = Position(step=1)
    for step, (score, best, worse) in enumerate([(0.2, 1, 0), (0.2, 1, 1), (0.1, 1, 2), (0.3, 4, 0), (0.2, 4, 1)], 1):
        position.step = step
        position.judge("top1", score)
        assert (position.best["step"], position.worse) == (best, worse)
    told = json.loads(json.dumps({"step": 5, "position": vars(position)}))
    assert Position.of(told) == position


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["eval.suites=knn,umap"], "eval.suites: got umap; expected some of knn, fewshot"),
        (["eval.suites=knn"], "eval.suites_data: got nothing; expected images to evaluate on"),
        (["eval.suites=robustness", "data.dev=10%"], "eval.suites: got robustness; expected suites that look at no"),
        (["eval.suites=real=none.json", "data.dev=10%"], "eval.suites: got real=none.json"),
        (["eval.suites=knn", "eval.suites_data=nowhere"], "eval.suites_data: got "),
        (["eval.suites=knn", "data.dev=10%", "eval.suites_train=nowhere"], "eval.suites_train: got "),
        (["eval.suites=calibration", "data.dev=10%", "eval.suites_train={train}"], "eval.suites_train: got {train}"),
        (["eval.suites=calibration", "eval.suites_data={other}"], "eval.suites_data: got 10 classes that differ"),
        (["eval.suites=knn", "eval.suites_data={other}"], "eval.suites_train: got 10 classes that differ"),
        (["eval.suites=knn", "eval.suites_data={train}"], "eval.suites_train: got {train}, with the same images as"),
        (["eval.suites_data={train}"], "eval.suites_data: got {train}; expected nothing without eval.suites"),
        (["eval.suites=knn", "data.dev=10%", "data.on_error=skip"], "data.on_error: got skip with eval.suites"),
        (["eval.patience=2"], "eval.patience: got 2 without data.dev or data.val"),
        (["eval.patience=2", "data.dev=10%", "eval.every=0"], "eval.patience: got 2 with eval.every 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_training(
    digits: Any, tmp_path: Path, settings: list[str], expected: str
) -> None:
    other = shutil.copytree(digits.test, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    info["classes"][0] = "nought"
    (other / "dataset.json").write_text(json.dumps(info))
    names = {"train": str(digits.train), "other": str(other)}
    config = config_of(names["train"], str(tmp_path / "run"), *(word.format(**names) for word in settings))
    with pytest.raises(UserError) as error:
        plan(config, 1)
    assert str(error.value).startswith(expected.format(**names))
    assert "--train" not in str(error.value)
    assert "--suite " not in str(error.value).replace("vitscale evaluate --suite ", "")


def test_the_watchdog_is_kept_quiet_while_ranks_compute_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(during, "BEAT", 0.05)
    with Watchdog(0, tmp_path, 0) as watchdog:
        begun = watchdog._seen
        with during._beating(watchdog):
            time.sleep(0.5)
            assert watchdog._seen > begun + 0.1


@pytest.mark.slow
def test_the_best_checkpoint_is_used_out_of_an_object_store(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.data_prep.test_storage import download, object_store

    monkeypatch.setenv("VITSCALE_SCRATCH", str(tmp_path / "scratch"))
    url = "s3://bucket/runs/a"
    with object_store() as (server, client):
        said = command(digits, tmp_path, f"run.dir={url}", "data.dev=10%", *STILL, "eval.suites=fewshot")
        assert said.returncode == 0, said.stderr
        assert "trained to step 6 of 12" in said.stdout
        held = download(client, "runs/a")
        assert json.loads(held["best.json"])["step"] == 2
        steps = {name.split("/")[1] for name in held if name.startswith("checkpoints/step-")}
        assert steps == {"step-00000002", "step-00000006"}
        assert not any("suites" in name for name in held)
        assert open_trained(url, "x").origin["step"] == 2
        assert dict(open_trained(url, "x").tensors())
        found = read_status(url)
        assert (found.state, found.evaluation["step"]) == ("finished", 2)
        server.stop()
