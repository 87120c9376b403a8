"""Holding a run in an object store: its lease, and its small files, which follow those of the local folder.

A store has no locks. The run renews an object, `.lock`, and another start waits until it has seen that nobody does.
That keeps two runs apart as well as can be: one that was cut off from the store for longer than that finds at its next
checkpoint that another has taken its place, and ends.
"""

import json
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitscale.data_prep.publish import PARTIAL
from vitscale.data_prep.storage import RemoteFolder
from vitscale.errors import UserError
from vitscale.pipeline.console import say
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.mirror import fetch, read_bytes, remove, send, shown, sizes, store_of, upload_text

LOCK = ".lock"
RENEW = 15.0  # seconds from one renewal of the lease to the next
PATIENCE = 60.0  # seconds after which a lease that was not renewed is nobody's
PUSH = 30.0  # seconds from one push of small files to the next, which goes with a renewal
LAST = 5.0  # seconds that the last push of a run that failed may take
FETCHED = ("metrics.jsonl", "environment.json", "wandb/id")  # what a run that goes on adds to, or reads


@contextmanager
def kept_in_store(folder: Path, world: World) -> Iterator[Callable[[], None]]:
    """Hold the run that `folder` stands for in a store, if it does, and keep its small files there as they are here.

    All ranks enter. Gives a function for rank 0 that pushes at once: it raises OSError if it fails, and `UserError`
    if another run has taken the place of this one. Besides a thread pushes at least every minute, and says nothing of
    failures, as it tries again. Entering raises `UserError` (`run.dir`, `storage`) if another run is there or the store
    refuses, and leaving if the last push fails.
    """
    store = store_of(folder)
    if store is None:
        yield lambda: None
        return
    keeper = _Keeper(folder, store)
    agree(_problem_of(keeper.take, folder) if world.main else None)
    try:
        if world.local_rank == 0:
            _clear(folder)
        gather(None)  # a scratch folder may be that of several nodes
        agree(_problem_of(keeper.begin, folder) if world.main else None)
        yield keeper.push
    except BaseException:
        if world.main:
            keeper.give_up()
        raise
    agree(_problem_of(keeper.finish, folder) if world.main else None)
    if world.local_rank == 0:
        _clear(folder)


def holder(folder: Path) -> dict[str, Any]:
    """`host` and `pid` of the run that `folder` stands for in a store, if it holds its lease; else empty."""
    store = store_of(folder)
    try:
        found = _read_lease(store) if store else {}
    except OSError:  # status has more to tell than that
        found = {}
    return found if time.time() - found.get("renewed", 0) < PATIENCE else {}


class _Keeper:
    """Of rank 0: the lease, and a thread that renews it and pushes what changed of the small files."""

    def __init__(self, folder: Path, store: RemoteFolder) -> None:
        self._folder, self._store = folder, store
        self._lease = {"host": platform.node(), "boot": _boot(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._pushed: dict[Path, tuple[int, int]] = {}
        self._one = threading.Lock()  # a push at a time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="keeping")

    def take(self) -> None:
        """Take the lease, if need be after a wait for the one that is there to be renewed."""
        before = _read_lease(self._store)
        if before and not self._is_of_the_dead(before):
            who = f"process {before.get('pid')} on {before.get('host')}"
            say(f"{self._store.url} was held by {who}: looking for up to {PATIENCE:.0f} s whether it goes on")
            until = time.monotonic() + PATIENCE
            while (now := _read_lease(self._store)) and time.monotonic() < until:
                if now != before:
                    got = f"{self._store.url}, in use by another run ({who})"
                    remedy = f"Wait, choose one, or end that run and remove {self._store.url}/{LOCK}."
                    raise UserError("run.dir", got, "a folder of its own", remedy)
                time.sleep(1)
        self._write_lease()

    def begin(self) -> None:
        """Fetch what the run adds to, and begin to push."""
        for name in FETCHED:
            fetch(self._folder / name)
        self._thread.start()

    def push(self) -> None:
        """Renew the lease, and upload the small files that changed since they last were."""
        with self._one:
            self._renew()
            for path in _small_files(self._folder):
                info = path.stat()
                mark = (info.st_mtime_ns, info.st_size)
                if self._pushed.get(path) != mark:
                    send(path)
                    self._pushed[path] = mark

    def finish(self) -> None:
        """Push a last time, and end the lease."""
        self._over.set()
        self._thread.join()
        self.push()
        remove(self._store, LOCK)

    def give_up(self) -> None:
        """`finish` as well as it goes, within a short time: the run has failed, and others may wait for its end."""
        self._over.set()

        def last() -> None:
            with suppress(OSError, UserError):
                self.push()
                remove(self._store, LOCK)

        thread = threading.Thread(target=last, daemon=True, name="last push")
        thread.start()
        thread.join(LAST)

    def _run(self) -> None:
        pushed = time.monotonic()
        while not self._over.wait(RENEW):
            with suppress(OSError, UserError):  # what lasts shows at the next checkpoint
                if time.monotonic() - pushed >= PUSH:
                    self.push()
                    pushed = time.monotonic()
                else:
                    with self._one:
                        self._renew()

    def _renew(self) -> None:
        now = _read_lease(self._store)
        if now and now.get("token") != self._lease["token"]:
            got = f"{self._store.url}, taken by process {now.get('pid')} on {now.get('host')} while this run went on"
            raise UserError("run.dir", got, "a folder of its own", "Leave it to that run, or end that one.")
        self._write_lease()

    def _write_lease(self) -> None:
        upload_text(json.dumps({**self._lease, "renewed": time.time()}), self._store, LOCK)

    def _is_of_the_dead(self, lease: dict[str, Any]) -> bool:
        """Whether it is known that its process ended: one of this host, as killed ones leave theirs."""
        if (lease.get("host"), lease.get("boot")) != (self._lease["host"], self._lease["boot"]):
            return False
        try:
            os.kill(lease["pid"], 0)
        except ProcessLookupError:
            return True
        except (PermissionError, KeyError, TypeError):
            pass
        return False


def _read_lease(store: RemoteFolder) -> dict[str, Any]:
    """The lease, as written; empty if there is none or it is damaged. Raises OSError if the store does not answer."""
    try:
        found = json.loads(read_bytes(store, LOCK))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _small_files(folder: Path) -> list[Path]:
    """All files of a run but its checkpoints, of which those in incidents are hidden here, and what W&B keeps."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts) or path.suffix == PARTIAL
        mine = parts[0] != "checkpoints" and (parts[0] != "wandb" or parts[1:] == ("id",))
        if mine and not hidden and path.is_file():
            found.append(path)
    return found


def _clear(folder: Path) -> None:
    """Remove what is left on this node of an earlier start; the stacks of one that hung are pushed first."""
    for path in sorted((folder / "hangs").glob("*.txt")):
        with suppress(OSError, UserError):  # they are told on stderr too
            if sizes(folder, ["recipe.yaml"]):  # else that run is gone
                send(path)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:  # on which a lock is held
            path.unlink(missing_ok=True)


def _problem_of(work: Callable[[], None], folder: Path) -> UserError | None:
    try:
        work()
    except UserError as error:
        return error
    except OSError as error:
        remedy = "Check the bucket, network and credentials, and run again: it goes on from the last checkpoint."
        return UserError("run.dir", f"{shown(folder)} ({error})", "a place in a store that can be written", remedy)
    return None


def _boot() -> str:
    """What tells this host, since it was started, from others of its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
