"""`vitscale doctor`: whether the ranks of a run would meet, see the same, and be as fast as each other.

Ranks talk through a store alone, so that what is wrong with some of them can still be told: those that do not arrive,
those that fall silent and at what, and collectives that do not come to an end.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import PrefixStore

from vitscale.errors import EXIT_UNFIT, UserError, report_failure
from vitscale.launch.meeting import Meeting, absent, expected_hosts, meet
from vitscale.launch.slurm_rank import LOGS
from vitscale.pipeline import vitals
from vitscale.pipeline.config import Config
from vitscale.pipeline.console import count, say
from vitscale.pipeline.distributed import end, use_cuda
from vitscale.pipeline.verdict import Report, verdict

TICKS = 3
NOTHING = "–"


def examine(config: Config, wait: float, as_json: bool) -> NoReturn:
    """What the command does on each rank; rank 0 tells, and ends with exit code 1 if anything is bad.

    Before the training of a Slurm job it ends with `EXIT_UNFIT`, and not for nodes that are merely slow.
    """
    here = meet(wait)
    here.tell(f"here/{here.rank}", here.host)
    if here.rank:
        _attend(here, config)
    else:
        _preside(here, config, as_json)


def _attend(here: Meeting, config: Config) -> NoReturn:
    """What other ranks than 0 do: look at themselves, and wait for the end."""
    try:
        complete, mark = here.hear("go", 2 * here.wait + 30)
        here.tell(f"report/{here.rank}", asdict(_report(here, config, complete, mark)))
        here.hear("done", 2 * here.wait + 30)
    except TimeoutError as error:
        got = f"nothing about {str(error)!r} for {2 * here.wait + 30:g} s"
        raise UserError("rank 0", got, "it to go on", "What it printed says why it does not.") from error
    here.tell(f"bye/{here.rank}", True)
    end(0)


def _preside(here: Meeting, config: Config, as_json: bool) -> NoReturn:
    arrived = here.told("here", here.wait)
    bad = absent(arrived, here.size, expected_hosts(os.environ), here.wait)
    mark, failed = None, ""
    try:
        mark = vitals.marker(config.run.dir)
    except OSError as error:
        failed = f"run.dir cannot be written: {error}"
    try:
        here.tell("go", (len(arrived) == here.size, str(mark or "")))
        own = _report(here, config, len(arrived) == here.size, "")
        own.problems.extend([failed] if failed else [])
        here.tell(f"report/{here.rank}", asdict(own))
        reports = [Report(**each) for _, each in sorted(here.told("report", here.wait, arrived).items())]
    finally:
        if mark:
            mark.unlink(missing_ok=True)
    silent = {rank: host for rank, host in arrived.items() if rank not in {report.rank for report in reports}}
    for rank, host in silent.items():
        with suppress(TimeoutError):
            bad.append(
                f"node {host}, rank {rank}: no report within {here.wait:g} s; last at: {here.hear(f'at/{rank}', 1)}"
            )
    grave = bad + verdict(reports, slow=False)
    bad += verdict(reports)
    here.tell("done", True)
    if as_json:
        print(json.dumps({"ranks": here.size, "arrived": arrived, "bad": bad, "reports": [*map(asdict, reports)]}))
    else:
        show(reports, bad)
    if here.size > 1:
        here.tell("bye/0", True)
        here.told("bye", 5.0, [report.rank for report in reports])  # the store may end with this process
    if LOGS in os.environ:
        if grave:
            report_failure(f"error: {'; '.join(grave)}. slurm.doctor=false trains all the same.")
        end(EXIT_UNFIT if grave else 0)
    if bad:
        report_failure(f"doctor: {count(len(bad), 'finding')}", cause=True)
    end(1 if bad else 0)


def _report(here: Meeting, config: Config, complete: bool, mark: str) -> Report:
    """Look at this node, and where all ranks are there (`complete`), at what is between them."""
    report, problems = Report(here.rank, here.host), []

    @contextmanager
    def part(name: str) -> Iterator[None]:
        here.tell(f"at/{here.rank}", name)
        try:
            yield
        except Exception as error:  # whatever it is, the node is to be told of
            problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    devices = [torch.device("cpu")]
    with part("GPUs not usable"):
        devices = _devices(here, config.engine.device)
        report.gpus.extend(vitals.gpus(devices) if devices[0].type == "cuda" else [])
    with part("versions not readable"):
        report.versions.update(vitals.all_versions())
    with part("disks not readable"):
        report.free_gb.update(vitals.free_gb(config.run.dir))
        if mark and not _seen(Path(mark)):
            problems.append("run.dir is another folder here: it has not what rank 0 wrote there")
    paths = [path for path, _ in config.data.mixture]
    if paths:
        with part("data not readable"):
            report.seconds["storage read"] = vitals.read_seconds(paths, here.rank)
    with part("matrix product failed"):
        report.seconds["matrix product"] = vitals.product_seconds(devices)
    clock = 0.0
    if complete and here.size > 1:
        with part("all-reduce failed"):
            clock = _clock(here)
            report.seconds.update(_network(here, devices[0]))
    return Report(**{**asdict(report), "clock": clock, "problems": problems})


def _devices(here: Meeting, device: str) -> list[torch.device]:
    """This rank's GPU, or all that it sees where it is alone on its node; else the CPU, with the threads of a run."""
    bound = "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1
    if not use_cuda(device, 1 if bound else here.local_size):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))
        return [torch.device("cpu")]
    alone = here.local_size == 1
    seen = range(torch.cuda.device_count()) if alone else [0 if bound else here.local_rank]
    torch.cuda.set_device(seen[0])
    return [torch.device("cuda", index) for index in seen]


