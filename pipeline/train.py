"""The training loop: pretraining and fine-tuning alike."""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vitscale.data_prep.publish import publish_text
from vitscale.errors import Requeue, UserError
from vitscale.model.build import build_network, initial_rules
from vitscale.model.initial import initial_weight
from vitscale.pipeline import checkpoint, incidents, micro_batch
from vitscale.pipeline.config import to_dict
from vitscale.pipeline.console import OUT, progress, say
from vitscale.pipeline.data import order
from vitscale.pipeline.data.device_augment import DeviceAugment
from vitscale.pipeline.data.loader import (
    Batch,
    EvaluationView,
    TrainingView,
    evaluation_batches,
    training_batches,
    worker_deaths,
)
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.engine import Engine, Step, Weights
from vitscale.pipeline.evaluation.classification import classification
from vitscale.pipeline.finetune import fine_tuned_weights
from vitscale.pipeline.incidents import dropout_seed
from vitscale.pipeline.keeping import kept_in_store
from vitscale.pipeline.metrics import Meter, MetricsLog, Seen, line
from vitscale.pipeline.mirror import drop, shown
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.planner import Plan, find_resume, recipe_hash
from vitscale.pipeline.profiler import Profiler
from vitscale.pipeline.recipe import to_yaml
from vitscale.pipeline.run_folder import run_lock, versions, write_environment, writing
from vitscale.pipeline.saver import Saver
from vitscale.pipeline.schedule import lr_factor
from vitscale.pipeline.signals import StopSignals
from vitscale.pipeline.watchdog import Watchdog
from vitscale.pipeline.weights import NETWORK, describe, open_trained_alike

RECENT = 100  # losses whose median a spike is measured by
INCIDENTS = ("loss", "grad_norm", "spike")  # why a step was not taken, where that is worth a record


@dataclass
class Position:
    """How far a run is; all of it is in its checkpoints, as JSON.

    `step` steps are over, of which the optimizer took `optimizer_steps`. The next one uses the global batch
    `step + data_offset` of the order. `digest` chains the digests of all batches so far. `refused` counts the steps not
    taken since the last one that was; `rollbacks` how often the run went back to a checkpoint; `losses` are the last
    ones, if spikes are watched for.
    """

    step: int = 0
    optimizer_steps: int = 0
    data_offset: int = 0
    digest: str = ""
    refused: int = 0
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Position":
        """That of a checkpoint; format 1 took every step, and had no digest."""
        kept = {"step": state["step"], "optimizer_steps": state["step"], **state.get("position", {})}
        return cls(**kept)

    def take(self, result: Step, spikes: bool) -> None:
        """Count a step."""
        self.step += 1
        self.optimizer_steps += not result.refused
        if result.refused in INCIDENTS:
            self.refused += 1
        elif not result.refused:
            self.refused = 0
            self.losses = [*self.losses, result.means["loss"]][-RECENT:] if spikes else []

    def see(self, digests: list[str]) -> None:
        """Add the digests of batches to the chain."""
        for digest in digests:
            self.digest = hashlib.sha256(f"{self.digest}{digest}".encode()).hexdigest()

    def spike(self, factor: float) -> float:
        """The loss beyond which a step is a spike: `factor` times the median of the last ones, once there are some."""
        return factor * statistics.median(self.losses) if factor and len(self.losses) >= RECENT // 4 else math.inf


@dataclass
class Run:
    """What the loop works with."""

    plan: Plan
    world: World
    engine: Engine
    saver: Saver
    signals: StopSignals
    watchdog: Watchdog
    position: Position
    meter: Meter
    log: MetricsLog | None  # on rank 0


