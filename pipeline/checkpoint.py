"""Checkpoints that any number of ranks can read, at any ZeRO stage: named ranges of float32 tensors.

A checkpoint is a folder `step-00001000`:
- `rank-00000.safetensors` …, one a rank: 1-D ranges keyed `NAME|KIND|START`, with KIND `weight`, `exp_avg` or
  `exp_avg_sq` and START the range's place in the flattened parameter;
- `index.json`: format, shape of every parameter, size and sha256 of every file;
- `state.json`: step, examples seen, architecture, classes, preprocessing, dataset, recipe, world size, versions.

It is written under a hidden name and renamed when complete, so that a folder by that name is a whole checkpoint.
Nothing is pickled.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitscale.data_prep.publish import publish_text, sync_folder
from vitscale.errors import UserError
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.engine import Engine, Fragment

FORMAT = 1
KEY = re.compile(r"(?P<name>[^|]+)\|(?P<kind>\w+)\|(?P<start>\d+)")
FOLDER = re.compile(r"step-(\d{8,})")
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
Range = tuple[int, int, "Shard", str]  # start, stop, file, key


@dataclass(frozen=True)
class Index:
    """What `index.json` holds: the shape of every parameter, and the sha256 of every file."""

    shapes: dict[str, list[int]]
    files: dict[Path, str]


def save(folder: Path, engine: Engine, state: dict[str, Any], world: World, keep: int) -> Path:
    """Write the checkpoint of `state["step"]` into `folder`, then remove all but the newest `keep`.

    Later ones go too: the run went on from before them, so they were damaged or of an abandoned course.
    Every rank calls it; a rank that cannot write (a full disk) makes all of them raise `UserError`, and earlier
    checkpoints stay as they are.
    """
    name = f"step-{state['step']:08d}"
    hidden = folder / f".{name}.partial"
    error, row = None, {}
    if world.main:
        _remove_partial(folder)
    gather(None)  # nobody writes before that is done
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        row = _write_rank_file(hidden / f"rank-{world.rank:05d}.safetensors", engine.owned_fragments())
    except (OSError, SafetensorError) as problem:
        error = _cannot_write(folder, problem)
    _agree_or_clean(error, folder, world)
    files = gather(row)
    if world.main:
        try:
            index = {"format": FORMAT, "tensors": engine.shapes, "files": files}
            publish_text(hidden / "index.json", json.dumps(index, indent=1))
            publish_text(hidden / "state.json", json.dumps({"format": FORMAT, **state}, indent=1))
            shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one that was passed over
            hidden.rename(folder / name)
            sync_folder(folder)
            _remove_all_but(folder, state["step"], keep)
        except OSError as problem:
            error = _cannot_write(folder, problem)
    _agree_or_clean(error, folder, world)
    return folder / name


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, the newest first, whether sound or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if FOLDER.fullmatch(p.name)), key=_step, reverse=True)


def newest_sound(folder: Path, world: World | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there with the sizes recorded, and a warning for each passed over.

    With `world` every rank calls it, all get the answer of rank 0's view, and the files' contents are checked too,
    each rank its share.
    """
    warnings = []
    for path in checkpoints(folder) if world is None else gather(checkpoints(folder))[0]:
        problem = ""
        try:
            read_state(path)
            files = list(read_index(path).files.items())
            for file, sha256 in files[world.rank :: world.size] if world else ():
                _check_contents(file, sha256)
        except UserError as error:
            problem = str(error)
        problems = [problem] if world is None else gather(problem)
        if not any(problems):
            return path, warnings
        warnings.append(next(filter(None, problems)))
    return None, warnings


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises `UserError` if it is damaged or from a newer version."""
    return _read_json(path / "state.json")


def read_index(path: Path) -> Index:
    """`index.json` of a checkpoint, its files checked for presence and size. Raises `UserError`."""
    index = _read_json(path / "index.json")
    try:
        files = [(RANK_FILE.fullmatch(row["file"])[0], row["bytes"], row["sha256"]) for row in index["files"]]
        shapes = {str(name): [int(side) for side in shape] for name, shape in index["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path / "index.json", repr(error), "rank files and shapes") from error
    for name, expected, _ in files:
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "no such file" if size is None else f"{size} bytes"
            raise _damaged(file, found, f"{expected} bytes")
    return Index(shapes, {path / name: sha256 for name, _, sha256 in files})


def restore(reader: "Reader", engine: Engine, step: int) -> None:
    """Fill the engine's weights and moments from a checkpoint of `step`, written at any world size and stage.

    The engine's module must already hold the checkpoint's weights (`Reader.weights`): this sets the float32 masters
    and the optimizer's state of this rank's partition. Raises `UserError` if a file is damaged.
    """
    engine.reset_optimizer(step)
    with torch.no_grad():
        for fragment in engine.fragments():
            for kind, view in fragment.tensors.items():
                reader.fill(fragment.name, kind, fragment.start, view)


class Reader:
    """Reads any range of any tensor of a checkpoint, from whichever rank files hold parts of it.

    A file's sha256 is checked when it is first read, unless `verified` says that this has been done.
    """

    def __init__(self, path: Path, verified: bool = False) -> None:
        index = read_index(path)
        self.shapes = index.shapes
        self._ranges: dict[tuple[str, str], list[Range]] = {}
        for file, sha256 in index.files.items():
            shard = Shard(file, None if verified else sha256)
            for key, length in shard.lengths():
                match = KEY.fullmatch(key)
                if not match:
                    raise _damaged(file, f"a tensor named {key!r}", "NAME|KIND|START")
                start = int(match["start"])
                self._ranges.setdefault((match["name"], match["kind"]), []).append((start, start + length, shard, key))
        for parts in self._ranges.values():
            parts.sort(key=lambda part: part[0])
        for name, shape in self.shapes.items():  # before memory is asked for what a shape merely claims
            held = max((part[1] for part in self._ranges.get((name, "weight"), [])), default=0)
            if held != math.prod(shape):
                raise _damaged(path / "index.json", f"{name} of shape {shape}", f"the {held} elements held")

    def weights(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Whole float32 weights of the parameters whose name begins with `prefix`, which is cut off, one at a time.

        An objective's network is under `model.`. Raises `UserError` if a file is damaged.
        """
        for name, shape in self.shapes.items():
            if name.startswith(prefix):
                flat = torch.empty(math.prod(shape))
                self.fill(name, "weight", 0, flat)
                yield name.removeprefix(prefix), flat.reshape(shape)

    def fill(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Copy elements `start` … of the flattened tensor into the 1-D `out`, all of it."""
        at, stop = start, start + len(out)
        for low, high, shard, key in self._ranges.get((name, kind), []):
            if low <= at < min(high, stop):
                take = min(high, stop)
                out[at - start : take - start] = shard.read(key, at - low, take - low)
                at = take
        if at != stop:
            raise UserError(
                "checkpoint", f"{name} ({kind}) without elements {at} to {stop}", "every element", "Use another one."
            )


class Shard:
    """One rank's file. Its contents are checked against `sha256`, if given, when they are first read."""

    def __init__(self, path: Path, sha256: str | None) -> None:
        self.path, self._sha256 = path, sha256
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error), "a safetensors file") from error

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Key and number of elements of every range in the file. Raises `UserError` for what is not 1-D."""
        for key in list(self._file.keys()):
            shape = self._file.get_slice(key).get_shape()
            if len(shape) != 1:
                raise _damaged(self.path, f"{key} of shape {shape}", "one dimension")
            yield key, shape[0]

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Elements `low` to `high` of a range. Raises `UserError` if the file is not what was written."""
        if self._sha256:
            _check_contents(self.path, self._sha256)
            self._sha256 = None
        return self._file.get_slice(key)[low:high]


