"""`vitscale vtab`: one network fine-tuned on each of many small tasks, and the means of what comes of it.

The protocol of VTAB-1k (Zhai et al. 2019, arXiv:1910.04867): settings are chosen on a part of a task's training images,
if there is a choice at all; then all of them are trained on, and the test set is looked at once.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from vitscale.data_prep.publish import publish_text
from vitscale.errors import EXIT_REQUEUE, UserError
from vitscale.launch.chain import known_keys
from vitscale.launch.grid import GridKind
from vitscale.launch.grid_local import check_here, run_here
from vitscale.pipeline.config import require, require_choice
from vitscale.pipeline.evaluation import tables

SHIPPED = Path(__file__).with_name("tasks")
METRICS = ("top1", "mean_per_class", "map")
NO_DATA, NOT_DONE = "no data", "not finished"


@dataclass(frozen=True)
class Task:
    """A task: its group, folders of shards, what its score is, and settings on top of the recipe's.

    With `grid`, such as `optim.lr=[.001,.01]`, the share `dev` of the training images is for choosing among those.
    """

    name: str
    group: str
    train: str
    test: str
    recipe: str
    metric: str = "top1"
    dev: str = "20%"
    grid: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def kind(self, root: str, checkpoint: str, out: str, words: list[str]) -> GridKind:
        """The task as a grid, of a single run where nothing is to be chosen, in a folder of its own in `out`."""
        places = [f"init_from={checkpoint}", f"data.train={_under(root, self.train)}", f"run.dir={out}/{self.name}"]
        dev = [f"data.dev={self.dev}"] if self.grid else []
        settings = (*self.settings, *words, *places, *dev)
        return GridKind(self.recipe, self.grid, settings, test=_under(root, self.test))


def load_tasks(file: str) -> list[Task]:
    """The tasks of a YAML file, or of one that ships by its name. Raises `UserError`.

    Keys at the top, besides `tasks`, are of every task that does not have its own; `settings` are joined.
    """
    path = Path(file) if Path(file).is_file() or not (SHIPPED / f"{file}.yaml").is_file() else SHIPPED / f"{file}.yaml"
    try:
        tree = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        got = f"{file}: {' '.join(str(error).split())}"
        raise UserError("TASKS", got, f"a YAML file of tasks, or {names}", "See docs/finetuning.md.") from error
    tree = tree if isinstance(tree, dict) else {}
    rows = tree.get("tasks")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        got = f"{file} without a list of tasks"
        raise UserError("TASKS", got, "`tasks:`, each with its keys", "See docs/finetuning.md.")
    known = [field.name for field in fields(Task)]
    common = {key: value for key, value in tree.items() if key != "tasks"}
    known_keys("TASKS", common, [*known[4:], "tasks"])
    tasks = [_task(row, common, known) for row in rows]
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), "")
    require(not twice, "TASKS", f"two tasks named {twice}", "names of their own", "Rename one.")
    return tasks


def _task(row: dict[str, Any], common: dict[str, Any], known: list[str]) -> Task:
    known_keys("TASKS", row, known)
    made: dict[str, Any] = {**common, **row}
    made["settings"] = [*common.get("settings", ()), *row.get("settings", ())]
    for field in fields(Task):
        value = made.get(field.name, field.default)
        many = field.name in ("grid", "settings")
        sound = isinstance(value, list | tuple) if many else isinstance(value, str) and bool(value)
        sound = sound and (not many or all(isinstance(word, str) and "=" in word for word in value))
        expected = "a list of SETTING=VALUE" if many else "a text"
        got = "nothing" if value is MISSING else repr(value)
        require(sound, f"TASKS: {made.get('name', 'a task')}.{field.name}", got, expected, "Add or correct it.")
        made[field.name] = tuple(value) if many else value
    require("/" not in made["name"], "TASKS", repr(made["name"]), "a name of a folder", "Take the / out.")
    require_choice(f"TASKS: {made['name']}.metric", made["metric"], METRICS)
    return Task(**made)


def run_tasks(
    checkpoint: str, file: str, out: str, words: list[str], root: str, available: bool, nproc: int,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Do every task on this machine, one after another, and write the tables into `out`; again, what is missing.

    Tasks without data are left out with `available`, else refused. Everything is checked before the first begins.
    Returns the exit code: 1 if a task failed. Raises `UserError`.
    """
    tasks = load_tasks(file)
    absent = [task for task in tasks if not all(_there(_under(root, path)) for path in (task.train, task.test))]
    names = ", ".join(task.name for task in absent)
    remedy = "Shard them, correct --root, or add --available, which leaves them out."
    require(available or not absent, "TASKS", f"no data of {names}", f"folders of shards in {root}", remedy)
    require(len(absent) < len(tasks), "--root", f"{root} without data of any task", "folders of shards", "Correct it.")
    kinds = {task.name: task.kind(root, checkpoint, out, words) for task in tasks if task not in absent}
    for task in tasks:
        if task.name in kinds:
            check_here(kinds[task.name], nproc)
            _check_metric(task, kinds[task.name].test)
    failed = False
    for name, kind in kinds.items():
        say(f"{name}:")
        code = run_here(kind, nproc, say)
        if code == EXIT_REQUEUE:
            return code
        failed |= bool(code)
        told = summary(checkpoint, [score_of(task, kinds.get(task.name)) for task in tasks])
        write_tables(told, out)
    say(tables.text(table_of(told)))
    return int(failed)


