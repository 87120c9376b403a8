"""Listing and reading: classes, order, what is left out, and what is refused."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data_prep.source_folder import CHUNK_FILES
from vitscale.data_prep.source_table import READ_ROWS
from vitscale.data_prep.sources import MAX_CHUNKS, Item, Source, cut_evenly, open_source
from vitscale.errors import UserError


def read_all(source: Source) -> list[Item]:
    return [item for chunk in source.chunks for item in chunk.read(source.folder)]


def refusal(path: Path | str) -> UserError:
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert error.value.setting == "SOURCE"
    return error.value


def write(path: Path, data: bytes = b"data") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_folder_lists_nested_files_by_class_and_leaves_hidden_ones_out(tmp_path: Path) -> None:
    for name in (
        "bee/2.jpg",
        "ant/1.jpg",
        "ant/deep/er/0.png",
        "ant/.hidden.jpg",
        "ant/.git/x.jpg",
        ".cache/y.jpg",
        "note.txt",
    ):
        write(tmp_path / name, name.encode())
    source = open_source(str(tmp_path))
    assert source.classes == ["ant", "bee"]
    assert read_all(source) == [
        Item("ant/1.jpg", 0, b"ant/1.jpg", file="ant/1.jpg"),
        Item("ant/deep/er/0.png", 0, b"ant/deep/er/0.png", file="ant/deep/er/0.png"),
        Item("bee/2.jpg", 1, b"bee/2.jpg", file="bee/2.jpg"),
    ]
    assert (source.name, source.labelled, source.images, source.walked) == (tmp_path.name, "class", 3, True)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", ".hidden.jpg"):
        write(tmp_path / name)
    source = open_source(str(tmp_path))
    assert (source.classes, source.labelled, source.images) == ([], "none", 2)
    assert read_all(source) == [Item(name, None, b"data", file=name) for name in ("a.png", "b.jpg")]


def test_a_class_folder_without_files_is_a_class(tmp_path: Path) -> None:
    write(tmp_path / "bee" / "1.jpg")
    (tmp_path / "ant").mkdir()
    source = open_source(str(tmp_path))
    assert source.classes == ["ant", "bee"]
    assert [item.label for item in read_all(source)] == [1]


def test_folder_order_is_by_name_not_by_creation(tmp_path: Path) -> None:
    names = [f"{kind}/{number}.jpg" for kind in "abc" for number in range(5)]
    for name in names:
        write(tmp_path / "one" / name)
    for name in reversed(names):
        write(tmp_path / "two" / name)
    one, two = (open_source(str(tmp_path / name)) for name in ("one", "two"))
    assert read_all(one) == read_all(two)
    assert one.digest == two.digest
    write(tmp_path / "two" / "a" / "0.jpg", b"other size")
    assert open_source(str(tmp_path / "two")).digest != one.digest


def test_files_that_cannot_be_read_are_problems_not_stops(tmp_path: Path) -> None:
    write(tmp_path / "outside.jpg")
    for name in ("gone.jpg", "good.jpg"):
        write(tmp_path / "root" / "ant" / name)
    root = tmp_path / "root" / "ant"
    (root / "inside.jpg").symlink_to("good.jpg")
    (root / "outside.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "dangling.jpg").symlink_to("nothing")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    source = open_source(str(tmp_path / "root"))
    (root / "gone.jpg").unlink()
    assert {item.name.removeprefix("ant/"): item.problem or item.data for item in read_all(source)} == {
        "good.jpg": b"data",
        "inside.jpg": b"data",
        "gone.jpg": "unreadable: No such file or directory",
        "dangling.jpg": "unreadable: No such file or directory",
        "outside.jpg": "unreadable: symlink that leaves the source",
        "loop": "not a file: symlink to a folder",
        "pipe.jpg": "not a file",
    }


def test_names_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    write(tmp_path / "ant" / os.fsdecode(b"caf\xe9.jpg"))
    assert read_all(open_source(str(tmp_path))) == [Item("ant/caf\\xe9.jpg", 0, b"data")]  # no place to read again


def test_folder_is_cut_into_chunks(tmp_path: Path) -> None:
    for number in range(CHUNK_FILES + 44):
        write(tmp_path / "ant" / f"{number:03d}.jpg")
    source = open_source(str(tmp_path))
    assert [chunk.images for chunk in source.chunks] == [CHUNK_FILES, 44]
    names = [item.name for item in source.chunks[1].read(source.folder)]
    assert names == [f"ant/{number}.jpg" for number in range(CHUNK_FILES, CHUNK_FILES + 44)]


@given(st.integers(0, 10**7), st.integers(1, 10**4))
def test_cuts_are_few_and_cover_all(count: int, least: int) -> None:
    ranges = cut_evenly(count, least)
    assert len(ranges) <= MAX_CHUNKS
    assert [0, *(rows.stop for rows in ranges)] == [*(rows.start for rows in ranges), count]
    assert all(len(rows) >= least for rows in ranges[:-1])


def test_refused_folders(tmp_path: Path) -> None:
    assert "nothing is there" in str(refusal(tmp_path / "missing"))
    assert "nothing is there" in str(refusal(tmp_path))
    (tmp_path / "ant").mkdir()
    assert "empty class folders" in str(refusal(tmp_path))
    write(tmp_path / "splits" / "train" / "ant" / "1.jpg")
    write(tmp_path / "splits" / "val" / "ant" / "1.jpg")
    assert "train, val" in str(refusal(tmp_path / "splits"))


def test_parquet_rows_across_reads(make_parquet) -> None:
    count = 2 * READ_ROWS + 50
    path = make_parquet(
        [b"%d" % row for row in range(count)],
        [row % 2 for row in range(count)],
        ["no", "yes"],
        row_group_size=count - 20,
    )
    source = open_source(str(path))
    assert (source.classes, source.labelled, source.images) == (["no", "yes"], "class", count)
    assert [chunk.images for chunk in source.chunks] == [count - 20, 20]
    assert read_all(source) == [Item(f"train.parquet:{row}", row % 2, b"%d" % row) for row in range(count)]


def test_parquet_without_bytes_in_a_row(make_parquet) -> None:
    source = open_source(str(make_parquet([b"x", None], [0, 0], ["no"])))
    assert [item.problem for item in read_all(source)] == ["", "unreadable: no embedded bytes"]


def test_parquet_splits_are_not_mixed(make_parquet, tmp_path: Path) -> None:
    for split, data in (("train", b"a"), ("test", b"b")):
        for part in range(2):
            make_parquet([data], [0], ["no"], file=f"{split}-{part:05d}-of-00002.parquet")
    assert "test-*.parquet" in refusal(tmp_path).remedy
    source = open_source(f"{tmp_path}/train-*.parquet")
    assert source.name == "train-*.parquet"
    assert [item.data for item in read_all(source)] == [b"a", b"a"]
    assert "nothing is there" in str(refusal(f"{tmp_path}/validation-*.parquet"))


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (-1, "label: '-1' is no class number"),
        (2, "label: 2 of 2 classes"),
        (2**31, "label: '2147483648' is no class number"),
        (None, "label: 'None' is no class number"),
    ],
)
def test_a_label_that_names_no_class_is_a_problem(make_parquet, label: int | None, problem: str) -> None:
    source = open_source(str(make_parquet([b"x", b"y"], [0, label], ["no", "yes"])))
    assert read_all(source) == [Item("train.parquet:0", 0, b"x"), Item("train.parquet:1", None, None, problem)]


def test_refused_parquet(make_parquet, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), other)
    assert "picture: binary, label: int64" in str(refusal(other))
    named = make_parquet([b"x"], [0], ["no"])
    pq.write_table(pq.read_table(named).replace_schema_metadata(None), other)
    assert open_source(str(other)).classes is None  # numbers without names
    other.write_bytes(named.read_bytes()[:-9])
    assert "readable Parquet file" in str(refusal(other))
    make_parquet([b"x"], [0], ["no", "yes"], file="other.parquet")
    assert "other columns or class names" in str(refusal(tmp_path))
    make_parquet([], [], ["no"], file="empty.parquet")
    assert "without a row" in str(refusal(tmp_path / "empty.parquet"))


def test_damage_within_a_parquet_file(make_parquet) -> None:
    path = make_parquet([os.urandom(1000) for _ in range(50)], [0] * 50, ["no"])
    source = open_source(str(path))
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the header of the first page
    path.write_bytes(data)
    with pytest.raises(UserError, match="readable Parquet file"):
        read_all(source)


def test_cifar10_is_listed(shared_data: Path) -> None:
    source = open_source(str(shared_data / "cifar10" / "train-*.parquet"))
    assert source.classes is not None
    assert source.classes[:3] == ["airplane", "automobile", "bird"]
    assert sum(chunk.images for chunk in source.chunks) == source.images == 50_000
    assert "one split" in str(refusal(shared_data / "cifar10"))
