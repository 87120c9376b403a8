"""`vitscale compare`: what evaluations left of several checkpoints, side by side."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vitscale.data_prep.publish import publish
from vitscale.errors import UserError
from vitscale.pipeline.evaluation.bootstrap import Interval
from vitscale.pipeline.evaluation.class_map import SUBSET
from vitscale.pipeline.evaluation.rows import NAME, read_rows
from vitscale.pipeline.evaluation.suite_results import DETAIL
from vitscale.pipeline.evaluation.suites import ON_FEATURES
from vitscale.pipeline.evaluation.tables import Table, latex, markdown, text
from vitscale.pipeline.mirror import reading_folder
from vitscale.pipeline.out_file import check_out

HEADLINES = (
    "accuracy/top1", "accuracy/top5", "accuracy/map", "real/real_top1", "knn/k20_top1", "fewshot/10shot",
    "linear/sgd_top1", "linear/lbfgs_top1", "calibration/ece", "corruptions/mean_error", "corruptions/mce",
)  # fmt: skip
PANELS = 4  # of a figure, side by side
PICTURES = (".png", ".svg", ".pdf")
WIDTH = 120  # columns of text where there is no terminal
MOST_COMMANDS = 3  # that are told of what was not measured
STEP = re.compile(r"(.*?)/?checkpoints/(step-0*(\d+))")
ALONE = (
    "Intervals are of 95%, of each number by itself. They do not say whether one checkpoint is better than another on "
    "the same images: that takes results image by image, which are not kept."
)


class Subject(NamedTuple):
    """A checkpoint: the run or export as the user named it, its step if it is one of a run, and its kind of weights."""

    place: str
    step: str
    weights: str


class Column(NamedTuple):
    """A number, as of a dataset, whatever the path by which it was read, and with the classes mapped so or not."""

    dataset: str
    suite: str
    name: str
    class_map: str

    @property
    def path(self) -> str:
        return f"{self.suite}/{self.name}"


@dataclass(frozen=True)
class Comparison:
    """Numbers of subjects in columns, as far as they were measured; `paths` of datasets, as they were given."""

    subjects: list[Subject]
    columns: list[Column]
    cells: dict[tuple[Subject, Column], Interval]
    paths: dict[str, str]

    @property
    def labels(self) -> list[str]:
        """Names of the subjects, as short as tells them apart."""
        found = []
        for one in self.subjects:
            steps = {other.step for other in self.subjects if other.place == one.place}
            kinds = {other.weights for other in self.subjects if other[:2] == one[:2]}
            step = f" step {one.step}" if one.step and len(steps) > 1 else ""
            found.append(f"{one.place}{step}{f' {one.weights}' if len(kinds) > 1 else ''}")
        return found

    @property
    def header(self) -> list[str]:
        """Names of the columns, with that of the dataset and of the class map where there are several."""
        names = {dataset: Path(self.paths[dataset]).name for dataset in {column.dataset for column in self.columns}}
        told = list(names.values())
        found = []
        for column in self.columns:
            dataset = names[column.dataset]
            more = f" {column.dataset[:8]}" if told.count(dataset) > 1 else ""
            suite = "" if column.suite == "accuracy" or column.name.startswith(column.suite) else f"{column.suite} "
            maps = {other.class_map for other in self.columns if other[:3] == column[:3]}
            by = f" {_map(column.class_map)}" if column.class_map and len(maps) > 1 else ""
            found.append((f"{dataset}{more} " if len(names) > 1 else "") + suite + column.name + by)
        return found

    def table(self) -> Table:
        """Numbers with their intervals, as text."""
        rows = [[label, *(_cell(self.cells.get((subject, column))) for column in self.columns)]
                for label, subject in zip(self.labels, self.subjects, strict=True)]  # fmt: skip
        return Table(["", *self.header], rows)

    def notes(self) -> list[str]:
        """What to know of the numbers, and the commands that find those which are missing."""
        datasets = {column.dataset for column in self.columns}
        found = [f"All on {self.paths[each]}." for each in datasets] if len(datasets) == 1 else []
        found += [ALONE] if len(self.subjects) > 1 else []
        commands = self._missing()
        found += [f"Not measured yet: `{command}`" for command in commands[:MOST_COMMANDS]]
        more = len(commands) - MOST_COMMANDS
        return found + ([f"Not measured yet: more, by {more} other commands."] if more > 0 else [])

    def _missing(self) -> list[str]:
        """A command for each subject and dataset, with the suites that were not run."""
        run = {(subject, column.dataset, column.class_map, column.suite) for subject, column in self.cells}
        wanted: dict[tuple[Subject, str, str], dict[str, None]] = {}
        for subject in self.subjects:
            for dataset, suite, _, class_map in self.columns:
                if (subject, dataset, class_map, suite) not in run:
                    wanted.setdefault((subject, dataset, class_map), {})[suite] = None
        return [self._command(*of, *suites) for of, suites in wanted.items()]

    def _command(self, subject: Subject, dataset: str, class_map: str, *suites: str) -> str:
        place = f"{subject.place}/checkpoints/step-{int(subject.step):08d}" if subject.step else subject.place
        kinds = {other.weights for other in self.subjects if other[:2] == subject[:2]}
        more = f" --weights {subject.weights}" if subject.weights and len(kinds) > 1 else ""
        more += f" --class-map {class_map if class_map == SUBSET else 'FILE'}" if class_map else ""
        return _command(place, self.paths[dataset], *suites) + more

    def as_json(self) -> str:
        """A list of all numbers there are."""
        found = []
        for label, subject in zip(self.labels, self.subjects, strict=True):
            for column in self.columns:
                value = self.cells.get((subject, column))
                if value is not None:
                    numbers = (None if math.isnan(number) else number for number in value)
                    ends = dict(zip(("value", "ci_low", "ci_high"), numbers, strict=True))
                    of = {"dataset": self.paths[column.dataset], "class_map": column.class_map or None}
                    of |= {"suite": column.suite, "name": column.name}
                    found.append({"label": label, **subject._asdict(), **of, **ends})
        return json.dumps(found, indent=1)


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": lambda found: "\n".join([text(found.table(), _width()), *found.notes()]),
    "markdown": lambda found: "\n\n".join([markdown(found.table()), *found.notes()]),
    "latex": lambda found: latex(found.table()),
    "json": Comparison.as_json,
}


def compare(places: Sequence[str], metrics: str = "") -> Comparison:
    """The results of runs, checkpoints, exports or files `results.parquet`.

    `metrics`: names such as `top1` or `calibration/ece`, also patterns (`knn/*`), with commas between; without, those
    that say most. Raises `UserError`, with the command to run, for a place without results, or without any of these.
    """
    cells: dict[tuple[Subject, Column], Interval] = {}
    subjects: dict[Subject, None] = {}
    paths: dict[str, str] = {}
    for place in places:
        for row in _rows(place):
            subject = _subject(place, row)
            dataset = row["fingerprint"] or row["dataset"]
            column = Column(dataset, row["suite"], row["name"], row["class_map"] or "")
            subjects[subject] = None
            paths.setdefault(column.dataset, row["dataset"])
            ends = (math.nan if row[end] is None else row[end] for end in ("ci_low", "ci_high"))
            cells[subject, column] = Interval(row["value"], *ends)  # by another path to the checkpoint too: the last
    known = list({column: None for _, column in cells})
    columns = _chosen(known, metrics, places[0])
    for subject in subjects:
        if not any((subject, column) in cells for column in columns):
            command = _command(subject.place, paths[columns[0].dataset], columns[0].suite)
            got = f"{subject.place}, without {columns[0].path}"
            raise UserError("RUNS", got, "one of the numbers to compare", f"Run `{command}`.")
    return Comparison(list(subjects), columns, cells, paths)


def _chosen(known: list[Column], metrics: str, place: str) -> list[Column]:
    patterns = [each.strip() for each in metrics.split(",")] if metrics else list(HEADLINES)
    chosen: dict[Column, None] = {}
    for pattern in patterns:
        those = [column for column in known if fnmatchcase(column.path, pattern)]
        those = those or [column for column in known if fnmatchcase(column.path, f"accuracy/{pattern}")]
        those = those or [column for column in known if fnmatchcase(column.name, pattern)]
        if metrics and not those:
            names = sorted({column.path for column in known if not DETAIL.search(column.name)})
            some = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
            command = _command(place, "DATASET", pattern.partition("/")[0] if "/" in pattern else "NAME")
            raise UserError("--metric", pattern, f"one of {some}", f"Name another, or run `{command}`.")
        chosen.update(dict.fromkeys(those))
    return list(chosen) or known


def _rows(place: str) -> list[dict[str, Any]]:
    """The rows about what `place` names; those with a value."""
    found = reading_folder(place, "RUNS")
    run = STEP.fullmatch(str(found))
    folder = Path(run[1] or ".") if run else found.parent if found.is_file() else found
    file = found if found.suffix == ".parquet" else folder / "evaluations" / NAME
    try:
        rows = [row for row in read_rows(file) if row["value"] is not None]
    except (OSError, pa.ArrowException) as error:
        raise UserError("RUNS", f"{file}: {error}", "a file of results", "Evaluate again.") from error
    one = run[2] if run else found.name if found.is_file() and found != file else ""
    if one:
        rows = [row for row in rows if Path(row["checkpoint"]).name == one]
    if not rows:
        got = f"{place}, of which there are no results" if found.exists() else f"{place}: no such file or directory"
        raise UserError("RUNS", got, "what was evaluated", f"Run `{_command(place, 'DATASET', '')}`.")
    return rows


def _subject(place: str, row: dict[str, Any]) -> Subject:
    step = STEP.search(row["checkpoint"])
    named = STEP.fullmatch(place.rstrip("/"))
    if place.endswith(".parquet"):  # of any checkpoints
        place = step[1] if step else row["checkpoint"]
    return Subject(named[1] or "." if named else place.rstrip("/"), step[3] if step else "", row["weights"] or "")


def _command(place: str, dataset: str, *suites: str) -> str:
    """What leaves the results of suites."""
    told = ["real=FILE" if suite == "real" else suite for suite in suites if suite not in ("", "accuracy")]
    more = f" --suite {','.join(told)}" if told else ""
    return f"vitscale evaluate {place} {dataset}{more}" + (" --train DATASET" if set(told) & set(ON_FEATURES) else "")


def _map(class_map: str) -> str:
    return SUBSET if class_map == SUBSET else f"map {class_map[:8]}"


def _width() -> int:
    """Columns of the terminal, or of `COLUMNS`."""
    return shutil.get_terminal_size((WIDTH, 0)).columns


def _cell(value: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value.value:.4f}" + ("" if math.isnan(value.low) else f" ({value.low:.4f}–{value.high:.4f})")


def check_plot(path: str) -> Path:
    """Where to draw. Raises `UserError` for what is no picture's name, and where none can be written."""
    return check_out(path, "--plot", PICTURES)


