"""A folder of class folders: the class of an image is the name of the folder, at the top, in which it lies."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vitscale.data_prep.sources import Item, Source
from vitscale.errors import UserError

CHUNK_FILES = 256
MAX_FILE_BYTES = 2**30  # larger files are no single pictures, and are not read into memory
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


class _File(NamedTuple):
    label: int
    path: str  # relative to the root
    size: int
    problem: str


@dataclass(frozen=True)
class FileChunk:
    """Up to `CHUNK_FILES` files under `root`."""

    root: str
    files: tuple[_File, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self) -> Iterator[Item]:
        """Yield the bytes of each file, or why they cannot be had."""
        for file in self.files:
            data, problem = None, file.problem
            if not problem:
                try:
                    data = Path(self.root, file.path).read_bytes()
                except OSError as error:
                    problem = f"unreadable: {error.strerror}"
            yield Item(_printable(file.path), file.label, data, problem)

    def pick(self, rows: Sequence[int]) -> "FileChunk":
        """Return the chunk of these files only."""
        return FileChunk(self.root, tuple(self.files[row] for row in rows))


def open_folder(root: Path) -> Source:
    """List `root`: classes by sorted folder name, files at any depth below them, hidden names left out.

    Files beside the class folders are not part of the source. A symlink to a file is followed as long as it stays
    under `root`, one to a folder never is. Raises `UserError` (SOURCE) where there are no class folders or no files.
    """
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            "SOURCE", f"{root} ({error.strerror})", "a folder that can be read", "Check its rights."
        ) from error
    if not folders:
        raise UserError(
            "SOURCE", f"{root}, without a folder in it", "one folder per class, or Parquet files", "Check the path."
        )
    if set(folders) <= _SPLIT_NAMES:
        raise UserError(
            "SOURCE",
            f"{root}, with the folders {', '.join(folders)}",
            "one folder per class",
            "Shard one split at a time.",
        )
    files = [_File(label, *found) for label, name in enumerate(folders) for found in _walk(root, name)]
    if not files:
        raise UserError(
            "SOURCE", f"{root}, with empty class folders only", "images in the class folders", "Check the path."
        )
    chunks = [FileChunk(str(root), tuple(files[at : at + CHUNK_FILES])) for at in range(0, len(files), CHUNK_FILES)]
    classes = [_printable(name) for name in folders]
    return Source(root.name, classes, list(chunks), _digest(folders, files), needs_every_class=True)


def _walk(root: Path, folder: str) -> Iterator[tuple[str, int, str]]:
    """Yield (path relative to root, size, problem) of everything below a folder, sorted."""
    if os.path.islink(root / folder):
        yield folder, 0, "not a file: symlink to a folder"
        return
    try:
        with os.scandir(root / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield folder, 0, f"unreadable: {error.strerror}"
        return
    for entry in found:
        path = f"{folder}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(root, path)
        else:
            yield path, *_examine(root, entry)


def _examine(root: Path, entry: os.DirEntry[str]) -> tuple[int, str]:
    """Return the size of a file and the problem, if any, that forbids to read it."""
    if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
        return 0, "unreadable: symlink that leaves the source"
    try:
        status = entry.stat()
    except OSError as error:
        return 0, f"unreadable: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return 0, "not a file"
    return status.st_size, f"too large: {status.st_size} bytes" if status.st_size > MAX_FILE_BYTES else ""


def _digest(folders: list[str], files: list[_File]) -> str:
    digest = hashlib.sha256()
    for name in folders:
        digest.update(os.fsencode(name) + b"\0")
    for file in files:
        digest.update(os.fsencode(file.path) + f"\0{file.size}\0".encode())
    return digest.hexdigest()


def _printable(name: str) -> str:
    """Spell a file name in UTF-8; bytes that are none appear as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
