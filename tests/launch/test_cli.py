"""What a user who types it wrong meets: one paragraph, exit code 2, nothing half-written; and what helps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.shard import shard

Command = Callable[..., subprocess.CompletedProcess[str]]
STAGES = (
    "shard", "index", "verify", "pretrain", "finetune", "vtab", "evaluate", "compare", "predict", "embed", "export",
    "report",
)  # fmt: skip
QUICK = ("model.depth=1", "model.width=32", "model.heads=2", "train.duration=2", "data.workers=0")


def refused(said: subprocess.CompletedProcess[str], setting: str, *parts: str) -> None:
    """One short paragraph on stderr that names the setting and holds the parts; exit code 2."""
    assert said.returncode == 2, said.stdout + said.stderr
    lines = said.stderr.strip().splitlines()
    assert len(lines) == 1, said.stderr
    assert len(lines[0]) < 700
    assert lines[0].startswith(f"error: {setting}: got ")
    assert "; expected " in lines[0]
    for part in parts:
        assert part in lines[0]


def write_images(folder: Path, classes: tuple[str, ...] = ("a", "b"), each: int = 3) -> Path:
    """Class folders of small noise."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset `data` of two classes and a run `run` of two steps on it."""
    root = tmp_path_factory.mktemp("trained")
    shard(str(write_images(root / "images", each=8)), str(root / "data"), ShardConfig(workers=1))
    words = ("pretrain", "digits-demo", *QUICK, "train.global_batch=8", "data.train=data", "run.dir=run")
    command = [sys.executable, "-m", "vitscale.launch.cli", *words]
    subprocess.run(command, cwd=root, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return root


def test_sources_that_hold_nothing(vitscale: Command, tmp_path: Path) -> None:
    refused(vitscale("shard", "nowhere", "out"), "SOURCE", "nowhere")
    (tmp_path / "empty").mkdir()
    refused(vitscale("shard", "empty", "out"), "SOURCE", "empty")
    write_images(tmp_path / "images")
    for file in (tmp_path / "images" / "b").iterdir():
        file.write_text("<html>not found</html>")
    said = vitscale("shard", "images", "out")
    assert said.returncode == 0, said.stderr
    assert "out: 3 images of 2 classes" in said.stdout
    assert "warning: no image is kept of 1 class: b\n" in said.stdout
    for file in (tmp_path / "images" / "a").iterdir():
        file.write_text("<html>not found</html>")
    refused(vitscale("shard", "images", "new"), "SOURCE", "of which no image is kept (first: not an image)")
    assert not (tmp_path / "new" / "dataset.json").exists()
    refused(vitscale("shard", "pipe:cat images", "new"), "SOURCE", "pipe:cat images")


def test_rejected_images_are_listed_and_do_not_stop_the_run(vitscale: Command, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    whole = (folder / "a" / "0.png").read_bytes()
    (folder / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "page.jpg").write_text("<html>not found</html>")
    said = vitscale("shard", "images", "out", "split=val")
    assert said.returncode == 0, said.stderr
    assert "out: 6 images of 2 classes" in said.stdout
    rejected = (tmp_path / "out" / "rejected.csv").read_text()
    assert '"a/cut.png","rejected","truncated' in rejected
    assert '"a/page.jpg","rejected","not an image"' in rejected
    assert "not kept: 1 not an image, 1 truncated" in said.stdout
    again = vitscale("shard", "images", "out", "split=val")
    assert "already" in again.stdout
    refused(vitscale("shard", "images", "out", "split=val", "seed=1"), "OUT", "out")
    checked = vitscale("verify", "out")
    assert (checked.returncode, checked.stdout) == (0, "out: 1 shard, 6 images: sound\n")
    tar = tmp_path / "out" / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 0xFF
    tar.write_bytes(data)
    damaged = vitscale("verify", "out")
    assert damaged.returncode == 1
    assert "val-000000.tar" in damaged.stdout


def test_stages_by_parts_make_what_one_command_makes(vitscale: Command, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    assert vitscale("shard", "images", "whole").returncode == 0
    refused(vitscale("shard", "images", "out", "--stage", "write"), "--stage", "the stage scan are not done")
    refused(vitscale("shard", "images", "out", "--stage", "scam"), "--stage", "scam")
    refused(vitscale("shard", "images", "out", "--part", "1/2"), "--part", "--stage beside it")
    refused(vitscale("shard", "images", "out", "--stage", "scan", "--part", "3/2"), "--part", "3/2")
    refused(vitscale("shard", "images", "out", "--publish", "--stage", "scan"), "--publish", "--stage scan")
    for words in ("scan --part 2/2", "scan --part 1/2", "match", "dedup", "plan", "write", "records"):
        said = vitscale("shard", "images", "out", "--stage", *words.split())
        assert (said.returncode, said.stdout) == (0, f"{words.replace(' --part', '')}: done\n"), said.stderr
    assert "out: 6 images of 2 classes" in vitscale("shard", "images", "out", "--publish").stdout
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 8
    assert all((tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)


def test_tars_are_indexed_where_they_are(vitscale: Command, tmp_path: Path) -> None:
    assert vitscale("shard", write_images(tmp_path / "images"), "made").returncode == 0
    (tmp_path / "tars").mkdir()
    (tmp_path / "made" / "train-000000.tar").rename(tmp_path / "tars" / "any.tar")
    said = vitscale("index", "tars")
    assert said.stdout == "tars: 6 images of 2 classes in 1 shard\n", said.stderr
    assert vitscale("verify", "tars").stdout == "tars: 1 shard, 6 images: sound\n"
    refused(vitscale("index", "tars"), "FOLDER", "which holds a dataset")
    refused(vitscale("index", "images"), "FOLDER", "without a .tar")


def test_settings_that_do_not_exist_or_fit(vitscale: Command, trained: Path) -> None:
    data = (f"data.train={trained / 'data'}", "run.dir=new", "train.global_batch=8")
    refused(vitscale("pretrain", "digits-demo", *data, "optim.learning_rate=1"), "optim.learning_rate", "optim.")
    refused(vitscale("pretrain", "digits-demo", *data, "optim.lrr=1"), "optim.lrr", "Did you mean 'optim.lr'?")
    refused(vitscale("pretrain", "digit-demo", *data), "RECIPE", "Did you mean 'digits-demo'?")
    refused(vitscale("pretrain", "digits-demo", *data, "model.img_size=30"), "model.img_size", "28 or 32")
    refused(vitscale("pretrain", "digits-demo", "run.dir=new"), "data.train", "nothing")
    refused(vitscale("pretrain", "digits-demo", "data.train=nowhere", "run.dir=new"), "data.train", "nowhere")
    refused(vitscale("shard", trained / "images", "out", "splitt=val"), "splitt", "Did you mean 'split'?")


def test_processes_and_batches_that_do_not_fit(vitscale: Command, trained: Path, tmp_path: Path) -> None:
    words = ("pretrain", "digits-demo", *QUICK, f"data.train={trained / 'data'}", "run.dir=new")
    refused(vitscale(*words, "train.global_batch=2", "--nproc", 3), "train.global_batch", "2 for 3 ranks")
    refused(vitscale(*words, "train.global_batch=17"), "train.global_batch", "16 training images")
    refused(vitscale(*words, "train.global_batch=8", "engine.device=cuda", "--nproc", 99), "--nproc", "99 processes")
    refused(vitscale(*words, "train.global_batch=8", "--nproc", 0), "--nproc", "at least 1")
    refused(vitscale("evaluate", trained / "run", trained / "data", "--device", "tpu"), "--device", "auto, cpu, cuda")
    assert vitscale("evaluate", trained / "run", trained / "data", "--micro-batch", 0).returncode == 2
    refused(vitscale(*words, "engine.deepspeed.gradient_clipping=3"), "engine.deepspeed.gradient_clipping", "recipe")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_uneven_batch_on_three_ranks_is_no_error(vitscale: Command, trained: Path) -> None:
    words = ("pretrain", "digits-demo", *QUICK, f"data.train={trained / 'data'}", "run.dir=new")
    said = vitscale(*words, "train.global_batch=7", "engine.micro_batch=2", "--nproc", 3)
    assert said.returncode == 0, said.stderr


def test_checkpoints_that_do_not_fit(vitscale: Command, trained: Path, tmp_path: Path) -> None:
    data = (f"data.train={trained / 'data'}", "run.dir=new", "train.global_batch=8")
    fine = ("finetune", "digits-demo-finetune", *data, *QUICK)
    refused(vitscale(*fine), "init_from", "nothing")
    refused(vitscale(*fine, "init_from=nowhere"), "init_from", "nowhere")
    refused(vitscale(*fine, f"init_from={trained / 'images'}"), "init_from", "none of these")
    refused(vitscale(*fine, f"init_from={trained / 'run'}", "model.width=64"), "init_from", "model.width=32")
    refused(vitscale("pretrain", "digits-demo", *data, "init_from=x"), "init_from", "vitscale finetune")
    run = copytree(trained / "run", tmp_path / "run")
    again = ("pretrain", "digits-demo", *QUICK, "train.global_batch=8", f"data.train={trained / 'data'}")
    refused(vitscale(*again, f"run.dir={run}", "optim.lr=7"), "run.dir", "optim.lr: 0.001 → 7.0")
    shard(str(write_images(tmp_path / "more", each=9)), str(tmp_path / "more-data"), ShardConfig(workers=1))
    other = (*again[:-1], "data.train=more-data")
    refused(vitscale(*other, f"run.dir={run}"), "data.train", "more-data")


def test_other_classes_than_the_checkpoints(vitscale: Command, trained: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", classes=("a", "c", "d"))
    shard(str(images), str(tmp_path / "data"), ShardConfig(workers=1))
    refused(vitscale("evaluate", trained / "run", "data"), "DATASET", "3 classes", "'b'", "the 2 classes")
    refused(vitscale("evaluate", trained / "run", "data", "--nproc", 2), "DATASET", "3 classes")
    words = ("pretrain", "digits-demo", *QUICK, "train.global_batch=8", "run.dir=new")
    refused(vitscale(*words, f"data.train={trained / 'data'}", "data.val=data"), "data.val", "3 classes")


def test_exports_predictions_and_reports_of_what_is_not_there(vitscale: Command, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    refused(vitscale("export", trained / "run", "taken"), "OUT", "taken, which exists")
    refused(vitscale("export", "nowhere", "out"), "SOURCE", "nowhere")
    refused(vitscale("predict", trained / "run", "nowhere.jpg"), "FILES", "nowhere.jpg")
    (tmp_path / "page.jpg").write_text("<html>")
    refused(vitscale("predict", trained / "run", "page.jpg"), "FILES", "page.jpg: not an image")
    refused(vitscale("report", "nowhere"), "RUNS", "nowhere")
    refused(vitscale("report", trained / "run", "--commands", "nothere"), "--commands", "nothere")
    refused(vitscale("report", next((trained / "run" / "checkpoints").glob("step-*"))), "RUNS", "no run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.jpg", "taken"]
    exported = copytree(trained / "run" / "checkpoints", tmp_path / "broken")
    (exported / "config.json").write_text("{}")
    refused(vitscale("predict", exported, "page.jpg"), "EXPORT", "broken")


def test_a_failing_rank_is_reported_once(vitscale: Command, trained: Path, tmp_path: Path) -> None:
    """One image spoilt after the checks: found by a loader process of one rank, told before the others' lost peer."""
    data = copytree(trained / "data", tmp_path / "data")
    tar = next(data.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[content.index(b"\xff\xd8\xff")] = 0
    tar.write_bytes(content)
    words = ("pretrain", "digits-demo", *QUICK[:-1], "data.workers=1", "train.global_batch=8", "run.dir=new")
    refused(vitscale(*words, "data.train=data", "--nproc", 2), "data", "not an image", "vitscale verify")


def test_debug_shows_the_traceback(vitscale: Command) -> None:
    said = vitscale("verify", "nowhere", "--debug")
    assert said.returncode == 2
    assert "Traceback" in said.stderr
    assert said.stderr.splitlines()[-1].startswith("error: DATASET: ")


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_an_example_and_every_default(vitscale: Command, stage: str) -> None:
    said = vitscale(stage, "--help", env={"COLUMNS": "200"})
    assert said.returncode == 0
    assert f"Example: vitscale {stage} " in said.stdout
    if stage in ("pretrain", "finetune"):
        assert "  optim.lr=0.001\n" in said.stdout
        assert "  engine.zero_stage=2\n" in said.stdout
    if stage == "shard":
        assert "  shard_samples=10000\n" in said.stdout


def test_recipe_commands(vitscale: Command, tmp_path: Path) -> None:
    listed = vitscale("recipe", "list")
    assert "digits-demo-finetune" in listed.stdout
    shown = vitscale("recipe", "show", "digits-demo", "optim.lr=5")
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    assert vitscale("recipe", "diff", "digits-demo", "mine.yaml").stdout == "optim.lr: 0.001 → 5.0\n"
    assert vitscale("recipe", "diff", "mine.yaml", "mine.yaml").stdout == "no setting differs\n"
    refused(vitscale("recipe", "show", "digits"), "RECIPE", "digits-demo")


def test_ranks_join_an_outside_launcher(vitscale: Command, trained: Path, tmp_path: Path) -> None:
    """Two processes with the variables of `srun` train together, whatever `--nproc` says."""
    words = ("pretrain", "digits-demo", *QUICK, f"data.train={trained / 'data'}", "run.dir=new", "--nproc", "5")
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost"}
    envs: list[dict[str, Any]] = [{**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda env: vitscale(*words, "train.global_batch=8", env=env), envs)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "2 ranks on cpu" in first.stdout
    assert second.stdout == ""
    state = json.loads((tmp_path / "new" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["world_size"] == 2
