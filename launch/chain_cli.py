"""The commands of chains: `vitscale launch chain`, `shard` and `grid`, `cancel`, and `step`, which jobs run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.errors import EXIT_INTERNAL, UserError
from vitscale.launch.options import Debug, DryRun, Test, Vary
from vitscale.launch.stage import stage

if TYPE_CHECKING:
    from vitscale.launch.grid import GridKind

Settings = Annotated[list[str] | None, typer.Argument(metavar="[SETTING=VALUE]...")]
Where = Annotated[str, typer.Argument(metavar="CHAIN_OR_FOLDER", help="The file of a chain, or its folder of logs.")]


def _submit(tree: dict[str, object], file: str, dry: bool) -> None:
    """Submit a chain of one stage that a command made."""
    from vitscale.launch import chain_jobs
    from vitscale.launch.chain import make_chain
    from vitscale.pipeline.console import say

    made = make_chain(tree)
    if dry:
        chain_jobs.dry_run(made, say)
        return
    chain_jobs.submit_chain(made, file, say)
    say(f"`vitscale status {made.logs}` shows how it is doing")


def _apart(words: list[str]) -> tuple[list[str], dict[str, object], str]:
    """Settings, those of `slurm.`, and slurm.logs."""
    from vitscale.launch.chain import parse_value

    slurm: dict[str, object] = {}
    for word in words:
        if word.startswith("slurm."):
            key, _, value = word.removeprefix("slurm.").partition("=")
            slurm[key] = parse_value(value)
    logs = str(slurm.pop("logs", ""))
    return [word for word in words if not word.startswith("slurm.")], slurm, logs


@stage
def chain(
    file: Annotated[str, typer.Argument(metavar="CHAIN", help="A YAML file of stages; see docs/chains.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="logs, slurm.KEY, STAGE.KEY or STAGE.SETTING")
    ] = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Submit a chain of stages, each after those before it; again, it goes on with what is missing.

    Example: `vitscale launch chain digits.yaml pretrain.train.duration=5ep`
    """
    from vitscale.launch import chain_jobs
    from vitscale.launch.chain import load_chain
    from vitscale.pipeline.console import say

    made = load_chain(file, overrides or [])
    if dry_run:
        chain_jobs.dry_run(made, say)
        return
    chain_jobs.submit_chain(made, str(Path(file).absolute()), say)
    say(f"`vitscale status {file}` shows how it is doing")


@stage
def shard(
    source: Annotated[str, typer.Argument(help="Images, as for `vitscale shard`.")],
    out: Annotated[str, typer.Argument(help="New folder for the shards.")],
    overrides: Settings = None,
    array: Annotated[int, typer.Option(min=0, help="Parts of each stage, one a task; 0: one job for all.")] = 0,
    retries: Annotated[int, typer.Option(min=0, help="How often a part that fails is tried again.")] = 2,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Shard on a cluster: each stage an array of parts, then publish. Settings of `slurm.` besides those of shard.

    Example: `vitscale launch shard images/train shards/train --array 64 split=train slurm.time=1:00:00`
    """
    settings, slurm, logs = _apart(overrides or [])
    if not logs and "://" in out:
        raise UserError("slurm.logs", "nothing", "a folder, as OUT is an object store's", "Add slurm.logs=PATH.")
    made = {"source": source, "out": out, "array": str(array), "retries": str(retries), "settings": settings}
    _submit({"logs": logs or f"{out.rstrip('/')}.logs", "slurm": slurm, "stages": [{"shard": made}]}, "", dry_run)


@stage
def grid(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships.")],
    overrides: Settings = None,
    vary: Vary = None,
    test: Test = "",
    at_once: Annotated[int, typer.Option(min=0, help="Most runs at a time; 0: as many as there is room for.")] = 0,
    local: Annotated[bool, typer.Option("--local", help="One after another on this machine.")] = False,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="With --local: processes of each run.")] = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Run all combinations of some settings, and make a table of what came of them, the best first; then test that.

    Example: `vitscale launch grid digits-demo --grid 'optim.lr=[1e-3, 3e-3]' data.train=shards/train run.dir=runs/lr`
    """
    from vitscale.launch.grid import GridKind

    if not vary:
        raise UserError("--grid", "nothing", "SETTING=[VALUE, …]", "Add --grid 'optim.lr=[1e-3, 3e-3]', say.")
    settings, slurm, logs = _apart(overrides or [])
    kind = GridKind(recipe, tuple(vary), tuple(settings), at_once, test)
    if local:
        run_grid(kind, nproc, dry_run)
        return
    made = {"recipe": recipe, "vary": list(vary), "settings": settings, "at_once": str(at_once), "test": test}
    _submit({"logs": logs or f"{kind.folder}/logs", "slurm": slurm, "stages": [{"grid": made}]}, "", dry_run)


def run_grid(kind: "GridKind", nproc: int, dry_run: bool = False) -> None:
    """Do a grid on this machine, after checks; with `dry_run` say its runs."""
    from vitscale.launch.grid_local import check_here, run_here
    from vitscale.pipeline.console import say

    check_here(kind, nproc)
    if dry_run:
        say("\n".join(" ".join(run.words) for run in kind.runs))
        return
    raise typer.Exit(run_here(kind, nproc, say))


def show_status(chain_or_folder: str, as_json: bool) -> None:
    """How a chain is doing: its stages, their jobs, why they wait or failed, progress, logs."""
    from vitscale.launch import chain_jobs, chain_status
    from vitscale.pipeline.console import say

    state = chain_jobs.known_state(chain_status.logs_of(chain_or_folder))
    reports = chain_status.report(state)
    if as_json:
        print(chain_status.as_json(state, reports))
        return
    rows = list(chain_status.lines(reports))
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        say(f"{label:{width}}{text}")


@stage
def cancel(chain_or_folder: Where, debug: Debug = False) -> None:
    """Cancel what is queued or running of a chain. Submitted again, it goes on from there.

    Example: `vitscale cancel digits.yaml`
    """
    from vitscale.launch import chain_jobs, chain_status
    from vitscale.pipeline.console import say

    left = chain_jobs.cancel_chain(chain_status.logs_of(chain_or_folder))
    for name, jobs in left.items():
        say(f"{name}: cancelled {', '.join(map(str, jobs))}")
    if not left:
        say("nothing is queued or running")


@stage
def step(
    logs: Path,
    name: str,
    what: str,
    check: Annotated[bool, typer.Option("--check", help="Only say, by the exit code, whether it is complete.")] = False,
    debug: Debug = False,
) -> None:
    """What a job of a chain does: nothing if its stage is complete, else the command of that."""
    from vitscale.launch.chain_jobs import do_step

    code = do_step(logs, name, what, check, _run)
    if code:
        raise typer.Exit(code)


def _run(words: list[str]) -> int:
    """Do a command of vitscale in this process; those of several ranks do not come back."""
    from vitscale.launch.cli import app

    sys.argv[1:] = words
    try:
        app(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_INTERNAL * bool(end.code)
    return 0


def register(launch_app: typer.Typer) -> None:
    """Add commands to `vitscale launch`."""
    for command in (chain, shard, grid):
        launch_app.command()(command)
    launch_app.command(hidden=True)(step)