def train(plan: Plan, world: World) -> None:
    """Train to the last step, going on from the newest sound checkpoint of the run. Every rank calls it.

    Raises `Requeue` when a signal asked for the end, after a save.
    """
    config = plan.config
    with run_lock(plan.folder, world), kept_in_store(plan.folder, world) as push, StopSignals() as signals:
        resume, warnings = find_resume(config, plan.fingerprint, world, force=plan.force)
        position = Position.of(checkpoint.read_state(resume)) if resume else Position()
        if world.main:
            for warning in warnings:
                say(f"passed over: {warning}")
            if position.step >= plan.steps:
                say(f"already trained to step {position.step} of {plan.steps}: {shown(plan.folder)}")
        if position.step >= plan.steps:
            return
        plan = micro_batch.fitted(plan, world, make_objective)
        with (
            Watchdog(config.guard.step_timeout, plan.folder, world.rank) as watchdog,
            micro_batch.memory_told(plan, world, make_objective),
        ):
            engine = build_engine(plan, world)
            watchdog.beat(position.step)
            fill(engine, plan, world, resume)
            if world.main:
                announce(plan, world, engine, resume, position.step)
            folder, keep, background = plan.folder / "checkpoints", config.checkpoint.keep, config.checkpoint.background
            saver = Saver(folder, world, keep, plan.keeps, background=background, push=push)
            log = open_log(plan, world, position.step) if world.main else None
            meter = Meter(engine.watch, world, plan.model, config, position.step, plan.steps)
            run = Run(plan, world, engine, saver, signals, watchdog, position, meter, log)
            with worker_deaths(plan.loader.workers), progress("training", shown=world.main) as advance:
                try:
                    while run.position.step < plan.steps:
                        run_steps(run, advance)
                    saver.finish()
                finally:
                    if run.log:
                        with suppress(OSError):  # not to hide what ended the run; metrics.jsonl is written already
                            run.log.close()
        if world.main:
            say(f"trained to step {plan.steps}: {shown(plan.folder)}")


def run_steps(run: Run, advance: Any) -> None:
    """Steps to the last, or to a rollback: gather this rank's micro batches, step, log, evaluate, save."""
    plan, world, engine, position = run.plan, run.world, run.engine, run.position
    config, size = plan.config, plan.config.train.global_batch
    steps = range(position.step + position.data_offset, plan.steps + position.data_offset)
    seen = Seen(batches_of(plan, world, steps, run.engine), engine.accumulation)
    text = ""
    with Profiler(config.profile.window, plan.folder, world, position.step) as profiler:
        for step in range(position.step, plan.steps):
            torch.manual_seed(dropout_seed(plan, step, world.size, world.rank))
            lr = config.optim.lr * lr_factor(
                step, kind=config.schedule.kind, total=plan.steps, warmup=plan.warmup, cooldown=plan.cooldown,
                timescale=config.schedule.timescale,
            )  # fmt: skip
            result = engine.train_step(
                islice(seen, engine.accumulation), size, lr,
                votes=(bool(run.signals.asked), run.saver.ready), limit=position.spike(config.guard.spike),
            )  # fmt: skip
            position.take(result, config.guard.spike > 0)
            run.watchdog.beat(position.step)
            profiler.step(position.step)
            done, (stopping, written) = position.step, result.votes
            if written == world.size:
                run.saver.commit()
            saves = (
                stopping
                or done == plan.steps
                or (
                    not position.refused  # else the weights that led there would be gone back to
                    and (due(done, plan.save_every, plan.steps) or plan.keeps(done))
                )
            )
            if saves or result.refused in INCIDENTS or due(done, config.run.log_every, plan.steps):
                text = log_step(run, result, lr, *seen.take())
            advance(done, plan.steps, text)
            if result.refused in INCIDENTS:
                meet_incident(run, result)
                if run.position is not position:  # rolled back
                    return
            compare = config.guard.compare_every
            if compare and done % compare == 0:
                compare_ranks(engine, world)
            if plan.val and due(done, plan.eval_every, plan.steps) and not stopping:
                log_evaluation(run)
            if saves:
                with engine.watch.host("save"):
                    run.saver.save(engine, state(plan, world, engine, position))
            if stopping:
                run.saver.finish()
                names = [name for name in gather(run.signals.asked) if name]
                raise Requeue(f"saved at step {done} of {plan.steps} after {names[0]}")


