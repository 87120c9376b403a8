"""Training steps of our networks beside timm's, in one run: ratios of time, and shares of the device's peak.

    python benchmarks/model.py [--quick] [--models S/16,B/16] [--rounds 8] [--out FILE.json]

Both get the same weights and images and have to give the same logits; a step is forward, backward, clipping and AdamW,
in float32 on a CPU; on a GPU in bf16 (weights too), compiled, at the best of several batches for each. The two take
turns, step by step, so that what else the machine does meets both alike; a ratio is the median of those within a turn,
above 1 where ours is faster. On a GPU also the share that useful arithmetic (6 FLOP to a multiply-add and image) has of
the rate of large matrix products on random numbers, measured in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.peers import import_timm
from vitscale.model.build import create_model
from vitscale.model.flops import training_flops
from vitscale.model.network import compile_blocks

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MODELS = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
BATCHES = {"Ti/16": (16,), "S/16": (16,), "B/16": (8,)} if not GPU else {"L/16": (64, 128, 256), "H/14": (32, 64, 128)}
Step = Callable[[], float]


def pair(name: str) -> tuple[Any, Any]:
    """Our network and timm's of a name, with the same weights, which are not zero anywhere."""
    ours: Any = create_model(name, num_classes=1000)
    theirs = import_timm().create_model(name, num_classes=1000)
    nn.init.normal_(ours.head.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def agree(ours: nn.Module, theirs: nn.Module) -> float:
    """Largest difference of their logits in float32, of two images."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return (ours.eval()(images) - theirs.eval()(images)).abs().max().item()


def make_step(network: nn.Module, rows: int) -> Step:
    """A training step on noise; returns its seconds."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    dtype = next(network.parameters()).dtype
    images = torch.randn(rows, 3, 224, 224, device=DEVICE).to(dtype)
    labels = torch.randint(0, 1000, (rows,), device=DEVICE)

    def step() -> float:
        began = time.perf_counter()
        nn.functional.cross_entropy(network(images).float(), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def turns(one: Step, other: Step, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps of both, which take turns, after two steps that do not count."""
    for _ in range(2):
        one()
        other()
    rows = [(one(), other()) if number % 2 else (other(), one())[::-1] for number in range(rounds)]
    return [a for a, _ in rows], [b for _, b in rows]


def peak() -> float:
    """FLOP a second of bf16 products of large random matrices, the best of several sizes."""
    best = 0.0
    for side in (4096, 8192, 16384):
        one, other = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            torch.mm(one, other)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(one, other)
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * side**3 / (time.perf_counter() - began))
    return best


def prepared(network: Any, ours: bool) -> Any:
    """The network on the device; on a GPU in bf16 and compiled: ours block by block, timm's as a whole."""
    network = network.to(DEVICE)
    if not GPU:
        return network
    network = network.to(torch.bfloat16)
    if ours:
        compile_blocks(network)
        return network
    return torch.compile(network)


def measure(title: str, rounds: int) -> dict[str, Any]:
    """Images a second of both at each batch, and the ratio of their best."""
    name, found = MODELS[title], {"ours": {}, "timm": {}}
    ours, theirs = pair(name)
    apart = agree(ours, theirs)
    if not apart <= 1e-5:  # float32 rounding in another order leaves about 1e-6
        raise SystemExit(f"{title}: logits differ by {apart:.1e}")
    ours, theirs = prepared(ours, True), prepared(theirs, False)
    ratios = []
    for rows in BATCHES.get(title, (16,)):
        try:
            one, other = turns(make_step(ours, rows), make_step(theirs, rows), rounds)
        except torch.OutOfMemoryError:
            break
        found["ours"][rows], found["timm"][rows] = (rows / statistics.median(times) for times in (one, other))
        ratios.append(statistics.median(b / a for a, b in zip(one, other, strict=True)))
    best = {who: max(table.values()) for who, table in found.items()}
    ratio = best["ours"] / best["timm"] if len(ratios) > 1 else ratios[0]
    flops = training_flops(ours.config)
    return {"difference": apart, "images a second": found, "ours / timm": ratio, "FLOP/s": best["ours"] * flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--models", default=",".join(["L/16", "H/14"] if GPU else ["S/16", "B/16"]))
    parser.add_argument("--rounds", type=int, default=20 if GPU else 8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    titles = ["Ti/16"] if arguments.quick else arguments.models.split(",")
    highest = peak() if GPU else None
    results = {}
    for title in titles:
        row = results[title] = measure(title, 2 if arguments.quick else arguments.rounds)
        print(f"{title}: ours / timm {row['ours / timm']:.3f}; logits differ by {row['difference']:.1e}")
        if highest:
            row["share of the matmul peak"] = row["FLOP/s"] / highest
            print(f"{title}: {row['FLOP/s'] / 1e12:.0f} TFLOP/s, {row['share of the matmul peak']:.1%} of the peak")
    if arguments.out:
        device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} cores, {platform.machine()}"
        head = {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": device,
            "versions": {
                "python": platform.python_version(),
                "torch": version("torch"),
                "timm": import_timm().__version__,
            },
            "matmul FLOP/s": highest,
        }
        arguments.out.write_text(json.dumps({**head, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
