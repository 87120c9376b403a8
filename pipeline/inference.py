"""A trained classifier in Python and at the command line: `vitscale.load(path).predict(files)`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vitscale.data_prep.decode import ImageRejected, decode_rgb
from vitscale.errors import UserError
from vitscale.pipeline.data.augment import Pixels, normalise
from vitscale.pipeline.weights import Trained, open_trained


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

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Pixels]) -> torch.Tensor:
        """Class probabilities (B, K) of decoded images, uint8 arrays (Y, X, 3) of any size."""
        pixels = torch.from_numpy(np.stack([self.preprocess.view(image) for image in images])).to(self.device)
        return self.network(normalise(pixels, self.preprocess)).softmax(dim=1).cpu()

    def predict(self, files: Iterable[str | Path], top: int = 5) -> list[Prediction]:
        """The `top` classes of each image file. Raises `UserError` naming a file that is missing or no image."""
        predictions = []
        for file in files:
            values, labels = self.probabilities([read_image(file)])[0].topk(min(top, len(self.classes)))
            predictions.append(Prediction([self.classes[label] for label in labels.tolist()], values.tolist()))
        return predictions


def load(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier in an export, a checkpoint or a run's folder. Raises `UserError` if there is none."""
    return Classifier(open_trained(str(path), "path"), device)


def read_image(file: str | Path) -> Pixels:
    """An image file as upright RGB (Y, X, 3). Raises `UserError` if it is missing or no image."""
    try:
        return decode_rgb(Path(file).read_bytes())
    except OSError as error:
        raise UserError("FILES", f"{file}: {error.strerror}", "an image file", "Check the path.") from error
    except ImageRejected as reason:
        raise UserError("FILES", f"{file}: {reason}", "an image file", "Leave it out.") from reason
