"""Tables of images: Parquet that holds them, or CSV, TSV or Parquet that names files beside the table, or URLs.

One column says where the image is: `image` (struct of `bytes`, in the layout of the Hugging Face datasets library),
`path` (or `file_name`; relative to the table's folder) or `url`. `label` is a class number or name, `labels` a list of
them (in CSV joined by `|`). All other columns are kept as extra. Class names come from the schema metadata
(`huggingface`: info.features.label.names), else from the labels, sorted. A text file of one URL a line
is a table of `url` alone.
"""

import hashlib
import json
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq

from vitscale.data_prep.sources import (
    CLASS,
    MAX_CHUNKS,
    MAX_FILE_BYTES,
    MULTI,
    NONE,
    Item,
    Source,
    check_classes,
    check_label,
    cut_evenly,
    to_extra,
)
from vitscale.data_prep.storage import REMOTE, Folder, LocalFolder, open_folder
from vitscale.errors import UserError

TABLES = (".parquet", ".csv", ".tsv", ".txt")
READ_ROWS = 256  # rows in memory at once
CHUNK_ROWS = 256
DOWNLOADS = 16  # at once in each process
ATTEMPTS, TIMEOUT = 3, 20.0  # seconds
_PLACES = {"image": "image", "path": "path", "file_name": "path", "url": "url"}
_NUMBER = re.compile(r"[0-9]{1,10}")
_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")


@dataclass(frozen=True)
class _Kind:
    """How to read the rows: the column of the place and its kind, how labels are given, and the class names."""

    column: str
    place: str  # image, path or url
    labelled: str
    classes: tuple[str, ...] | None
    by_name: bool  # labels are class names


class _Part(NamedTuple):
    """Rows of a row group of a Parquet file, or of a text file as it was read."""

    file: str
    group: int
    first: int  # number of the row group's first row within the file
    rows: range  # within the row group or the table
    table: pa.Table | None = None


