"""The whole road on CIFAR-10: about 25 minutes on two cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitscale.pipeline.metrics import read_metrics


def vitscale(folder: Path, *words: str) -> str:
    """Run the command line in `folder` as a user would; shows the command, and returns what it printed."""
    print("$ vitscale", *words, flush=True)
    command = [sys.executable, "-m", "vitscale.launch.cli", *words]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=dict(os.environ))
    print(said.stdout, flush=True)
    assert said.returncode == 0
    return said.stdout


@pytest.mark.slow
def test_cifar10_from_parquet_to_predictions(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """50,000 training images at 32 px, fine-tuned at 48 px: at least half of the 10,000 test images right."""
    with capsys.disabled():
        for split in ("train", "test"):
            vitscale(tmp_path, "shard", str(shared_data / "cifar10" / f"{split}-*.parquet"), split, f"split={split}")
        assert "10,000 images: sound" in vitscale(tmp_path, "verify", "test")
        data = ("data.train=train", "data.val=test", "--nproc", "2")
        vitscale(tmp_path, "pretrain", "cifar10-small", "run.dir=pretrained", *data)
        vitscale(tmp_path, "finetune", "cifar10-small-finetune", "init_from=pretrained", "run.dir=tuned", *data)
        for run in ("pretrained", "tuned"):
            assert "10,000 images" in vitscale(tmp_path, "evaluate", run, "test", "--nproc", "2")
        vitscale(tmp_path, "export", "tuned", "exported")
        vitscale(tmp_path, "report", "pretrained", "tuned", "--out", "report.html")
    top1 = {run: read_metrics(tmp_path / run)[-1]["top1"] for run in ("pretrained", "tuned")}
    assert top1["pretrained"] >= 0.5
    assert top1["tuned"] >= 0.5
