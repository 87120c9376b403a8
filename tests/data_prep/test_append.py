"""Adding to a published dataset: what is there stays as it is, what comes is numbered on, and kills do no harm."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.index import index
from vitscale.data_prep.manifest import Dataset, manifest_parts, read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

CONFIG = ShardConfig(shard_samples=4, workers=1, dedup=DedupConfig(near=8))
PROGRAM = """
import os, signal, sys
from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.shard import shard
source, out, end, when = sys.argv[1:]
replace = os.replace
def until(partial, path):
    if str(path).endswith(end) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)
    if str(path).endswith(end):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = until
shard(source, out, ShardConfig(shard_samples=4, workers=1, dedup=DedupConfig(near=8)), append=True)
"""


def config(exact: str = "keep", near: int = 0, **settings: Any) -> ShardConfig:
    return ShardConfig(shard_samples=4, workers=1, dedup=DedupConfig(exact, near), **settings)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of the last change of every file."""
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in bytes_of(folder).items()}


def records_of(out: Path) -> list[dict[str, Any]]:
    return [row for part in manifest_parts(read_dataset(out)) for row in pq.read_table(out / part).to_pylist()]


def assert_sound(out: Path) -> Dataset:
    """The dataset is whole, and what counts its records agrees."""
    dataset, records = read_dataset(out), records_of(out)
    report = verify(str(out), workers=1)
    assert (report.problems, report.samples, report.shards) == ([], dataset.samples, len(dataset.shards))
    status = Counter(row["status"] for row in records)
    assert status["kept"] == dataset.samples == sum(dataset.info["class_counts"])
    assert dataset.info["summary"]["status"] == dict(status)
    assert (dataset.info["duplicate"], dataset.info["leaked"]) == (status["duplicate"], status["leaked"])
    assert sum(dataset.info["rejected"].values()) == status["rejected"]
    keys = [key for entry in dataset.shards for key in read_samples(dataset.folder, entry.name).keys]
    assert sorted(keys) == sorted(row["key"] for row in records if row["status"] == "kept")
    assert len(set(keys)) == len(keys)
    return dataset


@pytest.fixture
def sources(picture, encode, tmp_path: Path) -> list[Path]:
    """Three folders of 3 × 4, 3 × 5 and 3 × 6 pictures; the later ones hold a near copy of one of the first too."""
    made = []
    for each in (4, 5, 6):
        made.append(tmp_path / f"source{each}")
        for label, kind in enumerate(("ant", "bee", "cat")):
            (made[-1] / kind).mkdir(parents=True)
            for number in range(each):
                image = picture(100 * each + 10 * label + number)
                name, data = ("png", encode(image, "PNG")) if number % 2 else ("jpg", encode(image, "JPEG", quality=95))
                (made[-1] / kind / f"{each}{number}.{name}").write_bytes(data)
    whole = (made[0] / "ant" / "40.jpg").read_bytes()
    for number, folder in enumerate(made[1:]):  # with a comment: the same pixels
        (folder / "bee" / "near.jpg").write_bytes(whole[:2] + b"\xff\xfe\0\x04no" + whole[2:] + bytes(number))
        (folder / "cat" / "page.jpg").write_bytes(b"<html>")
    return made


def test_appended_sets_are_sound_and_old_files_stay(sources: list[Path], tmp_path: Path) -> None:
    out, shards, before = tmp_path / "out", [], {}
    for number, source in enumerate(sources):
        before = states_of(out) if number else {}
        info = shard(str(source), str(out), config(), append=number > 0)
        after = states_of(out)
        changed = {name for name, state in before.items() if after[name] != state}
        assert changed == ({"dataset.json", "card.html", "card.md"} if number else set())
        dataset = assert_sound(out)
        assert dataset.info == {name: value for name, value in info.items() if name != "already_complete"}
        names = [entry.name for entry in dataset.shards]
        assert names[: len(shards)] == shards
        assert names == [f"train-{place:06d}.tar" for place in range(len(names))]
        assert sorted(path.name for path in out.glob("*.tar")) == names
        assert not {"work", "unfinished.json"} & {path.name for path in out.iterdir()}
        shards = names
    info = read_dataset(out).info
    assert info["index"] == "index-2.parquet"
    assert [(part["source"], part["samples"], part["shards"]) for part in info["parts"]] == [
        ("source4", 12, 3),
        ("source5", 16, 4),
        ("source6", 19, 5),
    ]
    assert info["class_counts"] == [4 + 5 + 6, 4 + 6 + 7, 4 + 5 + 6]
    assert info["rejected"] == {"not an image": 2}
    assert (out / "rejected-2.csv").read_text().splitlines()[1:] == ['"cat/page.jpg","rejected","not an image"']


