"""The end of one attempt of a Slurm job: its logs merged, what failed first, and whether it goes on.

Runs without torch, as it runs after every attempt. A rank's failure is told once, not those that followed from it.
"""

import heapq
import json
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from vitscale.data_prep.publish import publish_text
from vitscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_INTERNAL, EXIT_REQUEUE, EXIT_UNFIT, EXIT_USER
from vitscale.launch.slurm_rank import failure_file

TRIES = 3  # attempts in a row that fail without a new checkpoint, then it stops
SOON = 2.0  # seconds in which a rank that was killed may be told of after those that lost it
STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}) (.*)", re.DOTALL)
ENDED = re.compile(r"srun: error: (?P<node>[^:\s]+): tasks? (?P<rank>\d+)[^:]*: (?P<how>.+)")
LOST = re.compile(r"srun: error: Node failure on (\S+)")
UNFIT = re.compile(r"error: node ([^\s:,]+)")
PEER = re.compile(r"connection (closed|reset)|DistBackendError|DistNetworkError|gloo|NCCL", re.IGNORECASE)
FOLLOWS = ("Terminated", "Aborted")  # signals that a rank gets, or gives itself, when another one is lost
NOTICE = ("Terminated", "User defined signal 1")


class Ending(NamedTuple):
    """How the first rank to fail ended: its exit code (128 + signal if it was killed), why, and on which node."""

    code: int
    text: str
    node: str


class Line(NamedTuple):
    """A line of a log."""

    time: str
    source: str
    text: str


def end_attempt(folder: Path, run: str, code: int, asked: bool) -> tuple[str, str, list[str]]:
    """What the batch script does next: (`requeue`, or the exit code to stop with), a node to shun, and what to say.

    `code` is srun's exit code, `asked` whether Slurm gave notice; `run` is run.dir. Attempts that fail without a new
    checkpoint are counted in `failures.json` beside the folders of attempts, as another job may be the next attempt.
    """
    merged = merge(folder)
    count_file = folder.parent / "failures.json"
    if code == EXIT_DONE:
        count_file.unlink(missing_ok=True)
        return str(EXIT_DONE), "", ["finished"]
    first = first_failure(folder, code, asked)
    said = [f"all ranks' output, in the order of time: {merged}", *([first.text] if first.text else [])]
    with merged.open("a") as out:
        out.write("".join(f"\nfirst: {text}\n" for text in said[1:]))
    if first.code == EXIT_REQUEUE:
        count_file.unlink(missing_ok=True)
        return "requeue", "", said
    if first.code in (EXIT_INTERNAL, EXIT_USER, 128 + signal.SIGINT):
        return str(first.code), "", [*said, "not requeued: it would fail again"]
    newest, before = progress(folder, run), _count(count_file)
    failed = before["failed"] + 1 if before["checkpoint"] == newest else 1
    publish_text(count_file, json.dumps({"failed": failed, "checkpoint": newest}))
    if failed >= TRIES:
        count_file.unlink()  # for who submits it again
        reason = f"not requeued: it failed {failed} times in a row, and no checkpoint came of it"
        return str(EXIT_INTERNAL), "", [*said, reason]
    return (
        "requeue",
        first.node,
        [
            *said,
            f"to be requeued; failures in a row without a new checkpoint: {failed} of {TRIES - 1} that are forgiven",
        ],
    )


