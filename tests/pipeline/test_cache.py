"""The cache of shards: whole tars within a limit, fetched once for all processes, whatever fails or is killed."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitscale.data_prep.manifest import ShardEntry
from vitscale.data_prep.storage import LocalFolder, RemoteFolder
from vitscale.errors import UserError
from vitscale.pipeline.data import cache
from vitscale.pipeline.data.cache import ShardCache

SIZE = 1000  # bytes of a shard, where it does not matter
Source = tuple["Counted", list[ShardEntry]]


@dataclass(frozen=True)
class Counted(LocalFolder):
    """A folder that notes in a file, for all processes, what is read from its start, and takes its time."""

    log: str = ""
    seconds: float = 0.0  # of each request

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if offset == 0:
            with open(self.log, "a") as file:
                file.write(f"{name}\n")
        time.sleep(self.seconds)
        return super().read(name, offset, length)

    @property
    def fetched(self) -> list[str]:
        return Path(self.log).read_text().split() if Path(self.log).exists() else []


def make_source(folder: Path, count: int, size: int = SIZE, seconds: float = 0.0) -> Source:
    folder.mkdir()
    shards = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        (folder / f"{number}.tar").write_bytes(data)
        shards.append(ShardEntry(f"{number}.tar", 1, size, hashlib.sha256(data).hexdigest()))
    return Counted(str(folder), f"{folder}.log", seconds), shards


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(cache, "TICK", 0.02)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


def content(file: int) -> bytes:
    with os.fdopen(file, "rb") as opened:
        return opened.read()


def digest(file: int) -> str:
    return hashlib.sha256(content(file)).hexdigest()


def held(place: Path, shards: Sequence[ShardEntry]) -> list[int]:
    """Numbers of the shards that the cache holds whole."""
    return [number for number, shard in enumerate(shards) if (place / f"{shard.sha256}.tar").exists()]


def on_disk(place: Path) -> int:
    """Bytes of all files, at a moment at which nothing is evicted or begun."""
    place.mkdir(parents=True, exist_ok=True)
    with cache._locked(place / "lock"):
        total = 0
        for path in place.iterdir():
            with suppress(FileNotFoundError):  # a partial file, given up
                total += path.stat().st_size
        return total


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.glob("*.partial")]


def wait_until(true: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


# What other processes run: this file with the name of a function and its arguments.


def in_process(function: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> Any:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return json.loads(out)


def packed(source: Source, place: Path, limit: int) -> tuple[Any, ...]:
    return asdict(source[0]), str(place), limit, [asdict(shard) for shard in source[1]]


def unpacked(source: dict[str, Any], place: str, limit: int, shards: list[dict[str, Any]]) -> tuple[ShardCache, list]:
    cache.FIRST_DELAY, cache.TICK, cache.PIECE = 0.001, 0.02, 100
    return ShardCache(Counted(**source), Path(place), limit), [ShardEntry(**shard) for shard in shards]


def open_all(*arguments: Any) -> None:
    """Open all shards, and say their digests."""
    held, shards = unpacked(*arguments)
    print(json.dumps([digest(held.open(shard)) for shard in shards]))


def open_many(seed: int, threads: int, opens: int, *arguments: Any) -> None:
    """Open shards at random from several threads, with others ahead, and say how many were not what they should be."""
    held, shards = unpacked(*arguments)
    sys.setswitchinterval(1e-5)

    def wrong(thread: int) -> int:
        numbers = np.random.default_rng([seed, thread]).integers(0, len(shards), opens).tolist()
        held.fetch_ahead([shards[number] for number in numbers])
        return sum(digest(held.open(shards[number])) != shards[number].sha256 for number in numbers)

    with ThreadPoolExecutor(threads) as pool:
        print(json.dumps(list(pool.map(wrong, range(threads)))))


def open_and_say_error(*arguments: Any) -> None:
    """Open the shards one after the other; say whether each is right, or the error's setting and value."""
    held, shards = unpacked(*arguments)
    results: list[Any] = []
    for shard in shards:
        try:
            results.append(digest(held.open(shard)) == shard.sha256)
        except UserError as error:
            results.append([error.setting, str(error.got)])
    print(json.dumps(results))


