"""First pass: decode every image of a chunk completely, and write down what it is or why it is rejected."""

import hashlib
from typing import Any

import pyarrow as pa

from vitscale.data_prep.decode import decode_rgb, inspect
from vitscale.data_prep.integrity import ImageRejected
from vitscale.data_prep.manifest import KEPT, RECORDS, REJECTED
from vitscale.data_prep.sources import Chunk, Item


def scan_chunk(chunk: Chunk, split: str, max_pixels: int) -> pa.Table:
    """Return the records (`RECORDS`) of a chunk, one for each of its images and in their order; keys are still null."""
    return pa.Table.from_pylist([_record(item, split, max_pixels) for item in chunk.read()], schema=RECORDS)


def _record(item: Item, split: str, max_pixels: int) -> dict[str, Any]:
    """Return one row; columns that are not known stay away and become null."""
    record: dict[str, Any] = {"name": item.name, "label": item.label, "split": split, "status": REJECTED}
    if item.data is None:
        return record | {"reason": item.problem}
    record |= {"bytes": len(item.data), "sha256": hashlib.sha256(item.data).hexdigest()}
    try:
        height, width, _ = decode_rgb(item.data, max_pixels).shape
        info = inspect(item.data, max_pixels)
    except ImageRejected as rejection:
        return record | {"reason": str(rejection)}
    return record | {"format": info.format, "width": width, "height": height, "status": KEPT}
