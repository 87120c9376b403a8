"""A run's folder: who holds it, what it ran on (`environment.json`), if it is over, and its best checkpoint."""

import fcntl
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.pipeline.checkpoint import folder_name, read_state
from vitscale.pipeline.distributed import World, agree

PACKAGES = ("vitscale", "torch", "deepspeed", "numpy", "pyarrow", "pillow", "safetensors")
SCRATCH = ".suites"  # folder of features that are looked at once, while a run trains
BEST = "best.json"


@contextmanager
def run_lock(folder: Path, world: World) -> Iterator[None]:
    """Hold the run's folder, so that two runs do not write into it. The lock ends with the process, however it ends.

    Raises `UserError` on every rank if the folder is taken or cannot be written.
    """
    file, error = None, None
    if world.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / ".lock").open("w")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
            for left in folder.glob("*.partial"):  # of a start that was killed
                left.unlink()
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        except BlockingIOError:
            error = UserError(
                "run.dir", f"{folder}, in use by another run", "a folder of its own", "Wait, or choose one."
            )
        except OSError as problem:
            error = UserError("run.dir", str(problem), "a folder that can be written", "Choose another.")
    try:
        agree(error)
        yield
    finally:
        if file:
            file.close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of writing into the run's folder, such as a full disk, into a `UserError`."""
    try:
        yield
    except OSError as error:
        remedy = "Free some space or choose another run.dir, and run again: it goes on from the last checkpoint."
        raise UserError("run.dir", f"{folder} ({error})", "a folder that can be written", remedy) from error


def complete(state: dict[str, Any], steps: int, patience: int) -> bool:
    """Whether a run whose newest checkpoint has this `state.json` is over: at its last step, or, with `eval.patience`,
    after so many evaluations in a row without a better one."""
    return state.get("step", 0) >= steps or 0 < patience <= _position(state).get("worse", 0)


def best_of(state: dict[str, Any]) -> dict[str, Any]:
    """Of a run with `eval.patience`, the best evaluation up to a checkpoint with this `state.json`: `step`, `name` and
    `score`. Empty where there is none."""
    best = _position(state).get("best")
    return best if isinstance(best, dict) and isinstance(best.get("step"), int) else {}


def best_checkpoint(newest: Path) -> Path:
    """The checkpoint that a run is used by, of which this is the newest: that of its best evaluation, if it looks for
    one. Raises `UserError` if that is gone or damaged."""
    best = best_of(read_state(newest))
    path = newest.with_name(folder_name(best["step"])) if best else newest
    read_state(path)  # out of a store it is fetched
    return path


def note_best(folder: Path, state: dict[str, Any]) -> bool:
    """Have `best.json` say what is best, once the checkpoint with this `state.json` is there; whether that is news."""
    best = best_of(state)
    if not best:
        (folder / BEST).unlink(missing_ok=True)  # of before eval.patience was turned off
    if not best or read_best(folder) == best:
        return False
    publish_text(folder / BEST, json.dumps(best) + "\n")
    return True


def read_best(folder: Path) -> dict[str, Any]:
    """What `best.json` says, if it is there."""
    try:
        return dict(json.loads((folder / BEST).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _position(state: dict[str, Any]) -> dict[str, Any]:
    position = state.get("position")
    return position if isinstance(position, dict) else {}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(world: World) -> dict[str, Any]:
    """This start of a run: time (UTC), command, versions, git commit of the code, host, device and ranks."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
    }


def write_environment(folder: Path, world: World, more: dict[str, Any]) -> None:
    """Add this start, and `more` of it, to `environment.json`, a list of every start of the run, the newest last."""
    path = folder / "environment.json"
    try:
        starts = list(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # the first start, or damaged: a record is not worth a run
        starts = []
    publish_text(path, json.dumps([*starts, environment(world) | more], indent=1))


def commit() -> str | None:
    """Git commit of this code, with `+` if files differ from it; None if it is not run from its repository."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else another repository merely surrounds an installed copy
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
