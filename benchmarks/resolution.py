"""What interpolated positions are worth: `python benchmarks/resolution.py FOLDER [CIFAR]`, the latter with 2 cores for
half an hour.

A network pretrained at 32 px is fine-tuned for as many steps at 32 px, at 48 px with its positions interpolated, and at
48 px with fresh ones, over several seeds: by the recipes that ship and the commands that a user would type. FOLDER
holds all runs, and started again this goes on. CIFAR is a folder of `train-*.parquet` and `test-*.parquet`; without it
digits alone are measured.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from vitscale.model.build import initial_rules
from vitscale.model.initial import initial_weight
from vitscale.model.interop.maps import Tensors
from vitscale.pipeline.formats import ours
from vitscale.pipeline.weights import open_trained

RECIPES = {  # of pretraining, for how long, and fine-tuning, and over how many seeds
    "digits": ("digits-demo", "35ep", "digits-demo-finetune", 3),
    "cifar10": ("cifar10-small", "1ep", "cifar10-small-finetune", 1),
}
VARIANTS = {"32 px": 32, "48 px, interpolated": 48, "48 px, fresh positions": 48}


def vitscale(*words: str) -> None:
    """Run the command line, its output aside."""
    done = subprocess.run([sys.executable, "-P", "-m", "vitscale.launch.cli", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vitscale {' '.join(words)}\n{done.stderr}")


def with_fresh_positions(run: Path, side: int, seed: int, folder: Path) -> None:
    """Write the weights of a run as those of a network for `side` px, whose positions are initial ones of `seed`."""
    trained = open_trained(str(run), "RUN")
    model = replace(trained.model, img_size=side)
    found = trained.open()
    shape = (1, model.patches + model.placed_prefix, model.width)

    def read(name: str) -> torch.Tensor:
        return initial_weight(name, shape, seed, initial_rules(model)) if name == "pos_embed" else found.read(name)

    changed = replace(
        trained,
        model=model,
        preprocess=replace(trained.preprocess, img_size=side),
        open=lambda: Tensors({**found.shapes, "pos_embed": shape}, read),
    )
    folder.mkdir(parents=True, exist_ok=True)
    ours.write(changed, folder, torch.float32)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Accuracy of each variant over the seeds; shards are in `folder`."""
    recipe, duration, tuning, seeds = RECIPES[name]
    data = (f"data.train={folder / 'train'}", f"data.val={folder / 'test'}", "eval.every=0")
    run = folder / "pretrained"
    vitscale("pretrain", recipe, *data, f"train.duration={duration}", f"run.dir={run}", "--nproc", "2")
    found: dict[str, Any] = {"pretrained at 32 px": accuracy(run)}
    for variant, side in VARIANTS.items():
        scores = []
        for seed in range(seeds):
            start = run
            if "fresh" in variant:
                start = folder / f"fresh-{seed}"
                with_fresh_positions(run, side, seed, start)
            tuned = folder / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
            words = (f"model.img_size={side}", f"run.seed={seed}", f"init_from={start}", f"run.dir={tuned}")
            vitscale("finetune", tuning, *data, *words, "--nproc", "2")
            scores.append(accuracy(tuned))
        found[variant] = {"mean": round(mean(scores), 4), "runs": scores}
        print(f"{name}: {variant}: {found[variant]}", flush=True)
    return found


def accuracy(run: Path) -> float:
    """Top-1 of the last evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["top1"] for row in rows if row["kind"] == "eval"][-1]


def main() -> None:
    folder = Path(sys.argv[1])
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    if not (folder / "digits" / "images").exists():
        from vitscale.data_prep.digits import write_digits

        write_digits(folder / "digits" / "images")
    sources = {"digits": lambda split: str(folder / "digits" / "images" / split)}
    if len(sys.argv) > 2:
        sources["cifar10"] = lambda split: f"{sys.argv[2]}/{split}-*.parquet"
    for name, source in sources.items():
        for split in ("train", "test"):
            vitscale("shard", source(split), str(folder / name / split), f"split={split}")
        found[name] = measure(name, folder / name)
        results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
