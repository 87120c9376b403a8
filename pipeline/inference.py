"""A trained classifier in Python and at the command line: `vitscale.load(path).predict(files)`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitscale.data_prep.decode import ImageRejected
from vitscale.errors import UserError
from vitscale.model.config import height_width
from vitscale.pipeline.data.augment import Pixels, normalise
from vitscale.pipeline.image_files import read_image
from vitscale.pipeline.weights import Trained, open_trained

TOGETHER = 32  # images of one forward


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first first: names and probabilities."""

    classes: list[str]
    probabilities: list[float]


class Classifier:
    """A network with its classes and preprocessing. `load` makes one."""

    def __init__(self, trained: Trained, device: torch.device | str = "cpu") -> None:
        self.classes, self.preprocess = trained.classes, trained.preprocess
        self.device = torch.device(device)
        self.network = trained.load().to(self.device)

    def probabilities(self, images: Sequence[Pixels]) -> torch.Tensor:
        """Class probabilities (B, K) of decoded images, uint8 arrays (Y, X, 3) of any size.

        Raises `UserError` for those that are not finite, as do all that follow.
        """
        return self.probabilities_of(self._views(images))

    @torch.inference_mode()
    def probabilities_of(self, pixels: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, K), on the CPU, of model input, uint8 (B, Y, X, 3)."""
        found_BK = self.network(normalise(pixels.to(self.device), self.preprocess)).softmax(dim=1).cpu()
        check_finite(found_BK, "probabilities that are not finite")
        return found_BK

    @torch.inference_mode()
    def features_of(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the classifier sees (B, D), on the CPU, of model input, uint8 (B, Y, X, 3)."""
        images_BCYX = normalise(pixels.to(self.device), self.preprocess)
        return self.network.representation(self.network.forward_features(images_BCYX)).float().cpu()

    def predict(self, files: str | Path | Iterable[str | Path], top: int = 5) -> list[Prediction]:
        """The `top` classes of each image file, or of one. Raises `UserError` naming what is missing or no image."""
        predictions = []
        for file in _paths(files):
            values, labels = self.probabilities([_read(file)])[0].topk(min(top, len(self.classes)))
            predictions.append(Prediction([self.classes[label] for label in labels.tolist()], values.tolist()))
        return predictions

    def embed(self, files: str | Path | Iterable[str | Path]) -> torch.Tensor:
        """Features (B, D) of image files, or of one, float32: what the classifier sees of each.

        Raises `UserError` naming a file that is missing or no image.
        """
        names = _paths(files)
        features_BD = torch.empty(len(names), self.width())
        for first in range(0, len(names), TOGETHER):
            some = [_read(file) for file in names[first : first + TOGETHER]]
            features_BD[first : first + TOGETHER] = self.features_of(self._views(some))
        check_finite(features_BD, "features that are not finite")
        return features_BD

    def width(self) -> int:
        """D of features."""
        return self.features_of(torch.zeros(1, *height_width(self.preprocess.img_size), 3, dtype=torch.uint8)).shape[1]

    def _views(self, images: Sequence[Pixels]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.preprocess.view(image) for image in images]))


def load(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier in an export, a checkpoint or a run's folder. Raises `UserError` if there is none."""
    return Classifier(open_trained(str(path), "path"), device)


def check_finite(values: torch.Tensor, got: str) -> None:
    """Raise `UserError` for a network whose values are not finite."""
    if not values.isfinite().all():
        raise UserError("CHECKPOINT", got, "finite ones", "Use another checkpoint of the run.")


def _paths(files: Any) -> list[str | Path]:
    """A path, or some of them, as a list. Raises `UserError` for what is none."""
    several = isinstance(files, Iterable) and not isinstance(files, str | bytes | Path)
    names: list[Any] = list(files) if several else [files]
    for name in names:
        if not isinstance(name, str | Path):
            raise UserError("FILES", f"{type(name).__name__} {name!r}"[:80], "paths of image files", "Pass a path.")
    return names


def _read(file: str | Path) -> Pixels:
    try:
        return read_image(file)
    except OSError as error:
        raise UserError("FILES", f"{file}: {error.strerror}", "an image file", "Check the path.") from error
    except ImageRejected as reason:
        raise UserError("FILES", f"{file}: {reason}", "an image file", "Leave it out.") from reason