def first_failure(folder: Path, code: int, asked: bool) -> Ending:
    """Why the attempt ended, of what ranks left and srun tells: a setting, a killed rank, or who ended first."""
    told = {_rank(path): path for path in sorted(folder.glob("rank-*.json"))}
    failures = []
    for rank, path in told.items():
        try:
            failures.append((path.stat().st_mtime_ns, rank, json.loads(path.read_text())))
        except (OSError, ValueError):
            continue
    failures.sort(key=lambda failure: failure[:2])
    causes = [failure["text"] for _, _, failure in failures if failure["cause"]]
    if causes:
        return Ending(EXIT_USER, causes[0], "")
    texts = {rank: failure["text"] for _, rank, failure in failures}
    lines = list(read(folder / "srun.log", "srun"))
    ends = [(line, found) for line in lines if (found := ENDED.match(line.text))]
    lost = next((found for line in lines if (found := LOST.match(line.text))), None)
    if lost:
        return Ending(128 + signal.SIGKILL, f"error: node {lost[1]} failed", lost[1])
    if not ends:
        said = next((line.text for line in lines if "error" in line.text), f"srun ended with exit code {code}")
        return Ending(EXIT_REQUEUE if code == EXIT_REQUEUE else 128 + signal.SIGKILL, f"error: {said}", "")
    start = _seconds(ends[0][0].time)
    soon = [found for line, found in ends if _seconds(line.time) - start <= SOON]
    killed = [found for found in soon if _code(found["how"]) > 128 and not found["how"].startswith(FOLLOWS)]
    first = (killed or soon)[0]
    rank, node, ended = int(first["rank"]), first["node"], _code(first["how"])
    codes = [_code(found["how"]) for found in soon]
    if EXIT_REQUEUE in codes and not killed:  # only after all have saved
        return Ending(EXIT_REQUEUE, next(iter(texts.values()), ""), "")
    if asked and first["how"].startswith(NOTICE):
        return Ending(128 + signal.SIGTERM, "asked to stop before there was anything to save", "")
    if killed:
        return Ending(ended, f"error: rank {rank} on {node} ended: {first['how']}", node)
    if EXIT_HUNG in codes:
        ended = EXIT_HUNG
    own = {other: text for other, text in texts.items() if not PEER.search(text)}
    if texts and not own and ended == EXIT_INTERNAL:  # long before Slurm notices that a node is gone
        text = f"error: a rank or its node was lost, as rank {rank} on {node} noticed: {next(iter(texts.values()))}"
        return Ending(128 + signal.SIGKILL, text, "")
    text = own.get(rank) or next(iter(own.values()), "") or texts.get(rank) or _last_line(folder, rank)
    text = text or f"error: rank {rank} on {node} ended: {first['how']}"
    unfit = UNFIT.match(text) if ended == EXIT_UNFIT else None
    return Ending(ended, text, unfit[1] if unfit else node if ended == EXIT_HUNG else "")


def merge(folder: Path) -> Path:
    """Write `merged.log`: what ranks and srun said, each line with its time and rank. Returns its path.

    What a rank said of its failure, which it told a file, is added to its own log as well.
    """
    for path in sorted(folder.glob("rank-*.json")):
        log, when = path.with_suffix(".log"), datetime.fromtimestamp(path.stat().st_mtime, UTC)
        stamp = when.isoformat(timespec="milliseconds").removesuffix("+00:00")
        try:
            text = f"{stamp} {json.loads(path.read_text())['text']}\n"
        except ValueError:
            continue
        if not log.exists() or text not in log.read_text(errors="replace"):
            with log.open("a") as file:
                file.write(text)
    logs = [read(path, f"rank {_rank(path)}") for path in sorted(folder.glob("rank-*.log"))]
    merged = folder / "merged.log"
    with merged.open("w") as out:
        for line in heapq.merge(*logs, read(folder / "srun.log", "srun"), key=lambda line: line.time):
            out.write(f"{line.time} {line.source}: {line.text.rstrip()}\n")
    return merged


def read(path: Path, source: str) -> Iterator[Line]:
    """Lines of a log in their order; one without a time has that of the line above."""
    time = ""
    try:
        with path.open(errors="replace") as file:
            for row in file:
                found = STAMP.match(row)
                time, text = (max(time, found[1]), found[2]) if found else (time, row)
                yield Line(time, source, text.rstrip("\n"))
    except FileNotFoundError:
        return


def progress(folder: Path, run: str) -> str:
    """The newest checkpoint of the run; where that is in an object store, the one that this attempt began with."""
    if "://" not in run:
        return max((path.name for path in Path(run, "checkpoints").glob("step-*")), default="", key=_step)
    lines = read(failure_file(folder, 0).with_suffix(".log"), "")
    return next((line.text for line in lines if line.text.startswith("going on from step")), "")


def _rank(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))


def _step(name: str) -> int:
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _count(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {"failed": 0, "checkpoint": None}


def _code(how: str) -> int:
    """The exit code of `Exited with exit code 2`; 128 + 9 of what srun tells of a signal."""
    found = re.match(r"Exited with exit code (\d+)", how)
    return int(found[1]) if found else 128 + signal.SIGKILL


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp() if stamp else 0.0


def _last_line(folder: Path, rank: int) -> str:
    """What a rank said last, which is all there is if it never got as far as vitscale."""
    lines = list(read(failure_file(folder, rank).with_suffix(".log"), ""))
    return f"error: rank {rank}: {lines[-1].text}" if lines else ""
