"""The loader beside its limits and peers, in one run: images per second as ratios.

    python benchmarks/loader.py PHOTOS [--copies 6] [--rounds 3] [--peers PYTHON] [--peer-scripts FOLDER] [--out FILE]

PHOTOS is a folder of class folders of JPEGs, copied `--copies` times and sharded twice: as it is, and with the shorter
side at 256 px. Views are random-resized crops of 224 px with flips. Batches are uint8 of 64 images, and arrive in this
process. The rounds go through all contestants in turn, and the best round of each counts.

Peers run in PYTHON, an environment with webdataset, torchvision and mosaicml-streaming, by scripts of the folder
`--peer-scripts` (peer_loader.py, peer_streaming.py) that print "... N img/s over ...".
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from vitscale.data_prep.config import ResizeConfig, ShardConfig
from vitscale.data_prep.shard import shard
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data.loader import LoaderSettings, TrainingView, training_batches
from vitscale.pipeline.data.order import Order
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World

SIZE, BATCH, WARM = 224, 64, 4


def rate(function: Callable[[Any], Any], items: list[Any]) -> float:
    begun = time.perf_counter()
    for item in items:
        function(item)
    return len(items) / (time.perf_counter() - begun)


def torchvision_style(data: bytes) -> np.ndarray:
    """Pillow decodes all, cuts, and resizes with antialiasing, as torchvision's RandomResizedCrop does; then float."""
    image = Image.open(BytesIO(data)).convert("RGB")
    width, height = image.size
    generator = np.random.default_rng(len(data))
    area = width * height * generator.uniform(0.05, 1)
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
    left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
    view = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1).contiguous().float().div(255)
    return pixels.sub_(0.5).div_(0.5).numpy()


def whole_loader(folder: Path, workers: int) -> float:
    """Images a second of one epoch, after the first batches."""
    store = Store(str(folder), "data.train")
    order = Order(store.sizes, [1], seed=0, streams=16, window=65536, size=BATCH)
    view, world = TrainingView(SIZE, AugmentConfig(), 0), World(0, 1, 0, torch.device("cpu"))
    begun = 0.0
    for number, _ in enumerate(
        training_batches(store, order, view, LoaderSettings(BATCH, workers), world, range(order.steps))
    ):
        if number == WARM:
            begun = time.perf_counter()
    return (order.steps - WARM - 1) * BATCH / (time.perf_counter() - begun)


def peer(command: list[str]) -> float:
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r": (\d+) img/s", said)
    assert found, said
    return float(found[1])


def peak_memory(folder: Path, epochs: int) -> int:
    """Peak RSS in kB of the larger of two workers that load so many epochs. Run in a process of its own."""
    store = Store(str(folder), "data.train")
    order = Order(store.sizes, [1], seed=0, streams=16, window=65536, size=BATCH)
    view, world = TrainingView(SIZE, AugmentConfig(), 0), World(0, 1, 0, torch.device("cpu"))
    for _ in training_batches(store, order, view, LoaderSettings(BATCH, 2), world, range(order.steps * epochs)):
        pass
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def memory_growth(folder: Path, epochs: int) -> float:
    """Peak memory of a worker over so many epochs, as a ratio to that of two of them."""
    peaks = []
    for count in (2, epochs):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks.append(pool.submit(peak_memory, folder, count).result())
    return peaks[1] / peaks[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="")
    parser.add_argument("--peer-scripts", type=Path)
    parser.add_argument("--memory-epochs", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for source in sorted(arguments.photos.rglob("*.jpg")):
            folder = root / "images" / source.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(arguments.copies):
                shutil.copyfile(source, folder / f"{source.stem}-{copy}.jpg")
        shard(str(root / "images"), str(root / "whole"), ShardConfig(shard_samples=500))
        config = ShardConfig(shard_samples=500, resize=ResizeConfig(256), jpeg_quality=90)
        shard(str(root / "images"), str(root / "small"), config)
        view = TrainingView(SIZE, AugmentConfig(), 0)
        contestants: dict[str, Callable[[], float]] = {}
        for name in ("whole", "small"):
            store = Store(str(root / name), "data.train")
            data = [store.read(int(n)).data for n in np.linspace(0, len(store) - 1, 600)]
            contestants |= {
                f"{name}: bare decode, one core": partial(rate, simplejpeg.decode_jpeg, data),
                f"{name}: Pillow and torchvision's way, one core": partial(rate, torchvision_style, data),
                f"{name}: view, one core": partial(rate, lambda item: view(item, 0, str(len(item))), data),
                f"{name}: loader, 1 worker": partial(whole_loader, root / name, 1),
                f"{name}: loader, 2 workers": partial(whole_loader, root / name, 2),
            }
            if arguments.peers:
                scripts, out = arguments.peer_scripts, root / f"{name}-mds"
                command = [arguments.peers, str(scripts / "peer_loader.py"), str(root / name / "*.tar"), "2"]
                contestants[f"{name}: webdataset and torchvision, 2 workers"] = partial(peer, command)
                images = root / ("images" if name == "whole" else "unpacked")
                if name == "small":
                    images.mkdir()
                    for number in range(len(store)):
                        (images / "x").mkdir(exist_ok=True)
                        (images / "x" / f"{number}.jpg").write_bytes(store.read(number).data)
                command = [arguments.peers, str(scripts / "peer_streaming.py"), str(images / "*/*.jpg"), str(out), "2"]
                contestants[f"{name}: mosaicml-streaming and torchvision, 2 workers"] = partial(peer, command)
        for number in range(arguments.rounds):
            for name, run in contestants.items():
                results[name] = max(run(), results.get(name, 0.0))
                print(f"round {number + 1}  {name:55} {results[name]:8,.0f} images/s", flush=True)
        for name in ("whole", "small"):
            one, two = results[f"{name}: loader, 1 worker"], results[f"{name}: loader, 2 workers"]
            alone = results[f"{name}: view, one core"]
            ratios |= {
                f"{name}: view / Pillow and torchvision's way (≥ 2.4)": alone
                / results[f"{name}: Pillow and torchvision's way, one core"],
                f"{name}: view / bare decode (≥ 0.75)": alone / results[f"{name}: bare decode, one core"],
                f"{name}: two workers / one (≥ 1.8)": two / one,
            }
            if arguments.peers:
                key = f"{name}: webdataset and torchvision, 2 workers"
                ratios[f"{name}: loader / webdataset and torchvision (≥ 3.5)"] = two / results[key]
                key = f"{name}: mosaicml-streaming and torchvision, 2 workers"
                ratios[f"{name}: loader / mosaicml-streaming and torchvision (≥ 3)"] = two / results[key]
        if arguments.memory_epochs:
            name = f"peak memory of a worker, {arguments.memory_epochs} epochs / 2 epochs (≤ 1.05)"
            ratios[name] = memory_growth(root / "small", arguments.memory_epochs)
    for name, ratio in ratios.items():
        print(f"{name:72} {ratio:.2f}")
    if arguments.out:
        libraries = ("numpy", "opencv-python-headless", "pillow", "simplejpeg", "torch", "webdataset")
        told = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
            "images_per_second": {name: round(value) for name, value in results.items()},
            "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        }
        arguments.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
