"""Whether probabilities are what they say: calibration error and reliability (Guo et al. 2017, arXiv:1706.04599);
accuracy class by class; and accuracy against reassessed labels (Beyer et al. 2020, arXiv:2006.07159)."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitscale.data_prep.manifest import KEPT, MANIFEST, RECORDS, read_table
from vitscale.data_prep.publish import publish
from vitscale.data_prep.storage import open_folder
from vitscale.errors import UserError
from vitscale.pipeline.data.augment import key_number
from vitscale.pipeline.evaluation.bootstrap import Interval, interval
from vitscale.pipeline.evaluation.outcomes import Outcomes

BINS = 15
NUMBER = re.compile(r"(\d{8})\.\w+$")  # of ILSVRC2012_val_00000001.JPEG, the first of real.json
REMEDY = "Take real.json of google-research/reassessed-imagenet, or an object {key or name: [labels]}."


def calibration(outcomes: Outcomes, classes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield `top1`, `nll`, `brier`, `ece`, `mean_per_class`, `bin01_images`, …, and `class/NAME`, a class's accuracy.

    Arrays (N,) stand for their means. Of empty bins and of classes without images there is nothing.
    """
    right = (outcomes.best == outcomes.label).astype(np.float64)
    yield "top1", right
    yield "nll", outcomes.loss
    yield "brier", outcomes.brier
    yield "ece", ece_interval(outcomes.confidence, right)
    accuracy_K, images_K = per_class(outcomes.label, right, len(classes))
    yield "mean_per_class", float(np.mean(accuracy_K[images_K > 0]))
    table = reliability(outcomes.confidence, right)
    for number in np.flatnonzero(table.images):
        yield f"bin{number + 1:02d}_images", int(table.images[number])
        yield f"bin{number + 1:02d}_confidence", float(table.confidence[number])
        yield f"bin{number + 1:02d}_accuracy", float(table.accuracy[number])
    for number in np.flatnonzero(images_K):
        yield f"class/{classes[number]}", float(accuracy_K[number])


@dataclass(frozen=True)
class Reliability:
    """Of each bin of confidences the images in it, their mean confidence, and their accuracy; not a number if none."""

    images: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Σ |accuracy - confidence| · images / all images."""
        gaps = np.abs(self.accuracy - self.confidence) * self.images
        return float(np.nansum(gaps) / self.images.sum())


def bin_of(confidence: NDArray[np.float64], bins: int = BINS) -> NDArray[np.int64]:
    """The bin b of each confidence, b / bins < confidence ≤ (b + 1) / bins; the first one holds 0 as well."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")


def reliability(confidence: NDArray[np.float64], right: NDArray[np.float64], bins: int = BINS) -> Reliability:
    """Bins of equal width, of the probability of the best class (N,) and whether it was right (N,)."""
    place = bin_of(confidence, bins)
    images = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, each, bins) / images for each in (confidence, right)]
    return Reliability(images, means[0], means[1])


def ece_interval(confidence: NDArray[np.float64], right: NDArray[np.float64], bins: int = BINS) -> Interval:
    """The expected calibration error with its interval. That of a resample is Σ over bins of |mean of the gaps|."""
    gaps_NB = np.zeros((len(right), bins))
    gaps_NB[np.arange(len(right)), bin_of(confidence, bins)] = right - confidence
    return interval(gaps_NB, lambda means: np.abs(means).sum(axis=1))


def per_class(
    label: NDArray[np.int64], right: NDArray[np.float64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Accuracy (not a number without images) and images of each class."""
    images = np.bincount(label, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(label, right, classes) / images, images


def reliability_plot(path: Path, table: Reliability, title: str) -> bool:
    """Draw accuracy over confidence as PNG; False without matplotlib (`pip install 'vitscale[report]'`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    bins = len(table.images)
    centres = (np.arange(bins) + 0.5) / bins
    upper.bar(centres, np.nan_to_num(table.accuracy), 1 / bins, color="#4c72b0", edgecolor="white", label="accuracy")
    upper.plot(table.confidence, table.accuracy, "o", color="#1f2f4f", markersize=3, label="mean of a bin")
    upper.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="calibrated")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"{title}\nECE {table.ece:.2%}")
    upper.legend(loc="upper left", frameon=False)
    lower.bar(centres, table.images / table.images.sum(), 1 / bins, color="#b0b7c3", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images")
    with publish(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def real(outcomes: Outcomes, labels: dict[int, set[int]]) -> Iterator[tuple[str, Any]]:
    """Yield `real_images`, those that have such labels, and `real_top1`, the share whose best class is one of them.

    `labels` of the numbers of keys (`augment.key_number`). Images without any, as the paper has it, do not count.
    """
    found = [
        (labels.get(key, set()), best) for key, best in zip(outcomes.key.tolist(), outcomes.best.tolist(), strict=True)
    ]
    right = np.array([best in those for those, best in found if those], dtype=np.float64)
    if not len(right):
        raise UserError("--suite", "real labels of none of the images", "labels of some", REMEDY)
    yield "real_images", len(right)
    yield "real_top1", right


def read_real(path: str, dataset: str, classes: Sequence[str]) -> dict[int, set[int]]:
    """Reassessed labels of the samples of a dataset, by the numbers of their keys.

    The file is JSON: a list of lists, of which number i is of the image whose name in the source ends with i + 1 in
    eight digits (`ILSVRC2012_val_00000001.JPEG` has the first one), or an object from keys of samples or names in the
    source (whole, or the last part of a path) to lists. Labels are numbers of classes, or their names. Raises
    `UserError` for anything else, and for labels of none of the samples.
    """
    try:
        told = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError("--suite", f"real={path}: {error}", "a JSON file of labels", REMEDY) from error
    numbers = {name: number for number, name in enumerate(classes)}
    entries = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else None
    if entries is None:
        raise UserError("--suite", f"real={path}: a {type(told).__name__}", "a list or an object", REMEDY)
    by_name: dict[Any, set[int]] = {}
    for name, those in entries:
        if not isinstance(those, list):
            raise UserError("--suite", f"real={path}: {those!r} for {name}", "a list of labels", REMEDY)
        known = [numbers.get(each, -1) if isinstance(each, str) else each for each in those]
        if not all(type(each) is int and 0 <= each < len(classes) for each in known):
            raise UserError("--suite", f"real={path}: {those} for {name}", f"{len(classes)} classes' labels", REMEDY)
        by_name[name] = set(known)
    found: dict[int, set[int]] = {}
    for key, source in _names(dataset):
        last = source.rsplit("/", 1)[-1]
        match = NUMBER.search(last)
        keys = (key, source, last) if isinstance(told, dict) else (int(match[1]) - 1,) if match else ()
        those = next((by_name[each] for each in keys if each in by_name), None)
        if those is not None:
            found[key_number(key)] = those
    if not any(found.values()):
        raise UserError("--suite", f"real={path}: labels of none of the images", "labels of some", REMEDY)
    return found


def _names(dataset: str) -> Iterator[tuple[str, str]]:
    """Key and name in the source of each sample."""
    folder = open_folder(dataset, "DATASET")
    for name in sorted(each for each, _ in folder.walk() if each.startswith(f"{MANIFEST}/")):
        try:
            table = read_table(folder, name, RECORDS)
        except (OSError, pa.ArrowException) as error:
            raise UserError("DATASET", f"{dataset}/{name}: {error}", "a whole manifest", "Copy it again.") from error
        columns = (table.column(each).to_pylist() for each in ("key", "name", "status"))
        yield from ((key, source) for key, source, status in zip(*columns, strict=True) if status == KEPT)
