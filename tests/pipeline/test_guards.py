"""Runs that go wrong: signals, losses that are not finite, bad data, ranks that disagree."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.runs import TINY, command, losses, same_weights, wait_for, words
from vitscale.errors import UserError
from vitscale.launch.recipes import RECIPES
from vitscale.pipeline import checkpoint, train
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import Step
from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.planner import plan
from vitscale.pipeline.recipe import load_recipe

QUICK = ("eval.every=0", "data.workers=0")


@pytest.mark.parametrize(
    ("processes", "name"),
    [
        pytest.param("2", "SIGUSR1", marks=pytest.mark.slow),
        pytest.param("2", "SIGINT", marks=pytest.mark.slow),
        ("1", "SIGTERM"),
        ("1", "SIGINT"),
    ],
)
def test_a_signal_saves_and_asks_for_another_start(digits: Any, tmp_path: Path, processes: str, name: str) -> None:
    """Sent to the command alone. What follows is, bit for bit, what an undisturbed run does."""
    more = ("--nproc", processes, "train.duration=200", "checkpoint.every=0", *QUICK)
    folder = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts with `&` ignores it
    running = subprocess.Popen(words(digits, folder, *more), env=env, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    wait_for(folder / "metrics.jsonl", running)
    running.send_signal(getattr(signal, name))
    _, said = running.communicate(timeout=60)
    interrupted = name == "SIGINT"
    assert running.returncode == (130 if interrupted else 75), said
    assert "; run the same command again to go on" in said.splitlines()[-1]
    assert f"after {'SIGTERM' if interrupted and processes == '2' else name};" in said
    assert said.strip().count("\n") == interrupted  # that it is stopping
    saved = checkpoint.read_state(checkpoint.checkpoints(folder / "checkpoints")[0])["step"]
    assert 0 < saved < 200
    if processes == "1":
        return
    assert command(digits, folder, *more).returncode == 0
    assert command(digits, tmp_path / "undisturbed", *more).returncode == 0
    assert losses(folder) == losses(tmp_path / "undisturbed")
    assert same_weights(folder, tmp_path / "undisturbed")


def test_a_run_is_not_written_into_a_dataset(digits: Any) -> None:
    data = (f"data.train={digits.train}", f"run.dir={digits.test}")
    with pytest.raises(UserError, match=r"^run\.dir: got .*, a dataset"):
        plan(load_recipe("digits-demo", [*data], RECIPES), 1)


@pytest.mark.slow
def test_a_run_that_cannot_recover_stops_and_its_incidents_are_repeated(
    digits: Any, tmp_path: Path, vitscale: Callable[..., Any]
) -> None:
    """A rate that throws the weights beyond float32 in the first step."""
    folder = tmp_path / "run"
    wild = ("optim.name=sgd", "optim.lr=1e30", "optim.clip=0", "schedule.warmup=0", "checkpoint.every=0", *QUICK)
    said = command(digits, folder, "--nproc", "2", "guard.rollbacks=1", "guard.patience=2", *wild)
    assert said.returncode == 2
    assert "guard.rollbacks: got 2 steps in a row that could not be taken, after 1 rollbacks" in said.stderr
    assert "back to step 0, past 3 global batches" in said.stdout
    names = sorted(path.name for path in (folder / "incidents").iterdir())
    assert names == [f"step-{step:08d}-batch-{batch:08d}" for step, batch in ((1, 1), (1, 4), (2, 2), (2, 5))]
    told = json.loads((folder / "incidents" / names[0] / "incident.json").read_text())
    blamed = "model.blocks.0.norm1 (LayerNorm): its output was the first that is not finite"
    assert told["refused"] == "loss"
    assert told["causes"] == {"rank 0": blamed, "rank 1": blamed}
    assert len(told["keys"]) == len(set(told["numbers"])) == 30
    again = vitscale("replay", folder, names[0])
    assert again.returncode == 0, again.stderr
    assert f"rank 0: {blamed}" in again.stdout
    assert "anomaly detection: Function" in again.stdout
    absent = vitscale("replay", folder, "step-1")
    assert absent.returncode == 2
    assert f"expected one of {names[0]}" in absent.stderr


class BadData(Supervised):
    """A loss that is not a number for some samples in the first epoch."""

    def forward(self, batch: dict[str, torch.Tensor], predict: Any = False) -> Any:
        out = super().forward(batch, predict)
        if predict or not self.training:
            return out
        loss, metrics = out
        bad = torch.isin(batch["number"], torch.tensor(BAD)) & (batch["epoch"] == 0) & (batch["weight"] > 0)
        return loss * torch.where(bad.any(), torch.nan, 1.0), metrics


BAD: list[int] = []


def meet_bad_data(world: World, folder: str, train_set: str) -> dict[str, Any]:
    """Train on data whose batches 5 to 7 are bad; what became of it."""
    settings = [*TINY, *QUICK, f"run.dir={folder}", f"data.train={train_set}", "guard.patience=2", "optim.ema=0.9"]
    made = plan(load_recipe("digits-demo", settings, RECIPES), world.size)
    BAD[:] = [int(made.order.batch(step)[0][3]) for step in (5, 6, 7)]
    train.Supervised = BadData  # pyright: ignore[reportPrivateImportUsage]
    train.train(made, world)
    rows = [row for row in read_metrics(Path(folder)) if row["kind"] == "train"]
    state = checkpoint.read_state(checkpoint.checkpoints(Path(folder) / "checkpoints")[0])
    digests = [row["samples"] for row in rows]
    return {
        "position": state["position"],
        "digests": digests,
        "losses": [row["loss"] for row in rows if row["loss"] is not None],
    }


@pytest.mark.slow
def test_bad_data_is_passed_over_once_and_for_all(ranks: Callable[..., Any], digits: Any, tmp_path: Path) -> None:
    """Batches 5 and 6 are refused; back to step 4, on batch 7, which is refused too, but alone: training goes on."""
    got = {
        size: ranks(__file__, "meet_bad_data", size, str(tmp_path / str(size)), str(digits.train)) for size in (1, 2)
    }
    plain = tmp_path / "plain"
    assert command(digits, plain, *QUICK, "train.duration=16", "run.log_every=1").returncode == 0
    order = [row["samples"] for row in read_metrics(plain) if row["kind"] == "train"]
    for seen in got.values():
        assert seen["digests"] == [*order[:4], *order[7:15]]
        assert len(seen["losses"]) == 11
        position = seen["position"]
        assert (position["step"], position["optimizer_steps"], position["data_offset"]) == (12, 11, 3)
        assert (position["rollbacks"], position["refused"]) == (1, 0)
    assert got[1]["losses"] == pytest.approx(got[2]["losses"], abs=1e-4)
    assert got[1]["position"]["digest"] == got[2]["position"]["digest"]


@pytest.mark.slow
def test_a_changed_recipe_is_refused_by_key_unless_forced(digits: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    base = ("train.duration=4", "checkpoint.every=2", *QUICK)
    assert command(digits, folder, *base).returncode == 0
    other = ("train.duration=6", "optim.lr=1e-4", "checkpoint.every=2", *QUICK)
    said = command(digits, folder, *other)
    assert said.returncode == 2
    assert "optim.lr: 0.001 → 0.0001" in said.stderr
    assert "train.duration: '4' → '6'" in said.stderr
    assert "--force" in said.stderr
    forced = command(digits, folder, *other, "--force")
    assert forced.returncode == 0, forced.stderr
    assert "going on from step 4" in forced.stdout
    wrong = command(digits, folder, *other, "--force", "optim.name=lion")
    assert wrong.returncode == 2
    assert "optim.name: 'adamw' → 'lion'" in wrong.stderr
    assert "--force" not in wrong.stderr


@pytest.mark.slow
def test_format_1_is_gone_on_from(digits: Any, tmp_path: Path) -> None:
    """A checkpoint kept from before format 2, its data and its losses: within what other processors round."""
    kept = Path(__file__).parents[1] / "golden" / "checkpoint-format-1"
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    subprocess.run(["cp", "-r", kept / "step-00000003", folder / "checkpoints"], check=True)
    recipe = checkpoint.read_state(kept / "step-00000003")["recipe"]
    recipe["run"]["dir"], recipe["data"]["train"] = str(folder), str(digits.train)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    cli = [sys.executable, "-m", "vitscale.launch.cli", "pretrain", str(tmp_path / "recipe.yaml"), "--nproc", "2"]
    said = subprocess.run(cli, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "going on from step 3" in said.stdout
    expected = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()][3:]
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    assert [row["samples"] for row in rows] == [row["samples"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-5)


@pytest.mark.slow
def test_the_average_is_evaluated_exported_and_gone_on_with(
    digits: Any, tmp_path: Path, vitscale: Callable[..., Any]
) -> None:
    """Evaluations of a run's average and raw weights give what training found; a stop in between changes nothing."""
    averaging = ("optim.ema=0.8", "train.duration=8", "checkpoint.every=4", "eval.every=0", "engine.zero_stage=3")
    for name in ("a", "b"):
        assert command(digits, tmp_path / name, *averaging, "--nproc", "2").returncode == 0
        if name == "b":
            subprocess.run(["rm", "-r", tmp_path / "b" / "checkpoints" / "step-00000008"], check=True)
            assert "going on from step 4" in command(digits, tmp_path / name, *averaging, "--nproc", "2").stdout
    rows = [[row for row in read_metrics(tmp_path / name) if row["kind"] == "eval"][-1] for name in ("a", "b")]
    assert rows[0] == rows[1]
    assert rows[0]["loss"] != rows[0]["ema_loss"]
    for weights, key in (("raw", "loss"), ("auto", "ema_loss")):
        out = tmp_path / f"{weights}.json"
        said = vitscale("evaluate", tmp_path / "a", digits.test, "--out", out, "--weights", weights)
        assert said.returncode == 0, said.stderr
        assert json.loads(out.read_text())["loss"] == pytest.approx(rows[0][key], rel=1e-6)
    for weights in ("raw", "ema"):
        assert vitscale("export", tmp_path / "a", weights, "--weights", weights).returncode == 0
    assert not same_weights(tmp_path / "raw", tmp_path / "ema")
    assert same_weights(tmp_path / "a", tmp_path / "ema")


