"""The commands `vitscale launch ssh`, `launch kubeflow` and what they start on nodes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vitscale.errors import UserError
from vitscale.launch.options import Debug, DryRun, Force, Overrides, Recipe
from vitscale.launch.recipes import RECIPES
from vitscale.launch.stage import stage

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@stage
def ssh(
    hostfile: Annotated[str, typer.Argument(metavar="HOSTFILE", help="Lines such as `gpu01 slots=8`, one a host.")],
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, or `doctor` to look at the hosts.")],
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where rank 0 listens, on the first host.")] = 29500,
    master: Annotated[str, typer.Option(help="Address of the first host among hosts; '': its name.")] = "",
    program: Annotated[str, typer.Option("--ssh", help="What reaches a host; '': ssh without questions.")] = "",
    env: Annotated[
        list[str] | None, typer.Option(help="A variable that hosts get too, besides NCCL_… and such.")
    ] = None,
    force: Force = False,
    data_elsewhere: Annotated[
        bool, typer.Option("--data-elsewhere", help="The data cannot be seen from here: the hosts check it.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for ranks to arrive, of `doctor`.")] = 120.0,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train on the hosts of a hostfile, by ssh: this folder and this Python have to be at the same place on each.

    Example: `vitscale launch ssh hosts digits-demo data.train=shards/train run.dir=runs/a`
    """
    from vitscale.launch import ssh as hosts_by_ssh
    from vitscale.pipeline.config import Config
    from vitscale.pipeline.recipe import compose_overrides, load_recipe

    hosts = hosts_by_ssh.read_hostfile(hostfile)
    words = overrides or []
    if recipe == "doctor":
        compose_overrides(Config, words)
        command = ["doctor", *words, "--timeout", str(timeout)]
    else:
        config = load_recipe(recipe, words, RECIPES)
        if not data_elsewhere and not dry_run:
            from vitscale.pipeline.planner import plan

            plan(config, sum(slots for _, slots in hosts), force=force)
        command = ["finetune" if config.init_from else "pretrain", recipe, *words, *(["--force"] if force else [])]
    lines = hosts_by_ssh.commands(hosts, command, port, master, env or [])
    if dry_run:
        for (host, _), line in zip(hosts, lines, strict=True):
            print(f"{host}: {line}")
        return
    names = [host for host, _ in hosts]
    code = hosts_by_ssh.run_hosts(names, lines, program or hosts_by_ssh.SSH, alone=recipe == "doctor")
    if code:
        raise typer.Exit(code)


@stage
def kubeflow(
    recipe: Recipe,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="Container image with vitscale in it.")] = "",
    name: Annotated[str, typer.Option(help="Of the job; '': the recipe's.")] = "",
    nodes: Annotated[int, typer.Option(help="Pods.")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs of each pod; 0: one rank on CPUs.")] = 8,
    namespace: Annotated[str, typer.Option(help="Of the job; '': kubectl's.")] = "",
    volume: Annotated[list[str] | None, typer.Option(help="CLAIM:/PATH of a volume claim; can be repeated.")] = None,
    shm_gb: Annotated[float, typer.Option(min=0.01, help="GB of /dev/shm.")] = 16.0,
    cpus: Annotated[str, typer.Option(help="CPUs of each pod, such as 96.")] = "",
    memory: Annotated[str, typer.Option(help="Memory of each pod, such as 900Gi.")] = "",
    grace: Annotated[int, typer.Option(min=1, help="Seconds to save after an eviction.")] = 600,
    restarts: Annotated[int, typer.Option(min=0, help="Times that pods may be made anew.")] = 100,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train as a PyTorchJob of Kubeflow's training operator, by `kubectl create`; `--dry-run` prints the manifest.

    Example: `vitscale launch kubeflow vit-l16-i21k-pretrain data.train=/data/train run.dir=/data/runs/a --nodes 8
    --image vitscale:1 --volume data:/data --dry-run`
    """
    from vitscale.launch.kubeflow import Job, manifest
    from vitscale.pipeline.recipe import load_recipe

    config = load_recipe(recipe, overrides or [], RECIPES)
    job = Job(
        name=name or Path(recipe).stem, image=image, nodes=nodes, gpus=gpus, namespace=namespace, volumes=volume or [],
        shm_gb=shm_gb, cpus=cpus, memory=memory, grace=grace, restarts=restarts,
    )  # fmt: skip
    text = manifest(config, job)
    if dry_run:
        print(text, end="")
        return
    import subprocess

    try:
        code = subprocess.run(["kubectl", "create", "-f", "-"], input=text, text=True).returncode
    except FileNotFoundError as error:
        remedy = "Install it, or add --dry-run to have the manifest printed."
        raise UserError("kubectl", "nothing on PATH", "Kubernetes' client", remedy) from error
    if code:
        raise typer.Exit(code)


def node(context: typer.Context) -> None:
    """The ranks of one node: `vitscale` with the words that follow. `--operator` first: exit codes for Kubeflow's."""
    from vitscale.errors import EXIT_USER, report_failure
    from vitscale.launch.node import for_operator, run_node

    words, operator = context.args, context.args[:1] == ["--operator"]
    try:
        code = run_node(words[1:] if operator else words)
    except UserError as error:
        report_failure(f"error: {error}", cause=True)
        code = EXIT_USER
    raise typer.Exit(for_operator(code) if operator else code)


def node_rank(context: typer.Context) -> None:
    """A rank of such a node."""
    from vitscale.launch.cli import app
    from vitscale.launch.node import take_place

    take_place()
    sys.argv[1:] = context.args
    app(context.args)


def register(launch_app: typer.Typer) -> None:
    """Add the commands to `vitscale launch`."""
    launch_app.command()(ssh)
    launch_app.command()(kubeflow)
    launch_app.command("node", hidden=True, context_settings=PASSED_ON)(node)
    launch_app.command("node-rank", hidden=True, context_settings=PASSED_ON)(node_rank)
