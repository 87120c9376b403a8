"""What a recipe comes to on its data, checked before any process is started."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscale.data_prep.manifest import DATASET_FILE
from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, ViTConfig, from_dict
from vitscale.pipeline import checkpoint
from vitscale.pipeline.config import STAGE_0_OPTIMIZERS, Config, flatten, merge, to_dict
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.holdout import split
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.order import Order
from vitscale.pipeline.data.store import CacheSettings, Store, check_classes, check_images
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import during
from vitscale.pipeline.finetune import check_finetune, check_source, open_source
from vitscale.pipeline.mirror import names, shown, working_folder
from vitscale.pipeline.objectives.supervised import check_loss
from vitscale.pipeline.schedule import parse_duration
from vitscale.pipeline.wandb_run import require_wandb
from vitscale.pipeline.weights import Trained

# settings that may change when a run goes on: they leave its samples and its mathematics alone
HARMLESS = (
    "run.dir", "run.log_every", "run.wandb", "data.train", "data.val", "data.workers", "data.cache", "data.on_error",
    "engine.device", "engine.zero_stage", "engine.micro_batch", "engine.offload", "engine.recompute",
    "engine.recompute_every", "engine.compile", "engine.deepspeed", "checkpoint.", "eval.", "guard.", "profile.",
)  # fmt: skip


# settings that decide the form of weights and optimizer state: not even `--force` changes them
FIXED = ("model.", "optim.name", "finetune.")


@dataclass(frozen=True)
class Plan:
    """A checked run. Durations are in steps; `force` goes on from a checkpoint of another recipe.

    `train` is what is trained on, without what `data.dev` holds out; `val`, on which is evaluated, is that then.
    """

    config: Config
    loader: LoaderSettings
    train: Store
    order: Order
    fingerprint: str
    val: Store | None
    model: ArchitectureConfig
    preprocess: Preprocess
    steps: int
    warmup: int
    cooldown: int
    save_every: int
    keep_every: int
    eval_every: int
    suites: during.Suites | None
    force: bool

    @property
    def folder(self) -> Path:
        """The run's folder, or the local one that stands for it in an object store."""
        return working_folder(self.config.run.dir)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of a step is never removed."""
        return self.keep_every > 0 and step % self.keep_every == 0


def plan(config: Config, world_size: int, check_files: bool = True, force: bool = False) -> Plan:
    """Check a recipe against its data, the number of ranks and the run's folder; `check_files`: every shard is there.

    Where the recipe leaves the micro batch to be found by trial, it is a rank's whole share of the global batch here.

    Raises `UserError` for all that can be known to fail: missing folders, sizes that do not fit, a folder that holds
    a run of another recipe or of other data.
    """
    for setting, value in (("run.dir", config.run.dir), ("data.train", config.data.mixture)):
        if not value:
            raise UserError(setting, "nothing", "a folder", f"Add {setting}=PATH to the command.")
    if DATASET_FILE in names(working_folder(config.run.dir)):
        raise UserError("run.dir", f"{config.run.dir}, a dataset", "a folder of its own", "Choose another.")
    weights = [weight for _, weight in config.data.mixture]
    train, val = open_data(config, check_files)
    batch = config.train.global_batch
    check_batch(config, len(train), world_size)
    train.check_cache(config.data.streams, config.data.window, int(config.data.cache_gb * 1e9))
    unit = 2 if config.augment.mixes else 1
    most = batch if config.engine.micro_batch == "auto" else config.engine.micro_batch
    if most < unit:
        raise UserError("engine.micro_batch", config.engine.micro_batch, "at least the 2 images that mix", "Raise it.")
    try:
        sequence = Order(
            train.sizes,
            weights,
            seed=config.run.seed,
            streams=config.data.streams,
            window=config.data.window,
            size=batch,
        )
    except ValueError as error:
        raise UserError("data.train", error, "at least one sample of each in a batch", "Raise its weight.") from error
    model = config.model.resolve(len(train.classes))
    steps, within = durations(config, len(train))
    fingerprint = train.fingerprint
    if len(weights) > 1:
        fingerprint = hashlib.sha256(f"{fingerprint} {weights}".encode()).hexdigest()
    check_optimizer(config)
    check_loss(config.objective.loss, train.multi)
    require_wandb(config.run.wandb)
    check_finetune(config, model)
    resume, _ = find_resume(config, fingerprint, force=force)
    source = open_source(config) if config.init_from and not resume else None
    if source:
        check_source(model, source)
    model = placed(model, resume, source)
    preprocess = Preprocess(model.img_size, config.augment.eval_crop, **normalisation(resume, source))
    micro_batch = order.micro_batch_size(batch, world_size, most, unit)
    return Plan(
        config=config,
        loader=LoaderSettings(micro_batch, config.data.workers, unit == 2, config.data.on_error == "skip"),
        train=train,
        order=sequence,
        fingerprint=fingerprint,
        val=val,
        model=model,
        preprocess=preprocess,
        steps=steps,
        warmup=within("schedule.warmup", config.schedule.warmup),
        cooldown=within("schedule.cooldown", config.schedule.cooldown),
        save_every=within("checkpoint.every", config.checkpoint.every),
        keep_every=within("checkpoint.keep_every", config.checkpoint.keep_every),
        eval_every=evaluation_steps(config, val, within("eval.every", config.eval.every)),
        suites=during.planned(
            config,
            model,
            preprocess,
            train,
            val,
            lambda path, setting: open_store(path, setting, config, check_files),
            within("eval.suites_every", config.eval.suites_every),
        ),
        force=force,
    )


def durations(config: Config, images: int) -> tuple[int, Callable[[str, str], int]]:
    """Steps of a run on so many images, and what gives those of another of its settings, by name and text.

    Raises `UserError` for less than a step.
    """
    lengths = {"samples": images, "global_batch": config.train.global_batch}
    steps = parse_duration(config.train.duration, "train.duration", **lengths)
    if steps < 1:
        raise UserError("train.duration", repr(config.train.duration), "at least one step", "Make it longer.")
    return steps, lambda setting, text: parse_duration(text, setting, **lengths, total=steps)


def peaks(steps: int, warmup: int, cooldown: int) -> bool:
    """Whether the rate gets to `optim.lr`, which is that of warm-up's last step and of cool-down's first."""
    return max(warmup, 1) + max(cooldown, 1) <= steps + 1


def check_batch(config: Config, images: int, ranks: int) -> None:
    """Raise `UserError` for a global batch that leaves a rank without an image, or is more than there are."""
    batch = config.train.global_batch
    if batch < ranks:
        remedy = "Raise it, or start fewer processes."
        raise UserError("train.global_batch", f"{batch} for {ranks} ranks", "at least one image a rank", remedy)
    if batch > images:
        beside = " beside those of data.dev" if config.data.dev else ""
        raise UserError("train.global_batch", batch, f"at most the {images} training images{beside}", "Lower it.")


def check_optimizer(config: Config) -> None:
    """Raise `UserError` for an optimizer that ZeRO would make another one of."""
    if config.optim.name in STAGE_0_OPTIMIZERS and config.engine.zero_stage:
        got = f"{config.optim.name} with engine.zero_stage {config.engine.zero_stage}"
        reason = "a ZeRO stage at which it is what it is without: it works on whole matrices, ZeRO on slices of vectors"
        raise UserError("optim.name", got, reason, "Set engine.zero_stage=0, or choose adamw, sgd, lion or lamb.")


def open_data(config: Config, check_files: bool) -> tuple[Store, Store | None]:
    """What is trained on, and what is evaluated on, if anything: `data.val`, or what `data.dev` holds out.

    Raises `UserError` where the two do not fit together.
    """
    train = open_store([path for path, _ in config.data.mixture], "data.train", config, check_files)
    val = open_store(config.data.val, "data.val", config, check_files) if config.data.val else None
    if val is not None:
        check_classes("data.val", val.classes, "data.train", train.classes)
        if val.multi != train.multi:
            got = "several labels an image" if val.multi else "one label an image"
            raise UserError("data.val", got, "labels of the kind of data.train", "Use a dataset made like it.")
        check_images(val, "data.val")
    return split(train, config.data.dev_share) if config.data.dev else (train, val)


def open_store(paths: str | list[str], setting: str, config: Config, check_files: bool) -> Store:
    """A dataset, or several, that `setting` names; shards out of an object store are held as `data.cache` says."""
    cache = CacheSettings(Path(config.data.cache), int(config.data.cache_gb * 1e9)) if config.data.cache else None
    return Store(paths, setting, cache, check_files and config.data.on_error == "stop")


def evaluation_steps(config: Config, val: Store | None, every: int) -> int:
    """`every`, the steps from one evaluation to the next. Raises `UserError` for a patience that would never end."""
    patience = config.eval.patience
    if patience and val is None:
        expected = "images to evaluate on"
        raise UserError("eval.patience", f"{patience} without data.dev or data.val", expected, "Add data.dev=2%, say.")
    if patience and not every:
        raise UserError("eval.patience", f"{patience} with eval.every 0", "evaluations on the way", "Set eval.every.")
    return every


def placed(model: Any, resume: Path | None, source: Trained | None) -> Any:
    """The architecture with fixed positions between those of the run that goes on, or of the weights that it starts
    from."""
    theirs: Any = from_dict(checkpoint.read_state(resume)["model"]) if resume else source.model if source else None
    fixed = theirs and isinstance(model, ViTConfig) and model.positions == "sincos2d"
    return replace(model, sincos_grid=theirs.placed_grid) if fixed else model


def normalisation(resume: Path | None, source: Trained | None) -> dict[str, Any]:
    """`mean` and `std` of `Preprocess`: those of the run that goes on, or of the weights that it starts from."""
    found = checkpoint.read_state(resume)["preprocess"] if resume else vars(source.preprocess) if source else {}
    return {key: tuple(found[key]) for key in ("mean", "std") if key in found}


def find_resume(
    config: Config, fingerprint: str, world: World | None = None, force: bool = False
) -> tuple[Path | None, list[str]]:
    """The checkpoint that the run's folder goes on from, if any, and a warning for each damaged one passed over.

    With `world` every rank calls it, all get the same answer, and the contents of its files are checked too.
    Raises `UserError` if that run was of another recipe or other data; with `force` only where its weights do not fit.
    """
    newest, warnings = checkpoint.newest_sound(working_folder(config.run.dir) / "checkpoints", world)
    if newest is None:
        return None, warnings
    state = checkpoint.read_state(newest)
    before, now = flatten(complete(state["recipe"])), flatten(to_dict(config))
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(HARMLESS)]
    if force:
        changed = [key for key in changed if key.startswith(FIXED)]
    if changed:
        rows = ", ".join(f"{key}: {before.get(key)!r} → {now[key]!r}" for key in changed[:4])
        remedy = "Choose another run.dir, or undo these changes."
        remedy += "" if force else " `--force` goes on all the same, where the weights fit."
        raise UserError(
            "run.dir", f"{shown(newest)} of another recipe ({rows})", "the recipe that began the run", remedy
        )
    if force:
        return newest, warnings
    if state["dataset"].get("order") != order.VERSION:
        got = f"{shown(newest)}, begun by a vitscale that went through the data in another order"
        raise UserError("run.dir", got, "a run of this version", "Choose another run.dir, or use that vitscale.")
    if state["dataset"]["fingerprint"] != fingerprint:
        remedy = "Choose another run.dir, or give the data that it began with."
        raise UserError(
            "data.train", f"{config.data.train}, not the data of {shown(newest)}", "the same samples", remedy
        )
    return newest, warnings


def complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a checkpoint, with the defaults of settings that came later."""
    return merge(to_dict(Config()), recipe)


def recipe_hash(config: Config) -> str:
    """sha256 of the settings that a run cannot change in mid-course."""
    rows = {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith(HARMLESS)}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
