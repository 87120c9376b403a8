"""`vitscale status`: how a run is doing, from what its folder holds; while it goes on, and after."""

import fcntl
import json
import platform
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from vitscale.errors import UserError
from vitscale.pipeline.checkpoint import checkpoints, read_state
from vitscale.pipeline.config import Config, flatten, to_dict
from vitscale.pipeline.console import OUT, count
from vitscale.pipeline.keeping import holder
from vitscale.pipeline.metrics import hours, rows_backwards
from vitscale.pipeline.mirror import names, reading_folder, shown
from vitscale.pipeline.run_folder import best_of, complete
from vitscale.pipeline.schedule import parse_duration

FLOCK = {"linux": ("hhqqi", 0, 4), "darwin": ("qqihh", 3, 2)}  # fcntl(2): struct flock, its places of type and pid
LOOKED_AT = 16 << 20  # bytes at the end of the log in which the last evaluation is looked for


@dataclass
class Status:
    """A run as it is. Times are in seconds, `None` is what is not known (yet).

    `state` is `running` (a process of this host has the folder), `finished`, `stopped`, or, for a run that was last
    started on another `host`, whose locks may not show here, `elsewhere`: running there if its rows are young.
    `step` of `steps` is the last one logged, or saved if that is later. `train` and `evaluation` are the last rows of
    these kinds; with `eval.patience` the evaluation is the best one, after which `worse` had no better.
    """

    run: str
    state: str
    host: str | None
    pid: int | None
    ranks: int | None
    step: int
    steps: int | None
    examples: int
    epoch: float | None
    row_age: float | None
    train: dict[str, Any]
    evaluation: dict[str, Any]
    checkpoint: str | None
    checkpoint_age: float | None
    worse: int = 0
    incidents: list[str] = field(default_factory=list)
    rollbacks: int = 0
    hangs: list[str] = field(default_factory=list)


def read_status(run: str) -> Status:
    """Look at a run's folder, without disturbing the run. Raises `UserError` if it is none.

    Of the log only the end is read, whatever its length; out of an object store all of it is fetched.
    """
    folder = reading_folder(run, "RUN")
    recipe = _recipe(folder)
    start = _last_start(folder)
    saved, state, saved_age = _last_checkpoint(folder / "checkpoints")
    best = best_of(state)
    rows = _last_rows(folder, ("train", "eval") if recipe["data.val"] or recipe["data.dev"] else ("train",), best)
    held = holder(folder)
    pid = held["pid"] if held else lock_holder(folder / ".lock")
    step = max(rows.get("train", {}).get("step", 0), state.get("step", 0))
    batch, samples = recipe["train.global_batch"], start.get("samples") or state.get("dataset", {}).get("samples")
    steps = start.get("steps") or state.get("steps") or _total(recipe, samples)
    host = start.get("host")
    if pid is not None:
        condition = "running"
    elif steps is not None and complete(state, steps, recipe["eval.patience"]):
        condition = "finished"
    else:
        condition = "elsewhere" if host not in (None, platform.node()) else "stopped"
    return Status(
        run=run,
        state=condition,
        host=host,
        pid=pid or None,
        ranks=start.get("world_size"),
        step=step,
        steps=steps,
        examples=step * batch,
        epoch=step / (samples // batch) if samples and samples >= batch else None,
        row_age=_age(folder / "metrics.jsonl") if rows else None,
        train=rows.get("train", {}),
        evaluation=rows.get("eval") or _evaluation(best),
        worse=state["position"]["worse"] if best else 0,
        checkpoint=saved,
        checkpoint_age=saved_age,
        incidents=_names(folder / "incidents"),
        rollbacks=state.get("position", {}).get("rollbacks", 0),
        hangs=_names(folder / "hangs"),
    )


def lock_holder(path: Path) -> int | None:
    """Process that holds a lock of `lockf` on a file, 0 if it is not of this host; None if there is none.

    Only asks: taking the lock, were it for an instant, could make a run that starts just then find its folder taken.
    """
    form, kind, pid = FLOCK[sys.platform]
    query = [0] * 5
    query[kind] = fcntl.F_WRLCK  # of the whole file: from byte 0, length 0, which is to the end
    try:
        with path.open("rb") as file:
            answer = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *query)))
    except OSError:  # never begun, not ours to read, or on a file system without locks
        return None
    return None if answer[kind] == fcntl.F_UNLCK else max(answer[pid], 0)


def lines(status: Status) -> list[tuple[str, str]]:
    """What there is to say, as labels and texts; what is not known is left out."""
    train, told = status.train, [("run", f"{status.run}: {_condition(status)}")]
    told.append(("progress", _progress(status)))
    values = {
        "loss": "loss {:.4f}",
        "top1": "top-1 {:.2%}",
        "lr": "lr {:.2e}",
        "grad_norm": "gradient norm {:.3g}",
    }
    skipped = f"  {train['skipped']:,} samples skipped" if train.get("skipped") else ""
    told.append(("training", _join(train, values) + skipped))
    rates = {
        "images_per_s": "{:,.0f} images/s",
        "images_per_s_per_rank": "{:,.0f} a rank",
        "tflops": "{:,.3g} TFLOP/s a rank",
        "mfu": "MFU {:.1%}",
        "data_wait": "{:.1%} of the time waiting for data",
    }
    told.append(("speed", _join(train, rates)))
    told.append(("step", _split(train)))
    memory = {"memory_gb": "{:.1f} GB the most of a rank", "host_memory_gb": "{:.1f} GB in use on the host of rank 0"}
    told.append(("memory", _join(train, memory)))
    if "slowest_rank" in train:
        ratio = f"{train['slowest_ratio']:.2f} times the median of the others, before they meet"
        told.append(("slowest", f"rank {train['slowest_rank']}: {ratio}"))
    if status.evaluation:
        scores = {name: value for name, value in status.evaluation.items() if name not in ("step", "kind")}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, int | float))
        since = f"; {count(status.worse, 'evaluation')} since had no better" if status.worse else ""
        told.append(("evaluation", f"after step {status.evaluation['step']:,}: {shown}{since}"))
    if status.checkpoint:
        told.append(("checkpoint", f"{status.checkpoint}, {hours(status.checkpoint_age or 0)} ago"))
    if status.incidents or status.rollbacks:
        last = f"{len(status.incidents):,}, the last {status.incidents[-1]}" if status.incidents else "0"
        told.append(("incidents", f"{last}; {count(status.rollbacks, 'rollback')}"))
    if status.hangs:
        told.append(("hangs", ", ".join(status.hangs)))
    return [(label, text) for label, text in told if text]


