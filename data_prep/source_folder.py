"""A folder of class folders: the class of an image is the name of the folder, at the top, in which it lies.

Or a flat folder of images, which then have no labels.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vitscale.data_prep.sources import CLASS, MAX_FILE_BYTES, NONE, Item, Source, check_classes, cut_evenly
from vitscale.data_prep.storage import Folder, LocalFolder
from vitscale.errors import UserError

CHUNK_FILES = 512
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


class _File(NamedTuple):
    label: int | None
    path: str  # relative to the root
    size: int
    problem: str


@dataclass(frozen=True)
class FileChunk:
    """Some files of the folder."""

    files: tuple[_File, ...]

    @property
    def images(self) -> int:
        return len(self.files)

    def read(self, folder: Folder) -> Iterator[Item]:
        """Yield the bytes of each file, or why they cannot be had."""
        for file in self.files:
            data, problem = None, file.problem
            if not problem:
                try:
                    data = folder.read(file.path)
                except OSError as error:
                    problem = f"unreadable: {error.strerror or error}"
            name = _printable(file.path)
            yield Item(name, file.label, data, problem, file=file.path if name == file.path else None)


def open_image_folder(name: str, folder: Folder) -> Source:
    """List a folder: classes by sorted folder name, files at any depth below them, hidden names left out.

    Files beside class folders are not part of the source. A symlink to a file is followed as long as it stays under the
    folder, one to a folder never is. Raises `UserError` (SOURCE) where there are no files, or folders of splits.
    """
    found = list(_walk_local(folder.path) if isinstance(folder, LocalFolder) else _walk_remote(folder))
    folders = sorted({path.split("/", 1)[0] for path, _, _ in found if "/" in path})
    empty = _folders(folder.path) if isinstance(folder, LocalFolder) else []
    folders = sorted({*folders, *empty})
    if folders and set(folders) <= _SPLIT_NAMES:
        raise UserError(
            "SOURCE",
            f"{folder.url}, with the folders {', '.join(folders)}",
            "one folder per class",
            "Shard one split at a time.",
        )
    labels = {kind: label for label, kind in enumerate(folders)}
    if folders:
        files = [_File(labels[file[0].split("/", 1)[0]], *file) for file in found if "/" in file[0]]
    else:
        files = [_File(None, *file) for file in found]
    if not files:
        got = f"{folder.url}, with empty class folders only" if folders else f"{folder.url}, without a file"
        raise UserError("SOURCE", got, "images, in a folder for each class or in none", "Check the path.")
    chunks = [FileChunk(tuple(files[rows.start : rows.stop])) for rows in cut_evenly(len(files), CHUNK_FILES)]
    classes = check_classes([_printable(kind) for kind in folders])
    return Source(name, folder, classes, CLASS if folders else NONE, chunks, _digest(folders, files), len(files), True)


def _folders(root: Path) -> list[str]:
    """Class folders of a local root, empty ones too."""
    return [entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and entry.is_dir()]


def _walk_local(root: Path, folder: str = "") -> Iterator[tuple[str, int, str]]:
    """Yield (path relative to root, size, problem) of everything below a folder, sorted."""
    if os.path.islink(root / folder) and folder:
        yield folder, 0, "not a file: symlink to a folder"
        return
    try:
        with os.scandir(root / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if not folder:
            got = f"{root} ({error.strerror})"
            raise UserError("SOURCE", got, "a folder that can be read", "Check its rights.") from error
        yield folder, 0, f"unreadable: {error.strerror}"
        return
    for entry in found:
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk_local(root, path)
        else:
            yield path, *_examine(root, entry)


def _walk_remote(folder: Folder) -> Iterator[tuple[str, int, str]]:
    for path, size in sorted(folder.walk(), key=lambda file: file[0].split("/")):  # as _walk_local goes
        if not any(part.startswith(".") for part in path.split("/")):
            yield path, size, _size_problem(size)


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
    return status.st_size, _size_problem(status.st_size)


def _size_problem(size: int) -> str:
    return f"too large: {size} bytes" if size > MAX_FILE_BYTES else ""


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