def _check_metric(task: Task, test: str) -> None:
    """Raise `UserError` if an evaluation of the test set will not have the task's metric."""
    from vitscale.pipeline.data.store import Store
    from vitscale.pipeline.evaluation.classification import MOST_CONFUSION_CLASSES

    store = Store(test, "--test")
    counted = not store.multi and len(store.classes) <= MOST_CONFUSION_CLASSES
    known = [name for name, there in zip(METRICS, (True, counted, store.multi), strict=True) if there]
    expected = f"{' or '.join(known)} for the labels of {test}"
    require(task.metric in known, f"TASKS: {task.name}.metric", task.metric, expected, "Correct it.")


def score_of(task: Task, kind: GridKind | None) -> dict[str, Any]:
    """The row of a task: its score with the settings that led there, or what is missing. None: it has no data."""
    row: dict[str, Any] = {"task": task.name, "group": task.group, "metric": task.metric}
    test = kind.tested() if kind else None
    if not kind or not test:
        return {**row, "missing": NOT_DONE if kind else NO_DATA}
    return {**row, "score": test[task.metric], "settings": kind.final().settings, "images": test["images"]}


def summary(checkpoint: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with their mean, as VTAB has it, and that of each group: no group counts for more than its tasks."""
    groups = {group: _mean(rows, group) for group in dict.fromkeys(row["group"] for row in rows)}
    return {"checkpoint": checkpoint, "tasks": rows, "groups": groups, "mean": _mean(rows)}


def _mean(rows: list[dict[str, Any]], group: str = "") -> dict[str, Any]:
    """Mean score of the tasks done, how many they are, and of how many."""
    own = [row for row in rows if row["group"] == group or not group]
    scores = [row["score"] for row in own if "score" in row]
    return {"score": sum(scores) / len(scores) if scores else None, "tasks": len(scores), "of": len(own)}


def write_tables(told: dict[str, Any], out: str) -> None:
    """Write results.json, results.md and results.tex. Raises `UserError` if that fails."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        publish_text(Path(out, "results.json"), json.dumps(told, indent=1) + "\n")
        publish_text(Path(out, "results.md"), tables.markdown(table_of(told)) + "\n")
        publish_text(Path(out, "results.tex"), tables.latex(table_of(told)) + "\n")
    except OSError as error:
        raise UserError("OUT", f"{error}", "a folder that can be written", "Choose another.") from error


def table_of(told: dict[str, Any]) -> tables.Table:
    """Task, group and score in percent, then the means."""
    rows = [[row["task"], row["group"], _percent(row.get("score")) or row["missing"]] for row in told["tasks"]]
    for group, mean in [*told["groups"].items(), ("all", told["mean"])]:
        rows.append([f"mean of {mean['tasks']} of {mean['of']}", group, _percent(mean["score"])])
    return tables.Table(["task", "group", "score, %"], rows)


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.2f}"


def _under(root: str, path: str) -> str:
    """A path of the file; one that is relative is meant in `root`."""
    return path if "://" in path or Path(path).is_absolute() else f"{root.rstrip('/')}/{path}"


def _there(path: str) -> bool:
    return "://" in path or Path(path).is_dir()