def end_while_fetching_ahead(*arguments: Any) -> None:
    """End while the thread is within a request."""
    held, shards = unpacked(*arguments)
    held.fetch_ahead(shards)
    wait_until(lambda: leftovers(held.folder))
    print("null")


def keep_ahead(*arguments: Any) -> None:
    """Fetch ahead until standard input ends."""
    held, shards = unpacked(*arguments)
    held.fetch_ahead(shards)
    print("null", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))


def test_a_shard_is_fetched_once_and_is_that_of_the_source(tmp_path: Path, place: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "PIECE", 300)
    source, shards = make_source(tmp_path / "in", 2)
    shards_here = ShardCache(source, place, 10 * SIZE)
    for _ in range(2):
        for shard in shards:
            file = shards_here.open(shard)
            assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            assert fcntl.fcntl(file, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert content(file) == source.read(shard.name)
    assert sorted(path.name for path in place.iterdir()) == sorted([*(f"{s.sha256}.tar" for s in shards), "lock"])
    assert source.fetched.count("0.tar") == 1 + 2  # one for the cache, two of the test's own
    assert [ShardCache(source, place, 10 * SIZE).open(shard) > 0 for shard in shards] == [True, True]
    assert len(source.fetched) == 2 + 4


def test_an_empty_shard_and_one_that_would_lead_out_of_the_folder(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 1, size=0)
    here = ShardCache(source, place, 0)
    assert content(here.open(shards[0])) == b""
    for name in ("../secret", "", "A" * 64, f"{'a' * 64}\n"):
        with pytest.raises(UserError, match="for its SHA-256") as error:
            here.open(ShardEntry("0.tar", 1, 0, name))
        assert error.value.setting == "data"
    here.fetch_ahead([ShardEntry("0.tar", 1, 0, "../secret"), *shards])
    here.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "new"]


def test_processes_that_want_the_same_shards_at_once_fetch_each_once(tmp_path: Path, place: Path) -> None:
    source = make_source(tmp_path / "in", 3, seconds=0.03)  # 0.3 a shard: time enough for all to start
    processes = [in_process("open_all", *packed(source, place, 10 * SIZE)) for _ in range(3)]
    assert [said(process) for process in processes] == [[shard.sha256 for shard in source[1]]] * 3
    assert source[0].fetched == ["0.tar", "1.tar", "2.tar"]
    assert leftovers(place) == []


def test_threads_that_want_the_same_shard_at_once_fetch_it_once(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 1, seconds=0.1)
    caches = [ShardCache(source, place, SIZE) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda number: digest(caches[number % 2].open(shards[0])), range(8)))
    assert digests == [shards[0].sha256] * 8
    assert source.fetched == ["0.tar"]


@pytest.mark.parametrize("room", [1.5, 5])
def test_many_threads_of_many_processes_in_little_room(tmp_path: Path, place: Path, room: float) -> None:
    source = make_source(tmp_path / "in", 12, seconds=0.0005)
    limit = int(room * SIZE)
    processes = [in_process("open_many", seed, 4, 12, *packed(source, place, limit)) for seed in range(3)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, on_disk(place))
        time.sleep(0.001)
    assert [said(process) for process in processes] == [[0] * 4] * 3
    assert SIZE <= most <= limit
    assert len(source[0].fetched) >= 12


def test_a_process_killed_while_it_fetches(tmp_path: Path, place: Path) -> None:
    slow = make_source(tmp_path / "in", 3, seconds=0.3)
    source, shards = Counted(slow[0].url, slow[0].log), slow[1]
    for victim in (0, 1):
        process = in_process("open_all", *packed((slow[0], [shards[victim]]), place, 10 * SIZE))
        wait_until(lambda: on_disk(place) == SIZE)
        process.kill()
        process.communicate()
        assert leftovers(place) == [f"{shards[victim].sha256}.partial"]
        if victim == 0:  # the same shard
            assert digest(ShardCache(source, place, 10 * SIZE).open(shards[0])) == shards[0].sha256
            assert leftovers(place) == []
            os.unlink(place / f"{shards[0].sha256}.tar")
    assert digest(ShardCache(source, place, 10 * SIZE).open(shards[2])) == shards[2].sha256  # another one
    assert (leftovers(place), held(place, shards)) == ([], [2])


