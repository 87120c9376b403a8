"""The training loop: pretraining and fine-tuning alike."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vitscale.data_prep.publish import publish_text
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline import checkpoint
from vitscale.pipeline.config import to_dict, to_yaml
from vitscale.pipeline.console import OUT, progress, say
from vitscale.pipeline.data import order
from vitscale.pipeline.data.device_augment import DeviceAugment
from vitscale.pipeline.data.loader import (
    EvaluationView,
    TrainingView,
    evaluation_batches,
    training_batches,
    worker_deaths,
)
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.evaluation.classification import classification
from vitscale.pipeline.finetune import initialise_from
from vitscale.pipeline.metrics import Meter, MetricsLog, Seen, Timed
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.planner import Plan, find_resume
from vitscale.pipeline.run_folder import run_lock, versions, write_environment, writing
from vitscale.pipeline.schedule import lr_factor
from vitscale.pipeline.weights import describe, open_trained_alike


def train(plan: Plan, world: World) -> None:
    """Train to the last step, going on from the newest sound checkpoint of the run. Every rank calls it."""
    with run_lock(plan.folder, world):
        resume, warnings = find_resume(plan.config, plan.fingerprint, world)
        first = checkpoint.read_state(resume)["step"] if resume else 0
        if world.main:
            for warning in warnings:
                say(f"passed over: {warning}")
            if first == plan.steps:
                say(f"already trained to step {first} of {plan.steps}: {plan.folder}")
            else:
                announce(plan, world, resume, first)
        if first == plan.steps:
            return
        engine = build_engine(plan, world, resume)
        log = open_log(plan, world, first) if world.main else None
        with worker_deaths(plan.loader.workers):
            run_steps(plan, world, engine, first, log)
        if log:
            log.close()
            say(f"trained to step {plan.steps}: {plan.folder}")


def run_steps(plan: Plan, world: World, engine: Engine, first: int, log: MetricsLog | None) -> None:
    """Steps `first` to the last: gather this rank's micro batches, step, log, evaluate, save."""
    config, size = plan.config, plan.config.train.global_batch
    view = TrainingView(plan.model.img_size, config.augment, config.run.seed)
    steps = range(first, plan.steps)
    batches = Timed(training_batches(plan.train, plan.order, view, plan.loader, world, steps))
    seen = Seen(batches, engine.accumulation)
    meter, text = Meter(batches, first), ""
    with progress("training", shown=world.main) as advance:
        for step in range(first, plan.steps):
            torch.manual_seed((config.run.seed * 1_000_003 + step) * world.size + world.rank)  # dropout
            lr = config.optim.lr * lr_factor(
                step, kind=config.schedule.kind, total=plan.steps, warmup=plan.warmup, cooldown=plan.cooldown,
                timescale=config.schedule.timescale,
            )  # fmt: skip
            means = engine.train_step(islice(seen, engine.accumulation), size, lr)
            done = step + 1
            if due(done, config.run.log_every, plan.steps) or due(done, plan.save_every, plan.steps):
                samples, skipped = seen.take()
                if log:
                    row = {**means, "lr": lr, **meter.read(done, size), "skipped": skipped}
                    text = write_row(plan, log, done, row, samples, meter)
            advance(done, plan.steps, text)
            if plan.val and due(done, plan.eval_every, plan.steps):
                values = evaluate(plan, world, engine)
                if log:
                    with writing(plan.folder):
                        log.write(done, "eval", **values)
                    say(f"step {done}/{plan.steps}  val top-1 {values['top1']:.2%}  top-5 {values['top5']:.2%}")
                meter.restart(done)
            if due(done, plan.save_every, plan.steps):
                saved = state(plan, world, done)
                checkpoint.save(plan.folder / "checkpoints", engine, saved, world, config.checkpoint.keep)
                meter.restart(done)