def show(status: Status) -> None:
    """Print the lines, the labels in bold on a terminal."""
    for label, text in lines(status):
        OUT.print(Text.assemble((f"{label:11}", "bold"), text))


def as_json(status: Status) -> str:
    """All of it as one JSON object."""
    return json.dumps(asdict(status), indent=1)


def _condition(status: Status) -> str:
    process = f" (process {status.pid})" if status.pid else ""
    where = f" on {status.host}" if status.host else ""
    said = {
        "running": f"running{where}{process}",
        "finished": "finished" if status.step >= (status.steps or 0) else "finished early, by eval.patience",
        "stopped": "stopped" if status.step else "stopped before its first row",
        "elsewhere": f"last started{where}, which this host cannot see",
    }[status.state]
    if status.row_age is None:
        return said + ("; no row yet" if status.state == "running" else "")
    return f"{said}; last row {hours(status.row_age)} ago"


def _progress(status: Status) -> str:
    total = f" of {status.steps:,} ({status.step / status.steps:.1%})" if status.steps else ""
    parts = [f"step {status.step:,}{total}", f"{status.examples:,} images"]
    if status.epoch is not None:
        parts.append(f"epoch {status.epoch:.2f}")
    left = status.train.get("eta_s")
    if left is not None and status.state in ("running", "elsewhere"):
        parts.append(f"ETA {hours(left)}")
    return "  ".join(parts)


def _split(train: dict[str, Any]) -> str:
    """The time of a step and where it goes, in milliseconds."""
    if "step_ms" not in train:
        return ""
    names = {"data_ms": "data", "forward_ms": "forward", "backward_ms": "backward", "optimizer_ms": "optimizer"}
    parts = {name: train[key] for key, name in names.items() if key in train}
    parts["other"] = max(train["step_ms"] - sum(parts.values()), 0.0)
    return f"{train['step_ms']:,.1f} ms: " + ", ".join(f"{name} {value:,.1f}" for name, value in parts.items())


def _join(row: dict[str, Any], texts: dict[str, str]) -> str:
    return "  ".join(text.format(row[key]) for key, text in texts.items() if row.get(key) is not None)


def _recipe(folder: Path) -> dict[str, Any]:
    """The run's settings, dotted; defaults for those that came later. A recipe that is no longer valid will do."""
    try:
        written = yaml.safe_load((folder / "recipe.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        written = None
    if not isinstance(written, dict):
        raise UserError(
            "RUN", f"{shown(folder)}, which holds no recipe.yaml", "the folder of a run", "Give its run.dir."
        )
    return {**flatten(to_dict(Config())), **flatten(written)}


def _last_start(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "environment.json").read_text())[-1]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _last_checkpoint(folder: Path) -> tuple[str | None, dict[str, Any], float | None]:
    """Name, state and age of the newest checkpoint that can be read."""
    for path in checkpoints(folder):
        try:
            return path.name, read_state(path), _age(path / "state.json")
        except (OSError, UserError):  # damaged, or removed just now
            continue
    return None, {}, None


def _last_rows(folder: Path, kinds: tuple[str, ...], best: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last row of each kind, of `eval` that of the `best` evaluation where there is one; without the digests of
    samples. One too far from the end of the log is left out."""
    found: dict[str, dict[str, Any]] = {}
    newest = None
    for end, row in rows_backwards(folder):
        newest = end if newest is None else newest
        kind = row.get("kind")
        passed = kind == "eval" and bool(best) and row["step"] != best["step"]
        if kind in kinds and kind not in found and not passed:
            found[kind] = {name: value for name, value in row.items() if name != "samples"}
        if len(found) == len(kinds) or newest - end > LOOKED_AT:
            break
    return found


def _evaluation(best: dict[str, Any]) -> dict[str, Any]:
    """What is known of the best evaluation where its row is too far from the end of the log."""
    return {"step": best["step"], "kind": "eval", best["name"]: best["score"]} if best else {}


def _total(recipe: dict[str, Any], samples: int | None) -> int | None:
    """Steps of the whole run, if its duration can be said without knowing the data, or that is known."""
    duration, batch = str(recipe["train.duration"]), recipe["train.global_batch"]
    if samples is None and duration.strip().endswith("ep"):
        return None
    try:
        return parse_duration(duration, "train.duration", samples=samples or 0, global_batch=batch)
    except UserError:
        return None


def _names(folder: Path) -> list[str]:
    """What a folder holds, in order; nothing hidden."""
    return sorted(name for name in names(folder) if name[0] != ".")


def _age(path: Path) -> float:
    return max(time.time() - path.stat().st_mtime, 0.0)
