"""Starting from trained weights: another resolution, another set of classes."""

from dataclasses import fields
from typing import Any

from vitscale.errors import UserError
from vitscale.model.adapt import adapt_weights
from vitscale.model.config import ArchitectureConfig
from vitscale.pipeline.engine import Weights
from vitscale.pipeline.weights import Trained

# settings of a network that may differ from the trained one's: the weights are adapted, or do not depend on them
ADAPTED = {
    "img_size", "patch_size", "window", "num_classes", "pre_logits", "head_bias", "dropout", "drop_path", "patch_drop",
    "antialias",
}  # fmt: skip


def fine_tuned_weights(
    ours: ArchitectureConfig, shapes: dict[str, tuple[int, ...]], trained: Trained, fresh: Weights
) -> tuple[Weights, list[str]]:
    """The weights of a network of these `shapes` to begin fine-tuning with: the trained ones, positions interpolated to
    its grid, and a `fresh` zero-initialised head.

    Returns also a line for each thing that was not kept as it is. Raises `UserError` if the architectures differ.
    """
    check_architecture(ours, trained)
    tensors = trained.open()
    try:
        kept, read, notes = adapt_weights(tensors.shapes, tensors.read, ours, shapes)
    except ValueError as error:
        raise UserError(
            "init_from", f"{trained.path}: {error}", "weights of its architecture", "Use another."
        ) from error
    return (
        lambda name: read(name) if name in kept else fresh(name),
        [*trained.notes, f"kept {len(kept)} tensors of {trained.path}", *notes],
    )


def check_architecture(ours: ArchitectureConfig, trained: Trained) -> None:
    """Raise `UserError` if `trained` differs from the architecture `ours` in what weights cannot be adapted to."""
    theirs: Any = trained.model
    remedy = "Set model.name to an architecture of its family, or choose another checkpoint."
    if ours.family != theirs.family:
        got, expected = f"{trained.path}, a {theirs.family}", f"the recipe's architecture, a {ours.family}"
        raise UserError("init_from", got, expected, remedy)
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
