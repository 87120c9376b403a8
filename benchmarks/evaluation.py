"""What evaluations cost beside what they cannot do without: `python benchmarks/evaluation.py [FILE [PART …]]`.

Features, accuracy and predictions of files beside the bare forward of as many images, k-nearest neighbours beside the
matrix product alone, and corruptions in milliseconds. Networks have one core; the loader has a process beside them.
Rounds of what is compared alternate, as other work on a machine comes and goes. FILE gets the figures; with some of
`PARTS` these alone are measured, and the others in FILE stay.
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
from typing import Any

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
from vitscale.pipeline.prediction import Files, find_files, predict_files
from vitscale.pipeline.weights import Trained

ROUNDS, SIDE, MICRO_BATCH = 3, 96, 32
COPIES = 7  # of the 359 images: a pass over them takes ViT-S/16 about half a minute
CPU = torch.device("cpu")


def ratios(bare: Callable[[], object], ours: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Of each of `ours` its seconds, those of `bare`, medians over rounds, and their ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in (*ours, "bare")}
    for _ in range(ROUNDS):
        for name, run in {**ours, "bare": bare}.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    print(json.dumps({name: [round(each, 3) for each in rounds] for name, rounds in seconds.items()}), file=sys.stderr)
    *of_ours, other = map(median, seconds.values())
    return {
        name: {"seconds": round(one, 3), "bare_seconds": round(other, 3), "ratio": round(one / other, 3)}
        for name, one in zip(ours, of_ours, strict=True)
    }


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


def of_passes(folder: Path) -> dict[str, Any]:
    """ViT-S/16 on 2,513 images: features, written to a new folder each time; top-1, top-5 and the confusion matrix."""
    shard(str(folder / "images" / "test"), str(folder / "shards"), ShardConfig())
    network, preprocess = network_of(12, 384), Preprocess(SIDE, 1.0)
    trained, settings, world = trained_of(network), LoaderSettings(MICRO_BATCH, 1), World(0, 1, 0, CPU)
    store = Store([str(folder / "shards")] * COPIES, "DATASET")

    def extract() -> None:
        features(network, store, preprocess, settings, world, Path(tempfile.mkdtemp(dir=folder)))

    def count() -> None:
        evaluate(trained, store, settings, world)

    return ratios(forward(network, len(store)), {"features": extract, "accuracy": count})


def trained_of(network: Network) -> Trained:
    """A network as if it had been opened."""
    state = network.state_dict()
    tensors = Tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__)
    classes = [str(number) for number in range(10)]
    return Trained(Path(), network.config, classes, Preprocess(SIDE, 1.0), {}, lambda: tensors)


def of_predictions(folder: Path) -> dict[str, Any]:
    """Classes of 2,154 image files, read and decoded by one process beside this one, in a Parquet file."""
    for copy in range(6):
        shutil.copytree(folder / "images" / "test", folder / "files" / str(copy))
    found = {}
    for name, depth, width in (("predictions", 12, 384), ("predictions_small", 4, 128)):
        network = network_of(depth, width)
        classifier = Classifier(trained_of(network))
        files = find_files([str(folder / "files")], "FILES", classifier.preprocess, MICRO_BATCH, 1)

        def ours(classifier: Classifier = classifier, files: Files = files) -> None:
            predict_files(classifier, files, folder / "out.parquet", 3, lambda done, total, text="": None)

        found |= ratios(forward(network, files.count), {name: ours})
        found[name]["images_per_minute"] = round(60 * files.count / found[name]["seconds"])
    return found


def of_neighbours(folder: Path) -> dict[str, Any]:
    """1,000 images against 40,000 of width 384, beside the product of the same matrices and the 200 largest."""
    random = np.random.default_rng(0)
    train, test = (random.standard_normal((images, 384)).astype(np.float32) for images in (40_000, 1_000))
    known = of_arrays(train, random.integers(0, 100, len(train)))
    asked = of_arrays(test, random.integers(0, 100, len(test)))
    one, other = torch.from_numpy(test), torch.from_numpy(train)

    def bare() -> None:
        for rows in one.split(CHUNK):
            (rows @ other.T).topk(200, dim=1)

    return ratios(bare, {"knn": lambda: dict(knn(known, asked, 100, range(len(test))))})


def of_corruptions(folder: Path) -> dict[str, Any]:
    """Milliseconds of an image of 224 px, the mean over severities."""
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found = {}
    for kind in KINDS:
        begun = time.perf_counter()
        for severity in range(1, 6):
            corrupt(image, kind, severity, "key")
        found[kind] = round((time.perf_counter() - begun) / 5 * 1000, 1)
    return {"corruptions_ms": found}


PARTS = {"passes": of_passes, "predictions": of_predictions, "knn": of_neighbours, "corruptions": of_corruptions}


def main() -> None:
    torch.set_num_threads(1)
    file, chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else None, sys.argv[2:] or list(PARTS)
    found = json.loads(file.read_text()) if file and file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "images")
        for part in chosen:
            found |= PARTS[part](Path(folder))
    print(json.dumps(found, indent=1))
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