def _check_contents(path: Path, sha256: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise _damaged(path, str(error), "a file that can be read") from error
    if found != sha256:
        raise _damaged(path, f"sha256 {found[:12]}…", f"{sha256[:12]}…")


def _remove_all_but(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints later than `step`, and all but the newest `keep` others."""
    later = [path for path in checkpoints(folder) if _step(path) > step]
    others = [path for path in checkpoints(folder) if _step(path) <= step]
    for path in [*later, *others[keep:]]:
        shutil.rmtree(path)


def _agree_or_clean(error: UserError | None, folder: Path, world: World) -> None:
    try:
        agree(error)
    except UserError:
        if world.main:
            _remove_partial(folder)
        raise


def _remove_partial(folder: Path) -> None:
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _write_rank_file(path: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
    ranges = {
        f"{fragment.name}|{kind}|{fragment.start}": view.to("cpu", torch.float32, copy=True)
        for fragment in fragments
        for kind, view in fragment.tensors.items()
    }
    save_file(ranges, path)
    path.chmod(0o644)  # safetensors makes it private
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        found = value["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, repr(error), "JSON with a `format`") from error
    if found != FORMAT:
        raise UserError("checkpoint", f"{path} of format {found}", f"format {FORMAT}", "Use the vitscale it came from.")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damaged(path: Path, got: str, expected: str) -> UserError:
    return UserError("checkpoint", f"{path}: {got}", expected, "The file is damaged: use another checkpoint.")


def _cannot_write(folder: Path, error: Exception) -> UserError:
    remedy = "Free some space or choose another run.dir, and run again: it goes on from the last checkpoint."
    return UserError("run.dir", f"{error} while saving to {folder}", "a folder that can be written", remedy)
