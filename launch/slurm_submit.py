"""Submitting a run to Slurm: what is refused before, the options of sbatch, and the words of `pretrain.sbatch`."""

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.launch.recipes import RECIPES
from vitscale.launch.slurm import Partition, SlurmConfig, minutes, shown, submission
from vitscale.pipeline.config import Config, require_choice
from vitscale.pipeline.recipe import compose_overrides, load_recipe

SCRIPT = Path(__file__).with_name("pretrain.sbatch")


@dataclass(frozen=True)
class SlurmSettings:
    """Settings of a submission; all others are those of the recipe."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class Submission:
    """A job to submit: sbatch's options, the words of the script, and the folder of its logs."""

    slurm: SlurmConfig
    config: Config
    options: list[str]
    arguments: list[str]
    logs: Path

    @property
    def command(self) -> list[str]:
        """The command line of sbatch."""
        return submission(SCRIPT, self.arguments, self.options)


def prepare(recipe: str, overrides: list[str]) -> Submission:
    """Read the settings of a submission. Raises `UserError` for what the recipe or `slurm.…` cannot be."""
    own = [_quoted(word) for word in overrides if word.startswith("slurm.")]
    slurm = compose_overrides(SlurmSettings, own).slurm
    words = [word for word in overrides if not word.startswith("slurm.")]
    config = load_recipe(recipe, words, RECIPES)
    if not config.run.dir:
        raise UserError("run.dir", "nothing", "a folder that all nodes see", "Add run.dir=PATH to the command.")
    if slurm.stage == "pretrain" and config.init_from:
        raise UserError("init_from", config.init_from, "nothing in pretraining", "Add slurm.stage=finetune.")
    if slurm.stage == "finetune" and not config.init_from:
        raise UserError("init_from", "nothing", "a run, a checkpoint or an export", "Add init_from=PATH.")
    if config.engine.device == "cuda" and not slurm.gpus_per_node:
        raise UserError("slurm.gpus_per_node", 0, "GPUs for engine.device cuda", "Add slurm.gpus_per_node=8, say.")
    if not slurm.logs and "://" in config.run.dir:
        raise UserError("slurm.logs", "nothing", "a folder, as run.dir is an object store's", "Add slurm.logs=PATH.")
    slurm = replace(slurm, cpus_per_task=slurm.cpus_per_task or 1 + config.data.workers)
    logs = Path(slurm.logs or Path(config.run.dir) / "logs").absolute()
    words = [word for word in words if not word.startswith("run.dir=")]
    said = [*arguments(slurm), *([f"slurm.logs={logs}"] if slurm.logs else []), recipe, *words]
    return Submission(slurm, config, options(slurm, config, logs), [*said, f"run.dir={config.run.dir}"], logs)


def options(slurm: SlurmConfig, config: Config, logs: Path) -> list[str]:
    """sbatch's options. With tasks counted, a range of nodes would be given as few of them as hold the tasks."""
    between, cores = slurm.fewest < slurm.most, slurm.tasks * slurm.cpus_per_task
    named = {
        "job-name": Path(config.run.dir.rstrip("/")).name, "nodes": slurm.nodes,
        "ntasks-per-node": "" if between else slurm.tasks, "mincpus": cores if between else "",
        "gpus-per-node": ":".join(str(part) for part in (slurm.gpu_type, slurm.gpus_per_node or "") if part),
        "cpus-per-task": slurm.cpus_per_task or "", "partition": slurm.partition, "account": slurm.account,
        "qos": slurm.qos, "time": slurm.time, "exclude": slurm.exclude, "constraint": slurm.constraint,
        "reservation": slurm.reservation, "mail-user": slurm.mail, "mail-type": "END,FAIL" if slurm.mail else "",
        "signal": f"B:USR1@{slurm.signal_seconds}", "output": logs / "slurm-%j.out",
    }  # fmt: skip
    requeue = [] if slurm.requeue else ["--no-requeue"]
    return [*(f"--{name}={value}" for name, value in named.items() if value != ""), *requeue, *slurm.options]