def _seen(path: Path) -> bool:
    """Whether a file is there, or comes while caches of a network file system grow old."""
    for _ in range(50):
        if path.exists():
            return True
        time.sleep(0.1)
    return False


def _clock(here: Meeting) -> float:
    """Seconds that this node's clock is ahead of rank 0's, as far as a message takes no time; waits for all ranks."""
    here.tell(f"ready/{here.rank}", True)
    if here.rank == 0:
        if len(here.told("ready", here.wait)) < here.size:
            raise TimeoutError("not all ranks got this far")
        for i in range(TICKS):
            time.sleep(0.2)  # others wait for it by now
            here.tell(f"tick/{i}", time.time())
        return 0.0
    skews = []
    for i in range(TICKS):
        told = here.hear(f"tick/{i}", here.wait + 5)
        skews.append(time.time() - told)
    return min(skews, key=abs)


def _network(here: Meeting, device: torch.device) -> dict[str, float]:
    """`vitals.network_seconds`, in a thread: a collective that hangs cannot be ended."""
    found: dict[str, float] = {}
    errors: list[Exception] = []

    def work() -> None:
        try:
            group = PrefixStore("group", here.store)
            found.update(vitals.network_seconds(group, here.rank, here.size, here.local_size, device, here.wait))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(here.wait)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError(f"not done within {here.wait:g} s")
    return found


# What people read

COLUMNS: dict[str, Callable[[Report], str]] = {
    "rank": lambda report: str(report.rank),
    "node": lambda report: report.host,
    "hardware": lambda report: report.hardware,
    "product TFLOP/s": lambda report: _value(report.seconds, "matrix product", lambda seconds: 1 / seconds),
    "all-reduce ms": lambda report: _value(report.seconds, "all-reduce", lambda seconds: 1e3 * seconds),
    "exchange ms": lambda report: _value(report.seconds, "exchange", lambda seconds: 1e3 * seconds),
    "storage MB/s": lambda report: _value(report.seconds, "storage read", lambda seconds: 1 / seconds),
    "clock ms": lambda report: f"{1e3 * report.clock:+,.0f}",
    "/dev/shm GB": lambda report: _value(report.free_gb, "/dev/shm"),
    "run.dir GB": lambda report: _value(report.free_gb, "run.dir"),
}


def show(reports: list[Report], bad: list[str]) -> None:
    """A row a rank, the versions, and what is odd."""
    columns = [[name, *map(cell, reports)] for name, cell in COLUMNS.items()]
    columns = [column for column in columns if set(column[1:]) != {NOTHING}]
    for row in zip(*([cell.rjust(max(map(len, column))) for cell in column] for column in columns), strict=True):
        say("  ".join(row))
    if reports:
        say(", ".join(f"{name} {version}" for name, version in reports[0].versions.items()))
    for line in bad:
        say(line)
    if not bad:
        nodes = len({report.host for report in reports})
        say(f"{count(len(reports), 'rank')} on {count(nodes, 'node')}: nothing odd")


def _value(found: dict[str, float], name: str, shown: Callable[[float], float] = float) -> str:
    return f"{shown(found[name]):,.3g}" if name in found else NOTHING