def test_who_waits_for_a_process_that_is_killed_takes_over(tmp_path: Path, place: Path) -> None:
    slow, shards = make_source(tmp_path / "in", 1, seconds=0.3)
    first = in_process("open_all", *packed((slow, shards), place, SIZE))
    wait_until(lambda: on_disk(place) == SIZE)
    source = Counted(slow.url, slow.log)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: digest(ShardCache(source, place, SIZE).open(shards[0])))
        time.sleep(0.1)
        assert not waiting.done()
        first.send_signal(signal.SIGKILL)
        assert waiting.result(10) == shards[0].sha256
    first.communicate()
    assert slow.fetched == ["0.tar", "0.tar"]
    assert leftovers(place) == []


def test_the_limit_holds_at_every_step(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 30)
    here = ShardCache(source, place, int(4.5 * SIZE))
    for step, number in enumerate(np.random.default_rng(0).integers(0, 30, 200).tolist()):
        assert digest(here.open(shards[number])) == shards[number].sha256
        assert on_disk(place) <= 4.5 * SIZE
        assert number in held(place, shards)
        assert len(held(place, shards)) == min(4, len(set(held(place, shards)) | {number})) or step < 4


def test_the_one_used_longest_ago_goes_first(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 6)
    here = ShardCache(source, place, 3 * SIZE)
    place.mkdir(parents=True)
    (place / "mine.tar").write_bytes(bytes(10 * SIZE))  # no business of the cache's
    for number, left in [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (0, [0, 1, 2]), (3, [0, 2, 3]), (4, [0, 3, 4])]:
        os.close(here.open(shards[number]))
        assert held(place, shards) == left
    assert (place / "mine.tar").stat().st_size == 10 * SIZE


def test_a_shard_that_is_read_while_it_is_evicted(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 2)
    here = ShardCache(source, place, SIZE)
    file = here.open(shards[0])
    os.close(here.open(shards[1]))
    assert held(place, shards) == [1]
    assert digest(file) == shards[0].sha256


def test_a_limit_smaller_than_a_shard_holds_one_at_a_time(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 3, seconds=0.01)
    here = ShardCache(source, place, SIZE // 2)
    here.fetch_ahead(shards)  # nothing fits
    for number, shard in enumerate(shards):
        assert digest(here.open(shard)) == shard.sha256
        assert held(place, shards) == [number]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda shard: digest(here.open(shard)), shards)) == [s.sha256 for s in shards]
    assert len(held(place, shards)) == 1
    here.close()


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt", "forbidden"])
def test_a_damaged_source_is_tried_again_and_then_named(tmp_path: Path, place: Path, monkeypatch, damage: str) -> None:
    source, shards = make_source(tmp_path / "in", 2)
    path = tmp_path / "in" / "0.tar"
    data = path.read_bytes()
    delays: list[float] = []
    monkeypatch.setattr(cache.time, "sleep", delays.append)
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "corrupt":
        path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "forbidden":
        path.mkdir()
    here = ShardCache(source, place, 10 * SIZE)
    with pytest.raises(UserError) as error:
        here.open(shards[0])
    problem = {"missing": "no such file", "truncated": "999 of 1000 bytes", "corrupt": "SHA-256"}
    assert str(error.value.got).startswith(f"{source.url}/0.tar: ")
    assert problem.get(damage, "Is a directory") in str(error.value.got)
    assert (error.value.setting, error.value.expected) == ("data", "a whole shard")
    assert source.fetched == ["0.tar"] * cache.ATTEMPTS
    assert [delay for delay in delays if delay] == [0.001, 0.002, 0.004]
    assert [path.name for path in place.iterdir()] == ["lock"]
    os.close(here.open(shards[1]))
    if damage != "forbidden":
        path.write_bytes(data)
        assert content(here.open(shards[0])) == data