def test_ranks_that_disagree_are_named(ranks: Callable[..., Any]) -> None:
    said = ranks(__file__, "disagree", 3)
    assert said == "guard.compare_every: got other weights on rank 1 than on most of the 3"


def disagree(world: World) -> str:
    class Odd:
        def checksum(self) -> int:
            return 5 if world.rank == 1 else 4

    try:
        train.compare_ranks(Odd(), world)  # pyright: ignore[reportArgumentType]
    except UserError as error:
        return str(error).split(";")[0]
    return ""


def test_optimizers_of_whole_matrices_are_refused_where_there_are_none(digits: Any, tmp_path: Path) -> None:
    for name in ("muon", "adafactor"):
        said = command(digits, tmp_path / "run", f"optim.name={name}")
        assert said.returncode == 2
        assert f"optim.name: got {name} with engine.zero_stage 2" in said.stderr
        assert "Set engine.zero_stage=0" in said.stderr


def test_a_spike_is_told_by_the_median_of_the_last_losses() -> None:
    """Not before there are 25, and refused steps do not count."""
    position = train.Position()
    for step in range(1, 140):
        assert position.spike(0.0) == math.inf
        expected = 3.0 * statistics.median(range(max(1, step - 100), step)) if step > 25 else math.inf
        assert position.spike(3.0) == expected
        position.take(Step({"loss": float(step)}, []), spikes=True)
        position.take(Step({"loss": 1e9}, [], "spike"), spikes=True)
    assert (position.step, position.optimizer_steps, position.refused) == (278, 139, 1)
