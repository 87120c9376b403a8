"""The commands of runs: `vitscale pretrain` and `finetune`, and what looks at them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vitscale.errors import UserError
from vitscale.launch import chain_cli
from vitscale.launch.options import DEVICES, Debug, Device, Force, Nproc, Overrides, Recipe, Test, Vary
from vitscale.launch.recipes import RECIPES
from vitscale.launch.stage import SettingsCommand, run_ranks, stage


@stage
def pretrain(
    recipe: Recipe, overrides: Overrides = None, nproc: Nproc = 1, force: Force = False, debug: Debug = False
) -> None:
    """Train from random weights; run again, it goes on from the last checkpoint.

    Example: `vitscale pretrain digits-demo data.train=shards/train run.dir=runs/a --nproc 2`
    """
    _train("pretrain", recipe, overrides or [], nproc, force)


@stage
def finetune(
    recipe: Recipe,
    overrides: Overrides = None,
    vary: Vary = None,
    test: Test = "",
    nproc: Nproc = 1,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Train from a checkpoint or an export, at any resolution and for any classes; with --grid choose settings.

    Example: `vitscale finetune digits-demo-finetune init_from=runs/a data.train=shards/train run.dir=runs/b`
    """
    if not vary:
        if test:
            raise UserError("--test", test, "--grid beside it", "Use `vitscale evaluate RUN DATASET` for one run.")
        _train("finetune", recipe, overrides or [], nproc, force)
        return
    from vitscale.launch.grid import GridKind

    if force:
        raise UserError("--force", "--grid beside it", "one of them", "Choose another run.dir.")
    kind = GridKind(recipe, tuple(vary), tuple(overrides or []), test=test)
    if not all(kind.config(run).init_from for run in kind.runs):
        raise _no_start()
    chain_cli.run_grid(kind, nproc)


def _train(name: str, recipe: str, overrides: list[str], nproc: int, force: bool) -> None:
    from vitscale.pipeline.recipe import load_recipe

    config = load_recipe(recipe, overrides, RECIPES)
    if name == "finetune" and not config.init_from:
        raise _no_start()
    if name == "pretrain" and config.init_from:
        raise UserError("init_from", config.init_from, "nothing in pretraining", "Use `vitscale finetune`.")

    def work(world: Any) -> None:
        from vitscale.pipeline.planner import plan
        from vitscale.pipeline.train import train

        train(plan(config, world.size, check_files=world.main, force=force), world)

    def check() -> None:
        from vitscale.pipeline.planner import plan

        plan(config, nproc, force=force)

    run_ranks(work, check, nproc, config.engine.device, "engine.device")


@stage
def vtab(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint or an export.")],
    tasks: Annotated[str, typer.Argument(help="A YAML file of tasks, or vtab-1k, which ships.")],
    out: Annotated[str, typer.Argument(help="Folder for the runs and the tables.")],
    overrides: Overrides = None,
    root: Annotated[str, typer.Option(help="Folder of the tasks' data.")] = ".",
    available: Annotated[bool, typer.Option("--available", help="Leave out tasks whose data are not there.")] = False,
    nproc: Nproc = 1,
    debug: Debug = False,
) -> None:
    """Fine-tune on each of many small tasks, test each once, and tell the means; run again, it goes on.

    Example: `vitscale vtab runs/l16 vtab-1k runs/vtab --root shards/vtab --available`
    """
    from vitscale.launch.vtab import run_tasks
    from vitscale.pipeline.console import say

    raise typer.Exit(run_tasks(checkpoint, tasks, out, overrides or [], root, available, nproc, say))


def _no_start() -> UserError:
    expected = "a run, a checkpoint or an export"
    return UserError("init_from", "nothing", expected, "Add init_from=PATH to the command.")


