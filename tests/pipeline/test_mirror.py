"""Runs in an object store: they go on exactly, from whole checkpoints alone, and each rank fetches what it needs."""

import json
import os
import platform
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer

from tests.data_prep.test_storage import download, forget_clients, object_store
from tests.pipeline.runs import command, losses, words
from tests.pipeline.test_checkpoint import WORLD, Source
from vitscale.errors import UserError
from vitscale.pipeline import checkpoint, keeping, mirror
from vitscale.pipeline.audit import compare
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.export import export
from vitscale.pipeline.keeping import kept_in_store
from vitscale.pipeline.mirror import fetch, reading_folder, shown, store_of, working_folder
from vitscale.pipeline.report import write_report
from vitscale.pipeline.saver import Saver
from vitscale.pipeline.status import read_status
from vitscale.pipeline.tensor_file import write_safetensors
from vitscale.pipeline.weights import open_trained


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    forget_clients()
    with object_store() as (server, client), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield client
        server.stop()
    forget_clients()


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITSCALE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(mirror, "FIRST_DELAY", 0.01)
    return tmp_path / "scratch"


@pytest.fixture
def gets(caplog: pytest.LogCaptureFixture) -> Callable[[], Counter[str]]:
    """Tells how often each key of the bucket was got since it was last asked, by the server's own log."""
    caplog.set_level("INFO", logger="werkzeug")

    def since() -> Counter[str]:
        found = [re.search(r'"GET /bucket/(\S+) HTTP', message) for message in caplog.messages]
        caplog.clear()
        return Counter(match[1] for match in found if match)

    return since


def keys(client: Any, prefix: str) -> set[str]:
    return set(download(client, prefix))


def appears(client: Any, key: str, running: subprocess.Popen) -> None:
    for _ in range(1200):
        if client.list_objects_v2(Bucket="bucket", Prefix=key).get("KeyCount"):
            return
        assert running.poll() is None, f"ended with {running.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"no {key}")


