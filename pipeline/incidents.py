"""Steps that were not taken: what is recorded of them, and how one is repeated to find the module at fault.

An incident is a folder of the run's, `incidents/step-00000123-batch-00000125`: `incident.json`, and a checkpoint of the
weights as they stood before step 123, if there are not too many. Steps that are taken again after a rollback use other
batches, of the order that is a function of the recipe: nothing of them need be kept.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.pipeline import checkpoint
from vitscale.pipeline.data.loader import Batch, TrainingView, training_batches
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.engine import Engine, Step
from vitscale.pipeline.mirror import names, shown
from vitscale.pipeline.planner import Plan
from vitscale.pipeline.run_folder import writing
from vitscale.pipeline.saver import Saver

MOST_CHECKPOINTS = 10  # incidents of a run that keep their weights
MOST_KEYS = 100_000  # samples whose keys are recorded


def record(plan: Plan, world: World, engine: Engine, step: int, data_step: int, result: Step, state: dict) -> str:
    """Write down that step `step`, on the data of `data_step`, was not taken, and find the module at fault by a second
    look. Every rank calls it. Returns what happened, in a line.

    `state` is that of a checkpoint as it stood before the step.
    """
    torch.manual_seed(dropout_seed(plan, step, world.size, world.rank))
    found = trace(engine, batches_of_step(plan, world, data_step), plan.config.train.global_batch)
    causes = {f"rank {rank}": cause for rank, cause in enumerate(gather(found)) if cause}
    place = plan.folder / "incidents" / f"step-{step:08d}-batch-{data_step:08d}"
    kept = [name for name in names(place.parent) if checkpoint.checkpoints(place.parent / name)] if world.main else []
    if gather(len(kept))[0] < MOST_CHECKPOINTS:
        Saver(place, world, keep=1, background=False).save(engine, state)
    if world.main:
        numbers, epochs = plan.order.batch(data_step)
        incident = {
            "step": step,
            "data_step": data_step,
            "refused": result.refused,
            **{name: repr(value) for name, value in result.means.items()},
            "causes": causes,
            "torch_seeds": [dropout_seed(plan, step, world.size, rank) for rank in range(world.size)],
            "numbers": numbers.tolist(),
            "epochs": epochs.tolist(),
            "keys": [_key(plan, int(number)) for number in numbers[:MOST_KEYS]],
        }
        with writing(plan.folder):
            place.mkdir(parents=True, exist_ok=True)
            publish_text(place / "incident.json", json.dumps(incident, indent=1))
    what = {"loss": "the loss is not finite", "grad_norm": "the gradient is not finite", "spike": "the loss jumped"}
    cause = next(iter(causes.values()), "no module gave a value that is not finite")
    return f"step {step} not taken: {what[result.refused]}; {cause}; {shown(place)}"


def _key(plan: Plan, number: int) -> str:
    try:
        return plan.train.read(number).key
    except UserError:  # it was skipped
        return ""


def dropout_seed(plan: Plan, step: int, ranks: int, rank: int) -> int:
    """Seed of torch's random numbers, which dropout draws from, on a rank in a step."""
    return (plan.config.run.seed * 1_000_003 + step) * ranks + rank


def batches_of_step(plan: Plan, world: World, data_step: int) -> Iterator[Batch]:
    """This rank's micro batches of one step of the order, loaded by the rank itself."""
    view = TrainingView(plan.model.img_size, plan.config.augment, plan.config.run.seed)
    settings = replace(plan.loader, workers=0)
    return training_batches(plan.train, plan.order, view, settings, world, range(data_step, data_step + 1))


def trace(engine: Engine, batches: Iterable[Batch], global_batch: int) -> str:
    """Go through a step without taking it, and name the first module whose output, or whose gradient in the backward
    pass, is not finite while what went into it was. Empty if there is none on this rank. Every rank calls it."""
    scale = engine.loss_scale
    with watched(engine.objective.module) as found:
        engine.train_step(batches, global_batch, 0.0, limit=-math.inf)
    engine.loss_scale = scale
    return found[0] if found else ""


@contextmanager
def watched(objective: nn.Module) -> Iterator[list[str]]:
    """While the block runs, gather which modules first gave a value that is not finite, the first one first."""
    found: list[str] = []
    hooks = []
    for name, module in objective.named_modules():
        if not any(module.children()):
            watch = _Watch(f"{name} ({type(module).__name__})", found)
            hooks.append(module.register_forward_hook(watch.forward))
            hooks += [p.register_hook(watch.backward) for p in module.parameters() if p.requires_grad]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    """Looks at what goes into a module and comes out of it, in both passes."""

    def __init__(self, kind: str, found: list[str]) -> None:
        self._kind, self._found = kind, found
        self._sound = True  # whether all gradients that came to the module were finite

    def forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if not _finite(output) and all(map(_finite, given)):
            self._found.append(f"{self._kind}: its output was the first that is not finite")
        if output.requires_grad:
            output.register_hook(self._come)
        for value in given:
            if value.grad_fn is not None:
                value.register_hook(self.backward)

    def _come(self, gradient: Tensor) -> None:
        self._sound = self._sound and _finite(gradient)

    def backward(self, gradient: Tensor) -> None:
        """Of an input or a weight."""
        if self._sound and not _finite(gradient):
            self._found.append(f"{self._kind}: its backward pass was the first that is not finite")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
