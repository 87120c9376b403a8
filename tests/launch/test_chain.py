"""Chains on a real Slurm: from images to an export by one command, broken, cancelled; arrays that retry; grids."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.runs import TINY
from tests.slurm_cluster import SlurmCluster
from vitscale.errors import UserError
from vitscale.launch.chain import load_chain, make_chain
from vitscale.launch.chain_state import NEVER, OVER

BIN = Path(sys.executable).parent
SHORT = (*TINY, "data.workers=0", "eval.every=0", "checkpoint.every=0")
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(slurm: SlurmCluster, tmp_path: Path) -> Launch:
    """`launch("chain", …)`: what the command says in tmp_path; `rc` is the exit code that it has to end with."""

    def run(*words: str | Path, rc: int = 0, path: str = "") -> subprocess.CompletedProcess[str]:
        group = [] if words[0] in ("status", "cancel") else ["launch"]
        line = [str(BIN / "vitscale"), *group, *map(str, words)]
        env = {
            **slurm.env,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{path}:{slurm.env['PATH']}" if path else slurm.env["PATH"],
        }
        done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
        assert done.returncode == rc, done.stdout + done.stderr
        return done

    return run


def jobs_of(logs: Path) -> dict[str, list[int]]:
    """Jobs by stage, as the state file has them."""
    stages = json.loads((logs / "chain.json").read_text())["stages"]
    return {stage["name"]: [row["job"] for row in stage["jobs"]] for stage in stages}


def tasks_of(slurm: SlurmCluster, logs: Path) -> list[tuple[str, str, str]]:
    """Id, state and reason of every task of a chain's jobs."""
    known = {str(job) for jobs in jobs_of(logs).values() for job in jobs}
    rows = slurm.client("squeue", "--array", "--states=all", "--noheader", "--format=%i|%T|%r").splitlines()
    tasks = [tuple(row.strip().split("|")) for row in rows]
    return [(task, state, reason) for task, state, reason in tasks if task.split("_")[0] in known]


def wait(slurm: SlurmCluster, logs: Path, seconds: float = 240) -> dict[str, int]:
    """Until nothing of a chain is left to come; how often tasks were started again, of those that were."""
    end = time.monotonic() + seconds
    while left := [task for task in tasks_of(slurm, logs) if task[1] not in OVER and task[2] != NEVER]:
        for task, _, reason in left:
            if reason == "BeginTime":
                slurm.requeue_now(task)  # pyright: ignore[reportArgumentType]
        assert time.monotonic() < end, f"{left}: {output(logs)}"
        time.sleep(0.3)
    restarts = {}
    for task, _, _ in tasks_of(slurm, logs):
        shown = slurm.client("scontrol", "show", "job", task, "--oneliner").split()
        count = next(int(word[9:]) for word in shown if word.startswith("Restarts="))
        restarts |= {task: count} if count else {}
    return restarts


def output(logs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(logs.glob("*.out")))


def states(launch: Launch, where: Path | str) -> dict[str, tuple[str, str]]:
    """State and reason of each stage, as `vitscale status --json` tells."""
    told = json.loads(launch("status", where, "--json").stdout)
    return {stage["name"]: (stage["state"], stage["reason"]) for stage in told["stages"]}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settings(*words: str | Path) -> list[str]:
    return [*SHORT, *map(str, words)]


