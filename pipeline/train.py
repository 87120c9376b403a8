"""The training loop: pretraining and fine-tuning alike."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vitscale.data_prep.publish import publish_text
from vitscale.errors import Requeue, UserError
from vitscale.model import lora
from vitscale.model.build import build_network, initial_rules
from vitscale.model.config import in_pixels
from vitscale.model.initial import initial_weight
from vitscale.pipeline import checkpoint, incidents, micro_batch
from vitscale.pipeline.config import to_dict
from vitscale.pipeline.console import OUT, count, progress, say
from vitscale.pipeline.data import order
from vitscale.pipeline.data.device_augment import DeviceAugment
from vitscale.pipeline.data.loader import Batch, TrainingView, training_batches
from vitscale.pipeline.data.workers import worker_deaths
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.engine import Engine, Step, Weights
from vitscale.pipeline.evaluation import during
from vitscale.pipeline.finetune import beginning, choose_trained, fine_tuned_weights, open_source
from vitscale.pipeline.incidents import dropout_seed
from vitscale.pipeline.keeping import kept_in_store
from vitscale.pipeline.metrics import Meter, MetricsLog, Seen, line
from vitscale.pipeline.mirror import drop, shown
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.planner import Plan, find_resume, peaks, recipe_hash
from vitscale.pipeline.position import INCIDENTS, Position
from vitscale.pipeline.profiler import Profiler
from vitscale.pipeline.recipe import to_yaml
from vitscale.pipeline.run_folder import complete, note_best, read_best, run_lock, versions, write_environment, writing
from vitscale.pipeline.saver import Saver
from vitscale.pipeline.schedule import lr_factor
from vitscale.pipeline.signals import StopSignals
from vitscale.pipeline.watchdog import Watchdog
from vitscale.pipeline.weights import NETWORK, describe, open_trained_alike


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
    """Train to the last step, or as far as `eval.patience` goes, from the newest sound checkpoint of the run on.
    Every rank calls it.

    Raises `Requeue` when a signal asked for the end, after a save.
    """
    config = plan.config
    with run_lock(plan.folder, world), kept_in_store(plan.folder, world) as push, StopSignals() as signals:
        resume, warnings = find_resume(config, plan.fingerprint, world, force=plan.force)
        position = position_of(plan, resume)
        if world.main:
            for warning in warnings:
                say(f"passed over: {warning}")
            if resume:
                note_best(plan.folder, checkpoint.read_state(resume))  # a kill may have come before that
            if over(plan, position):
                say(f"already {said_end(plan, position)}")
        if over(plan, position):
            return
        during.check_scratch(plan, world)
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
            saver = make_saver(plan, world, push)
            log = open_log(plan, world, position.step) if world.main else None
            meter = Meter(engine.watch, world, plan.model, config, position.step, plan.steps)
            run = Run(plan, world, engine, saver, signals, watchdog, position, meter, log)
            with worker_deaths(plan.loader.workers), progress("training", shown=world.main) as advance:
                try:
                    while not over(plan, run.position):
                        run_steps(run, advance)
                    saver.finish()
                finally:
                    if run.log:
                        with suppress(OSError):  # not to hide what ended the run; metrics.jsonl is written already
                            run.log.close()
        if world.main:
            say(said_end(plan, run.position))


def run_steps(run: Run, advance: Any) -> None:
    """Steps to the last, an early end, or a rollback: gather this rank's micro batches, step, log, evaluate, save."""
    plan, world, engine, position = run.plan, run.world, run.engine, run.position
    config, size, patience = plan.config, plan.config.train.global_batch, plan.config.eval.patience
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
            evaluates = plan.val is not None and due(done, plan.eval_every, plan.steps)
            if written == world.size:
                run.saver.commit()
            saves = (
                stopping
                or done == plan.steps
                or (
                    not position.refused  # else the weights that led there would be gone back to
                    and (due(done, plan.save_every, plan.steps) or plan.keeps(done) or (patience and evaluates))
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
            if evaluates and (patience or not stopping):  # on what is best, an interrupted run must not differ
                values = evaluate(run)
                if patience and saves:
                    position.judge(*during.score(values))
            ended = over(plan, position)
            if plan.suites and not stopping and due(done, plan.suites.every, done if ended else plan.steps):
                measure(run)
            if saves:
                with engine.watch.host("save"):
                    run.saver.save(engine, state(plan, world, engine, position))
            if ended and done < plan.steps:
                return
            if stopping:
                run.saver.finish()
                names = [name for name in gather(run.signals.asked) if name]
                raise Requeue(f"saved at step {done} of {plan.steps} after {names[0]}", "SIGINT" in names)


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


def position_of(plan: Plan, resume: Path | None) -> Position:
    """Where a run goes on from a checkpoint, if there is one."""
    position = Position.of(checkpoint.read_state(resume)) if resume else Position()
    if not plan.config.eval.patience:
        position.best, position.worse = {}, 0
    return position


def over(plan: Plan, position: Position) -> bool:
    """Whether a run is at its last step, or ended early."""
    return complete({"step": position.step, "position": vars(position)}, plan.steps, plan.config.eval.patience)


def said_end(plan: Plan, position: Position) -> str:
    """What there is to say of a run that is over."""
    best, since = position.best, f", and {count(position.worse, 'evaluation')} since had no better (eval.patience)"
    told = f"; the best checkpoint is of step {best['step']}, {best['name']} {best['score']:.4f}" if best else ""
    reached = f"trained to step {position.step} of {plan.steps}"
    return f"{reached}{told}{since if position.step < plan.steps else ''}: {shown(plan.folder)}"


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


def make_saver(plan: Plan, world: World, push: Callable[[], None]) -> Saver:
    """What saves the run's checkpoints, and keeps the best one, where it looks for that."""
    config = plan.config.checkpoint

    def kept(step: int) -> bool:
        return plan.keeps(step) or step == read_best(plan.folder).get("step")

    def published(state: dict[str, Any]) -> None:
        if note_best(plan.folder, state):
            push()

    folder = plan.folder / "checkpoints"
    return Saver(folder, world, config.keep, kept, background=config.background, push=push, published=published)


def make_objective(plan: Plan) -> Supervised:
    """The objective with its network, whose weights are left as torch makes them."""
    config = plan.config
    network = build_network(plan.model, seed=None)
    choose_trained(network, config.finetune)
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
    rules = (*lora.RULES, *initial_rules(plan.model))
    weights: Weights = lambda name: initial_weight(name, shapes[name], config.run.seed, rules)  # noqa: E731
    if config.init_from:
        trained = open_source(config, open_trained_alike)
        weights, notes = fine_tuned_weights(plan.model, shapes, trained, weights)
        notes += beginning(config.finetune, plan.model, plan.preprocess)
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
    back = position_of(plan, resume)
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


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate, and log what is found."""
    plan, done = run.plan, run.position.step
    with run.engine.watch.host("evaluation"):
        values = during.evaluate(plan, run.world, run.engine, run.watchdog)
    if run.log:
        with writing(plan.folder):
            run.log.write(done, "eval", **values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        say(f"step {done}/{plan.steps}  {'dev' if plan.config.data.dev else 'val'}  {shown}")
    return values


def measure(run: Run) -> None:
    """Run the suites, and log what they find."""
    plan, done = run.plan, run.position.step
    with run.engine.watch.host("evaluation"):
        values = during.measure(plan, run.world, run.engine, run.watchdog, done)
    if run.log and values:
        with writing(plan.folder):
            run.log.write(done, "suite", **values)
        say(f"step {done}/{plan.steps}  suites  {during.told(values)}")


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
    held = f" beside {len(plan.val):,} held out" if config.data.dev and plan.val is not None else ""
    say(f"{len(plan.train):,} images{held}, {model.num_classes} classes: {sets}")
    say(
        f"{config.model.name}: {in_pixels(model.img_size)}, {model.summary};"
        f" {plan.steps} steps of {config.train.global_batch} images, {epoch_steps} steps an epoch"
        f" ({left_out} images of each epoch left out, other ones each time)"
    )
    say(
        f"{world.size} ranks on {world.device.type}, ZeRO-{config.engine.zero_stage}, {config.engine.dtype},"
        f" micro batch {plan.loader.micro_batch} × {engine.accumulation}; {engine.placement.why}"
    )
    if not peaks(plan.steps, plan.warmup, plan.cooldown):
        ends = f"{count(plan.warmup, 'step')} of warm-up and {plan.cooldown:,} of cool-down"
        say(f"warning: {ends} in a run of {plan.steps:,}: the rate never gets to optim.lr")
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