def plot(found: Comparison, path: Path) -> None:
    """Draw a panel for each column, values with their intervals, in the format that the name ends in.

    Raises `UserError` without matplotlib, and if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "pip install 'vitscale[report]'"
        raise UserError("--plot", "no matplotlib", "matplotlib, which draws the figure", remedy) from error
    count, across = len(found.subjects), min(PANELS, len(found.columns))
    lines = -(-len(found.columns) // across)
    figure = Figure(figsize=(2 + 2.6 * across, lines * (1.2 + 0.35 * count)), layout="constrained")
    panels = figure.subplots(lines, across, sharey=True, squeeze=False).ravel()
    for axes in panels[len(found.columns) :]:
        axes.set_axis_off()
    for axes, column, title in zip(panels, found.columns, found.header, strict=False):
        for place, subject in enumerate(found.subjects):
            value = found.cells.get((subject, column))
            if value is not None:
                ends = None if math.isnan(value.low) else [[value.value - value.low], [value.high - value.value]]
                axes.errorbar([value.value], [place], xerr=ends, fmt="o", color="#4c72b0", markersize=4, capsize=3)
        axes.set_title(title, fontsize="medium", parse_math=False)
        axes.set_yticks(range(count), found.labels, parse_math=False)
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)
    except OSError as error:
        raise UserError("--plot", f"{path}: {error}", "a file that can be written", "Choose another.") from error