def batches_of(plan: Plan, world: World, steps: range, engine: Engine) -> Iterator[Batch]:
    """This rank's micro batches of steps of the order; the time spent waiting for them is counted."""
    view = TrainingView(plan.model.img_size, plan.config.augment, plan.config.run.seed)
    batches = training_batches(plan.train, plan.order, view, plan.loader, world, steps)
    try:
        while True:
            with engine.watch.host("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            del batch  # its memory is lent
    finally:
        batches.close()  # pyright: ignore[reportAttributeAccessIssue] (a generator; ends the loader's processes)


def due(done: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps (0: only at the end) is due after `done` steps."""
    return done == total or (every > 0 and done % every == 0)


def build_engine(plan: Plan, world: World) -> Engine:
    """The engine with the objective, whose weights are still to be filled in."""
    config = plan.config
    size = plan.loader.micro_batch
    accumulation = order.accumulation(config.train.global_batch, world.size, size, plan.loader.unit)
    settings = replace(config.engine, micro_batch=size)
    return Engine(lambda: make_objective(plan), settings, config.optim, world, accumulation)


def make_objective(plan: Plan) -> Supervised:
    """The objective with its network, whose weights are left as torch makes them."""
    config = plan.config
    network = build_network(plan.model, seed=None)
    network.recompute, network.recompute_every = config.engine.recompute, config.engine.recompute_every
    augment = DeviceAugment(config.augment, config.run.seed, plan.model.num_classes)
    learnt = config.objective
    return Supervised(network, plan.preprocess, learnt.label_smoothing, augment, learnt.loss, config.run.seed)


def fill(engine: Engine, plan: Plan, world: World, resume: Path | None) -> None:
    """Give the engine its resumed, pretrained or initial weights, in this order of precedence."""
    config = plan.config
    if resume:
        state = checkpoint.read_state(resume)
        reader = checkpoint.Reader(resume, verified=True, near=(world.rank + 0.5) / world.size)
        checkpoint.restore(reader, engine, Position.of(state).optimizer_steps)
        gather(None)  # what was fetched out of a store is that of all ranks of a node
        if world.local_rank == 0:
            drop(resume)
        engine.loss_scale = state.get("loss_scale", {})
        return
    own = engine.shapes.items()
    shapes = {name.removeprefix(NETWORK): shape for name, shape in own}
    rules = initial_rules(plan.model)
    weights: Weights = lambda name: initial_weight(name, shapes[name], config.run.seed, rules)  # noqa: E731
    if config.init_from:
        trained = open_trained_alike(config.init_from, "init_from")
        weights, notes = fine_tuned_weights(plan.model, shapes, trained, weights)
        for note in notes if world.main else []:
            say(note)
    engine.load(lambda name: weights(name.removeprefix(NETWORK)))
    engine.reset_optimizer(step=0)


def meet_incident(run: Run, result: Step) -> None:
    """Record a step that was not taken; after too many in a row go back to the last checkpoint, past their data."""
    plan, world, before, guard = run.plan, run.world, run.position, run.plan.config.guard
    with run.engine.watch.host("save"):
        run.saver.finish()
        earlier = replace(before, step=before.step - 1, refused=before.refused - 1)
        saved = state(plan, world, run.engine, earlier)
        told = incidents.record(
            plan, world, run.engine, earlier.step, earlier.step + earlier.data_offset, result, saved
        )
    if run.log:
        with writing(plan.folder):
            run.log.write(before.step, "incident", said=told)
        say(told)
    run.meter.restart(before.step)
    if before.refused < guard.patience:
        return
    if before.rollbacks >= guard.rollbacks:
        got = f"{before.refused} steps in a row that could not be taken, after {before.rollbacks} rollbacks: {told}"
        remedy = "Lower optim.lr, lengthen schedule.warmup, or look with `vitscale replay`."
        raise UserError("guard.rollbacks", got, "training that recovers", remedy)
    resume, _ = find_resume(plan.config, plan.fingerprint, world, force=True)
    back = Position.of(checkpoint.read_state(resume)) if resume else Position()
    back.data_offset += before.step - back.step
    back.rollbacks, back.refused = before.rollbacks + 1, 0
    fill(run.engine, plan, world, resume)
    run.position = back
    run.meter.restart(back.step)
    if run.log:
        said = f"back to step {back.step}, past {before.step - back.step} global batches"
        with writing(plan.folder):
            run.log.rewind(back.step)
            run.log.write(back.step, "incident", said=said)
        say(said)


def compare_ranks(engine: Engine, world: World) -> None:
    """Raise `UserError` naming the ranks whose weights differ from those of most others. All ranks call it."""
    checksums = gather(engine.checksum())
    usual = Counter(checksums).most_common(1)[0][0]
    odd = [str(rank) for rank, checksum in enumerate(checksums) if checksum != usual]
    if odd:
        got = f"other weights on rank {', '.join(odd)} than on most of the {world.size}"
        remedy = "Suspect the memory or the network of its node. Run again to go on from the last checkpoint."
        raise UserError("guard.compare_every", got, "the same bits on all ranks", remedy)


def evaluate(plan: Plan, world: World, engine: Engine, watchdog: Watchdog) -> dict[str, float]:
    """Accuracy on `data.val`, without touching the order or the random numbers of training."""
    assert plan.val is not None
    engine.objective.eval()

    def batches() -> Iterator[Batch]:
        assert plan.val is not None
        for batch in evaluation_batches(plan.val, EvaluationView(plan.preprocess), plan.loader, world):
            yield batch
            watchdog.beat()

    return {
        name: value
        for name, value in classification(
            engine.objective, batches(), plan.model.num_classes, plan.config.objective.loss
        )
        if name in ("top1", "top5", "loss", "map") and value is not None
    }


def log_evaluation(run: Run) -> None:
    """Evaluate the weights, and their average where there is one, whose values are named `ema_…`."""
    plan, world, engine, done = run.plan, run.world, run.engine, run.position.step
    with engine.watch.host("evaluation"):
        values = evaluate(plan, world, engine, run.watchdog)
        if engine.averages:
            with engine.averaged():
                averaged = evaluate(plan, world, engine, run.watchdog)
            values |= {f"ema_{name}": value for name, value in averaged.items()}
    if run.log:
        with writing(plan.folder):
            run.log.write(done, "eval", **values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        say(f"step {done}/{plan.steps}  val  {shown}")


def state(plan: Plan, world: World, engine: Engine, position: Position) -> dict[str, Any]:
    """What a checkpoint says of itself in `state.json`."""
    config = plan.config
    return {
        "step": position.step,
        "steps": plan.steps,
        "examples": position.step * config.train.global_batch,
        "position": asdict(position),
        "averaged": engine.averages,
        "loss_scale": engine.loss_scale,
        **describe(plan.model, plan.train.classes, plan.preprocess),
        "dataset": {"fingerprint": plan.fingerprint, "samples": len(plan.train), "order": order.VERSION},
        "world_size": world.size,
        "zero_stage": config.engine.zero_stage,
        "recipe": to_dict(config),
        "recipe_hash": recipe_hash(config),
        "versions": versions(),
    }


def announce(plan: Plan, world: World, engine: Engine, resume: Path | None, first: int) -> None:
    """Say what is about to happen, in a few lines."""
    config, model = plan.config, plan.model
    epoch_steps, left_out = divmod(len(plan.train), config.train.global_batch)
    sets = ", ".join(path for path, _ in config.data.mixture)
    say(f"{len(plan.train):,} images, {model.num_classes} classes: {sets}")
    say(
        f"{config.model.name}: {model.img_size} px, {model.summary};"
        f" {plan.steps} steps of {config.train.global_batch} images, {epoch_steps} steps an epoch"
        f" ({left_out} images of each epoch left out, other ones each time)"
    )
    say(
        f"{world.size} ranks on {world.device.type}, ZeRO-{config.engine.zero_stage}, {config.engine.dtype},"
        f" micro batch {plan.loader.micro_batch} × {engine.accumulation}; {engine.placement.why}"
    )
    if resume:
        say(f"going on from step {first}: {shown(resume)}")


def open_log(plan: Plan, world: World, first: int) -> MetricsLog:
    """Write the recipe and the environment into the run's folder, and open its log at step `first`."""
    with writing(plan.folder):
        publish_text(plan.folder / "recipe.yaml", to_yaml(plan.config))
        write_environment(plan.folder, world, {"steps": plan.steps, "samples": len(plan.train)})
        return MetricsLog(plan.folder, first, wandb=plan.config.run.wandb, recipe=to_dict(plan.config))


def log_step(run: Run, result: Step, lr: float, digests: list[str], skipped: int) -> str:
    """Log a row; returns it as text for the progress bar, and without a terminal prints it now and then."""
    plan, done = run.plan, run.position.step
    run.position.see(digests)
    row = {
        **result.means,
        "lr": lr,
        **run.meter.read(done),
        "skipped": skipped,
        "weight_norm": run.engine.weight_norm(),
    }
    row |= {key: value for key, value in run.engine.loss_scale.items() if key == "cur_scale"}
    if not run.log:
        return ""
    with writing(plan.folder):
        run.log.write(done, "train", digests, **row)
    text = line(row)
    if not OUT.is_terminal and (run.meter.line_due() or done == plan.steps):
        say(f"step {done}/{plan.steps}  {text}")
    return text
