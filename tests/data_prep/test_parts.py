"""Stages cut into parts, and records cut into buckets: neither changes a byte of the dataset."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.data_prep.config import DedupConfig, ResizeConfig, ShardConfig
from vitscale.data_prep.shard import STAGES, Part, bucket_count, shard
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

CONFIG = ShardConfig(shard_samples=4, workers=1, dedup=DedupConfig("drop", near=8))
PROGRAM = """
import sys
from vitscale.data_prep import shard as module
from vitscale.data_prep.config import DedupConfig, ShardConfig
source, out, stage, part = sys.argv[1:]
module.BUCKET_RECORDS = 10
config = ShardConfig(shard_samples=4, workers=1, dedup=DedupConfig("drop", near=8))
module.shard(source, out, config, stage=stage, part=module.Part.parse(part) if part else None)
"""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(make_folder) -> Path:
    """A table of 44 rows in 8 chunks: JPEG and PNG, exact and near copies, and files that are no images."""
    folder = make_folder(each=12)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    whole = (folder / names[0]).read_bytes()
    (folder / "near.jpg").write_bytes(whole[:2] + b"\xff\xfe\0\x04no" + whole[2:])  # with a comment: the same pixels
    (folder / "page.jpg").write_bytes(b"<html>")
    names += ["page.jpg", names[0], "near.jpg", names[5], "gone.jpg", names[1], names[0], "near.jpg"]
    table = pa.table({"path": names, "label": [row % 3 for row in range(len(names))], "note": names})
    pq.write_table(table, folder / "table.parquet", row_group_size=6)
    return folder / "table.parquet"


def test_parts_in_processes_of_their_own_make_the_same_bytes(source: Path, tmp_path: Path) -> None:
    info = shard(str(source), str(tmp_path / "plain"), CONFIG)
    assert (info["duplicate"] >= 6, sum(info["rejected"].values()), info["shards"] >= 6) == (True, 2, True)
    out = tmp_path / "parts"
    for stage in STAGES:
        command = [sys.executable, "-c", PROGRAM, str(source), str(out), stage]
        running = [
            subprocess.Popen([*command, f"{number}/3"], stderr=subprocess.PIPE, text=True) for number in (3, 1, 2)
        ]
        said = [process.communicate()[1] for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], said
        assert not (out / "dataset.json").exists()
    assert len(list((out / "work" / "dedup").iterdir())) == 5  # buckets, of which the plain run has one
    subprocess.run([sys.executable, "-c", PROGRAM, str(source), str(out), "publish", ""], check=True)
    assert bytes_of(out) == bytes_of(tmp_path / "plain")


def test_parts_may_come_one_by_one_in_any_order_and_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(str(source), str(tmp_path / "plain"), CONFIG)
    monkeypatch.setattr("vitscale.data_prep.shard.BUCKET_RECORDS", 7)
    out = str(tmp_path / "parts")
    for stage in STAGES:
        done: list[tuple[int, int]] = []
        for part in ("2/2", "3/3", "1/3", "1/3", "2/3"):  # the first of another count: what it did is not done again
            assert shard(str(source), out, CONFIG, reports_to(done), stage=stage, part=Part.parse(part)) == {}
        assert len(done) == len(list((tmp_path / "parts" / "work" / marker(stage)).iterdir()))
    shard(str(source), out, CONFIG)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "plain")


def reports_to(done: list[tuple[int, int]]) -> Callable[..., None]:
    return lambda stage, finished, tasks, tally: done.append((finished, tasks))


def marker(stage: str) -> str:
    return {"write": "shards", "records": "summary"}.get(stage, stage)


def test_a_stage_waits_for_all_parts_of_the_one_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscale.data_prep.shard.BUCKET_RECORDS", 7)
    out = str(tmp_path / "out")
    for number, stage in enumerate(STAGES, start=1):
        shard(str(source), out, CONFIG, stage=stage, part=Part(1, 2))
        before = bytes_of(tmp_path / "out")
        for later in (*STAGES, "publish")[number:]:
            with pytest.raises(UserError) as error:
                shard(str(source), out, CONFIG, stage=later, part=Part(1, 2) if later != "publish" else None)
            assert f"got {later}, while" in str(error.value)
            assert f"tasks of the stage {stage} are not done" in str(error.value)
            assert f"Run every part of --stage {stage} first" in str(error.value)
        assert bytes_of(tmp_path / "out") == before
        shard(str(source), out, CONFIG, stage=stage, part=Part(2, 2))
    assert shard(str(source), out, CONFIG, stage="publish")["already_complete"] is False
    assert shard(str(source), out, CONFIG, stage="scan", part=Part(1, 2))["already_complete"] is True


def test_stages_that_do_not_fit_together_are_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of two versions that cut the records into buckets in two ways: some records would be lost."""
    out = str(tmp_path / "out")
    monkeypatch.setattr("vitscale.data_prep.shard.BUCKET_RECORDS", 7)
    for stage in STAGES:
        shard(str(source), out, CONFIG, stage=stage)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"new shards hold \d+ of 36 images; expected stages that are all of one version"
    ):
        shard(str(source), out, CONFIG)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_parts_that_name_no_part_are_refused(source: Path, tmp_path: Path) -> None:
    for text in ("", "3", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/3", "1/", "½/1"):
        with pytest.raises(UserError) as error:
            Part.parse(text)
        assert error.value.setting == "--part"
    assert Part.parse("3/64") == Part(3, 64)
    for stage, setting in (("", "--part"), ("publish", "--part"), ("sort", "--stage")):
        with pytest.raises(UserError) as error:
            shard(str(source), str(tmp_path / "out"), CONFIG, stage=stage, part=Part(1, 3))
        assert error.value.setting == setting
    assert not (tmp_path / "out").exists()


def test_the_command_line_does_parts(source: Path, vitscale, tmp_path: Path) -> None:
    command = ("shard", source, tmp_path / "out", "shard_samples=8")
    alone = vitscale(*command, "--part", "1/3")
    assert alone.returncode == 2
    assert "--part: got 1/3; expected --stage beside it" in " ".join(alone.stderr.split())
    both = vitscale(*command, "--stage", "scan", "--publish")
    assert both.returncode == 2
    assert "--publish: got --stage scan beside it" in " ".join(both.stderr.split())
    assert vitscale(*command, "--stage", "scan", "--part", "1/2").returncode == 0
    early = vitscale(*command, "--stage", "dedup", "--part", "2/2")
    assert early.returncode == 2
    assert "4 of 8 tasks of the stage scan are not done" in " ".join(early.stderr.split())
    shard(str(source), str(tmp_path / "out"), ShardConfig(shard_samples=8, workers=1))  # goes on
    assert verify(str(tmp_path / "out"), workers=1).problems == []


@pytest.mark.parametrize("near", [0, 8])
@pytest.mark.parametrize("records", [7, 30])
def test_small_buckets_make_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: int, records: int
) -> None:
    config = ShardConfig(shard_samples=5, workers=1, dedup=DedupConfig("drop" if near else "keep", near))
    one = shard(str(source), str(tmp_path / "one"), config)
    monkeypatch.setattr("vitscale.data_prep.shard.BUCKET_RECORDS", records)
    assert bucket_count(44) == -(-44 // records)
    assert shard(str(source), str(tmp_path / "many"), config) == one
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")


def test_small_buckets_find_the_same_leaks_and_additions(
    make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that crosses the exchange at once: leaks, an append, pictures made smaller, and near copies of them all."""
    held, first, new = (
        make_folder(name, ("a", "b", "c"), each) for name, each in (("held", 4), ("first", 9), ("new", 16))
    )
    shard(str(held), str(tmp_path / "test"), ShardConfig(split="test", workers=1))
    dedup = DedupConfig("drop", near=8, against=[str(tmp_path / "test")])
    config = ShardConfig(shard_samples=5, workers=1, resize=ResizeConfig(16), format="png", dedup=dedup)
    infos = []
    for name in ("one", "many"):
        shard(str(first), str(tmp_path / name), config)
        infos.append(shard(str(new), str(tmp_path / name), config, append=True))
        monkeypatch.setattr("vitscale.data_prep.shard.BUCKET_RECORDS", 7)
    assert infos[0] == infos[1]
    assert infos[0]["leaked"] > 0
    assert infos[0]["duplicate"] > 0
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")
