"""Many small tasks: the shipped list, files that cannot be, means, and a whole suite on the digits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.runs import TINY
from vitscale.errors import UserError
from vitscale.launch.vtab import load_tasks, run_tasks, summary, write_tables

SHORT = (*TINY, "engine.micro_batch=30", "data.workers=0", "eval.every=0", "checkpoint.every=0", "checkpoint.keep=1")


def test_the_nineteen_tasks_compose() -> None:
    tasks = load_tasks("vtab-1k")
    groups = [task.group for task in tasks]
    assert [groups.count(name) for name in ("natural", "specialised", "structured")] == [7, 4, 8]
    for task in tasks:
        kind = task.kind("data/", "runs/a", "out", ["augment.erase=0.5"])
        config = kind.config(kind.runs[0])
        assert (config.run.dir, config.data.train) == (f"out/{task.name}/final", f"data/{task.name}/train")
        assert kind.test == f"data/{task.name}/test"
        assert (config.init_from, config.data.dev, config.augment.erase) == ("runs/a", "", 0.5)
        assert (config.train.duration, config.optim.lr, config.train.global_batch) == ("2500", 0.01, 512)
        assert config.augment.flip == (task.group != "structured" and task.name != "svhn")


def test_settings_at_the_top_are_of_every_task_that_has_no_other(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    task = {"group": "g", "train": "a", "test": "/b"}
    rows = [{"name": "one", **task}, {"name": "two", **task, "grid": [], "settings": ["optim.lr=3"], "dev": "5%"}]
    top = {"recipe": "digits-demo", "grid": ["optim.lr=[1, 2]"], "settings": ["run.seed=7"], "metric": "mean_per_class"}
    file.write_text(yaml.safe_dump({**top, "tasks": rows}))
    one, two = load_tasks(str(file))
    assert (one.grid, one.settings, one.dev, one.metric) == (
        ("optim.lr=[1, 2]",),
        ("run.seed=7",),
        "20%",
        top["metric"],
    )
    assert (two.grid, two.settings, two.dev) == ((), ("run.seed=7", "optim.lr=3"), "5%")
    kind = one.kind("root", "init", "out", [])
    assert [run.folder for run in kind.runs] == ["out/one/lr=1", "out/one/lr=2"]
    assert kind.config().data.dev == "20%"
    assert kind.test == "/b"


TASK = {"name": "a", "group": "g", "train": "x", "test": "x", "recipe": "digits-demo"}


@pytest.mark.parametrize(
    ("tree", "setting", "said"),
    [
        ([], "TASKS", "without a list of tasks"),
        ({"tasks": [3]}, "TASKS", "without a list of tasks"),
        ({"tasks": [{**TASK, "tset": "x"}]}, "TASKS", "Did you mean 'test'?"),
        ({"recpie": "x", "tasks": [TASK]}, "TASKS", "Did you mean 'recipe'?"),
        ({"tasks": [TASK, TASK]}, "TASKS", "two tasks named a"),
        ({"tasks": [{**TASK, "test": ""}]}, "TASKS: a.test", "got ''"),
        ({"tasks": [{key: value for key, value in TASK.items() if key != "train"}]}, "TASKS: a.train", "got nothing"),
        ({"tasks": [{**TASK, "grid": "optim.lr=[1]"}]}, "TASKS: a.grid", "a list of SETTING=VALUE"),
        ({"tasks": [{**TASK, "metric": "top-1"}]}, "TASKS: a.metric", "Did you mean 'top1'?"),
        ({"tasks": [{**TASK, "name": "../a"}]}, "TASKS", "a name of a folder"),
        ({"tasks": [{**TASK, "test": "nowhere"}, {**TASK, "name": "b"}]}, "TASKS", "no data of a;"),
        ({"tasks": [{**TASK, "settings": ["optim.lrr=1"]}]}, "optim.lrr", "Did you mean 'optim.lr'?"),
        ({"tasks": [TASK]}, "--test", "with images of data.train"),
        ({"tasks": [{**TASK, "test": "y"}]}, "--test", "without dataset.json"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tree: Any, setting: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump(tree))
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    with pytest.raises(UserError) as error:
        run_tasks("init", str(file), str(tmp_path / "out"), [], str(tmp_path), False, 1, print)
    assert error.value.setting == setting
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TASKS: got vtab: .* or vtab-1k"):
        load_tasks("vtab")
    with pytest.raises(UserError, match=r"--root: got .* without data of any task"):
        run_tasks("init", "vtab-1k", str(tmp_path / "out"), [], str(tmp_path), True, 1, print)


def test_means_are_of_the_tasks_that_are_done(tmp_path: Path) -> None:
    """Tasks count alike, so that a group counts by its number of tasks; what is missing is said beside the mean."""
    rows: list[dict[str, Any]] = [
        {"task": "a_b&c", "group": "natural", "score": 0.9},
        {"task": "d", "group": "natural", "score": 0.5},
        {"task": "e", "group": "specialised", "score": 0.1},
        {"task": "f", "group": "structured", "missing": "no data"},
    ]
    told = summary("runs/a", rows)
    assert told["groups"]["natural"] == {"score": pytest.approx(0.7), "tasks": 2, "of": 2}
    assert told["groups"]["structured"] == {"score": None, "tasks": 0, "of": 1}
    assert told["mean"] == {"score": pytest.approx(0.5), "tasks": 3, "of": 4}
    write_tables(told, str(tmp_path))
    assert (tmp_path / "results.md").read_text().splitlines()[-1] == "| mean of 3 of 4 | all | 50.00 |"
    lines = (tmp_path / "results.tex").read_text().splitlines()
    assert lines[4] == r"a\_b\&c & natural & 90.00 \\"
    assert lines[7] == r"f & structured & no data \\"
    assert lines[-3] == r"mean of 3 of 4 & all & 50.00 \\"


@pytest.mark.slow
def test_a_suite_from_the_command_line(vitscale: Callable[..., Any], digits: Any, tmp_path: Path) -> None:
    """A task by a grid, one without, one without data: two scores, their mean, the same again."""
    data = (f"data.train={digits.train}", "run.dir=a", "train.duration=2")
    command = [sys.executable, "-m", "vitscale.launch.cli", "pretrain", "digits-demo", *SHORT, *data]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    places = {"train": "train", "test": "test"}
    rows = [
        {"name": "chosen", "group": "one", "grid": ["optim.lr=[1e-12, 3e-3]"], "metric": "mean_per_class", **places},
        {"name": "plain", "group": "two", **places},
        {"name": "absent", "group": "two", "train": "nowhere", "test": "test"},
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"recipe": "digits-demo", "tasks": rows}))
    words = ("vtab", "a", "tasks.yaml", "out", *SHORT, "train.duration=100", "--root", digits.train.parent)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"recipe": "digits-demo", "metric": "map", "tasks": rows[1:2]}))
    refused = vitscale("vtab", "a", "wrong.yaml", *words[3:])
    assert "TASKS: plain.metric: got map; expected top1 or mean_per_class" in refused.stderr
    refused = vitscale(*words)
    assert refused.returncode == 2
    assert "no data of absent" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = vitscale(*words, "--available")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    chosen, plain, absent = told["tasks"]
    assert chosen["settings"]["optim.lr"] == "3e-3"
    assert absent["missing"] == "no data"
    tests = [json.loads((tmp_path / "out" / name / "results.json").read_text())["test"] for name in ("chosen", "plain")]
    assert [chosen["score"], plain["score"]] == [tests[0]["mean_per_class"], tests[1]["top1"]]
    assert told["mean"] == {"score": (chosen["score"] + plain["score"]) / 2, "tasks": 2, "of": 3}
    assert told["groups"]["two"] == {"score": plain["score"], "tasks": 1, "of": 2}
    state = next((tmp_path / "out" / "chosen" / "lr=3e-3").glob("checkpoints/step-*/state.json"))
    assert json.loads(state.read_text())["dataset"]["samples"] == 1438 - 288, "a fifth is for choosing"
    again = vitscale(*words, "--available")
    assert again.stdout.count("complete already") == 3
    assert again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == told
    assert (tmp_path / "out" / "results.tex").read_text().count(r"\\") == 7
