"""The same work by a Ray cluster on this machine: a real one, which takes seconds to start."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.executors import RayExecutor, make_executor
from vitscale.data_prep.shard import shard
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with RayExecutor(2) as running:
            yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_come_in_order_from_other_processes(executor: RayExecutor) -> None:
    assert list(executor.map(lambda task: -task, range(50))) == list(range(0, -50, -1))
    assert list(executor.map(lambda task: task, [])) == []
    assert os.getpid() not in set(executor.map(lambda task: os.getpid(), range(4)))


def test_an_exception_of_the_function_is_raised_here(executor: RayExecutor) -> None:
    with pytest.raises(ValueError, match="invalid literal") as error:
        list(executor.map(lambda task: int(task), ["1", "one", "2"]))
    assert type(error.value) is ValueError
    with pytest.raises(FileNotFoundError):
        list(executor.map(lambda task: os.listdir(task), ["/no/such/folder"]))


def test_a_process_that_dies_is_a_clear_error(executor: RayExecutor) -> None:
    with pytest.raises(UserError) as error:
        list(executor.map(lambda task: os._exit(task), [1]))
    assert error.value.setting == "executor"
    assert list(executor.map(lambda task: -task, [1])) == [-1]


def test_shards_are_the_bytes_of_a_local_run(executor: RayExecutor, make_folder, tmp_path: Path) -> None:
    source = make_folder(each=400)
    (source / "cat" / "page.jpg").write_bytes(b"<html>")
    (source / "cat" / "copy.jpg").write_bytes((source / "ant" / "000.jpg").read_bytes())
    for kind, out in (("local", "a"), ("ray", "b")):
        config = ShardConfig(shard_samples=200, workers=2, executor=kind, dedup=DedupConfig(near=2))
        info = shard(str(source), str(tmp_path / out), config)
        assert info["shards"] > 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert verify(str(tmp_path / "b"), workers=1).problems == []


def test_an_error_for_the_user_keeps_its_words(executor: RayExecutor, make_parquet, tmp_path: Path) -> None:
    path = make_parquet([os.urandom(1000) for _ in range(50)], [0] * 50, ["no"])
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the header of the first page
    path.write_bytes(data)
    with pytest.raises(UserError, match="a readable Parquet file") as error:
        shard(str(path), str(tmp_path / "out"), ShardConfig(executor="ray"))
    assert error.value.setting == "SOURCE"


def test_the_executor_named_ray_is_this_one(executor: RayExecutor) -> None:
    with make_executor("ray", 1) as other:  # joins the cluster that runs, and leaves it running
        assert list(other.map(lambda task: -task, [1])) == [-1]
    assert list(executor.map(lambda task: -task, [2])) == [-2]
