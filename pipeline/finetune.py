"""Starting from trained weights: another resolution, another set of classes, and what of the weights is trained."""

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.errors import UserError
from vitscale.model.adapt import adapt_weights
from vitscale.model.build import build_network
from vitscale.model.config import ArchitectureConfig, MixerConfig, in_pixels
from vitscale.model.flops import training_flops
from vitscale.model.interop.maps import our_shapes
from vitscale.model.lora import DOWN, UP, add_lora, targets
from vitscale.model.network import HEAD, Network
from vitscale.pipeline.config import Config, FinetuneConfig
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.engine import Weights
from vitscale.pipeline.optim import layers_of
from vitscale.pipeline.weights import Trained, check_kind, open_trained

# settings of a network that may differ from the trained one's: the weights are adapted, or do not depend on them
ADAPTED = {
    "img_size", "patch_size", "window", "num_classes", "pre_logits", "head_bias", "dropout", "drop_path", "patch_drop",
    "antialias", "sincos_grid",
}  # fmt: skip
PLAIN = (0.5, 0.5, 0.5)  # mean and deviation of values that were brought to [-1, 1]


# Where the weights come from


def open_source(config: Config, find: Callable[..., Trained] = open_trained) -> Trained:
    """The trained weights that `init_from` names, of a run those that `finetune.weights` says.

    `find` is `open_trained`, or for all ranks together `open_trained_alike`. Raises `UserError` as it does.
    """
    wanted = config.finetune.weights
    trained = find(config.init_from, "init_from", wanted)
    check_kind(trained, wanted, "finetune.weights")
    return trained


def check_source(ours: ArchitectureConfig, trained: Trained) -> None:
    """Raise `UserError` if a network of the architecture `ours` cannot begin with these weights. Reads no weights."""
    check_architecture(ours, trained)
    _adapt(ours, our_shapes(ours), trained)


def fine_tuned_weights(
    ours: ArchitectureConfig, shapes: dict[str, tuple[int, ...]], trained: Trained, fresh: Weights
) -> tuple[Weights, list[str]]:
    """The weights of a network of these `shapes` to begin fine-tuning with: the trained ones, positions interpolated to
    its grid, and a `fresh` zero-initialised head; what LoRA adds is fresh too.

    Returns also a line for each thing that was not kept as it is. Raises `UserError` if the architectures differ.
    """
    check_architecture(ours, trained)
    plain = {name: shape for name, shape in shapes.items() if not name.endswith((DOWN, UP))}
    kept, read, notes = _adapt(ours, plain, trained)
    return (
        lambda name: read(name) if name in kept else fresh(name),
        [*trained.notes, f"kept {len(kept)} tensors of {trained.path}", *notes],
    )


def _adapt(
    ours: ArchitectureConfig, shapes: dict[str, tuple[int, ...]], trained: Trained
) -> tuple[set[str], Weights, list[str]]:
    tensors = trained.open()
    try:
        return adapt_weights(tensors.shapes, tensors.read, trained.model.grid, ours, shapes)
    except ValueError as error:
        got, expected = f"{trained.path}: {error}", "weights of its architecture"
        raise UserError("init_from", got, expected, "Use another.") from error


def check_architecture(ours: ArchitectureConfig, trained: Trained) -> None:
    """Raise `UserError` if `trained` differs from the architecture `ours` in what weights cannot be adapted to."""
    theirs: Any = trained.model
    remedy = "Set model.name to an architecture of its family, or choose another checkpoint."
    if ours.family != theirs.family:
        got, expected = f"{trained.path}, a {theirs.family}", f"the recipe's architecture, a {ours.family}"
        raise UserError("init_from", got, expected, remedy)
    if isinstance(ours, MixerConfig) and ours.grid != theirs.grid:
        got = f"{in_pixels(ours.img_size)} with weights for {in_pixels(theirs.img_size)}"
        rows, columns = theirs.grid
        expected = f"the {rows}×{columns} patches to which an MLP-Mixer's weights between tokens are tied"
        size = [rows * ours.patch_size, columns * ours.patch_size] if rows != columns else rows * ours.patch_size
        raise UserError("model.img_size", got, expected, f"Set model.img_size={size}, or take another architecture.")
    names = [field.name for field in fields(ours) if field.name not in ADAPTED]
    names = [name for name in names if _shaping(ours, name) != _shaping(theirs, name)]
    if names:
        got = ", ".join(f"{name} {getattr(theirs, name)}" for name in names)
        expected = ", ".join(f"{name} {getattr(ours, name)}" for name in names)
        settings = " ".join(f"model.{name}={_written(getattr(theirs, name))}" for name in names)
        remedy = f"Add {settings}, or choose another checkpoint."
        raise UserError("init_from", f"{trained.path} with {got}", f"the recipe's architecture, {expected}", remedy)


