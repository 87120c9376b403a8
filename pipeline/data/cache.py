"""Whole shards out of an object store, held on a node's local disk and shared by all of its processes.

The folder holds `<sha256>.tar`, a whole shard, and `<sha256>.partial`, one that somebody fetches, who has a lock on it.
A lock ends with its process: a partial file without one is left over, and goes with the next fetch. Who counts, evicts
or renames has the lock of `lock`. A shard's time of modification is when it was last opened, and it is evicted in this
order; that of a shard to come lies ahead, as its claim to stay. Other files in the folder are left alone.
"""

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from vitscale.data_prep.manifest import ShardEntry
from vitscale.data_prep.publish import PARTIAL
from vitscale.data_prep.storage import Folder
from vitscale.errors import UserError

ATTEMPTS, FIRST_DELAY = 4, 0.5  # to fetch a shard, and seconds before the second one; they double
PIECE = 16 << 20  # bytes of a request: the memory that a fetch takes
POLL = 0.02  # seconds from one look for a lock or for room to the next
CLAIM = 120.0  # seconds that the shards to come stay, so that no process's fetching ahead pushes out another's
TICK = 0.5  # seconds from one renewal of the claims to the next
LOCK, WHOLE = "lock", ".tar"
FULL = (errno.ENOSPC, errno.EDQUOT)

# The kernel's locks are of processes, not of threads, and closing any descriptor of a file gives them up: so a process
# opens a file to lock it only while its path is in `_taken`.
_taken: set[Path] = set()
_released = threading.Condition()


