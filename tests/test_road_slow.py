"""The whole road on CIFAR-10: about 25 minutes on two cores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def vitscale(folder: Path, *words: str) -> None:
    """Run the command line in `folder` as a user would, in sight."""
    print("\n$ vitscale", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vitscale.launch.cli", *words], cwd=folder, check=True)


@pytest.mark.slow
def test_cifar10_from_parquet_to_predictions(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """50,000 training images at 32 px, fine-tuned at 48 px: at least half of the 10,000 test images right."""
    with capsys.disabled():
        for split in ("train", "test"):
            vitscale(tmp_path, "shard", str(shared_data / "cifar10" / f"{split}-*.parquet"), split, f"split={split}")
        vitscale(tmp_path, "verify", "test")
        data = ("data.train=train", "data.val=test", "--nproc", "2")
        vitscale(tmp_path, "pretrain", "cifar10-small", "run.dir=pretrained", *data)
        vitscale(tmp_path, "finetune", "cifar10-small-finetune", "init_from=pretrained", "run.dir=tuned", *data)
        for run in ("pretrained", "tuned"):
            vitscale(tmp_path, "evaluate", run, "test", "--nproc", "2", "--out", f"{run}.json")
        vitscale(tmp_path, "export", "tuned", "exported")
        vitscale(tmp_path, "report", "pretrained", "tuned", "--out", "report.html")
    for run in ("pretrained", "tuned"):
        results = json.loads((tmp_path / f"{run}.json").read_text())
        assert results["images"] == 10_000
        assert results["top1"] >= 0.5