def _shaping(config: Any, name: str) -> Any:
    """A setting as it shapes the network: of `layer_scale` whether there is one, since its value is where it began."""
    value = getattr(config, name)
    return value > 0 if name == "layer_scale" else value


def _written(value: Any) -> str:
    """A setting's value as it is typed at a command."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'[{','.join(map(str, value))}]'" if isinstance(value, tuple) else str(value)


# What is trained


def check_finetune(config: Config, model: ArchitectureConfig) -> None:
    """Raise `UserError` for freezing or LoRA without trained weights, or that does not fit the architecture."""
    for key in ("freeze", "lora_rank", "weights"):
        value = getattr(config.finetune, key)
        if value not in (0, "auto") and not config.init_from:
            got, expected = f"{value} without init_from", "init_from, whose weights are kept"
            raise UserError(f"finetune.{key}", got, expected, "Add init_from=PATH, or take it out.")
    check_trained(config, model)


def check_trained(config: Config, model: ArchitectureConfig) -> None:
    """Raise `UserError` for more frozen blocks than there are, or LoRA where there is nothing to add to."""
    chosen = config.finetune
    if chosen.freeze != "all" and chosen.freeze > model.depth:
        remedy = "Lower it; `all` leaves the head alone to be trained."
        expected = f"at most the {model.depth} that there are"
        raise UserError("finetune.freeze", f"{chosen.freeze} blocks", expected, remedy)
    if not chosen.lora_rank:
        return
    with torch.device("meta"):
        network = build_network(model, seed=None)
    sides = [min(linear.weight.shape) for *_, linear in targets(network, chosen.lora_on)]
    if not sides:
        everywhere = any(True for _ in targets(network, "all"))
        got = f"{chosen.lora_on} for {config.model.name}, whose blocks have none of that kind"
        remedy = "Set finetune.lora_on=all." if everywhere else "Use finetune.freeze, or another architecture."
        raise UserError("finetune.lora_on", got, "linear layers to add to", remedy)
    if chosen.lora_rank >= min(sides):
        got = f"{chosen.lora_rank} for matrices of {min(sides)} rows or columns"
        raise UserError("finetune.lora_rank", got, "a lower rank than theirs", "Often 8; 0 trains all weights.")


def choose_trained(network: Network, config: FinetuneConfig) -> None:
    """Add LoRA's matrices to a network, and have what keeps its weights require no gradient."""
    if config.lora_rank:
        add_lora(network, config.lora_rank, config.lora_alpha, config.lora_on)
    layers, _ = layers_of([name for name, _ in network.named_parameters()])
    for name, parameter in network.named_parameters():
        if config.lora_rank:
            trained = name.endswith((DOWN, UP))
        else:
            trained = not config.freeze or (config.freeze != "all" and layers[name] > config.freeze)
        if not trained and not name.startswith(HEAD):
            parameter.requires_grad_(False)


@lru_cache(maxsize=64)
def image_flops(model: ArchitectureConfig, config: FinetuneConfig) -> int:
    """Floating-point operations of training on one image: `training_flops`, less the gradients that nobody asks for."""
    if not config.freeze and not config.lora_rank:
        return training_flops(model)
    with torch.device("meta"):
        network = build_network(model, seed=None).eval()
        choose_trained(network, config)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, *model.height_width)).sum().backward()
    return counter.get_total_flops()


def beginning(config: FinetuneConfig, model: ArchitectureConfig, preprocess: Preprocess) -> list[str]:
    """What to say at the start besides what was kept: what is trained, and an unusual normalisation."""
    said = []
    if config.freeze == "all":
        said.append("frozen: all but the head")
    elif config.freeze:
        said.append(f"frozen: what makes tokens of images, and the first {config.freeze} of {model.depth} blocks")
    if config.lora_rank:
        what = "attention's matrices" if config.lora_on == "attention" else "all matrices"
        said.append(
            f"LoRA of rank {config.lora_rank}, times {config.lora_alpha / config.lora_rank:g}, on {what} of the blocks;"
            " frozen: all else but the head"
        )
    if (preprocess.mean, preprocess.std) != (PLAIN, PLAIN):
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocess.mean, preprocess.std))
        said.append(f"images are normalised by mean {mean} and deviation {std}, as for the weights it starts from")
    return said
