"""Tables of images, from the file that a user has to the shards: labels, extra columns, URLs, and what is refused."""

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.manifest import manifest_parts, read_dataset
from vitscale.data_prep.shard import shard
from vitscale.data_prep.sources import open_source
from vitscale.data_prep.verify import verify
from vitscale.errors import UserError


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write Parquet, TSV or CSV, as the suffix says; None is an empty cell."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def sharded(source: Path, workers: int = 1) -> tuple[dict[str, Any], dict[str, dict], dict[str, dict[str, bytes]]]:
    """Shard beside the source; return dataset.json, records by name, and the members of each sample by its key."""
    out = source.parent / f"{source.name}-out{workers}"
    info = shard(str(source), str(out), ShardConfig(shard_samples=4, workers=workers))
    report = verify(str(out), workers=1)
    assert (report.problems, report.samples) == ([], info["samples"])
    parts = manifest_parts(read_dataset(out))
    records = {row["name"]: row for part in parts for row in pq.read_table(out / part).to_pylist()}
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, suffix = member.name.split(".", 1)
                file = archive.extractfile(member)
                samples.setdefault(key, {})[suffix] = file.read() if file else b""
    return info, records, samples


def reasons(records: dict[str, dict]) -> dict[str, str]:
    return {name: row["reason"] for name, row in records.items() if row["status"] == "rejected"}


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert error.value.setting == "SOURCE"
    return error.value


@pytest.fixture
def jpegs(tmp_path: Path, picture, encode) -> list[bytes]:
    """Six pictures, in `tmp_path/pictures/0.jpg` to `5.jpg`."""
    (tmp_path / "pictures").mkdir()
    data = [encode(picture(number), "JPEG", quality=95) for number in range(6)]
    for number, one in enumerate(data):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(one)
    return data


PATHS = [f"pictures/{number}.jpg" for number in range(6)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("column", ["path", "file_name"])
def test_a_table_of_paths_with_labels_as_numbers(tmp_path: Path, jpegs, kind: str, column: str) -> None:
    labels = [2, 0, 2, 0, 3, 3]
    info, records, samples = sharded(write_table(tmp_path / f"t.{kind}", {column: PATHS, "label": labels}))
    assert (info["labels"], info["classes"], info["class_counts"]) == ("class", ["0", "1", "2", "3"], [2, 0, 2, 2])
    assert list(records) == PATHS
    for name, data, label in zip(PATHS, jpegs, labels, strict=True):
        assert records[name]["label"] == label
        assert samples[records[name]["key"]] == {"jpg": data, "cls": str(label).encode()}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_labels_as_names_are_classes_sorted(tmp_path: Path, jpegs, kind: str) -> None:
    labels = ["bee", "ant|x", "bee", "Zoë, or cat", "ant|x", "bee"]
    info, records, _ = sharded(write_table(tmp_path / f"t.{kind}", {"path": PATHS, "label": labels}))
    assert (info["classes"], info["class_counts"]) == (["Zoë, or cat", "ant|x", "bee"], [1, 2, 3])
    assert [row["label"] for row in records.values()] == [info["classes"].index(label) for label in labels]


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("kind", ["csv", "parquet", "large.parquet"])
def test_several_labels_an_image(tmp_path: Path, jpegs, kind: str, names: bool) -> None:
    numbers = [[0, 10], [2], [], [10], [2, 0], [0]]
    values: list[Any] = [[f"n{one}" if names else one for one in some] for some in numbers]
    given = ["|".join(map(str, some)) for some in values] if kind == "csv" else values
    if kind == "large.parquet":  # as polars writes them
        given = pa.array(values, pa.large_list(pa.large_string() if names else pa.int64()))
    info, records, samples = sharded(write_table(tmp_path / f"t.{kind}", {"path": PATHS, "labels": given}))
    classes = ["n0", "n10", "n2"] if names else [str(number) for number in range(11)]
    assert (info["labels"], info["classes"]) == ("multi", classes)
    assert sum(info["class_counts"]) == 7
    for name, some in zip(PATHS, values, strict=True):
        row = records[name]
        assert (row["label"], [classes[label] for label in row["labels"]]) == (None, list(map(str, some)))
        assert json.loads(samples[row["key"]]["json"]) == {"labels": row["labels"]}
        assert "cls" not in samples[row["key"]]


def test_a_csv_in_which_no_image_has_more_than_one_label(tmp_path: Path, jpegs) -> None:
    table = write_table(tmp_path / "t.csv", {"path": PATHS, "labels": [0, 1, None, 0, 1, 1]})
    _, records, _ = sharded(table)
    assert [row["labels"] for row in records.values()] == [[0], [1], [], [0], [1], [1]]


def test_embedded_images_with_several_labels(tmp_path: Path, jpegs) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"labels": {"feature": {"names": ["x", "y"]}}}}})}
    table = pa.table(
        {"image": [{"bytes": data, "path": None} for data in jpegs], "labels": [[0], [1], [0, 1], [], [2], None]}
    )
    path = tmp_path / "t.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)
    info, records, samples = sharded(path)
    assert (info["classes"], info["class_counts"]) == (["x", "y"], [2, 2])
    assert reasons(records) == {"t.parquet:4": "label: 2 of 2 classes", "t.parquet:5": "label: none given"}
    assert samples[records["t.parquet:2"]["key"]]["jpg"] == jpegs[2]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_further_columns_are_kept_and_no_label_is_none(tmp_path: Path, jpegs, kind: str) -> None:
    captions = ['two\nlines, "quoted"', "größer 😀", "", "x", "y", "z"]
    sizes = [1, 2, 3, 4, None, 2**40]
    columns = {"path": PATHS, "caption": captions, "size": sizes}
    info, records, samples = sharded(write_table(tmp_path / f"t.{kind}", columns))
    assert (info["labels"], info["classes"]) == ("none", [])
    for name, caption, size in zip(PATHS, captions, sizes, strict=True):
        expected = {"caption": caption} | ({"size": size} if size is not None else {})
        assert records[name]["label"] is None
        assert json.loads(records[name]["extra"]) == expected
        assert json.loads(samples[records[name]["key"]]["json"]) == expected