def test_what_is_appended_is_shuffled_as_if_alone(sources: list[Path], tmp_path: Path) -> None:
    """A seed of its own for each part of a set, and no sample of the new ones is moved for the old ones."""
    for name in ("one", "two"):
        shard(str(sources[0]), str(tmp_path / name), config())
    shard(str(sources[1]), str(tmp_path / "one"), config(seed=0), append=True)
    shard(str(sources[1]), str(tmp_path / "two"), config(seed=1), append=True)
    one, two = read_dataset(tmp_path / "one"), read_dataset(tmp_path / "two")
    assert [part["seed"] for part in two.info["parts"]] == [0, 1]
    keys = [[key for e in d.shards[3:] for key in read_samples(d.folder, e.name).keys] for d in (one, two)]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def test_the_same_source_again_is_nothing_to_do(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(str(sources[0]), str(out), config())
    added = shard(str(sources[1]), str(out), config(), append=True)
    before = states_of(out)
    for source in (sources[1], sources[0]):
        for append in (True, False):
            again = shard(str(source), str(out), config(), append=append)
            assert again == added | {"already_complete": True}
    assert states_of(out) == before


def test_copies_of_old_samples_are_numbered_on(sources: list[Path], tmp_path: Path) -> None:
    out, first = tmp_path / "out", sources[0] / "ant" / "40.jpg"
    for place in (sources[0] / "cat" / "a.jpg", sources[1] / "ant" / "b.jpg", sources[1] / "bee" / "c.jpg"):
        shutil.copy(first, place)
    shard(str(sources[0]), str(out), config())
    shard(str(sources[1]), str(out), config(), append=True)
    assert_sound(out)
    key = hashlib.sha256(first.read_bytes()).hexdigest()[:24]
    named = {row["name"]: row["key"] for row in records_of(out)}
    names = ("ant/40.jpg", "cat/a.jpg", "ant/b.jpg", "bee/c.jpg")
    assert [named[name] for name in names] == [key, f"{key}-1", f"{key}-2", f"{key}-3"]


@pytest.mark.parametrize(("exact", "near"), [("drop", 0), ("keep", 8)])
def test_copies_of_old_samples_are_dropped(sources: list[Path], tmp_path: Path, exact: str, near: int) -> None:
    out = tmp_path / "out"
    for path in sorted((sources[0] / "ant").iterdir()):
        shutil.copy(path, sources[1] / "ant" / f"copy of {path.name}")
    shard(str(sources[0]), str(out), config(exact, near))
    shard(str(sources[1]), str(out), config(exact, near), append=True)
    assert_sound(out)
    keys = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:24] for path in (sources[0] / "ant").iterdir()}
    lost = {row["name"]: row["reason"] for row in records_of(out) if row["status"] == "duplicate"}
    expected = {f"ant/copy of {name}": f"duplicate: exact copy of {key}" for name, key in keys.items()}
    if near:
        expected["bee/near.jpg"] = f"duplicate: near copy, 0 bits, of {keys['40.jpg']}"
    assert {name: lost.get(name) for name in expected} == expected
    assert len(lost) == len(expected)


def test_where_all_is_known_already_nothing_is_added(sources: list[Path], tmp_path: Path) -> None:
    """A nightly run that finds nothing new ends well, and the next one is not held up by it."""
    out, again = tmp_path / "out", tmp_path / "again"
    first = shard(str(sources[0]), str(out), config("drop"))
    shutil.copytree(sources[0], again)
    shutil.copy(again / "ant" / "40.jpg", again / "ant" / "copy.jpg")
    info = shard(str(again), str(out), config("drop"), append=True)
    assert (info["samples"], info["shards"], info["duplicate"]) == (12, 3, 13)
    assert info["fingerprint"] == first["fingerprint"]
    assert_sound(out)
    assert shard(str(sources[1]), str(out), config("drop"), append=True)["shards"] == 3 + 4
    assert_sound(out)