def test_from_images_to_an_export_by_one_command(
    slurm: SlurmCluster, launch: Launch, digits: Any, tmp_path: Path, vitscale: Any
) -> None:
    data, again = ("data.train=shards", f"data.val={digits.test}"), ("model.img_size=48", "train.duration=3")
    chain = {
        "logs": "chains/digits",
        "slurm": {"time": "0:10:00"},
        "stages": [
            {"shard": {"source": str(digits.test_images), "out": "shards", "settings": ["split=train"]}},
            {"verify": {"dataset": "shards"}},
            {"pretrain": {
                "recipe": "digits-demo", "settings": settings(*data, "run.dir=runs/a", "train.duration=6"),
                "slurm": {"nodes": 2},
            }},
            {"finetune": {
                "recipe": "digits-demo",
                "settings": settings(*data, *again, "run.dir=runs/b", "init_from=runs/a"),
            }},
            {"evaluate": {"checkpoint": "runs/b", "dataset": str(digits.test), "workers": 0, "suite": "calibration"}},
            {"export": {"source": "runs/b", "out": "exported"}},
        ],
    }  # fmt: skip
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(chain))
    logs = tmp_path / "chains" / "digits"
    dry = launch("chain", "digits.yaml", "--dry-run").stdout
    assert "verify=$(sbatch --parsable --dependency=afterok:$shard " in dry
    assert not logs.exists()
    launch("chain", "digits.yaml")
    first = jobs_of(logs)
    assert list(first) == ["shard", "verify", "pretrain", "finetune", "evaluate", "export"]
    assert slurm.show(first["export"][0])["Dependency"].startswith(f"afterok:{first['evaluate'][0]}")
    assert wait(slurm, logs) == {}
    assert {state for _, state, _ in tasks_of(slurm, logs)} == {"COMPLETED"}, output(logs)
    told = states(launch, "digits.yaml")
    assert set(told.values()) == {("complete", "")}
    start = json.loads((tmp_path / "runs" / "a" / "environment.json").read_text())
    assert [each["world_size"] for each in start] == [2]
    images = json.loads(next((tmp_path / "runs" / "b" / "evaluations").glob("*.json")).read_text())["images"]
    assert images == 359
    assert launch("chain", "digits.yaml").stdout.count("complete already") == 6
    assert jobs_of(logs) == first
    assert "complete already" in launch("step", logs, "pretrain", "train", "--check").stdout  # what a job does first
    predicted = vitscale("predict", "exported", next(digits.test_images.rglob("*.png")))
    assert predicted.returncode == 0, predicted.stderr
    assert "%" in predicted.stdout


@pytest.mark.slow
def test_a_part_that_fails_is_tried_again_alone(
    slurm: SlurmCluster, launch: Launch, digits: Any, tmp_path: Path
) -> None:
    stub = tmp_path / "vitscale"
    once = '[ "${!#}" = scan ] && [ "$SLURM_ARRAY_TASK_ID" = 4 ] && mkdir once 2>/dev/null && kill -9 $$'
    stub.write_text(f'#!/bin/bash\n{once}\nexec {BIN}/vitscale "$@"\n')
    stub.chmod(0o755)
    words = ("--array", "4", "split=train", "shard_samples=300", f"slurm.command={stub}")
    launch("shard", digits.train_images, "shards", *words)
    logs = tmp_path / "shards.logs"
    scan = jobs_of(logs)["shard"][0]
    assert wait(slurm, logs) == {f"{scan}_4": 1}, output(logs)
    assert bytes_of(tmp_path / "shards") == bytes_of(digits.train)
    assert "failed with exit code 137; tried again, 1 of 2" in (logs / f"shard-scan-{scan}_4.out").read_text()
    assert "complete already" in launch("shard", digits.train_images, "shards", *words).stdout


