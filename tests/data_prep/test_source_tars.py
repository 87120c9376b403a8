"""Tars of other makers and of ours: what they hold arrives, what is damaged or unsafe in them does not."""

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from webdataset.writer import ShardWriter, TarWriter

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.index import index
from vitscale.data_prep.manifest import manifest_parts, read_dataset, read_samples
from vitscale.data_prep.shard import shard
from vitscale.data_prep.source_tar import MAX_TEXT_BYTES
from vitscale.data_prep.sources import Item, open_source
from vitscale.data_prep.storage import LocalFolder
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError

SMALL = ShardConfig(shard_samples=4, workers=1)
Member = tuple[str, bytes] | tarfile.TarInfo


@pytest.fixture(scope="module")
def jpegs(picture, encode) -> list[bytes]:
    return [encode(picture(number), "JPEG", quality=95) for number in range(10)]


def write_samples(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Tars of four samples by webdataset's own writer."""
    folder.mkdir()
    with ShardWriter(f"{folder}/data-%06d.tar", maxcount=4, verbose=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", **sample})


def write_members(path: Path, members: list[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content), or of headers alone."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def header(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def items_of(path: Path) -> list[Item]:
    source = open_source(str(path))
    return [item for chunk in source.chunks for item in chunk.read(source.folder)]


def records_of(out: Path) -> list[dict[str, Any]]:
    return [row for part in manifest_parts(read_dataset(out)) for row in pq.read_table(out / part).to_pylist()]


def samples_of(out: Path) -> dict[str, tuple[bytes, int]]:
    """Image bytes, where the sidecars say that they lie, and label of every sample."""
    found = {}
    for entry in read_dataset(out).shards:
        samples, tar = read_samples(LocalFolder(str(out)), entry.name), (out / entry.name).read_bytes()
        for key, label, start, length in zip(
            samples.keys, samples.labels, samples.offsets, samples.lengths, strict=True
        ):
            found[key] = tar[start : start + length], int(label)
    return found


def assert_sound(out: Path, samples: int) -> None:
    report = verify(str(out), workers=1)
    assert (report.problems, report.samples) == ([], samples)


def test_tars_of_webdataset(tmp_path: Path, jpegs) -> None:
    write_samples(tmp_path / "in", [{"jpg": data, "cls": number % 3} for number, data in enumerate(jpegs)])
    source = open_source(str(tmp_path / "in"))
    assert (source.labelled, source.classes, len(source.chunks)) == ("class", None, 3)
    info = shard(str(tmp_path / "in"), str(tmp_path / "out"), SMALL)
    assert (info["samples"], info["classes"], info["class_counts"]) == (10, ["0", "1", "2"], [4, 3, 3])
    expected = {hashlib.sha256(data).hexdigest()[:24]: (data, number % 3) for number, data in enumerate(jpegs)}
    assert samples_of(tmp_path / "out") == expected
    assert [row["name"] for row in records_of(tmp_path / "out")][3:5] == [
        "data-000000.tar/000003",
        "data-000001.tar/000004",
    ]
    assert_sound(tmp_path / "out", 10)
    two = ShardConfig(shard_samples=4, workers=2)
    assert shard(str(tmp_path / "in" / "*.tar"), str(tmp_path / "two"), two)["fingerprint"] == info["fingerprint"]


def test_captions_and_metadata_as_img2dataset_writes_them(tmp_path: Path, jpegs) -> None:
    captions = ["größer 😀", "", "a\nb", "half a pair \ud83d"]
    (tmp_path / "in").mkdir()
    with TarWriter(str(tmp_path / "in" / "00000.tar")) as writer:
        for number, caption in enumerate(captions):
            values = {"caption": caption, "url": "http://x", "status": "success", "error_message": None, "width": 256}
            text = caption.encode(errors="replace")
            writer.write({"__key__": f"{number:09d}", "jpg": jpegs[number], "json": values, "txt": text})
    info = shard(str(tmp_path / "in"), str(tmp_path / "out"), SMALL)
    assert (info["labels"], info["classes"], info["samples"]) == ("none", [], 4)
    for row, caption in zip(records_of(tmp_path / "out"), captions, strict=True):
        expected = {"caption": caption, "url": "http://x", "status": "success", "width": 256}
        expected["txt"] = caption.encode(errors="replace").decode()
        assert json.loads(row["extra"]) == expected
        with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
            member = archive.extractfile(f"{row['key']}.json")
            assert member is not None
            assert json.loads(member.read()) == expected
    assert_sound(tmp_path / "out", 4)


def test_several_labels_in_json(tmp_path: Path, jpegs) -> None:
    labels = [[0, 3], [], [1], None, [-1], "0"]
    write_samples(tmp_path / "in", [{"jpg": jpegs[n], "json": {"labels": some}} for n, some in enumerate(labels)])
    info = shard(str(tmp_path / "in"), str(tmp_path / "out"), SMALL)
    assert (info["labels"], info["class_counts"]) == ("multi", [1, 1, 0, 1])
    assert [(row["labels"], row["reason"]) for row in records_of(tmp_path / "out")] == [
        ([0, 3], None),
        ([], None),
        ([1], None),
        (None, "label: 'None' is no class number"),
        (None, "label: '-1' is no class number"),
        (None, "label: labels of .json are no list"),
    ]
    assert_sound(tmp_path / "out", 3)


def test_what_labels_are_does_not_hang_on_the_first_sample(tmp_path: Path, jpegs) -> None:
    members: list[Member] = [("0.jpg", jpegs[0]), ("1.jpg", jpegs[1]), ("1.cls", b"one"), ("2.jpg", jpegs[2])]
    found = items_of(write_members(tmp_path / "in.tar", [*members, ("2.json", b'{"label": 1}')]))
    assert [(item.label, item.problem) for item in found] == [
        (None, "label: 'None' is no class number"),
        (None, "label: invalid literal for int() with base 10: 'one'"),
        (1, ""),
    ]


def test_our_own_shards_again(make_folder, tmp_path: Path, encode, picture) -> None:
    images = make_folder(each=1)
    for number, kind in enumerate(("ant", "bee", "bee", "cat", "bee")):
        (images / kind / f"x{number}.jpg").write_bytes(encode(picture(number + 50), "JPEG"))
    first = shard(str(images), str(tmp_path / "one"), SMALL)
    again = shard(str(tmp_path / "one"), str(tmp_path / "two"), SMALL)
    assert again["classes"] == first["classes"] == ["ant", "bee", "cat"]
    assert again["class_counts"] == first["class_counts"]
    assert samples_of(tmp_path / "two") == samples_of(tmp_path / "one")
    assert again["fingerprint"] == first["fingerprint"]  # the tars are the same, byte for byte


def test_our_own_shards_with_several_labels_and_captions_again(tmp_path: Path, jpegs) -> None:
    values = [{"labels": [n % 3, 3], "caption": f"picture {n}", "deep": {"list": [n, None]}} for n in range(6)]
    write_samples(tmp_path / "in", [{"jpg": jpegs[n], "json": value} for n, value in enumerate(values)])
    prints = [
        shard(str(tmp_path / source), str(tmp_path / out), SMALL)["fingerprint"]
        for source, out in (("in", "one"), ("one", "two"), ("two", "three"))
    ]
    assert len(set(prints)) == 1


def cut_in_an_image(tar: bytes, offset: int, length: int) -> bytes:
    return tar[: offset + length // 2]


def cut_in_a_header(tar: bytes, offset: int, length: int) -> bytes:
    return tar[: offset - 200]


def no_header(tar: bytes, offset: int, length: int) -> bytes:
    return tar[: offset - 512] + b"\xff" * 512 + tar[offset:]


def forged(tar: bytes, offset: int, size: int, kind: bytes) -> bytes:
    header = bytearray(tar[offset - 512 : offset])
    header[124:136], header[156:157] = size.to_bytes(12, "big", signed=True), kind
    if size > 0:
        header[124] = 0x80  # GNU's mark of a binary number
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[: offset - 512] + header + tar[offset:]


def negative_size(tar: bytes, offset: int, length: int) -> bytes:
    """A member that would lead the reader back."""
    return forged(tar, offset, -4096, tarfile.REGTYPE)


def long_name(tar: bytes, offset: int, length: int) -> bytes:
    """A name for which a reader would ask for a petabyte."""
    return forged(tar, offset, 10**15, tarfile.GNUTYPE_LONGNAME)


@pytest.mark.parametrize("damage", [cut_in_an_image, cut_in_a_header, no_header, negative_size, long_name])
def test_of_a_damaged_tar_the_samples_before_the_damage_are_kept(
    tmp_path: Path, jpegs, damage: Callable[..., bytes]
) -> None:
    write_samples(tmp_path / "in", [{"jpg": data, "cls": 0} for data in jpegs])
    path = tmp_path / "in" / "data-000001.tar"
    whole = items_of(path)
    path.write_bytes(damage(path.read_bytes(), whole[2].offset, len(whole[2].data or b"")))
    assert len(whole) == 4
    assert items_of(path)[:2] == whole[:2]
    (problem,) = items_of(path)[2:]
    assert (problem.name, problem.data) == (path.name, None)
    assert problem.problem.startswith("unreadable: tar: ")
    info = shard(str(tmp_path / "in"), str(tmp_path / "out"), SMALL)
    assert (info["samples"], info["rejected"]) == (4 + 2 + 2, {"unreadable": 1})


def test_a_tar_without_an_end_is_reported_and_kept_whole(tmp_path: Path, jpegs) -> None:
    path = write_members(tmp_path / "x.tar", [("0.jpg", jpegs[0]), ("1.jpg", jpegs[1])])
    path.write_bytes(path.read_bytes()[: items_of(path)[1].offset + 512 * -(-len(jpegs[1]) // 512)])
    assert [item.data for item in items_of(path)] == [*jpegs[:2], None]
    assert items_of(path)[2].problem.startswith("unreadable: tar: neither a member nor the end")


@pytest.mark.parametrize("content", [b"", b"no tar" * 500, bytes(1024)])
def test_files_that_are_no_tars(tmp_path: Path, jpegs, content: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match="of which no sample can be read") as error:
        open_source(str(tmp_path / "bad.tar"))
    assert error.value.setting == "SOURCE"
    write_members(tmp_path / "good.tar", [("0.jpg", jpegs[0])])
    found = items_of(tmp_path / "*.tar")
    assert found[-1].data == jpegs[0]
    assert all(item.problem.startswith("unreadable: tar: ") for item in found[:-1])


def unsafe_members(jpeg: bytes, outside: Path) -> dict[str, list[Member]]:
    """Samples that a careless reader would follow, unpack or load, by the reason to refuse them."""
    bomb = b'{"a":' * 40_000 + b"1" + b"}" * 40_000
    return {
        f"unsafe: member '{outside}.jpg'": [(f"{outside}.jpg", jpeg)],
        "unsafe: member '../up.jpg'": [("../up.jpg", jpeg)],
        "unsafe: member 'x/../../up.jpg'": [("x/../../up.jpg", jpeg)],
        "unsafe: member '..\\\\up.jpg'": [("..\\up.jpg", jpeg)],
        "unsafe: member 'soft.jpg' is no plain file": [header("soft.jpg", tarfile.SYMTYPE, f"{outside}.jpg")],
        "unsafe: member 'hard.jpg' is no plain file": [header("hard.jpg", tarfile.LNKTYPE, "good.jpg")],
        "unsafe: member 'null.jpg' is no plain file": [header("null.jpg", tarfile.CHRTYPE)],
        "unsafe: member 'disk.jpg' is no plain file": [header("disk.jpg", tarfile.BLKTYPE)],
        "unsafe: member 'pipe.jpg' is no plain file": [header("pipe.jpg", tarfile.FIFOTYPE)],
        "unsafe: pickled member .pkl": [("p.jpg", jpeg), ("p.pkl", pickle.dumps([1]))],
        "unsafe: pickled member .pyd": [("q.pyd", pickle.dumps([1])), ("q.jpg", jpeg)],
        f"too large: member .txt of {MAX_TEXT_BYTES + 1} bytes": [("t.txt", b"x" * (MAX_TEXT_BYTES + 1))],
        f"too large: member .json of {2 * MAX_TEXT_BYTES} bytes": [("j.json", b" " * 2 * MAX_TEXT_BYTES)],
        f"too large: member .cls of {MAX_TEXT_BYTES + 1} bytes": [("c.cls", b"1" * (MAX_TEXT_BYTES + 1))],
        "label: member .json nested too deeply": [("deep.jpg", jpeg), ("deep.json", bomb)],
        "label: member .json is no object": [("list.jpg", jpeg), ("list.json", b"[1]")],
        "unsupported: 2 image members": [("two.jpg", jpeg), ("two.png", jpeg)],
        "unsupported: two members .jpg": [("same.jpg", jpeg), ("same.jpg", jpeg)],
        "unsupported: no image members": [("none.txt", b"words")],
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_unsafe_members_are_refused_and_nothing_is_unpacked(tmp_path: Path, jpegs, format: int) -> None:
    cases = unsafe_members(jpegs[0], tmp_path / "outside")
    members = [member for some in cases.values() for member in some]
    members += [("good.jpg", jpegs[1]), ("good.cls", b"0\n")]
    tar = write_members(tmp_path / "in" / "x.tar", members, format)
    info = shard(str(tar), str(tmp_path / "out"), SMALL)
    records = records_of(tmp_path / "out")
    assert [row["reason"] for row in records] == [*cases, None]
    assert list(samples_of(tmp_path / "out").values()) == [(jpegs[1], 0)]
    assert info["rejected"] == {"label": 2, "too large": 3, "unsafe": 11, "unsupported": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["x.tar"]


def test_folders_long_names_and_names_that_are_not_utf8(tmp_path: Path, jpegs) -> None:
    long = "d" * 200 + "/" + "f" * 200
    names = ["./a.b/0", "a/0", "b/0", long, "caf\udce9", "Größe"]
    members: list[Member] = [header("a", tarfile.DIRTYPE)]
    members += [(f"{name}.JPG", jpegs[number]) for number, name in enumerate(names)]
    found = items_of(write_members(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    assert [item.name for item in found] == [f"x.tar/{name}" for name in [*names[:4], "caf\\udce9", "Größe"]]
    assert [item.data for item in found] == jpegs[:6]


def test_tars_are_indexed_where_they_are(tmp_path: Path, jpegs, encode, picture) -> None:
    folder = tmp_path / "in"
    png = encode(picture(20), "PNG")
    samples = [{"jpg": data, "cls": number % 3} for number, data in enumerate(jpegs)]
    samples[4] = {"png": png, "cls": 2}
    samples[5] = {"jpg": b"<html>", "cls": 1}
    write_samples(folder, samples)
    mixed: list[Member] = [("./a/0.jpg", jpegs[0]), ("./a/0.cls", b"1\n"), ("./b/0.jpg", jpegs[1])]
    mixed += [("./b/0.json", b'{"label": 2, "x": 1}'), ("../up.jpg", jpegs[2]), ("./c/0.cls", b"0")]
    write_members(folder / "mixed.tar", [*mixed, ("./c/0.jpg", jpegs[2])])
    write_members(folder / "short.tar", [("7.jpg", jpegs[3]), ("7.cls", b"0"), ("8.jpg", jpegs[4]), ("8.cls", b"0")])
    (folder / "short.tar").write_bytes((folder / "short.tar").read_bytes()[:3000])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    info = index(str(folder), split="found", workers=2)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in folder.rglob("*.*"))
    dataset = read_dataset(folder)
    assert (info["samples"], info["rejected"]) == (13, {"not an image": 1, "unreadable": 1, "unsafe": 1})
    assert (dataset.split, dataset.labelled, dataset.classes) == ("found", "class", ("0", "1", "2"))
    assert [entry.samples for entry in dataset.shards] == [4, 3, 2, 3, 1]
    assert_sound(folder, 13)

    found = samples_of(folder)
    assert found["000000"] == (jpegs[0], 0)
    assert found["000004"] == (png, 2)
    assert (found["./a/0"], found["./b/0"], found["./c/0"]) == ((jpegs[0], 1), (jpegs[1], 2), (jpegs[2], 0))
    assert all(decode_rgb(data).shape == (20, 28, 3) for data, _ in found.values())
    with pytest.raises(UserError, match="which holds a dataset"):
        index(str(folder))


def test_damage_after_indexing_is_found(tmp_path: Path, jpegs) -> None:
    write_samples(tmp_path / "in", [{"jpg": jpegs[0], "cls": 0}, {"jpg": b"x", "cls": 0}, {"jpg": jpegs[1], "cls": 1}])
    index(str(tmp_path / "in"), workers=1)
    path = tmp_path / "in" / "data-000000.tar"
    whole = path.read_bytes()
    at = whole.index(b"000002.cls")
    path.write_bytes(whole[: at + 512] + b"0" + whole[at + 513 :])
    found = verify(str(tmp_path / "in"), workers=1).problems
    assert f"{path.name}: 000002: label member differs from the sidecar" in found
    path.write_bytes(whole[: whole.index(b"000002.jpg") + 700])
    assert f"{path.name}: 000002: missing, as is all that follows" in verify(str(tmp_path / "in"), workers=1).problems


@pytest.mark.parametrize("damage", [negative_size, long_name])
def test_verify_is_not_led_astray_by_a_damaged_header(tmp_path: Path, jpegs, damage: Callable[..., bytes]) -> None:
    write_samples(tmp_path / "in", [{"jpg": data, "cls": 0} for data in jpegs[:4]])
    shard(str(tmp_path / "in"), str(tmp_path / "out"), SMALL)
    path = tmp_path / "out" / "train-000000.tar"
    samples = read_samples(LocalFolder(str(tmp_path / "out")), path.name)
    path.write_bytes(damage(path.read_bytes(), samples.offsets[2], samples.lengths[2]))
    found = verify(str(tmp_path / "out"), workers=1).problems
    assert f"{path.name}: SHA-256 differs from the index" in found
    assert any(line.startswith(f"{path.name}: tar not readable: a ") for line in found)


def test_an_indexed_set_without_labels_and_folders_that_cannot_be_indexed(tmp_path: Path, jpegs) -> None:
    write_samples(tmp_path / "in", [{"jpg": data, "txt": "words"} for data in jpegs[:3]])
    info = index(str(tmp_path / "in"), check="header", workers=1)
    assert (info["labels"], info["classes"], info["samples"]) == ("none", [], 3)
    assert_sound(tmp_path / "in", 3)
    with pytest.raises(UserError, match=r"without a \.tar"):
        index(str(tmp_path))
    write_samples(tmp_path / "bad", [{"jpg": b"x", "cls": 0}])
    with pytest.raises(UserError, match="no image can be used"):
        index(str(tmp_path / "bad"), workers=1)
    assert not (tmp_path / "bad" / "dataset.json").exists()
