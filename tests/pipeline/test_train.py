"""Runs through the command line: they go on exactly, from anywhere, and give the same at any number of ranks."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import TINY, command, losses, same_weights, wait_for, words
from vitscale.pipeline import checkpoint
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.metrics import read_metrics

EXPORTED = {"README.md", "config.json", "export.json", "model.safetensors"}


@pytest.fixture(scope="module")
def reference(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on two ranks, never interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    said = command(digits, folder, "--nproc", "2")
    assert said.returncode == 0, said.stderr
    return folder


def test_a_run_leaves_what_it_says(reference: Path, digits: Any) -> None:
    assert {path.name for path in reference.iterdir()} == {
        ".lock", "recipe.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "environment.json"
    }  # fmt: skip
    assert len(losses(reference)) == 12
    evaluations = [row for row in read_metrics(reference) if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert [path.name for path in checkpoint.checkpoints(reference / "checkpoints")] == [
        "step-00000012", "step-00000008", "step-00000004"
    ]  # fmt: skip
    state = checkpoint.read_state(reference / "checkpoints" / "step-00000012")
    assert (state["step"], state["examples"], state["world_size"]) == (12, 360, 2)
    assert state["dataset"]["fingerprint"] == Store(str(digits.train), "data.train").fingerprint
    start = json.loads((reference / "environment.json").read_text())[0]
    assert start["world_size"] == 2
    assert start["versions"]["torch"]
    assert any((reference / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(reference: Path, digits: Any, tmp_path: Path) -> None:
    """Every process killed with -9 after a checkpoint: run again, losses and weights are the same, bit for bit."""
    folder = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        words(digits, folder, "--nproc", "2"), env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(folder / "checkpoints" / "step-00000004", running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    said = command(digits, folder, "--nproc", "2")
    assert said.returncode == 0, said.stderr
    assert "going on from step" in said.stdout or "already trained" in said.stdout
    assert losses(folder) == losses(reference)
    assert same_weights(folder, reference)


@pytest.mark.slow
def test_ranks_end_with_their_launcher(digits: Any, tmp_path: Path) -> None:
    """The launcher alone is killed with -9: its ranks must not go on writing, and the run can be started again."""
    folder = tmp_path / "run"
    running = subprocess.Popen(words(digits, folder, "--nproc", "2", "train.duration=2000"), stdout=subprocess.DEVNULL)
    wait_for(folder / "checkpoints" / "step-00000004", running)
    running.kill()
    running.wait()
    time.sleep(1)
    before = read_metrics(folder)
    time.sleep(1)
    assert read_metrics(folder) == before
    said = command(digits, folder, "--nproc", "2", "train.duration=12")
    assert said.returncode == 2  # another duration is another recipe; the folder is free, or this would say so
    assert "of another recipe (train.duration" in said.stderr


def killed_child(digits: Any, folder: Path, *more: str) -> tuple[int, str]:
    """Kill one process that a run has started, with -9, as when memory runs out. Returns exit code and stderr."""
    command = words(digits, folder, "train.duration=2000", *more)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(folder / "checkpoints" / "step-00000004", running)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    victim = next(child for child in children if b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    return running.returncode, said


def test_a_killed_rank_ends_the_run_and_is_named(digits: Any, tmp_path: Path) -> None:
    code, said = killed_child(digits, tmp_path / "run", "--nproc", "2")
    assert code == 1
    last = said.strip().splitlines()[-1]  # a loader process may complain of the loss before the kernel ends it
    assert last.startswith("error: rank "), said
    assert "SIGKILL" in last, said


def test_a_killed_loader_process_ends_the_run_and_is_named(digits: Any, tmp_path: Path) -> None:
    code, said = killed_child(digits, tmp_path / "run", "data.workers=2", "eval.every=0")
    assert code == 2
    assert "data.workers: got 2, of which one died (DataLoader worker" in said
    assert "Traceback" not in said


def test_other_ranks_stage_and_micro_batch_go_on_with_the_same_losses(
    reference: Path, digits: Any, tmp_path: Path
) -> None:
    """From step 4 of the two-rank ZeRO-2 run, on one rank at stage 3: sums in another order leave about 1e-6."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text((reference / "metrics.jsonl").read_text())
    for path in (reference / "checkpoints").iterdir():
        if path.name == "step-00000004":
            subprocess.run(["cp", "-r", path, folder / "checkpoints"], check=True)
    said = command(digits, folder, "engine.zero_stage=3", "engine.micro_batch=30", "data.workers=0")
    assert said.returncode == 0, said.stderr
    assert "going on from step 4" in said.stdout
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-4)
    again = command(digits, folder)
    assert again.returncode == 0
    assert "already trained to step 12 of 12" in again.stdout


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(reference: Path, digits: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", reference, folder], check=True)
    victim = folder / "checkpoints" / "step-00000012" / "rank-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:1000])
    said = command(digits, folder, "--nproc", "2")
    assert said.returncode == 0, said.stderr
    assert "rank-00001.safetensors: 1000 bytes" in said.stdout
    assert "going on from step 8" in said.stdout
    assert losses(folder) == losses(reference)


def test_two_runs_do_not_share_a_folder(digits: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = subprocess.Popen(words(digits, folder, "train.duration=2000"), stdout=subprocess.DEVNULL)
    try:
        wait_for(folder / "checkpoints" / "step-00000004", first)
        second = command(digits, folder, "train.duration=2000")
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "in use" in second.stderr


def test_evaluation_is_the_same_at_any_number_of_ranks(
    reference: Path, digits: Any, vitscale: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    results = []
    for processes in (1, 3):
        out = tmp_path / f"{processes}.json"
        said = vitscale("evaluate", reference, digits.test, "--nproc", processes, "--out", out, "--micro-batch", 50)
        assert said.returncode == 0, said.stderr
        results.append(json.loads(out.read_text()))
    for result in results:
        assert result["images"] == 359
        assert sum(map(sum, result["confusion"])) == 359
        assert sum(result["confusion"][i][i] for i in range(10)) == round(result["top1"] * 359)
        assert result["top5"] >= result["top1"]
    for name in ("images", "top1", "top5", "confusion"):
        assert results[0][name] == results[1][name]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    last = [row for row in read_metrics(reference) if row["kind"] == "eval"][-1]
    assert results[0]["top1"] == last["top1"]


def test_finetune_export_predict_and_report(
    reference: Path, digits: Any, vitscale: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The rest of the road on the small run: 32 px → 48 px, new head, export, files, page."""
    data = (f"data.train={digits.train}", f"data.val={digits.test}")
    said = vitscale(
        "finetune", "digits-demo", *TINY, *data, "model.img_size=48", f"init_from={reference}", "run.dir=tuned"
    )
    assert said.returncode == 0, said.stderr
    assert "position embeddings interpolated from 4×4 to 6×6" in said.stdout
    assert "the new head for 10 classes starts at zero" in said.stdout
    rows = [row for row in read_metrics(tmp_path / "tuned") if row["kind"] == "train"]
    assert rows[0]["loss"] == pytest.approx(2.302585, abs=1e-5)  # ln 10: a head of zeros
    assert vitscale("evaluate", "tuned", digits.test).returncode == 0
    exported = vitscale("export", "tuned", "exported")
    assert exported.returncode == 0, exported.stderr
    assert "0.0e+00" in exported.stdout
    assert {path.name for path in (tmp_path / "exported").iterdir()} == EXPORTED
    again = vitscale("export", "tuned", "exported")
    assert (again.returncode, again.stdout) == (2, "")
    files = sorted(digits.test_images.rglob("*.png"))[:3]
    predicted = vitscale("predict", "exported", *files, "--top", "2")
    assert predicted.returncode == 0, predicted.stderr
    lines = predicted.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(file) for file in files]
    assert vitscale("predict", "tuned", *files, "--top", "2").stdout == predicted.stdout
    made = vitscale("report", reference, "tuned", "--out", "page.html")
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "page.html").read_text()
    assert made.stdout.splitlines()[-1] == "page.html"
    assert page.count("<svg") == 3  # two sets of curves, one confusion matrix
    assert page.count('<img src="data:image/png') == 24
    assert "vitscale finetune digits-demo" in page
    assert 'src="http' not in page
    assert "not evaluated yet" in page


@pytest.mark.slow
def test_dropout_resumes_exactly_too(digits: Any, tmp_path: Path) -> None:
    """Random numbers derive from the step: nothing of them is saved."""
    dropout = ("model.dropout=0.2", "train.duration=6", "checkpoint.every=3", "eval.every=0")
    assert command(digits, tmp_path / "a", *dropout).returncode == 0
    subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
    subprocess.run(["rm", "-r", tmp_path / "b" / "checkpoints" / "step-00000006"], check=True)
    said = command(digits, tmp_path / "b", *dropout)
    assert "going on from step 3" in said.stdout
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_audit_tells_where_the_data_of_two_runs_differ(
    reference: Path, digits: Any, tmp_path: Path, vitscale: Callable[..., Any]
) -> None:
    one_rank = tmp_path / "one"
    said = command(digits, one_rank, "engine.micro_batch=30", "run.log_every=5", "train.duration=8", "data.workers=0")
    assert said.returncode == 0, said.stderr
    same = vitscale("audit", str(reference), str(one_rank))
    assert (same.returncode, same.stdout.split("\n")[0]) == (0, "8 steps in common, 1 to 8")
    rows = (one_rank / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[1])
    words = row["samples"].split()
    row["samples"] = " ".join([*words[:-1], "0" * 16])
    (one_rank / "metrics.jsonl").write_text("\n".join([rows[0], json.dumps(row), *rows[2:]]) + "\n")
    differing = vitscale("audit", str(reference), str(one_rank))
    assert differing.returncode == 1
    assert f"the images of step {row['step']} differ" in differing.stdout
    assert "RUN_B: got" in vitscale("audit", str(reference), str(tmp_path)).stderr


@pytest.mark.slow
def test_a_mixture_mixes_and_augments_alike_at_any_number_of_ranks(digits: Any, tmp_path: Path) -> None:
    """Two datasets, mixup, cutmix, RandAugment and erasing: the losses of one rank are those of two, but for sums in
    another order, which AdamW's first steps carry to about 1e-5."""
    sets = f"data.train=[{{path: {digits.train}, weight: 2}}, {{path: {digits.test}}}]"
    augment = ["augment.mixup=0.8", "augment.cutmix=1", "augment.randaugment_ops=2", "augment.erase=0.25"]
    more = [sets, *augment, "train.duration=6", "train.global_batch=31", "checkpoint.every=0", "eval.every=0"]
    for name, nproc in (("one", "1"), ("two", "2")):
        said = command(digits, tmp_path / name, "--nproc", nproc, *more)
        assert said.returncode == 0, said.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    seen = [[row["samples"] for row in read_metrics(tmp_path / n) if row["kind"] == "train"] for n in ("one", "two")]
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_training_reads_from_an_object_store_through_its_cache(digits: Any, tmp_path: Path) -> None:
    from tests.data_prep.test_storage import object_store, upload

    with object_store() as (server, client):
        upload(client, digits.train, "train")
        remote = ["data.train=s3://bucket/train", "train.duration=6", "checkpoint.every=0", "eval.every=0"]
        refused = command(digits, tmp_path / "refused", *remote)
        assert refused.returncode == 2
        assert "data.train: got s3://bucket/train without data.cache" in refused.stderr
        cached = [*remote, f"data.cache={tmp_path / 'cache'}", "data.cache_gb=0.02"]
        said = command(digits, tmp_path / "remote", "--nproc", "2", *cached)
        assert said.returncode == 0, said.stderr
        server.stop()
    more = ["train.duration=6", "checkpoint.every=0", "eval.every=0"]
    said = command(digits, tmp_path / "local", "--nproc", "2", *more)
    assert said.returncode == 0, said.stderr
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert any((tmp_path / "cache").glob("*.tar"))


def test_a_cache_too_small_for_the_windows_is_refused(digits: Any, tmp_path: Path) -> None:
    from tests.data_prep.test_storage import object_store, upload

    with object_store() as (server, client):
        upload(client, digits.train, "train")
        said = command(
            digits, tmp_path / "run", "data.train=s3://bucket/train", f"data.cache={tmp_path}", "data.cache_gb=0.0001"
        )
        server.stop()
    assert said.returncode == 2
    assert "data.cache_gb: got 0.0001 for 16 windows of 65536 images; expected at least" in said.stderr


GOLDEN = Path(__file__).parents[1] / "golden" / "losses-digits-200.json"
SLOWLY = ("train.duration=200", "optim.lr=1e-4", "train.global_batch=31", "checkpoint.every=0", "eval.every=0")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("processes", "stage"), [(1, 0), *(pytest.param(*each, marks=SLOW) for each in ((2, 3), (3, 1)))]
)
def test_two_hundred_steps_follow_the_golden_curve(digits: Any, tmp_path: Path, processes: int, stage: int) -> None:
    """At a rate at which rounding grows to no more than 1e-4 in so many steps, on any processor and any ranks.

    To write the curve anew: run digits-demo with TINY and SLOWLY on one rank, and keep the losses.
    """
    more = ("--nproc", str(processes), f"engine.zero_stage={stage}", *SLOWLY)
    said = command(digits, tmp_path / "run", *more)
    assert said.returncode == 0, said.stderr
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 200
    assert losses(tmp_path / "run") == pytest.approx(golden, abs=1e-3)