def test_a_stage_that_fails_cancels_those_after_it(
    slurm: SlurmCluster, launch: Launch, digits: Any, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", digits.test, damaged], check=True)
    tar = next(damaged.glob("*.tar"))
    with tar.open("r+b") as file:
        file.seek(3000)
        file.write(b"nonsense")
    chain = {"logs": "logs", "stages": [
        {"verify": {"dataset": "damaged"}},
        {"verify": {"name": "again", "dataset": str(digits.test)}},
        {"verify": {"name": "apart", "dataset": str(digits.test), "array": 2, "after": []}},
    ]}  # fmt: skip
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    launch("chain", "chain.yaml")
    first = jobs_of(tmp_path / "logs")
    wait(slurm, tmp_path / "logs")
    told = states(launch, "logs")
    assert told["verify"][0] == "failed"
    assert "1 problem" in told["verify"][1] or "problems" in told["verify"][1]
    assert told["again"] == ("cancelled", "verify failed")
    assert told["apart"] == ("complete", "")
    for path in damaged.iterdir():
        if path.is_file():
            path.write_bytes((digits.test / path.name).read_bytes())
    launch("chain", "chain.yaml")
    wait(slurm, tmp_path / "logs")
    second = jobs_of(tmp_path / "logs")
    assert second["apart"] == first["apart"]
    assert second["verify"] != first["verify"]
    assert {state for state, _ in states(launch, "chain.yaml").values()} == {"complete"}


@pytest.mark.slow
def test_queued_jobs_are_not_doubled(slurm: SlurmCluster, launch: Launch, digits: Any, tmp_path: Path) -> None:
    """Neither those that are known, nor one that sbatch submitted without coming to say so; then all is cancelled."""
    chain = {"logs": "logs", "slurm": {"options": ["--hold"]}, "stages": [
        {"verify": {"dataset": str(digits.test)}},
        {"verify": {"name": "second", "dataset": str(digits.train)}},
    ]}  # fmt: skip
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    real = slurm.client("which", "sbatch").strip()
    stub.write_text(f'#!/bin/bash\n{real} "$@" >/dev/null\necho "Socket timed out" >&2\nexit 1\n')
    stub.chmod(0o755)
    said = launch("chain", "chain.yaml", rc=2, path=str(stub.parent)).stderr
    assert "Socket timed out" in said
    said = launch("chain", "chain.yaml").stdout
    assert "verify: job" in said
    assert "on its way already" in said
    first = jobs_of(tmp_path / "logs")
    assert [len(jobs) for jobs in first.values()] == [1, 1]
    assert launch("chain", "chain.yaml").stdout.count("on its way already") == 2
    assert jobs_of(tmp_path / "logs") == first
    names = slurm.client("squeue", "--states=PENDING", "--noheader", "--format=%j").split()
    assert (names.count("verify"), names.count("second")) == (1, 1)
    said = launch("chain", "chain.yaml", "second.array=3", rc=2).stderr
    assert "second, which is on its way with other settings" in " ".join(said.split())
    told = states(launch, "chain.yaml")
    assert told["verify"][0] == "pending"
    assert "JobHeldUser" in told["verify"][1]
    said = launch("cancel", "chain.yaml").stdout
    assert f"verify: cancelled {first['verify'][0]}" in said
    wait(slurm, tmp_path / "logs")
    assert [state for state, _ in states(launch, "chain.yaml").values()] == ["cancelled", "cancelled"]
    assert "nothing is queued or running" in launch("cancel", "chain.yaml").stdout


@pytest.mark.slow
def test_grid_of_two_runs_the_best_first_and_tested(
    slurm: SlurmCluster, launch: Launch, digits: Any, tmp_path: Path
) -> None:
    """A rank is killed once, of the task that goes by the number of the whole array."""
    stub = tmp_path / "vitscale"
    once = '[ "$2" = rank ] && [ $SLURM_JOB_ID = $SLURM_ARRAY_JOB_ID ] && mkdir once 2>/dev/null && kill -9 $$'
    stub.write_text(f'#!/bin/bash\n{once}\nexec {BIN}/vitscale "$@"\n')
    stub.chmod(0o755)
    own = settings(f"data.train={digits.train}", "data.dev=10%", "run.dir=runs", "train.duration=4")
    words = ("grid", "digits-demo", "--grid", "optim.lr=[.0001, 3e-3]", *own, f"slurm.command={stub}")
    words = (*words, "--test", digits.test, "slurm.tasks_per_node=2")
    launch(*words)
    logs = tmp_path / "runs" / "logs"
    array = jobs_of(logs)["grid"][0]
    assert len(jobs_of(logs)["grid"]) == 5, "runs, table, final, test, results"
    restarts = wait(slurm, logs)
    assert [(task.split("_")[0], count) for task, count in restarts.items()] == [(str(array), 1)], output(logs)
    told = json.loads((tmp_path / "runs" / "results.json").read_text())
    rows = told["runs"]
    assert (told["test"]["run"], told["test"]["images"]) == ("runs/final", 359)
    state = next((tmp_path / "runs" / "final").glob("checkpoints/step-*/state.json"))
    assert json.loads(state.read_text())["dataset"]["samples"] == 1438
    assert {row["settings"]["optim.lr"] for row in rows} == {".0001", "3e-3"}
    assert {row["state"] for row in rows} == {"finished"}
    assert rows[0]["dev_top1"] >= rows[1]["dev_top1"]
    assert (tmp_path / "runs" / "results.md").read_text().startswith("| optim.lr | dev top1 | dev loss |")
    assert states(launch, logs) == {"grid": ("complete", "")}
    assert "complete already" in launch(*words).stdout


@pytest.mark.slow
def test_stages_wait_for_a_run_that_is_requeued(
    slurm: SlurmCluster, launch: Launch, digits: Any, tmp_path: Path
) -> None:
    own = settings(f"data.train={digits.train}", "run.dir=run", "train.duration=150", "checkpoint.every=20")
    chain = {"logs": "logs", "stages": [
        {"pretrain": {"recipe": "digits-demo", "settings": own, "slurm": {"nodes": 2}}},
        {"evaluate": {"checkpoint": "run", "dataset": str(digits.test), "workers": 0}},
    ]}  # fmt: skip
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    launch("chain", "chain.yaml")
    first = jobs_of(tmp_path / "logs")
    end = time.monotonic() + 60
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert time.monotonic() < end, output(tmp_path / "logs")
        time.sleep(0.05)
    slurm.client("scancel", "--batch", "--signal=USR1", str(first["pretrain"][0]))
    assert wait(slurm, tmp_path / "logs") == {str(first["pretrain"][0]): 1}, output(tmp_path / "logs")
    assert jobs_of(tmp_path / "logs") == first
    assert set(states(launch, "logs").values()) == {("complete", "")}


TRAIN = {"recipe": "digits-demo", "settings": ["data.train=.", "run.dir=runs/a"]}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([], "stages: got []; expected a list of stages"),
        ([{"pretrian": TRAIN}], "Did you mean 'pretrain'?"),
        ([{"verify": {"datset": "."}}], "Did you mean 'dataset'?"),
        ([{"verify": {}}], "verify.dataset: got nothing"),
        ([{"grid": {**TRAIN, "vary": ["optim.lr=[1]", "run.seed=[0, 1]"]}}], "data.dev: got nothing, nor data.val"),
        ([{"grid": {**TRAIN, "vary": ["optim.lr=[1]"], "test": "nowhere"}}], "grid.test: got nowhere, which does not"),
        ([{"verify": {"dataset": ["."]}}], "verify.dataset: got [\".\"]; expected a text"),
        ([{"verify": {"dataset": ".", "name": ["a"]}}], "name: got [\"a\"]"),
        ([{"verify": {"dataset": ".", "after": {"a": "b"}}}], "verify.after: got {"),
        ([{"verify": {"dataset": ".", "slurm": "gpu"}}], "verify.slurm: got 'gpu'"),
        ([{"verify": ""}], "verify: got ''; expected settings"),
        (["verify"], "stages: got \"verify\"; expected items"),
        ("verify", "stages: got verify; expected a list of stages"),
        ([{"verify": {"dataset": "nowhere"}}], "verify.dataset: got nowhere, which does not exist"),
        ([{"verify": {"dataset": "."}}, {"verify": {"dataset": "."}}], "name: got verify; expected a name of its own"),
        ([{"verify": {"dataset": ".", "name": "a b"}}], "name: got 'a b'"),
        ([{"verify": {"dataset": ".", "array": "x"}}], "verify.array: got 'x'; expected a whole number"),
        ([{"verify": {"dataset": ".", "after": ["shard"]}}], "verify.after: got 'shard'"),
        ([{"verify": {"dataset": ".", "slurm": {"nodes": "2"}}}], "verify.slurm.nodes: got 2 for verify; expected one"),
        ([{"verify": {"dataset": ".", "slurm": {"nodse": "2"}}}], "Did you mean 'nodes'?"),
        ([{"verify": {"dataset": ".", "slurm": {"requeue": "false"}}}], "verify.slurm.requeue: got false"),
        ([{"shard": {"source": ".", "out": "o", "settings": ["splt=a"]}}], "Did you mean 'split'?"),
        ([{"shard": {"source": ".", "out": "o", "settings": ["split"]}}], "shard.settings: got [\"split\"]"),
        ([{"pretrain": {**TRAIN, "settings": ["model.depht=1"]}}], "Did you mean 'model.depth'?"),
        ([{"pretrain": {**TRAIN, "recipe": "digits-dmo"}}], "Did you mean 'digits-demo'?"),
        ([{"finetune": TRAIN}], "init_from: got nothing"),
        ([{"pretrain": TRAIN}, {"finetune": {**TRAIN, "settings": [*TRAIN["settings"], "init_from=runs/a"]}}],
         "finetune: got runs/a, which pretrain writes too"),
        ([{"evaluate": {"checkpoint": "runs/a", "dataset": "."}}, {"pretrain": TRAIN}],
         "evaluate.checkpoint: got runs/a, which pretrain makes; expected a stage before it. Move it behind pretrain"),
        ([{"export": {"source": ".", "out": "o", "format": "safetensor"}}], "Did you mean 'safetensors'?"),
    ],
)  # fmt: skip
def test_chains_that_cannot_be_are_refused(
    stages: list[Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        make_chain({"logs": "logs", "stages": stages})
    assert expected in str(error.value)
    assert not (tmp_path / "logs").exists()


def test_files_that_are_no_chains_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    for text, expected in {
        "": "expected keys logs and stages",
        "logs: a\nlogs: b": "the key 'logs' is there twice",
        "logs: [": "expected a YAML file",
        "logs: a\n? [x]\n: 3": "expected a YAML file",
        "log: a": "Did you mean 'logs'?",
        "stages: [verify: {dataset: .}]": "logs: got ; expected a folder",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_chain(str(file))
        assert expected in str(error.value)
    with pytest.raises(UserError, match=r"CHAIN: got .*nowhere"):
        load_chain(str(tmp_path / "nowhere.yaml"))


def test_overrides_reach_stages_and_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {
        "logs": "logs",
        "slurm": {"nodes": "4", "time": "24:00:00"},
        "stages": [{"verify": {"dataset": "."}}, {"pretrain": TRAIN}],
    }
    chain = make_chain(
        tree, ["pretrain.optim.lr=1e-4", "verify.array=3", "pretrain.slurm.gpus_per_node=8", "logs=other"]
    )
    verify, pretrain = chain.stages
    assert (chain.logs, verify.kind.record()["array"], verify.slurm.nodes) == (tmp_path / "other", 3, 1)
    assert (str(pretrain.slurm.nodes), pretrain.slurm.gpus_per_node, pretrain.slurm.time) == ("4", 8, "24:00:00")
    assert pretrain.kind.record()["settings"][-1] == "optim.lr=1e-4"
    for word, expected in (
        ("slurm.tme=3", "Did you mean 'time'?"),
        ("pretrian.optim.lr=3", "Did you mean 'pretrain'?"),
    ):
        with pytest.raises(UserError) as error:
            make_chain(tree, [word])
        assert expected in str(error.value)


def test_the_chain_of_the_docs_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "images" / "test").mkdir(parents=True)
    (tmp_path / "demo" / "images" / "train").mkdir()
    text = (Path(__file__).parents[2] / "docs" / "chains.md").read_text()
    (tmp_path / "digits.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    chain = load_chain("digits.yaml", ["finetune.optim.lr=5e-4", "export.format=safetensors,hf", "slurm.time=60"])
    assert [stage.after for stage in chain.stages[:4]] == [(), (), ("shard",), ("verify", "shard-test")]
    assert {stage.slurm.time for stage in chain.stages} == {"60"}