def test_what_does_not_go_with_the_set_is_refused(
    sources: list[Path], make_folder, make_parquet, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="without a dataset") as error:
        shard(str(sources[0]), str(out), config(), append=True)
    assert error.value.setting == "--append"
    shard(str(sources[0]), str(out), config())
    before = states_of(out)
    flat = tmp_path / "flat"
    shutil.copytree(sources[1] / "ant", flat)
    others = make_folder("others", classes=("ant", "bee", "dog"))
    images = [path.read_bytes() for path in sorted((sources[1] / "ant").iterdir())]
    numbers = make_parquet(images, [0] * len(images), ["bee", "ant", "cat"])
    for source, settings, setting, said in (
        (others, config(), "SOURCE", "the classes ['ant', 'bee', 'dog']; expected the classes ['ant', 'bee', 'cat']"),
        (numbers, config(), "SOURCE", "the classes ['bee', 'ant', 'cat']"),
        (flat, config(), "SOURCE", "labels of the kind none; expected labels of the kind class"),
        (sources[1], config(split="test"), "split", "got test; expected train"),
    ):
        with pytest.raises(UserError) as error:
            shard(str(source), str(out), settings, append=True)
        assert error.value.setting == setting
        assert said in str(error.value)
    with pytest.raises(UserError, match="another source or other settings"):
        shard(str(sources[1]), str(out), config())
    assert states_of(out) == before


def kill_at(source: Path, out: Path, end: str, when: str = "before") -> None:
    """Append in a process that is killed before, or after, it publishes a file whose name ends so."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(out), end, when]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, f"{end}: {killed.stderr}"


def test_killed_anywhere_in_an_append(sources: list[Path], tmp_path: Path) -> None:
    for name in ("undisturbed", "out"):
        shard(str(sources[0]), str(tmp_path / name), CONFIG)
    shard(str(sources[1]), str(tmp_path / "undisturbed"), CONFIG, append=True)
    out = tmp_path / "out"
    before, info = states_of(out), read_dataset(out).info
    for end in (
        "scan/e0000.parquet",
        "match/0000.arrow",
        "dedup/0000.parquet",
        "plan/0000.parquet",
        "train-000004.tar",
        "summary/0000.json",
        "index-1.parquet",
        "dataset.json",
    ):
        kill_at(sources[1], out, end)
        assert assert_sound(out).info == info
        now = states_of(out)
        assert {name for name in before if now[name] != before[name]} <= {"card.html", "card.md"}
        assert shard(str(sources[0]), str(out), CONFIG)["already_complete"] is True  # and the append can go on
    kept = (out / "train-000003.tar").stat().st_mtime_ns
    kill_at(sources[1], out, "dataset.json", "after")
    assert assert_sound(out).info == read_dataset(tmp_path / "undisturbed").info
    assert shard(str(sources[1]), str(out), CONFIG, append=True)["already_complete"] is True
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")
    assert (out / "train-000003.tar").stat().st_mtime_ns == kept  # continued, not written again


def test_an_append_that_is_given_up_leaves_no_trace_in_the_next(sources: list[Path], tmp_path: Path) -> None:
    for name in ("undisturbed", "out"):
        shard(str(sources[0]), str(tmp_path / name), CONFIG)
    out = tmp_path / "out"
    kill_at(sources[2], out, "index-1.parquet")
    with pytest.raises(UserError, match=r"give it up: remove unfinished\.json and work there"):
        shard(str(sources[1]), str(out), CONFIG, append=True)
    (out / "manifest" / "001-0001.parquet").write_bytes(b"of a longer source")
    (out / "unfinished.json").unlink()
    for name in ("undisturbed", "out"):
        shard(str(sources[1]), str(tmp_path / name), CONFIG, append=True)
    assert_sound(out)
    left = set(bytes_of(out)) - set(bytes_of(tmp_path / "undisturbed"))
    assert left <= {"train-000007.tar", "train-000007.samples.parquet"}  # beyond the index
    assert bytes_of(out).items() >= bytes_of(tmp_path / "undisturbed").items()


def test_tars_that_were_indexed_are_not_overwritten(make_parquet, picture, encode, tmp_path: Path) -> None:
    """They are numbered as their maker chose; here from 1."""
    images = [encode(picture(number), "JPEG") for number in range(12)]
    table = make_parquet(images, [number % 2 for number in range(12)], ["0", "1"])
    shard(str(table), str(tmp_path / "made"), config())
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(3):
        shutil.copy(tmp_path / "made" / f"train-{number:06d}.tar", tars / f"train-{number + 1:06d}.tar")
    index(str(tars), workers=1)
    before = {name: state for name, state in states_of(tars).items() if name.endswith(".tar")}
    more = make_parquet([encode(picture(20), "JPEG"), encode(picture(21), "PNG")], [1, 0], ["0", "1"], "more.parquet")
    info = shard(str(more), str(tars), config(), append=True)
    assert (info["samples"], info["class_counts"]) == (14, [7, 7])
    assert [entry.name for entry in read_dataset(tars).shards] == [f"train-{n:06d}.tar" for n in (1, 2, 3, 4)]
    assert {name: states_of(tars)[name] for name in before} == before
    assert_sound(tars)
    assert json.loads((tars / "dataset.json").read_text())["parts"][0]["run"] == ""
