"""Folders: on a file system, from which no name leads out, and in an object store, which gives the same shards."""

import os
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.index import index
from vitscale.data_prep.manifest import read_dataset
from vitscale.data_prep.shard import STAGES, Part, shard
from vitscale.data_prep.sources import open_source
from vitscale.data_prep.storage import LocalFolder, RemoteFolder, file_system, open_folder, within
from vitscale.data_prep.verify import verify
from vitscale.data_prep.write import read_bytes
from vitscale.errors import UserError

CONFIG = ShardConfig(shard_samples=8, workers=1)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe://cat /etc/passwd",
        "exec:ls",
        "simplecache::s3://bucket/x",
        "zip://x::s3://bucket/x.zip",
        "s3::pipe:x",
        "http://host/x",
        "https://host/x",
        "ftp://host/x",
        "memory://x",
        "local:///x",
        "ssh://host/x",
        "reference://x",
        "s3://bucket/x://y",
        "",
        "file://",
        "s3://",
        "s3:///",
    ],
)
def test_urls_that_are_never_opened(url: str) -> None:
    with pytest.raises(UserError) as error:
        open_folder(url, "HERE")
    assert error.value.setting == "HERE"


def test_paths_and_file_urls_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path), f"file://{tmp_path}", ".", "x/..", f"{tmp_path}/"):
        assert open_folder(url, "HERE") == LocalFolder(str(tmp_path))
    assert open_folder("s3://bucket/x/", "HERE") == RemoteFolder("s3://bucket/x")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "..", "a\0b"])
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "in").mkdir()
    folder = LocalFolder(str(tmp_path / "in")) if kind == "local" else RemoteFolder("s3://bucket/in")
    for method in (folder.read, folder.open, folder.size, folder.names, folder.remove, lambda n: within(folder, n)):
        with pytest.raises(OSError, match="leads out of its folder"):
            method(name)
    with pytest.raises(OSError, match="leads out of its folder"), folder.publish(name) as file:
        file.write(b"yours")
    assert (tmp_path / "secret").read_text() == "mine"
    assert list((tmp_path / "in").iterdir()) == []


def test_threads_that_read_more_files_than_stay_open(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    for number in range(200):
        (tmp_path / f"{number}.bin").write_bytes(number.to_bytes(2) * 2)

    def wrong(seed: int) -> int:
        numbers = np.random.default_rng(seed).integers(0, 200, 1000).tolist()
        return sum(read_bytes(folder, f"{number}.bin", 2, 2) != number.to_bytes(2) for number in numbers)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(wrong, range(8))) == [0] * 8
    sys.setswitchinterval(switching)


