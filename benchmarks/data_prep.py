"""`vitscale shard` beside its limits and peers, in one run: rates as ratios.

    python benchmarks/data_prep.py PHOTOS [--copies 6] [--rounds 3] [--img2dataset PYTHON] [--out FILE.json]

PHOTOS is a folder of class folders of JPEGs. It is copied `--copies` times, under other names, to a temporary folder.
The rounds go through all contestants in turn, and the best round of each counts: what else the machine does slows some
down. `vitscale` is the whole of it, from listing to the data card, with the start of its processes.

img2dataset wants other versions of its dependencies: PYTHON is the interpreter of an environment that has it. It
fetches from a web server on this machine, as it reads nothing else.
"""

import argparse
import http.server
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import simplejpeg

from vitscale.data_prep.config import ResizeConfig, ShardConfig
from vitscale.data_prep.shard import shard

CORES = 2
HEADER = ShardConfig(check="header", shard_samples=1000, workers=CORES)
FULL = ShardConfig(shard_samples=1000, workers=CORES)
RESIZED = ShardConfig(resize=ResizeConfig(256), jpeg_quality=90, shard_samples=1000, workers=CORES)


def decode_all(files: list[Path]) -> None:
    for file in files:
        simplejpeg.decode_jpeg(file.read_bytes())


def resize_all(files: list[Path]) -> None:
    """To a shorter side of 256 where larger, at quality 90."""
    for file in files:
        data = file.read_bytes()
        height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])  # pyright: ignore[reportArgumentType]
        scale = min(1.0, 256 / min(height, width))
        target = round(width * scale), round(height * scale)
        rgb = simplejpeg.decode_jpeg(data, min_height=target[1], min_width=target[0])
        if scale < 1:
            rgb = cv2.resize(rgb, target, interpolation=cv2.INTER_AREA)
        simplejpeg.encode_jpeg(rgb, 90, colorsubsampling="420")


def on_cores(work: Callable[[list[Path]], None], files: list[Path]) -> None:
    """The bare loop, in one process a core."""
    parts = [multiprocessing.Process(target=work, args=(files[core::CORES],)) for core in range(CORES)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()


def write_tars(files: list[Path], out: Path) -> None:
    """webdataset's own writer, in a loop."""
    from webdataset.writer import ShardWriter  # here, as worker processes would import it again

    out.mkdir()
    with ShardWriter(str(out / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number:08d}", "jpg": file.read_bytes(), "cls": 0})


def img2dataset(python: str, root: Path, files: list[Path], out: Path) -> None:
    """Two processes, shorter side 256, quality 90, from a web server on this machine."""
    handler = partial(Quiet, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = out.with_suffix(".txt")
    urls.write_text("".join(f"http://127.0.0.1:{server.server_port}/{f.relative_to(root)}\n" for f in files))
    settings = {
        "url_list": str(urls), "output_folder": str(out), "output_format": "webdataset", "processes_count": CORES,
        "thread_count": 16, "image_size": 256, "resize_mode": "keep_ratio", "resize_only_if_bigger": True,
        "encode_quality": 90, "number_sample_per_shard": 1000, "enable_wandb": False,
    }  # fmt: skip
    program = f"from img2dataset import download\nif __name__ == '__main__': download(**{settings!r})"
    script = out.with_suffix(".py")
    script.write_text(program)
    subprocess.run([python, str(script)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--img2dataset", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root, results = Path(temporary), {}
        for source in sorted(arguments.photos.rglob("*.jpg")):
            folder = root / "images" / source.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(arguments.copies):
                shutil.copyfile(source, folder / f"{source.stem}-{copy}.jpg")
        files = sorted((root / "images").glob("*/*.jpg"))
        decode_all(files[:200])
        out = root / "out"
        prepare = partial(shard, str(root / "images"), str(out))
        contestants: dict[str, Callable[[], Any]] = {
            "tar": lambda: subprocess.run(["tar", "cf", str(out), "images"], cwd=root, check=True),
            "tar, then sync": lambda: subprocess.run(
                f"tar cf {out} images && sync {out}", cwd=root, check=True, shell=True
            ),
            "webdataset.ShardWriter": lambda: write_tars(files, out),
            "vitscale check=header": lambda: prepare(HEADER),
            "bare decode, 2 cores": lambda: on_cores(decode_all, files),
            "vitscale": lambda: prepare(FULL),
            "bare resize, 2 cores": lambda: on_cores(resize_all, files),
            "vitscale resize.shorter=256": lambda: prepare(RESIZED),
        }
        if arguments.img2dataset:
            contestants["img2dataset, 2 processes"] = lambda: img2dataset(
                arguments.img2dataset, root / "images", files, out
            )
        for number in range(arguments.rounds):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                rate = len(files) / (time.perf_counter() - start)
                results[name] = max(rate, results.get(name, 0.0))
                print(f"round {number + 1}  {name:30} {rate:8,.0f} images/s", flush=True)
                if out.is_dir():
                    shutil.rmtree(out)
                out.unlink(missing_ok=True)
    ratios = {
        "header / tar (≥ 0.6)": results["vitscale check=header"] / results["tar"],
        "header / tar and sync": results["vitscale check=header"] / results["tar, then sync"],
        "header / ShardWriter (≥ 1.3)": results["vitscale check=header"] / results["webdataset.ShardWriter"],
        "full / bare decode (≥ 0.8)": results["vitscale"] / results["bare decode, 2 cores"],
        "resize / bare resize (≥ 0.85)": results["vitscale resize.shorter=256"] / results["bare resize, 2 cores"],
    }
    if arguments.img2dataset:
        peer = results["img2dataset, 2 processes"]
        ratios["resize / img2dataset (≥ 2.3)"] = results["vitscale resize.shorter=256"] / peer
    for name, ratio in ratios.items():
        print(f"{name:32} {ratio:.2f}")
    if arguments.out:
        libraries = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg", "webdataset")
        told = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{CORES} of {os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
            "images": len(files),
            "images_per_second": {name: round(rate) for name, rate in results.items()},
            "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        }
        arguments.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
