"""The engine beside plain PyTorch, ZeRO's formula for memory, and what saving, logging and evaluating take, in one run.

    python benchmarks/engine.py [--quick] [--folder FOLDER] [--out FILE.json]

Two processes of one thread each, on gloo; where there are GPUs a process for each, on NCCL, with larger models.

1. Overhead. One step of `Engine` at each ZeRO stage, and of a plain loop over DistributedDataParallel with the same
   objective, weights, batches, optimizer and clipping, in the same processes. They take turns, step by step, so that
   what else the machine does meets all alike; a ratio is the median of those within a turn. Beside it that of the best
   steps, and of the processor's time, which leaves waiting out. All have to find the same losses. A ViT at 224 px
   computes 6 FLOP for each of 197 tokens, weight and image, whatever its size: it is what the bar is for. At 96 px
   there are 37 tokens, and moving weights counts for more.
2. Memory of a rank. Model states are all tensors that are alive once gradients are complete, but for DeepSpeed's
   buckets: weights, gradients, float32 masters, moments and the Polyak average. (At stage 1 other ranks' gradients are
   gone by then, which makes less than the formula.) Beside them the growth of the process (on GPUs, of what is
   allocated) to its peak within a step, which has buckets and DeepSpeed's copies on top.
3. Saving. The loop waits for the copy to the host's memory, then a thread writes while steps take longer; beside that
   a save that is waited for.
4. All that is not training, at the default intervals of logging, saving and evaluation on a set as large as ImageNet.
   Images are taken to be there when they are asked for, of training and of evaluation.

`--folder` is where checkpoints are written; they are removed.
"""

import argparse
import gc
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from vitscale.model.build import initial_rules
from vitscale.model.config import ViTConfig
from vitscale.model.initial import initial_weight
from vitscale.model.registry import ModelConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.config import CheckpointConfig, Config, EngineConfig, EvalConfig, OptimConfig, RunConfig
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.distributed import World, gather, join, leave
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.evaluation.classification import classification
from vitscale.pipeline.metrics import Meter, MetricsLog, Seen
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.optim import build_optimizer
from vitscale.pipeline.placement import States
from vitscale.pipeline.saver import Saver
from vitscale.pipeline.schedule import parse_duration

GPUS = torch.cuda.device_count()
RANKS = GPUS or 2
CLASSES, LR = 1000, 1e-4
Sized = tuple[str, dict[str, Any]]  # how a model is told, and the options of `ModelConfig`
SMALL, DENSE, LARGE = (  # what the bars are for, one with more weights for its tokens, and one that is large for here
    (
        ("ViT-B/16, 224 px", {"name": "vit_base_patch16_224"}),
        ("ViT-B/16, 96 px", {"name": "vit_base_patch16_224", "img_size": 96}),
        ("ViT-L/16, 96 px", {"name": "vit_large_patch16_224", "img_size": 96}),
    )
    if GPUS
    else (
        ("ViT-Ti/16, 224 px", {"name": "vit_tiny_patch16_224"}),
        ("ViT-S/16, 96 px", {"name": "vit_small_patch16_224", "img_size": 96}),
        ("ViT-B/16 of 8 blocks, 96 px", {"name": "vit_base_patch16_224", "img_size": 96, "depth": 8}),
    )
)
MICRO_BATCHES = (64, 16) if GPUS else (16, 4)
IMAGENET, IMAGENET_VAL = 1_281_167, 50_000


def make_engine(world: World, model: ViTConfig, stage: int, ema: float = 0.0) -> Engine:
    config = EngineConfig(zero_stage=stage)
    engine = Engine(lambda: make_objective(model), config, OptimConfig(ema=ema), world, accumulation=1)
    rules = initial_rules(model)
    engine.load(lambda name: initial_weight(name.removeprefix("model."), engine.shapes[name], 0, rules))
    return engine


def make_objective(model: ViTConfig) -> Supervised:
    return Supervised(VisionTransformer(model, seed=None), Preprocess(model.img_size, 1.0))


def make_batch(world: World, model: ViTConfig, rows: int, step: int) -> dict[str, Tensor]:
    """Noise with labels, another on each rank and in each step."""
    generator = torch.Generator().manual_seed(step * world.size + world.rank)
    height, width = model.height_width
    batch = {
        "pixels": torch.randint(0, 256, (rows, height, width, 3), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, CLASSES, (rows,), generator=generator),
        "weight": torch.ones(rows),
    }
    return {name: tensor.to(world.device) for name, tensor in batch.items()}