def test_a_file_that_took_the_place_of_one_read_before(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    for content in (b"one", b"two"):
        with folder.publish("x.bin") as file:
            file.write(content)
        assert read_bytes(folder, "x.bin", 0, 3) == content


@contextmanager
def object_store() -> Iterator[tuple[ThreadedMotoServer, Any]]:
    """A server on this machine that speaks S3, with the bucket `bucket`; processes find it by the environment."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # what other tests of this process left
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("no_proxy", "*"),
        ):
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield server, client


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with object_store() as (server, client):
        yield client
    server.stop()


def forget_clients() -> None:
    """fsspec keeps them, each for the server that it was made for."""
    S3FileSystem.clear_instance_cache()
    file_system.cache_clear()


def upload(client: Any, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder)}")


def download(client: Any, prefix: str) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
    keys = [entry["Key"] for entry in found]
    return {key.removeprefix(f"{prefix}/"): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_folder_in_an_object_store_is_like_any_other(tmp_path: Path, bucket, kind: str) -> None:
    folder = open_folder(str(tmp_path / "in") if kind == "local" else "s3://bucket/methods", "HERE")
    assert (folder.names(), list(folder.walk()), folder.size("x")) == (set(), [], None)
    folder.remove("x")
    for name in ("b/deep/1", "a-b/2", "b/0", "c"):
        with folder.publish(name) as file:
            file.write(name.encode() * 3)
    if kind == "remote":
        for key in ("methods/", "methods/b/"):  # what consoles leave to mark a folder
            bucket.put_object(Bucket="bucket", Key=key, Body=b"")
    assert (folder.names(), folder.names("b"), folder.names("none")) == ({"a-b", "b", "c"}, {"deep", "0"}, set())
    assert sorted(folder.walk()) == [("a-b/2", 15), ("b/0", 9), ("b/deep/1", 24), ("c", 3)]
    assert (folder.size("c"), folder.size("none")) == (3, None)
    assert (folder.read("b/0"), folder.read("b/0", 1, 4), folder.read("b/0", 8)) == (b"b/0b/0b/0", b"/0b/", b"0")
    assert (folder.read("b/0", 4, 0), folder.read("b/0", 7, 100)) == (b"", b"/0")
    assert within(folder, "b").read("deep/1") == b"b/deep/1" * 3
    with pytest.raises(FileNotFoundError):
        folder.read("none")
    with suppress(RuntimeError), folder.publish("c") as file:
        file.write(b"half")
        raise RuntimeError
    assert folder.read("c") == b"ccc"
    with folder.publish("b/empty") as file:
        pass
    assert [folder.read("b/empty"), folder.read("b/empty", 0, 9), folder.read("c", 9)] == [b"", b"", b""]
    with folder.publish("c") as file:
        file.write(b"new")
    folder.remove("b")
    assert {name: folder.read(name) for name, _ in folder.walk()} == {"a-b/2": b"a-b/2" * 3, "c": b"new"}


def test_shards_in_an_object_store_are_those_of_a_local_run(make_folder, tmp_path: Path, bucket) -> None:
    source = make_folder(classes=("a", "a-b", "c"))  # in another order where whole paths are compared
    (source / "a" / "copy.jpg").write_bytes((source / "c" / "000.jpg").read_bytes())
    (source / "c" / "page.jpg").write_bytes(b"<html>")
    (source / "c" / "empty.jpg").touch()
    upload(bucket, source, "images")
    bucket.put_object(Bucket="bucket", Key="images/a/", Body=b"")
    config = ShardConfig(shard_samples=8, workers=1, dedup=DedupConfig(exact="drop"))
    local = shard(str(source), str(tmp_path / "out"), config)
    two = ShardConfig(shard_samples=8, workers=2, dedup=DedupConfig(exact="drop"))
    remote = shard("s3://bucket/images", "s3://bucket/out", two)
    assert remote == local
    assert download(bucket, "out") == contents(tmp_path / "out")
    assert (remote["samples"], remote["duplicate"], remote["rejected"]) == (21, 1, {"empty file": 1, "not an image": 1})

    report = verify("s3://bucket/out", workers=2)
    assert (report.problems, report.shards, report.samples) == ([], 3, 21)
    assert read_dataset("s3://bucket/out").shards == read_dataset(tmp_path / "out").shards
    assert shard("s3://bucket/images", "s3://bucket/out", two)["already_complete"] is True
    with pytest.raises(UserError, match="another source or other settings"):
        shard("s3://bucket/images", "s3://bucket/out", CONFIG)
    with pytest.raises(UserError, match="within SOURCE"):
        shard("s3://bucket/images", "s3://bucket/images/out", CONFIG)


def test_parts_that_share_the_object_store_alone_and_an_appended_set(make_folder, tmp_path: Path, bucket) -> None:
    first, second = make_folder(each=3), make_folder("more", each=5)
    for folder, prefix in ((first, "first"), (second, "second")):
        upload(bucket, folder, prefix)
    shard(str(first), str(tmp_path / "out"), CONFIG)
    shard(str(second), str(tmp_path / "out"), CONFIG, append=True)
    for stage in STAGES:
        for number in (2, 1):
            shard("s3://bucket/first", "s3://bucket/parts", CONFIG, stage=stage, part=Part(number, 2))
    with pytest.raises(UserError, match="without a dataset"):
        shard("s3://bucket/second", "s3://bucket/parts", CONFIG, append=True)
    shard("s3://bucket/first", "s3://bucket/parts", CONFIG, stage="publish")
    shard("s3://bucket/second", "s3://bucket/parts", CONFIG, append=True)
    ours, theirs = (
        {name: data for name, data in files.items() if name != "dataset.json" and not name.startswith("card")}
        for files in (contents(tmp_path / "out"), download(bucket, "parts"))
    )
    assert theirs == ours
    assert verify("s3://bucket/parts", workers=1).problems == []


def test_tars_tables_and_urls_in_an_object_store(make_folder, tmp_path: Path, bucket) -> None:
    source = make_folder(classes=("a",), each=7)
    jpegs = [path.name for path in sorted((source / "a").glob("*.jpg"))]
    (source / "a" / "t.csv").write_text("path,label\n" + "".join(f"{name},{n}\n" for n, name in enumerate(jpegs)))
    urls = [f"s3://bucket/table/{name}" for name in [*jpegs, "none.jpg"]]
    (source / "a" / "urls.txt").write_text("\n".join([*urls, "s3://nothing/x.jpg", "s3://bucket"]))
    upload(bucket, source / "a", "table")
    table = shard("s3://bucket/table/t.csv", "s3://bucket/of-table", CONFIG)
    assert (table["samples"], table["class_counts"]) == (4, [1, 1, 1, 1])
    assert shard(str(source / "a" / "t.csv"), str(tmp_path / "t"), CONFIG)["fingerprint"] == table["fingerprint"]
    again = shard("s3://bucket/of-table/*.tar", "s3://bucket/of-tars", CONFIG)
    assert again["fingerprint"] == table["fingerprint"]
    info = shard("s3://bucket/table/urls.txt", str(tmp_path / "u"), CONFIG)
    assert (info["samples"], info["rejected"]) == (4, {"unreadable": 3})

    for name, data in download(bucket, "of-table").items():
        if name.endswith(".tar"):
            bucket.put_object(Bucket="bucket", Key=f"found/{name}", Body=data)
    assert index("s3://bucket/found", workers=1)["fingerprint"] == table["fingerprint"]
    assert verify("s3://bucket/found", workers=1).problems == []


def test_what_is_not_there(make_folder, tmp_path: Path, bucket) -> None:
    for source in ("s3://missing/x", "s3://bucket/missing", "s3://bucket/missing/*.tar"):
        with pytest.raises(UserError, match="nothing is there") as error:
            shard(source, str(tmp_path / "out"), CONFIG)
        assert error.value.setting == "SOURCE"
    with pytest.raises(UserError) as error:
        shard(str(make_folder(each=1)), "s3://missing/out", CONFIG)
    assert (error.value.setting, "bucket does not exist" in str(error.value)) == ("OUT", True)
    with pytest.raises(UserError, match=r"without dataset\.json") as error:
        verify("s3://missing/out")
    assert error.value.setting == "DATASET"


def test_a_store_that_does_not_answer(vitscale, tmp_path: Path) -> None:
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    said = vitscale("shard", "s3://bucket/in", "out", env={**away, "AWS_MAX_ATTEMPTS": "1", "no_proxy": "*"})
    assert said.returncode == 2
    assert "SOURCE: got s3://bucket/in (EndpointConnectionError: Could not connect" in said.stderr
    assert os.listdir(tmp_path) == []


def test_a_store_that_stops_to_answer_is_no_fault_of_the_images(make_folder, tmp_path: Path, monkeypatch) -> None:
    source = make_folder(each=3)
    shard(str(source), str(tmp_path / "tars"), CONFIG)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()
    try:
        with object_store() as (server, client):
            upload(client, source, "images")
            upload(client, tmp_path / "tars", "tars")
            listed = [open_source("s3://bucket/images"), open_source("s3://bucket/tars/*.tar")]
            assert {item.problem for each in listed for item in each.chunks[0].read(each.folder)} == {""}
            server.stop()
            for each in listed:
                with pytest.raises(UserError, match="expected an object store that answers") as error:
                    list(each.chunks[0].read(each.folder))
                assert error.value.setting == "storage"
    finally:
        forget_clients()