@dataclass(frozen=True)
class Failing(Counted):
    """Fails in the ways of `errors`, once each."""

    errors: tuple[Exception, ...] = ()

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().read(name, offset, length)
        if len(self.fetched) <= len(self.errors) and offset:
            raise self.errors[len(self.fetched) - 1]
        return data


def test_a_failure_that_passes(tmp_path: Path, place: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "PIECE", 300)
    source, shards = make_source(tmp_path / "in", 1)
    errors = (OSError(errno.EIO, "broken"), UserError("storage", "x", "an answer", "Wait."), OSError(errno.ENOSPC, "x"))
    failing = Failing(source.url, source.log, errors=errors)
    assert digest(ShardCache(failing, place, SIZE).open(shards[0])) == shards[0].sha256
    assert source.fetched == ["0.tar"] * 4
    assert leftovers(place) == []


def test_a_shard_damaged_in_the_cache_is_fetched_again(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 1)
    here = ShardCache(source, place, SIZE)
    for size in (SIZE - 1, 0, 2 * SIZE):
        os.close(here.open(shards[0]))
        os.truncate(place / f"{shards[0].sha256}.tar", size)
        assert digest(here.open(shards[0])) == shards[0].sha256
    assert source.fetched == ["0.tar"] * 4


def test_a_cache_folder_removed_meanwhile(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 1)
    here = ShardCache(source, place, SIZE)
    for _ in range(2):
        assert digest(here.open(shards[0])) == shards[0].sha256
        for path in place.iterdir():
            path.unlink()
        place.rmdir()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_is_full(tmp_path: Path, place: Path, monkeypatch, call: str) -> None:
    source, shards = make_source(tmp_path / "in", 6)
    here, real, most = ShardCache(source, place, 10 * SIZE), getattr(os, call), 10

    def refusing(*arguments: Any) -> Any:
        if len(held(place, shards)) > most:  # beside the one that is written
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(cache.os, call, refusing)
    for shard in shards[:5]:
        os.close(here.open(shard))
    most = 2
    assert digest(here.open(shards[5])) == shards[5].sha256
    assert held(place, shards) == [3, 4, 5]
    most = -1
    with pytest.raises(UserError, match="No space left on device") as error:
        here.open(shards[0])
    assert (error.value.setting, str(place) in str(error.value)) == ("data.cache", True)
    assert [path.name for path in place.iterdir()] == ["lock"]


