"""vitscale: from a pile of images to a trained, checked and exported Vision Transformer.

    import vitscale
    classifier = vitscale.load("runs/a/export")
    classifier.predict(["cat.jpg"])

Names are imported when first used, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitscale.errors import UserError

if TYPE_CHECKING:
    from vitscale.model.build import create_model
    from vitscale.model.registry import list_models
    from vitscale.pipeline.inference import Classifier, Prediction, load

__all__ = ["Classifier", "Prediction", "UserError", "create_model", "list_models", "load"]

_HOMES = {
    "Classifier": "pipeline.inference",
    "Prediction": "pipeline.inference",
    "create_model": "model.build",
    "list_models": "model.registry",
    "load": "pipeline.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitscale' has no attribute {name!r}")
    return getattr(import_module(f"vitscale.{_HOMES[name]}"), name)
