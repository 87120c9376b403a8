"""Files that appear whole or not at all: written beside their place, synced, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # suffix of files that are not published yet; any left over belongs to a run that was killed


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and is removed when the block raises."""
    descriptor, partial = tempfile.mkstemp(suffix=PARTIAL, prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    sync_folder(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises OSError."""
    with publish(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
