"""A chain: stages that a Slurm cluster does one after another, from a YAML file. Read and checked before submission."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from vitscale.errors import UserError
from vitscale.launch.chain_stages import Kind, inside
from vitscale.launch.chain_training import KINDS
from vitscale.launch.grid import GridKind
from vitscale.launch.slurm import SlurmConfig
from vitscale.launch.slurm_submit import SlurmSettings
from vitscale.pipeline.config import require
from vitscale.pipeline.recipe import compose_overrides

ALL_KINDS: dict[str, type[Kind]] = {**KINDS, "grid": GridKind}
TOP = ("logs", "slurm", "stages")
OWN = ("name", "after", "slurm")  # keys of every stage, besides those of its kind
RANKS = ("nodes", "gpus_per_node", "gpu_type", "tasks_per_node")  # settings of `slurm` that are for stages of ranks


class _Loader(yaml.BaseLoader):
    """All words are texts, so that 24:00:00 is not a number; a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str) or keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Stage:
    """A stage: its name, the kind with its settings, the stages it waits for, and `slurm.…` as words."""

    name: str
    kind: Kind
    after: tuple[str, ...]
    slurm_words: tuple[str, ...]

    @property
    def slurm(self) -> SlurmConfig:
        """What is asked of Slurm. Raises `UserError`, with the setting's name."""
        return compose_overrides(SlurmSettings, list(self.slurm_words)).slurm

    def record(self) -> dict[str, Any]:
        """As the state file keeps it; `from_record` reads it."""
        return {
            "name": self.name,
            "kind": self.kind.name,
            "settings": self.kind.record(),
            "after": list(self.after),
            "slurm": list(self.slurm_words),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Stage":
        """The stage that `record` gave."""
        kind = _kind(record["kind"], record["settings"], record["name"])
        return cls(record["name"], kind, tuple(record["after"]), tuple(record["slurm"]))


@dataclass(frozen=True)
class Chain:
    """Stages in an order in which each comes after those it waits for, and the folder of logs and of the state."""

    logs: Path
    stages: tuple[Stage, ...]

    def before(self, stage: Stage) -> list[Stage]:
        """All that is done before a stage, in order."""
        wanted = set(stage.after)
        for each in reversed(self.stages):
            if each.name in wanted:
                wanted |= set(each.after)
        return [each for each in self.stages if each.name in wanted]


def load_chain(file: str, overrides: Iterable[str] = ()) -> Chain:
    """Read a chain from a file. `overrides`: `logs=…`, `slurm.KEY=…`, `STAGE.KEY=…`, and `STAGE.SETTING=…`.

    Raises `UserError` for what is not there, unknown keys (with the nearest right one), and stages that cannot be.
    """
    return make_chain(_read(file), overrides)


def load_logs(file: str) -> Path:
    """The folder of logs that a chain's file names. Raises `UserError`."""
    logs = _read(file).get("logs")
    require(isinstance(logs, str) and bool(logs), "CHAIN", file, "a file with `logs: FOLDER`", "Give the folder.")
    return Path(logs).absolute()


def _read(file: str) -> dict[str, Any]:
    try:
        tree = yaml.load(Path(file).read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("CHAIN", f"{file} ({error})", "a YAML file", "Check the path.") from error
    except yaml.YAMLError as error:
        raise UserError("CHAIN", f"{file}: {' '.join(str(error).split())}", "a YAML file", "Mend that line.") from error
    require(isinstance(tree, dict), "CHAIN", file, "keys logs and stages", "See docs/chains.md.")
    return tree


def make_chain(tree: dict[str, Any], overrides: Iterable[str] = ()) -> Chain:
    """`load_chain` of what the YAML file would hold. Raises `UserError`."""
    known_keys("chain", tree, TOP)
    rows = tree.get("stages")
    require(isinstance(rows, list) and bool(rows), "stages", rows, "a list of stages", "See docs/chains.md.")
    named = [_named(row) for row in rows]
    names = [name for name, _, _ in named]
    for name in names:
        require(isinstance(name, str), "name", json.dumps(name), "a word", "Correct it.")
        require(names.count(name) == 1, "name", name, "a name of its own", "Add `name:` to one of them.")
        sound = name.replace("-", "a").replace("_", "a").isalnum() and name not in TOP
        require(sound, "name", repr(name), "letters, digits, - and _", "It becomes part of names of files.")
    top = {"logs": tree.get("logs", ""), "slurm": _slurm("slurm", tree.get("slurm", {}))}
    by_name = {name: dict(settings) for name, _, settings in named}
    for override in overrides:
        _override(override, top, by_name, {name: ALL_KINDS[kind] for name, kind, _ in named})
    require(isinstance(top["logs"], str) and bool(top["logs"]), "logs", top["logs"], "a folder", "Add `logs: FOLDER`.")
    require("://" not in top["logs"], "logs", top["logs"], "a folder that all nodes see", "Choose a path.")
    stages: list[Stage] = []
    for name, kind, _ in named:
        stages.append(_stage(name, kind, by_name[name], top["slurm"], stages))
    chain = Chain(Path(top["logs"]).absolute(), tuple(stages))
    _check_outputs(chain)
    for stage in chain.stages:
        _check_inputs(chain, stage)
    return chain


def _named(row: Any) -> tuple[str, str, dict[str, Any]]:
    """Name, kind and settings of an item of the list."""
    sound = isinstance(row, dict) and len(row) == 1
    require(sound, "stages", json.dumps(row), "items such as `- verify: {dataset: PATH}`", "Write one kind an item.")
    ((kind, settings),) = row.items()
    known_keys("stages", [kind], ALL_KINDS)
    require(isinstance(settings, dict), kind, repr(settings), "settings in braces or lines", "See docs/chains.md.")
    return settings.get("name", kind), kind, settings


def _stage(name: str, kind: str, settings: dict[str, Any], defaults: dict[str, Any], before: list[Stage]) -> Stage:
    own = _slurm(f"{name}.slurm", settings.get("slurm", {}))
    made = _kind(kind, {key: value for key, value in settings.items() if key not in OWN}, name)
    if not made.ranks:
        for key in RANKS:
            got = f"{own.get(key)} for {kind}"
            require(own.get(key, "1") == "1", f"{name}.slurm.{key}", got, "one task", "Use array, or leave it out.")
        defaults = {key: value for key, value in defaults.items() if key not in RANKS}
    words = tuple(f"slurm.{key}={json.dumps(value)}" for key, value in {**defaults, **own}.items())
    earlier = [stage.name for stage in before]
    after = settings.get("after", earlier[-1:])
    after = [after] if isinstance(after, str) else after
    require(isinstance(after, list), f"{name}.after", json.dumps(after), "names of stages", "Write [NAME, NAME].")
    for each in after:
        known_keys(f"{name}.after", [each], earlier, "a stage above it")
    stage = Stage(name, made, tuple(after), words)
    require(stage.slurm.requeue, f"{name}.slurm.requeue", "false", "true: a chain needs jobs that keep their number",
            "Leave it out.")  # fmt: skip
    made.check(name, stage.slurm)
    return stage


def _kind(kind: str, settings: Mapping[str, Any], name: str) -> Kind:
    """The dataclass of a kind, strictly. Raises `UserError`."""
    schema = ALL_KINDS[kind]
    known = {field.name: field for field in fields(schema)}
    known_keys(name, settings, (*known, *OWN))
    for key, field in known.items():
        if field.default is MISSING:
            require(bool(settings.get(key)), f"{name}.{key}", "nothing", "a value", f"Add `{key}:` to the stage.")
    return schema(**{key: _typed(f"{name}.{key}", value, known[key].type) for key, value in settings.items()})


def _typed(setting: str, value: Any, kind: Any) -> Any:
    """A text, or list of texts, as the type of a field."""
    kind = getattr(kind, "__name__", str(kind))
    if kind == "int":
        require(str(value).isdecimal(), setting, repr(value), "a whole number", "Correct it.")
        return int(value)
    if kind == "str":
        require(isinstance(value, str), setting, json.dumps(value), "a text", "Correct it.")
        return value
    rows = list(value) if isinstance(value, list | tuple) else [None]
    sound = all(isinstance(row, str) and row.partition("=")[1] for row in rows)
    require(sound, setting, json.dumps(value), "a list such as [optim.lr=1e-3, run.dir=runs/a]",
            "Write KEY=VALUE; quote one with brackets.")  # fmt: skip
    return tuple(rows)


def _slurm(setting: str, value: Any) -> dict[str, Any]:
    value = value or {}  # a key with nothing behind it
    require(isinstance(value, dict), setting, repr(value), "settings such as {nodes: 2}", "Write them in braces.")
    known_keys(setting, value, [field.name for field in fields(SlurmConfig) if field.name not in ("stage", "logs")])
    return dict(value)


def _override(word: str, top: dict[str, Any], stages: dict[str, dict[str, Any]], kinds: dict[str, type[Kind]]) -> None:
    """Put a `KEY=VALUE` of the command line into the tree."""
    key, equals, value = word.partition("=")
    require(bool(equals and key), "override", repr(word), "KEY=VALUE", "Write it without spaces.")
    first, _, rest = key.partition(".")
    if key == "logs":
        top["logs"] = value
        return
    if first == "slurm":
        top["slurm"] |= _slurm("slurm", {rest: parse_value(value)})
        return
    known_keys("override", [first], (*stages, "logs", "slurm"), "a stage, logs or slurm")
    stage, kind = stages[first], kinds[first]
    if rest.startswith("slurm."):
        stage["slurm"] = {**stage.get("slurm", {}), rest.removeprefix("slurm."): parse_value(value)}
    elif rest in [field.name for field in fields(kind)]:
        stage[rest] = parse_value(value)
    elif "settings" in [field.name for field in fields(kind)]:
        stage["settings"] = [*stage.get("settings", []), f"{rest}={value}"]
    else:
        known_keys(first, [rest], [field.name for field in fields(kind)])


def parse_value(text: str) -> Any:
    """A value of the command line: a text, a list or a mapping of texts. Raises `UserError`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError("override", repr(text), "a YAML value", "Quote special characters.") from error


def known_keys(setting: str, got: Iterable[str], known: Iterable[str], what: str = "a key that is known") -> None:
    """Raise `UserError` for a key that is not one of `known`, with the nearest that is."""
    names = list(known)
    for key in map(str, got):
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Use one of them."
        require(key in names, setting, repr(key), f"{what}: {', '.join(names) or 'there is none'}", hint)


def _check_outputs(chain: Chain) -> None:
    """Refuse two stages that write the same folder."""
    seen: dict[str, str] = {}
    for stage in chain.stages:
        for path in stage.kind.outputs():
            other = next((name for place, name in seen.items() if inside(path, place) or inside(place, path)), "")
            require(
                not other, stage.name, f"{path}, which {other} writes too", "a folder of its own", "Choose another."
            )
            seen[path] = stage.name


def _check_inputs(chain: Chain, stage: Stage) -> None:
    """Refuse what is neither there nor made by a stage before."""
    before = [each.name for each in chain.before(stage)]
    for setting, path in stage.kind.inputs():
        maker = next((each for each in chain.stages for made in each.kind.outputs() if inside(path, made)), None)
        if maker and maker.name not in before:
            remedy = f"Move it behind {maker.name}, or add that to its `after`."
            require(False, f"{stage.name}.{setting}", f"{path}, which {maker.name} makes", "a stage before it", remedy)
        there = maker or "://" in path or Path(path).exists() or any(mark in path for mark in "*?[")
        expected = "a path that is there, or that a stage above makes"
        require(bool(there), f"{stage.name}.{setting}", f"{path}, which does not exist", expected, "Correct the path.")


def made_here(chain: Chain, stage: Stage) -> bool:
    """Whether a stage reads something that is not there yet."""
    return any("://" not in path and not Path(path).exists() for _, path in stage.kind.inputs())
