"""Parquet with embedded images, in the layout of the Hugging Face datasets library.

Columns `image` (struct of `bytes` and `path`) and `label` (integer); the class names are in the schema metadata, under
`huggingface`, as JSON: info.features.label.names. Source: datasets `Image` and `ClassLabel` features.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.data_prep.sources import Item, Source
from vitscale.errors import UserError

READ_ROWS = 256  # rows of a row group in memory at once
_COLUMNS = ["image", "label"]
_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")


@dataclass(frozen=True)
class RowGroupChunk:
    """One row group of a file, or some of its rows. `first` is the number of its first row within the file."""

    path: str
    group: int
    first: int
    rows: tuple[int, ...] | range
    class_count: int

    def __len__(self) -> int:
        return len(self.rows)

    def read(self) -> Iterator[Item]:
        """Yield the embedded bytes of each row. Raises `UserError` (SOURCE) for labels that name no class."""
        try:
            yield from self._read()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error

    def _read(self) -> Iterator[Item]:
        start, taken = 0, 0
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(READ_ROWS, [self.group], _COLUMNS):
                until = taken
                while until < len(self.rows) and self.rows[until] < start + len(batch):
                    until += 1
                rows = self.rows[taken:until]
                picked = batch.take(pa.array([row - start for row in rows], pa.int64()))
                for row, image, label in zip(rows, *(column.to_pylist() for column in picked.columns), strict=True):
                    yield self._item(self.first + row, image, label)
                start, taken = start + len(batch), until

    def _item(self, row: int, image: dict | None, label: int | None) -> Item:
        name = f"{Path(self.path).name}:{row}"
        if label is None or not 0 <= label < self.class_count:
            raise UserError(
                "SOURCE", f"label {label} in row {name}", f"labels from 0 to {self.class_count - 1}", "Mend the table."
            )
        data = image["bytes"] if image else None
        return Item(name, label, data, "" if data is not None else "unreadable: no embedded bytes")

    def pick(self, rows: Sequence[int]) -> "RowGroupChunk":
        """Return the chunk of these rows only."""
        return RowGroupChunk(self.path, self.group, self.first, tuple(self.rows[row] for row in rows), self.class_count)


def open_parquet(name: str, paths: list[Path]) -> Source:
    """List the row groups of the files, which must agree on the classes and belong to one split.

    Raises `UserError` (SOURCE) for files that are no Parquet, lack columns or class names, differ, or are empty.
    """
    splits = sorted({match[1] for path in paths if (match := _SPLIT_FILE.fullmatch(path.name))})
    if len(splits) > 1:
        raise UserError(
            "SOURCE",
            f"files of the splits {', '.join(splits)}",
            "one split",
            f"Name one: {name}/{splits[0]}-*.parquet.",
        )
    classes: list[str] = []
    chunks: list[RowGroupChunk] = []
    digest = hashlib.sha256()
    for path in paths:
        found, sizes = _header(path)
        if classes and found != classes:
            raise UserError(
                "SOURCE", f"other class names in {path}", "the same in every file", "Shard them separately."
            )
        classes = found
        digest.update(json.dumps([path.name, path.stat().st_size, sizes, classes]).encode())
        first = 0
        for group, size in enumerate(sizes):
            chunks.append(RowGroupChunk(str(path), group, first, range(size), len(classes)))
            first += size
    if not any(len(chunk) for chunk in chunks):
        raise UserError("SOURCE", f"{name}, without a row", "at least one image", "Check the path.")
    return Source(name, classes, list(chunks), digest.hexdigest(), needs_every_class=False)


def _header(path: Path) -> tuple[list[str], list[int]]:
    """Return the class names and the number of rows of each row group."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise _damaged(str(path), error) from error
    columns = {field.name: field.type for field in schema}
    image, label = columns.get("image"), columns.get("label")
    if not (image and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 and pa.types.is_integer(label)):
        raise UserError(
            "SOURCE",
            f"{path} with the columns {', '.join(f'{name}: {kind}' for name, kind in columns.items()) or 'none'}",
            "image: struct<bytes: binary, path: string> and label: int64",
            "Write the table with these columns, as the datasets library does.",
        )
    return _class_names(path, schema), sizes


def _class_names(path: Path, schema: pa.Schema) -> list[str]:
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "SOURCE",
            f"{path} without class names",
            "schema metadata huggingface with info.features.label.names",
            "Write the table with a ClassLabel feature, as the datasets library does.",
        ) from error
    return list(names)


def _damaged(path: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError("SOURCE", f"{path} ({text})", "a readable Parquet file", "Fetch the file again.")
