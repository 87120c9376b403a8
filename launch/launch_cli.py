"""The commands `vitscale launch …`: runs on a cluster."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vitscale.launch import chain_cli, hosts_cli
from vitscale.launch.options import Debug, Recipe
from vitscale.launch.stage import stage

launch_app = typer.Typer(no_args_is_help=True, help="Runs on a cluster: Slurm, hosts by ssh, Kubeflow.")
hosts_cli.register(launch_app)
chain_cli.register(launch_app)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class SlurmCommand(TyperCommand):
    """A command whose `--help` also lists the settings `slurm.…`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from vitscale.launch.slurm_submit import SlurmSettings
        from vitscale.pipeline.config import explain

        print("Settings of the submission, with their defaults; all others are those of `vitscale pretrain`:\n")
        print(explain(SlurmSettings()))


@launch_app.command(cls=SlurmCommand)
@stage
def slurm(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SETTING=VALUE]...", help="Settings of the recipe, and slurm.…")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and the script, and stop.")] = False,
    data_elsewhere: Annotated[
        bool, typer.Option("--data-elsewhere", help="The data cannot be seen from here: the nodes check it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train on the nodes of a Slurm cluster; requeued after its time limit, preemption and lost nodes, it goes on.

    Example: `vitscale launch slurm digits-demo slurm.nodes=2 slurm.time=1:00:00 data.train=shards/train run.dir=runs/a`
    """
    from vitscale.launch import slurm as clients
    from vitscale.launch import slurm_submit
    from vitscale.pipeline.console import say

    prepared = slurm_submit.prepare(recipe, overrides or [])
    if dry_run:
        say(clients.shown(prepared.command))
        say(f"\n{slurm_submit.SCRIPT}:\n{slurm_submit.SCRIPT.read_text()}")
        return
    slurm_submit.check_fits(prepared.slurm, clients.partitions())
    if not data_elsewhere:
        slurm_submit.check_recipe(prepared.slurm, prepared.config)
    slurm_submit.keep_command(prepared)
    job = clients.submit(slurm_submit.SCRIPT, prepared.arguments, prepared.options)
    nodes, tasks = prepared.slurm.nodes, prepared.slurm.tasks
    say(f"job {job}: {nodes} nodes of {tasks} ranks; its log will be {prepared.logs}/slurm-{job}.out")
    say(f"`squeue --job {job}` shows whether it runs, `vitscale status {prepared.config.run.dir}` how far it is")


@launch_app.command("rank", hidden=True, context_settings=PASSED_ON)
def rank(context: typer.Context) -> None:
    """A rank of a Slurm job: `vitscale` with the words that follow."""
    from vitscale.launch.cli import app
    from vitscale.launch.slurm_rank import begin_rank

    begin_rank()
    sys.argv[1:] = context.args
    app(context.args)


@launch_app.command("ended", hidden=True)
def ended(folder: Path, run: str, code: int, asked: bool) -> None:
    """What `pretrain.sbatch` does after an attempt: `requeue NODE`, or an exit code to stop with, on stdout."""
    from vitscale.launch.slurm_end import end_attempt

    action, node, said = end_attempt(folder, run, code, asked)
    for text in said:
        print(text, file=sys.stderr)
    print(action, node)