def due(done: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps (0: only at the end) is due after `done` steps."""
    return done == total or (every > 0 and done % every == 0)


def build_engine(plan: Plan, world: World, resume: Path | None) -> Engine:
    """The network with its initial, pretrained or resumed weights, in the engine."""
    config, network = plan.config, VisionTransformer(plan.model, seed=plan.config.run.seed)
    if resume:
        reader = checkpoint.Reader(resume, verified=True)
        network.load_state_dict(dict(reader.weights("model.")))
    elif config.init_from:
        notes = initialise_from(network, open_trained_alike(config.init_from, "init_from"))
        for note in notes if world.main else []:
            say(note)
    augment = DeviceAugment(config.augment, config.run.seed, plan.model.num_classes)
    objective = Supervised(network, plan.preprocess, config.objective.label_smoothing, augment)
    micro_batch = plan.loader.micro_batch
    accumulation = order.accumulation(config.train.global_batch, world.size, micro_batch, plan.loader.unit)
    engine = Engine(objective, replace(config.engine, micro_batch=micro_batch), config.optim, world, accumulation)
    if resume:
        checkpoint.restore(reader, engine, checkpoint.read_state(resume)["step"])
    return engine


def evaluate(plan: Plan, world: World, engine: Engine) -> dict[str, float]:
    """Accuracy on `data.val`, without touching the order or the random numbers of training."""
    assert plan.val is not None
    engine.objective.eval()
    batches = evaluation_batches(plan.val, EvaluationView(plan.preprocess), plan.loader, world)
    values = dict(classification(engine.objective, batches, plan.model.num_classes))
    return {name: values[name] for name in ("top1", "top5", "loss")}


def state(plan: Plan, world: World, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself in `state.json`."""
    config = plan.config
    return {
        "step": step,
        "examples": step * config.train.global_batch,
        **describe(plan.model, plan.train.classes, plan.preprocess),
        "dataset": {"fingerprint": plan.fingerprint, "samples": len(plan.train), "order": order.VERSION},
        "world_size": world.size,
        "zero_stage": config.engine.zero_stage,
        "recipe": to_dict(config),
        "versions": versions(),
    }


def announce(plan: Plan, world: World, resume: Path | None, first: int) -> None:
    """Say what is about to happen, in a few lines."""
    config, model = plan.config, plan.model
    epoch_steps, left_out = divmod(len(plan.train), config.train.global_batch)
    sets = ", ".join(path for path, _ in config.data.mixture)
    say(f"{len(plan.train):,} images, {model.num_classes} classes: {sets}")
    say(
        f"{config.model.name}: {model.img_size} px, patch {model.patch_size}, width {model.width}, depth {model.depth};"
        f" {plan.steps} steps of {config.train.global_batch} images, {epoch_steps} steps an epoch"
        f" ({left_out} images of each epoch left out, other ones each time)"
    )
    say(f"{world.size} ranks on {world.device.type}, ZeRO-{config.engine.zero_stage}, {config.engine.dtype}")
    if resume:
        say(f"going on from step {first}: {resume}")


def open_log(plan: Plan, world: World, first: int) -> MetricsLog:
    """Write the recipe and the environment into the run's folder, and open its log at step `first`."""
    with writing(plan.folder):
        publish_text(plan.folder / "recipe.yaml", to_yaml(plan.config))
        write_environment(plan.folder, world)
        return MetricsLog(plan.folder, first)


def write_row(plan: Plan, log: MetricsLog, done: int, row: dict[str, float], samples: list[str], meter: Meter) -> str:
    """Log a row; returns it as text for the progress bar, and without a terminal prints it now and then."""
    with writing(plan.folder):
        log.write(done, "train", samples, **row)
    text = (
        f"loss {row['loss']:.4f}  top-1 {row['top1']:.1%}  lr {row['lr']:.2e}  {row['images_per_s']:,.0f} images/s"
        f"  data wait {row['data_wait']:.0%}"
    )
    if not OUT.is_terminal and (meter.line_due() or done == plan.steps):
        seconds_left = (plan.steps - done) * plan.config.train.global_batch / row["images_per_s"]
        say(f"step {done}/{plan.steps}  {text}  ETA {seconds_left:.0f} s")
    return text