@stage
def replay(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    incident: Annotated[str, typer.Argument(help="Name of an incident, a folder in its incidents/.")],
    device: Device = "auto",
    nproc: Nproc = 1,
    debug: Debug = False,
) -> None:
    """Repeat a step that was not taken, and say which module first gave a value that is not finite.

    Example: `vitscale replay runs/a step-00000123-batch-00000123`
    """
    from vitscale.pipeline.config import require_choice
    from vitscale.pipeline.mirror import reading_folder
    from vitscale.pipeline.recipe import load_recipe

    require_choice("--device", device, DEVICES)
    recipe = reading_folder(run, "RUN") / "recipe.yaml"
    if not recipe.is_file():
        raise UserError("RUN", f"{run}, which has no recipe.yaml", "the folder of a run", "Check the path.")
    config = load_recipe(str(recipe), [f"engine.device={device}", f"run.dir={run}"], RECIPES)

    def work(world: Any) -> None:
        from vitscale.pipeline.replay import replay

        replay(config, incident, world)

    def check() -> None:
        from vitscale.pipeline.replay import find

        find(config, incident)

    run_ranks(work, check, nproc, device, "--device")


@stage
def status(
    run: Annotated[str, typer.Argument(help="Folder of a run, going on or over; or a chain's file or logs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """How a run is doing: progress, speed and what bounds it, last checkpoint, incidents. Does not disturb it.

    Of a chain of jobs: its stages. Example: `vitscale status runs/a`
    """
    from vitscale.launch.chain_status import is_chain
    from vitscale.pipeline import status as pipeline

    if is_chain(run):
        chain_cli.show_status(run, as_json)
        return
    found = pipeline.read_status(run)
    if as_json:
        print(pipeline.as_json(found))
    else:
        pipeline.show(found)


@stage
def audit(
    run_a: Annotated[str, typer.Argument(help="Folder of a run.")],
    run_b: Annotated[str, typer.Argument(help="Folder of another.")],
    debug: Debug = False,
) -> None:
    """Whether two runs saw the same images, step by step, and if not, where they first differ (exit code 1).

    Example: `vitscale audit runs/a runs/b`
    """
    from vitscale.pipeline.audit import compare
    from vitscale.pipeline.console import count, say

    found = compare(run_a, run_b)
    say(f"{count(found.steps, 'step')} in common, {found.first} to {found.last}")
    if found.differs is None:
        say("the same images in each of them")
    else:
        say(f"the images of step {found.differs} differ")
        raise typer.Exit(1)


@stage
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, in the order to show them.")],
    out: Annotated[str, typer.Option(help="File to write; '' is report.html in the last run's folder.")] = "",
    commands: Annotated[str, typer.Option(help="Text file of the commands that led here, to be shown.")] = "",
    debug: Debug = False,
) -> None:
    """One self-contained HTML page: curves, confusion matrices, sample predictions, commands and versions.

    Example: `vitscale report runs/a runs/b --out report.html`
    """
    from vitscale.pipeline.console import say
    from vitscale.pipeline.mirror import reading_folder, shown
    from vitscale.pipeline.report import write_report

    folders = [reading_folder(run, "RUNS") for run in runs]
    path = Path(out) if out else folders[-1] / "report.html"
    write_report(folders, path, commands)
    say(shown(path))


@stage
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [SETTING=VALUE]...", help="data.train, run.dir and engine.device count."),
    ] = None,
    nproc: Nproc = 1,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds for ranks to arrive, and for each thing tried.")
    ] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Whether all ranks meet, see the same, and are as fast as each other; names a node that is odd (exit code 1).

    Under `srun`, one task a GPU or a node. Example: `srun vitscale doctor data.train=shards/train run.dir=runs/a`
    """
    import os

    from vitscale.launch.local import LAUNCHER, check_processes, launch, under_launcher
    from vitscale.pipeline.recipe import load_recipe

    named = bool(words) and "=" not in words[0]
    config = load_recipe(words[0] if named else "base", words[named:] if words else [], RECIPES)
    if not under_launcher():
        check_processes(nproc, config.engine.device, "engine.device")
        if nproc > 1:
            raise typer.Exit(launch(sys.argv[1:], nproc))
    from vitscale.launch.doctor import examine
    from vitscale.pipeline.distributed import die_with_parent

    if LAUNCHER in os.environ:
        die_with_parent(int(os.environ[LAUNCHER]))
    examine(config, timeout, as_json)


def register(app: typer.Typer) -> None:
    """Add the commands to `vitscale`."""
    for command in (pretrain, finetune):
        app.command(cls=SettingsCommand)(command)
    for command in (vtab, replay, status, audit, report, doctor):
        app.command()(command)
