"""Settings of training: one dataclass a section. Imports no torch, so that `--help` and refusals come at once."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vitscale.errors import UserError
from vitscale.model.registry import ModelConfig
from vitscale.pipeline.schedule import KINDS

OPTIMIZERS = ("adamw", "sgd", "lion", "lamb", "adafactor", "muon")
STAGE_0_OPTIMIZERS = ("adafactor", "muon")
DEEPSPEED_OWNED = {  # keys of DeepSpeed's configuration that the recipe's own settings decide
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization.stage", "bf16", "fp16.enabled", "torch_autocast", "data_types", "optimizer", "scheduler",
}  # fmt: skip


def require(condition: bool, setting: str, got: object, expected: str, remedy: str) -> None:
    """Raise `UserError` unless `condition` holds."""
    if not condition:
        raise UserError(setting, got, expected, remedy)


def require_choice(setting: str, got: str, choices: Iterable[str]) -> None:
    """Raise `UserError` unless `got` is one of `choices`, suggesting the nearest."""
    names = list(choices)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
    require(got in names, setting, repr(got), "one of " + ", ".join(names), hint)


@dataclass(frozen=True)
class RunConfig:
    """`run:` – where it is written, the seed of weights, data order and augmentation, and how often it is logged.

    `dir`: a folder, or a URL of an object store. `wandb`: the project of Weights & Biases to log to as well.
    """

    dir: str = ""
    seed: int = 0
    log_every: int = 10
    wandb: str = ""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "a whole number from 0 to 2147483647", "Choose another.")
        require(self.log_every > 0, "run.log_every", self.log_every, "at least 1 step", "Set it to 10, say.")


@dataclass(frozen=True)
class DataConfig:
    """`data:` – folders that `vitscale shard` wrote, and loader processes per rank (0: load in the rank itself).

    `train`: a folder, or a list of `{path: FOLDER, weight: SHARE}` to mix. The order of an epoch deals the shards to
    `streams` and shuffles within `window` samples of each: so many samples are in use at a time, which bounds what has
    to be held. `cache`: a folder on a local disk for shards out of an object store, up to `cache_gb` GB of them.
    `on_error`: `stop` at a sample that cannot be read, or `skip` to take the next one instead, and count it.
    `dev`: a share such as `2%` of the training images, always the same ones, that are not trained on: what `val` would
    be is measured on them, and `val` is not looked at.
    """

    train: Any = ""
    val: str = ""
    workers: int = 2
    streams: int = 16
    window: int = 65536
    on_error: str = "stop"
    cache: str = ""
    cache_gb: float = 100.0
    dev: str = ""

    def __post_init__(self) -> None:
        _ = self.dev_share
        require(self.workers >= 0, "data.workers", self.workers, "at least 0 processes", "Set it to 2, say.")
        require_choice("data.on_error", self.on_error, ("stop", "skip"))
        for key in ("streams", "window"):
            value = getattr(self, key)
            require(0 < value < 2**40, f"data.{key}", value, "at least 1", "Leave it at its default.")
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "a number of GB above 0", "100, say.")
        _ = self.mixture

    @property
    def dev_share(self) -> float:
        """The share of the training images that `dev` holds out, 0 for none."""
        if not self.dev:
            return 0.0
        try:
            share = float(self.dev.removesuffix("%")) / 100 if self.dev.endswith("%") else math.nan
        except ValueError:
            share = math.nan
        require(0 < share < 1, "data.dev", repr(self.dev), "a share such as 2%", "Leave it empty to hold out none.")
        return share

    @property
    def mixture(self) -> list[tuple[str, float]]:
        """Path and weight of each dataset of `train`; none where it is empty."""
        expected = "a folder, or a list of {path: FOLDER, weight: SHARE}"
        remedy = "For one folder: data.train=FOLDER."
        if isinstance(self.train, str):
            return [(self.train, 1.0)] if self.train else []
        sets = self.train if isinstance(self.train, list) else [None]
        for each in sets:
            sound = isinstance(each, dict) and set(each) <= {"path", "weight"} and isinstance(each.get("path"), str)
            weight = each.get("weight", 1.0) if isinstance(each, dict) else None
            sound = sound and isinstance(weight, int | float) and 0 < weight < float("inf")
            require(sound and bool(each["path"]), "data.train", self.train, expected, remedy)
        return [(each["path"], float(each.get("weight", 1.0))) for each in sets]


@dataclass(frozen=True)
class AugmentConfig:
    """`augment:` – how a training image becomes one of `model.img_size` px.

    `crop`: `resized` takes a random part of `scale_min` to 1 of the area and resizes it (Szegedy et al. 2015);
    `shift` resizes the whole image and moves it by up to `shift` of a side, edges repeated; `none` only resizes.
    `flip` mirrors every second image. `eval_crop` is the share of the shorter side kept in evaluation.

    Then, on the device: `randaugment_ops` operations an image at `randaugment_magnitude` of 10 (RandAugment, Cubuk et
    al. 2020; DeiT: 2 at 9), a rectangle of noise with probability `erase` (Zhong et al. 2017; DeiT: 0.25), and pairs
    mixed by λ ~ Beta(α, α), whole with α = `mixup` (Zhang et al. 2018; DeiT: 0.8) or a part with α = `cutmix` (Yun et
    al. 2019; DeiT: 1); with both, either at random. 0 turns each off.
    """

    crop: str = "resized"
    scale_min: float = 0.05
    shift: float = 0.125
    flip: bool = True
    eval_crop: float = 0.875
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        require_choice("augment.crop", self.crop, ("resized", "shift", "none"))
        for key in ("scale_min", "eval_crop"):
            value = getattr(self, key)
            require(0 < value <= 1, f"augment.{key}", value, "a share in (0, 1]", "1 keeps the whole image.")
        require(0 <= self.shift < 1, "augment.shift", self.shift, "a share in [0, 1)", "0.125 is 4 px of 32.")
        ops, magnitude = self.randaugment_ops, self.randaugment_magnitude
        require(ops >= 0, "augment.randaugment_ops", ops, "at least 0 operations", "Often 2.")
        require(0 <= magnitude <= 10, "augment.randaugment_magnitude", magnitude, "from 0 to 10", "Often 9.")
        require(0 <= self.erase <= 1, "augment.erase", self.erase, "a probability in [0, 1]", "Often 0.25.")
        for key, usual in (("mixup", "0.2 or 0.8"), ("cutmix", "1")):
            value = getattr(self, key)
            require(0 <= value < 1e6, f"augment.{key}", value, "from 0 to 1e6", f"Often {usual}; 0 turns it off.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class ObjectiveConfig:
    """`objective:` – what is learnt: classes, with `label_smoothing`.

    `loss`: `softmax` cross-entropy, or `sigmoid`, binary cross-entropy summed over the classes (Beyer et al. 2020; for
    datasets with several labels an image, and DeiT III).
    """

    name: str = "supervised"
    loss: str = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_choice("objective.name", self.name, ("supervised",))
        require_choice("objective.loss", self.loss, ("softmax", "sigmoid"))
        value = self.label_smoothing
        require(0 <= value < 1, "objective.label_smoothing", value, "a share in [0, 1)", "Often 0.1.")


@dataclass(frozen=True)
class OptimConfig:
    """`optim:` – the optimizer at peak rate `lr`; `clip` bounds the global norm of the gradient (0: no bound).

    `name`: `adamw`, `sgd` (with `momentum`), `lion` or `lamb`; at ZeRO stage 0 also `adafactor` (that of Zhai et al.
    2022, with `beta1` for its momentum) and `muon` (`momentum` 0.95 for the blocks' matrices). Norms, biases, positions
    and tokens are never decayed, the classifier by `head_weight_decay` where that is set. `layer_decay` multiplies the
    rate once more for every block further from the head (Bao et al. 2021). `ema` is the decay of a Polyak average of
    the weights, which is then evaluated and exported (0: none). The decay of `sgd` is part of its gradient; `lion`
    usually has `beta2` 0.99 and a third to a tenth of AdamW's rate.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    head_weight_decay: float | None = None
    layer_decay: float = 1.0
    clip: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        require_choice("optim.name", self.name, OPTIMIZERS)
        require(self.lr > 0, "optim.lr", self.lr, "a number above 0", "The paper uses 3e-4 to 3e-3.")
        for key in ("beta1", "beta2", "momentum", "ema"):
            require(0 <= getattr(self, key) < 1, f"optim.{key}", getattr(self, key), "in [0, 1)", "Often 0.9, 0.999.")
        require(self.eps > 0, "optim.eps", self.eps, "a number above 0", "Often 1e-8.")  # else zero gradients give nan
        for key in ("weight_decay", "clip"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "at least 0", "0 turns it off.")
        head = self.head_weight_decay
        require(head is None or head >= 0, "optim.head_weight_decay", head, "at least 0, or null", "null: as others.")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in (0, 1]", "Often 0.75; 1: none.")


@dataclass(frozen=True)
class ScheduleConfig:
    """`schedule:` – the learning rate over the steps.

    `kind`: `cosine`, `linear`, `rsqrt` (with `timescale` steps) or `constant`, after a linear warm-up and with a linear
    cool-down. Durations are `500` steps, `5ep` epochs, `1e6ex` examples or `5%` of all steps.
    """

    kind: str = "cosine"
    warmup: str = "5%"
    cooldown: str = "0"
    timescale: int = 10_000

    def __post_init__(self) -> None:
        require_choice("schedule.kind", self.kind, KINDS)
        require(self.timescale > 0, "schedule.timescale", self.timescale, "at least 1 step", "Used by rsqrt only.")


@dataclass(frozen=True)
class TrainConfig:
    """`train:` – images of one optimizer step over all ranks, and how long to train (`500`, `90ep`, `1e6ex`)."""

    global_batch: int = 1024
    duration: str = "90ep"

    def __post_init__(self) -> None:
        require(self.global_batch > 0, "train.global_batch", self.global_batch, "at least 1 image", "Set a larger one.")


@dataclass(frozen=True)
class EngineConfig:
    """`engine:` – DeepSpeed. `micro_batch` images per rank and forward; the rest of the global batch accumulates.

    `micro_batch=auto` finds the largest that fits by trial. `device`: `auto` takes GPUs where there are any. `dtype`:
    `fp32`; `bf16` or `fp16` (weights in 16 bits, float32 masters; ZeRO stages 1 to 3; `fp16` with a dynamic loss
    scale). `tf32` lets GPUs round factors of float32 products to 10 bits. `offload` keeps the `optimizer` state, or
    `all` parameters as well (stage 3), in the host's memory; `auto` where the GPU's does not suffice. `recompute`
    keeps the `blocks`' inputs alone and computes the rest again in the backward pass, in every `recompute_every`-th
    block; `selective` keeps the results of their matrix products too. `compile`: by torch.compile.
    `deepspeed` is merged into DeepSpeed's own configuration.
    """

    device: str = "auto"
    zero_stage: int = 2
    dtype: str = "fp32"
    micro_batch: Any = 64
    tf32: bool = True
    offload: str = "auto"
    recompute: str = "none"
    recompute_every: int = 1
    compile: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("engine.device", self.device, ("auto", "cpu", "cuda"))
        require_choice("engine.dtype", self.dtype, ("fp32", "bf16", "fp16"))
        require_choice("engine.offload", self.offload, ("auto", "none", "optimizer", "all"))
        require_choice("engine.recompute", self.recompute, ("none", "blocks", "selective"))
        every = self.recompute_every
        require(every > 0, "engine.recompute_every", every, "at least 1 block", "1 recomputes every block.")
        require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "0, 1, 2 or 3", "2 is usual.")
        size = self.micro_batch
        whole = size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size > 0)
        require(whole, "engine.micro_batch", size, "at least 1 image, or auto", "Set a larger one.")
        require(
            self.dtype == "fp32" or self.zero_stage > 0,
            "engine.dtype",
            f"{self.dtype} with engine.zero_stage 0",
            "16 bits with ZeRO stage 1, 2 or 3, which keep float32 masters in named ranges",
            "Set engine.zero_stage=1.",
        )
        least = {"auto": 0, "none": 0, "optimizer": 1, "all": 3}[self.offload]
        require(
            self.zero_stage >= least,
            "engine.offload",
            f"{self.offload} with engine.zero_stage {self.zero_stage}",
            f"ZeRO stage {least} or more",
            f"Set engine.zero_stage={least}.",
        )
        for key in flatten(self.deepspeed):
            require(
                key not in DEEPSPEED_OWNED and key.split(".")[0] not in DEEPSPEED_OWNED,
                f"engine.deepspeed.{key}",
                "a value",
                "a setting of DeepSpeed that the recipe's own do not decide",
                "Take it out.",
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint:` – save every so often (a duration, `0` only at the end), keep the newest `keep`.

    `keep_every`: one of each so long duration is never removed (`0`: none). `background`: written while training goes
    on, from a copy in the host's memory.
    """

    every: str = "1ep"
    keep: int = 2
    keep_every: str = "0"
    background: bool = True

    def __post_init__(self) -> None:
        require(self.keep > 0, "checkpoint.keep", self.keep, "at least 1 checkpoint", "Set it to 2.")


@dataclass(frozen=True)
class GuardConfig:
    """`guard:` – what happens when training goes wrong.

    A step whose loss or gradient is not finite is not taken, and recorded in `incidents/` of the run's folder; nor is
    one whose loss exceeds `spike` times the median of the last 100 (0: off). After `patience` such steps in a row the
    run goes back to its last checkpoint and passes over the data that led there, `rollbacks` times at most, then stops.
    A step of more than `step_timeout` seconds ends the run, with the stacks of every rank in `hangs/` (0: off). Every
    `compare_every` steps the ranks compare their weights (0: never).
    """

    patience: int = 3
    rollbacks: int = 3
    spike: float = 0.0
    step_timeout: float = 1800.0
    compare_every: int = 1000

    def __post_init__(self) -> None:
        require(self.patience > 0, "guard.patience", self.patience, "at least 1 step", "3, say.")
        for key in ("rollbacks", "step_timeout", "compare_every"):
            require(getattr(self, key) >= 0, f"guard.{key}", getattr(self, key), "at least 0", "0 turns it off.")
        require(self.spike == 0 or self.spike > 1, "guard.spike", self.spike, "0, or a factor above 1", "3, say.")


@dataclass(frozen=True)
class ProfileConfig:
    """`profile:` – a trace for Chrome and a table of operators of some steps, such as `10-15` (the 15th excluded)."""

    steps: str = ""

    def __post_init__(self) -> None:
        _ = self.window

    @property
    def window(self) -> range:
        """The profiled steps, counted from 0; empty for none."""
        if not self.steps:
            return range(0)
        first, _, last = self.steps.partition("-")
        sound = first.isdecimal() and last.isdecimal() and int(first) < int(last)
        require(sound, "profile.steps", repr(self.steps), "FIRST-LAST in steps, such as 10-15", "Write it like that.")
        return range(int(first), int(last))


@dataclass(frozen=True)
class EvalConfig:
    """`eval:` – top-1 and top-5 on `data.val`, or `data.dev`, every so often (a duration; `0` only at the end).

    `patience`: training ends after so many evaluations in a row without a better one, and the best is what is used
    (0: it never ends early). `suites`: evaluations such as `knn,fewshot` of `vitscale evaluate --suite`, every
    `suites_every` (a duration; `0` only at the end), on `suites_data` (by default what is evaluated on), with training
    features from `suites_train` (by default `data.train`).
    """

    every: str = "5ep"
    patience: int = 0
    suites: str = ""
    suites_every: str = "0"
    suites_data: str = ""
    suites_train: str = ""

    def __post_init__(self) -> None:
        require(self.patience >= 0, "eval.patience", self.patience, "at least 0 evaluations", "0 turns it off.")


@dataclass(frozen=True)
class FinetuneConfig:
    """`finetune:` – what of the trained network changes. Used with `init_from` alone.

    `weights`: of a run, the last ones (`raw`), their Polyak average (`ema`), or that where there is one (`auto`).
    `freeze`: so many first blocks, and what makes tokens of images, keep their weights; `all` leaves the head alone to
    be trained. `lora_rank` above 0 trains, besides the head, products of two matrices of that rank that are added to
    the matrices of `lora_on`, the `attention` or `all` of each block, times `lora_alpha` / `lora_rank` (Hu et al. 2021,
    arXiv:2106.09685); exports have them added up.
    """

    weights: str = "auto"
    freeze: Any = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_on: str = "attention"

    def __post_init__(self) -> None:
        require_choice("finetune.weights", self.weights, ("auto", "raw", "ema"))
        whole = isinstance(self.freeze, int) and not isinstance(self.freeze, bool) and self.freeze >= 0
        require(self.freeze == "all" or whole, "finetune.freeze", self.freeze, "blocks, or all", "0 trains all.")
        require(self.lora_rank >= 0, "finetune.lora_rank", self.lora_rank, "at least 0", "Often 8; 0 turns it off.")
        require(0 < self.lora_alpha < 1e6, "finetune.lora_alpha", self.lora_alpha, "above 0, to 1e6", "Often 16.")
        require_choice("finetune.lora_on", self.lora_on, ("attention", "all"))
        require(
            not (self.lora_rank and self.freeze),
            "finetune.lora_rank",
            f"{self.lora_rank} with finetune.freeze {self.freeze}",
            "one of the two: LoRA keeps all weights of the blocks as they are",
            "Take one of them out.",
        )


@dataclass(frozen=True)
class Config:
    """A whole recipe. `init_from` is the checkpoint or export that fine-tuning starts from."""

    init_from: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of nested dicts; an empty dict within counts as a value."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return rows


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts merged key by key, `over` winning."""
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dicts of a config dataclass."""
    return dataclasses.asdict(config)


def explain(defaults: Any, prefix: str = "") -> str:
    """Every setting with its default, a line each, under what the docstring of its section says."""
    yaml_words = {"None": "null", "True": "true", "False": "false"}
    told = inspect.cleandoc(defaults.__doc__).split("Raises `UserError`")[0].rstrip()
    lines, sections = [told, ""], []
    for item in dataclasses.fields(defaults):
        value, key = getattr(defaults, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            sections.append(explain(value, f"{key}."))
        else:
            lines.append(f"  {key}={yaml_words.get(str(value), value)}")
    return "\n".join([*lines, "", *sections])
