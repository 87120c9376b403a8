"""`vitscale replay`: repeat a step that was not taken, from the weights that its incident kept."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from vitscale.errors import UserError
from vitscale.pipeline import checkpoint
from vitscale.pipeline.config import Config
from vitscale.pipeline.console import say
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.incidents import batches_of_step, dropout_seed, trace
from vitscale.pipeline.micro_batch import fitted
from vitscale.pipeline.mirror import names, reading_folder
from vitscale.pipeline.planner import plan
from vitscale.pipeline.train import build_engine, fill, make_objective


def find(config: Config, incident: str) -> tuple[Path, dict[str, Any]]:
    """Folder and contents of an incident. Raises `UserError` if it is not there, or kept no weights."""
    folder = reading_folder(f"{config.run.dir}/incidents/{incident}", "RUN")
    try:
        told = json.loads((folder / "incident.json").read_text())
    except (OSError, ValueError) as error:
        others = sorted(name for name in names(folder.parent) if name.startswith("step-"))
        expected = f"one of {', '.join(others[:10])}" if others else "an incident; this run has none"
        raise UserError("INCIDENT", f"{incident} ({error})", expected, "Choose one of the run's.") from error
    kept = checkpoint.checkpoints(folder)
    if not kept:
        raise UserError("INCIDENT", f"{incident}, which kept no weights", "one that did", "Choose an earlier one.")
    return kept[0], told


def replay(config: Config, incident: str, world: World) -> None:
    """Repeat the step and say which module first gave a value that is not finite. Every rank calls it.

    Dropout draws the same numbers at the number of ranks of the run. With one rank, torch's anomaly detection then
    names the operation of the backward pass as well.
    """
    folder, told = find(config, incident)
    made = fitted(plan(config, world.size, check_files=world.main, force=True), world, make_objective)
    engine = build_engine(made, world)
    fill(engine, made, world, folder)
    step, data_step, size = told["step"], told["data_step"], config.train.global_batch
    torch.manual_seed(dropout_seed(made, step, world.size, world.rank))
    causes = gather(trace(engine, batches_of_step(made, world, data_step), size))
    if world.main:
        said = f"its {told['refused']} (loss {told['loss']}, gradient {told['grad_norm']})"
        say(f"step {step}, batch {data_step} of the order, was not taken for {said}; now:")
        for rank, cause in enumerate(causes):
            say(f"rank {rank}: {cause or 'every value is finite'}")
    if world.size == 1 and causes[0]:
        torch.manual_seed(dropout_seed(made, step, world.size, world.rank))
        with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the traceback of the operation, which the module's name stands for
            try:
                trace(engine, batches_of_step(made, world, data_step), size)
            except RuntimeError as error:
                say(f"anomaly detection: {str(error).splitlines()[0]}")