class ShardCache:
    """Shards of the dataset `remote` in the local `folder`, with at most `limit` bytes of shards, whole and partial.

    A shard of more than `limit` bytes takes the place of all others; fetches that do not fit beside each other wait.
    Any number of caches, threads and processes share a folder. An evicted shard takes its room until the last
    descriptor of it is closed. Copies made by pickling or fork fetch nothing ahead until they are told to.
    """

    def __init__(self, remote: Folder, folder: Path, limit: int) -> None:
        self.remote, self.folder, self.limit = remote, Path(os.path.realpath(folder)), limit  # one name, for `_taken`
        self._fetcher: _Fetcher | None = None

    def open(self, shard: ShardEntry) -> int:
        """Return a descriptor, for reading, of a whole tar, whose size and SHA-256 were right when it was fetched.

        Raises `UserError`: `data`, naming a shard not to be had in `ATTEMPTS`, or `data.cache`, where the disk refuses.
        """
        with self._disk():
            file = self._held(shard)
            if file is None:
                file = self._fetch(shard)
        if fetcher := self._own_fetcher():
            fetcher.used(shard)
        assert file is not None  # None is for those who do not wait
        return file

    def fetch_ahead(self, shards: Sequence[ShardEntry]) -> None:
        """Have a thread fetch these, the next ones in the order of use, as many as fit; they replace those of before.

        It evicts nothing that a process is known to need, and leaves errors for `open` to tell.
        """
        fetcher = self._own_fetcher()
        if fetcher is None:
            fetcher = self._fetcher = _Fetcher(self)
        fetcher.replace(shards)

    def close(self) -> None:
        """Stop fetching ahead, within one piece; do not wait for it."""
        if fetcher := self._own_fetcher():
            fetcher.close()
        self._fetcher = None

    def __getstate__(self) -> dict[str, Any]:  # threads belong to one process
        return {**self.__dict__, "_fetcher": None}

    def _own_fetcher(self) -> "_Fetcher | None":
        return self._fetcher if self._fetcher and self._fetcher.process == os.getpid() else None

    def _path(self, shard: ShardEntry, suffix: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", str(shard.sha256)):  # it comes with the data, and is about to name a file
            raise self._unusable(shard, f"{shard.sha256!r} for its SHA-256")
        return self.folder / f"{shard.sha256}{suffix}"

    def _held(self, shard: ShardEntry) -> int | None:
        """A descriptor of the shard, now the last used one, if it is here in its full size."""
        try:
            file = os.open(self._path(shard, WHOLE), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size == shard.bytes:
            _mark_used(file)
            return file
        os.close(file)
        return None

    def _claim(self, shard: ShardEntry, seconds: float) -> bool:
        """Whether the shard is here in its full size; if so, it is to stay for some time."""
        try:
            path = self._path(shard, WHOLE)
            _mark_used(path, seconds)
            return path.stat().st_size == shard.bytes
        except (OSError, UserError):
            return False

    def _fetch(self, shard: ShardEntry, ahead: "_Fetcher | None" = None) -> int | None:
        """Wait for the shard or fetch it; `ahead` of use, return None if another fetches it, or raise `_NotNow`."""
        path, name = self._path(shard, WHOLE), self._path(shard, PARTIAL)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(name, wait=ahead is None) as partial:
            if partial is None:
                return None
            try:
                if (file := self._held(shard)) is not None:  # by now
                    name.unlink(missing_ok=True)
                    return file
                path.unlink(missing_ok=True)  # damaged
                self._download(shard, partial, ahead)
                with _locked(self.folder / LOCK):
                    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)  # before the rename, which is the last to fail
                    os.replace(name, path)
            except BaseException:
                name.unlink(missing_ok=True)
                raise
            _mark_used(file, CLAIM / 2 if ahead else 0)
            return file

    def _download(self, shard: ShardEntry, partial: int, ahead: "_Fetcher | None") -> None:
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
            problem = self._attempt(shard, partial, ahead)
            if not problem:
                return
            os.ftruncate(partial, 0)  # others may have the room meanwhile
        raise self._unusable(shard, problem)

    def _attempt(self, shard: ShardEntry, partial: int, ahead: "_Fetcher | None") -> str:
        room = self.limit
        while True:
            os.ftruncate(partial, 0)  # what a killed process left, or did not fit
            held = self._reserve(shard, partial, room, ahead)
            try:
                return self._copy(shard, partial, ahead)
            except OSError as error:
                if error.errno not in FULL or not held:
                    raise
                room = held  # the disk holds no more than this

    def _reserve(self, shard: ShardEntry, partial: int, room: int, ahead: "_Fetcher | None") -> int:
        """Evict until `room` bytes hold the shard too, and take its bytes; return how many others then hold."""
        while True:
            with _locked(self.folder / LOCK):
                whole, fetching = self._content()
                if not fetching or fetching + shard.bytes <= room:
                    now, held, evicted = time.time_ns(), fetching + sum(size for _, size, _ in whole), []
                    for used, size, path in sorted(whole):
                        if held + shard.bytes <= room:
                            break
                        if ahead and now < used < now + CLAIM * 1e9:
                            raise _NotNow
                        evicted.append(path)
                        held -= size
                    for path in evicted:
                        path.unlink(missing_ok=True)
                    os.ftruncate(partial, shard.bytes)  # counted by others from now on
                    return held
            if ahead:
                raise _NotNow
            time.sleep(POLL)

    def _content(self) -> tuple[list[tuple[int, int, Path]], int]:
        """(last use in ns, bytes, path) of whole shards, and the bytes taken for those being fetched; no leftovers."""
        whole, fetching = [], 0
        for path in self.folder.iterdir():
            if re.fullmatch(f"[0-9a-f]{{64}}({WHOLE}|{PARTIAL})", path.name):
                with suppress(FileNotFoundError):  # one that was given up
                    info = path.stat()
                    if path.suffix == WHOLE:
                        whole.append((info.st_mtime_ns, info.st_size, path))
                        continue
                    with _locked(path, wait=False) as leftover:
                        if leftover is None:
                            fetching += info.st_size
                        else:
                            path.unlink()
        return whole, fetching

    def _copy(self, shard: ShardEntry, partial: int, ahead: "_Fetcher | None") -> str:
        """Write the shard, and return what is wrong with it. Raises OSError where the disk refuses."""
        if shard.bytes:
            os.posix_fallocate(partial, 0, shard.bytes)  # a full disk shows now, not when most is fetched
        digest, offset = hashlib.sha256(), 0
        while offset < shard.bytes:
            if ahead and ahead.closed:
                raise _NotNow
            try:
                data = self.remote.read(shard.name, offset, min(PIECE, shard.bytes - offset))
            except FileNotFoundError:
                return "no such file"
            except OSError as error:
                return str(error)
            except UserError as error:  # the store does not answer
                return str(error.got)
            if not data:
                return f"{offset} of {shard.bytes} bytes"
            digest.update(data)
            left = memoryview(data)
            while left:
                written = os.pwrite(partial, left, offset)
                left, offset = left[written:], offset + written
        return "" if digest.hexdigest() == shard.sha256 else "other content than its index says (SHA-256)"

    def _unusable(self, shard: ShardEntry, problem: str) -> UserError:
        remedy = "Run again if the store did not answer; else `vitscale verify` tells what else is damaged."
        return UserError("data", f"{self.remote.url}/{shard.name}: {problem}", "a whole shard", remedy)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "Free space there, lower its limit, or name another folder."
            expected = "a folder on a local disk with room for a shard"
            raise UserError("data.cache", f"{self.folder} ({error})", expected, remedy) from error


class _NotNow(Exception):  # noqa: N818 (no error)
    """Fetching ahead would push out what is needed sooner, or is to end."""


class _Fetcher:
    """The thread that fetches ahead for one cache in one process."""

    def __init__(self, cache: ShardCache) -> None:
        self.process, self.closed, self._cache = os.getpid(), False, cache
        self._coming: dict[str, ShardEntry] = {}
        self._failed: set[str] = set()  # of these, left to `open`
        self._claimed: dict[str, ShardEntry] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="shards", daemon=True).start()

    def replace(self, shards: Sequence[ShardEntry]) -> None:
        with self._changed:
            self._coming, self._failed = {shard.sha256: shard for shard in shards}, set()
            self._changed.notify()

    def used(self, shard: ShardEntry) -> None:
        with self._changed:
            self._coming = {name: other for name, other in self._coming.items() if name != shard.sha256}
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify()

    def _run(self) -> None:
        while not self.closed:
            coming = self._coming
            fetched = self._fetch_one(list(coming.values()))
            with self._changed:
                if not (fetched or self.closed) and coming is self._coming:
                    self._changed.wait(TICK)
        self._claim([])

    def _fetch_one(self, coming: Sequence[ShardEntry]) -> bool:
        """Fetch the first missing one of those that fit, unless others do; return whether to look again at once."""
        ends = list(accumulate(shard.bytes for shard in coming))
        for shard in self._claim(coming[: bisect_right(ends, self._cache.limit)]):
            if shard.sha256 in self._failed:
                continue
            try:
                file = self._cache._fetch(shard, self)
            except _NotNow:
                return False
            except Exception:
                self._failed.add(shard.sha256)
                return True
            if file is not None:
                os.close(file)
                return True
        return False

    def _claim(self, shards: Sequence[ShardEntry]) -> list[ShardEntry]:
        """Claim these, the first one for longest, and those of before no more; return those that are not there."""
        claimed, self._claimed = self._claimed, {shard.sha256: shard for shard in shards}
        for name in claimed.keys() - self._claimed.keys():
            self._cache._claim(claimed[name], 0)
        seconds = [CLAIM * (1 - place / len(shards) / 2) for place in range(len(shards))]
        return [shard for shard, long in zip(shards, seconds, strict=True) if not self._cache._claim(shard, long)]


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold the lock of a file, which is made if need be; its descriptor, or None where it is not to be had at once."""
    with _released:
        while wait and path in _taken:
            _released.wait()
        free = path not in _taken
        _taken.add(path)
    if not free:
        yield None
        return
    file = None
    try:
        while (file := _try_lock(path)) is None and wait:
            time.sleep(POLL)  # waiting in the kernel, threads of two processes can look to it like a deadlock
        yield file
    finally:
        if file is not None:
            os.close(file)
        with _released:
            _taken.remove(path)
            _released.notify_all()


def _try_lock(path: Path) -> int | None:
    file, locked = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), False
    try:
        with suppress(BlockingIOError, PermissionError, FileNotFoundError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(file), path.stat())  # or it was removed, or renamed, before
    finally:
        if not locked:
            os.close(file)
    return file if locked else None


def _mark_used(file: int | Path, seconds: float = 0) -> None:
    """Note that a shard is used now, or will be within `seconds`."""
    time_ns = time.time_ns() + int(seconds * 1e9)  # the kernel's own clock for files ticks every 4 ms
    os.utime(file, ns=(time_ns, time_ns))


def _after_fork() -> None:
    global _released
    _taken.clear()
    _released = threading.Condition()


os.register_at_fork(after_in_child=_after_fork)