def arguments(slurm: SlurmConfig) -> list[str]:
    """Words for the script itself, before those for vitscale."""
    command, words = slurm.command, []
    if slurm.fewest < slurm.most:
        words.append(f"slurm.tasks={slurm.tasks}")
    if slurm.stage != "pretrain":
        words.append(f"slurm.stage={slurm.stage}")
    if slurm.container and slurm.container_runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(_mount(mount) for mount in slurm.mounts)}"] if slurm.mounts else []
        words += [f"slurm.srun={option}" for option in (f"--container-image={slurm.container}", *mounts)]
    elif slurm.container:
        binds = [word for mount in slurm.mounts for word in ("--bind", _mount(mount))]
        gpus = ["--nv"] if slurm.gpus_per_node else []
        words += [f"slurm.inside={word}" for word in ("apptainer", "exec", *gpus, *binds, slurm.container)]
    elif not command:
        command = str(Path(sys.executable).with_name("vitscale"))
    words += [f"slurm.module={module}" for module in slurm.modules]
    words += [f"slurm.setup={slurm.setup}"] if slurm.setup else []
    words += [f"slurm.command={command}"] if command else []
    words += ["slurm.exclude_failed=true"] if slurm.exclude_failed else []
    return words + ([] if slurm.doctor else ["slurm.doctor=false"])


def check_fits(slurm: SlurmConfig, found: dict[str, Partition]) -> None:
    """Raise `UserError` if a partition cannot ever run the job, naming what would fit."""
    default = next((name for name, partition in found.items() if partition.default), "")
    name = slurm.partition or default
    if not name:  # sbatch knows more
        return
    for part in name.split(","):
        require_choice("slurm.partition", part, found)
    asked = [found[part] for part in name.split(",")]
    fits = [each for each in found.values() if not _against(slurm, each)]
    if any(each in fits for each in asked):
        return
    against = _against(slurm, asked[0])
    assert against
    setting, got, expected = against
    other = ", ".join(each.name for each in fits)
    remedy = f"Lower it, or choose slurm.partition={other}." if other else "Lower it; no other partition has more."
    raise UserError(setting, got, expected, remedy)


def _against(slurm: SlurmConfig, partition: Partition) -> tuple[str, object, str] | None:
    """The setting that keeps a job out of a partition, its value, and what would fit."""
    name, cores = partition.name, slurm.tasks * slurm.cpus_per_task
    if not partition.up:
        return "slurm.partition", name, "a partition that is up"
    if slurm.fewest > partition.nodes:
        return "slurm.nodes", slurm.nodes, f"at most {partition.nodes} in partition {name}"
    if slurm.gpus_per_node > partition.gpus:
        return "slurm.gpus_per_node", slurm.gpus_per_node, f"at most {partition.gpus} on a node of partition {name}"
    if cores > partition.cpus:
        got = f"{slurm.cpus_per_task} for each of {slurm.tasks} ranks"
        return "slurm.cpus_per_task", got, f"at most {partition.cpus} on a node of partition {name}"
    if slurm.time and minutes(slurm.time, "slurm.time") > partition.most_minutes:
        return "slurm.time", slurm.time, f"at most {partition.most_minutes:g} minutes in partition {name}"
    return None


def check_recipe(slurm: SlurmConfig, config: Config) -> None:
    """Check the recipe against its data and as many ranks as the job may get. Raises `UserError`."""
    from vitscale.pipeline.planner import plan

    for nodes in sorted({slurm.fewest, slurm.most}):
        plan(config, nodes * slurm.tasks)


def keep_command(prepared: Submission) -> None:
    """Make the folder of logs, which Slurm does not, and keep the command in it as `submit.sh`.

    The job itself submits it again where it cannot be requeued. Raises `UserError` if it cannot be written.
    """
    sbatch, *rest = prepared.command
    lines = (
        "#!/bin/bash",
        "# How this run was submitted; more options of sbatch can be given.",
        f"cd {shown([str(Path.cwd())])} || exit",
        f'exec {sbatch} "$@" {shown(rest)}',
    )
    try:
        prepared.logs.mkdir(parents=True, exist_ok=True)
        publish_text(prepared.logs / "submit.sh", "\n".join([*lines, ""]))
    except OSError as error:
        got = f"{prepared.logs} ({error.strerror})"
        raise UserError("run.dir", got, "a folder that can be written", "Choose another.") from error


def _quoted(word: str) -> str:
    """`slurm.time=24:00:00` as text: YAML takes that for a number of base 60, 86,400."""
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if re.fullmatch(r"[\d:-]*:[\d:-]*", value) else word


def _mount(path: str) -> str:
    return path if ":" in path else f"{path}:{path}"