def test_a_small_file_system_that_is_really_full(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", 5, size=300_000)
    (tmp_path / "disk").mkdir()
    place = tmp_path / "disk" / "cache"
    source[1].append(make_source(tmp_path / "large", 1, size=1_100_000)[1][0])
    (tmp_path / "large" / "0.tar").rename(tmp_path / "in" / "large.tar")
    source[1][-1] = ShardEntry("large.tar", 1, source[1][-1].bytes, source[1][-1].sha256)
    arguments = json.dumps(packed(source, place, 10**9))
    python = f"{sys.executable} {__file__} open_and_say_error '{arguments}'"
    mounted = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", f"{mounted} && {python}"], capture_output=True, text=True)
    *right, (setting, got) = json.loads(done.stdout or done.stderr)
    assert right == [True] * 5  # three of them fit
    assert (setting, "No space left" in got) == ("data.cache", True)


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    source, shards = make_source(tmp_path / "in", 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a folder on a local disk") as error:
        ShardCache(source, tmp_path / "file" / "cache", SIZE).open(shards[0])
    assert error.value.setting == "data.cache"


@pytest.fixture
def ahead(tmp_path: Path, place: Path) -> Iterator[Callable[..., tuple[ShardCache, Counted, list[ShardEntry]]]]:
    """Make a cache, to be closed in the end, of so many shards of SIZE, with room for some."""
    made: list[ShardCache] = []

    def make(count: int, room: int, seconds: float = 0.0) -> tuple[ShardCache, Counted, list[ShardEntry]]:
        source, shards = make_source(tmp_path / "in", count, seconds=seconds)
        made.append(ShardCache(source, place, room * SIZE))
        return made[0], source, shards

    yield make
    made[0].close()


def test_shards_are_fetched_ahead_in_order_as_far_as_they_fit(ahead, place: Path) -> None:
    here, source, shards = ahead(10, 3)
    here.fetch_ahead([shards[number] for number in (4, 2, 7, 1, 0)])
    wait_until(lambda: held(place, shards) == [2, 4, 7])
    time.sleep(0.1)
    assert source.fetched == ["4.tar", "2.tar", "7.tar"]
    assert digest(here.open(shards[4])) == shards[4].sha256
    wait_until(lambda: held(place, shards) == [1, 2, 7])
    os.close(here.open(shards[2]))
    wait_until(lambda: held(place, shards) == [0, 1, 7])
    here.fetch_ahead([shards[number] for number in (7, 8, 9)])  # the others may go now
    wait_until(lambda: held(place, shards) == [7, 8, 9])
    assert source.fetched == [f"{number}.tar" for number in (4, 2, 7, 1, 0, 8, 9)]
    assert on_disk(place) <= 3 * SIZE


def test_ahead_of_use_all_shards_are_fetched_once(ahead, place: Path) -> None:
    here, source, shards = ahead(20, 4, seconds=0.002)
    here.fetch_ahead(shards)
    for number, shard in enumerate(shards):
        wait_until(lambda n=number: n in held(place, shards))
        assert digest(here.open(shard)) == shard.sha256
        assert on_disk(place) <= 4 * SIZE
    assert source.fetched == [shard.name for shard in shards]


def test_a_shard_out_of_turn_pushes_out_the_one_needed_last(ahead, place: Path, monkeypatch) -> None:
    here, source, shards = ahead(10, 3)
    here.fetch_ahead(shards[:6])
    wait_until(lambda: held(place, shards) == [0, 1, 2])
    monkeypatch.setattr(cache, "TICK", 60)
    time.sleep(0.2)  # for the claims to be of one time, and not to be renewed
    another = ShardCache(source, place, 3 * SIZE)
    os.close(another.open(shards[9]))
    assert held(place, shards) == [0, 1, 9]
    os.close(another.open(shards[8]))
    assert held(place, shards) == [0, 1, 8]
    here.close()  # which gives the claims up
    wait_until(lambda: (place / f"{shards[0].sha256}.tar").stat().st_mtime <= time.time())


def test_what_one_process_fetched_ahead_is_not_pushed_out_by_another_ones_fetching_ahead(ahead, place: Path) -> None:
    here, source, shards = ahead(10, 4)
    other = in_process("keep_ahead", *packed((source, shards[6:9]), place, 4 * SIZE))
    wait_until(lambda: held(place, shards) == [6, 7, 8])
    here.fetch_ahead(shards[:4])
    wait_until(lambda: held(place, shards) == [0, 6, 7, 8])
    time.sleep(0.2)
    assert held(place, shards) == [0, 6, 7, 8]
    assert len(source.fetched) == 4
    said(other)
    assert digest(here.open(shards[1])) == shards[1].sha256  # what is needed now pushes out anything
    wait_until(lambda: len(held(place, shards)) == 4)


def test_claims_of_a_process_that_is_gone_lapse(ahead, place: Path) -> None:
    here, _, shards = ahead(4, 2)
    lapses = time.time() + 0.5
    for shard in shards[:2]:
        os.close(here.open(shard))
        os.utime(place / f"{shard.sha256}.tar", (lapses, lapses))
    here.fetch_ahead(shards[2:])
    wait_until(lambda: held(place, shards) == [2, 3])
    assert time.time() > lapses


def test_a_folder_by_two_names(tmp_path: Path, place: Path) -> None:
    source, shards = make_source(tmp_path / "in", 1, seconds=0.1)
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    with ThreadPoolExecutor(2) as pool:
        folders = (place, tmp_path / "link")
        digests = list(pool.map(lambda folder: digest(ShardCache(source, folder, SIZE).open(shards[0])), folders))
    assert digests == [shards[0].sha256] * 2
    assert source.fetched == ["0.tar"]


def test_errors_of_fetching_ahead_are_left_to_open(ahead, place: Path) -> None:
    here, source, shards = ahead(4, 10)
    (Path(source.url) / "1.tar").unlink()
    here.fetch_ahead(shards)
    wait_until(lambda: held(place, shards) == [0, 2, 3])
    time.sleep(0.1)
    assert source.fetched.count("1.tar") == cache.ATTEMPTS
    with pytest.raises(UserError, match=r"1\.tar: no such file"):
        here.open(shards[1])


def test_close_stops_fetching_ahead_soon(ahead, place: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "PIECE", 100)
    here, _, shards = ahead(4, 10, seconds=0.05)

    def fetchers() -> int:
        return [thread.name for thread in threading.enumerate()].count("shards")

    wait_until(lambda: fetchers() == 0)  # of other tests
    for order in (shards, shards[::-1]):
        here.fetch_ahead(order)
        assert fetchers() == 1
    wait_until(lambda: leftovers(place))
    here.close()
    wait_until(lambda: fetchers() == 0, seconds=0.4)  # a shard takes 0.5
    assert (leftovers(place), held(place, shards)) == ([], [])
    here.fetch_ahead(shards[:1])  # which begins anew
    wait_until(lambda: held(place, shards) == [0])


def test_fetching_ahead_keeps_no_process_from_ending(tmp_path: Path, place: Path) -> None:
    source = make_source(tmp_path / "in", 2, seconds=30)
    begin = time.monotonic()
    assert said(in_process("end_while_fetching_ahead", *packed(source, place, 10 * SIZE))) is None
    assert time.monotonic() - begin < 10
    assert len(leftovers(place)) == 1
    quick = Counted(source[0].url, source[0].log)
    os.close(ShardCache(quick, place, 10 * SIZE).open(source[1][1]))
    assert leftovers(place) == []


def test_copies_by_pickling_and_fork(ahead, place: Path) -> None:
    here, source, shards = ahead(4, 10, seconds=0.01)
    here.fetch_ahead(shards[:3])
    copy = pickle.loads(pickle.dumps(here))
    assert (copy.remote, copy.folder, copy.limit) == (source, place, 10 * SIZE)
    assert digest(copy.open(shards[3])) == shards[3].sha256

    def child() -> None:
        right = digest(here.open(shards[2])) == shards[2].sha256
        here.fetch_ahead(shards)
        wait_until(lambda: held(place, shards) == [0, 1, 2, 3])
        here.close()
        os._exit(0 if right else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    assert sorted(source.fetched) == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_shards_in_an_object_store(tmp_path: Path, place: Path, monkeypatch) -> None:
    from tests.data_prep.test_storage import forget_clients, object_store, upload

    monkeypatch.setattr(cache, "PIECE", 30_000)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    source, shards = make_source(tmp_path / "in", 4, size=100_000)
    forget_clients()
    try:
        with object_store() as (server, client):
            upload(client, tmp_path / "in", "set")
            folder = RemoteFolder("s3://bucket/set")
            here = ShardCache(folder, place, 10**6)
            here.fetch_ahead(shards[:2])
            assert [digest(here.open(shard)) for shard in shards[:3]] == [shard.sha256 for shard in shards[:3]]
            client.put_object(Bucket="bucket", Key="set/3.tar", Body=source.read("3.tar")[:70_000])
            with pytest.raises(UserError, match=r"s3://bucket/set/3\.tar: 70000 of 100000 bytes"):
                here.open(shards[3])
            client.delete_object(Bucket="bucket", Key="set/3.tar")
            with pytest.raises(UserError, match=r"s3://bucket/set/3\.tar: no such file"):
                here.open(shards[3])
            server.stop()
            with pytest.raises(UserError, match=r"set/3\.tar: .*onnect") as error:
                here.open(shards[3])
            assert error.value.setting == "data"
            assert digest(here.open(shards[0])) == shards[0].sha256
            here.close()
    finally:
        forget_clients()
