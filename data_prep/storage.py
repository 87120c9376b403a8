"""Folders of files: on this machine's file systems, or in an object store by way of fsspec.

Names within a folder are relative, with `/`; none leads out of it. A published file appears whole or not at all.
"""

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from vitscale.data_prep.publish import PARTIAL, publish
from vitscale.errors import UserError

REMOTE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "hdfs")  # what the data itself may name is never of more kinds


class Folder(Protocol):
    """A place for files. All methods raise OSError where the place refuses; `read` and `open` raise `UserError`
    (storage) where an object store does not answer, as that says nothing about the file."""

    @property
    def url(self) -> str: ...
    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes: ...
    def open(self, name: str) -> BinaryIO: ...
    def open_arrow(self, name: str) -> pa.NativeFile:
        """Open for Arrow. Its own kind of file where there is one: threads of Arrow's that still hold one of Python's
        while the interpreter ends abort the process."""
        ...

    def publish(self, name: str) -> Any:
        """Context of a binary file that appears, or replaces the old one, when the block ends without an exception."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def names(self, under: str = "") -> set[str]:
        """Names directly in the folder, or in one of its folders; none where it is absent."""

    def walk(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of all files at any depth, sorted by name."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if there is one."""


def open_folder(url: str, setting: str) -> Folder:
    """The folder of a path, a `file://` URL, or a URL of an object store, which need not exist.

    Raises `UserError`, naming `setting`, for other URLs: `pipe:` and the like are never run.
    """
    if "::" in url or ("://" not in url and url.split(":")[0] in ("pipe", "exec")):
        raise UserError(setting, url, "a path or a URL of one place", "Name the place itself.")
    scheme, _, rest = url.rpartition("://")
    if not (rest if scheme in ("", "file") else rest.strip("/")):
        raise UserError(setting, repr(url), "a path", "Name a folder; `.` is this one.")
    if scheme in ("", "file"):
        return LocalFolder(os.path.abspath(rest))
    if scheme not in REMOTE:
        raise UserError(setting, url, f"a path, or a URL of {', '.join(REMOTE)}", "Copy the data to one of these.")
    try:
        file_system(scheme)
    except ImportError as error:
        raise UserError(setting, url, f"the package for {scheme}://", f"{' '.join(str(error).split())}.") from error
    return RemoteFolder(url.rstrip("/"))


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a local or network file system."""

    url: str

    @property
    def path(self) -> Path:
        return Path(self.url)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with open(self._place(name), "rb", buffering=0) as file:
            if offset:
                file.seek(offset)
            return file.read(-1 if length is None else length) or b""

    def open(self, name: str) -> BinaryIO:
        return open(self._place(name), "rb")

    def open_arrow(self, name: str) -> pa.NativeFile:
        return pa.OSFile(self._place(name))

    def publish(self, name: str) -> Any:
        place = self.path / _checked(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        return publish(place)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._place(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def holds(self, name: str) -> bool:
        """Whether the name, symlinks followed, leads to a place within the folder."""
        return Path(os.path.realpath(self.path / name)).is_relative_to(os.path.realpath(self.path))

    def names(self, under: str = "") -> set[str]:
        try:
            return set(os.listdir(self._place(under)))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def walk(self) -> Iterator[tuple[str, int]]:
        for folder, folders, files in os.walk(self.url):
            folders.sort()
            for file in sorted(files):
                path = os.path.join(folder, file)
                yield os.path.relpath(path, self.url), os.stat(path).st_size

    def remove(self, name: str) -> None:
        place = self.path / _checked(name)
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def _place(self, name: str) -> str:
        return f"{self.url}/{_checked(name)}"


@dataclass(frozen=True)
class RemoteFolder:
    """A prefix in an object store, whose uploads appear when they are complete."""

    url: str

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        place, end = self._place(name), None if length is None else offset + length
        with _answered(self.url):
            try:
                return b"" if length == 0 else self._fs.cat_file(place, start=offset or None, end=end)
            except OSError:
                if (size := self.size(name)) is not None and offset >= size:  # stores refuse to read nothing
                    return b""
                raise

    def open(self, name: str) -> BinaryIO:
        place = self._place(name)
        with _answered(self.url):
            return io.BufferedReader(_RemoteFile(self.url, self._fs.open(place, "rb")))

    def open_arrow(self, name: str) -> pa.NativeFile:
        return pa.PythonFile(self.open(name), "r")

    @contextmanager
    def publish(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile(suffix=PARTIAL) as file:
            yield file  # pyright: ignore[reportReturnType] (a wrapper that does all that a BinaryIO does)
            file.flush()
            with _os_errors():
                self._fs.put_file(file.name, self._place(name))

    def size(self, name: str) -> int | None:
        with _os_errors():
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._place(name))
            except FileNotFoundError:
                return None
            return None if info["type"] == "directory" else int(info["size"])

    def names(self, under: str = "") -> set[str]:
        with _os_errors():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._place(under), detail=False)
            except FileNotFoundError:
                return set()
            root = str(self._fs._strip_protocol(self._place(under)))  # listed itself where a file marks the folder
            paths = {str(path).rstrip("/") for path in found} - {root}
            return {path.rsplit("/", 1)[-1] for path in paths}

    def walk(self) -> Iterator[tuple[str, int]]:
        with _os_errors():
            self._fs.invalidate_cache()
            root = str(self._fs._strip_protocol(self.url))
            found = self._fs.find(self.url, detail=True)
            files = [(str(path)[len(root) + 1 :], int(info["size"])) for path, info in found.items()]
            yield from sorted(file for file in files if file[0] and not file[0].endswith("/"))  # others mark folders

    def remove(self, name: str) -> None:
        with _os_errors():
            self._fs.invalidate_cache()
            if self._fs.exists(self._place(name)):
                self._fs.rm(self._place(name), recursive=True)

    @property
    def _fs(self) -> Any:
        return file_system(self.url.split("://")[0])

    def _place(self, name: str) -> str:
        return f"{self.url}/{_checked(name)}".rstrip("/")


class _RemoteFile(io.RawIOBase):
    """A file of fsspec's, with errors as a folder has them."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _answered(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def within(folder: Folder, name: str) -> Folder:
    """The folder of that name in a folder."""
    return replace(folder, url=f"{folder.url}/{_checked(name)}")  # pyright: ignore[reportArgumentType, reportReturnType]


@lru_cache
def file_system(scheme: str) -> Any:
    """fsspec's file system, one a process; its settings come from the environment and fsspec's own configuration."""
    import fsspec

    # a connection that breaks off leaves tasks whose errors nobody asks for: they would be printed with tracebacks
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme)


os.register_at_fork(after_in_child=file_system.cache_clear)  # clients do not outlive a fork


@contextmanager
def _os_errors() -> Iterator[None]:
    """Object stores' own errors as OSError."""
    try:
        yield
    except (OSError, GeneratorExit):
        raise
    except Exception as error:
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error


@contextmanager
def _answered(url: str) -> Iterator[None]:
    """What is not there or not allowed is an OSError. All else may be otherwise the next time, and is the user's."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        got = f"{url} ({' '.join(f'{type(error).__name__}: {error}'.split())})"
        remedy = "Check network and credentials, and run again: it goes on from here."
        raise UserError("storage", got, "an object store that answers", remedy) from error


def _checked(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise OSError(f"{name!r} leads out of its folder")
    return name
