"""What is odd about a node beside the others: pure functions of the reports that ranks give of themselves, `vitals`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, NamedTuple

# times a rank may take of what the others do, by what is timed; shared storage varies most
SLOWER = {"matrix product": 1.5, "all-reduce": 2.0, "exchange": 2.0, "storage read": 5.0}
NO_MATTER = {"all-reduce": 5e-3, "exchange": 2e-3, "storage read": 0.02}  # seconds more that are mere chance
LEAST_FREE = {"run.dir": 2.0, "/dev/shm": 1.0}  # GB: a checkpoint of a small model; a container's default is 0.064
MOST_USED = 2.0  # GB of a GPU that are in use before a run: the context of this process takes about half of one
MOST_SKEW = 2.0  # seconds between clocks: file times and locks of runs in object store go by them


@dataclass(frozen=True)
class Report:
    """What a rank says of itself. `clock` is in seconds against rank 0, `free_gb` by place, `seconds` by what is timed
    (of a matrix product: for 10¹² operations; of a storage read: for a megabyte), and `problems` what failed outright.

    `gpus` are those that it sees: `name`, `gb` and `used_gb` of each.
    """

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    free_gb: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def hardware(self) -> str:
        """Its GPUs in a few words."""
        kinds = Counter(f"{gpu['name']} of {gpu['gb']:.0f} GB" for gpu in self.gpus)
        return ", ".join(f"{number} × {kind}" if number > 1 else kind for kind, number in kinds.items()) or "no GPU"


class _Oddity(NamedTuple):
    """Something about a rank; of alike ones on a node the gravest is told."""

    kind: str
    gravity: float
    text: str
    report: Report


def verdict(reports: list[Report], slow: bool = True) -> list[str]:
    """One line for each node about which something is odd, and for each version on which nodes divide evenly.

    `node gpu07: matrix product 2.1 times the median`, `node gpu03: torch 2.10.0, others 2.11.0`. Ranks are named where
    it is not all of a node's. Empty if all is well; without `slow` it is, too, if nodes are merely slower than others.
    """
    lines, found = [], []
    for name in sorted({name for report in reports for name in report.versions}):
        odd, divided = _unlike(reports, name, {report.rank: report.versions.get(name, "none") for report in reports})
        found += odd
        lines += divided
    odd, divided = _unlike(reports, "", {report.rank: report.hardware for report in reports})
    found += odd
    lines += divided
    for find in (_failures, _used, _full, _skewed, *([_slow] if slow else [])):
        found += find(reports)
    return lines + _by_node(reports, found)


def _by_node(reports: list[Report], found: list[_Oddity]) -> list[str]:
    """A line for each node, its oddities one after the other."""
    ranks_of: dict[str, list[int]] = {}
    for report in reports:
        ranks_of.setdefault(report.host, []).append(report.rank)
    alike: dict[str, dict[str, list[_Oddity]]] = {}
    everywhere = {text for text in {each.text for each in found} if _on_all(text, found, ranks_of)}
    for oddity in (each for each in found if each.text not in everywhere):
        alike.setdefault(oddity.report.host, {}).setdefault(oddity.kind, []).append(oddity)
    lines = [f"every node: {text}" for text in sorted(everywhere)]
    for host, kinds in alike.items():
        texts = []
        for several in kinds.values():
            ranks = sorted({oddity.report.rank for oddity in several})
            where = "" if len(ranks) == len(ranks_of[host]) else f" ({named_ranks(ranks)})"
            texts.append(max(several, key=lambda oddity: oddity.gravity).text + where)
        lines.append(f"node {host}: {'; '.join(texts)}")
    return lines


def _on_all(text: str, found: list[_Oddity], ranks_of: dict[str, list[int]]) -> bool:
    return len(ranks_of) > 1 and {each.report.host for each in found if each.text == text} == set(ranks_of)


def _unlike(reports: list[Report], name: str, values: dict[int, str]) -> tuple[list[_Oddity], list[str]]:
    """Ranks whose value is not what most have; a line for all where two values are as frequent."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return [], []
    what = f"{name} " if name else ""
    if counts[0][1] == counts[1][1]:
        hosts = {
            value: sorted({report.host for report in reports if values[report.rank] == value}) for value, _ in counts
        }
        differing = "; ".join(f"{value} on {', '.join(names)}" for value, names in hosts.items())
        return [], [f"nodes differ: {what}{differing}"]
    usual = counts[0][0]
    odd = [report for report in reports if values[report.rank] != usual]
    return [_Oddity(name, 0, f"{what}{values[each.rank]}, others {usual}", each) for each in odd], []


def _failures(reports: list[Report]) -> Iterator[_Oddity]:
    for report in reports:
        for problem in report.problems:
            yield _Oddity(problem, 0, problem, report)


def _used(reports: list[Report]) -> Iterator[_Oddity]:
    for report in reports:
        for index, gpu in enumerate(report.gpus):
            if gpu["used_gb"] > MOST_USED:
                which = f"GPU {index}: " if len(report.gpus) > 1 else "GPU: "
                text = f"{which}{gpu['used_gb']:.1f} of {gpu['gb']:.0f} GB in use by others"
                yield _Oddity(f"used {index}", gpu["used_gb"], text, report)


def _full(reports: list[Report]) -> Iterator[_Oddity]:
    for report in reports:
        for place, free in report.free_gb.items():
            if free < LEAST_FREE.get(place, 0):
                yield _Oddity(place, -free, f"{place}: {free:.2f} GB free", report)


def _skewed(reports: list[Report]) -> Iterator[_Oddity]:
    usual = median_low(report.clock for report in reports) if reports else 0
    for report in reports:
        skew = report.clock - usual
        if abs(skew) > MOST_SKEW:
            text = f"clock {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the others"
            yield _Oddity("clock", abs(skew), text, report)


def _slow(reports: list[Report]) -> Iterator[_Oddity]:
    for name, limit in SLOWER.items():
        taken = {report.rank: report.seconds[name] for report in reports if name in report.seconds}
        if len(taken) < 2:
            continue
        usual = median_low(taken.values())  # of two the faster one
        for report in reports:
            ratio = taken.get(report.rank, 0) / usual
            if ratio > limit and taken[report.rank] - usual > NO_MATTER.get(name, 0):
                beside = "the median" if len(taken) > 2 else "the other's"
                yield _Oddity(name, ratio, f"{name} {ratio:.1f} times {beside}", report)


def named_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-3, 8`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"
