"""Starting from trained weights: another resolution, another set of classes."""

from vitscale.errors import UserError
from vitscale.model.registry import ViTConfig
from vitscale.model.vit import adapt_weights
from vitscale.pipeline.engine import Weights
from vitscale.pipeline.weights import Trained


def fine_tuned_weights(
    ours: ViTConfig, shapes: dict[str, tuple[int, ...]], trained: Trained, fresh: Weights
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
        [f"kept {len(kept)} tensors of {trained.path}", *notes],
    )


def check_architecture(ours: ViTConfig, trained: Trained) -> None:
    """Raise `UserError` if `trained` differs from the architecture `ours` in more than resolution, head and dropout."""
    theirs = trained.model
    for key in ("patch_size", "depth", "width", "mlp_width", "heads"):
        if getattr(ours, key) != getattr(theirs, key):
            raise UserError(
                "init_from",
                f"{trained.path} with {key} {getattr(theirs, key)}",
                f"the recipe's architecture, {key} {getattr(ours, key)}",
                f"Set model.{key}={getattr(theirs, key)}, or choose another checkpoint.",
            )
