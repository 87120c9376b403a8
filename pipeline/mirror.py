"""Runs in an object store, by way of local folders that stand for theirs.

A run works in a folder of its node, from where its files are uploaded; what is read of a run is fetched into another
one, so that readers do not get in the way of writers. By its path a file says in every process which one it stands for:
`SCRATCH/runs/s3/bucket/a/recipe.yaml` is the copy of `s3://bucket/a/recipe.yaml` that a run works on. SCRATCH is
`$VITSCALE_SCRATCH`, or the user's cache folder. Paths elsewhere stand for themselves alone.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from vitscale.data_prep.publish import PARTIAL
from vitscale.data_prep.storage import LocalFolder, RemoteFolder, file_system, open_folder
from vitscale.errors import UserError

T = TypeVar("T")
WORKING, READING = "runs", "copies"
ATTEMPTS, FIRST_DELAY = 4, 0.5  # of a request, and seconds before the second one; they double
SMALL = {"recipe.yaml", "environment.json", "metrics.jsonl", "config.json", "state.json", "incident.json"}
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # troubles of this node, which do not pass


def working_folder(run_dir: str) -> Path:
    """The folder in which a run writes: `run.dir` itself, or the one of this node that stands for its URL.

    Raises `UserError` (`run.dir`) for a URL that is none of an object store.
    """
    return _local(WORKING, run_dir, "run.dir")


def reading_folder(place: str, setting: str) -> Path:
    """The folder of a path, or a local one with the small files that lie in that of a URL now.

    Checkpoints of it are fetched as they are read. Raises `UserError`, naming `setting`, for a URL that is none of an
    object store, or `storage` where that does not answer.
    """
    folder = _local(READING, place, setting)
    if store_of(folder) is None:
        return folder
    found = names(folder)
    kept = {folder: found, folder / "checkpoints": names(folder / "checkpoints") if "checkpoints" in found else set()}
    for copy, those in kept.items():
        for path in copy.iterdir() if copy.is_dir() else ():
            if path.name not in those and not path.name.startswith("."):
                _remove(path)
    for name in found & SMALL:
        fetch(folder / name)
    for name in names(folder / "evaluations") if "evaluations" in found else ():
        fetch(folder / "evaluations" / name)
    if "checkpoints" in found:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


def store_of(path: Path) -> RemoteFolder | None:
    """What a local folder stands for in an object store; None if it stands for nothing."""
    for kind in (WORKING, READING):
        root = _scratch() / kind
        if path.is_relative_to(root) and path != root:
            scheme, *rest = path.relative_to(root).parts
            return RemoteFolder(f"{scheme}://{'/'.join(rest)}")
    return None


def shown(path: Path) -> str:
    """What to tell a user of a file or folder: its URL if it stands for one."""
    store = store_of(path)
    return store.url if store else str(path)


def names(folder: Path) -> set[str]:
    """Names in a folder, or in the one in a store that it stands for. Raises `UserError` (`storage`)."""
    store = store_of(folder)
    if store is None:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    with _answering(store):
        return _again(store.names)


def sizes(folder: Path, wanted: Iterable[str]) -> dict[str, int]:
    """Bytes of those of the files that are in a folder, or in the one in a store that it stands for.

    Raises `UserError` (`storage`).
    """
    store = store_of(folder)
    if store is None:
        paths = {name: folder / name for name in wanted}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    with _answering(store):
        found = dict(_again(lambda: list(store.walk())))  # one request, not one a file
    return {name: found[name] for name in wanted if name in found}


def fetch(path: Path, sha256: str = "") -> bool:
    """Fetch the file that `path` stands for in a store; returns whether it stands for one.

    With `sha256` it has that content in the end, and a copy that is here already and has it will do; processes that
    share a node wait for each other. Without, it is the file as it is now; one that the store lacks is not here either.
    Raises `UserError`: `checkpoint` if the content is another or the file is missing, `storage` if it cannot be had.
    """
    store = store_of(path.parent)
    if store is None:
        return False
    place, beside = f"{store.url}/{path.name}", path.with_name(f".{path.name}{PARTIAL}")
    with _answering(store), _alone(path):
        if sha256 and path.is_file() and _sha256(path) == sha256:
            return True
        try:
            _again(lambda: _system(store).get_file(place, str(beside)))
        except FileNotFoundError as error:
            path.unlink(missing_ok=True)
            if not sha256:
                return True
            raise _damaged(place, "no such file", f"sha256 {sha256[:12]}…") from error
        if sha256 and (found := _sha256(beside)) != sha256:
            beside.unlink()
            raise _damaged(place, f"sha256 {found[:12]}…", f"{sha256[:12]}…")
        if not sha256:
            _date(beside, store, place)
        beside.replace(path)
    return True


def send(path: Path) -> None:
    """Upload a file to the place in a store that it stands for, if it does. Raises OSError."""
    store = store_of(path.parent)
    if store:
        upload(path, store, path.name)


def upload(path: Path, store: RemoteFolder, name: str) -> None:
    """Upload a file, which appears whole. Raises OSError."""
    _again(lambda: _system(store).put_file(str(path), f"{store.url}/{name}"))


def upload_text(text: str, store: RemoteFolder, name: str) -> None:
    """Write a text file in UTF-8, which appears whole. Raises OSError."""
    _again(lambda: _system(store).pipe_file(f"{store.url}/{name}", text.encode()))


def read_bytes(store: RemoteFolder, name: str) -> bytes:
    """A whole file of a store. Raises OSError."""
    return _again(lambda: _system(store).cat_file(f"{store.url}/{name}"))


def remove(store: RemoteFolder, name: str) -> None:
    """Remove a file of a store, or all files of a folder, if there are any. Raises OSError."""
    _again(lambda: store.remove(name))


def drop(folder: Path) -> None:
    """Remove what is on this node of a folder, if it stands for one in a store."""
    if store_of(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _scratch() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vitscale")  # XDG Base Directory Specification
    return Path(os.path.abspath(os.environ.get("VITSCALE_SCRATCH") or os.path.expanduser(cache)))


def _local(kind: str, place: str, setting: str) -> Path:
    if "://" not in place:
        return Path(place)
    folder = open_folder(place, setting)
    if isinstance(folder, LocalFolder):
        return folder.path
    scheme, _, rest = place.partition("://")
    parts = [part for part in rest.split("/") if part]
    if "." in parts or ".." in parts:
        raise UserError(setting, place, "a URL without `.` and `..`", "Name the folder itself.")
    return _scratch().joinpath(kind, scheme, *parts)


def _system(store: RemoteFolder) -> Any:
    return file_system(store.url.split("://")[0])


def _again(work: Callable[[], T]) -> T:
    """What `work` gives, tried again after a while if it fails. Raises OSError, at once where waiting does not help."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except Exception as error:
            hopeless = isinstance(error, FileNotFoundError | PermissionError)
            if hopeless or (isinstance(error, OSError) and error.errno in LOCAL):
                raise
            if attempt + 1 == ATTEMPTS:
                raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error
        time.sleep(FIRST_DELAY * 2**attempt)
    raise AssertionError


@contextmanager
def _answering(store: RemoteFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        expected = f"an object store that answers, and room in {_scratch()}"
        remedy = "Check network, credentials and disk, and run again."
        raise UserError("storage", f"{store.url} ({error})", expected, remedy) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While the block runs, no other process or thread of this node fetches the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile


def _date(path: Path, store: RemoteFolder, place: str) -> None:
    """Give a copy the time at which the file in the store was written, where the store knows it."""
    with suppress(NotImplementedError, FileNotFoundError):
        written = _system(store).modified(place).timestamp()
        os.utime(path, times=(written, written))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(place: str, got: str, expected: str) -> UserError:
    return UserError("checkpoint", f"{place}: {got}", expected, "The file is damaged: use another checkpoint.")
