"""What evaluations cost beside what they cannot do without: `python benchmarks/evaluation.py` on one core.

Features, accuracy and predictions of files beside the bare forward of the same images, k-nearest neighbours beside the
matrix product alone, and corruptions in milliseconds. Rounds of the two that are compared alternate, as other work on a
machine comes and goes.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.digits import write_digits
from vitscale.data_prep.shard import shard
from vitscale.model.config import ViTConfig
from vitscale.model.interop.maps import Tensors
from vitscale.model.network import Network
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.data.augment import Preprocess, normalise
from vitscale.pipeline.data.loader import LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation.corruption_kinds import KINDS
from vitscale.pipeline.evaluation.corruptions import corrupt
from vitscale.pipeline.evaluation.features import features, of_arrays
from vitscale.pipeline.evaluation.knn import CHUNK, knn
from vitscale.pipeline.evaluation.stage import evaluate
from vitscale.pipeline.inference import Classifier
from vitscale.pipeline.prediction import find_files, predict_files
from vitscale.pipeline.weights import Trained

ROUNDS, SIDE, MICRO_BATCH = 3, 96, 32
CPU = torch.device("cpu")


def ratio(ours: Callable[[], object], bare: Callable[[], object]) -> dict[str, float]:
    """Seconds of both, medians over rounds, and their ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, kept in zip((ours, bare), seconds, strict=True):
            begun = time.perf_counter()
            run()
            kept.append(time.perf_counter() - begun)
    one, other = map(median, seconds)
    return {"seconds": round(one, 3), "bare_seconds": round(other, 3), "ratio": round(one / other, 3)}


def network_of(depth: int, width: int) -> Network:
    """A ViT for images of 96 px with patches of 16: ViT-S/16 with 12 blocks of width 384."""
    model = ViTConfig(
        img_size=SIDE,
        patch_size=16,
        depth=depth,
        width=width,
        mlp_width=4 * width,
        heads=width // 64,
        num_classes=10,
    )
    return VisionTransformer(model).eval()


def forward(network: Network, images: int) -> Callable[[], None]:
    """Forwards of pixels in memory."""
    pixels, preprocess = torch.zeros(MICRO_BATCH, SIDE, SIDE, 3, dtype=torch.uint8), Preprocess(SIDE, 1.0)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(-(-images // MICRO_BATCH)):
            network(normalise(pixels, preprocess))

    return bare


def of_features(folder: Path) -> dict[str, float]:
    """ViT-S/16 on 359 images, written to a new folder each time."""
    shard(str(folder / "images" / "test"), str(folder / "shards"), ShardConfig())
    network, preprocess = network_of(12, 384), Preprocess(SIDE, 1.0)
    store, world = Store(str(folder / "shards"), "DATASET"), World(0, 1, 0, CPU)
    settings = LoaderSettings(MICRO_BATCH, 1)

    def ours() -> None:
        features(network, store, preprocess, settings, world, Path(tempfile.mkdtemp(dir=folder)))

    return ratio(ours, forward(network, len(store)))


def of_accuracy(folder: Path) -> dict[str, float]:
    """Top-1, top-5 and the confusion matrix of ViT-S/16 on the same images."""
    network = network_of(12, 384)
    trained, store, world = trained_of(network), Store(str(folder / "shards"), "DATASET"), World(0, 1, 0, CPU)

    def ours() -> None:
        evaluate(trained, store, LoaderSettings(MICRO_BATCH, 1), world)

    return ratio(ours, forward(network, len(store)))


def trained_of(network: Network) -> Trained:
    """A network as if it had been opened."""
    state = network.state_dict()
    tensors = Tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__)
    classes = [str(number) for number in range(10)]
    return Trained(Path(), network.config, classes, Preprocess(SIDE, 1.0), {}, lambda: tensors)


def of_predictions(folder: Path, depth: int, width: int) -> dict[str, float]:
    """Classes of 2,154 image files, read and decoded by one process beside this one, in a Parquet file."""
    images = folder / f"images-{width}"
    for copy in range(6):
        shutil.copytree(folder / "images" / "test", images / str(copy))
    network = network_of(depth, width)
    classifier = Classifier(trained_of(network))
    files = find_files([str(images)], "FILES", classifier.preprocess, MICRO_BATCH, 1)

    def ours() -> None:
        predict_files(classifier, files, folder / "out.parquet", 3, lambda done, total, text="": None)

    found = ratio(ours, forward(network, files.count))
    return {**found, "images_per_minute": round(60 * files.count / found["seconds"])}


def of_neighbours() -> dict[str, float]:
    """1,000 images against 40,000 of width 384, beside the product of the same matrices and the 200 largest."""
    random = np.random.default_rng(0)
    train, test = (random.standard_normal((images, 384)).astype(np.float32) for images in (40_000, 1_000))
    known = of_arrays(train, random.integers(0, 100, len(train)))
    asked = of_arrays(test, random.integers(0, 100, len(test)))
    one, other = torch.from_numpy(test), torch.from_numpy(train)

    def bare() -> None:
        for rows in one.split(CHUNK):
            (rows @ other.T).topk(200, dim=1)

    return ratio(lambda: dict(knn(known, asked, 100, range(len(test)))), bare)


def of_corruptions() -> dict[str, float]:
    """Milliseconds of an image of 224 px, the mean over severities."""
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found = {}
    for kind in KINDS:
        begun = time.perf_counter()
        for severity in range(1, 6):
            corrupt(image, kind, severity, "key")
        found[kind] = round((time.perf_counter() - begun) / 5 * 1000, 1)
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "images")
        found = {
            "features": of_features(Path(folder)),
            "accuracy": of_accuracy(Path(folder)),
            "predictions": of_predictions(Path(folder), 12, 384),
            "predictions_small": of_predictions(Path(folder), 4, 128),
            "knn": of_neighbours(),
            "corruptions_ms": of_corruptions(),
        }
    print(json.dumps(found, indent=1))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
