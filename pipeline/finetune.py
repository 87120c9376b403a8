"""Starting from trained weights: another resolution, another set of classes."""

from vitscale.errors import UserError
from vitscale.model.registry import ViTConfig
from vitscale.model.vit import VisionTransformer, adapt_weights
from vitscale.pipeline.weights import Trained


def initialise_from(network: VisionTransformer, trained: Trained) -> list[str]:
    """Load trained weights into `network`: positions interpolated to its grid, its own zero-initialised head kept.

    Returns a line for each thing that was not kept as it is. Raises `UserError` if the architectures differ.
    """
    check_architecture(network.config, trained)
    weights, notes = adapt_weights(dict(trained.tensors()), network)
    network.load_state_dict(weights, strict=False)
    return [f"kept {len(weights)} tensors of {trained.path}", *notes]


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
