"""What several folders of tests use: digits as shards, the command line, and functions run on several ranks."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.digits import write_digits
from vitscale.data_prep.shard import shard

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of the CPU, also where there are GPUs
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: threads of several processes only wait for each other
RANK = Path(__file__).with_name("rank.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process does all tests of a file, which share fixtures, and one all that share the Slurm cluster."""
    for item in items:
        slurm = "slurm" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else str(item.path)))


@dataclass(frozen=True)
class Digits:
    """Folders of scikit-learn's digits: images and shards, training and test."""

    train_images: Path
    test_images: Path
    train: Path
    test: Path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """1,438 training and 359 test images; the training shards are uneven (288, 288, 287, 287, 288)."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "images")
    for split in ("train", "test"):
        shard(str(root / "images" / split), str(root / split), ShardConfig(split=split, shard_samples=300))
    return Digits(root / "images" / "train", root / "images" / "test", root / "train", root / "test")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of example data, named by VITSCALE_SHARED_DATA or beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VITSCALE_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no example data: {folder} is missing (set VITSCALE_SHARED_DATA)")
    return folder


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., Any]:
    """`ranks(__file__, "function", size, *arguments)`: run function(world, *arguments) on `size` gloo processes.

    Returns what rank 0 returned, by way of JSON. The function is one of the test file. `limit`: seconds they have.
    """

    def run(file: str, function: str, size: int, *arguments: Any, limit: float = 300) -> Any:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"{function}.json"
        command = [sys.executable, str(RANK), file, function, str(out), json.dumps(arguments)]
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = []
        for rank in range(size):
            env = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "PYTHONPATH": RANK.parents[1]}
            env = {**os.environ, **{key: str(value) for key, value in env.items()}}
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            with ThreadPoolExecutor() as together:  # a rank whose pipe is full would wait, and the others for it
                said = list(together.map(lambda process: process.communicate(timeout=limit), processes))
        finally:
            for process in processes:  # of those that had not ended in time
                process.kill()
        errors = [errors for _, errors in said]
        assert not any(process.returncode for process in processes), "\n".join(errors)[-4000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture
def vitscale(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`vitscale("pretrain", …)`: run the command line in an empty folder, as a user would, and return what it said."""

    def run(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vitscale.launch.cli", *map(str, words)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)

    return run
