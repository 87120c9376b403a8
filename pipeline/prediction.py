"""`vitscale predict … --out`: a row for each of any number of image files."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.pipeline.console import Advance, count, say
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.image_files import FileBatch, count_images, file_batches, image_files, printable
from vitscale.pipeline.inference import Classifier
from vitscale.pipeline.table_files import write_table

Columns = Callable[[Tensor], list[pa.Array]]


@dataclass(frozen=True)
class Files:
    """So many image files and those in folders, named by `setting`, and how they are read: `size` at a time.

    `find_files` makes one.
    """

    places: Sequence[str]
    setting: str
    count: int
    preprocess: Preprocess
    size: int
    workers: int


@dataclass
class Tally:
    """Files so far, those that could not be read, and seconds."""

    files: int = 0
    unread: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.files / max(self.seconds, 1e-9)
        unread = f", {self.unread:,} of them not read: see the column `error`" if self.unread else ""
        return f"{self.files:,} images in {self.seconds:.1f} s ({rate:,.0f} images/s){unread}"


def find_files(places: Sequence[str], setting: str, preprocess: Preprocess, size: int, workers: int) -> Files:
    """The image files of `places`. Raises `UserError` (`setting`) for those that are not there, or without images."""
    return Files(places, setting, count_images(places, setting), preprocess, size, workers)


def predict_files(classifier: Classifier, files: Files, out: Path, top: int, advance: Advance) -> Tally:
    """Write the `top` classes of image files to a table: `file`, `class_1`, `probability_1`, `class_2`, …, `error`.

    Of a file that cannot be read, `error` says why, and the others are null. Raises `UserError` for probabilities that
    are not finite, if `out` cannot be written, and, when it is, if no file could be read.
    """
    top = min(top, len(classifier.classes))
    names = pa.array(classifier.classes, pa.string())
    fields = [(f"{kind}_{number}", of) for number in range(1, top + 1)
              for kind, of in (("class", pa.string()), ("probability", pa.float32()))]  # fmt: skip

    def columns(pixels: Tensor) -> list[pa.Array]:
        found_BK = classifier.probabilities_of(pixels)
        values, labels = (each.T.numpy() for each in found_BK.topk(top, dim=1))
        pairs = zip(labels, values, strict=True)
        return [column for label, value in pairs for column in (names.take(pa.array(label)), pa.array(value))]

    return write_rows(files, out, "--out", fields, columns, advance)


def print_files(classifier: Classifier, files: Files, top: int) -> None:
    """Say the `top` classes of each image file. Raises `UserError` in the end, naming the files that have none."""
    bad: list[str] = []
    for file in image_files(files.places):
        try:
            (found,) = classifier.predict([file], top)
        except UserError as error:
            if error.setting != "FILES":
                raise
            bad.append(str(error.got))
            continue
        told = "  ".join(f"{name} {share:.1%}" for name, share in zip(found.classes, found.probabilities, strict=True))
        say(f"{printable(file)}: {told}")
    if bad:
        got = bad[0] if files.count == 1 else f"{len(bad):,} of {files.count:,} files that are none: {'; '.join(bad)}"
        remedy = "Leave them out, or add --out for a table with a column `error`."
        raise UserError(files.setting, got, "image files", remedy)


def write_rows(
    files: Files, out: Path, setting: str, fields: list[tuple[str, pa.DataType]], columns: Columns, advance: Advance
) -> Tally:
    """Write a row for each file: `file`, `fields`, which `columns` finds of pixels (B, Y, X, 3), and `error`.

    Raises `UserError` as `predict_files`.
    """
    tally, begun = Tally(), time.perf_counter()
    schema = pa.schema([("file", pa.string()), *fields, ("error", pa.string())])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in file_batches(image_files(files.places), files.preprocess, files.size, files.workers):
            yield _rows(batch, schema, columns)
            tally.files += len(batch.files)
            tally.unread += sum(map(bool, batch.errors))
            advance(tally.files, files.count, f"{tally.unread:,} not read" if tally.unread else "")

    write_table(out, setting, schema, batches())
    tally.seconds = time.perf_counter() - begun
    if tally.files == tally.unread:
        remedy = f"See the column `error` of {out}."
        raise UserError(files.setting, f"{count(tally.files, 'file')}, none of which could be read", "images", remedy)
    return tally


def _rows(batch: FileBatch, schema: pa.Schema, columns: Columns) -> pa.RecordBatch:
    bad = np.array([bool(error) for error in batch.errors])
    names = pa.array([printable(file) for file in batch.files], pa.string())
    errors = pa.array([error or None for error in batch.errors], pa.string())
    if bad.all():
        found = [pa.nulls(len(bad), kind) for kind in schema.types[1:-1]]
    else:
        place = pa.array(np.cumsum(~bad) - 1, mask=bad)  # of each file among those that could be read
        found = [column.take(place) for column in columns(batch.pixels[torch.from_numpy(~bad)])]
    return pa.RecordBatch.from_arrays([names, *found, errors], schema=schema)