def plain_loop(world: World, model: ViTConfig) -> Callable[[dict[str, Tensor], int], float]:
    """A step by PyTorch alone: takes this rank's part of a batch of so many images, returns its part of the loss."""
    objective, optim = make_objective(model), OptimConfig()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initial_weight(name.removeprefix("model."), shape, 0, initial_rules(model)))
    objective.to(world.device)
    network = nn.parallel.DistributedDataParallel(objective, device_ids=[world.device] if GPUS else None)
    optimizer = build_optimizer(objective, optim)
    for group in optimizer.param_groups:
        group["lr"] = LR

    def step(batch: dict[str, Tensor], images: int) -> float:
        loss = network(batch)[0] / images
        (loss * world.size).backward()  # DDP averages gradients over ranks
        nn.utils.clip_grad_norm_(objective.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(world: World, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until all ranks have done the work, and what it returned."""
    dist.barrier()
    begun = time.perf_counter()
    result = work(*arguments)
    if GPUS:
        torch.cuda.synchronize(world.device)
    dist.barrier()
    return time.perf_counter() - begun, result


def overhead(world: World, options: dict[str, Any], rounds: int) -> dict[str, dict[str, list[list[float]]]]:
    """By micro batch and contestant, seconds of each step, and of the processor for it on rank 0."""
    model = ModelConfig(**options).resolve(CLASSES)

    def engine_step(engine: Engine, batch: dict[str, Tensor], images: int) -> float:
        return engine.train_step([batch], images, LR).means["loss"]

    contestants: dict[str, Callable[[dict[str, Tensor], int], float]] = {"DDP": plain_loop(world, model)}
    for stage in range(4):
        contestants[f"stage {stage}"] = partial(engine_step, make_engine(world, model, stage))
    names, step = list(contestants), 0
    seconds: dict[str, dict[str, list[list[float]]]] = {}
    for rows in MICRO_BATCHES:
        images = rows * world.size
        table = seconds[str(rows)] = {name: [] for name in names}
        for turn in range(rounds + 1):
            batch, losses, step = make_batch(world, model, rows, step), {}, step + 1
            first = turn % len(names)  # each follows each other one at times
            for name in names[first:] + names[:first]:
                before = time.process_time()
                taken, losses[name] = timed(world, contestants[name], batch, images)
                if turn:  # the first is to warm up
                    table[name].append([taken, time.process_time() - before])
            losses["DDP"] = sum(gather(losses["DDP"]))
            assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    return seconds


def live_bytes(bucket: int) -> int:
    """Bytes of all tensors of this process, each memory once, but for DeepSpeed's buckets, which have so many bytes."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor) or thing.is_meta:
            continue
        for tensor in (thing, thing.grad) if thing.is_leaf else (thing,):
            if tensor is not None:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in found.values() if size != bucket)


def resident(peak: bool = False) -> int:
    """Bytes of this process, or the most since `reset_peak`; of the GPU, the bytes allocated."""
    if GPUS:
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def reset_peak() -> None:
    if GPUS:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def memory(world: World, options: dict[str, Any], stage: int) -> dict[str, float]:
    """Bytes a parameter on rank 0: by the formula, of model states, and to the peak of a step."""
    small = ModelConfig(name="vit_tiny_patch16_224", img_size=32, depth=1).resolve(CLASSES)
    model = ModelConfig(**{**options, "img_size": 32}).resolve(CLASSES)  # few tokens: activations are not what counts
    warm = make_engine(world, small, stage)  # what libraries take once
    warm.train_step([make_batch(world, small, 1, 0)], world.size, LR)
    gc.collect()
    before, alive = resident(), live_bytes(bucket=0)
    engine, states = make_engine(world, model, stage, ema=0.999), 0

    def batches(step: int) -> Iterator[dict[str, Tensor]]:
        nonlocal states
        yield make_batch(world, model, 1, step)
        states = live_bytes(bucket=4 * engine.placement.bucket) - alive  # asked for more once gradients are complete

    for step in range(2):
        gc.collect()
        reset_peak()
        engine.train_step(batches(step), world.size, LR)
    formula = States("fp32", kept=3).bytes_a_rank(engine.parameters, stage, world.size)
    values = {"formula": formula, "states": states, "peak": resident(peak=True) - before}
    return {"parameters": engine.parameters, **{name: value / engine.parameters for name, value in values.items()}}


def running(world: World, options: dict[str, Any], folder: str, rounds: int) -> dict[str, float]:
    """Seconds of a step and its parts at stage 2, of the ways to save, of logging, and of an image's evaluation."""
    model, rows = ModelConfig(**options).resolve(CLASSES), MICRO_BATCHES[0]
    images = rows * world.size
    engine = make_engine(world, model, stage=2)
    batch = make_batch(world, model, rows, 0)

    def step(*votes: float) -> list[float]:
        return engine.train_step([batch], images, LR, votes=votes).votes

    step()
    engine.watch.take()
    usual = [timed(world, step)[0] for _ in range(3 * rounds)]
    parts = {name: value / len(usual) for name, value in engine.watch.take().items()}
    found = {"step": statistics.median(usual), "micro batch": parts["forward"] + parts["backward"]}
    found |= {"optimizer": parts["step"], **saving(world, engine, folder, rounds, step)}
    found["log"] = logging(world, engine, model, Path(folder), rounds)
    engine.objective.eval()
    batches = [batch] * max(2, rounds)
    evaluated, _ = timed(world, lambda: list(classification(engine.objective, batches, CLASSES)))
    return {**found, "evaluated image": evaluated / len(batches) / images, "rows": rows}


def saving(
    world: World, engine: Engine, folder: str, rounds: int, step: Callable[..., list[float]]
) -> dict[str, float]:
    """Seconds that the loop waits for a save, that steps take longer while it is written, and of one waited for."""
    behind, ahead = (Saver(Path(folder), world, keep=1, background=background) for background in (True, False))
    table: dict[str, list[float]] = {"copy": [], "slowdown": [], "whole save": []}
    number = 0
    for turn in range(rounds + 1):
        number += 1
        copied, _ = timed(world, behind.save, engine, {"step": number})
        steps, written = [], False
        while not written:
            taken, votes = timed(world, step, behind.ready)
            steps.append(taken)
            written = votes[0] == world.size
        committed, _ = timed(world, behind.commit)
        behind.finish()
        usual = [timed(world, step)[0] for _ in steps]  # as many, beside them
        number += 1
        whole, _ = timed(world, ahead.save, engine, {"step": number})
        if turn:  # the first makes room in the host's memory
            table["copy"].append(copied + committed)
            table["slowdown"].append(sum(steps) - sum(usual))
            table["whole save"].append(whole)
        else:
            table["first copy"] = [copied]
    return {name: statistics.median(values) for name, values in table.items()}


def logging(world: World, engine: Engine, model: ViTConfig, folder: Path, rounds: int) -> float:
    """Seconds of a row of the log, with what the loop keeps of each step for it."""
    every, config = RunConfig().log_every, Config()
    meter = Meter(engine.watch, world, model, config, 0, 10**6)
    log = MetricsLog(folder, 0) if world.main else None
    told = torch.zeros(2, MICRO_BATCHES[0], dtype=torch.int64, device=world.device)
    seen = Seen(iter([{"digest": told[0], "skipped": told[1]} for _ in range(rounds * every)]), 1)

    def row(number: int) -> None:
        for _ in range(every):
            next(seen)
        digests, skipped = seen.take()
        values = {**meter.read(number), "skipped": skipped, "weight_norm": engine.weight_norm()}
        if log:
            log.write(number, "train", digests, **values)

    return statistics.median(timed(world, row, n)[0] for n in range(1, rounds + 1))


def shares(costs: dict[str, float], global_batch: int) -> dict[str, float]:
    """What of a run's time goes to logging, saving and evaluating at the default intervals, and the time of a step."""
    lengths = {"samples": IMAGENET, "global_batch": global_batch}
    saves, evals = CheckpointConfig().every, EvalConfig().every
    micro_batches = -(-global_batch // (RANKS * int(costs["rows"])))
    step = micro_batches * costs["micro batch"] + costs["optimizer"]
    spent = {  # seconds a step
        "logging": costs["log"] / RunConfig().log_every,
        "saving": (costs["copy"] + max(0.0, costs["slowdown"])) / parse_duration(saves, "checkpoint.every", **lengths),
        "evaluation": costs["evaluated image"] * IMAGENET_VAL / parse_duration(evals, "eval.every", **lengths),
    }
    whole = step + sum(spent.values())
    return {name: value / whole for name, value in spent.items()} | {"all": sum(spent.values()) / whole, "step": step}


def rank_main(rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join()
    if not GPUS:
        torch.set_num_threads(1)
    result = function(world, *arguments)
    if world.main:
        results.put(result)
    leave()


def on_ranks(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(world, *arguments)` returned on rank 0 of processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(rank_main, (port, function, arguments, results), RANKS)
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quick = arguments.quick
    ratios: dict[str, float] = {}
    milliseconds: dict[str, float] = {}

    def tell(name: str, ratio: float) -> None:
        ratios[name] = round(ratio, 4)
        print(f"{name:88} {ratio:8.3f}", flush=True)

    for (title, options), bar in ((SMALL, " (≤ 1.05)"), (DENSE, "")) if not quick else ((SMALL, " (≤ 1.05)"),):
        for rows, table in on_ranks(overhead, options, 2 if quick else 8).items():
            base, base_processor = zip(*table["DDP"], strict=True)
            for name, steps in table.items():
                told = f"{title}, micro batch {rows}: {name}"
                seconds, processor = zip(*steps, strict=True)
                milliseconds[told] = round(statistics.median(seconds) * 1e3, 1)
                if name == "DDP":
                    continue
                meant = bar if int(rows) >= 16 and name != "stage 3" else ""
                tell(f"{told} / DDP{meant}", statistics.median(a / b for a, b in zip(seconds, base, strict=True)))
                tell(f"{told} / DDP, best steps", min(seconds) / min(base))
                used = statistics.median(processor) / statistics.median(base_processor)
                tell(f"{told} / DDP, the processor's time", used)
    title, options = LARGE
    if quick:
        options = {**options, "depth": 1}
    bytes_a_parameter = {
        f"stage {stage}": on_ranks(memory, options, stage) for stage in ((0, 2) if quick else range(4))
    }
    for stage, row in bytes_a_parameter.items():
        told = f"{row.pop('parameters') / 1e6:.0f} M weights on {RANKS} ranks, {stage}"
        print(f"{told}: bytes a weight: {'  '.join(f'{name} {value:.2f}' for name, value in row.items())}")
        tell(f"{told}: states / formula (≤ 1.1)", row["states"] / row["formula"])
        tell(f"{told}: peak of a step, with DeepSpeed's buckets / formula", row["peak"] / row["formula"])
    costs: dict[str, dict[str, float]] = {}
    for title, options in (SMALL, LARGE)[: 1 if quick else 2]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found = costs[title] = on_ranks(running, options, folder, 2 if quick else 5)
        stall = found["copy"] + found["slowdown"]
        tell(f"{title}: the loop waits for a save / step (< 1)", found["copy"] / found["step"])
        tell(f"{title}: that, and by how much steps are slower while it is written / step", stall / found["step"])
        tell(f"{title}: the first save / step", found["first copy"] / found["step"])
        tell(f"{title}: a save that is waited for / step", found["whole save"] / found["step"])
    found = costs[SMALL[0]]
    for global_batch in (1024, RANKS * MICRO_BATCHES[0]):
        share = shares(found, global_batch)
        told = f"{SMALL[0]}, global batch {global_batch}, steps of {share.pop('step'):.2f} s"
        for name, value in share.items():
            tell(f"{told}: share of {name}{' (< 0.02)' if name == 'all' else ''}", value)
    if arguments.out:
        libraries = ("deepspeed", "numpy", "torch")
        device = f"{GPUS} × {torch.cuda.get_device_name()}" if GPUS else f"{os.cpu_count()} cores"
        told = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{device}, {platform.machine()}, {psutil.virtual_memory().total / 1e9:.0f} GB",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
            "ranks": RANKS,
            "ratios": ratios,
            "milliseconds": milliseconds,
            "bytes_a_parameter": {s: {n: round(v, 2) for n, v in row.items()} for s, row in bytes_a_parameter.items()},
            "seconds": {title: {n: round(v, 4) for n, v in row.items()} for title, row in costs.items()},
        }
        arguments.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