@dataclass(frozen=True)
class TableChunk:
    """Rows of one or several tables."""

    parts: tuple[_Part, ...]
    kind: _Kind

    @property
    def images(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def read(self, folder: Folder) -> Iterator[Item]:
        """Yield the image of each row. Raises `UserError` (SOURCE) for a file that is damaged."""
        numbers = {name: number for number, name in enumerate(self.kind.classes or ())}
        for part in self.parts:
            for first, batch in _batches(folder, part):
                rows = batch.to_pylist()
                for at, (row, got) in enumerate(zip(rows, self._contents(folder, rows), strict=True)):
                    yield self._item(f"{part.file}:{first + at}", row, *got, numbers)

    def _contents(self, folder: Folder, rows: list[dict[str, Any]]) -> list[tuple[bytes | None, str]]:
        places = [row[self.kind.column] for row in rows]
        if self.kind.place == "url":
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                return list(pool.map(fetch, places))
        return [self._content(folder, place) for place in places]

    def _content(self, folder: Folder, value: Any) -> tuple[bytes | None, str]:
        if self.kind.place == "image":
            data = value.get("bytes") if isinstance(value, dict) else None
            return data, "" if data is not None else "unreadable: no embedded bytes"
        path = str(value or "")
        if not path or path.startswith(("/", "\\")) or "://" in path or ".." in path.replace("\\", "/").split("/"):
            return None, f"unsafe: path {path[:200]!r} out of the table's folder"
        try:
            if isinstance(folder, LocalFolder) and not folder.holds(path):
                return None, "unreadable: symlink that leaves the source"
            size = folder.size(path)
            if isinstance(folder, LocalFolder) and size is not None and not (folder.path / path).is_file():
                return None, "not a file"
            if size is not None and size > MAX_FILE_BYTES:
                return None, f"too large: {size} bytes"
            return folder.read(path), ""
        except (OSError, ValueError) as error:
            return None, f"unreadable: {getattr(error, 'strerror', None) or error}"

    def _item(self, name: str, row: dict[str, Any], data: bytes | None, problem: str, numbers: dict[str, int]) -> Item:
        kind = self.kind
        place = row.pop(kind.column)
        name = name if kind.place == "image" else str(place)
        count = len(kind.classes) if kind.classes is not None else None
        label, labels = row.pop("label", None), None
        if kind.labelled == MULTI:
            label, found = None, row.pop("labels", None)
            labels = [_number(one, numbers) for one in found or []] if kind.by_name else found
            problem = problem or ("label: none given" if found is None else "")
            for one in labels or []:
                problem = problem or check_label(one, count)
        elif kind.labelled == CLASS:
            label = _number(label, numbers) if kind.by_name else label
            problem = problem or check_label(label, count)
        if problem:
            return Item(name, None, None, problem)
        extra = to_extra(row)
        file = str(place) if kind.place == "path" else None
        return Item(name, label if kind.labelled == CLASS else None, data, "", labels, extra, file)


def _batches(folder: Folder, part: _Part) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, rows) of a part, a few rows at a time."""
    if part.table is not None:
        at = part.rows.start
        for batch in part.table.to_batches(READ_ROWS):
            yield at, batch
            at += len(batch)
        return
    start = 0
    try:
        with folder.open_arrow(part.file) as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(READ_ROWS, [part.group], use_threads=False):
                low, high = max(part.rows.start - start, 0), min(part.rows.stop - start, len(batch))
                if low < high:
                    yield part.first + start + low, batch.slice(low, high - low)
                start += len(batch)
                if start >= part.rows.stop:
                    return
    except (pa.ArrowException, OSError) as error:
        raise _damaged(f"{folder.url}/{part.file}", error) from error


def open_tables(name: str, folder: Folder, files: list[str]) -> Source:
    """List tables, which must agree on their columns and classes and belong to one split.

    Raises `UserError` (SOURCE) for files that are none, lack columns, differ, or are empty.
    """
    splits = sorted({match[1] for file in files if (match := _SPLIT_FILE.fullmatch(file))})
    if len(splits) > 1:
        place = f"{name}/{splits[0]}-*.parquet"
        raise UserError("SOURCE", f"files of the splits {', '.join(splits)}", "one split", f"Name one: {place}.")
    if any(file.endswith(".parquet") for file in files):
        if not all(file.endswith(".parquet") for file in files):
            raise UserError("SOURCE", f"{name}, tables of several kinds", "one kind", "Name one of the files.")
        return _open_parquet(name, folder, files)
    if len(files) > 1:
        raise UserError("SOURCE", f"{name}: {', '.join(files)}", "one table", "Name one of them.")
    return _open_text(name, folder, files[0])


def _open_parquet(name: str, folder: Folder, files: list[str]) -> Source:
    kind, digest = None, hashlib.sha256()
    groups: list[tuple[str, int, int, int]] = []  # file, group, first row, rows
    by_name: list[str] = []
    for file in files:
        path = f"{folder.url}/{file}"
        try:
            with folder.open_arrow(file) as opened, pq.ParquetFile(opened) as parquet:
                found = _kind(path, parquet.schema_arrow)
                sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
                if found.by_name:
                    column = "labels" if found.labelled == MULTI else "label"
                    by_name += _distinct(parquet.read([column], use_threads=False).column(column))
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        if kind and found != kind:
            got = f"other columns or class names in {path}"
            raise UserError("SOURCE", got, "the same in every file", "Shard them separately.")
        kind = found
        digest.update(json.dumps([file, folder.size(file), sizes, kind.classes]).encode())
        first = 0
        for group, size in enumerate(sizes):
            groups.append((file, group, first, size))
            first += size
    total = sum(size for *_, size in groups)
    if kind is None or not total:
        raise UserError("SOURCE", f"{name}, without a row", "at least one image", "Check the path.")
    kind = _with_classes(kind, by_name)
    # cut row groups of names, which are soon read again; those with pixels stay whole
    step = CHUNK_ROWS if kind.place != "image" else total
    step = max(step, -(-total // MAX_CHUNKS))
    parts = [
        _Part(file, group, first, range(start, min(start + step, size)))
        for file, group, first, size in groups
        for start in range(0, size, step)
    ]
    chunks = [TableChunk(tuple(parts[few.start : few.stop]), kind) for few in cut_evenly(len(parts), 1)]
    return _source(name, folder, kind, chunks, digest.hexdigest(), total)


def _open_text(name: str, folder: Folder, file: str) -> Source:
    path = f"{folder.url}/{file}"
    try:
        with folder.open(file) as opened:
            if file.endswith(".txt"):
                lines = [line.strip() for line in opened.read().decode().splitlines()]
                table = pa.table({"url": [line for line in lines if line and not line.startswith("#")]})
            else:
                options = pv.ParseOptions(delimiter="\t" if file.endswith(".tsv") else ",", newlines_in_values=True)
                table = pv.read_csv(opened, parse_options=options)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError("SOURCE", f"{path} ({_line(error)})", "a table that can be read", "Mend the file.") from error
    if not len(table):
        raise UserError("SOURCE", f"{path}, without a row", "at least one image", "Check the path.")
    if "labels" in table.column_names:
        at = table.column_names.index("labels")
        table = table.set_column(at, "labels", _split_labels(table.column(at).to_pylist()))
    kind = _kind(path, table.schema)
    column = "labels" if kind.labelled == MULTI else "label"
    kind = _with_classes(kind, _distinct(table.column(column)) if kind.by_name else [])
    digest = hashlib.sha256(folder.read(file)).hexdigest()
    chunks = [
        TableChunk((_Part(file, 0, 0, rows, table.slice(rows.start, len(rows)).combine_chunks()),), kind)
        for rows in cut_evenly(len(table), CHUNK_ROWS)
    ]
    return _source(name, folder, kind, chunks, digest, len(table))


def _source(name: str, folder: Folder, kind: _Kind, chunks: list[TableChunk], digest: str, images: int) -> Source:
    classes = list(kind.classes) if kind.classes is not None else None
    return Source(name, folder, [] if kind.labelled == NONE else classes, kind.labelled, chunks, digest, images)


def _kind(path: str, schema: pa.Schema) -> _Kind:
    """Tell from its columns what a table holds."""
    columns: dict[str, Any] = {field.name: field.type for field in schema}
    column = next((name for name in _PLACES if name in columns), None)
    told = ", ".join(f"{name}: {kind}" for name, kind in columns.items()) or "none"
    if column is None:
        raise UserError("SOURCE", f"{path} with the columns {told}", "one of image, path and url", "Rename a column.")
    place, kind = _PLACES[column], columns[column]
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    embedded = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (embedded if place == "image" else text):
        wanted = "image: struct<bytes: binary, path: string>" if place == "image" else f"{column}: string"
        raise UserError("SOURCE", f"{path} with the columns {told}", wanted, "Write the table with this column.")
    labelled = MULTI if "labels" in columns else CLASS if "label" in columns else NONE
    given = columns.get("labels" if labelled == MULTI else "label")
    if given is not None and _is_list(given) != (labelled == MULTI):
        got = f"{path} with the columns {told}"
        raise UserError("SOURCE", got, "one label in label, a list in labels", "Name the column for what it holds.")
    if given is not None and labelled == MULTI:
        given = given.value_type
    by_name = given is not None and not pa.types.is_integer(given)
    names = _class_names(schema, "labels" if labelled == MULTI else "label")
    return _Kind(column, place, labelled, tuple(check_classes(names)) if names else None, by_name)


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return list((feature.get("feature") or feature)["names"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _with_classes(kind: _Kind, names: Sequence[str]) -> _Kind:
    """With the class names of labels that are given by name."""
    if not kind.by_name or kind.classes is not None:
        return kind
    return _Kind(kind.column, kind.place, kind.labelled, tuple(check_classes(sorted(set(names)))), True)


def _split_labels(cells: list[Any]) -> pa.Array:
    """Labels joined by `|` as lists, of numbers where all of them are."""
    names = [[part for part in str("" if cell is None else cell).split("|") if part] for cell in cells]
    if all(_NUMBER.fullmatch(part) for parts in names for part in parts):
        return pa.array([[int(part) for part in parts] for parts in names], pa.list_(pa.int64()))
    return pa.array(names, pa.list_(pa.string()))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _distinct(column: pa.ChunkedArray) -> list[str]:
    """Label names that occur; of lists, their parts."""
    values = pc.call_function("list_flatten", [column]) if _is_list(column.type) else column
    return sorted({str(value) for value in values.unique().to_pylist() if value not in (None, "")})


def _number(label: Any, numbers: dict[str, int]) -> Any:
    return numbers.get(str(label), label)


def fetch(url: Any) -> tuple[bytes | None, str]:
    """Bytes of a URL (http, https or an object store's), or why they cannot be had; no other kind is opened."""
    url = str(url or "")
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        return None, f"unreadable: {_line(error)[:200]}"
    if scheme in REMOTE and url.startswith(f"{scheme}://") and "::" not in url:
        head, _, tail = url.rpartition("/")
        try:
            return open_folder(head, "SOURCE").read(tail, 0, MAX_FILE_BYTES), ""
        except (OSError, UserError) as error:
            return None, f"unreadable: {_line(error)[:200]}"
    if scheme not in ("http", "https"):
        return None, f"unsafe: URL {url[:200]!r} of another kind than http, https, s3, gs"
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "vitscale"})
            with _OPENER.open(request, timeout=TIMEOUT) as answer:
                data = answer.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                return None, f"too large: more than {MAX_FILE_BYTES} bytes"
            if answer.length:
                raise OSError("the answer ends early")
            return data, ""
        except HTTPError as error:
            problem = f"unreadable: HTTP {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except (ValueError, InvalidURL) as error:  # a URL that is none
            return None, f"unreadable: {_line(error)[:200]}"
        except (OSError, HTTPException) as error:
            problem = f"unreadable: {_line(error)[:200]}"
        if attempt < ATTEMPTS - 1:
            time.sleep(2.0**attempt)
    return None, problem


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Redirects to the web alone, as urllib would follow one to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise HTTPError(newurl, code, "redirect out of the web", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_WebOnly)


def _damaged(path: str, error: Exception) -> UserError:
    return UserError("SOURCE", f"{path} ({_line(error)})", "a readable Parquet file", "Fetch the file again.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