def test_pictures_that_are_encoded_anew_and_more_processes(tmp_path: Path, picture, encode) -> None:
    (tmp_path / "0.png").write_bytes(encode(picture(0), "PNG"))
    (tmp_path / "1.jpg").write_bytes(encode(picture(1), "JPEG"))
    names = ["0.png", "1.jpg"] * 200
    columns = {"path": names, "label": [number % 3 for number in range(400)], "row": list(range(400))}
    path = write_table(tmp_path / "t.csv", columns)
    (info, _, one), (_, _, two) = sharded(path, workers=1), sharded(path, workers=2)
    assert (info["samples"], info["shards"]) == (400, 100)
    assert one == two


def test_paths_that_lead_out_are_refused(tmp_path: Path, jpegs) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpegs[0])
    table = tmp_path / "pictures" / "t.csv"
    (tmp_path / "pictures" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "pictures" / "inside.jpg").symlink_to("1.jpg")
    (tmp_path / "pictures" / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pictures" / "pipe.jpg")
    outside = [
        str(tmp_path / "secret.jpg"),
        "../secret.jpg",
        "x/../../secret.jpg",
        "..\\secret.jpg",
        "\\secret.jpg",
        f"file://{tmp_path}/secret.jpg",
        "s3://bucket/secret.jpg",
    ]
    others = {
        "link.jpg": "unreadable: symlink that leaves the source",
        "loop.jpg": "unreadable: Too many levels of symbolic links",
        "pipe.jpg": "not a file",
        ".": "not a file",
        "none.jpg": "unreadable: No such file or directory",
        "pipe:cat 1.jpg": "unreadable: No such file or directory",
        "x" * 300: "unreadable: File name too long",
        "": "unsafe: path '' out of the table's folder",
    }
    kept = ["1.jpg", "./2.jpg", "inside.jpg"]
    write_table(table, {"path": [*outside, *others, *kept], "label": [0] * len([*outside, *others, *kept])})
    info, records, _ = sharded(table)
    found = reasons(records)
    assert all(found.pop(path).startswith("unsafe: path ") for path in outside)
    assert found == others
    assert info["samples"] == 3


class Pages(BaseHTTPRequestHandler):
    """Pictures, and the ways in which a server can refuse them."""

    pictures: list[bytes]
    asked: list[str]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        again = name in self.asked
        self.asked.append(name)
        moved = {"ftp": "ftp://127.0.0.1/0.jpg", "file": "file:///etc/passwd", "moved": "/0.jpg", "loop": "/loop"}
        data = self.pictures[int(name[0])] if name[0].isdecimal() else b""
        if name in moved:
            self.send_response(302)
            self.send_header("Location", moved[name])
        elif name.startswith("1") and not again:
            self.send_response(503)
        elif data:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            if name.startswith("2") and not again:
                data = data[:100]  # the connection breaks
        else:
            self.send_response(404)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(jpegs, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server of the six pictures, of which `1.jpg` and `2.jpg` fail when first asked for."""
    monkeypatch.setenv("no_proxy", "*")
    pages = type("TheirPages", (Pages,), {"pictures": jpegs, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), pages) as running:
        Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_text_file_of_urls(tmp_path: Path, jpegs, server: str) -> None:
    escape = os.path.relpath(tmp_path / "pictures" / "0.jpg", Path.cwd() / "s3:x")
    bad = {
        f"{server}/gone.jpg": "unreadable: HTTP 404",
        f"{server}/ftp": "unreadable: HTTP 302",
        f"{server}/file": "unreadable: HTTP 302",
        f"{server}/loop": "unreadable: HTTP 302",
        f"{server}/with space.jpg": "unreadable: URL can't contain control characters. '/with space.jpg' (found at "
        "least ' ')",
        "pipe:cat pictures/0.jpg": "unsafe: URL 'pipe:cat pictures/0.jpg' of another kind than http, https, s3, gs",
        f"file://{tmp_path}/pictures/0.jpg": f"unsafe: URL 'file://{tmp_path}/pictures/0.jpg' of another kind than "
        "http, https, s3, gs",
        "s3::pipe:x": "unsafe: URL 's3::pipe:x' of another kind than http, https, s3, gs",
        f"s3:x/{escape}": f"unsafe: URL 's3:x/{escape}' of another kind than http, https, s3, gs",
        "pictures/0.jpg": "unsafe: URL 'pictures/0.jpg' of another kind than http, https, s3, gs",
        "http://[broken/0.jpg": "unreadable: Invalid IPv6 URL",
    }
    good = [f"{server}/{name}" for name in ("0.jpg", "1.jpg", "2.jpg", "moved")]
    path = tmp_path / "urls.txt"
    path.write_text("\n".join(["# comment", *bad, "", *good]))
    info, records, samples = sharded(path)
    assert reasons(records) == bad
    assert (info["labels"], info["samples"]) == ("none", 4)
    assert [samples[records[url]["key"]]["jpg"] for url in good] == [*jpegs[:3], jpegs[0]]


def test_a_table_of_urls_with_labels_and_captions(tmp_path: Path, jpegs, server: str) -> None:
    urls = [f"{server}/{name}.jpg" for name in ("0", "3", "4", "gone")]
    columns = {"url": urls, "label": ["b", "a", "b", "c"], "caption": ["one", "two", "three", "four"]}
    info, records, samples = sharded(write_table(tmp_path / "t.parquet", columns))
    assert (info["classes"], info["class_counts"]) == (["a", "b", "c"], [1, 2, 0])
    sample = samples[records[urls[1]]["key"]]
    assert sample == {"jpg": jpegs[3], "cls": b"0", "json": b'{"caption": "two"}'}
    assert reasons(records) == {urls[3]: "unreadable: HTTP 404"}


def test_labels_that_are_none_reject_their_image_alone(tmp_path: Path, jpegs) -> None:
    _, records, _ = sharded(write_table(tmp_path / "n.csv", {"path": PATHS, "label": [0, None, -1, 10**7, 1, 1]}))
    assert reasons(records) == {
        PATHS[1]: "label: 'None' is no class number",
        PATHS[2]: "label: '-1' is no class number",
        PATHS[3]: "label: '10000000' is no class number",
    }
    _, records, _ = sharded(write_table(tmp_path / "s.csv", {"path": PATHS, "label": ["a", "", "b", "a", "a", "b"]}))
    assert reasons(records) == {PATHS[1]: "label: '' is no class number"}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("t.csv", b"", "a table that can be read"),
        ("t.csv", b"path,label\n", "without a row"),
        ("t.csv", b"picture,label\n0.jpg,1\n", "columns picture: string, label: int64; expected one of image, path"),
        ("t.csv", b"path,label\n0.jpg,1,2\n", "Expected 2 columns, got 3"),
        ("t.csv", b"path,label\n\xff\xfe.jpg,1\n", "columns path: binary"),
        ("t.csv", b"path,label\n1,1\n", "columns path: int64"),
        ("t.csv", b"path,label\n0.jpg,a/b\n", "the class name 'a/b'"),
        ("t.csv", b"path,label\n0.jpg,..\n", "the class name '..'"),
        ("t.csv", b"image,label\n0.jpg,1\n", "image: struct<bytes: binary, path: string>"),
        ("t.txt", b"# nothing\n\n", "without a row"),
        ("t.txt", b"http://\xff\n", "a table that can be read"),
        ("t.parquet", b"PAR1 and no more", "readable Parquet file"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    (tmp_path / file).write_bytes(content)
    assert said in str(refusal(tmp_path / file))


def test_odd_columns_and_several_tables_are_refused(tmp_path: Path) -> None:
    assert "one label in label" in str(refusal(write_table(tmp_path / "a.parquet", {"path": ["x"], "label": [[1]]})))
    assert "one label in label" in str(refusal(write_table(tmp_path / "b.parquet", {"path": ["x"], "labels": [1]})))
    assert "url: string" in str(refusal(write_table(tmp_path / "c.parquet", {"url": [b"http://x"]})))
    several = tmp_path / "several"
    several.mkdir()
    write_table(several / "a.csv", {"path": ["x"]})
    write_table(several / "b.csv", {"path": ["x"]})
    assert "one table" in str(refusal(several))
    assert "one kind" in str(refusal(write_table(tmp_path / "c.csv", {"path": ["x"]}).with_name("c.*")))