def left(folder: Path) -> list[str]:
    """Files of checkpoints on this node."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")]


@pytest.mark.slow
def test_a_run_in_a_store_goes_on_exactly_after_a_kill(
    digits: Any,
    bucket: Any,
    tmp_path: Path,
    scratch: Path,
    gets: Callable[[], Counter[str]],
    vitscale: Callable[..., Any],
) -> None:
    """Two ranks killed with -9 after a checkpoint: losses and weights are those of a local run, bit for bit."""
    url, two = "s3://bucket/runs/a", ("run.dir=s3://bucket/runs/a", "data.workers=0", "--nproc", "2")
    local = command(digits, tmp_path / "local", "data.workers=0", "--nproc", "2")
    assert local.returncode == 0, local.stderr
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        words(digits, tmp_path, *two), env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    appears(bucket, "runs/a/checkpoints/step-00000004/index.json", running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    gets()
    said = command(digits, tmp_path, *two)
    assert said.returncode == 0, said.stderr
    assert "going on from step" in said.stdout
    assert f"{url}/checkpoints/step-000000" in said.stdout
    assert f"trained to step 12 of 12: {url}" in said.stdout
    fetched = {key.split("/")[-1]: times for key, times in gets().items() if key.endswith(".safetensors")}
    assert fetched == {"rank-00000.safetensors": 1, "rank-00001.safetensors": 1}
    assert left(scratch) == []

    steps = [f"checkpoints/step-{step:08d}" for step in (4, 8, 12)]
    files = ("index.json", "state.json", "rank-00000.safetensors", "rank-00001.safetensors")
    held = {key for key in keys(bucket, "runs/a") if not key.startswith("tensorboard/")}
    small = {"checkpoints/latest", "recipe.yaml", "metrics.jsonl", "environment.json"}
    assert held == small | {f"{step}/{file}" for step in steps for file in files}
    assert len(json.loads(download(bucket, "runs/a")["environment.json"])) == 2
    run = reading_folder(url, "RUN")
    assert losses(run) == losses(tmp_path / "local")
    ours, theirs = (dict(open_trained(place, "x").tensors()) for place in (url, str(tmp_path / "local")))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    found = read_status(url)
    assert (found.state, found.step, found.checkpoint, found.pid) == ("finished", 12, "step-00000012", None)
    assert found.checkpoint_age is not None
    assert 0 <= found.checkpoint_age < 120
    assert compare(url, str(tmp_path / "local")).differs is None
    assert export(url, str(tmp_path / "exported"))[0].difference == 0
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["origin"]["checkpoint"].startswith(url)
    assert export(f"{url}/checkpoints/step-00000004", str(tmp_path / "earlier"))[0].difference == 0
    said = vitscale("evaluate", url, digits.test, "--nproc", "2")
    assert said.returncode == 0, said.stderr
    assert f"all of this in {url}/evaluations/step-00000012-" in said.stdout
    write_report([reading_folder(url, "RUNS")], run / "report.html", "")
    page = download(bucket, "runs/a")["report.html"].decode()
    assert page.count("<svg") == 2  # curves, and the confusion matrix of what is in the store


@pytest.mark.slow
def test_a_store_that_goes_away_ends_the_run_at_a_save_and_it_goes_on_later(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with object_store() as (server, client):
        port = server.get_host_and_port()[1]
        settings = ("run.dir=s3://bucket/runs/away", "train.duration=60", "data.workers=0", "eval.every=0")
        running = subprocess.Popen(words(digits, tmp_path, *settings), stderr=subprocess.PIPE, text=True)
        appears(client, "runs/away/checkpoints/step-00000004/index.json", running)
        server.stop()
        _, said = running.communicate(timeout=60)
        assert running.returncode == 2
        assert "s3://bucket/runs/away" in said
        assert "Check network" in said
        assert "Traceback" not in said
        again = ThreadedMotoServer("127.0.0.1", port=port, verbose=False)  # with the contents of the first, a process's
        again.start()
        done = command(digits, tmp_path, *settings)
        again.stop()
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert "trained to step 60" in done.stdout


def save(folder: Path, *steps: int, keep: int = 9, **more: Any) -> None:
    saver = Saver(folder, WORLD, keep, background=False, **more)
    for step in steps:
        saver.save(Source(), {"step": step})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("damage", ["no index", "cut index", "no state", "cut", "flipped", "missing"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(bucket: Any, damage: str) -> None:
    prefix = f"damaged/{damage.replace(' ', '-')}/checkpoints"
    folder = working_folder(f"s3://bucket/{prefix}")
    save(folder, 1, 2)
    name = {"no index": "index.json", "cut index": "index.json", "no state": "state.json"}
    key = f"{prefix}/step-00000002/{name.get(damage, 'rank-00000.safetensors')}"
    data = bucket.get_object(Bucket="bucket", Key=key)["Body"].read()
    changed = {"cut": data[:-1], "cut index": data[:-9], "flipped": data[:-1] + bytes([data[-1] ^ 1])}
    if damage in changed:
        bucket.put_object(Bucket="bucket", Key=key, Body=changed[damage])
    else:
        bucket.delete_object(Bucket="bucket", Key=key)
    found, warnings = checkpoint.newest_sound(folder, WORLD)
    assert found == folder / "step-00000001"
    assert len(warnings) == 1
    assert f"s3://bucket/{key}" in warnings[0]
    # a run that goes on from there writes over it, and is never taken for whole before it is
    save(folder, 2)
    assert checkpoint.newest_sound(folder, WORLD) == (folder / "step-00000002", [])


def test_the_newest_are_kept_in_a_store(bucket: Any, scratch: Path) -> None:
    folder = working_folder("s3://bucket/kept/checkpoints")
    pushed = []

    def push() -> None:
        pushed.append("step-00000004/index.json" in keys(bucket, "kept/checkpoints"))

    save(folder, 1, 2, 3, 4, keep=2, kept=lambda step: step == 1, push=push)
    bucket.put_object(Bucket="bucket", Key="kept/checkpoints/step-00000005/rank-00000.safetensors", Body=b"killed")
    held = {key.split("/")[0] for key in keys(bucket, "kept/checkpoints")}
    assert held == {"latest", "step-00000001", "step-00000003", "step-00000004", "step-00000005"}
    assert pushed == [False] * 4  # what a checkpoint comes with is there before it
    save(folder, 5, keep=1)
    assert {key.split("/")[0] for key in keys(bucket, "kept/checkpoints")} == {"latest", "step-00000005"}
    assert download(bucket, "kept/checkpoints")["latest"] == b"step-00000005\n"
    assert left(scratch) == []


def test_a_rank_fetches_the_files_that_hold_its_ranges(
    bucket: Any, tmp_path: Path, gets: Callable[[], Counter[str]]
) -> None:
    """Sixteen ranks' files: as many ranks fetch one each, eight fetch two, and who reads whole tensors all of them."""
    ranks, each = 16, 10
    path = tmp_path / "step-00000001"
    path.mkdir()
    rows = []
    for rank in range(ranks):
        file = path / f"rank-{rank:05d}.safetensors"
        values = torch.arange(rank * each, (rank + 1) * each, dtype=torch.float32)
        key = f"model.a|weight|{rank * each}"
        size, sha256 = write_safetensors(file, {key: tuple(values.shape)}, lambda _, values=values: values)
        rows.append({"file": file.name, "bytes": size, "sha256": sha256})
    index = {"format": checkpoint.FORMAT, "tensors": {"model.a": [ranks, each]}, "files": rows}
    (path / "index.json").write_text(json.dumps(index))
    for file in path.iterdir():
        bucket.upload_file(str(file), "bucket", f"many/step-00000001/{file.name}")

    def fetched(world: int, rank: int) -> set[int]:
        folder = working_folder("s3://bucket/many/step-00000001")
        mirror.drop(folder)
        gets()
        out = torch.empty(ranks * each // world)
        reader = checkpoint.Reader(folder, verified=True, near=(rank + 0.5) / world)
        reader.fill("model.a", "weight", rank * len(out), out)
        assert torch.equal(out, torch.arange(rank * len(out), (rank + 1) * len(out), dtype=torch.float32))
        found = gets()
        assert set(found.values()) == {1}
        return {int(key[-17:-12]) for key in found if key.endswith(".safetensors")}

    assert [fetched(16, rank) for rank in range(16)] == [{rank} for rank in range(16)]
    assert [fetched(8, rank) for rank in range(8)] == [{2 * rank, 2 * rank + 1} for rank in range(8)]
    assert all(rank // 2 in fetched(32, rank) for rank in (0, 13, 31))
    reader = checkpoint.Reader(reading_folder("s3://bucket/many/step-00000001", "x"))
    assert torch.equal(reader.tensor("model.a").flatten(), torch.arange(160.0))


def nodes(world: World, scratch: str) -> list[Any]:
    """Each rank a node of its own: what each has on its disk while it holds a checkpoint, and what it read."""
    os.environ["VITSCALE_SCRATCH"] = f"{scratch}/{world.rank}"
    folder, node = working_folder("s3://bucket/nodes/checkpoints"), replace(world, local_rank=0)
    saver = Saver(folder, node, keep=1)
    for step in (1, 2):
        saver.save(Source(), {"step": step})  # pyright: ignore[reportArgumentType]
        saver.finish()
    saved = left(folder)
    found, warnings = checkpoint.newest_sound(folder, node)
    assert found is not None
    out = torch.empty(12)
    checkpoint.Reader(found, near=(world.rank + 0.5) / world.size).fill("model.a", "exp_avg", 0, out)
    fetched = left(folder)
    mirror.drop(found)
    return gather([saved, warnings, sorted(fetched), left(folder), out.tolist()])


def test_nodes_share_nothing_but_the_store(bucket: Any, scratch: Path, ranks: Callable[..., Any]) -> None:
    values = [2.0 * i for i in range(12)]
    for rank, told in enumerate(ranks(__file__, "nodes", 2, str(scratch))):
        files = [f"step-00000002/{name}" for name in ("index.json", f"rank-{rank:05d}.safetensors", "state.json")]
        assert told == [[], [], files, [], values]


def test_a_copy_is_used_again_if_it_is_the_same(bucket: Any, gets: Callable[[], Counter[str]]) -> None:
    bucket.put_object(Bucket="bucket", Key="copies/x", Body=b"one")
    path = reading_folder("s3://bucket/copies", "x") / "x"
    one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # of b"one"
    assert [fetch(path, one), fetch(path, one), path.read_bytes(), gets()["copies/x"]] == [True, True, b"one", 1]
    bucket.put_object(Bucket="bucket", Key="copies/x", Body=b"two")
    assert fetch(path)
    assert path.read_bytes() == b"two"
    with pytest.raises(UserError, match=r"s3://bucket/copies/x: sha256 .* expected 7692c3ad3540"):
        fetch(path, one)
    bucket.delete_object(Bucket="bucket", Key="copies/x")
    assert fetch(path)
    assert not path.exists()
    assert not fetch(path.parents[5] / "elsewhere")


def test_paths_that_stand_for_urls(tmp_path: Path, scratch: Path) -> None:
    for place in ("runs/a", "/runs/a", "."):
        assert working_folder(place) == reading_folder(place, "x") == Path(place)
        assert store_of(Path(place)) is None
    folder = working_folder("s3://bucket/runs//a/")
    assert folder == scratch / "runs" / "s3" / "bucket" / "runs" / "a"
    assert shown(folder / "checkpoints") == "s3://bucket/runs/a/checkpoints"
    assert working_folder(f"file://{tmp_path}") == tmp_path
    for url in ("http://host/a", "memory://a", "s3://bucket/../a", "s3://"):
        with pytest.raises(UserError, match=r"^run\.dir: got"):
            working_folder(url)


def test_two_runs_do_not_share_a_place(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lives is refused, one that was killed here is not waited for, and one cut off finds that it is."""
    monkeypatch.setattr(keeping, "RENEW", 0.1)
    monkeypatch.setattr(keeping, "PATIENCE", 3.0)
    folder = working_folder("s3://bucket/leased")

    def lease(**changed: Any) -> None:
        said = {"host": "another", "boot": "x", "pid": 1, "token": "t", "renewed": time.time(), **changed}
        bucket.put_object(Bucket="bucket", Key="leased/.lock", Body=json.dumps(said))

    with kept_in_store(folder, WORLD):
        assert keeping.holder(folder)["pid"] == os.getpid()
        with (
            pytest.raises(UserError, match=r"run\.dir: got s3://bucket/leased, in use by another run"),
            kept_in_store(folder, WORLD),
        ):
            pass
    assert keeping.holder(folder) == {}
    ended = subprocess.Popen(["true"])
    ended.wait()
    lease(host=platform.node(), boot=keeping._boot(), pid=ended.pid)
    began = time.monotonic()
    with kept_in_store(folder, WORLD):
        assert time.monotonic() - began < 2
    lease()
    began = time.monotonic()
    with kept_in_store(folder, WORLD) as push:
        assert time.monotonic() - began >= 3  # nobody renewed it
        lease(host="elsewhere", pid=7, token="other")
        with pytest.raises(UserError, match="taken by process 7 on elsewhere"):
            push()
        bucket.delete_object(Bucket="bucket", Key="leased/.lock")


def test_small_files_follow(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "RENEW", 0.1)
    monkeypatch.setattr(keeping, "PUSH", 0.2)
    folder = working_folder("s3://bucket/small")
    bucket.put_object(Bucket="bucket", Key="small/metrics.jsonl", Body=b"row\n")
    (folder / "hangs").mkdir(parents=True)
    (folder / "hangs" / "rank-00003.txt").write_text("stacks")
    (folder / "metrics.jsonl").write_text("row\nof a run that was killed\n")
    bucket.put_object(Bucket="bucket", Key="small/recipe.yaml", Body=b"{}")
    with kept_in_store(folder, WORLD) as push:
        assert (folder / "metrics.jsonl").read_text() == "row\n"
        assert not (folder / "hangs").exists()
        for name in ("a/b/c", "checkpoints/x", "wandb/id", "wandb/run/log", ".hidden", "a/.h/x", "x.partial"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        until = time.monotonic() + 10
        while "a/b/c" not in keys(bucket, "small") and time.monotonic() < until:
            time.sleep(0.05)
        (folder / "metrics.jsonl").write_text("row\nrow\n")
        push()
        assert download(bucket, "small")["metrics.jsonl"] == b"row\nrow\n"
        (folder / "a" / "d").write_text("the last")
    small = {"recipe.yaml", "hangs/rank-00003.txt", "metrics.jsonl", "a/b/c", "wandb/id", "a/d"}
    assert keys(bucket, "small") == small
    assert list(folder.iterdir()) == []


def test_a_store_that_does_not_answer_is_no_damaged_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()
    try:
        with object_store() as (server, _):
            folder = working_folder("s3://bucket/silent/checkpoints")
            saver = Saver(folder, WORLD, 9)
            saver.save(Source(), {"step": 1})  # pyright: ignore[reportArgumentType]
            saver.finish()
            server.stop()
            saver.save(Source(), {"step": 2})  # pyright: ignore[reportArgumentType]
            with pytest.raises(UserError, match="while saving to s3://bucket/silent/checkpoints"):
                saver.finish()
            with pytest.raises(UserError, match="storage: got s3://bucket/silent/checkpoints"):
                checkpoint.newest_sound(folder, WORLD)
            for work in (open_trained, reading_folder):
                with pytest.raises(UserError, match="storage: got s3://bucket/silent"):
                    work("s3://bucket/silent", "x")
    finally:
        forget_clients()
